"""Files to conversations: many layouts of a row, told apart by their keys, become one structure.

    {"messages": [{"role": …, "content": …, "tool_calls": […]}], "tools": […]}      OpenAI, TRL,
                                                                              mistral-finetune
    {"messages": [{…, "function_call": {…}}, {"role": "function", …}], "functions": […]}   older
    {"conversations": [{"from": "human", "value": …}, …]}       ShareGPT, Hermes tags in the text
    {"conversations": [{"from": "function_call", …}, {"from": "observation", …}], "tools": "[…]"}
    {"query": …, "tools": "[…]", "answers": "[…]"}              xLAM
    {"system": "SYSTEM: …", "chat": "USER: … ASSISTANT: … <functioncall> …"}        Glaive v2

Arguments may be objects or JSON text, tools a list or JSON text, each tool with or without its
{"type": "function", "function": …}, schemas in JSON Schema's words or in others (`standard_tool`),
a content text or a list of typed parts. An assistant message with `"weight": 0` (mistral-finetune,
OpenAI), `"train": false` (axolotl) or `"loss": false` (ms-swift) carries no loss.

Hermes tags in a text are structure in any layout: `<tools>` in a system text, `<think>` where an
assistant's begins, `<tool_call>` and `<tool_response>`; but the latter two are text in a row that
has calls in fields or roles of their own, for calls stand in one place. `"hermes_tags": false` in a
row says that whatever its texts spell is text, `true` that all tags are structure. The rows that
minilora writes (`openai_row`: transcripts, mended copies) say the former where a text spells a tag,
and so read as what was said, whatever it was.

Nothing is guessed and nothing is dropped in silence: a row that cannot be read is a problem with
file, line and field. Whether a problem ends the run (`refuse`) or is told and passed over (`warn`)
is up to the caller.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from minilora.chat import Conversation, Message, ToolCall
from minilora.config import UserError
from minilora.formats import (
    at_field,
    glaive_row,
    json_list,
    loose_json,
    results_in,
    split_text,
    split_thinking,
    standard_tool,
    take_tools,
    xlam_row,
)
from minilora.jsontext import check_value, dump_json, load_json
from minilora.notation import DEPTH, call_from
from minilora.report import visible
from minilora.sources import Data, find_files, read_rows

_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
          "assistant": "assistant", "gpt": "assistant", "model": "assistant",
          "function_call": "assistant", "function-call": "assistant", "tool_call": "assistant",
          "tool": "tool", "function": "tool", "observation": "tool", "function-response": "tool",
          "tool_response": "tool"}
_CALL_ROLES = ("function_call", "function-call", "tool_call")  # whose text is a call
_CALL_TAGS = {"<tool_call>", "<tool_response>"}
_TAGS = {"<tools>", "<think>", *_CALL_TAGS}  # of Hermes, which mean something in a text
_ARE_TEXT = ' (if the tags are text: "hermes_tags": false in the row)'


def refuse(problem: str) -> None:
    """What happens to a problem unless told otherwise: it ends the run."""
    raise UserError(problem)


def warn(notice: str) -> None:
    """Prints what the user should know of and what stops nothing."""
    print(f"note: {visible(notice)}", file=sys.stderr)


# --- files -> conversations -----------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """A row of a file: the conversation that it is, or None and what is wrong with it."""

    file: str
    where: str                         # file:line (row n)
    conversation: Conversation | None
    problem: str = ""                  # what is wrong at which field; expected …
    notes: tuple[str, ...] = ()        # what is unusual but usable: "has …"


def iterate_rows(data: Data, mend: bool = False) -> Iterator[Row]:
    """Every row of DATA, good and bad, in order.

    With `mend` some of what is wrong is put right, where that changes no meaning, and noted: user
    messages that follow each other are joined, an empty message at the end is left out, and so is
    a tool that is there twice. Raises UserError for a file that cannot be read.
    """
    for file in find_files(data):
        for where, value, problem in read_rows(file):
            notes: set[str] = set()
            conversation = None
            try:
                if not problem:
                    conversation = replace(read_row(value, notes.add, mend), source=where,
                                           weight=file.weight)
            except ValueError as error:
                problem = str(error)
            yield Row(file.name, where, conversation, problem, tuple(sorted(notes)))


def iterate_conversations(data: Data, on_problem: Callable[[str], None] = refuse,
                          on_notice: Callable[[str], None] = warn) -> Iterator[Conversation]:
    """The conversations of DATA (see minilora.sources), in order; each knows its source.

    Files are read row by row, so one may be larger than the memory. A row that cannot be read goes
    to `on_problem` as one line, "FILE:LINE (row N): what is wrong at which field; expected …", and
    is left out where `on_problem` returns; by default it raises UserError. `on_notice` hears, after
    each file, of what is unusual but usable. What is no file always raises.
    """
    for _, rows in itertools.groupby(iterate_rows(data), lambda row: row.file):
        unusual: dict[str, list] = {}  # what -> the first row it is true of, and of how many
        for row in rows:
            if row.conversation is None:
                on_problem(f"{row.where}: {row.problem}")
                continue
            for note in row.notes:
                unusual.setdefault(note, [row.where, 0])[1] += 1
            yield row.conversation
        for note, (where, number) in unusual.items():
            on_notice(f"{where} {note}" + (f" (and {number - 1} more rows of that file)"
                                           if number > 1 else ""))


def read_conversations(data: Data, on_problem: Callable[[str], None] = refuse,
                       on_notice: Callable[[str], None] = warn) -> list[Conversation]:
    """`iterate_conversations` as a list."""
    return list(iterate_conversations(data, on_problem, on_notice))


def openai_row(conversation: Conversation) -> dict:
    """The row in OpenAI's layout that reads as this conversation (its source and weight aside)."""
    messages = []
    for message in conversation.messages:
        fields = {"role": message.role, "content": message.content}
        if message.thinking:
            fields["reasoning_content"] = message.thinking
        if message.tool_calls:
            fields["tool_calls"] = [
                {**({} if call.id is None else {"id": call.id}), "type": "function",
                 "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls]
        for key in ("name", "tool_call_id"):
            if getattr(message, key) is not None:
                fields[key] = getattr(message, key)
        if not message.trained:
            fields["weight"] = 0
        messages.append(fields)
    row = {"messages": messages}
    if conversation.tools:
        row["tools"] = list(conversation.tools)
    spelled = dump_json(row)
    return row | ({"hermes_tags": False} if any(tag in spelled for tag in _TAGS) else {})


def _expect(good: bool, problem: str) -> None:
    if not good:
        raise ValueError(problem)


# --- a row -> a conversation ----------------------------------------------------------------------

def read_row(row: object, notice: Callable[[str], None], mend: bool = False) -> Conversation:
    """The conversation that a row is; `notice` hears of what is unusual, `mend` as `iterate_rows`.

    Raises ValueError that says what is wrong at which field.
    """
    _expect(isinstance(row, dict), "the row is not an object; expected an object with messages")
    fields, raw_tools = _layout(row, notice)
    tools = _tools(raw_tools, "tools", notice, mend)
    tags = _tags_in(row, [turn for _, turn in fields])
    if row.get("system") and "chat" not in row:  # LLaMA-Factory: a column of its own
        fields.insert(0, ("system", {"role": "system", "content": row["system"]}))
    if mend and len(fields) > 1 and _is_empty(fields[-1][1]):
        fields.pop()
        notice("has an empty message at its end, left out")
    groups: list[list[Message]] = []  # each to be one message
    last: list[str] = []              # the field of the last message of each
    for field, turn in fields:
        _expect(isinstance(turn, dict), f"{field} is not an object; expected role and content")
        for message in _messages(turn, field, tools, tags, notice):
            before = groups[-1][0] if groups else None
            if before and before.role == message.role and (
                    message.role == "assistant" or mend and message.role == "user"):
                if message.role == "assistant":
                    _check_second(before, message, field)
                else:
                    notice("has user messages that follow each other, joined")
                groups[-1].append(message)
                last[-1] = field
            else:
                groups.append([message])
                last.append(field)
    read = [_joined(group) for group in groups]
    _check_order(zip(last, read, strict=True))
    messages = tuple(_by_call(read, notice))
    called = {call.name for message in messages for call in message.tool_calls}
    if called - {tool["function"]["name"] for tool in tools}:
        notice("calls a tool that is not among its tools")
    return Conversation(messages, tuple(tools))


def _layout(row: dict, notice: Callable[[str], None]) -> tuple[list[tuple[str, object]], object]:
    """The turns of a row, each with its field, and its tools as they are written."""
    key = next((key for key in ("messages", "conversations") if key in row), None)
    if key is None and "query" in row and "answers" in row:  # xLAM
        return xlam_row(row)
    if key is None and isinstance(row.get("chat"), str):  # Glaive v2
        return glaive_row(row, notice)
    _expect(key is not None, "no messages in the row; expected messages or conversations, not "
            + (", ".join(repr(key)[:40] for key in list(row)[:5]) or "an empty object"))
    turns = row[key]
    _expect(isinstance(turns, list) and turns != [], f"{key} is not a list with something in it")
    return ([(f"{key}[{index}]", turn) for index, turn in enumerate(turns)],
            row.get("tools") or row.get("functions") or [])


def _tags_in(row: dict, turns: list) -> set[str]:
    """The tags that are structure in the texts of a row, by the rule at the top of this file."""
    said = row.get("hermes_tags")
    _expect(said is None or isinstance(said, bool),
            f"hermes_tags is {repr(said)[:40]}; expected false (tags are text) or true")
    if said is not None:
        return _TAGS if said else set()
    in_fields = any(turn.get("tool_calls") or turn.get("function_call")
                    or turn.get("role", turn.get("from")) in _CALL_ROLES
                    for turn in turns if isinstance(turn, dict))
    return _TAGS - _CALL_TAGS if in_fields else _TAGS


def _at_tags(field: str, read: Callable, *arguments):
    """What a reader of tags gives; its error says where, and what helps if they are text."""
    try:
        return at_field(field, read, *arguments)
    except ValueError as error:
        raise ValueError(f"{error}{_ARE_TEXT}") from None


def _is_empty(turn: object) -> bool:
    if not isinstance(turn, dict) or turn.get("tool_calls") or turn.get("function_call"):
        return False
    role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    return (isinstance(role, str) and _ROLES.get(role) in ("user", "assistant")
            and (text is None or isinstance(text, str) and not text.strip()))


def _messages(turn: dict, field: str, tools: list[dict], tags: set[str],
              notice: Callable[[str], None]) -> list[Message]:
    """The messages of one turn: several where it holds several results, none where it is empty.

    `tags` are structure in its text. Tools found in a system text are added to `tools`.
    """
    given = turn.get("role", turn.get("from"))
    role = _ROLES.get(given) if isinstance(given, str) else None
    _expect(role is not None,
            f"{field}: the role is {repr(given)[:40]}; expected one of {', '.join(_ROLES)}")
    raw = turn.get("content", turn.get("value"))
    if role == "tool" and isinstance(raw, dict | list) and not _is_text_parts(raw):
        raw = dump_json(raw)
    text, thinking = _text(raw, f"{field}: the content")
    _expect(not thinking or role == "assistant", f"{field}: thinking of a {role}; expected text")
    if role == "user" and "<tool_response>" in tags and (
            text.lstrip().startswith("<tool_response>")):
        role = "tool"
    if given in _CALL_ROLES:
        values = at_field(field, loose_json, text, notice)
        calls = values if isinstance(values, list) else [values]
        return [Message("assistant", tool_calls=tuple(_call(call, field) for call in calls),
                        trained=_trained(turn, field))]
    if tags and any(tag in text for tag in _CALL_TAGS - tags):
        notice("has <tool_call> or <tool_response> in a text, read as text, for its calls are in "
               "fields")
    if role == "assistant":
        return [_assistant(turn, text, thinking, field, tags, notice)]
    if role == "tool":
        name, id = turn.get("name"), turn.get("tool_call_id")
        for key, value in (("name", name), ("tool_call_id", id)):
            _expect(value is None or isinstance(value, str), f"{field}.{key} is not text")
        results = _at_tags(field, results_in, text) if "<tool_response>" in tags else [text]
        return [Message("tool", result, name=name, tool_call_id=id) for result in results]
    if role == "system":
        text, values = (_at_tags(field, take_tools, text, notice) if "<tools>" in tags else
                        (text, []))
        found = _at_tags(field, _tools, values, "<tools>", notice)
        if tools and found and found != tools:
            notice("has other tools in its system message than beside it; the latter are used")
        tools[:] = tools or found
        return [Message("system", text)] if text.strip() else []
    _expect(text.strip() != "", f"{field}: the user says nothing; expected text")
    return [Message("user", text)]


def _is_text_parts(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in value)


def _text(value: object, field: str) -> tuple[str, str]:
    """The text and the thinking of a content: a text, nothing, or a list of typed parts."""
    if value is None or isinstance(value, str):
        return value or "", ""
    _expect(isinstance(value, list) and value != [] and all(isinstance(p, dict) for p in value),
            f"{field} is {type(value).__name__}; expected text")
    texts, thoughts = [], []
    for index, part in enumerate(value):
        kind = part.get("type", "text")
        if kind in ("text", "input_text", "output_text"):
            _expect(isinstance(part.get("text"), str),
                    f"{field}[{index}]: a part without a text; expected one")
            texts.append(part["text"])
            continue
        _expect(kind in ("reasoning", "thinking"), f"{field}[{index}]: a part of type "
                f"{repr(kind)[:40]}; expected text: only text can be learned from")
        inside = next((part[key] for key in (kind, "text", "content") if part.get(key)), None)
        thoughts.append(_text(inside, f"{field}[{index}]")[0])
    return "".join(texts), "".join(thoughts)


def _assistant(turn: dict, text: str, thinking: str, field: str, tags: set[str],
               notice: Callable[[str], None]) -> Message:
    calls = turn.get("tool_calls") or []
    _expect(isinstance(calls, list), f"{field}.tool_calls is not a list")
    if turn.get("function_call"):
        calls = [*calls, turn["function_call"]]
    beside = [_text(turn.get(key), f"{field}.{key}")[0]
              for key in ("reasoning_content", "reasoning", "thinking")]
    message = Message("assistant", text)
    if "<tool_call>" in text and "<tool_call>" in tags:
        message = _at_tags(field, split_text, text, notice)
    elif "<think>" in tags and text.lstrip().startswith("<think>"):
        message = split_thinking(text)
    _expect(not (calls and tags and (message.tool_calls or "<tool_call>" in message.content)),
            f"{field}: calls both in the text and beside it; expected one of them{_ARE_TEXT}")
    thoughts = {thought for thought in (message.thinking, thinking, *beside) if thought.strip()}
    _expect(len(thoughts) < 2 and not (
        "<think>" in tags and message.content.lstrip().startswith("<think>")),
            f"{field}: thinking in two places; expected it in one")
    if calls:
        message = replace(message, tool_calls=tuple(_call(call, field) for call in calls))
    return replace(message, thinking="".join(thoughts), trained=_trained(turn, field))


def _trained(turn: dict, field: str) -> bool:
    marks = {key: turn[key] for key in ("weight", "train", "loss") if turn.get(key) is not None}
    for key, value in marks.items():
        _expect(isinstance(value, bool | int | float) and value in (0, 1),
                f"{field}.{key} is {repr(value)[:40]}; expected 0 or 1, false or true")
    return all(marks.values())


def _call(raw: object, field: str) -> ToolCall:
    _expect(isinstance(raw, dict), f"{field}: a call is not an object; expected name and arguments")
    function = raw.get("function", raw)
    _expect(isinstance(function, dict), f"{field}: function of a call is not an object")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI writes no arguments as "" now and then
        arguments = arguments.strip() and at_field(f"{field}: arguments", load_json, arguments)
    return at_field(field, call_from, {"name": function.get("name"), "id": raw.get("id"),
                                       "arguments": {} if arguments == "" else arguments})


# --- tools ----------------------------------------------------------------------------------------

def _tools(raw: object, field: str, notice: Callable[[str], None], mend: bool = False,
           ) -> list[dict]:
    tools: dict[str, dict] = {}
    for index, tool in enumerate(json_list(raw, field)):
        at = f"{field}[{index}]"
        if isinstance(tool, str) and tool.lstrip()[:1] == "{":
            tool = at_field(at, load_json, tool)
        _expect(isinstance(tool, dict), f"{at} is not an object; expected name and parameters")
        if "function" not in tool:  # flat; OpenAI's newer API has a type beside the name
            inner = {key: value for key, value in tool.items() if key != "type"}
            tool = {"function": inner}
        tool = {"type": "function", **tool}
        function = tool["function"]
        name = function.get("name") if isinstance(function, dict) else None
        _expect(isinstance(name, str) and name != "", f"{at}: the name is missing or not text")
        if isinstance(function.get("parameters"), str):
            parameters = at_field(f"{at}.parameters", load_json, function["parameters"])
            tool = {**tool, "function": {**function, "parameters": parameters}}
        _expect(isinstance(tool["function"].get("parameters", {}), dict),
                f"{at}.parameters is not an object; expected a JSON schema")
        at_field(at, check_value, tool, DEPTH)
        plain = standard_tool(tool)
        if plain != tool:
            notice("has types in its tools that JSON Schema lacks (dict, float …), read as its own")
        _expect(name not in tools or mend and tools[name] == plain,
                f"{at}: a second tool named {repr(name)[:40]}; expected one")
        if name in tools:
            notice("has a tool twice, read as one")
        tools[name] = plain
    return list(tools.values())


# --- the order of messages ------------------------------------------------------------------------

def _check_second(before: Message, message: Message, field: str) -> None:
    """Of two assistant messages in a row: calls may follow a text or calls, as one turn."""
    _expect(message.tool_calls != () and not message.content and not message.thinking,
            f"{field}: a second assistant message in a row; expected a user message or a result")
    _expect(before.trained == message.trained,
            f"{field}: one half of a turn carries loss, the other none; expected the same of both")


def _joined(group: list[Message]) -> Message:
    """Some messages of one role as one: their texts, and all of their calls."""
    if len(group) == 1:
        return group[0]
    texts = filter(None, (message.content for message in group))
    calls = itertools.chain.from_iterable(message.tool_calls for message in group)
    return replace(group[0], content="\n\n".join(texts), tool_calls=tuple(calls))


def _check_order(read: Iterable[tuple[str, Message]]) -> None:
    before, calls, ids, results = None, (), set(), 0  # last role; calls of the last reply
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
            ids = {call.id for call in calls if call.id}
        else:
            results += 1
            _expect(before in ("assistant", "tool") and results <= len(calls),
                    f"{field}: a tool result without a call; expected a call before")
            _expect(not message.tool_call_id or not ids or message.tool_call_id in ids,
                    f"{field}: tool_call_id {repr(message.tool_call_id)[:40]} is of no call before")
        before = role
    _expect(before not in (None, "system"), "no user message; expected one")


def _by_call(messages: list[Message], notice: Callable[[str], None]) -> list[Message]:
    """The messages with results in the order of their calls, where both have ids."""
    ordered: list[Message] = []
    ids: list[str | None] = []
    for role, group in itertools.groupby(messages, key=lambda message: message.role):
        group = list(group)
        given = [message.tool_call_id for message in group]
        places = {id: place for place, id in enumerate(ids)}
        if role == "tool" and len(places) == len(ids) and set(given) <= places.keys() - {None}:
            _expect(len(set(given)) == len(given), "two results of one call; expected one of each")
            placed = sorted(group, key=lambda message: places[message.tool_call_id])
            if placed != group:
                notice("has results in another order than its calls, read in theirs")
            group = placed
        ids = [call.id for call in group[-1].tool_calls]
        ordered += group
    return ordered
