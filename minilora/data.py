"""Files to conversations, conversations to examples, examples to batches of a fixed length.

Four layouts of a row are read, from JSON (one array) and JSON Lines, and told apart by their keys:

    {"messages": [{"role": …, "content": …, "tool_calls": […]}], "tools": […]}      OpenAI, TRL
    {"messages": [{…, "function_call": {…}}, {"role": "function", …}], "functions": […]}   older
    {"conversations": [{"from": "human", "value": …}, …]}       ShareGPT, Hermes tags in the text
    {"conversations": [{"from": "function_call", …}, {"from": "observation", …}], "tools": "[…]"}

Arguments may be objects or JSON text, tools a list or JSON text, each tool with or without its
{"type": "function", "function": …}. Hermes tags (`<tools>`, `<think>`, `<tool_call>`,
`<tool_response>`) in a text are read into structure whatever the layout. Nothing is guessed and
nothing is dropped in silence: a row that does not fit is a problem with file, line and field.
"""

import ast
import bisect
import hashlib
import math
import random
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minilora.chat import (
    Conversation,
    Kind,
    MalformedCall,
    Message,
    ToolCall,
    call_from,
    decode_json,
    dump_json,
    load_json,
    render,
    split_reply,
)
from minilora.config import UserError, builtin
from minilora.tokenizer import Tokenizer

IGNORED = -100  # the label of a position that carries no loss

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


# --- conversations -> examples --------------------------------------------------------------------

def split(conversations: Sequence[Conversation], share: float, seed: int,
          ) -> tuple[list[Conversation], list[Conversation]]:
    """(kept, held out), both in the given order; `share` of all are held out, at least one.

    Who is held out depends on the conversation itself and the seed, not on where it stands, so
    copies of one conversation are never on both sides. share 0 holds out none.
    """
    if not 0 <= share < 1:
        raise UserError(f"the held-out share is {share}; expected at least 0 and less than 1")

    def draw(conversation: Conversation) -> bytes:
        text = f"{seed} {conversation.tools!r} {conversation.messages!r}"
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    draws = [draw(conversation) for conversation in conversations]
    count = max(1, round(share * len(draws))) if share and draws else 0
    chosen = set(sorted(draws)[:count])
    return ([item for item, drawn in zip(conversations, draws, strict=True) if drawn not in chosen],
            [item for item, drawn in zip(conversations, draws, strict=True) if drawn in chosen])


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation as tokens. `labels[t] == ids[t]` where t is a target, else -100."""

    ids: Tensor      # [n] int64
    kinds: Tensor    # [n] uint8, values of Kind
    labels: Tensor   # [n] int64; not shifted
    source: str      # file:line (row n)
    cut: int = 0     # trained tokens that did not fit

    def __len__(self) -> int:
        return len(self.ids)


def trained_kinds(train_on: str) -> frozenset[Kind]:
    """The kinds that carry loss: `assistant` is all that the model writes, or a comma list.

    Raises UserError for a kind that there is not.
    """
    if train_on == "assistant":
        return frozenset({Kind.THINK, Kind.TOOL_CALL, Kind.ANSWER, Kind.END})
    names = {kind.name.lower(): kind for kind in Kind}
    chosen = [word.strip() for word in train_on.split(",") if word.strip()]
    unknown = [word for word in chosen if word not in names]
    if unknown or not chosen:
        raise UserError(f"train-on {unknown[0] if unknown else train_on!r} is not known; choose "
                        f"assistant, or some of {', '.join(names)} with commas between")
    return frozenset(names[word] for word in chosen)


def make_example(conversation: Conversation, tokenizer: Tokenizer, dialect: str = "hermes",
                 length: int | None = None, train_on: str = "assistant") -> Example:
    """Renders a conversation and labels it.

    An `<end_of_turn>` is also trained where the token before it is: who learns to call learns to
    stop. The first token never is a target. What is longer than `length` ends after the last model
    turn that fits whole, so system and tools are always there and no call is cut.

    Raises UserError naming the conversation where no trained token is in it, or none is left.
    """
    rendered = render(conversation, tokenizer, dialect)
    ids = torch.tensor(rendered.ids)                                     # [n]
    kinds = torch.tensor(rendered.kinds, dtype=torch.uint8)              # [n]
    trained = torch.isin(kinds, torch.tensor(sorted(trained_kinds(train_on)), dtype=torch.uint8))
    trained[1:] |= (kinds[1:] == Kind.END) & trained[:-1]
    trained[0] = False
    name = conversation.source or "conversation"
    total, size = int(trained.sum()), len(ids)
    if total == 0:
        raise UserError(f"{name}: nothing to train with train-on {train_on}; expected at least one "
                        "token of that kind: leave the row out, or train on assistant")
    if length is not None and size > length:
        ends = (kinds[:length] == Kind.END).nonzero()
        size = int(ends[-1]) + 1 if len(ends) else 0
        if not trained[:size].any():
            raise UserError(f"{name}: nothing to train in the turns that fit {length} of its "
                            f"{len(ids)} tokens; raise the length, or leave the row out")
    ids, kinds, trained = ids[:size], kinds[:size], trained[:size]
    return Example(ids, kinds, torch.where(trained, ids, IGNORED), conversation.source,
                   total - int(trained.sum()))


def make_examples(conversations: Sequence[Conversation], tokenizer: Tokenizer,
                  dialect: str = "hermes", length: int | None = None, train_on: str = "assistant",
                  on_problem: Callable[[str], None] = refuse) -> list[Example]:
    """`make_example` of each; what it refuses goes to `on_problem`, which raises by default."""
    trained_kinds(train_on)  # a wrong setting is one error, not one for each conversation
    examples = []
    for conversation in conversations:
        try:
            examples.append(make_example(conversation, tokenizer, dialect, length, train_on))
        except UserError as error:
            on_problem(str(error))
    return examples


def summary(conversations: Sequence[Conversation], examples: Sequence[Example]) -> dict:
    """Numbers on data and on what was made of it, for a person to read or for JSON.

    tokens and trained tokens in all and by kind; lengths in tokens; rows cut to fit (and trained
    tokens lost by that) and rows refused.
    """
    messages = [message for conversation in conversations for message in conversation.messages]
    calls = [call for message in messages for call in message.tool_calls]
    offered = {tool["function"]["name"] for item in conversations for tool in item.tools}
    tokens, trained = torch.zeros(len(Kind), dtype=torch.long), torch.zeros(len(Kind)).long()
    for example in examples:
        tokens += torch.bincount(example.kinds, minlength=len(Kind))
        trained += torch.bincount(example.kinds[example.labels != IGNORED], minlength=len(Kind))
    lengths = sorted(map(len, examples)) or [0]
    return {
        "conversations": len(conversations),
        "messages": len(messages),
        "calls": len(calls),
        "with_calls": sum(any(message.tool_calls for message in item.messages)
                          for item in conversations),
        "tools_offered": len(offered),
        "tools_called": len({call.name for call in calls}),
        "tokens": int(tokens.sum()),
        "trained": int(trained.sum()),
        "kinds": {kind.name.lower(): {"tokens": int(tokens[kind]), "trained": int(trained[kind])}
                  for kind in Kind},
        "length": {"min": lengths[0], "median": int(statistics.median(lengths)),
                   "p95": lengths[math.ceil(0.95 * len(lengths)) - 1], "max": lengths[-1]},
        "cut": sum(example.cut > 0 for example in examples),
        "cut_trained": sum(example.cut for example in examples),
        "refused": len(conversations) - len(examples),
    }


# --- examples -> batches --------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens, each holding one conversation or several end to end, then padding.

    A conversation is one document: its positions begin at 0, its number within the row at 1.
    Padding is document 0 and never a target.
    """

    input_ids: Tensor  # [B, T] int64
    labels: Tensor     # [B, T] int64; input_ids where a target, else -100; not shifted
    positions: Tensor  # [B, T] int64
    documents: Tensor  # [B, T] int64
    kinds: Tensor      # [B, T] uint8

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def pack_rows(examples: Sequence[Example], length: int) -> list[list[int]]:
    """Which examples share a row of `length` tokens: indices, each once. Best fit, longest first.

    Raises UserError where an example is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and index of each row, sorted
    for index in sorted(range(len(examples)), key=lambda index: -len(examples[index])):
        need = len(examples[index])
        if need > length:
            raise UserError(f"{examples[index].source}: {need} tokens; a row has {length}")
        at = bisect.bisect_left(room, (need, 0))  # the fullest row that still has room
        if at == len(room):
            rows.append([])
            free, row = length, len(rows) - 1
        else:
            free, row = room.pop(at)
        rows[row].append(index)
        bisect.insort(room, (free - need, row))
    return rows


def collate(rows: Sequence[Sequence[Example]], length: int, pad_id: int = 0) -> Batch:
    """A batch of rows, each the given examples end to end and padded to `length` tokens."""
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_id)                                # [B, T]
    labels = torch.full(shape, IGNORED)                                  # [B, T]
    positions, documents = torch.zeros(2, *shape, dtype=torch.int64)     # [B, T] each
    kinds = torch.full(shape, int(Kind.PROMPT), dtype=torch.uint8)       # [B, T]
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples, 1):
            here = slice(at, at + len(example))
            input_ids[row, here] = example.ids
            labels[row, here] = example.labels
            positions[row, here] = torch.arange(len(example))
            documents[row, here] = number
            kinds[row, here] = example.kinds
            at += len(example)
    return Batch(input_ids, labels, positions, documents, kinds)


class Batches(Sequence[Batch]):
    """The batches of one epoch, each made when it is asked for."""

    def __init__(self, groups: list[list[list[Example]]], length: int | None) -> None:
        self._groups, self._length = groups, length  # batch -> row -> examples

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Batch:
        rows = self._groups[index]
        return collate(rows, self._length or max(len(example) for row in rows for example in row))


def batches(examples: Sequence[Example], batch_size: int, length: int, seed: int = 0,
            epoch: int = 0, pack: bool = True) -> Batches:
    """The batches of one epoch: a sequence, `batches(…)[i]` being batch i.

    Their order is a function of examples, seed and epoch alone, so a run resumes by its index.
    Packed rows have `length` tokens; unpacked, each row is one example, padded to the longest of
    its batch. The last batch may have fewer rows.
    """
    rng = random.Random(f"{seed} {epoch}")
    shuffled = rng.sample(examples, len(examples))
    indices = pack_rows(shuffled, length) if pack else [[index] for index in range(len(shuffled))]
    rng.shuffle(indices)
    rows = [[shuffled[index] for index in row] for row in indices]
    groups = [rows[at:at + batch_size] for at in range(0, len(rows), batch_size)]
    return Batches(groups, length if pack else None)
