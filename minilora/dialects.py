"""How tools, thinking, calls and results are written, and how written calls are read again.

A dialect is one small table: its control tokens, and for each block what stands before, between and
after the items in it. A dialect whose items are JSON needs no more than that, as "hermes" shows:

    <tool_call>⏎{"name": …, "arguments": {…}}⏎</tool_call>

and its renderer, its chat template and its strict reader all come from the same strings. A dialect
with a notation of its own gives one `Notation` besides. Sources of the three in `DIALECTS`:

    hermes          the format of NousResearch/Hermes-Function-Calling
    mistral         mistral-common, `tokens/tokenizers/instruct.py`, InstructTokenizerV3
    functiongemma   ai.google.dev/gemma/docs/functiongemma, "formatting and best practices" and
                    "full function calling sequence", and the chat template of
                    google/functiongemma-270m-it

JSON is `json.dumps(value, ensure_ascii=False)`, which is what the `tojson` filter of chat templates
prints, so that a template can render the very same text.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from minilora.config import UserError

MAX_DEPTH = 64  # levels of objects and lists in one JSON value


class Kind(IntEnum):
    """What a token is, and so whether it may carry loss."""

    PROMPT = 0         # all that the model does not write: turn headers, system, tools, user
    THINK = 1          # reasoning, tags included
    TOOL_CALL = 2      # tags and arguments of a call
    TOOL_RESPONSE = 3  # tags and text of a result
    ANSWER = 4         # text for the user
    END = 5            # what ends the model's turn: <end_of_turn> (its newline is PROMPT)


class Part(NamedTuple):
    """A stretch of a rendered conversation: plain text, or one control token by its string."""

    text: str
    kind: Kind
    control: bool = False


@dataclass(frozen=True)
class ToolCall:
    """One call. `arguments` is a JSON object."""

    name: str
    arguments: dict
    id: str | None = None


class MalformedCall(ValueError):
    """Text that starts a tool call and is not one; the message says what is wrong with it."""


# --- strict JSON ----------------------------------------------------------------------------------

def _unique(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(_twice(next(key for key in keys if keys.count(key) > 1)))
    return value


def _twice(key: str) -> str:
    return f"key {key[:40]!r} occurs twice in one object"


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a JSON number that can be held")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
_SPACE = re.compile(r"[ \t\r\n]*")


def skip_space(text: str, at: int) -> int:
    """Where the white space at `at` ends."""
    return _SPACE.match(text, at).end()


def _check_value(value: object) -> None:
    """Refuses what decodes but cannot be written again: bottomless nesting, lone surrogates."""
    level, depth = [value], 0
    while level:
        for text in level:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise ValueError("half a surrogate pair (\\ud800 …) in a string") from None
        inner = [[*item.keys(), *item.values()] if isinstance(item, dict) else item
                 for item in level if isinstance(item, dict | list)]
        if inner and depth == MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        level, depth = list(itertools.chain.from_iterable(inner)), depth + 1


_TOO_DEEP = f"JSON nested deeper than {MAX_DEPTH} levels"


def decode_json(text: str, start: int = 0) -> tuple[object, int]:
    """The JSON value that begins at `start` (white space skipped) and where it ends.

    Stricter than `json`: duplicate keys, NaN and Infinity, numbers that overflow, half surrogate
    pairs and nesting past `MAX_DEPTH` raise ValueError, whose message says what is wrong.
    """
    try:
        value, end = _DECODER.raw_decode(text, skip_space(text, start))
    except json.JSONDecodeError as error:
        near = text[error.pos:error.pos + 20]
        raise ValueError(f"not JSON: {error.msg} at {near!r}" if near else
                         f"not JSON: {error.msg} at the end of the text") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_value(value)
    return value, end


def load_json(text: str) -> object:
    """The one JSON value that `text` is; ValueError as `decode_json`, or for text that follows."""
    value, end = decode_json(text)
    if text[end:].strip():
        raise ValueError(f"text after the JSON value: {text[end:].strip()[:20]!r}")
    return value


def dump_json(value: object) -> str:
    """JSON as every dialect and every chat template here writes it."""
    return json.dumps(value, ensure_ascii=False)


def call_from(value: object) -> ToolCall:
    """The call that a decoded {"name": …, "arguments": {…}} is ("id" may be there).

    Raises MalformedCall that names the key.
    """
    if not isinstance(value, dict):
        raise MalformedCall(f"a call is a JSON object, not {type(value).__name__}")
    unknown = [key for key in value if key not in ("name", "arguments", "id")]
    if unknown:
        raise MalformedCall(f"a call has name and arguments, not {unknown[0]!r}")
    name, arguments, id = value.get("name"), value.get("arguments"), value.get("id")
    if not isinstance(name, str) or not name:
        raise MalformedCall('"name" of a call is missing or not text')
    if not isinstance(arguments, dict):
        raise MalformedCall(f'"arguments" of {name!r} is missing or not a JSON object')
    if id is not None and not isinstance(id, str):
        raise MalformedCall(f'"id" of the call of {name!r} is not text')
    return ToolCall(name, arguments, id)


# --- a dialect ------------------------------------------------------------------------------------

class Written(str):
    """What a model wrote, as text that knows which of its tags are control tokens.

    Made by `chat.decode_reply`. `controls` are the positions where a control token of the dialect
    begins; a tag anywhere else was spelled in plain pieces and means nothing. None: nobody knows,
    and every tag counts. What is cut out of it is a plain str.
    """

    controls: frozenset[int] | None = None

    def has(self, token: str, at: int) -> bool:
        """Whether this control token stands at `at`."""
        return self.startswith(token, at) and (self.controls is None or at in self.controls)

    def seek(self, token: str, at: int = 0) -> int:
        """Where this control token next stands; -1 where it does not."""
        at = self.find(token, at)
        while at >= 0 and not self.has(token, at):
            at = self.find(token, at + 1)
        return at

    def until_control(self, at: int) -> str:
        """The text up to the next control token after `at`; all of it where nobody knows."""
        if self.controls is None:
            return self
        return self[:min((i for i in self.controls if i >= at), default=len(self))]


Piece = tuple[str, bool]  # text, and whether it is a control token


class Block(NamedTuple):
    """What stands before, between and after the items of a block, control tokens included."""

    opening: str
    between: str = ""
    closing: str = ""


class Result(NamedTuple):
    """What a tool returned: its text, the name of the tool and the id of the call it answers."""

    text: str
    name: str = ""
    call_id: str | None = None


@dataclass(frozen=True)
class Notation:
    """How one tool, one call and one result are written, and how a call is read.

    `read` is given where an item begins and returns the call and where it ends; it raises
    MalformedCall. The last three are the same writers as Jinja expressions for the names tool, call
    and tool_call (where `id` is), message, content and turns; they may use `macros`.
    """

    tool: Callable[[dict], list[Piece]]
    call: Callable[[ToolCall], list[Piece]]
    result: Callable[[Result], list[Piece]]
    read: Callable[[Written, int], tuple[ToolCall, int]]
    jinja_tool: str
    jinja_call: str
    jinja_result: str
    macros: str = ""


def _read_json_call(reply: Written, at: int) -> tuple[ToolCall, int]:
    # The JSON says where the call ends: a string in it may well spell a closing tag.
    try:
        value, end = decode_json(reply.until_control(at), at)
    except ValueError as error:
        raise MalformedCall(str(error)) from None
    return call_from(value), end


# Jinja for one call; arguments may come as an object or, as on OpenAI's wire, as JSON text.
_CALL = ("'{\"name\": ' ~ call.name | tojson ~ ', \"arguments\": ' ~ (call.arguments if "
         "call.arguments is string else call.arguments | tojson)")

JSON = Notation(
    tool=lambda tool: [(dump_json(tool), False)],
    call=lambda call: [(dump_json({"name": call.name, "arguments": call.arguments}), False)],
    result=lambda result: [(result.text, False)],
    read=_read_json_call,
    jinja_tool="tool | tojson", jinja_call=f"{_CALL} ~ '}}'", jinja_result="content")


@dataclass(frozen=True)
class Dialect:
    """How tools, thinking, calls and results are written, and where they stand.

    tokens:    each control token and what it means; its new row starts from the mean of that text
    think:     has one item, the thinking; in a dialect without tokens for it, it is text
    gap:       what stands between two blocks of a model turn
    developer: system and tools have a turn of that name, without blank lines between them; else
               they open the first user turn
    inline:    results stand in the model's own turn: it stops at the token that opens them, and
               goes on after them; else they stand in a user turn
    """

    tokens: dict[str, str]
    tools: Block
    calls: Block
    results: Block
    think: Block = Block("")
    notation: Notation = JSON
    gap: str = "\n"
    developer: bool = False
    inline: bool = False

    @property
    def stop(self) -> str:
        """The token, besides <end_of_turn>, at which the model stops; "" where there is none."""
        return self.cut(self.results.opening)[0][0] if self.inline else ""

    def cut(self, text: str) -> list[Piece]:
        """One of the table's strings, cut into text and control tokens."""
        return _cut(text, tuple(self.tokens))

    def block(self, block: Block, items: list[list[Piece]], kind: Kind) -> list[Part]:
        """A block with its items, nothing where there are none."""
        if not items:
            return []
        pieces = self.cut(block.opening) + items[0]
        for item in items[1:]:
            pieces = pieces + self.cut(block.between) + item
        return [Part(text, kind, control) for text, control in pieces + self.cut(block.closing)
                if text]

    def match(self, reply: Written, text: str, at: int) -> int | None:
        """Where one of the table's strings ends that stands at `at`; white space may differ."""
        for piece, control in self.cut(text):
            for word in piece.split():
                at = skip_space(reply, at)
                if not (reply.has(word, at) if control else reply.startswith(word, at)):
                    return None
                at += len(word)
        return at

    def read(self, reply: Written, at: int) -> list[ToolCall]:
        """The calls of a reply, of which the first begins at `at`. Raises MalformedCall."""
        calls, end = [], self.match(reply, self.calls.opening, at)
        if end is None:
            raise MalformedCall(f"calls begin with {self.calls.opening.strip()!r}, not with "
                                f"{reply[at:at + 40]!r}")
        while end is not None:
            call, after = self.notation.read(reply, end)
            calls.append(call)
            end = self.match(reply, self.calls.between, after)
        end = self.match(reply, self.calls.closing, after)
        if end is None:
            raise MalformedCall(f"{self.calls.closing.strip()} is missing after the call of "
                                f"{calls[-1].name[:40]!r}")
        end = skip_space(reply, end)
        if end < len(reply) and not (self.stop and reply.has(self.stop, end)):
            raise MalformedCall(f"text after a call: {reply[end:end + 20]!r}")
        return calls


@functools.cache
def _cut(text: str, tokens: tuple[str, ...]) -> list[Piece]:
    cut = re.split(f"({'|'.join(map(re.escape, tokens))})", text) if tokens else [text]
    return [(piece, n % 2 == 1) for n, piece in enumerate(cut) if piece]


# --- Mistral's notation ---------------------------------------------------------------------------

def _mistral_tool(tool: dict) -> list[Piece]:
    standard = {"name": "", "description": "", "parameters": {}}
    return [(dump_json({"type": "function", "function": standard | tool["function"]}), False)]


def _mistral_call(call: ToolCall) -> list[Piece]:
    value = {"name": call.name, "arguments": call.arguments}
    return [(dump_json({**value, "id": call.id} if call.id else value), False)]


def _mistral_result(result: Result) -> list[Piece]:
    try:
        content = load_json(result.text)
    except ValueError:
        content = result.text
    value = {"content": content}
    return [(dump_json({**value, "call_id": result.call_id} if result.call_id else value), False)]


MISTRAL = replace(
    JSON, tool=_mistral_tool, call=_mistral_call, result=_mistral_result,
    macros=r"""
{%- macro declared(function) %}
  {{- '{"type": "function", "function": {"name": ' ~ function.name | tojson }}
  {{- ', "description": ' ~ (function.description or '') | tojson }}
  {{- ', "parameters": ' ~ (function.parameters or {}) | tojson }}
  {%- for key, item in function.items() if key not in ['name', 'description', 'parameters'] %}
    {{- ', ' ~ key | tojson ~ ': ' ~ item | tojson }}
  {%- endfor %}
  {{- '}}' }}
{%- endmacro %}
{%- macro parsed(content) %}
  {%- set number = content | length < 20 and content[-1:] in '0123456789' and
                   content in [content | int | string, content | float | string] %}
  {%- set nested = content[:1] in ['{', '['] and content[-1:] in ['}', ']'] %}
  {{- content if number or nested or content in ['true', 'false', 'null'] else content | tojson }}
{%- endmacro %}
""",
    jinja_tool="declared(tool.function)",
    jinja_call=f"{_CALL} ~ (', \"id\": ' ~ tool_call.id | tojson if tool_call.id else '') ~ '}}'",
    jinja_result="'{\"content\": ' ~ parsed(content) ~ (', \"call_id\": ' ~ message.tool_call_id "
                 "| tojson if message.tool_call_id else '') ~ '}'")


# --- FunctionGemma's notation ---------------------------------------------------------------------

# call:name{key:<escape>text<escape>,other:[1,2.5,true,None,{deep:{}}]}, keys in the order of their
# lower case letters, null spelled as Python spells it: all as the published template has it. It
# writes names and keys bare, so that it cannot tell those that have a mark of the notation in them,
# white space at an end, or nothing at all: these stand between <escape> tokens here, as that
# template itself writes some keys of declarations.
ESCAPE = "<escape>"
_MARKS = "{}[],:<>"
_BARE = re.compile(f"[^{re.escape(_MARKS)}]+")
_SCALAR = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?|true|false|null|None")


def _escaped(text: str) -> list[Piece]:
    return [(ESCAPE, True), (text, False), (ESCAPE, True)]


def _gemma_name(name: str) -> list[Piece]:
    bare = _BARE.fullmatch(name) and name == name.strip()
    return [(name, False)] if bare else _escaped(name)


def _gemma_value(value: object, what: str = "data") -> list[Piece]:
    """Data, or a schema as it is declared: what a function, a property of one, a schema in one or
    the properties themselves (names) are.

    A schema has its types in capitals; a function and a property have a description first, "" if
    need be. Keys that the published template does not know, and leaves out, are kept.
    """
    if isinstance(value, str):
        return _escaped(value)
    if isinstance(value, list | tuple):
        return _joined("[", [_gemma_value(item) for item in value], "]")
    if not isinstance(value, dict):
        return [(str(value).lower() if isinstance(value, bool) else str(value), False)]
    items, described = [], what in ("function", "property")
    if described:
        items.append([("description:", False), *_gemma_value(value.get("description") or "")])
    for key, item in sorted(value.items(), key=lambda item: item[0].lower()):
        if described and key == "description" or what == "function" and key == "name":
            continue
        inside = "data" if what == "data" else "property" if what == "names" else "schema"
        if inside == "schema" and key == "properties":
            inside = "names"
        elif inside == "schema" and key == "type" and isinstance(item, str | list):
            item = item.upper() if isinstance(item, str) else [str(each).upper() for each in item]
        items.append([*_gemma_name(key), (":", False), *_gemma_value(item, inside)])
    return _joined("{", items, "}")


def _joined(opening: str, items: list[list[Piece]], closing: str) -> list[Piece]:
    pieces = [piece for item in items for piece in [(",", False), *item]]
    return [(opening, False), *pieces[1:], (closing, False)]


def _gemma_tool(tool: dict) -> list[Piece]:
    function = tool["function"]
    return [("declaration:", False), *_gemma_name(function["name"]),
            *_gemma_value(function, "function")]


def _gemma_call(call: ToolCall) -> list[Piece]:
    return [("call:", False), *_gemma_name(call.name), *_gemma_value(call.arguments)]


def _gemma_result(result: Result) -> list[Piece]:
    return [("response:", False), *_gemma_name(result.name), *_gemma_value({"value": result.text})]


def _near(reply: Written, at: int) -> str:
    return repr(reply[at:at + 20]) if at < len(reply) else "the end"


def _read_gemma_text(reply: Written, at: int) -> tuple[str, int]:
    """The text that the <escape> at `at` opens, and where its closing <escape> ends."""
    start = at + len(ESCAPE)
    end = reply.seek(ESCAPE, start)
    if end < 0 or end > len(reply.until_control(start)):
        raise MalformedCall(f"{ESCAPE} is missing after the text that begins {_near(reply, start)}")
    return reply[start:end], end + len(ESCAPE)


def _read_gemma_name(reply: Written, at: int, mark: str) -> tuple[str, int]:
    """A name or key and where it ends: after `mark` if that is ":", before it if it is "{"."""
    at = skip_space(reply, at)
    if reply.has(ESCAPE, at):
        name, end = _read_gemma_text(reply, at)
    elif bare := _BARE.match(reply, at):
        name, end = bare.group().rstrip(), bare.end()
    else:
        raise MalformedCall(f"a name or key is missing at {_near(reply, at)}")
    end = skip_space(reply, end)
    if not reply.startswith(mark, end):
        raise MalformedCall(f"{mark} is missing after {name[:40]!r}, at {_near(reply, end)}")
    return name, end + (mark == ":")


def _read_gemma_value(reply: Written, at: int, depth: int = 0) -> tuple[object, int]:
    at = skip_space(reply, at)
    if reply.has(ESCAPE, at):
        return _read_gemma_text(reply, at)
    if scalar := _SCALAR.match(reply, at):
        return load_json(scalar.group().replace("None", "null")), scalar.end()
    if reply[at:at + 1] not in ("{", "["):
        raise MalformedCall(f"no value at {_near(reply, at)}: expected text between {ESCAPE} "
                            "tokens, a number, true, false, null, [ or {")
    if depth == MAX_DEPTH:
        raise MalformedCall(_TOO_DEEP)
    keyed = reply[at] == "{"
    closing, value, items = "}" if keyed else "]", {}, []
    at = skip_space(reply, at + 1)
    while not reply.startswith(closing, at) or value or items:
        if keyed:
            key, at = _read_gemma_name(reply, at, ":")
            if key in value:
                raise MalformedCall(_twice(key))
            value[key], at = _read_gemma_value(reply, at, depth + 1)
        else:
            item, at = _read_gemma_value(reply, at, depth + 1)
            items.append(item)
        at = skip_space(reply, at)
        if reply.startswith(closing, at):
            break
        if not reply.startswith(",", at):
            raise MalformedCall(f", or {closing} is missing at {_near(reply, at)}")
        at += 1
    return value if keyed else items, at + 1


def _read_gemma_call(reply: Written, at: int) -> tuple[ToolCall, int]:
    at = skip_space(reply, at)
    if not reply.startswith("call:", at):
        raise MalformedCall(f"a call is written call:name{{…}}, not {_near(reply, at)}")
    name, at = _read_gemma_name(reply, at + len("call:"), "{")
    if not name:
        raise MalformedCall("the name of a call is empty")
    try:
        arguments, end = _read_gemma_value(reply, at)
        _check_value(name)
        _check_value(arguments)
    except MalformedCall:
        raise
    except ValueError as error:  # a number that overflows, half a surrogate pair
        raise MalformedCall(str(error)) from None
    return ToolCall(name, arguments), end


GEMMA = Notation(
    tool=_gemma_tool, call=_gemma_call, result=_gemma_result, read=_read_gemma_call,
    macros=r"""
{%- macro named(name) %}
  {%- set bare = name and name == name | trim and not name | select('in', '{}[],:<>') | list %}
  {{- name if bare else '<escape>' ~ name ~ '<escape>' }}
{%- endmacro %}
{%- macro written(value, what='data') %}
  {%- if value is string %}
    {{- '<escape>' ~ value ~ '<escape>' }}
  {%- elif value is boolean %}
    {{- 'true' if value else 'false' }}
  {%- elif value is mapping %}
    {%- set described = what in ['function', 'property'] %}
    {{- '{' ~ ('description:' ~ written(value['description'] or '') if described else '') }}
    {%- for key, item in value | dictsort if not (described and key == 'description'
                                                  or what == 'function' and key == 'name') %}
      {{- (',' if described or not loop.first else '') ~ named(key) ~ ':' }}
      {%- if what in ['data', 'names'] %}
        {{- written(item, 'data' if what == 'data' else 'property') }}
      {%- elif key == 'type' and item is string %}
        {{- written(item | upper) }}
      {%- elif key == 'type' and item is sequence and item is not mapping %}
        {{- written(item | map('upper') | list) }}
      {%- else %}
        {{- written(item, 'names' if key == 'properties' else 'schema') }}
      {%- endif %}
    {%- endfor %}
    {{- '}' }}
  {%- elif value is sequence %}
    {{- '[' }}
    {%- for item in value %}
      {{- (',' if not loop.first else '') ~ written(item) }}
    {%- endfor %}
    {{- ']' }}
  {%- else %}
    {{- value }}
  {%- endif %}
{%- endmacro %}
{%- macro caller(message, earlier) %}
  {%- set found = namespace(name=message.name or '', calls=[], at=0) %}
  {%- for turn in earlier %}
    {%- set found.at = found.at + 1 if turn.role in ['tool', 'function'] else 0 %}
    {%- set found.calls = found.calls if found.at else turn.tool_calls or [] %}
  {%- endfor %}
  {%- for call in found.calls if call.id and call.id == message.tool_call_id %}
    {%- set found.name = found.name or (call.function or call).name %}
  {%- endfor %}
  {%- for call in found.calls[found.at:found.at + 1] %}
    {%- set found.name = found.name or (call.function or call).name %}
  {%- endfor %}
  {{- found.name }}
{%- endmacro %}
""",
    jinja_tool="'declaration:' ~ named(tool.function.name) ~ written(tool.function, 'function')",
    jinja_call="'call:' ~ named(call.name) ~ (raise_exception('expected arguments as an object, "
               "not as text') if call.arguments is string else written(call.arguments))",
    jinja_result="'response:' ~ named(caller(message, turns[:loop.index0])) "
                 "~ written({'value': content})")


# --- the dialects ---------------------------------------------------------------------------------

DIALECTS = {
    "hermes": Dialect(
        tokens={
            "<tools>": "start of the list of tools",
            "</tools>": "end of the list of tools",
            "<think>": "start of thinking",
            "</think>": "end of thinking",
            "<tool_call>": "start of a tool call",
            "</tool_call>": "end of a tool call",
            "<tool_response>": "start of a tool's response",
            "</tool_response>": "end of a tool's response",
        },
        tools=Block("<tools>\n", "\n", "\n</tools>"),
        think=Block("<think>\n", closing="\n</think>"),
        calls=Block("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        results=Block("<tool_response>\n", "\n</tool_response>\n<tool_response>\n",
                      "\n</tool_response>")),
    "mistral": Dialect(
        tokens={
            "[AVAILABLE_TOOLS]": "start of the list of tools",
            "[/AVAILABLE_TOOLS]": "end of the list of tools",
            "[TOOL_CALLS]": "a list of tool calls",
            "[TOOL_RESULTS]": "start of a tool's result",
            "[/TOOL_RESULTS]": "end of a tool's result",
        },
        tools=Block("[AVAILABLE_TOOLS] [", ", ", "][/AVAILABLE_TOOLS]"),
        calls=Block("[TOOL_CALLS] [", ", ", "]"),
        results=Block("[TOOL_RESULTS] ", "[/TOOL_RESULTS][TOOL_RESULTS] ", "[/TOOL_RESULTS]"),
        notation=MISTRAL),
    "functiongemma": Dialect(
        tokens={
            "<start_function_declaration>": "start of a function's declaration",
            "<end_function_declaration>": "end of a function's declaration",
            "<start_function_call>": "start of a function call",
            "<end_function_call>": "end of a function call",
            "<start_function_response>": "start of a function's response",
            "<end_function_response>": "end of a function's response",
            "<escape>": "start or end of a text",
        },
        tools=Block("<start_function_declaration>",
                    "<end_function_declaration><start_function_declaration>",
                    "<end_function_declaration>"),
        think=Block("", closing="\n"),
        calls=Block("<start_function_call>", "<end_function_call><start_function_call>",
                    "<end_function_call>"),
        results=Block("<start_function_response>",
                      "<end_function_response><start_function_response>",
                      "<end_function_response>"),
        notation=GEMMA, gap="", developer=True, inline=True),
}


def get_dialect(name: str) -> Dialect:
    """The dialect of that name. Raises UserError that lists the known ones."""
    if name not in DIALECTS:
        raise UserError(f"dialect {name!r} is not known; choose one of {', '.join(DIALECTS)}")
    return DIALECTS[name]
