"""Python functions as tools: schemas, calls with checked arguments, the think-act-observe loop.

    schema = tool_schema(get_weather)            what the model is shown
    check_arguments(schema, {"city": 3})         ["city: expected a string, got 3"]
    run_call(functions, call)                    the result as text, or {"error": …} for the model
    converse(messages, reply, functions)         replies and runs calls until there is an answer

Nothing the model writes is evaluated: a call is parsed as JSON, its name is looked up among the
functions offered, and its arguments are checked against the schema before the function sees them.
"""

import copy
import ctypes
import dataclasses
import difflib
import enum
import importlib.util
import inspect
import itertools
import json
import math
import operator
import re
import sys
import threading
import traceback
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path, PurePath

from minilora.chat import MalformedCall, Message, ToolCall, split_reply
from minilora.config import UserError
from minilora.jsontext import dump_json

TIMEOUT = 30.0  # seconds that a function may take
BUDGET = 4000   # characters of its result that the model is shown
ROUNDS = 8      # rounds of calls that are run for one question
REPEATS = 2     # times that the very same call may fail

# --- a function's schema --------------------------------------------------------------------------

PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def tool_schema(function: Callable) -> dict:
    """What the model is shown of `function`: its name, description and parameters.

    {"type": "function", "function": {"name", "description", "parameters": {"type": "object",
    "properties", "required"}}}, as OpenAI's API and Hugging Face chat templates have it. Types come
    from the hints, descriptions from the docstring (Google, reST or NumPy style) or `Annotated`;
    a parameter with a default is not required. Raises UserError that names function and parameter
    for a hint that JSON cannot express, for a missing hint, for *args, **kwargs and
    positional-only parameters (a call passes names), and for what is no plain function: a lambda,
    a class, a generator, an async function.
    """
    name = function.__name__
    if not name.isidentifier() or isinstance(function, type):
        raise UserError(f"tool {name}: not a function with a name; write it with def")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"tool {name} is async; give a plain function")
    if inspect.isgeneratorfunction(function):
        raise UserError(f"tool {name} yields its results one by one; return them as a list")
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # a hint in quotes is evaluated, so anything may come out
        raise UserError(f"tool {name}: its type hints cannot be read ({error})") from None
    summary, described = _docstring(function)
    properties, required = {}, []
    for key, parameter in signature.parameters.items():
        where = f"tool {name}, parameter {key}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{where}: a call passes arguments by name; *args, **kwargs and "
                            "positional-only parameters cannot be told to the model")
        if key not in hints:
            raise UserError(f"{where}: no type hint; write, say, {key}: str")
        properties[key] = _hint_schema(hints[key], where)
        if key in described:
            properties[key].setdefault("description", described[key])
        if parameter.default is parameter.empty:
            required.append(key)
    return {"type": "function", "function": {
        "name": name, "description": summary,
        "parameters": {"type": "object", "properties": properties, "required": required}}}


def _hint_schema(hint: object, where: str) -> dict:
    """The JSON schema of one type hint; `_convert` is its way back. Raises UserError at `where`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        text = next((extra for extra in inner[1:] if isinstance(extra, str)), None)
        return _hint_schema(inner[0], where) | ({"description": text} if text else {})
    if origin is typing.Literal:
        return _choices(list(inner), where)
    if hint is typing.Any:
        return {}
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choices([member.value for member in hint], where)
    if origin in (typing.Union, types.UnionType):
        options = [_hint_schema(option, where) for option in inner]
        if all(option.keys() == {"type"} for option in options):
            return {"type": [option["type"] for option in options]}
        return {"anyOf": options}
    if (origin or hint) is list:
        return {"type": "array"} | ({"items": _hint_schema(inner[0], where)} if inner else {})
    if (origin or hint) is dict and (not inner or inner[0] is str):
        values = _hint_schema(inner[1], where) if inner else {}
        return {"type": "object"} | ({"additionalProperties": values} if values else {})
    raise UserError(f"{where}: {inspect.formatannotation(hint)} cannot be told to the model; use "
                    "str, int, float, bool, list, dict with str keys, Literal, Enum or a union "
                    "of these")


def _choices(values: list, where: str) -> dict:
    kinds = list(dict.fromkeys(PLAIN.get(type(value)) for value in values))
    if not values or None in kinds:
        raise UserError(f"{where}: choices {values!r} must be strings, numbers, booleans or None")
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _convert(value: object, hint: object) -> object:
    """A checked JSON value as its hint asks for it: an enum's member, a float."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(value, inner[0])
    if origin in (typing.Union, types.UnionType):
        fits = (option for option in inner if not _problems(value, _hint_schema(option, ""), ""))
        return _convert(value, next(fits))
    if hint is float:
        return float(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if origin is list:
        return [_convert(item, inner[0]) for item in value]
    if origin is dict:
        return {key: _convert(item, inner[1]) for key, item in value.items()}
    return value


SECTION = re.compile(r"(Arg|Param|Return|Yield|Raise|Example|Note)\w*:?$")
ENTRY = re.compile(r"(\w+)\s*(?:\(.*?\))?\s*:\s*(.*)$")                # city (str): The city.
FIELD = re.compile(r":(?:param\s+(?:[^:]*\s)?(\w+)|\w[^:]*):\s*(.*)$")  # :param str city: The city.


def _docstring(function: Callable) -> tuple[str, dict[str, str]]:
    """The text above the first section, and what is said of each parameter, each on one line."""
    lines = (inspect.getdoc(function) or "").splitlines()
    summary: list[str] = []
    described: dict[str, list[str]] = {}
    into = summary  # the text that the lines belong to
    section, indent, numpy = "", None, False
    for line, below in itertools.pairwise([*lines, ""]):
        text, depth = line.strip(), len(line) - len(line.lstrip())
        underlined = below.startswith("---")  # as NumPy's headers are
        header, field = SECTION.match(text), FIELD.match(text)
        if depth == 0 and header and (underlined or text.endswith(":")):
            section, indent, numpy, into = header[1], None, underlined, []
        elif depth == 0 and field:
            into = described.setdefault(field[1], [field[2]]) if field[1] else []
        elif not text:
            into = summary if into is summary else []
        elif section in ("Arg", "Param"):
            indent = depth if indent is None else indent
            entry = ENTRY.match(text) if depth == indent else None
            if entry:  # NumPy has the type after the colon, and the text below
                into = described[entry[1]] = [] if numpy else [entry[2]]
            elif depth < indent:
                section, into = "", []
            else:
                into.append(text)
        else:
            into.append(text)
    joined = {key: " ".join(filter(None, texts)) for key, texts in described.items()}
    return " ".join(summary), {key: text for key, text in joined.items() if text}


# --- checking a call's arguments ------------------------------------------------------------------

# Data sets also say dict, float, tuple and any where JSON Schema has other words.
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list,
         "object": dict, "null": type(None), "float": (int, float), "tuple": list, "dict": dict,
         "any": object}

# Words that narrow a type: the values that they are about, who keeps to them, and how that is said.
BOUNDS: dict[str, tuple[type | tuple, Callable, str]] = {
    "minimum": ((int, float), operator.ge, "at least {}"),
    "maximum": ((int, float), operator.le, "at most {}"),
    "exclusiveMinimum": ((int, float), operator.gt, "more than {}"),
    "exclusiveMaximum": ((int, float), operator.lt, "less than {}"),
    "multipleOf": ((int, float), lambda number, step: math.isclose(
        number, round(number / step) * step), "a multiple of {}"),
    "minLength": (str, lambda text, least: len(text) >= least, "at least {} characters"),
    "maxLength": (str, lambda text, most: len(text) <= most, "at most {} characters"),
    "pattern": (str, lambda text, pattern: re.search(pattern, text), "text that matches {}"),
    "minItems": (list, lambda items, least: len(items) >= least, "at least {} items"),
    "maxItems": (list, lambda items, most: len(items) <= most, "at most {} items"),
    "uniqueItems": (list, lambda items, unique: not unique or len(items) == len(
        set(map(dump_json, items))), "items that differ"),
    "minProperties": (dict, lambda object, least: len(object) >= least, "at least {} keys"),
    "maxProperties": (dict, lambda object, most: len(object) <= most, "at most {} keys"),
}


def check_arguments(schema: dict, arguments: object) -> list[str]:
    """What is wrong with a call's arguments, one sentence a problem; none when they fit.

    `schema` is a tool's schema. Unknown and missing parameters, types (true is no integer, an
    integer is a number, "5" is neither), choices, ranges, lengths and patterns (as Python's `re`
    has them), and the insides of arrays and objects. Raises UserError for a bound in the schema
    that is none.
    """
    parameters = schema.get("function", schema).get("parameters") or {}
    return _problems(arguments, {"properties": {}, **parameters, "type": "object"}, "")


def _problems(value: object, schema: dict, where: str) -> list[str]:
    """What keeps `value` from fitting a JSON schema; `where` is its path, as `days[2].name`."""
    options = schema.get("anyOf")
    if options:
        return [] if any(not _problems(value, option, where) for option in options) else [
            _expected(value, _describe(schema), where)]
    kinds = _kinds(schema)
    if kinds and not any(isinstance(value, TYPES.get(kind, object)) for kind in kinds
                         if not isinstance(value, bool) or kind in ("boolean", "any")):
        return [_expected(value, _describe(schema), where)]
    # Python has True == 1, JSON has not.
    if "enum" in schema and not any(value == choice and isinstance(value, bool)
                                    == isinstance(choice, bool) for choice in schema["enum"]):
        return [_expected(value, _describe(schema), where)]
    problems = []
    for word, (of, keeps, said) in BOUNDS.items():
        bound = _bound(schema, word)
        if bound is None or isinstance(value, bool) or not isinstance(value, of):
            continue
        try:
            if not keeps(value, bound):
                problems.append(_expected(value, said.format(bound), where))
        except (TypeError, ArithmeticError, re.error) as error:
            raise UserError(f"the schema of {where or 'the arguments'} has {word} "
                            f"{dump_json(bound)}, which cannot be checked: {error}") from None
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            problems += _problems(item, schema["items"], f"{where}[{index}]")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", "properties" not in schema)
        path = f"{where}." if where else ""
        problems += [f"{path}{key}: missing, expected {_describe(known.get(key, {}))}"
                     for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            if key in known or isinstance(others, dict):
                problems += _problems(item, known.get(key, others), f"{path}{key}")
            elif not others:
                problems.append(f"{path}{key}: unknown parameter{_instead(key, known)}")
    return problems


def _bound(schema: dict, word: str) -> object:
    """What a schema says of one of `BOUNDS`, None where it says nothing."""
    bound = schema.get(word)
    if isinstance(bound, bool) and word.startswith("exclusive"):  # as OpenAPI 3.0 has it
        bound = schema.get(word.replace("exclusiveM", "m")) if bound else None
    return bound


def _kinds(schema: dict) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else kinds


def _expected(value: object, what: str, where: str) -> str:
    text = dump_json(value)
    text = text if len(text) <= 60 else f"{text[:60]}…"
    return f"{where or 'arguments'}: expected {what}, got {text}"


def _describe(schema: dict) -> str:
    """`an integer or null`, `one of "a", "b"`."""
    if "enum" in schema:
        return "one of " + ", ".join(map(dump_json, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_describe, schema["anyOf"])))
    articles = {"null": "null", "any": "any value"}
    return " or ".join(articles.get(kind, f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}")
                       for kind in _kinds(schema)) or "any value"


def _instead(name: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown name."""
    close = difflib.get_close_matches(name, known, 1)
    guess = f", did you mean {close[0]}?" if close else ""
    return f"{guess} (known: {', '.join(known) or 'none'})"


# --- running a call -------------------------------------------------------------------------------

def load_tools(path: str | Path) -> dict[str, Callable]:
    """The tools of a Python file by name: its list `TOOLS`, or else its public functions.

    The file is the user's own and is imported, so its top level runs. Raises UserError, one line,
    for a file that is missing, cannot be imported or offers nothing, and what `tool_schema` raises.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"{path}: no such Python file; --tools takes a .py file with functions")
    name, folder = f"minilora_tools_{path.stem}", str(path.parent.resolve())
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and type hints look for it
    sys.path.insert(0, folder)  # it may import its neighbours, as in `python FILE`
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
               if Path(frame.filename) == path.absolute()]
        at = f":{own[-1]}" if own else ""
        raise UserError(f"{path}{at}: importing it raised {_one_line(error)}") from None
    finally:
        sys.path.remove(folder)
    found = getattr(module, "TOOLS", None)
    if found is None:
        found = [item for key, item in vars(module).items() if inspect.isfunction(item)
                 and item.__module__ == name and not key.startswith("_")]
    functions = {}
    for function in found:
        if not callable(function) or not hasattr(function, "__name__"):
            raise UserError(f"{path}: TOOLS holds {function!r}; expected functions")
        if functions.setdefault(function.__name__, function) is not function:
            raise UserError(f"{path}: two tools are called {function.__name__}")
        tool_schema(function)  # raises here what it would raise later
    if not functions:
        raise UserError(f"{path}: no tools in it; define a public function or TOOLS = [function]")
    return functions


def _one_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())


def run_call(functions: dict[str, Callable], call: ToolCall, timeout: float | None = TIMEOUT,
             budget: int = BUDGET) -> str:
    """Runs one call and returns what the model is told: the result, or {"error": …}.

    A string is returned as it is, anything else as JSON (dates, paths, sets, dataclasses, arrays
    and their like as the nearest that JSON has); of what is longer than `budget` characters the
    model sees both ends (`shorten`). Nothing raises: an unknown tool, bad arguments, an exception,
    a result that JSON cannot hold and a function that takes longer than `timeout` seconds (None: no
    limit) are errors that the model can read and mend. A function that has run out of time, or
    whose caller is interrupted, is told to end by a SystemExit in its own thread. Python sees to
    that between two steps of its own: a loop ends at once, what sleeps or waits for the network
    when it has waited. To end that as well would take a process for each call, which would share
    nothing with the rest of the program.
    """
    done: dict[str, str] = {}

    def work() -> None:
        try:
            hints = typing.get_type_hints(function, include_extras=True)
            given = copy.deepcopy(call.arguments)  # what it does to a list is not what was called
            result = function(**{key: _convert(value, hints[key]) for key, value in given.items()})
            done["text"] = (result if isinstance(result, str) else
                            json.dumps(result, ensure_ascii=False, allow_nan=False, default=_plain))
        except BaseException as error:  # SystemExit too: a tool must not end the chat
            done["text"] = _error(_one_line(error))

    function, error = functions.get(call.name), ""
    if function is None:
        error = f"{call.name}: unknown tool{_instead(call.name, functions)}"
    elif problems := check_arguments(tool_schema(function), call.arguments):
        error = "; ".join(problems)
    else:
        thread = threading.Thread(target=work, daemon=True, name=f"tool {call.name}")
        thread.start()
        try:
            thread.join(timeout)
        finally:
            late = thread.is_alive()
            if late:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        if late:
            error = f"{call.name} took longer than {timeout:g} seconds"
    text = _error(error) if error else done["text"]
    text = text.encode(errors="replace").decode()  # a tokenizer takes no half surrogate pair
    return shorten(text, budget)


def _error(text: str) -> str:
    """How the model is told of a failure."""
    return dump_json({"error": text})


def _plain(value: object) -> object:
    """What `json` is given for a result that it does not know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, PurePath | Decimal):
        return str(value)
    for name in ("isoformat", "tolist"):  # dates and times; arrays and numbers of numpy and torch
        if hasattr(value, name):
            return getattr(value, name)()
    raise TypeError(f"a result of type {type(value).__name__} is not JSON; return text, a number, "
                    "a list or a dict")


# A JSON escape; a character past U+FFFF has two that belong together.
ESCAPE = re.compile(r"\\(?:u[dD][89abAB]\w\w\\u\w{4}|u\w{4}|.)", re.DOTALL)
LONGEST = 11  # characters of one after its backslash


def shorten(text: str, budget: int) -> str:
    """`text`, or its first three quarters and last quarter of `budget` characters.

    Between the ends stands how many characters are missing. No JSON escape is cut in two.
    """
    if len(text) <= budget:
        return text
    head = _before_escape(text, budget * 3 // 4)
    tail = _before_escape(text, min(len(text) - budget // 4 + LONGEST, len(text)))
    return f"{text[:head]} … ({tail - head} of {len(text)} characters left out) … {text[tail:]}"


def _before_escape(text: str, at: int) -> int:
    """`at`, or the start of the JSON escape that a cut there would break."""
    for start in range(max(0, at - LONGEST), at):
        before = start - len(text[:start].rstrip("\\"))  # an odd number of \ escapes the next one
        found = ESCAPE.match(text, start) if before % 2 == 0 else None
        if found and found.end() > at:
            return start
    return at


# --- think, act, observe --------------------------------------------------------------------------

@dataclass(frozen=True)
class Event:
    """Something that happened in `converse`.

    kind: `thinking`, `text` (beside a call), `call`, `result`, `malformed` (a call that could not
    be read; the text says why), `answer`, or `limit` (there is none; the text says why).
    """

    kind: str
    text: str
    call: ToolCall | None = None  # of call and result


def converse(messages: list[Message], reply: Callable[[Sequence[Message]], str],
             functions: dict[str, Callable], dialect: str = "hermes", rounds: int = ROUNDS,
             timeout: float | None = TIMEOUT, budget: int = BUDGET) -> Iterator[Event]:
    """Lets the model think, call and observe until it answers.

    `reply(messages)` is the model: the text of its next turn. Each turn and each result is appended
    to `messages`, so that a chat goes on from there. The calls of one turn run one after the other
    in their order, for one may need what the other did. After `rounds` rounds, or when the very
    same call has failed `REPEATS` times, no call is run any more: the model is told so and may
    reply twice. Where it still does not answer, a last message says that in its place.

    A call that cannot be read goes back to the model as an error, as a bad call does. When the
    question is done with, such replies leave `messages`: they have served, and every conversation
    that stays can be trained on.
    """
    failures: Counter[str] = Counter()
    unread: list[Message] = []  # replies that could not be read, and what was said to them
    ended = no_more = ""        # why no call is run any more, and what the model is told then
    number, last = 0, None
    while number != last:
        number += 1
        text = reply(messages)
        try:
            turn = split_reply(text, dialect)
        except MalformedCall as error:
            problem = _error(f"the call could not be read: {error}{no_more}")
            unread += [Message("assistant", text), Message("tool", problem)]
            messages += unread[-2:]
            failures[text] += 1
            yield Event("malformed", str(error))
        else:
            if turn.thinking:
                yield Event("thinking", turn.thinking)
            if not turn.tool_calls:
                final = Event("answer", turn.content)
                turn = turn if turn.content else replace(turn, content="[no answer]")
                break
            messages.append(turn)
            if turn.content:
                yield Event("text", turn.content)
            for call in turn.tool_calls:
                arguments = ", ".join(f"{key}={dump_json(value)}"
                                      for key, value in call.arguments.items())
                yield Event("call", f"{call.name}({arguments})", call)
                result = (_error(f"not run{no_more}") if no_more else
                          run_call(functions, call, timeout, budget))
                failures[f"{call.name}({arguments})"] += result.startswith('{"error":')
                messages.append(Message("tool", result, name=call.name, tool_call_id=call.id))
                yield Event("result", result, call)
        if not ended and (number == rounds or max(failures.values(), default=0) >= REPEATS):
            ended = (f"{rounds} rounds of calls were made" if number == rounds else
                     f"the same call failed {REPEATS} times")
            no_more = f"; no more calls, for {ended}: answer with what is known"
            last = number + 2
    else:
        final = Event("limit", f"no answer: {ended}")
        turn = Message("assistant", f"[{final.text}]")
    served = set(map(id, unread))
    messages[:] = [message for message in messages if id(message) not in served] + [turn]
    yield final


def latest(messages: Sequence[Message], fits: Callable[[list[Message]], bool], since: int = 0,
           ) -> tuple[list[Message], int]:
    """What the model is still shown of a chat that has outgrown its context, and where that starts.

    A system message stays. The rest is left out from its oldest end, a question and all that came
    of it at a time, up to message `since` in any case; at last the earlier rounds of calls of the
    latest question, which itself stays. Where nothing fits it is the least there can be.
    """
    opening = [message for message in messages[:1] if message.role == "system"]
    question = max(at for at, message in enumerate(messages) if message.role == "user")
    starts = [at for at in range(min(since, question), len(messages))
              if messages[at].role == ("user" if at <= question else "assistant")]
    for start in starts:
        asked = [messages[question]] if start > question else []
        kept = [*opening, *asked, *messages[start:]]
        if fits(kept):
            break
    return kept, start
