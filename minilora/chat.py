"""Conversations and tools to ids with a kind for every id, and generated text back to tool calls.

Layout, in the Hermes dialect (what stands in <angle brackets> is one token; the rest is text):

    <bos><start_of_turn>user
    {system}

    <tools>
    {"type": "function", "function": {…}}                          one tool a line
    </tools>

    {user}<end_of_turn>
    <start_of_turn>model
    <think>
    {thinking}
    </think>
    {content}
    <tool_call>
    {"name": …, "arguments": {…}}
    </tool_call><end_of_turn>
    <start_of_turn>user
    <tool_response>
    {result}
    </tool_response><end_of_turn>
    <start_of_turn>model
    {content}<end_of_turn>

Gemma knows two roles, user and model: system and tools go into the first user turn, results that
follow each other share one user turn. What is empty leaves no trace, blank line included. A newline
between two blocks of a model turn has the kind of the block before it. Texts are stripped at both
ends, as Gemma's own template does. The Mistral dialect differs in its blocks only:

    [AVAILABLE_TOOLS] [{…}, {…}][/AVAILABLE_TOOLS]
    [TOOL_CALLS] [{"name": …, "arguments": {…}, "id": …}]
    [TOOL_RESULTS] {"content": …, "call_id": …}[/TOOL_RESULTS]

These are the blocks of mistral-common (`tokens/tokenizers/instruct.py`, InstructTokenizerV3), ids
where the data has them. It has no token for thinking: thinking stands as plain text on the lines
before the content (its kind is still THINK) and comes back as content. Hermes drops ids.

JSON is `json.dumps(value, ensure_ascii=False)`, which is what the `tojson` filter of chat templates
prints, so that a template can render the very same text.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from minilora.config import UserError
from minilora.tokenizer import Tokenizer

MAX_DEPTH = 64  # levels of objects and lists in one JSON value


class Kind(IntEnum):
    """What a token is, and so whether it may carry loss."""

    PROMPT = 0         # all that the model does not write: turn headers, system, tools, user
    THINK = 1          # reasoning, tags included
    TOOL_CALL = 2      # tags and JSON of a call
    TOOL_RESPONSE = 3  # tags and text of a result
    ANSWER = 4         # text for the user
    END = 5            # <end_of_turn> of a model turn (its newline is PROMPT)


@dataclass(frozen=True)
class ToolCall:
    """One call. `arguments` is a JSON object."""

    name: str
    arguments: dict
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One message; `thinking` and `tool_calls` belong to assistants, the last two to tools."""

    role: str  # system | user | assistant | tool
    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages, the tools on offer as {"type": "function", "function": {…}}, and "file:line"."""

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Rendered:
    """Token ids and the kind of each: two lists of one length."""

    ids: list[int]
    kinds: list[Kind]


class MalformedCall(ValueError):
    """Text that starts a tool call and is not one; the message says what is wrong with it."""


# --- strict JSON ----------------------------------------------------------------------------------

def _unique(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} occurs twice in one object")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a JSON number that can be held")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
_SPACE = re.compile(r"[ \t\r\n]*")


def _skip_space(text: str, at: int) -> int:
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
            raise ValueError(f"JSON nested deeper than {MAX_DEPTH} levels")
        level, depth = list(itertools.chain.from_iterable(inner)), depth + 1


def decode_json(text: str, start: int = 0) -> tuple[object, int]:
    """The JSON value that begins at `start` (white space skipped) and where it ends.

    Stricter than `json`: duplicate keys, NaN and Infinity, numbers that overflow, half surrogate
    pairs and nesting past `MAX_DEPTH` raise ValueError, whose message says what is wrong.
    """
    try:
        value, end = _DECODER.raw_decode(text, _skip_space(text, start))
    except json.JSONDecodeError as error:
        near = text[error.pos:error.pos + 20]
        raise ValueError(f"not JSON: {error.msg} at {near!r}" if near else
                         f"not JSON: {error.msg} at the end of the text") from None
    except RecursionError:
        raise ValueError(f"JSON nested deeper than {MAX_DEPTH} levels") from None
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


# --- dialects -------------------------------------------------------------------------------------

class Part(NamedTuple):
    """A stretch of a rendered conversation: plain text, or one control token by its string."""

    text: str
    kind: Kind
    control: bool = False


@dataclass(frozen=True)
class Dialect:
    """How tools, thinking, calls and results are written: blocks of parts, and the way back.

    `template` holds the same blocks as Jinja expressions, for the names tools, thinking, call or
    calls, message and content.
    """

    tokens: dict[str, str]  # new token -> what it means; its row starts from the mean of that text
    tools: Callable[[tuple[dict, ...]], list[Part]]
    think: Callable[[str], list[Part]]
    calls: Callable[[tuple[ToolCall, ...]], list[list[Part]]]
    result: Callable[[Message], list[Part]]
    read_calls: Callable[[str], tuple[str, list[ToolCall]]]  # reply -> content, calls
    template: dict[str, str]


def _between(opening: str, text: str, closing: str, kind: Kind) -> list[Part]:
    """Text between two control tokens."""
    return [Part(opening, kind, True), Part(text, kind), Part(closing, kind, True)]


def _call_value(call: ToolCall, with_id: bool) -> dict:
    value = {"name": call.name, "arguments": call.arguments}
    return {**value, "id": call.id} if with_id and call.id else value


def _read(text: str, start: int) -> tuple[object, int]:
    try:
        return decode_json(text, start)
    except ValueError as error:
        raise MalformedCall(str(error)) from None


def _hermes_tools(tools: tuple[dict, ...]) -> list[Part]:
    lines = "\n".join(map(dump_json, tools))
    return _between("<tools>", f"\n{lines}\n", "</tools>", Kind.PROMPT)


def _hermes_think(thinking: str) -> list[Part]:
    return _between("<think>", f"\n{thinking}\n", "</think>", Kind.THINK)


def _hermes_calls(calls: tuple[ToolCall, ...]) -> list[list[Part]]:
    texts = [dump_json(_call_value(call, with_id=False)) for call in calls]
    return [_between("<tool_call>", f"\n{text}\n", "</tool_call>", Kind.TOOL_CALL)
            for text in texts]


def _hermes_result(message: Message) -> list[Part]:
    return _between("<tool_response>", f"\n{message.content.strip()}\n", "</tool_response>",
                    Kind.TOOL_RESPONSE)


def _hermes_read(text: str) -> tuple[str, list[ToolCall]]:
    opening, closing = "<tool_call>", "</tool_call>"
    content, calls = text, []
    at = text.find(opening)
    if at >= 0:
        content = text[:at]
        while at < len(text):
            if not text.startswith(opening, at):
                raise MalformedCall(f"text after a call: {text[at:at + 20]!r}")
            # The JSON says where the call ends: a string in it may well hold a closing tag.
            value, end = _read(text, at + len(opening))
            calls.append(call_from(value))
            end = _skip_space(text, end)
            if not text.startswith(closing, end):
                raise MalformedCall(f"{closing} is missing after the call of {calls[-1].name!r}")
            at = _skip_space(text, end + len(closing))
    if closing in content:
        raise MalformedCall(f"{closing} without {opening}")
    return content.strip(), calls


def _mistral_tools(tools: tuple[dict, ...]) -> list[Part]:
    return _between("[AVAILABLE_TOOLS]", " " + dump_json(tools), "[/AVAILABLE_TOOLS]", Kind.PROMPT)


def _mistral_think(thinking: str) -> list[Part]:
    return [Part(thinking, Kind.THINK)]


def _mistral_calls(calls: tuple[ToolCall, ...]) -> list[list[Part]]:
    if not calls:
        return []
    values = [_call_value(call, with_id=True) for call in calls]
    return [[Part("[TOOL_CALLS]", Kind.TOOL_CALL, True),
             Part(" " + dump_json(values), Kind.TOOL_CALL)]]


def _mistral_result(message: Message) -> list[Part]:
    # mistral-common parses the text; a template cannot, so what looks like an object or a list
    # stands as it is (that is the same where it is spaced as json.dumps does) and the rest as text.
    content = message.content.strip()
    nested = content[:1] in ("{", "[") and content[-1:] in ("}", "]")
    text = '{"content": ' + (content if nested else dump_json(content))
    if message.tool_call_id:
        text += ', "call_id": ' + dump_json(message.tool_call_id)
    return _between("[TOOL_RESULTS]", f" {text}}}", "[/TOOL_RESULTS]", Kind.TOOL_RESPONSE)


def _mistral_read(text: str) -> tuple[str, list[ToolCall]]:
    content, opening, after = text.partition("[TOOL_CALLS]")
    if not opening:
        return text.strip(), []
    values, end = _read(after, 0)
    if not isinstance(values, list) or not values:
        raise MalformedCall("[TOOL_CALLS] is followed by a JSON list of calls, and by nothing else")
    if after[end:].strip():
        raise MalformedCall(f"text after the calls: {after[end:].strip()[:20]!r}")
    return content.strip(), [call_from(value) for value in values]


# Jinja for one call; arguments may come as an object or, as on OpenAI's wire, as JSON text.
_CALL = ("'{\"name\": ' ~ call.name | tojson ~ ', \"arguments\": ' ~ (call.arguments if "
         "call.arguments is string else call.arguments | tojson)")

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
        tools=_hermes_tools, think=_hermes_think, calls=_hermes_calls, result=_hermes_result,
        read_calls=_hermes_read,
        template={
            "tools": r"'<tools>\n' ~ tools | map('tojson') | join('\n') ~ '\n</tools>'",
            "think": r"'<think>\n' ~ thinking ~ '\n</think>'",
            "call": rf"gap.text ~ '<tool_call>\n' ~ {_CALL} ~ '}}\n</tool_call>'",
            "calls_end": "''",
            "result": r"'<tool_response>\n' ~ content ~ '\n</tool_response>'",
        }),
    "mistral": Dialect(
        tokens={
            "[AVAILABLE_TOOLS]": "start of the list of tools",
            "[/AVAILABLE_TOOLS]": "end of the list of tools",
            "[TOOL_CALLS]": "a list of tool calls",
            "[TOOL_RESULTS]": "start of a tool's result",
            "[/TOOL_RESULTS]": "end of a tool's result",
        },
        tools=_mistral_tools, think=_mistral_think, calls=_mistral_calls, result=_mistral_result,
        read_calls=_mistral_read,
        template={
            "tools": "'[AVAILABLE_TOOLS] ' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]'",
            "think": "thinking",
            "call": f"(gap.text ~ '[TOOL_CALLS] [' if loop.first else ', ') ~ {_CALL} ~ "
                    "(', \"id\": ' ~ tool_call.id | tojson if tool_call.id else '') ~ '}'",
            "calls_end": "']'",
            "result": "'[TOOL_RESULTS] {\"content\": ' ~ (content if content[:1] in ['{', '['] and "
                      "content[-1:] in ['}', ']'] else content | tojson) ~ (', \"call_id\": ' ~ "
                      "message.tool_call_id | tojson if message.tool_call_id else '') "
                      "~ '}[/TOOL_RESULTS]'",
        }),
}


def get_dialect(name: str) -> Dialect:
    """The dialect of that name. Raises UserError that lists the known ones."""
    if name not in DIALECTS:
        raise UserError(f"dialect {name!r} is not known; choose one of {', '.join(DIALECTS)}")
    return DIALECTS[name]


# --- conversation -> ids --------------------------------------------------------------------------

def _turn(role: str, parts: Iterable[Part], end: Kind = Kind.PROMPT) -> list[Part]:
    return [Part("<start_of_turn>", Kind.PROMPT, True), Part(f"{role}\n", Kind.PROMPT), *parts,
            Part("<end_of_turn>", end, True), Part("\n", Kind.PROMPT)]


def _lines(blocks: list[list[Part]]) -> list[Part]:
    """Blocks with a newline between them, which has the kind of the block before it."""
    parts: list[Part] = []
    for block in blocks:
        if parts:
            parts.append(Part("\n", parts[-1].kind))
        parts += block
    return parts


def _reply(message: Message, dialect: Dialect) -> list[Part]:
    thinking, content = message.thinking.strip(), message.content.strip()
    blocks = [dialect.think(thinking)] if thinking else []
    if content:
        blocks.append([Part(content, Kind.ANSWER)])
    return _lines(blocks + dialect.calls(message.tool_calls))


def _parts(conversation: Conversation, dialect: Dialect) -> list[Part]:
    messages = list(conversation.messages)
    blank = Part("\n\n", Kind.PROMPT)
    opening: list[Part] = []  # what the first user turn begins with
    if messages and messages[0].role == "system":
        system = messages.pop(0).content.strip()
        opening += [Part(system, Kind.PROMPT), blank] if system else []
    if conversation.tools:
        opening += [*dialect.tools(conversation.tools), blank]
    if not messages or messages[0].role != "user":
        raise UserError(f"{conversation.source or 'conversation'}: expected a user message first "
                        "(after a system message, where there is one)")
    parts = [Part("<bos>", Kind.PROMPT, True)]
    for role, group in itertools.groupby(messages, key=lambda message: message.role):
        if role == "tool":
            parts += _turn("user", _lines([dialect.result(message) for message in group]))
            continue
        for message in group:
            if role == "user":
                text = Part(message.content.strip(), Kind.PROMPT)
                parts += _turn("user", [*opening, text])
                opening = []
            elif role == "assistant":
                parts += _turn("model", _reply(message, dialect), Kind.END)
            else:
                raise UserError(f"{conversation.source or 'conversation'}: {role} message in the "
                                "middle; a system message comes first, and only once")
    return parts


def render(conversation: Conversation, tokenizer: Tokenizer, dialect: str = "hermes",
           generate: bool = False) -> Rendered:
    """Ids of a conversation and the kind of each, made in one pass.

    `tokenizer` knows the dialect's tokens (`Tokenizer.add_tokens`). With `generate`
    the ids end with the header of a model turn, for the model to go on from; they are a prefix of
    the ids of any conversation that goes on with an assistant message. Control tokens are looked
    up, texts are encoded as plain text, so nothing in a text becomes a control token.

    Raises UserError where the first message is not a user's or a system message stands later, and
    where the tokenizer lacks a token.
    """
    parts = _parts(conversation, get_dialect(dialect))
    if generate:
        parts += _turn("model", [])[:2]
    ids: list[int] = []
    kinds: list[Kind] = []
    # Neighbouring texts of one kind are encoded as one text: the ids are then those that a
    # tokenizer gives for the whole stretch between two control tokens.
    for (kind, control), run in itertools.groupby(parts, key=lambda part: part[1:]):
        if control:
            ids += (tokenizer.token_id(part.text) for part in run)
        else:
            ids += tokenizer.encode("".join(part.text for part in run))
        kinds += [kind] * (len(ids) - len(kinds))
    return Rendered(ids, kinds)


# --- text -> calls --------------------------------------------------------------------------------

def split_reply(text: str, dialect: str = "hermes") -> Message:
    """A generated model turn as an assistant message: thinking, content, tool calls, all stripped.

    `text` is the decoded turn without its `<end_of_turn>`. Thinking that was not finished is
    thinking to the end. Raises MalformedCall for anything that starts a call and is not one.
    """
    language = get_dialect(dialect)
    thinking, text = "", text.strip()
    if "<think>" in language.tokens and text.startswith("<think>"):
        thinking, _, text = text.removeprefix("<think>").partition("</think>")
    content, calls = language.read_calls(text)
    return Message("assistant", content, thinking.strip(), tuple(calls))


def parse_tool_calls(text: str, dialect: str = "hermes") -> list[ToolCall]:
    """The tool calls in a generated model turn, [] where it makes none.

    Strict: JSON and nothing but JSON in a call, `name` text, `arguments` an object, no duplicate
    key, no NaN, no unclosed call, no text after a call. Raises MalformedCall (a ValueError) that
    says what is wrong, in words that can be shown to the model.
    """
    return list(split_reply(text, dialect).tool_calls)


# --- chat template --------------------------------------------------------------------------------

# `gap` holds what stands before the next block of a model turn: nothing, then a newline. Thinking
# is read from `reasoning_content`. A tool call may be nested in "function" (OpenAI) or flat.
_TEMPLATE = r"""
{{- bos_token }}
{%- set turns = messages %}
{%- set opening = namespace(text='') %}
{%- if messages and messages[0].role in ['system', 'developer'] %}
  {%- set turns = messages[1:] %}
  {%- if (messages[0].content or '') | trim %}
    {%- set opening.text = messages[0].content | trim ~ '\n\n' %}
  {%- endif %}
{%- endif %}
{%- if tools %}
  {%- set opening.text = opening.text ~ %tools% ~ '\n\n' %}
{%- endif %}
{%- if not turns or turns[0].role != 'user' %}
  {{- raise_exception('expected a user message first (after a system message)') }}
{%- endif %}
{%- for message in turns %}
  {%- set content = (message.content or '') | trim %}
  {%- if message.role == 'user' %}
    {{- '<start_of_turn>user\n' ~ (opening.text if loop.first else '') ~ content }}
    {{- '<end_of_turn>\n' }}
  {%- elif message.role in ['assistant', 'model'] %}
    {{- '<start_of_turn>model\n' }}
    {%- set gap = namespace(text='') %}
    {%- set thinking = (message.reasoning_content or '') | trim %}
    {%- if thinking %}
      {{- %think% }}
      {%- set gap.text = '\n' %}
    {%- endif %}
    {%- if content %}
      {{- gap.text ~ content }}
      {%- set gap.text = '\n' %}
    {%- endif %}
    {%- if message.tool_calls %}
      {%- for tool_call in message.tool_calls %}
        {%- set call = tool_call.function or tool_call %}
        {{- %call% }}
        {%- set gap.text = '\n' %}
      {%- endfor %}
      {{- %calls_end% }}
    {%- endif %}
    {{- '<end_of_turn>\n' }}
  {%- elif message.role in ['tool', 'function'] %}
    {%- set before = loop.previtem.role if loop.previtem else '' %}
    {{- '\n' if before in ['tool', 'function'] else '<start_of_turn>user\n' }}
    {{- %result% }}
    {%- set after = loop.nextitem.role if loop.nextitem else '' %}
    {{- '' if after in ['tool', 'function'] else '<end_of_turn>\n' }}
  {%- else %}
    {{- raise_exception('expected the role user, assistant or tool; a system message is first') }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<start_of_turn>model\n' }}
{%- endif %}
"""


def chat_template(dialect: str = "hermes") -> str:
    """Jinja for `tokenizer_config.json`: messages and tools in OpenAI's shape to `render`'s text.

    The text, tokenized by a tokenizer that knows the dialect's tokens and adds no `<bos>` of its
    own, has `render`'s ids, unless a message itself spells a control token or has a U+2581: text
    cannot tell. (transformers also cuts longer runs of spaces than the longest piece otherwise.)
    """
    template = _TEMPLATE.strip()
    for name, expression in get_dialect(dialect).template.items():
        template = template.replace(f"%{name}%", expression)
    return template
