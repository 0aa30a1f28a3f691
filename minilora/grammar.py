"""What a model may write in a reply: a grammar made of a dialect and the tools' JSON schemas.

    text <tool_call> ⏎{"name": "get_weather", "arguments": ⟨object⟩}⏎ </tool_call>

Text is free, but that it cannot spell a tag; a call is written as the dialect's own writer writes
it, with the name of a tool on offer and arguments that its schema allows. The grammar is items
within items, which may come back to themselves as a schema may; automaton.py reads by it.

Of a schema the types, properties, required, additionalProperties (absent: none beside properties,
as `tools.check_arguments` has it), items, minItems, maxItems, the range of an integer, enum, const,
anyOf, oneOf (as anyOf), allOf (merged) and local $ref are kept; what has none of these may be any
JSON value. What else narrows it is not, and named in `Grammar.loose`: lengths and patterns of text,
ranges of numbers and so on. Nor can a call have half a surrogate pair, an escape in a key that no
schema names, over 32 levels, or a number of more than 20 digits on a side of its point or with an
exponent over 99.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minilora.chat import stop_ids
from minilora.config import UserError
from minilora.dialects import get_dialect
from minilora.jsontext import dump_json
from minilora.notation import Dialect, Piece, ToolCall
from minilora.tokenizer import Tokenizer

LONG = 20         # digits of a number, before its point and after it
FAR = 10 ** LONG  # what no integer reaches


# --- what may be written --------------------------------------------------------------------------

# bytes     text as it is
# int       a control token
# str       "string", "integer", "number" or "space", as `automaton.ARCS` reads it
# … and these.

@dataclass(eq=False)
class Choice:
    """One of several sequences of items."""

    options: list[tuple] = field(default_factory=list)


@dataclass(eq=False)
class Array:
    """A list of items that are all of one kind, at least and at most so many."""

    items: Choice
    least: int = 0
    most: float = math.inf


@dataclass(eq=False)
class Object:
    """An object: its keys, each as it is written and with its value; the value of any other key."""

    fields: dict[bytes, tuple[tuple, Choice]]
    required: frozenset[bytes]
    others: Choice | None


class Whole(NamedTuple):
    """An integer from `low` to `high`, of which `typed` is written."""

    low: int
    high: int
    typed: bytes = b""


class Prose(NamedTuple):
    """Any text that does not spell a tag; `tail` is its end, as far as that may begin one."""

    tags: tuple[bytes, ...]
    tail: bytes = b""


# --- how a dialect writes -------------------------------------------------------------------------

class Syntax:
    """The parts of a written call, learnt from the dialect's own writer.

    A call of f with {"k": 0} is  head(f) { label(k) 0 } tail,  and so on: what stands where is told
    by what else stands there. Only what a string and a new key may hold is known here.
    """

    def __init__(self, tokenizer: Tokenizer, dialect: Dialect) -> None:
        self._tokenizer, self._writer = tokenizer, dialect.notation.call
        empty = self._write(ToolCall("f", {}))
        self._start = len(empty) - empty[::-1].index("{")  # where the inside of {} begins
        self._after = len(empty) - self._start             # symbols that follow it
        tail = _items(empty[self._start + 1:])
        self.tail = Choice([tail])
        with_id = _items(self._write(ToolCall("f", {}, "i"))[self._start + 1:])
        if with_id != tail:  # as in Mistral's dialect
            before, after = with_id[0].split(b'"i"')
            self.tail.options.append((before, "string", after))
        one, two = self._inside({"a": 0}), self._inside({"a": 0, "b": 0})
        self.comma = _items(two[len(one):-len(one)])
        before, after = b"".join(self.label("k")).split(b"k")
        # A key of its own, up to its value: the arcs read what is typed and the mark that ends it.
        self.key = (before, "text" if before else "bare", after[1:])
        self.string = self.value("")
        if len(self.string) == 1:  # the quotes of JSON; else two control tokens
            self.string = ("string",)
        else:
            opening, closing = self.string
            self.string = (opening, Prose((tokenizer.decode([opening]).encode(),)), closing)
        self.scalars = {
            "string": [self.string], "integer": [("integer",)], "number": [("number",)],
            "boolean": [self.value(True), self.value(False)], "null": [self.value(None)]}
        self.anything = Choice([option for kind in ("string", "number", "boolean", "null")
                                for option in self.scalars[kind]])
        self.anything.options += [(Array(self.anything),),
                                  (Object({}, frozenset(), self.anything),)]

    def _write(self, call: ToolCall) -> list[str | int]:
        """A call as characters and control tokens."""
        return [symbol for text, control in self._writer(call)
                for symbol in ([self._tokenizer.token_id(text)] if control else text)]

    def _inside(self, arguments: dict) -> list[str | int]:
        """What stands between the braces of a call's arguments."""
        return self._write(ToolCall("f", arguments))[self._start:-self._after]

    def head(self, name: str) -> tuple:
        """What stands before a call's arguments."""
        return _items(self._write(ToolCall(name, {}))[:-self._after - 1])

    def label(self, key: str) -> tuple:
        """What stands before the value of a key."""
        return _items(self._inside({key: 0})[:-1])

    def value(self, value: object) -> tuple:
        """How a JSON value is written."""
        return _items(self._inside({"k": value})[len(self._inside({"k": 0})) - 1:])


def _items(symbols: Iterable[str | int]) -> tuple:
    """Characters and control tokens as items of a stack."""
    items: list = []
    for symbol in symbols:
        if isinstance(symbol, str) and items and isinstance(items[-1], bytes):
            items[-1] += symbol.encode()
        else:
            items.append(symbol.encode() if isinstance(symbol, str) else symbol)
    return tuple(items)


# --- schemas --------------------------------------------------------------------------------------

# What data sets say beside JSON Schema's words; a type that nobody knows is any value.
ALIASES = {"dict": "object", "float": "number", "tuple": "array"}

# Words that narrow a type further than the grammar does; those of a type that is not told are all.
LOOSE = {"string": {"minLength", "maxLength", "pattern"}, "integer": {"multipleOf"},
         "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
         "array": {"uniqueItems", "prefixItems", "contains"}, "boolean": set(), "null": set(),
         "object": {"minProperties", "maxProperties", "patternProperties", "propertyNames",
                    "dependentRequired"}}
EVERY = frozenset({"minItems", "maxItems"}.union(*LOOSE.values()))


def _arguments(parameters: dict, syntax: Syntax, loose: set[str]) -> Choice:
    """The objects that a tool's `parameters`, a JSON schema, allow.

    `loose` gets the words that narrow them further.
    """
    known: dict[str, Choice] = {}  # $ref → what it means, which may refer to itself

    def choice(schema: object) -> Choice:
        if not isinstance(schema, dict):
            return Choice() if schema is False else syntax.anything
        if "$ref" not in schema:
            return Choice(options(schema))
        path = str(schema["$ref"])
        if path not in known:
            known[path], target = Choice(), lookup(path)
            known[path].options = choice(target).options
        return known[path]

    def lookup(path: str) -> object:
        target: object = parameters
        for part in path.split("/")[1:]:
            target = target.get(part) if isinstance(target, dict) else None
        if target is None:  # it is elsewhere, and may be anything
            loose.add("$ref")
        return target

    def options(schema: dict) -> list[tuple]:
        loose.update(schema.keys() & {"not", "if"})
        if "const" in schema:
            return [syntax.value(schema["const"])]
        kinds = schema.get("type", [])
        kinds = [ALIASES.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
        if "enum" in schema:
            loose.update(schema.keys() & EVERY)
            fitting = [value for value in schema["enum"] if _is_one_of(value, kinds)]
            return [syntax.value(value) for value in fitting or schema["enum"]]
        for word in ("anyOf", "oneOf"):
            if schema.get(word):
                rest = {key: value for key, value in schema.items() if key != word}
                return [(choice({**rest, **option} if isinstance(option, dict) else option),)
                        for option in schema[word]]
        if schema.get("allOf"):
            return options(merged(schema))
        if not kinds:
            kinds = (["object"] if schema.keys() & {"properties", "required"} else
                     ["array"] if "items" in schema else ["any"])
        return [option for kind in kinds for option in of_kind(kind, schema)]

    def merged(schema: dict) -> dict:
        if "$ref" in schema:
            return merged(lookup(str(schema["$ref"])) or {})
        whole = {key: value for key, value in schema.items() if key != "allOf"}
        for part in map(merged, schema.get("allOf", ())):
            required = [*whole.get("required", []), *part.get("required", [])]
            properties = {**whole.get("properties", {}), **part.get("properties", {})}
            whole |= part | {"required": required, "properties": properties}
        return whole

    def of_kind(kind: str, schema: dict) -> list[tuple]:
        loose.update(schema.keys() & LOOSE.get(kind, EVERY))
        if kind == "object":
            return [(fields(schema),)]
        if kind == "array":
            return [(Array(choice(schema.get("items")), bound(schema, "minItems", 0),
                           bound(schema, "maxItems", math.inf)),)]
        if kind == "integer" and schema.keys() & LOOSE["number"]:
            low, above = (bound(schema, word, -FAR) for word in ("minimum", "exclusiveMinimum"))
            high, below = (bound(schema, word, FAR) for word in ("maximum", "exclusiveMaximum"))
            return [(Whole(max(math.ceil(low), math.floor(above) + 1),
                           min(math.floor(high), math.ceil(below) - 1)),)]
        return syntax.scalars.get(kind, syntax.anything.options)

    def bound(schema: dict, word: str, default: float) -> float:
        number = schema.get(word, default)
        if isinstance(number, bool):  # OpenAPI 3.0: whether `minimum` itself is left out
            number = schema.get(word.replace("exclusiveM", "m"), default) if number else default
        if isinstance(number, int | float):
            return number
        loose.add(word)
        return default

    def fields(schema: dict) -> Object:
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        others = schema.get("additionalProperties", "properties" not in schema)
        named = {**dict.fromkeys(required, others or {}), **properties}
        return Object(
            {_inside(key): (syntax.label(key), choice(value)) for key, value in named.items()},
            frozenset(map(_inside, required)), choice(others) if others else None)

    return choice({"properties": {}, **parameters, "type": "object"})


def _inside(text: str) -> bytes:
    """A string as JSON, without its quotes."""
    return dump_json(text).encode()[1:-1]


def _is_one_of(value: object, kinds: list[str]) -> bool:
    names = {str: {"string"}, bool: {"boolean"}, int: {"integer", "number"}, float: {"number"},
             type(None): {"null"}, list: {"array"}, dict: {"object"}}[type(value)]
    return not kinds or not names.isdisjoint(kinds)


# --- a whole reply --------------------------------------------------------------------------------

class Grammar:
    """What may be written of one reply.

    `tools` are those on offer, {"type": "function", "function": {…}} or bare. Raises UserError for
    a tool whose parameters are not a schema, for a dialect that is not known, and for a tokenizer
    without the dialect's tokens.

    reply:     the whole of it
    arguments: of each tool by its name
    loose:     by a tool's name the words of its schema that narrow it and are not kept to
    """

    def __init__(self, tokenizer: Tokenizer, dialect: str, tools: Sequence[dict]) -> None:
        language = get_dialect(dialect)
        self.syntax = Syntax(tokenizer, language)
        self.arguments: dict[str, Choice] = {}
        self.loose: dict[str, set[str]] = {}
        for function in (tool.get("function", tool) for tool in tools):
            name, loose = function["name"], set()
            try:
                self.arguments[name] = _arguments(function.get("parameters") or {}, self.syntax,
                                                  loose)
            except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError,
                    RecursionError):
                raise UserError(f"tool {name}: its parameters are not a JSON schema; mend them or "
                                "do not offer it") from None
            if loose:
                self.loose[name] = loose
        end = Choice([(), *((stop,) for stop in stop_ids(tokenizer, dialect))])
        self.reply = _reply(tokenizer, language, self.syntax, self.arguments, end)


def _reply(tokenizer: Tokenizer, dialect: Dialect, syntax: Syntax, arguments: dict[str, Choice],
           end: Choice) -> Choice:
    """All replies: thinking, text and calls, by the table of the dialect."""
    def items(pieces: list[Piece]) -> tuple:
        return tuple(tokenizer.token_id(text) if control else text.encode()
                     for text, control in pieces)

    opening, between, closing = map(dialect.cut, dialect.calls)
    think, thought = ([piece for piece in dialect.cut(text) if piece[1]]
                      for text in (dialect.think.opening, dialect.think.closing))
    tags = {text for text, control in opening + closing + think + thought if control}
    text = Prose(tuple(tag.encode() for tag in sorted({*tags, dialect.stop} - {""})))
    call = Choice([(*syntax.head(name), choice, syntax.tail)
                   for name, choice in arguments.items()])
    more = Choice([(*items(closing), end)])
    more.options.append((*items(between), call, more))
    answer = (text, Choice([(end,), (*items(opening), call, more)]))
    reply = Choice([answer])
    if think and thought:  # which may be all there is
        thinking = Choice([(end,), (*items(thought), *answer)])
        reply.options.append(("space", *items(think), text, thinking))
    return reply
