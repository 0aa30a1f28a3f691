"""Calls that cannot be malformed: which ids a reply may go on with, so that the others are barred.

    vocabulary = Vocabulary(tokenizer)                      once for a tokenizer
    constraint = Constraint(vocabulary, tools, "hermes")    once for a reply
    constraint.bar(logits, left)                            before each draw: the rest to -inf
    constraint.take(id)                                     after it

A reply is read byte by byte by an automaton. Text is free, but that it cannot spell a tag; a call
is written as the dialect's own writer writes it, with the name of a tool on offer and arguments
that its JSON schema allows:

    text <tool_call> ⏎{"name": "get_weather", "arguments": ⟨object⟩}⏎ </tool_call>

What is still to come stands on a stack, the next item on top. Where there are several ways to go on
(a key, a closing brace) there are several stacks, and together they are the state. A token is
allowed if one of the stacks can read all of its bytes. A byte piece (<0xE2>) is a byte of a
character that may need more of them; a control token is one symbol, which no text can spell.

Every id also has its price: the tokens that the shortest way to the end of the call takes after it.
An id whose price is more than what is left to write is barred like any other, so a call that has
begun is always finished, and one for which there is no room is not begun. The price counts pieces
that do not reach over the joints of the syntax: it is what suffices, not what a lucky end may take.

Pieces are kept in order, so that those that begin alike stand side by side: the walk of a stack
through them is that through a trie. What a stack allows is kept for the next time. Inside a string,
where nearly all of them fit, one mask serves for those without a quote, an escape or half a
character. On one CPU core, with the 256,000 pieces of Gemma 2, the vocabulary takes 0.4 s once, and
a token 0.2 ms where its state is met again and 1 ms, in the mean, where it is new; with the 1,300
pieces of nano 0.03 and 0.3 ms.

Of a schema the types, properties, required, additionalProperties (absent: none beside properties,
as `tools.check_arguments` has it), items, enum, const, anyOf, oneOf (as anyOf), allOf (merged) and
local $ref are kept; what has none of these may be any JSON value. Ranges, lengths and patterns are
not. Nor can a call have half a surrogate pair, an escape in a key that no schema names, over 32
levels, or a number of more than 20 digits on a side of its point or with an exponent over 99.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.chat import stop_ids
from minilora.config import UserError
from minilora.dialects import MAX_DEPTH, Dialect, Piece, ToolCall, dump_json, get_dialect
from minilora.tokenizer import Tokenizer

LEVELS = MAX_DEPTH // 2  # of objects and lists in each other, in a call's arguments
LONG = 20                # digits of a number, before its point and after it
LONGEST = 24             # bytes of the longest piece that a price counts on
DIGITS = b"0123456789"


# --- strings and numbers: byte by byte ------------------------------------------------------------

ARCS: dict[str, dict[int, str]] = {}  # state → byte → state
ENDS = {"closed", "space"}            # states after which what is below on the stack may come


def _arc(source: str, symbols: Iterable[int], target: str) -> None:
    ARCS.setdefault(source, {}).update(dict.fromkeys(symbols, target))
    ARCS.setdefault(target, {})


def _string_arcs() -> None:
    hexadecimal = b"0123456789abcdefABCDEF"
    _arc("string", b'"', "text")
    _arc("text", (byte for byte in range(0x20, 0x80) if byte not in b'"\\'), "text")
    _arc("text", b'"', "closed")
    _arc("text", b"\\", "escape")
    _arc("escape", b'"\\/bfnrt', "text")
    _arc("escape", b"u", "u4")
    _arc("u4", hexadecimal, "u3")
    _arc("u4", b"dD", "u3 low")  # \ud800 to \udfff are halves of surrogate pairs
    _arc("u3 low", b"01234567", "u2")
    _arc("u3", hexadecimal, "u2")
    _arc("u2", hexadecimal, "u1")
    _arc("u1", hexadecimal, "text")
    # UTF-8, RFC 3629 section 4: first bytes, what the second may be, how many follow that one.
    for first, last, low, high, more in (
            (0xC2, 0xDF, 0x80, 0xBF, 0), (0xE0, 0xE0, 0xA0, 0xBF, 1), (0xE1, 0xEC, 0x80, 0xBF, 1),
            (0xED, 0xED, 0x80, 0x9F, 1), (0xEE, 0xEF, 0x80, 0xBF, 1), (0xF0, 0xF0, 0x90, 0xBF, 2),
            (0xF1, 0xF3, 0x80, 0xBF, 2), (0xF4, 0xF4, 0x80, 0x8F, 2)):
        _arc("text", range(first, last + 1), f"after {first:X}")
        _arc(f"after {first:X}", range(low, high + 1), f"more {more}" if more else "text")
    _arc("more 2", range(0x80, 0xC0), "more 1")
    _arc("more 1", range(0x80, 0xC0), "text")


def _number_arcs(kind: str) -> None:
    def digits(start: str, most: int) -> list[str]:
        states = [f"{start} {count}" for count in range(1, most + 1)]
        for before, after in zip(states, states[1:], strict=False):
            _arc(before, DIGITS, after)
        ENDS.update(states)
        return states

    whole = digits(f"{kind} whole", LONG)
    ENDS.add(f"{kind} zero")
    _arc(kind, b"-", f"{kind} minus")
    for state in (kind, f"{kind} minus"):
        _arc(state, b"0", f"{kind} zero")
        _arc(state, b"123456789", whole[0])
    if kind == "number":
        part, exponent = digits("part", LONG), digits("exponent", 2)
        for state in (*whole, "number zero"):
            _arc(state, b".", "point")
        _arc("point", DIGITS, part[0])
        for state in (*whole, "number zero", *part):
            _arc(state, b"eE", "e")
        _arc("e", b"+-", "e sign")
        for state in ("e", "e sign"):
            _arc(state, DIGITS, exponent[0])


def _distances() -> dict[str, int]:
    """How many bytes each state is from an end, by breadth-first search from the ends."""
    found = dict.fromkeys(ENDS, 0)
    while len(found) < len(ARCS):
        found |= {state: 1 + min(found[after] for after in arcs.values() if after in found)
                  for state, arcs in ARCS.items()
                  if state not in found and any(after in found for after in arcs.values())}
    return found


_string_arcs()
_number_arcs("integer")
_number_arcs("number")
_arc("space", b" \t\r\n", "space")
_arc("bare", b"_" + bytes(range(48, 58)) + bytes(range(65, 91)) + bytes(range(97, 123)), "bare")
_arc("bare", b":", "closed")
LEAST = _distances()


# --- what may stand on a stack --------------------------------------------------------------------

# bytes     text to be written as it is
# int       a control token
# str       a state of the arcs above: a string, a number, white space
# … and these. A stack is (top, stack below) or ().

@dataclass(eq=False)
class Choice:
    """One of several sequences of items."""

    options: list[tuple] = field(default_factory=list)


@dataclass(eq=False)
class Array:
    """A list whose items are all of one kind."""

    items: Choice


@dataclass(eq=False)
class Object:
    """An object: its keys, each as it is written and with its value; the value of any other key."""

    fields: dict[bytes, tuple[tuple, Choice]]
    required: frozenset[bytes]
    others: Choice | None


class Rest(NamedTuple):
    """All of a list after its bracket (`first`), or after an item."""

    array: Array
    first: bool


class Fields(NamedTuple):
    """All of an object after its brace, or after a value; `seen` are the keys so far."""

    object: Object
    seen: frozenset[bytes | None]


class Key(NamedTuple):
    """The inside of a key that the schema does not name, up to its colon and value."""

    object: Object
    seen: frozenset[bytes | None]
    typed: bytes | None  # None: only its end is known (see `Constraint._make_row`)
    state: str           # as of a string, or bare


class Prose(NamedTuple):
    """Any text that does not spell a tag; `tail` is its end, as far as that may begin one."""

    tags: tuple[bytes, ...]
    tail: bytes = b""


Stack = tuple


def _push(items: Sequence, stack: Stack) -> Stack:
    for item in reversed(items):
        stack = (item, stack) if item != b"" else stack
    return stack


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


def _arguments(parameters: dict, syntax: Syntax) -> Choice:
    """The objects that a tool's `parameters`, a JSON schema, allow."""
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
        return target

    def options(schema: dict) -> list[tuple]:
        if "const" in schema:
            return [syntax.value(schema["const"])]
        kinds = schema.get("type", [])
        kinds = [ALIASES.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
        if "enum" in schema:
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
        whole = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            part = lookup(str(part["$ref"])) if "$ref" in part else part
            part = {key: value for key, value in (part or {}).items() if key != "allOf"}
            required = [*whole.get("required", []), *part.get("required", [])]
            properties = {**whole.get("properties", {}), **part.get("properties", {})}
            whole |= part | {"required": required, "properties": properties}
        return whole

    def of_kind(kind: str, schema: dict) -> list[tuple]:
        if kind == "object":
            return [(fields(schema),)]
        if kind == "array":
            return [(Array(choice(schema.get("items"))),)]
        return syntax.scalars.get(kind, syntax.anything.options)

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


# --- the vocabulary -------------------------------------------------------------------------------

# Whole characters that leave these states as they are. Inside a string nearly every piece fits.
STEADY = {"text": re.compile(rb'(?:[ !#-\[\]-\x7f]|[\xc2-\xf4][\x80-\xbf]+)*'),
          "bare": re.compile(rb"[0-9A-Za-z_]*")}


class Vocabulary:
    """The pieces of a tokenizer in order: those that begin alike stand side by side, as in a trie.

    Made once for a tokenizer that has the dialect's tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.size = tokenizer, tokenizer.vocab_size
        self.texts = tokenizer.texts()
        self.pieces, self.ids = _sorted(self.texts)
        self._known = {text for text in self.pieces if len(text) <= LONGEST}
        self._prices: dict[bytes, int] = {b"": 0}
        self._within: dict[str, tuple[Tensor, list[bytes], Tensor]] = {}
        self._prose: dict[tuple[bytes, ...], Tensor] = {}

    def within(self, state: str) -> tuple[Tensor, list[bytes], Tensor]:
        """The pieces as they look from a state that most characters leave as it is.

        Those that leave it [V]; and what is left of the others after their first such characters,
        in order, with their ids.
        """
        if state not in self._within:
            steady = STEADY[state].match
            left = {i: text[steady(text).end():] for i, text in self.texts.items()}
            self._within[state] = (self.mask(i for i, text in left.items() if not text),
                                   *_sorted({i: text for i, text in left.items() if text}))
        return self._within[state]

    def mask(self, ids: Iterable[int]) -> Tensor:
        """True at these ids: bool [V]."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[torch.tensor(list(ids), dtype=torch.int64)] = True
        return mask

    def prose(self, tags: tuple[bytes, ...]) -> Tensor:
        """The pieces in which no tag is spelled: bool [V]."""
        if tags not in self._prose:
            spelled = re.compile(b"|".join(map(re.escape, tags))).search
            self._prose[tags] = self.mask(i for i, text in self.texts.items() if not spelled(text))
        return self._prose[tags]

    def starting(self, text: bytes) -> Tensor:
        """The ids of the pieces that begin with `text`."""
        low = bisect_left(self.pieces, text)
        return self.ids[low:bisect_left(self.pieces, _after(text), low)]

    def exactly(self, text: bytes) -> Tensor:
        """The ids of the pieces that are `text`."""
        low = bisect_left(self.pieces, text)
        return self.ids[low:bisect_right(self.pieces, text, low)]

    def price(self, text: bytes) -> int:
        """Tokens that `text` takes where each is the longest piece that fits.

        The price of what is left after the first of them is one less.
        """
        if text not in self._prices:
            longest = next(size for size in range(min(len(text), LONGEST), 0, -1)
                           if text[:size] in self._known)  # one byte always is
            self._prices[text] = 1 + self.price(text[longest:])
        return self._prices[text]


def _sorted(texts: dict[int, bytes]) -> tuple[list[bytes], Tensor]:
    order = sorted(texts, key=texts.__getitem__)
    return [texts[i] for i in order], torch.tensor(order, dtype=torch.int64)


def _after(text: bytes) -> bytes:
    """The first text, in order, that comes after all those that begin with `text`."""
    return text[:-1] + bytes([text[-1] + 1]) if text[-1] < 0xFF else text + b"\xff"


# --- the automaton --------------------------------------------------------------------------------

class Row(NamedTuple):
    """What one stack allows: the ids of `base` [V], which share a price, and single ids."""

    base: Tensor | None
    base_price: float
    ids: Tensor     # [n]
    prices: Tensor  # [n]


class Constraint:
    """What one reply may go on with.

    `tools` are those on offer, {"type": "function", "function": {…}} or bare. Raises UserError for
    a tool whose schema no arguments fit, for a dialect that is not known, and for a tokenizer
    without the dialect's tokens.
    """

    def __init__(self, vocabulary: Vocabulary, tools: Sequence[dict], dialect: str) -> None:
        self.vocabulary = vocabulary
        self._least: dict[tuple[object, int], float] = {}
        self._opened: dict[Stack, set[Stack]] = {}
        self._rows: dict[Stack, Row] = {}
        tokenizer, language = vocabulary.tokenizer, get_dialect(dialect)
        self.syntax = Syntax(tokenizer, language)
        functions = [tool.get("function", tool) for tool in tools]
        arguments = {function["name"]: _arguments(function.get("parameters") or {}, self.syntax)
                     for function in functions}
        for name, choice in arguments.items():
            if self._price((choice, ())) == math.inf:
                raise UserError(f"tool {name}: no arguments fit its schema, so it cannot be "
                                "called; mend the schema or do not offer it")
        end = Choice([(), *((stop,) for stop in stop_ids(tokenizer, dialect))])
        self._state = self._open((_reply(tokenizer, language, self.syntax, arguments, end), ()))

    def bar(self, logits: Tensor, left: int) -> None:
        """Sets the logits [V'] of all ids that may not come next to -inf, in place.

        `left` counts the tokens that may yet be written, this one included.
        """
        allowed = torch.zeros(len(logits), dtype=torch.bool)  # a row without a token stays barred
        for stack in self._state:
            row = self._row(stack)
            if row.base is not None and row.base_price < left:
                allowed[:len(row.base)] |= row.base
            allowed[row.ids[row.prices < left]] = True
        logits.masked_fill_(~allowed.to(logits.device), -math.inf)

    def take(self, new: int) -> None:
        """Goes on with an id that was allowed."""
        text = self.vocabulary.texts.get(new)
        if text is None:
            self._state = set().union(*(self._open(stack[1]) for stack in self._state
                                        if stack and stack[0] == new))
        for byte in text or b"":
            self._state = self._read(self._state, byte)

    # what a stack costs

    def _price(self, stack: Stack) -> float:
        """Tokens that suffice to get to the end of a stack; infinite where there is no way."""
        items = []
        while stack:
            items.append(stack[0])
            stack = stack[1]
        price = level = 0
        for item in reversed(items):
            price += self._item_price(item, level)
            level += isinstance(item, Rest | Fields | Key)
        return price

    def _item_price(self, item: object, level: int) -> float:
        """The same for one item, around which there are `level` objects and lists."""
        if (item, level) not in self._least:
            self._least[item, level] = math.inf  # while a schema that is but itself is looked at
            self._least[item, level] = self._shortest(item, level)
        return self._least[item, level]

    def _shortest(self, item: object, level: int) -> float:
        price, least = self.vocabulary.price, self._item_price
        match item:
            case bytes():
                return price(item)
            case int():
                return 1
            case str():
                return LEAST[item]
            case Prose():
                return 0
            case Choice():
                return min((sum(least(each, level) for each in option) for option in item.options),
                           default=math.inf)
            case Array():
                return 2 if level < LEVELS else math.inf
            case Object():
                return 1 + least(Fields(item, frozenset()), level) if level < LEVELS else math.inf
            case Rest():
                return 1
            case Fields():
                missing = item.object.required - item.seen
                commas = len(missing) if item.seen else max(len(missing) - 1, 0)
                needed = [each for key in missing for part in item.object.fields[key]
                          for each in (part if isinstance(part, tuple) else (part,))]
                return 1 + sum(least(each, level + 1) for each in [*self.syntax.comma * commas,
                                                                   *needed])
            case Key():
                return (_key_price(item) + price(self.syntax.key[2])
                        + least(item.object.others, level + 1)
                        + least(Fields(item.object, item.seen | {item.typed}), level))
        raise TypeError(item)

    # how a stack goes on

    def _open(self, stack: Stack) -> set[Stack]:
        """The stacks that `stack` stands for, which begin with something to be written."""
        if stack in self._opened:
            return self._opened[stack]
        found, known, todo = set(), set(), [stack]
        while todo:
            at = todo.pop()
            if at in known or self._price(at) == math.inf:
                continue
            known.add(at)
            if not at:
                found.add(at)
                continue
            item, below = at
            match item:
                case bytes() | int() | Key():
                    found.add(at)
                case Prose():
                    found.add(at)
                    todo.append(below)
                case str():
                    if ARCS[item]:
                        found.add(at)
                    if item in ENDS:
                        todo.append(below)
                case Choice():
                    todo += [_push(option, below) for option in item.options]
                case Array():
                    todo.append((b"[", (Rest(item, True), below)))
                case Rest():
                    comma = () if item.first else self.syntax.comma
                    items = (*comma, item.array.items, Rest(item.array, False))
                    todo += [(b"]", below), _push(items, below)]
                case Object():
                    todo.append((b"{", (Fields(item, frozenset()), below)))
                case Fields():
                    todo += self._fields(item, below)
        self._opened[stack] = found
        return found

    def _fields(self, item: Fields, below: Stack) -> Iterator[Stack]:
        """The ways to go on in an object: its end, or one more key and value."""
        object, seen = item
        if object.required <= seen:
            yield (b"}", below)
        if None in seen:  # a further key might be the one of which the name is not known
            return
        comma = self.syntax.comma if seen else ()
        for key, (label, value) in object.fields.items():
            if key not in seen:
                yield _push((*comma, *label, value, Fields(object, seen | {key})), below)
        if object.others is not None:
            opening, state, _ = self.syntax.key
            yield _push((*comma, opening, Key(object, seen, b"", state)), below)

    def _read(self, state: Iterable[Stack], byte: int) -> set[Stack]:
        """The stacks after one byte; none where it does not fit."""
        found: set[Stack] = set()
        for stack in state:
            if not stack:
                continue
            item, below = stack
            match item:
                case bytes():
                    if item[0] == byte:
                        found |= {(item[1:], below)} if len(item) > 1 else self._open(below)
                case str():
                    if byte in ARCS[item]:
                        found |= self._open((ARCS[item][byte], below))
                case Prose(tags, tail):
                    text = tail + bytes([byte])
                    if not text.endswith(tags):
                        tail = next(end for start in range(len(text) + 1)
                                    if not (end := text[start:]) or _begins(end, tags))
                        found |= self._open((Prose(tags, tail), below))
                case Key(object, seen, typed, at):
                    after = ARCS[at].get(byte, "escape")
                    if after == "closed" and typed not in _names(item):
                        found |= self._open(_push((self.syntax.key[2], object.others,
                                                   Fields(object, seen | {typed})), below))
                    elif after not in ("closed", "escape"):
                        typed = None if typed is None else typed + bytes([byte])
                        found.add((Key(object, seen, typed, after), below))
        return found

    # what a stack allows

    def _row(self, stack: Stack) -> Row:
        if stack not in self._rows:
            self._rows[stack] = self._make_row(stack)
        return self._rows[stack]

    def _make_row(self, stack: Stack) -> Row:
        words = self.vocabulary
        match stack:
            case ():
                return _singles([])
            case (int(token), below):
                return _singles([(torch.tensor([token]), self._price(below))])
            case (Prose(tags, tail), _):
                base = words.prose(tags).clone()
                for tag in tags:
                    for size in range(1, len(tag)):
                        if tail.endswith(tag[:size]):
                            base[words.starting(tag[size:])] = False
                return _singles([])._replace(base=base, base_price=self._price(stack))
            case ("text", _):
                base, *pieces = words.within("text")
                row = _singles(self._walk(*pieces, stack))
                return row._replace(base=base, base_price=self._price(stack))
            case (Key(typed=typed, state=state) as key, below) if state in STEADY:
                # Any steady piece fits, too, so the walk goes on from a key that is not known to
                # the end. What would close one that is there goes.
                base, *pieces = words.within(state)
                blind = (key._replace(typed=None), below)
                names, mark = _names(key), b'"' if state == "text" else b":"
                twice = [words.starting(name[len(typed):] + mark) for name in names
                         if name.startswith(typed)]
                found = [(ids[~torch.isin(ids, torch.cat(twice))] if twice else ids, price)
                         for ids, price in self._walk(*pieces, blind)]
                if typed in names:  # one that is there must go on, if only by a digit
                    found += [(words.exactly(bytes([digit])), self._price(
                        (key._replace(typed=typed + bytes([digit])), below))) for digit in DIGITS]
                return _singles(found)._replace(base=base, base_price=self._price(blind))
        return _singles(self._walk(words.pieces, words.ids, stack))

    def _walk(self, pieces: list[bytes], ids: Tensor, stack: Stack) -> list[tuple[Tensor, float]]:
        """The ids of those sorted `pieces` that `stack` can read, with their prices."""
        found = []
        todo = [({stack}, b"", 0, len(pieces))]  # what pieces[low:high], which begin so, lead to
        while todo:
            state, text, low, high = todo.pop()
            at = bisect_right(pieces, text, low, high)
            if at > low:
                found.append((ids[low:at], min(map(self._price, state))))
            for byte in _symbols(state):
                if at == high:
                    break
                child = text + bytes([byte])
                start = bisect_left(pieces, child, at, high)
                at = bisect_left(pieces, _after(child), start, high)
                if start < at and (after := self._read(state, byte)):
                    todo.append((after, child, start, at))
        return found


def _singles(found: list[tuple[Tensor, float]]) -> Row:
    ids = [ids for ids, _ in found]
    prices = [torch.full((len(ids),), price) for ids, price in found]
    return Row(None, math.inf, torch.cat([torch.zeros(0, dtype=torch.int64), *ids]),
               torch.cat([torch.zeros(0), *prices]))


def _symbols(state: Iterable[Stack]) -> list[int]:
    """The bytes that one of the stacks may be able to read, in order."""
    symbols: set[int] = set()
    for item in (stack[0] for stack in state if stack):
        if isinstance(item, bytes):
            symbols.add(item[0])
        elif isinstance(item, str):
            symbols |= ARCS[item].keys()
        elif isinstance(item, Key):
            symbols |= ARCS[item.state].keys()
    return sorted(symbols)


def _begins(text: bytes, tags: tuple[bytes, ...]) -> bool:
    return any(tag.startswith(text) for tag in tags)


def _names(key: Key) -> set[bytes | None]:
    """The names that a key may not have."""
    empty = {b""} if key.state == "bare" else set()
    return key.object.fields.keys() | key.seen | empty


def _key_price(key: Key) -> int:
    """Bytes that suffice to close a key under a name that it may have."""
    names = _names(key)

    def more(typed: bytes) -> int:
        return (1 + min(more(typed + bytes([digit])) for digit in DIGITS)) if typed in names else 0

    known = key.typed is not None and key.state in STEADY
    return LEAST[key.state] + (more(key.typed) if known else len(names))


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
