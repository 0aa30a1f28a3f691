"""Conversations and tools to ids with a kind for every id, and generated replies to tool calls.

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

with ids where the data has them; the others drop them. FunctionGemma's differs in its turns, too:

    <bos><start_of_turn>developer
    {system}<start_function_declaration>declaration:name{description:<escape>…<escape>,…}
    <end_function_declaration><end_of_turn>
    <start_of_turn>user
    {user}<end_of_turn>
    <start_of_turn>model
    {content}<start_function_call>call:name{city:<escape>Paris<escape>,days:3}<end_function_call>
    <start_function_response>response:name{value:<escape>{result}<escape>}<end_function_response>
    {content}<end_of_turn>

(lines are broken here for reading: nothing stands between the blocks). After its calls the model
writes <start_function_response>, its END there, in place of <end_of_turn>; the results and then the
answer follow in the same turn. Where there are no results the turn is closed before the next one.
Both have no token for thinking: it stands as plain text before the content (its kind is still
THINK) and comes back as content.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minilora.config import UserError
from minilora.dialects import get_dialect
from minilora.notation import Dialect, Kind, MalformedCall, Part, Result, ToolCall, Written
from minilora.tokenizer import Tokenizer


@dataclass(frozen=True)
class Message:
    """One message; `thinking`, `tool_calls` and `trained` belong to assistants."""

    role: str  # system | user | assistant | tool
    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None          # of a tool, and the id of the call it answers
    tool_call_id: str | None = None
    trained: bool = True             # False: rendered the same, but carries no loss


@dataclass(frozen=True)
class Conversation:
    """Messages, the tools on offer as {"type": "function", "function": …}, and "file:line"."""

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()
    source: str = ""
    weight: float = 1.0  # how often an epoch sees it


@dataclass(frozen=True)
class Rendered:
    """Token ids and the kind of each: two lists of one length."""

    ids: list[int]
    kinds: list[Kind]


# --- conversation -> ids --------------------------------------------------------------------------

def _header(role: str) -> list[Part]:
    return [Part("<start_of_turn>", Kind.PROMPT, True), Part(f"{role}\n", Kind.PROMPT)]


def _end(kind: Kind = Kind.PROMPT) -> list[Part]:
    return [Part("<end_of_turn>", kind, True), Part("\n", Kind.PROMPT)]


def _reply(message: Message, dialect: Dialect) -> list[Part]:
    """The blocks of a model turn; what stands between two has the kind of the one before it."""
    thinking, content = message.thinking.strip(), message.content.strip()
    calls = [dialect.notation.call(call) for call in message.tool_calls]
    blocks = [dialect.block(dialect.think, [[(thinking, False)]] if thinking else [], Kind.THINK),
              [Part(content, Kind.ANSWER)] if content else [],
              dialect.block(dialect.calls, calls, Kind.TOOL_CALL)]
    parts: list[Part] = []
    for block in filter(None, blocks):
        parts += [Part(dialect.gap, parts[-1].kind)] if parts and dialect.gap else []
        parts += block
    return parts


def _results(group: Sequence[Message], calls: Sequence[ToolCall], dialect: Dialect) -> list[Part]:
    """The block of the results that follow these calls.

    The name of a result is its own, or else that of the call with its id, or in its place.
    """
    items, by_id = [], {call.id: call.name for call in reversed(calls) if call.id}
    for place, message in enumerate(group):
        name = message.name or by_id.get(message.tool_call_id) or next(
            (call.name for call in calls[place:place + 1]), "")
        result = Result(message.content.strip(), name, message.tool_call_id)
        items.append(dialect.notation.result(result))
    return dialect.block(dialect.results, items, Kind.TOOL_RESPONSE)


def _parts(conversation: Conversation, dialect: Dialect, generate: bool) -> list[Part]:
    name = conversation.source or "conversation"
    messages = list(conversation.messages)
    blank = [] if dialect.developer else [Part("\n\n", Kind.PROMPT)]
    opening: list[Part] = []  # system and tools
    if messages and messages[0].role == "system":
        system = messages.pop(0).content.strip()
        opening += [Part(system, Kind.PROMPT), *blank] if system else []
    if conversation.tools:
        tools = [dialect.notation.tool(tool) for tool in conversation.tools]
        opening += [*dialect.block(dialect.tools, tools, Kind.PROMPT), *blank]
    if not messages or messages[0].role != "user":
        raise UserError(f"{name}: expected a user message first (after a system message, where "
                        "there is one)")
    parts = [Part("<bos>", Kind.PROMPT, True)]
    if dialect.developer and opening:
        parts += [*_header("developer"), *opening, *_end()]
        opening = []
    # What an inline turn of the model is open after: calls, results, or nothing.
    after, calls = "", ()
    for role, run in itertools.groupby(messages, key=lambda message: message.role):
        group = list(run)
        if role == "tool":
            block = _results(group, calls, dialect)
            if not dialect.inline:
                parts += [*_header("user"), *block, *_end()]
            else:  # the model itself has written the token that opens them
                parts += block[1:] if after == "calls" else _header("model") + block
                after = "results"
        elif role not in ("user", "assistant"):
            raise UserError(f"{name}: {role} message in the middle; a system message comes first, "
                            "and only once")
        calls = group[-1].tool_calls
        for message in group if role != "tool" else ():
            parts += _turn_start(role, after)
            after = ""
            if role == "user":
                parts += [*opening, Part(message.content.strip(), Kind.PROMPT), *_end()]
                opening = []
            else:
                parts += _reply(message, dialect)
                if dialect.inline and message.tool_calls:
                    parts.append(Part(dialect.stop, Kind.END, True))
                    after = "calls"
                else:
                    parts += _end(Kind.END)
    return parts + (_turn_start("assistant", after) if generate else [])


def _turn_start(role: str, after: str) -> list[Part]:
    if role == "assistant" and after == "results":
        return []
    return (_end() if after else []) + _header("model" if role == "assistant" else role)


def render(conversation: Conversation, tokenizer: Tokenizer, dialect: str = "hermes",
           generate: bool = False) -> Rendered:
    """Ids of a conversation and the kind of each, made in one pass.

    `tokenizer` knows the dialect's tokens (`Tokenizer.add_tokens`). With `generate`
    the ids end where a model turn begins or goes on, for the model to write; they are a prefix of
    the ids of any conversation that goes on with an assistant message. Control tokens are looked
    up, texts are encoded as plain text, so nothing in a text becomes a control token.

    Raises UserError where the first message is not a user's or a system message stands later, and
    where the tokenizer lacks a token.
    """
    ids: list[int] = []
    kinds: list[Kind] = []
    parts = _parts(conversation, get_dialect(dialect), generate)
    # Neighbouring texts of one kind are encoded as one text: the ids are then those that a
    # tokenizer gives for the whole stretch between two control tokens.
    for (kind, control), run in itertools.groupby(parts, key=lambda part: part[1:]):
        if control:
            ids += (tokenizer.token_id(part.text) for part in run)
        else:
            ids += tokenizer.encode("".join(part.text for part in run))
        kinds += [kind] * (len(ids) - len(kinds))
    return Rendered(ids, kinds)


def stop_ids(tokenizer: Tokenizer, dialect: str = "hermes") -> tuple[int, ...]:
    """Where generation stops: at the tokenizer's stop ids, and at the dialect's own where it has
    one that the tokenizer knows."""
    stop = get_dialect(dialect).stop
    return (*tokenizer.stop_ids, *([tokenizer.token_id(stop)] if tokenizer.knows(stop) else []))


# --- reply -> calls -------------------------------------------------------------------------------

def decode_reply(ids: Iterable[int], tokenizer: Tokenizer, dialect: str = "hermes") -> Written:
    """The text of what a model wrote, `tokenizer.decode(ids)`, which remembers its control tokens.

    `split_reply` and `parse_tool_calls` read it exactly: a tag that the model has spelled in plain
    pieces is text to them, whatever it says. An id that only the model's table has is U+FFFD.
    """
    tokens = {tokenizer.token_id(token): token for token in get_dialect(dialect).tokens
              if tokenizer.knows(token)}
    text, controls, size = "", [], tokenizer.vocab_size
    for plain, run in itertools.groupby(ids, key=lambda i: i < size and i not in tokens):
        if plain:
            text += tokenizer.decode(run)
            continue
        for i in run:
            controls += [len(text)] if i in tokens else []
            text += tokens.get(i, "\ufffd")
    reply = Written(text)
    reply.controls = controls
    return reply


def split_reply(text: str, dialect: str = "hermes") -> Message:
    """A generated model turn as an assistant message: thinking, content, tool calls, all stripped.

    `text` is the turn without its `<end_of_turn>`: best what `decode_reply` has made of its ids. In
    any other text all that is spelled as a control token counts as one, except in JSON strings; one
    of FunctionGemma's ends at the next <escape>. Thinking that was not finished is thinking to the
    end. Raises MalformedCall for anything that starts a call and is not one.
    """
    language = get_dialect(dialect)
    reply = text if isinstance(text, Written) else Written(text)
    start = len(reply) - len(reply.lstrip())
    thinking, tags = "", [_token(language, part) for part in language.think[::2]]
    if all(tags) and reply.has(tags[0], start):
        start += len(tags[0])
        end = reply.seek(tags[1], start)
        thinking = reply[start:end if end >= 0 else None]
        start = end + len(tags[1]) if end >= 0 else len(reply)
    at = reply.seek(_token(language, language.calls.opening), start)
    calls = language.read(reply, at) if at >= 0 else []
    end = at if at >= 0 else len(reply)
    if language.stop and 0 <= (stop := reply.seek(language.stop, start)) < end:
        calls, end = [], stop
    closing = _token(language, language.calls.closing)
    if closing and 0 <= reply.seek(closing, start) < end:
        raise MalformedCall(f"{closing} without {_token(language, language.calls.opening)}")
    return Message("assistant", reply[start:end].strip(), thinking.strip(), tuple(calls))


def _token(dialect: Dialect, text: str) -> str:
    """The first control token in one of the table's strings; "" where there is none."""
    return next((piece for piece, control in dialect.cut(text) if control), "")


def parse_tool_calls(text: str, dialect: str = "hermes") -> list[ToolCall]:
    """The tool calls in a generated model turn, [] where it makes none.

    `text` as for `split_reply`. Strict: JSON and nothing but JSON in a call (or FunctionGemma's
    notation), `name` text, `arguments` an object, no duplicate key, no NaN, no unclosed call, no
    text after a call. Raises MalformedCall (a ValueError) that says what is wrong, in words that
    can be shown to the model.
    """
    return list(split_reply(text, dialect).tool_calls)


# --- chat template --------------------------------------------------------------------------------

# `gap` holds what stands before the next block of a model turn; `open` says after what a turn of
# the model is open, where results are inline. Thinking is read from `reasoning_content`. A tool
# call may be nested in "function" (OpenAI) or flat.
_TEMPLATE = r"""
%macros%
{{- bos_token }}
{%- set turns = messages %}
{%- set opening = namespace(text='') %}
{%- if messages and messages[0].role in ['system', 'developer'] %}
  {%- set turns = messages[1:] %}
  {%- if (messages[0].content or '') | trim %}
    {%- set opening.text = messages[0].content | trim ~ %blank% %}
  {%- endif %}
{%- endif %}
{%- for tool in tools or [] %}
  {%- set opening.text = opening.text ~ (%tools.opening% if loop.first else %tools.between%) %}
  {%- set opening.text = opening.text ~ %tool% ~ (%tools.closing% ~ %blank% if loop.last else '') %}
{%- endfor %}
{%- if not turns or turns[0].role != 'user' %}
  {{- raise_exception('expected a user message first (after a system message)') }}
{%- endif %}
%developer%
{%- set open = namespace(after='') %}
{%- for message in turns %}
  {%- set content = (message.content or '') | trim %}
  {%- if message.role == 'user' %}
    {{- ('<end_of_turn>\n' if open.after else '') ~ '<start_of_turn>user\n' }}
    {{- (opening.text if loop.first else '') ~ content ~ '<end_of_turn>\n' }}
    {%- set open.after = '' %}
  {%- elif message.role in ['assistant', 'model'] %}
    {%- if open.after != 'results' %}
      {{- ('<end_of_turn>\n' if open.after else '') ~ '<start_of_turn>model\n' }}
    {%- endif %}
    {%- set gap = namespace(text='') %}
    {%- set thinking = (message.reasoning_content or '') | trim %}
    {%- if thinking %}
      {{- %think.opening% ~ thinking ~ %think.closing% }}
      {%- set gap.text = %gap% %}
    {%- endif %}
    {%- if content %}
      {{- gap.text ~ content }}
      {%- set gap.text = %gap% %}
    {%- endif %}
    {%- for tool_call in message.tool_calls or [] %}
      {%- set call = tool_call.function or tool_call %}
      {{- gap.text ~ %calls.opening% if loop.first else %calls.between% }}
      {{- %call% }}
      {{- %calls.closing% if loop.last else '' }}
    {%- endfor %}
    {%- set open.after = 'calls' if %inline% and message.tool_calls else '' %}
    {{- %stop% if open.after else '<end_of_turn>\n' }}
  {%- elif message.role in ['tool', 'function'] %}
    {%- if loop.previtem and loop.previtem.role in ['tool', 'function'] %}
      {{- %results.between% }}
    {%- else %}
      {{- %results_start% }}
    {%- endif %}
    {{- %result% }}
    {%- if not loop.nextitem or loop.nextitem.role not in ['tool', 'function'] %}
      {{- %results_end% }}
    {%- endif %}
    {%- set open.after = 'results' if %inline% else '' %}
  {%- else %}
    {{- raise_exception('expected the role user, assistant or tool; a system message is first') }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and open.after != 'results' %}
  {{- ('<end_of_turn>\n' if open.after else '') ~ '<start_of_turn>model\n' }}
{%- endif %}
"""

_DEVELOPER = r"""
{%- if opening.text %}
  {{- '<start_of_turn>developer\n' ~ opening.text ~ '<end_of_turn>\n' }}
  {%- set opening.text = '' %}
{%- endif %}
"""


def chat_template(dialect: str = "hermes") -> str:
    """Jinja for `tokenizer_config.json`: messages and tools in OpenAI's shape to `render`'s text.

    The text, tokenized by a tokenizer that knows the dialect's tokens and adds no `<bos>` of its
    own, has `render`'s ids, unless a message itself spells a control token or has a U+2581: text
    cannot tell. (transformers also cuts longer runs of spaces than the longest piece otherwise.) A
    template cannot read JSON: results that are JSON in another spelling than `json.dumps`'s stand
    as they are in Mistral's, and FunctionGemma's takes arguments as objects only.
    """
    language = get_dialect(dialect)
    notation, results = language.notation, language.results
    strings = {f"{name}.{side}": text for name in ("tools", "think", "calls", "results")
               for side, text in getattr(language, name)._asdict().items()}
    strings |= {"blank": "" if language.developer else "\n\n", "gap": language.gap,
                "stop": language.stop}
    inserted = {
        "macros": notation.macros.strip(), "developer": _DEVELOPER if language.developer else "",
        "tool": notation.jinja_tool, "call": notation.jinja_call, "result": notation.jinja_result,
        "inline": str(language.inline).lower(),
        **{name: repr(text) for name, text in strings.items()}}
    if language.inline:
        first, own = results.opening.removeprefix(language.stop), "<start_of_turn>model\n"
        inserted["results_start"] = (f"{first!r} if open.after == 'calls' else "
                                     f"{own + results.opening!r}")
        inserted["results_end"] = repr(results.closing)
    else:
        inserted["results_start"] = repr("<start_of_turn>user\n" + results.opening)
        inserted["results_end"] = repr(results.closing + "<end_of_turn>\n")
    template = _TEMPLATE
    for name, text in inserted.items():
        template = template.replace(f"%{name}%", text)
    return "\n".join(line for line in template.splitlines() if line)
