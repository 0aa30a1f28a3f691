"""What a model may write in a reply: a grammar made of a dialect and the tools' JSON schemas.

    text <tool_call> ⏎{"name": "get_weather", "arguments": ⟨object⟩}⏎ </tool_call>

Text is free, but that it cannot spell a tag; a call is written as the dialect's own writer writes
it, with the name of a tool on offer and arguments that its schema allows. The grammar is items
within items, which may come back to themselves as a schema may; automaton.py reads by it.

Of a schema the types, properties, required, additionalProperties (absent: none beside properties,
as `tools.check_arguments` has it), items, minItems, maxItems, the range of an integer, enum, const,
anyOf, oneOf (as anyOf), allOf and local $ref are kept, and so is what stands beside them; what has
none of these may be any JSON value. What else narrows it is not, and named in `Grammar.loose`:
lengths and patterns of text, ranges of numbers, a oneOf of which two options may fit, the keys of
an object that names over 200 and so on.

Some of what would fit cannot be written. With an option come the keys that it names, not those of
the others; without a type, what has properties is an object and what has items a list. Nor can a
call have half a surrogate pair, an escape in a key that no schema names, over 32 levels, or a
number of more than 20 digits on a side of its point or with an exponent over 99.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minilora.chat import stop_ids
from minilora.config import UserError
from minilora.dialects import get_dialect
from minilora.jsontext import dump_json
from minilora.notation import Dialect, Piece, ToolCall
from minilora.schema import TYPES, choices, is_in, is_of, kinds, names, others, target
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
    for kind, group in itertools.groupby(symbols, type):
        some = list(group)
        items += some if kind is int else ["".join(some).encode()]
    return tuple(items)


# --- schemas --------------------------------------------------------------------------------------

# Words that narrow a type further than the grammar does, and all those that narrow it.
LOOSE = {"string": {"minLength", "maxLength", "pattern"}, "integer": {"multipleOf"},
         "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
         "array": {"uniqueItems", "prefixItems", "contains", "unevaluatedItems"},
         "boolean": set(), "null": set(),
         "object": {"minProperties", "maxProperties", "patternProperties", "propertyNames",
                    "dependentRequired", "dependentSchemas", "unevaluatedProperties"}}
WORDS = {**LOOSE, "array": {"items", "minItems", "maxItems"} | LOOSE["array"],
         "object": {"properties", "required", "additionalProperties"} | LOOSE["object"]}
EVERY = frozenset().union(*WORDS.values())

# Those that narrow any value and are not kept to; those that are.
NEVER = {"not", "if", "$dynamicRef"}
KEPT = {"type", "enum", "const", "allOf", "anyOf", "oneOf", "$ref"}

# A short schema can say very much. Where that is too much, the rest of it is any value.
STEPS = 10_000  # schemas that are read of one tool, each as often as it is come to
MANY = 200      # keys of an object; the work for one that is written grows with their square
WAYS = 100      # to choose at once from several lists of options for one value

OPEN: dict = {}  # stands for a schema that is not kept to, and for the keys that it may know


def _arguments(parameters: dict, syntax: Syntax, loose: set[str]) -> Choice:
    """The objects that a tool's `parameters`, a JSON schema, allow.

    Several schemas may hold for one value: those of a $ref and of an allOf, and what stands beside
    them; of each anyOf and oneOf there is one to choose. A way to choose is the tuple of all that
    hold then, in which only their other words count. `loose` gets the words that narrow the
    arguments further.
    """
    known: dict[frozenset[int], Choice] = {frozenset(): syntax.anything}
    todo: list[tuple[Choice, list]] = []       # those whose options are yet to be found
    either: dict[int, list[list[tuple]]] = {}  # the ways to fit each option of a oneOf
    steps = iter(range(STEPS))

    def choice(schemas: list) -> Choice:
        """What fits all of these. Its options come later: they may lead back to it."""
        key = frozenset(map(id, schemas))
        if key not in known:
            known[key] = Choice()
            todo.append((known[key], schemas))
        return known[key]

    def ways(schemas: list, within: frozenset[int] = frozenset()) -> list[tuple[dict, ...]]:
        """The ways to fit all of these; `within` are the schemas that ask for them."""
        found: list[tuple[dict, ...]] = [()]
        for schema in schemas:
            if schema is False or id(schema) in within:  # nothing fits what asks for itself
                return []
            if not isinstance(schema, dict):
                continue
            if next(steps, None) is None:
                loose.update(schema.keys() & (EVERY | KEPT))
                schema = OPEN
            parts = [("allOf", [schema.get("allOf") or []])]  # lists of which one must hold as well
            parts += [(word, [[option] for option in schema[word]]) for word in ("anyOf", "oneOf")
                      if schema.get(word)]
            if "$ref" in schema:
                part = target(schema["$ref"], parameters)
                if part is None:  # it is elsewhere, and may be anything
                    loose.add("$ref")
                parts.append(("$ref", [[part]]))
            found = [(*way, schema) for way in found]
            for word, options in parts:
                each = [ways(option, within | {id(schema)}) for option in options]
                if word == "oneOf":
                    either[id(schema)] = each
                more = list(itertools.chain(*each))
                if len(found) * len(more) > max(WAYS, len(found), len(more)):
                    loose.add(word)
                    more = [(OPEN,)]
                found = [way + another for way in found for another in more]
        return found

    def left(way: tuple[dict, ...]) -> tuple[set[str], list | None]:
        """The types that are left, and the values; None: these are not told one by one."""
        types, values = {*TYPES}, None
        for part in way:
            some, of = choices(part), kinds(part)
            if some and not any(is_of(value, of) for value in some):
                loose.add("type")  # {"type": "integer", "enum": ["1", "2"]}
            else:
                types &= of
            if some is not None:
                values = some if values is None else [each for each in values if is_in(each, some)]
        return types, values and [value for value in values if is_of(value, types)]

    def options(way: tuple[dict, ...]) -> list[tuple]:
        words = set().union(*way)
        loose.update(words & NEVER)
        types, values = left(way)
        if values is not None:
            of = {kind for kind in TYPES if any(is_of(value, {kind}) for value in values)}
            loose.update(*(words & WORDS[kind] for kind in of))
            return [syntax.value(value) for value in values]
        if types == {*TYPES}:
            if words.isdisjoint(EVERY):
                return syntax.anything.options
            types = ({"object"} if "properties" in words or any(map(names, way)) else
                     {"array"} if "items" in words else types)
        if "number" in types:
            types -= {"integer"}
        loose.update(*(words & LOOSE[kind] for kind in types))
        return [option for kind in TYPES if kind in types for option in of_kind(kind, way)]

    def of_kind(kind: str, way: tuple[dict, ...]) -> list[tuple]:
        if kind == "object":
            return [(fields(way),)]
        if kind == "array":
            items = choice([part["items"] for part in way if "items" in part])
            return [(Array(items, max(bounds(way, "minItems", 0)),
                           min(bounds(way, "maxItems", math.inf))),)]
        if kind == "integer" and any(part.keys() & LOOSE["number"] for part in way):
            low, above = (max(bounds(way, word, -FAR)) for word in ("minimum", "exclusiveMinimum"))
            high, below = (min(bounds(way, word, FAR)) for word in ("maximum", "exclusiveMaximum"))
            return [(Whole(max(math.ceil(low), math.floor(above) + 1),
                           min(math.floor(high), math.ceil(below) - 1)),)]
        return syntax.scalars[kind]

    def bounds(way: tuple[dict, ...], word: str, default: float) -> list[float]:
        return [bound(part, word, default) for part in way]

    def bound(schema: dict, word: str, default: float) -> float:
        number = schema.get(word, default)
        if isinstance(number, bool):  # OpenAPI 3.0: whether `minimum` itself is left out
            number = schema.get(word.replace("exclusiveM", "m"), default) if number else default
        if isinstance(number, int | float):
            return number
        loose.add(word)
        return default

    def keys(way: tuple[dict, ...]) -> tuple[dict[str, list], set[str]]:
        """The schemas of each key that is named, and the keys that are required."""
        required = dict.fromkeys(key for part in way for key in part.get("required") or ())
        named = dict.fromkeys(key for part in way for key in part.get("properties") or ())
        found: dict[str, list] = {key: [] for key in named | required}
        for part in way:
            own, other = part.get("properties") or {}, others(part)
            for key in found if isinstance(other, dict) else own:
                found[key].append(own.get(key, other))
        return found, {*required}

    def fields(way: tuple[dict, ...]) -> Object:
        named, required = keys(way)
        if len(named) > MANY:
            loose.update(WORDS["object"] - LOOSE["object"])
            return Object({}, frozenset(), syntax.anything)
        rest = [others(part) for part in way]
        schemas = [other for other in rest if isinstance(other, dict)]
        free = any(part is OPEN for part in way) or all(
            other or isinstance(other, dict) for other in rest)
        return Object(
            {_inside(key): (syntax.label(key), choice(named[key])) for key in named},
            frozenset(map(_inside, required)), choice(schemas) if free else None)

    def empty(way: tuple[dict, ...], deep: bool = True) -> bool:
        """Whether nothing fits, as types and values show, also those of a key that is required."""
        types, values = left(way)
        if next(steps, None) is None:
            return False
        if values is not None or types != {"object"} or not deep:
            return not (types if values is None else values)
        named, required = keys(way)
        return any(all(empty(inner, False) for inner in ways(named[key])) for key in required)

    root = {"properties": {}, **parameters, "type": "object"}
    whole = choice([root])
    while todo:
        found, schemas = todo.pop()
        found.options = [option for way in ways(schemas) for option in options(way)]
    for each in [*either.values()]:
        if not all(empty(way + another) for some, more in itertools.combinations(each, 2)
                   for way in some for another in more):
            loose.add("oneOf")  # a value may fit two
    return whole


def _inside(text: str) -> bytes:
    """A string as JSON, without its quotes."""
    return dump_json(text).encode()[1:-1]


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
