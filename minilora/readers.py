"""Files to conversations: four layouts of a row, told apart by their keys, become one structure.

Rows come from JSON (one array) and JSON Lines:

    {"messages": [{"role": …, "content": …, "tool_calls": […]}], "tools": […]}      OpenAI, TRL
    {"messages": [{…, "function_call": {…}}, {"role": "function", …}], "functions": […]}   older
    {"conversations": [{"from": "human", "value": …}, …]}       ShareGPT, Hermes tags in the text
    {"conversations": [{"from": "function_call", …}, {"from": "observation", …}], "tools": "[…]"}

Arguments may be objects or JSON text, tools a list or JSON text, each tool with or without its
{"type": "function", "function": …}. Hermes tags (`<tools>`, `<think>`, `<tool_call>`,
`<tool_response>`) in a text are read into structure whatever the layout. Nothing is guessed and
nothing is dropped in silence: a row that cannot be read is a problem with file, line and field.
Whether a problem ends the run (`refuse`) or is told and passed over (`warn`) is up to the caller.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from minilora.chat import (
    Conversation,
    MalformedCall,
    Message,
    ToolCall,
    call_from,
    decode_json,
    dump_json,
    load_json,
    split_reply,
)
from minilora.config import UserError, builtin

_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
          "assistant": "assistant", "gpt": "assistant", "model": "assistant",
          "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool"}


def refuse(problem: str) -> None:
    """What happens to a problem unless told otherwise: it ends the run."""
    raise UserError(problem)


def warn(notice: str) -> None:
    """Prints what the user should know of and what stops nothing."""
    print(f"note: {notice}", file=sys.stderr)


# --- files -> conversations -----------------------------------------------------------------------

def read_conversations(paths: str | Path | Sequence[str | Path],
                       on_problem: Callable[[str], None] = refuse,
                       on_notice: Callable[[str], None] = warn) -> list[Conversation]:
    """All conversations of some files, in order; each knows its source, "file:line (row n)".

    A row that cannot be read goes to `on_problem` as one line, "FILE:LINE (row N): what is wrong at
    which field; expected …", and is left out where `on_problem` returns; by default it raises
    UserError. `on_notice` hears of what is unusual but usable. A missing file always raises.
    """
    conversations = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        unusual: defaultdict[str, list[str]] = defaultdict(list)  # what -> the rows it is true of
        for where, row in _rows(builtin(path), on_problem):
            heard: set[str] = set()
            try:
                conversations.append(_conversation(row, where, heard.add))
            except ValueError as error:
                on_problem(f"{where}: {error}")
                continue
            for what in sorted(heard):
                unusual[what].append(where)
        for what, where in unusual.items():
            on_notice(f"{where[0]} {what}" + (f" (and {len(where) - 1} more rows of that file)"
                                              if len(where) > 1 else ""))
    return conversations


def _rows(path: Path, on_problem: Callable[[str], None]) -> Iterator[tuple[str, object]]:
    """Each row of a JSON array or of JSON Lines, with "file:line (row n)"."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if text.lstrip()[:1] == "[":
        yield from _array_rows(text, path, on_problem)
        return
    number = 0
    for line, row in enumerate(text.split("\n"), 1):  # JSON strings may hold other line separators
        if row.strip():
            number += 1
            where = f"{path}:{line} (row {number})"
            try:
                yield where, load_json(row)
            except ValueError as error:
                on_problem(f"{where}: {error}; expected one JSON object a line, or one array")
    if not number:
        on_problem(f"{path}: no row in it; expected conversations, one a line or in one array")


def _array_rows(text: str, path: Path, on_problem: Callable[[str], None],
                ) -> Iterator[tuple[str, object]]:
    token = re.compile(r"[ \t\r\n]*([\[\],]?)[ \t\r\n]*")
    at = token.match(text).end()
    line = 1 + text.count("\n", 0, at)
    number, closed = 0, text.startswith("]", at)
    if closed:
        on_problem(f"{path}:{line}: no row in it; expected conversations in the array")
        at = token.match(text, at).end()
    while not closed:
        number += 1
        where = f"{path}:{line} (row {number})"
        try:
            row, end = decode_json(text, at)
        except ValueError as error:  # where the next row begins cannot be known
            on_problem(f"{where}: {error}; expected a JSON object, and the rest is not read")
            return
        yield where, row
        mark = token.match(text, end)
        if mark[1] not in (",", "]"):
            on_problem(f"{where}: no comma and no ] after this row; the rest is not read")
            return
        line += text.count("\n", at, mark.end())
        at, closed = mark.end(), mark[1] == "]"
    if text[at:]:
        on_problem(f"{path}:{line}: text after the end of the array; expected nothing")


def _expect(good: bool, problem: str) -> None:
    if not good:
        raise ValueError(problem)


def _at(field: str, read: Callable, *arguments):
    """What a reader gives; its error, which does not know the field, gets the field's name."""
    try:
        return read(*arguments)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


# --- a row -> a conversation ----------------------------------------------------------------------

def _conversation(row: object, where: str, notice: Callable[[str], None]) -> Conversation:
    _expect(isinstance(row, dict), "the row is not an object; expected an object with messages")
    key = next((key for key in ("messages", "conversations") if key in row), None)
    _expect(key is not None, "no messages in the row; expected messages or conversations, not "
            + (", ".join(map(repr, list(row)[:5])) or "an empty object"))
    turns = row[key]
    _expect(isinstance(turns, list) and turns != [], f"{key} is not a list with something in it")
    tools = _tools(row.get("tools") or row.get("functions") or [], "tools")
    fields = [(f"{key}[{index}]", turn) for index, turn in enumerate(turns)]
    if row.get("system"):  # LLaMA-Factory: a column of its own
        fields.insert(0, ("system", {"role": "system", "content": row["system"]}))
    read: list[tuple[str, Message]] = []  # field of the row, message
    for field, turn in fields:
        _expect(isinstance(turn, dict), f"{field} is not an object; expected role and content")
        for message in _messages(turn, field, tools, notice):
            if message.role == "assistant" and read and read[-1][1].role == "assistant":
                message = _joined(read.pop()[1], message, field)
            read.append((field, message))
    _check_order(read)
    messages = tuple(message for _, message in read)
    called = {call.name for message in messages for call in message.tool_calls}
    if called - {tool["function"]["name"] for tool in tools}:
        notice("calls a tool that is not among its tools")
    return Conversation(messages, tuple(tools), where)


def _messages(turn: dict, field: str, tools: list[dict], notice: Callable[[str], None],
              ) -> list[Message]:
    """The messages of one turn: several where it holds several results, none where it is empty.

    Tools found in a system text are added to `tools`.
    """
    given = turn.get("role", turn.get("from"))
    role = _ROLES.get(given) if isinstance(given, str) else None
    _expect(role is not None,
            f"{field}: the role is {repr(given)[:40]}; expected one of {', '.join(_ROLES)}")
    raw = turn.get("content", turn.get("value"))
    if role == "tool" and isinstance(raw, dict | list):
        raw = dump_json(raw) if not _is_parts(raw) else raw
    text = _text(raw, f"{field}: the content")
    if role == "user" and text.lstrip().startswith("<tool_response>"):
        role = "tool"
    if given == "function_call":
        values = _at(field, load_json, text)
        calls = values if isinstance(values, list) else [values]
        return [Message("assistant", tool_calls=tuple(_call(call, field) for call in calls))]
    if role == "assistant":
        return [_assistant(turn, text, field, notice)]
    if role == "tool":
        name, id = turn.get("name"), turn.get("tool_call_id")
        for key, value in (("name", name), ("tool_call_id", id)):
            _expect(value is None or isinstance(value, str), f"{field}.{key} is not text")
        return [Message("tool", result, name=name, tool_call_id=id)
                for result in _at(field, _results, text)]
    if role == "system":
        text = _at(field, _take_tools, text, tools, notice)
        return [Message("system", text)] if text.strip() else []
    _expect(text.strip() != "", f"{field}: the user says nothing; expected text")
    return [Message("user", text)]


def _is_parts(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in value)


def _text(value: object, field: str) -> str:
    if _is_parts(value):
        return "".join(part["text"] for part in value)
    _expect(value is None or isinstance(value, str),
            f"{field} is {type(value).__name__}; expected text")
    return value or ""


def _assistant(turn: dict, text: str, field: str, notice: Callable[[str], None]) -> Message:
    calls = turn.get("tool_calls") or []
    _expect(isinstance(calls, list), f"{field}.tool_calls is not a list")
    if turn.get("function_call"):
        calls = [*calls, turn["function_call"]]
    thinking = _text(turn.get("reasoning_content") or turn.get("thinking"), f"{field}: thinking")
    message = Message("assistant", text, thinking)
    if "<tool_call>" in text or text.lstrip().startswith("<think>"):
        message = _at(field, _split_text, text, notice)
        _expect(not (calls and message.tool_calls),
                f"{field}: calls both in the text and beside it; expected one of them")
        message = replace(message, thinking=message.thinking or thinking)
    if calls:
        message = replace(message, tool_calls=tuple(_call(call, field) for call in calls))
    return message


def _call(raw: object, field: str) -> ToolCall:
    _expect(isinstance(raw, dict), f"{field}: a call is not an object; expected name and arguments")
    function = raw.get("function", raw)
    _expect(isinstance(function, dict), f"{field}: function of a call is not an object")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI writes no arguments as "" now and then
        arguments = _at(f"{field}: arguments", load_json, arguments) if arguments.strip() else {}
    return _at(field, call_from, {"name": function.get("name"), "arguments": arguments,
                                  "id": raw.get("id")})


def _tools(raw: object, field: str) -> list[dict]:
    if isinstance(raw, str):
        raw = _at(field, load_json, raw) if raw.strip() else []
    _expect(isinstance(raw, list), f"{field} is not a list; expected a list of tools")
    tools, names = [], set()
    for index, tool in enumerate(raw):
        at = f"{field}[{index}]"
        _expect(isinstance(tool, dict), f"{at} is not an object; expected name and parameters")
        if "function" not in tool:  # flat; OpenAI's newer API has a type beside the name
            inner = {key: value for key, value in tool.items() if key != "type"}
            tool = {"function": inner}
        tool = {"type": "function", **tool}
        function = tool["function"]
        name = function.get("name") if isinstance(function, dict) else None
        _expect(isinstance(name, str) and name != "", f"{at}: the name is missing or not text")
        _expect(isinstance(function.get("parameters", {}), dict),
                f"{at}.parameters is not an object; expected a JSON schema")
        _expect(name not in names, f"{at}: a second tool named {name!r}; expected one")
        names.add(name)
        tools.append(tool)
    return tools


# --- Hermes tags in a text ------------------------------------------------------------------------

_CALL_BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_RESULT_BLOCK = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_TOOLS_BLOCK = re.compile(r"<tools>\s*([\[{].*?)\s*</tools>", re.DOTALL)


def _python_value(text: str) -> object:
    """A value written as Python prints it. Only literals are read, nothing is run."""
    try:
        return load_json(dump_json(ast.literal_eval(text)))
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        raise ValueError("neither JSON nor a Python literal") from None


def _split_text(text: str, notice: Callable[[str], None]) -> Message:
    try:
        return split_reply(text, "hermes")
    except MalformedCall as error:
        blocks = _CALL_BLOCK.findall(text)
        if not any(re.match(r"\{\s*'", block) for block in blocks):
            raise
        reason = error

    def as_json(block: re.Match) -> str:
        try:
            value = _python_value(block[1])
        except ValueError:
            raise reason from None
        return f"<tool_call>\n{dump_json(value)}\n</tool_call>"

    message = split_reply(_CALL_BLOCK.sub(as_json, text), "hermes")
    notice("has calls written as Python prints them, read as JSON")
    return message


def _results(text: str) -> list[str]:
    found = _RESULT_BLOCK.findall(text)
    outside = _RESULT_BLOCK.sub("", text).strip()
    _expect(not found or not outside, f"text outside <tool_response>: {outside[:20]!r}")
    return found or [text]


def _take_tools(text: str, tools: list[dict], notice: Callable[[str], None]) -> str:
    """The system text without its tools block; the block's tools go to `tools` if it is empty."""
    block = _TOOLS_BLOCK.search(text)
    if not block:
        return text
    inside, values, at = block[1], [], 0
    try:
        while at < len(inside):  # one list, or one object a line
            value, at = decode_json(inside, at)
            values += value if isinstance(value, list) else [value]
            at += len(inside[at:]) - len(inside[at:].lstrip())
    except ValueError:
        value = _python_value(inside)
        values = value if isinstance(value, list) else [value]
        notice("has tools written as Python prints them, read as JSON")
    found = _tools(values, "<tools>")
    if tools and found != tools:
        notice("has other tools in its system message than beside it; the latter are used")
    tools[:] = tools or found
    return f"{text[:block.start()].rstrip()} {text[block.end():].lstrip()}".strip()


# --- the order of messages ------------------------------------------------------------------------

def _joined(before: Message, message: Message, field: str) -> Message:
    """Two assistant messages in a row: calls may follow a text or calls, as one turn."""
    _expect(message.tool_calls != () and not message.content and not message.thinking,
            f"{field}: a second assistant message in a row; expected a user message or a result")
    return replace(before, tool_calls=before.tool_calls + message.tool_calls)


def _check_order(read: list[tuple[str, Message]]) -> None:
    before, calls, results = None, (), 0  # role of the last message, calls of the last reply
    for field, message in read:
        role = message.role
        if role == "system":
            _expect(before is None, f"{field}: a system message later on; expected it first")
        elif role == "user":
            _expect(before not in ("user", "tool"), f"{field}: a user message after a {before} "
                    "message; expected the assistant to reply before")
        elif role == "assistant":
            _expect(before in ("user", "tool"), f"{field}: an assistant message at the start; "
                    "expected a user message before")
            _expect(bool(message.content.strip() or message.tool_calls),
                    f"{field}: the assistant says nothing and calls nothing; expected either")
            calls, results = message.tool_calls, 0
        else:
            results += 1
            _expect(before in ("assistant", "tool") and results <= len(calls),
                    f"{field}: a tool result without a call; expected a call before")
            ids = [call.id for call in calls if call.id]
            _expect(message.tool_call_id is None or not ids or message.tool_call_id in ids,
                    f"{field}: tool_call_id {message.tool_call_id!r} is of no call before it")
        before = role
    _expect(before not in (None, "system"), "no user message; expected one")
