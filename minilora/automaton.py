"""A grammar read byte by byte: what may come next, and how far the end is.

    automaton = Automaton(grammar, cost)
    state = automaton.start                  where a reply begins
    state = automaton.read(state, byte)      where it goes on after one byte; empty: it cannot
    automaton.price(stack)                   what the shortest way to its end takes

What is still to come stands on a stack, the next item on top. Where there are several ways to go on
(a key, a closing brace) there are several stacks, and together they are the state. What comes to
the top is opened: a choice into its options, an object into its brace and the rest of it. So all
stacks of a state begin with something to be written, and none is without an end.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from minilora.grammar import LONG, Array, Choice, Grammar, Object, Prose, Whole
from minilora.jsontext import MAX_DEPTH

LEVELS = MAX_DEPTH // 2  # of objects and lists in each other, in a call's arguments
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

# Whole characters that leave these states as they are: nearly all there are.
STEADY = {"text": re.compile(rb'(?:[ !#-\[\]-\x7f]|[\xc2-\xf4][\x80-\xbf]+)*'),
          "bare": re.compile(rb"[0-9A-Za-z_]*")}


# --- what may stand on a stack --------------------------------------------------------------------

# The items of a grammar, a str also as a state of the arcs above; and these. A stack is (top, stack
# below) or ().

class Left(NamedTuple):
    """A text from its byte `start` on: of a long one no copies are made on the way through it."""

    text: bytes
    start: int


class Rest(NamedTuple):
    """All of a list after its bracket, or after an item; `count` are the items so far."""

    array: Array
    count: int


class Fields(NamedTuple):
    """All of an object after its brace, or after a value; `seen` are the keys so far."""

    object: Object
    seen: frozenset[bytes | None]


class Key(NamedTuple):
    """The inside of a key that the schema does not name, up to its colon and value."""

    object: Object
    seen: frozenset[bytes | None]
    typed: bytes | None  # None: only its end is known (`Constraint` walks blindly then)
    state: str           # as of a string, or bare


Stack = tuple


def _push(items: Sequence, stack: Stack) -> Stack:
    for item in reversed(items):
        stack = (item, stack) if item != b"" else stack
    return stack


# --- the automaton --------------------------------------------------------------------------------

class Automaton:
    """Reads a reply by a grammar; `cost` tells how many tokens a text takes from some byte on."""

    def __init__(self, grammar: Grammar, cost: Callable[[bytes, int], int]) -> None:
        self._syntax, self._cost = grammar.syntax, cost
        self._least: dict[tuple[object, int], float] = {}
        self._below: dict[Stack, tuple[float, int]] = {}
        self._opened: dict[Stack, set[Stack]] = {}
        self.start = self.open((grammar.reply, ()))

    # what a stack costs

    def price(self, stack: Stack) -> float:
        """Tokens that suffice to get to the end of a stack; infinite where there is no way."""
        return self._price_and_level(stack)[0]

    def _price_and_level(self, stack: Stack) -> tuple[float, int]:
        """The same, and how many objects and lists are around what would stand on the stack."""
        if not stack:
            return 0, 0
        item, below = stack
        if below not in self._below:
            self._below[below] = self._price_and_level(below)
        price, level = self._below[below]
        return (price + self._item_price(item, level),
                level + isinstance(item, Rest | Fields | Key))

    def _item_price(self, item: object, level: int) -> float:
        """The same for one item, around which there are `level` objects and lists."""
        if isinstance(item, bytes):
            return self._cost(item, 0)
        if isinstance(item, Left):
            return self._cost(*item)
        if (item, level) not in self._least:
            self._least[item, level] = math.inf  # while a schema that is but itself is looked at
            self._least[item, level] = self._shortest(item, level)
        return self._least[item, level]

    def _shortest(self, item: object, level: int) -> float:
        least = self._item_price
        comma = sum(least(each, level) for each in self._syntax.comma)
        match item:
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
                fits = level < LEVELS and item.least <= item.most
                return 1 + least(Rest(item, 0), level) if fits else math.inf
            case Object():
                return 1 + least(Fields(item, frozenset()), level) if level < LEVELS else math.inf
            case Rest(array, count):
                missing = max(0, math.ceil(array.least) - count)
                commas = max(0, missing - (count == 0)) * comma
                return 1 + commas + (missing and missing * least(array.items, level + 1))
            case Fields(object, seen):
                missing = object.required - seen
                commas = max(0, len(missing) - (not seen)) * comma
                needed = [each for key in missing for label, value in [object.fields[key]]
                          for each in (*label, value)]
                return 1 + commas + sum(least(each, level + 1) for each in needed)
            case Whole():
                return _missing_digits(item)
            case Key():
                return (_key_price(item) + least(self._syntax.key[2], level)
                        + least(item.object.others, level + 1)
                        + least(Fields(item.object, item.seen | {None}), level))
        raise TypeError(item)

    # how a stack goes on

    def open(self, stack: Stack) -> set[Stack]:
        """The stacks that `stack` stands for, which begin with something to be written."""
        if stack in self._opened:
            return self._opened[stack]
        found, known, todo = set(), set(), [stack]
        while todo:
            at = todo.pop()
            if at in known or self.price(at) == math.inf:
                continue
            known.add(at)
            if not at:
                found.add(at)
                continue
            item, below = at
            match item:
                case bytes() | Left() | int() | Key():
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
                case Whole(low, high, typed):
                    found.add(at)
                    if typed not in (b"", b"-") and low <= int(typed) <= high:
                        todo.append(below)
                case Array():
                    todo.append((b"[", (Rest(item, 0), below)))
                case Rest(array, count):
                    if count >= array.least:
                        todo.append((b"]", below))
                    if count < array.most:
                        comma = self._syntax.comma if count else ()
                        enough = array.least if array.most == math.inf else array.most
                        after = Rest(array, min(count + 1, max(enough, 1)))  # no need to know more
                        todo.append(_push((*comma, array.items, after), below))
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
        comma = self._syntax.comma if seen else ()
        for key, (label, value) in object.fields.items():
            if key not in seen:
                yield _push((*comma, *label, value, Fields(object, seen | {key})), below)
        if object.others is not None:
            opening, state, _ = self._syntax.key
            yield _push((*comma, opening, Key(object, seen, b"", state)), below)

    def read(self, state: Iterable[Stack], byte: int) -> set[Stack]:
        """The stacks after one byte; none where it does not fit."""
        found: set[Stack] = set()
        for stack in state:
            if not stack:
                continue
            item, below = stack
            match item:
                case bytes() | Left():
                    text, start = item if isinstance(item, Left) else (item, 0)
                    if text[start] == byte:
                        more = start + 1 < len(text)
                        found |= {(Left(text, start + 1), below)} if more else self.open(below)
                case str():
                    if byte in ARCS[item]:
                        found |= self.open((ARCS[item][byte], below))
                case Whole(low, high, typed):
                    found |= self.open((Whole(low, high, typed + bytes([byte])), below))
                case Prose(tags, tail):
                    text = tail + bytes([byte])
                    if not text.endswith(tags):
                        tail = next(end for start in range(len(text) + 1)
                                    if not (end := text[start:]) or _begins(end, tags))
                        found |= self.open((Prose(tags, tail), below))
                case Key(object, seen, typed, at):
                    after = ARCS[at].get(byte, "escape")
                    if after == "closed" and typed not in taken_names(item):
                        found |= self.open(_push((self._syntax.key[2], object.others,
                                                   Fields(object, seen | {typed})), below))
                    elif after not in ("closed", "escape"):
                        typed = None if typed is None else typed + bytes([byte])
                        found.add((Key(object, seen, typed, after), below))
        return found


def symbols(state: Iterable[Stack]) -> dict[int, list[Stack]]:
    """The bytes that may come next, in order, each with the stacks that may be able to read it."""
    found: dict[int, list[Stack]] = {}
    for stack in filter(None, state):
        item, readable = stack[0], ()
        if isinstance(item, bytes):
            readable = item[:1]
        elif isinstance(item, Left):
            readable = item.text[item.start:item.start + 1]
        elif isinstance(item, str):
            readable = ARCS[item]
        elif isinstance(item, Whole):
            readable = b"-" + DIGITS
        elif isinstance(item, Key):
            readable = ARCS[item.state]
        for byte in readable:
            found.setdefault(byte, []).append(stack)
    return dict(sorted(found.items()))


def _begins(text: bytes, tags: tuple[bytes, ...]) -> bool:
    return any(tag.startswith(text) for tag in tags)


def taken_names(key: Key) -> set[bytes | None]:
    """The names that a key may not have."""
    empty = {b""} if key.state == "bare" else set()
    return key.object.fields.keys() | key.seen | empty


def _key_price(key: Key) -> int:
    """Bytes that suffice to close a key under a name that it may have."""
    names = taken_names(key)
    if key.typed is None or key.state not in STEADY:
        return LEAST[key.state] + len(names)
    ways, more = [key.typed], 0
    while names.issuperset(ways):
        ways, more = [typed + bytes([digit]) for typed in ways for digit in DIGITS], more + 1
    return LEAST[key.state] + more


def _missing_digits(number: Whole) -> float:
    """Bytes that suffice to end an integer in its range; infinite where there is no way."""
    low, high, typed = number
    if typed in (b"", b"-"):
        return 1 + min(_missing_digits(Whole(low, high, typed + bytes([byte])))
                       for byte in (DIGITS if typed else b"-" + DIGITS))
    if not re.fullmatch(rb"-?(0|[1-9][0-9]*)", typed):
        return math.inf
    digits = typed.removeprefix(b"-")
    if digits != typed:
        low, high = -high, -low
    for more in range(1 if digits == b"0" else LONG - len(digits) + 1):
        first = int(digits) * 10 ** more
        if first <= high and low < first + 10 ** more:
            return more
    return math.inf


