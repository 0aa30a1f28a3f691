"""How published data sets write calls, tools and schemas, and what they mean by it.

Types that JSON Schema does not know (`standard_tool`), values as Python prints them, Hermes tags in
a text, and the rows that hold no list of messages: xLAM's and Glaive's.
"""

import ast
import re
import warnings
from collections.abc import Callable

from minilora.chat import MalformedCall, Message, split_reply
from minilora.jsontext import decode_json, dump_json, load_json


def at_field(field: str, read: Callable, *arguments):
    """What a reader gives; its error, which does not know the field, gets the field's name."""
    try:
        return read(*arguments)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def json_list(raw: object, field: str) -> list:
    """A list, or the list that a JSON text is."""
    if isinstance(raw, str):
        raw = at_field(field, load_json, raw) if raw.strip() else []
    if not isinstance(raw, list):
        raise ValueError(f"{field} is not a list; expected a list of tools")
    return raw


# --- schemas --------------------------------------------------------------------------------------

# Words for types in schemas of the Berkeley leaderboard and of xLAM, Python's and Java's, in lower
# case, and JSON Schema's word for them; None: any value.
_TYPES = {word: standard for standard, words in {
    "object": "dict object hashmap map", "array": "list tuple set array arraylist",
    "string": "str string char", "integer": "int integer long short byte bigint",
    "number": "float double number", "boolean": "bool boolean", "null": "null none",
}.items() for word in words.split()} | {"any": None}


def standard_tool(tool: dict) -> dict:
    """The tool with its schemas' types in JSON Schema's words: dict is object, float number.

    `tool` is flat or has its `function` inside; what is written well comes back equal. `any` is no
    type at all. `List[int]` and the like are arrays of integers. Unknown words stay as they are.
    """
    for key in ("function", "parameters"):
        if isinstance(tool.get(key), dict):
            read = standard_tool if key == "function" else _schema
            tool = {**tool, key: read(tool[key])}
    return tool


def _schema(schema: object) -> object:
    """A schema with standard types, at every place that holds a schema, and nowhere else."""
    if isinstance(schema, list):
        return [_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions"):
            value = ({name: _schema(item) for name, item in value.items()}
                     if isinstance(value, dict) else value)
        elif key in ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf",
                     "not"):
            value = _schema(value)
        elif key == "type" and isinstance(value, str):
            outer, bracket, inner = value.partition("[")
            if bracket and not inner.endswith("]"):
                outer, inner = value, ""
            value = _TYPES.get(outer.lower(), value)
            if value is None:
                continue
            of = _TYPES.get(inner.removesuffix("]").lower())
            if value == "array" and of and "items" not in schema:
                found["items"] = {"type": of}
        elif key == "type" and isinstance(value, list):
            value = [_TYPES.get(word.lower(), word) if isinstance(word, str) else word
                     for word in value]
            if None in value:
                continue
        found[key] = value
    return found


# --- what is not quite JSON -----------------------------------------------------------------------

MOST_PYTHON = 2**17  # characters of a value as Python prints it

# What Glaive writes: JSON, but for its arguments, JSON between single quotes.
_QUOTED = re.compile(r'\{\s*"name":\s*("[^"]*"),\s*"arguments":\s*\'(.*)\'\s*\}', re.DOTALL)


def _python_value(text: str) -> object:
    """A value written as Python prints it. Only literals are read, nothing is run.

    What is longer than `MOST_PYTHON` is not tried: to read a character of it may take Python half a
    kilobyte of memory.
    """
    if len(text) > MOST_PYTHON:
        raise ValueError(f"not JSON, and longer than the {MOST_PYTHON} characters of a Python "
                         "literal that are read")
    try:
        with warnings.catch_warnings(action="ignore"):  # of "\d", which is a warning to Python
            return load_json(dump_json(ast.literal_eval(text)))
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        raise ValueError("neither JSON nor a Python literal") from None


def loose_json(text: str, notice: Callable[[str], None]) -> object:
    """A value as JSON, as Glaive writes a call, or as Python prints it; told where it is no JSON.

    Raises ValueError with what is wrong with it as JSON.
    """
    try:
        return load_json(text)
    except ValueError as error:
        if not str(error).startswith("not JSON"):  # JSON, but too strange to use
            raise
        reason = error
    quoted = _QUOTED.fullmatch(text.strip())
    if quoted:
        arguments = at_field("arguments", load_json, quoted[2].replace("\\'", "'"))
        notice("has arguments between single quotes, read as JSON")
        return {"name": load_json(quoted[1]), "arguments": arguments}
    try:
        value = _python_value(text.strip())
    except ValueError:
        raise reason from None
    notice("has calls written as Python prints them, read as JSON")
    return value


# --- Hermes tags in a text ------------------------------------------------------------------------

def _cut_blocks(text: str, tag: str, begins: str = "") -> list[str]:
    """The text cut at its blocks `<tag>…</tag>`; every second piece is what stands in one.

    `begins` is a pattern for what follows the tag. (As one pattern a block would take time by the
    square of the white space, or of the tags without an end, that somebody has put there.)
    """
    opening, closing = re.compile(f"<{tag}>{begins}"), f"</{tag}>"
    pieces, at = [], 0
    while found := opening.search(text, at):
        end = text.find(closing, found.end())
        if end < 0:
            break
        pieces += [text[at:found.start()], text[found.start() + len(tag) + 2:end].strip()]
        at = end + len(closing)
    return [*pieces, text[at:]]


def split_text(text: str, notice: Callable[[str], None]) -> Message:
    """An assistant's text with its tags read into thinking and calls."""
    try:
        return split_reply(text, "hermes")
    except MalformedCall as error:
        reason = error

    pieces = _cut_blocks(text, "tool_call")
    for place in range(1, len(pieces), 2):
        try:
            value = loose_json(pieces[place], notice)
        except ValueError:
            raise reason from None
        pieces[place] = f"<tool_call>\n{dump_json(value)}\n</tool_call>"
    return split_reply("".join(pieces), "hermes")


def split_thinking(text: str) -> Message:
    """An assistant's text that begins with `<think>`, split; tags after that are text."""
    thinking, _, content = text.lstrip().removeprefix("<think>").partition("</think>")
    return Message("assistant", content.strip(), thinking.strip())


def results_in(text: str) -> list[str]:
    """The results in a text: what stands in its `<tool_response>` blocks, or all of it."""
    pieces = _cut_blocks(text, "tool_response")
    outside = "".join(pieces[::2]).strip()
    if pieces[1:] and outside:
        raise ValueError(f"text outside <tool_response>: {outside[:20]!r}")
    return pieces[1::2] or [text]


def take_tools(text: str, notice: Callable[[str], None]) -> tuple[str, list]:
    """A system text without its `<tools>` blocks, and what stands in them."""
    pieces = _cut_blocks(text, "tools", r"\s*(?=[\[{])")
    values = [value for inside in pieces[1::2] for value in tool_values(inside, notice)]
    said = (piece.strip() for piece in pieces[::2])
    return " ".join(filter(None, said)) if pieces[1:] else text, values


_SPACE = re.compile(r"\s*")


def tool_values(text: str, notice: Callable[[str], None]) -> list:
    """The tools in a text: one list, or one object after the other."""
    text, values, at = text.strip(), [], 0
    try:
        while at < len(text):
            value, at = decode_json(text, at)
            values += value if isinstance(value, list) else [value]
            at = _SPACE.match(text, at).end()
        return values
    except ValueError:
        value = _python_value(text)
    notice("has tools written as Python prints them, read as JSON")
    return value if isinstance(value, list) else [value]


# --- rows of their own kind -----------------------------------------------------------------------

def xlam_row(row: dict) -> tuple[list[tuple[str, dict]], list]:
    """Turns, each with its field, and tools of a row of xLAM's function-calling-60k."""
    calls = row["answers"] if isinstance(row["answers"], str) else dump_json(row["answers"])
    tools = json_list(row.get("tools") or [], "tools")
    return [("query", {"role": "user", "content": row["query"]}),
            ("answers", {"role": "function_call", "content": calls})], list(map(_xlam_tool, tools))


def _xlam_tool(tool: object) -> object:
    """xLAM lists parameters by name, "str, optional" where one may be left out."""
    parameters = tool.get("parameters") if isinstance(tool, dict) else None
    if not isinstance(parameters, dict) or "properties" in parameters or not all(
            isinstance(p, dict) and isinstance(p.get("type"), str) for p in parameters.values()):
        return tool
    types = {name: re.split(r",\s*(?=optional|default)", p["type"], maxsplit=1)
             for name, p in parameters.items()}
    return {**tool, "parameters": {
        "type": "object",
        "properties": {name: {**p, "type": types[name][0]} for name, p in parameters.items()},
        "required": [name for name, words in types.items() if len(words) == 1]}}


_SPEAKERS = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
# (No \s*, which would go to the end of a run of newlines from each of them.)
_SPEAKER = re.compile(rf"(?:\A|\n|<\|endoftext\|>)[^\S\n]*({'|'.join(_SPEAKERS)}):")


def glaive_row(row: dict, notice: Callable[[str], None]) -> tuple[list[tuple[str, dict]], list]:
    """Turns, each with its field, and tools of a row of Glaive's function-calling-v2."""
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise ValueError("system is not text; expected text")
    prose, brace, signatures = system.removeprefix("SYSTEM:").partition("{")
    tools = at_field("system", tool_values, brace + signatures, notice) if brace else []
    fields = [("system", {"role": "system", "content": prose.strip().removesuffix("-").rstrip()})]
    before, *parts = _SPEAKER.split(row["chat"])
    if before.strip() or not parts:
        raise ValueError(f"chat: begins with {before[:20]!r}; expected USER: and a text")
    for index, (speaker, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        field = f"chat, part {index + 1}"
        text = text.replace("<|endoftext|>", "").strip()
        turn = {"role": _SPEAKERS[speaker], "content": text}
        if speaker == "ASSISTANT" and "<functioncall>" in text:
            said, _, call = text.partition("<functioncall>")
            turn["content"] = said.rstrip()
            turn["function_call"] = at_field(field, loose_json, call, notice)
        fields.append((field, turn))
    return fields, tools
