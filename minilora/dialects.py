"""The dialects: how tools, thinking, calls and results are written, and read again.

A new one is one small table in `DIALECTS` (`Dialect` says what stands in it). One whose items are
JSON needs no more, as "hermes" shows:

    <tool_call>⏎{"name": …, "arguments": {…}}⏎</tool_call>

One with a notation of its own gives one `Notation` besides. Sources of the three:

    hermes          the format of NousResearch/Hermes-Function-Calling
    mistral         mistral-common, `tokens/tokenizers/instruct.py`, InstructTokenizerV3
    functiongemma   ai.google.dev/gemma/docs/functiongemma, "formatting and best practices" and
                    "full function calling sequence", and the chat template of
                    google/functiongemma-270m-it
"""

import re
from dataclasses import replace

from minilora.config import UserError
from minilora.jsontext import (
    MAX_DEPTH,
    TOO_DEEP,
    check_value,
    dump_json,
    load_json,
    skip_space,
    twice,
)
from minilora.notation import (
    JSON,
    JSON_CALL,
    Block,
    Dialect,
    MalformedCall,
    Notation,
    Piece,
    Result,
    ToolCall,
    Written,
    call_from,
)

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
    jinja_call=f"{JSON_CALL} ~ (', \"id\": ' ~ tool_call.id | tojson if tool_call.id else '') "
               "~ '}'",
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
    if end < 0 or end > reply.control(start):
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
        raise MalformedCall(TOO_DEEP.format(MAX_DEPTH))
    keyed = reply[at] == "{"
    closing, value, items = "}" if keyed else "]", {}, []
    at = skip_space(reply, at + 1)
    while not reply.startswith(closing, at) or value or items:
        if keyed:
            key, at = _read_gemma_name(reply, at, ":")
            if key in value:
                raise MalformedCall(twice(key))
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
        check_value(name)
    except MalformedCall:
        raise
    except ValueError as error:  # a number that overflows, half a surrogate pair
        raise MalformedCall(str(error)) from None
    return call_from({"name": name, "arguments": arguments}), end


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
