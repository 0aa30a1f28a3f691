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
import functools
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
from fractions import Fraction
from pathlib import Path, PurePath
from typing import NamedTuple

from minilora.chat import MalformedCall, Message, ToolCall, split_reply
from minilora.config import UserError
from minilora.jsontext import dump_json
from minilora.readers import warn
from minilora.schema import choices, is_in, is_of, kinds, names, others, target, type_words

TIMEOUT = 30.0  # seconds that a function may take
BUDGET = 4000   # characters that the model is shown of its result, or of all those of a round
ROUNDS = 8      # rounds of calls that are run for one question
CALLS = 32      # calls in one of them
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
    if isinstance(hint, type) and hint in PLAIN:
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
        root = _Root({}, iter(range(STEPS)))
        fits = (option for option in inner
                if not any(_problems(value, _hint_schema(option, ""), "", root)))
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

# Words that narrow a type: the values that they are about, who keeps to them, and how that is said.
BOUNDS: dict[str, tuple[type | tuple, Callable, str]] = {
    "minimum": ((int, float), operator.ge, "at least {}"),
    "maximum": ((int, float), operator.le, "at most {}"),
    "exclusiveMinimum": ((int, float), operator.gt, "more than {}"),
    "exclusiveMaximum": ((int, float), operator.lt, "less than {}"),
    "multipleOf": ((int, float), lambda number, step: (
        Fraction(repr(number)) / Fraction(repr(step))).denominator == 1, "a multiple of {}"),
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

# What JSON Schema has besides.
UNCHECKED = {"if", "contains", "dependentRequired", "dependentSchemas", "patternProperties",
             "prefixItems", "propertyNames", "unevaluatedItems", "unevaluatedProperties",
             "$dynamicRef"}
STEPS = 100_000  # of a check: a step looks at one value and one schema
MOST = 20        # problems of one call that are told
SHOWN = 60       # characters of a key or a value in one of them


def check_arguments(schema: dict, arguments: object) -> list[str]:
    """What is wrong with a call's arguments, one sentence a problem; none when they fit.

    `schema` is a tool's schema. Unknown and missing parameters, types (true is no integer, an
    integer is a number, "5" is neither), choices, ranges, lengths and patterns (as Python's `re`
    has them), the insides of arrays and objects, and what allOf, anyOf, oneOf, not and a local $ref
    add. An object may have the keys that its schema or one beside it names (`properties`,
    `required`); any where none does.
    What is in `UNCHECKED` passes, and a note tells of it once; so does a pattern that some text
    could keep busy for long. Of many problems the first `MOST` are told. Raises UserError for a
    schema that is none, a bound in it that is none, and one that takes more than `STEPS` steps.
    """
    function = schema.get("function", schema)
    parameters = function.get("parameters") or {}
    root = _Root(parameters, iter(range(STEPS)))
    try:
        found = _problems(arguments, {"properties": {}, **parameters, "type": "object"}, "", root)
        return list(dict.fromkeys(itertools.islice(found, MOST)))
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise UserError(f"tool {function.get('name')}: its parameters are not a JSON schema; mend "
                        "them or do not offer it") from None


class _Root(NamedTuple):
    """What a check knows everywhere."""

    schema: dict          # in which a $ref leads to a part
    steps: Iterator[int]  # those that are left


def _problems(value: object, schema: dict | bool, where: str, root: _Root,
              beside: frozenset[str] = frozenset()) -> Iterator[str]:
    """What keeps `value` from fitting a JSON schema; `where` is its path, as `days[2].name`.

    `beside` are the keys that schemas know which hold for the same value.
    """
    if next(root.steps, None) is None:
        raise UserError(f"the schema of {where or 'the arguments'} takes more than {STEPS:,} steps "
                        "to check; make it, or the call, smaller")
    if isinstance(schema, bool):  # true: any value, false: none
        if not schema:
            yield _expected(value, "no such value", where)
        return
    values = choices(schema)
    if not is_of(value, kinds(schema)) or values is not None and not is_in(value, values):
        yield _expected(value, _describe(schema), where)
        return
    for word in UNCHECKED & schema.keys():
        _tell(f"{word} in a tool's schema")
    parts = [*([_target(schema["$ref"], root)] if "$ref" in schema else []),
             *schema.get("allOf", ())]
    some, one = schema.get("anyOf") or [], schema.get("oneOf") or []
    known = schema.get("properties", {})
    shared = beside | names(schema).keys() | _keys([*parts, *some], root)
    beside = shared | _keys([*one], root)

    def fits(other: dict | bool, beside: frozenset[str]) -> bool:
        return not any(_problems(value, other, where, root, beside))

    for part in parts:
        yield from _problems(value, part, where, root, beside)
    if some and not any(fits(option, beside) for option in some):
        yield _expected(value, _describe({"anyOf": some}), where)
    # One of these does not know the keys of the others, by which they are told apart.
    if one and (count := sum(fits(option, shared) for option in one)) != 1:
        yield _expected(value, ("just one of " if count else "") + _describe({"oneOf": one}), where)
    if "not" in schema and fits(schema["not"], beside):
        yield _expected(value, f"anything but {_describe(schema['not'])}", where)
    for word, (of, keeps, said) in BOUNDS.items():
        bound = _bound(schema, word)
        if bound is None or isinstance(value, bool) or not isinstance(value, of):
            continue
        try:
            if word == "pattern" and _is_slow(bound, value):
                _tell("a pattern in a tool's schema that could take long")
            elif not keeps(value, bound):
                yield _expected(value, said.format(bound), where)
        except (TypeError, ValueError, ArithmeticError, re.error) as error:
            raise UserError(f"the schema of {where or 'the arguments'} has {word} "
                            f"{dump_json(bound)}, which cannot be checked: {error}") from None
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from _problems(item, schema["items"], f"{where}[{index}]", root)
    if isinstance(value, dict):
        other = others(schema)
        path = f"{where}." if where else ""
        for key in schema.get("required", []):
            if key not in value:
                yield f"{path}{key}: missing, expected {_describe(known.get(key, {}))}"
        for key, item in value.items():
            at = f"{path}{key[:SHOWN]}"
            if key in known or isinstance(other, dict):
                yield from _problems(item, known.get(key, other), at, root)
            elif not other and key not in beside:
                yield f"{at}: unknown parameter{_instead(key, {**known, **dict.fromkeys(beside)})}"


def _target(path: object, root: _Root) -> dict | bool:
    """What a $ref leads to: a part of the schema itself, or else anything."""
    found = target(path, root.schema)
    if found is None:
        _tell("a $ref that leads nowhere in a tool's schema")
        return True
    return found


def _keys(schemas: list, root: _Root) -> set[str]:
    """The keys that these schemas know of an object, by themselves and in what they refer to."""
    found: set[str] = set()
    seen: set[int] = set()
    while schemas and next(root.steps, None) is not None:
        schema = schemas.pop()
        if id(schema) in seen or not isinstance(schema, dict):
            continue
        seen.add(id(schema))
        found |= names(schema).keys()
        schemas += [part for word in ("allOf", "anyOf", "oneOf") for part in schema.get(word, ())]
        schemas += [_target(schema["$ref"], root)] if "$ref" in schema else []
    return found


# A repeat, an option or a choice in a pattern: what a search may go back to and try otherwise.
WAYS = re.compile(r"[*+|]|(?<!\()\?|\{\d*,")
REPEATED = re.compile(r"\)[*+{]")  # a group many times


def _is_slow(pattern: str, text: str) -> bool:
    """Whether a search might take long. A repeat within a repeat takes time 2ⁿ, and n repeats in a
    row take the length of the text to that power: nothing could end it."""
    ways = len(WAYS.findall(pattern))
    return ((ways + 1) * math.log10(len(text) + 1) > 8  # about a second
            or bool(ways and REPEATED.search(pattern)))


@functools.cache
def _tell(what: str) -> None:
    """A note of what is not checked, once in a run."""
    warn(f"{what} is not checked")


def _bound(schema: dict, word: str) -> object:
    """What a schema says of one of `BOUNDS`, None where it says nothing."""
    bound = schema.get(word)
    if isinstance(bound, bool) and word.startswith("exclusive"):  # as OpenAPI 3.0 has it
        bound = schema.get(word.replace("exclusiveM", "m")) if bound else None
    return bound


def _expected(value: object, what: str, where: str) -> str:
    text = dump_json(value)
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
    return f"{where or 'arguments'}: expected {what}, got {text}"


def _describe(schema: dict | bool) -> str:
    """`an integer or null`, `one of "a", "b"`."""
    if isinstance(schema, bool):
        return "any value" if schema else "no such value"
    if "const" in schema:
        return dump_json(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(dump_json, schema["enum"][:MOST]))
    for word in ("anyOf", "oneOf"):
        if schema.get(word):
            return " or ".join(dict.fromkeys(map(_describe, schema[word][:MOST])))
    if schema.get("allOf") or "$ref" in schema:
        return "what its schema says"
    articles = {"null": "null", "any": "any value"}
    return " or ".join(articles.get(kind, f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}")
                       for kind in type_words(schema)) or "any value"


def _instead(name: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown name."""
    close = difflib.get_close_matches(name, known, 1)
    guess = f", did you mean {close[0]}?" if close else ""
    return f"{guess} (known: {', '.join(known) or 'none'})"


# --- running a call -------------------------------------------------------------------------------

def load_tools(path: str | Path) -> dict[str, Callable]:
    """The tools of a Python file by name: its list `TOOLS`, or else its public functions.

    The file is the user's own and is imported, so its top level runs. Raises UserError, one line
    that begins with the file, for one that is missing, cannot be imported or offers nothing, and
    for what `tool_schema` refuses.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"{path}: no such Python file; --tools takes a .py file with functions")
    name, file = f"minilora_tools_{path.stem}", path.absolute()  # it may change folders
    folder = str(path.parent.resolve())
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and type hints look for it
    sys.path.insert(0, folder)  # it may import its neighbours, as in `python FILE`
    try:
        spec.loader.exec_module(module)
        return _offered(vars(module), name)
    except KeyboardInterrupt:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except BaseException as error:  # whatever it likes: SystemExit, GeneratorExit, its own
        if isinstance(error, SyntaxError) and error.filename:
            raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from None
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
               if Path(frame.filename) == file]
        at = f":{own[-1]}" if own else ""
        raise UserError(f"{path}{at}: importing it raised {_one_line(error)}") from None
    finally:
        if folder in sys.path:  # it may have taken it out
            sys.path.remove(folder)


def _offered(items: dict, module: str) -> dict[str, Callable]:
    """The tools among the names of a module. Raises UserError, and what odd objects raise."""
    found = items.get("TOOLS")
    if found is None:
        found = [item for key, item in items.items() if inspect.isfunction(item)
                 and item.__module__ == module and not key.startswith("_")]
    elif not isinstance(found, list | tuple | set):
        raise UserError(f"TOOLS is of type {type(found).__name__}; write TOOLS = [function]")
    functions = {}
    for function in found:
        if not callable(function) or not isinstance(getattr(function, "__name__", None), str):
            shown = " ".join(f"{function!r:.{SHOWN}}".split())
            raise UserError(f"TOOLS holds {shown}; expected functions")
        if functions.setdefault(function.__name__, function) is not function:
            raise UserError(f"two tools are called {function.__name__}")
        tool_schema(function)  # raises here what it would raise later
    if not functions:
        raise UserError("no tools in it; define a public function or TOOLS = [function]")
    return functions


def _one_line(error: BaseException) -> str:
    """An exception in a line, of `BUDGET` characters at most."""
    try:
        text = "".join(traceback.format_exception_only(error))
    except BaseException:  # it is the tool's own, and may do as it likes when it is looked at
        text = "an exception that cannot be read"
    return " ".join(text[:BUDGET].split())


LATE = "late tool "  # how the thread of a call is called that has run out of time


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
    when it has waited, and what catches it never. Until it has ended it is not run again, so there
    is no more than one such thread for a tool. To end that as well, or a single step that holds
    Python up (a huge power, a bad regular expression), or to bound a tool's memory, would take a
    process for each call, which would share nothing with the rest of the program.
    """
    done: list[str] = []

    def work() -> None:
        try:
            hints = typing.get_type_hints(function, include_extras=True)
            given = copy.deepcopy(call.arguments)  # what it does to a list is not what was called
            result = function(**{key: _convert(value, hints[key]) for key, value in given.items()})
            text = (str.__str__(result) if isinstance(result, str) else
                    json.dumps(result, ensure_ascii=False, allow_nan=False, default=_plain))
            done.append(shorten(text, budget))
        except BaseException as error:  # SystemExit too: a tool must not end the chat
            done.append(shorten(_error(_one_line(error)), budget))

    function, late = functions.get(call.name), f"{LATE}{call.name}"
    try:
        problems = check_arguments(tool_schema(function), call.arguments) if function else [
            f"{call.name}: unknown tool{_instead(call.name, functions)}"]
    except UserError as error:
        problems = [str(error)]
    if not problems and any(thread.name == late for thread in threading.enumerate()):
        problems = [f"{call.name} is still at an earlier call, which took too long; it is not run "
                    "again before that has ended"]
    if not problems:
        thread = threading.Thread(target=work, daemon=True, name=f"tool {call.name}")
        try:
            thread.start()
            thread.join(timeout)
        except RuntimeError as error:  # there are too many threads
            problems = [str(error)]
        finally:
            if thread.is_alive():
                thread.name = late
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        if thread.name == late:
            problems = [f"{call.name} took longer than {timeout:g} seconds"]
        elif not done:
            problems = problems or [f"{call.name} ended without a result"]
    text = shorten(_error("; ".join(problems)), budget) if problems else done[0]
    return text.encode(errors="replace").decode()  # a tokenizer takes no half surrogate pair


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
        found = ESCAPE.match(text, start)
        if found and found.end() > at:
            before = start - len(text[:start].rstrip("\\"))
            if before % 2 == 0:  # an odd number of \ escapes the next one
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

    A call that cannot be read goes back to the model as an error, as a bad call does, and so does
    a reply with more than `CALLS` calls, of which none is run. When the question is done with, such
    replies leave `messages`: they have served, and every conversation that stays can be trained on.
    The results of one turn share the `budget` of characters.
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
            if len(turn.tool_calls) > CALLS:
                raise MalformedCall(f"{len(turn.tool_calls)} calls in one reply; make {CALLS} at "
                                    "most")
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
                          run_call(functions, call, timeout, budget // len(turn.tool_calls)))
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
