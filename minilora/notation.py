"""What a dialect is: its control tokens, its blocks, how items are written and calls are read.

A dialect is a small table of strings: its tokens, and for tools, thinking, calls and results a
`Block` with what stands before, between and after the items. Items are JSON unless the dialect has
a `Notation` of its own. Renderer, chat template and strict reader all come from the same strings.
"""

import functools
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from minilora.jsontext import MAX_DEPTH, check_value, decode_json, dump_json, skip_space

DEPTH = MAX_DEPTH - 8  # levels of a call's arguments, or of a tool: less those of a row around


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


def call_from(value: object) -> ToolCall:
    """The call that a decoded {"name": …, "arguments": {…}} is ("id" may be there).

    Raises MalformedCall that names the key; so it does where arguments are nested past `DEPTH`.
    """
    if not isinstance(value, dict):
        raise MalformedCall(f"a call is a JSON object, not {type(value).__name__}")
    unknown = [key for key in value if key not in ("name", "arguments", "id")]
    if unknown:
        raise MalformedCall(f"a call has name and arguments, not {unknown[0][:40]!r}")
    name, arguments, id = value.get("name"), value.get("arguments"), value.get("id")
    if not isinstance(name, str) or not name:
        raise MalformedCall('"name" of a call is missing or not text')
    if not isinstance(arguments, dict):
        raise MalformedCall(f'"arguments" of {name[:40]!r} is missing or not a JSON object')
    if id is not None and not isinstance(id, str):
        raise MalformedCall(f'"id" of the call of {name[:40]!r} is not text')
    try:
        check_value(arguments, DEPTH)
    except ValueError as error:
        raise MalformedCall(f'"arguments" of {name[:40]!r}: {error}') from None
    return ToolCall(name, arguments, id)


# --- text with control tokens ---------------------------------------------------------------------

class Written(str):
    """What a model wrote, as text that knows which of its tags are control tokens.

    Made by `chat.decode_reply`. `controls` are the positions, in order, where a control token of
    the dialect begins; a tag anywhere else was spelled in plain pieces and means nothing. None:
    nobody knows, and every tag counts. What is cut out of it is a plain str.
    """

    controls: Sequence[int] | None = None

    def has(self, token: str, at: int) -> bool:
        """Whether this control token stands at `at`."""
        return self.startswith(token, at) and (self.controls is None or at == self.control(at))

    def seek(self, token: str, at: int = 0) -> int:
        """Where this control token next stands; -1 where it does not."""
        at = self.find(token, at)
        while at >= 0 and not self.has(token, at):
            at = self.find(token, at + 1)
        return at

    def control(self, at: int) -> int:
        """Where the next control token stands, from `at` on; the end where nobody knows."""
        place = bisect_left(self.controls or (), at)
        return self.controls[place] if self.controls and place < len(self.controls) else len(self)


# --- a dialect ------------------------------------------------------------------------------------

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
    # The JSON says where the call ends: a string in it may well spell a closing tag. What is cut
    # out for it is no longer than the call, so that reading many calls takes time in proportion.
    stop = reply.control(at)
    text, start = (reply, at) if stop == len(reply) else (reply[at:stop], 0)
    try:
        value, end = decode_json(text, start)
    except ValueError as error:
        raise MalformedCall(str(error)) from None
    return call_from(value), at + end - start


# Jinja for one call; arguments may come as an object or, as on OpenAI's wire, as JSON text.
JSON_CALL = ("'{\"name\": ' ~ call.name | tojson ~ ', \"arguments\": ' ~ (call.arguments if "
             "call.arguments is string else call.arguments | tojson)")

JSON = Notation(
    tool=lambda tool: [(dump_json(tool), False)],
    call=lambda call: [(dump_json({"name": call.name, "arguments": call.arguments}), False)],
    result=lambda result: [(result.text, False)],
    read=_read_json_call,
    jinja_tool="tool | tojson", jinja_call=f"{JSON_CALL} ~ '}}'", jinja_result="content")


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
        pieces = [*self.cut(block.opening), *items[0]]
        for item in items[1:]:
            pieces += [*self.cut(block.between), *item]
        return [Part(text, kind, control) for text, control in [*pieces, *self.cut(block.closing)]
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
