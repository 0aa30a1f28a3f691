"""Grammar and automaton, byte by byte: what narrows a type, and the way to the end."""

import functools
import json
import math
import random

import pytest
from conftest import LAW
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora.automaton import Automaton, symbols
from minilora.config import NANO, UserError
from minilora.dialects import DIALECTS
from minilora.grammar import Grammar
from minilora.tokenizer import Tokenizer
from minilora.tools import check_arguments

every_dialect = pytest.mark.parametrize("dialect", DIALECTS)


@functools.cache
def tokenizer(dialect):
    tokenizer = Tokenizer.load(NANO)
    tokenizer.add_tokens(DIALECTS[dialect].tokens)
    return tokenizer


def grammar(schema, dialect="hermes", **more):
    """That of one tool f with one parameter v."""
    tool = {"name": "f", "parameters": {"properties": {"v": schema}, "required": ["v"], **more}}
    return Grammar(tokenizer(dialect), dialect, [tool])


def at_arguments(schema, dialect="hermes"):
    """The grammar, an automaton and its state where {v: …} begins."""
    found = grammar(schema, dialect)
    automaton = Automaton(found, len)
    return found, automaton, automaton.open((found.arguments["f"].options[0][0], ()))


def reads(schema, value, dialect="hermes"):
    """Whether the arguments {v: value} are read to their end."""
    found, automaton, state = at_arguments(schema, dialect)
    for byte in b"".join((b"{", *found.syntax.label("v"), value, b"}")):
        state = automaton.read(state, byte)
    return () in state


# --- what narrows a type --------------------------------------------------------------------------

bounds = st.integers(-1500, 1500) | st.floats(-20, 20) | st.integers(-10**19, 10**19)
ranges = st.dictionaries(st.sampled_from(["minimum", "maximum", "exclusiveMinimum",
                                          "exclusiveMaximum"]), bounds, min_size=1)


@LAW
@given(schema=ranges, number=st.integers(-2000, 2000) | st.integers(-10**20 + 1, 10**20 - 1),
       near=st.booleans(), step=st.integers(-2, 2), data=st.data())
def test_an_integer_is_read_if_it_is_in_its_range(schema, number, near, step, data):
    if near:  # to one of the bounds
        number = math.floor(data.draw(st.sampled_from(sorted(schema.values())))) + step
    tool = {"name": "f", "parameters": {"properties": {"v": schema}}}
    fits = not check_arguments(tool, {"v": number})
    low = max(schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf))
    high = min(schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf))
    assert fits == (low <= number <= high and number != schema.get("exclusiveMinimum")
                    and number != schema.get("exclusiveMaximum"))
    assert reads({"type": "integer", **schema}, str(number).encode()) == fits
    assert not reads({"type": "integer", **schema}, b"0" + str(number).encode().lstrip(b"-"))


def test_the_ends_of_a_range():
    between = {"type": "integer", "minimum": -12, "exclusiveMaximum": 300}
    fitting = [number for number in range(-400, 400) if reads(between, str(number).encode())]
    assert fitting == list(range(-12, 300))
    assert reads(between, b"-0") and not reads(between, b"-") and not reads(between, b"1.5")
    opened = {"type": "integer", "minimum": 3, "exclusiveMinimum": True}  # as OpenAPI 3.0 has it
    assert not reads(opened, b"3") and reads(opened, b"4")
    assert reads({**opened, "exclusiveMinimum": False}, b"3")
    assert reads({"type": ["integer", "null"], "maximum": 3}, b"null")
    assert reads({"type": "integer", "minimum": 0.5, "maximum": 1.5}, b"1")
    assert reads({"type": "integer", "minimum": 0}, b"9" * 20)
    assert not reads({"type": "integer", "minimum": 0}, b"9" * 21)


@LAW
@given(least=st.none() | st.integers(0, 4), most=st.none() | st.integers(0, 4),
       size=st.integers(0, 6))
def test_a_list_is_read_if_it_has_as_many_items_as_it_may(least, most, size):
    schema = {"type": "array", "items": {"type": "integer"}}
    schema |= {} if least is None else {"minItems": least}
    schema |= {} if most is None else {"maxItems": most}
    value = list(range(size))
    fits = not check_arguments({"name": "f", "parameters": {"properties": {"v": schema}}},
                               {"v": value})
    assert fits == ((least or 0) <= size <= (size if most is None else most))
    if least is None or most is None or least <= most:
        assert reads(schema, json.dumps(value).encode()) == fits


@pytest.mark.parametrize("schema", [
    {"type": "integer", "minimum": 3, "maximum": 2}, {"type": "integer", "exclusiveMinimum": 0,
                                                      "exclusiveMaximum": 1},
    {"type": "array", "minItems": 2, "maxItems": 1},
    {"type": "array", "minItems": 1, "items": {"enum": []}}])
def test_an_empty_range_has_no_way_to_its_end(schema):
    found, automaton, state = at_arguments(schema)
    assert state == set() and automaton.price((found.arguments["f"], ())) == math.inf


@pytest.mark.parametrize("schema, loose", [
    ({"type": "string", "minLength": 1, "pattern": "a"}, {"minLength", "pattern"}),
    ({"type": "string", "minimum": 1, "format": "date", "default": "x"}, set()),
    ({"type": "number", "minimum": 0}, {"minimum"}), ({"type": "integer", "minimum": 0}, set()),
    ({"type": "integer", "minimum": "0"}, {"minimum"}),
    ({"type": "integer", "multipleOf": 3}, {"multipleOf"}),
    ({"type": "array", "minItems": 1, "uniqueItems": True}, {"uniqueItems"}),
    ({"type": "array", "items": {"type": "string", "maxLength": 3}}, {"maxLength"}),
    ({"type": "object", "minProperties": 1, "properties": {"a": {"pattern": "x"}}},
     {"minProperties", "pattern"}),
    ({"minimum": 3, "minItems": 1}, {"minimum", "minItems"}),  # of any type
    ({"type": ["null", "boolean"], "minimum": 3}, set()),
    ({"enum": [1, 5], "minimum": 3}, {"minimum"}), ({"not": {"type": "null"}}, {"not"}),
    ({"$ref": "#/$defs/none"}, {"$ref"}), ({"$ref": "https://there"}, {"$ref"}),
    ({"allOf": [{"allOf": [{"type": "string"}]}, {"maxLength": 3}]}, {"maxLength"}),
    ({"allOf": [{"$ref": "https://there"}, {"type": "string"}]}, {"$ref"}),
    ({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "x"}]}, {"pattern"}),
])
def test_what_is_not_kept_to_is_named(schema, loose):
    assert grammar(schema).loose == ({"f": loose} if loose else {})


@pytest.mark.parametrize("parameters", [
    {"properties": ["city"]}, {"properties": {"v": {"type": 5}}}, {"required": 3, "properties": {}},
    {"properties": {"v": {"enum": 3}}}, {"properties": {"v": {"anyOf": 1}}}, ["city"], "city",
    {"properties": {"v": {"$ref": "#/$defs/a"}},
     "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
    {"properties": {"v": {"type": "integer", "minimum": math.inf}}},
    {"properties": {"v": {"enum": [{1, 2}]}}}])
def test_what_is_no_schema_is_told_in_one_line(parameters):
    with pytest.raises(UserError, match="tool f: its parameters are not a JSON schema; mend"):
        Grammar(tokenizer("hermes"), "hermes", [{"name": "f", "parameters": parameters}])


# --- the way to the end ---------------------------------------------------------------------------

scalars = st.sampled_from([{"type": kind} for kind in ("string", "number", "boolean", "null")]
                          + [{}, {"enum": ["a", 12, None]}])
schemas = st.recursive(
    scalars | st.tuples(st.integers(-99, 999), st.integers(0, 99)).map(lambda ends: {
        "type": "integer", "minimum": ends[0], "maximum": sum(ends)}),
    lambda inner: st.builds(lambda items, least, more: {
        "type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner, st.integers(0, 3), st.integers(0, 3))
    | st.builds(lambda inside, required, others: {
        "type": "object", "properties": inside, "additionalProperties": others,
        "required": [key for key in inside if key in required]},
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3), st.sets(st.sampled_from("abc")),
        inner | st.booleans()), max_leaves=4)


@every_dialect
@settings(LAW, max_examples=40)
@example(schema={"type": "object", "properties": {"b": {"enum": ["a long text"]}},
                 "required": ["b"], "additionalProperties": {"type": "null"}}, seed=0)
@example(schema={"type": "integer", "minimum": 20, "maximum": 25}, seed=0)  # no 1…
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_the_price_suffices(dialect, schema, seed):
    """From wherever one gets to, some byte leads to where one less is to pay."""
    _, automaton, state = at_arguments(schema, dialect)
    rng = random.Random(seed)
    for step in range(60):
        if () in state:
            break
        price = min(map(automaton.price, state))
        after = {byte: automaton.read(state, byte) for byte in symbols(state)}
        after = {byte: each for byte, each in after.items() if each}
        controls = {stack[0]: automaton.open(stack[1]) for stack in state
                    if isinstance(stack[0], int)}  # FunctionGemma's quotes
        cheap = {symbol: each for symbol, each in {**after, **controls}.items()
                 if min(map(automaton.price, each)) < price}
        assert cheap, schema
        ways = cheap if step > 30 else {**after, **controls}
        state = ways[rng.choice(sorted(ways))]
    while () not in state:  # price by price to the end
        price = min(map(automaton.price, state))
        ways = [automaton.read(state, byte) for byte in symbols(state)]
        ways += [automaton.open(stack[1]) for stack in state if isinstance(stack[0], int)]
        state = min(filter(None, ways), key=lambda each: min(map(automaton.price, each)))
        assert min(map(automaton.price, state)) < price
