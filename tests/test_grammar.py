"""Grammar and automaton, byte by byte: what narrows a type, and the way to the end."""

import functools
import json
import math
import random

import pytest
from conftest import LAW
from hypothesis import example, given, reject, settings
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


def at_arguments(schema, dialect="hermes", **more):
    """The grammar, an automaton and its state where {v: …} begins."""
    found = grammar(schema, dialect, **more)
    automaton = Automaton(found, lambda text, start: len(text) - start)
    return found, automaton, automaton.open((found.arguments["f"].options[0][0], ()))


def reads(schema, value, dialect="hermes", **more):
    """Whether the arguments {v: value} are read to their end."""
    found, automaton, state = at_arguments(schema, dialect, **more)
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


ABC = {"type": "object", "properties": dict.fromkeys("abc", {"type": "string"})}
DEFS = {"n": {"type": "integer"}, "o": {"properties": {"x": {"type": "string"}}},
        "a/b": {"type": "null"}, "~1": {"type": "boolean"},
        "either": {"anyOf": [{"required": ["x"]}, {"required": ["y"]}]},
        "tree": {"type": "object", "properties": {"value": {"type": "integer"},
                                                  "left": {"$ref": "#/$defs/tree"}}}}


@pytest.mark.parametrize("schema, good, bad", [
    # beside anyOf and oneOf
    ({**ABC, "required": ["c"], "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
     [{"a": "", "c": ""}, {"b": "", "c": ""}, {"a": "", "b": "", "c": ""}],
     [{"a": ""}, {"c": ""}, {"a": "", "c": "", "d": ""}]),
    ({"type": "object", "properties": {"a": {"type": "string"}}, "anyOf": [
        {"properties": {"b": {"type": "null"}}}, {"properties": {"a": {"enum": ["x"]}}}]},
     [{"a": "x"}, {"a": "y"}, {"a": "y", "b": None}], [{"a": 5}, {"a": "y", "b": 5}, {"z": 1}]),
    ({"enum": [1, "a", None], "anyOf": [{"type": "integer"}, {"type": "string"}]},
     [1, "a"], [None, 2, "b"]),
    ({"oneOf": [{"const": 1}, {"const": "a"}], "anyOf": [{"type": "null"}, {"type": "string"}]},
     ["a"], [1, None]),
    ({"type": ["integer", "null"], "anyOf": [{"minimum": 5}, {"maximum": 1}]},
     [5, 1, None], [3, "a"]),
    ({"anyOf": [{"type": "object", "properties": {"a": {}}}, {"type": "null"}], "required": ["a"]},
     [{"a": 1}, None], [{}]),
    # beside $ref
    ({"$ref": "#/$defs/n", "minimum": 3}, [3], [1, "a"]),
    ({"$ref": "#/$defs/o", "required": ["x"]}, [{"x": ""}], [{}, {"x": 1}, {"x": "", "y": 1}]),
    ({"$ref": "#/$defs/either", **ABC, "required": ["a"], "properties": {
        "a": {"type": "string"}, "x": {}, "y": {}}},
     [{"a": "", "x": 1}, {"a": "", "y": 1}], [{"a": ""}, {"x": 1}]),
    ({"$ref": "#/$defs/tree", "required": ["left"], "properties": {
        "left": {"required": ["value"]}}},
     [{"left": {"value": 1}}, {"left": {"value": 1, "left": {}}}],
     [{}, {"left": {}}, {"left": {"value": "1"}}]),
    # in allOf
    ({"type": "integer", "allOf": [{"minimum": 3}, {"minimum": 1}]}, [3], [2]),
    ({"type": "integer", "maximum": 5, "allOf": [{"maximum": 9}]}, [5], [6]),
    ({"type": "number", "allOf": [{"type": ["integer", "string"]}]}, [1], [1.5, "a"]),
    ({"allOf": [{"enum": [1, 2, True]}, {"enum": [2, 3, 1.0]}]}, [1, 2], [3, True]),
    ({"const": 1, "enum": [1, 2], "allOf": [{"type": "number"}]}, [1], [2]),
    ({"const": 1, "enum": [2]}, [], [1, 2]),
    ({"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"a": {"minimum": 3}, "b": {}}}]},
     [{"a": 3}, {"a": 3, "b": 0}], [{"a": "s"}, {"a": 2}, {}]),
    ({"type": "object", "allOf": [{"additionalProperties": {"type": "integer"}},
                                  {"additionalProperties": {"minimum": 3}}]},
     [{}, {"any": 3}], [{"any": 2}, {"any": "a"}]),
    ({"type": "object", "properties": {"a": {}}, "allOf": [
        {"additionalProperties": {"type": "integer"}}]}, [{"a": 3}], [{"a": "3"}, {"b": 3}]),
    ({"type": "array", "minItems": 1, "items": {"type": "number"},
      "allOf": [{"maxItems": 2, "items": {"type": "integer"}}, {"minItems": 2}]},
     [[1, 2]], [[], [1], [1, 2, 3], [1, 2.5]]),
    ({"allOf": [{"$ref": "#/$defs/either"}, {"required": ["z"]}], "type": "object",
      "properties": {"x": {}, "y": {}, "z": {}}}, [{"x": 1, "z": 1}], [{"z": 1}, {"x": 1}]),
    # where a $ref leads
    ({"$ref": "#/$defs/a~1b"}, [None], [1]), ({"$ref": "#/$defs/~01"}, [True], [1]),
    ({"$ref": "#/properties/v/anyOf/0", "anyOf": [{"type": "null"}]}, [None], [1]),
    # of no type, or of one that nobody knows
    ({"minimum": 3, "maxItems": 1, "additionalProperties": {"type": "null"}},
     ["a", None, [], [1], {"a": None}], [[1, 2], {"a": 1}]),
    ({"type": "unheard"}, [True, 1, "a", {}], []), ({"type": "any"}, [True, 1, "a", {}], []),
    ({"type": ["null", "any"]}, [None, 1], []),
    ({"type": "object", "properties": {}, "additionalProperties": {}}, [{"a": 1}], [1]),
    ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, [{"b": 1}], [{}, {"c": 1}]),
    ({"type": "object", "properties": {}, "allOf": [{"required": ["b"]}]}, [{"b": 1}], [{}]),
    ({"type": "string", "required": True}, [""], [1]),
])
def test_words_side_by_side_all_hold(schema, good, bad):
    tool = {"name": "f", "parameters": {"properties": {"v": schema}, "$defs": DEFS}}
    assert [value for value in good if check_arguments(tool, {"v": value})] == []
    assert [value for value in bad if not check_arguments(tool, {"v": value})] == []

    def kept(value):
        return reads(schema, json.dumps(value).encode(), **{"$defs": DEFS})

    assert [value for value in good if not kept(value)] == []
    assert [value for value in bad if kept(value)] == []
    assert grammar(schema, **{"$defs": DEFS}).loose.get("f", set()) <= {"minimum"}


@pytest.mark.parametrize("path", ["x.json#/$defs/n", "#n", "n", "#/$defs/none", "#/$defs/n/type/9",
                                  "#/$defs/a/b", 5])
def test_a_ref_that_leads_nowhere_is_anything(path):
    """Of the check and of the grammar alike, which says so."""
    schema = {"$ref": path}
    assert check_arguments({"name": "f", "parameters": {
        "properties": {"v": schema}, "$defs": DEFS}}, {"v": "s"}) == []
    assert reads(schema, b'"s"', **{"$defs": DEFS})
    assert grammar(schema, **{"$defs": DEFS}).loose == {"f": {"$ref"}}


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
    ({"minimum": 3, "minItems": 1, "pattern": "a"}, {"minimum", "pattern"}),  # of any type
    ({"type": ["null", "boolean"], "minimum": 3}, set()),
    ({"enum": [1, 5], "minimum": 3}, {"minimum"}), ({"not": {"type": "null"}}, {"not"}),
    ({"$ref": "#/$defs/none"}, {"$ref"}), ({"$ref": "https://there"}, {"$ref"}),
    ({"allOf": [{"allOf": [{"type": "string"}]}, {"maxLength": 3}]}, {"maxLength"}),
    ({"allOf": [{"$ref": "https://there"}, {"type": "string"}]}, {"$ref"}),
    ({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "x"}]}, {"pattern"}),
    ({"type": "integer", "enum": ["1"]}, {"type"}), ({"const": "a", "maxLength": 3}, {"maxLength"}),
    ({"enum": [{"a": 1}, "b"], "required": ["a"], "minItems": 1}, {"required"}),
    ({"oneOf": [{"type": "null"}, {"type": "number"}, {"enum": ["a"]}, {"const": "b"}]}, set()),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, {"oneOf"}),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": {}}, {"oneOf"}),
    ({"oneOf": [{"type": "object", "properties": {"kind": {"const": kind}, kind: {}},
                 "required": ["kind"]} for kind in "abc"]}, set()),
    ({"oneOf": [{"type": "object", "properties": {"kind": {"const": kind}}} for kind in "ab"]},
     {"oneOf"}),
])
def test_what_is_not_kept_to_is_named(schema, loose):
    assert grammar(schema).loose == ({"f": loose} if loose else {})


@pytest.mark.parametrize("parameters", [
    {"properties": ["city"]}, {"properties": {"v": {"type": 5}}}, {"required": 3, "properties": {}},
    {"properties": {"v": {"enum": 3}}}, {"properties": {"v": {"anyOf": 1}}}, ["city"], "city",
    {"properties": {"v": {"type": "integer", "minimum": math.inf}}}])
def test_what_is_no_schema_is_told_in_one_line(parameters):
    with pytest.raises(UserError, match="tool f: its parameters are not a JSON schema; mend"):
        Grammar(tokenizer("hermes"), "hermes", [{"name": "f", "parameters": parameters}])


def test_with_an_option_come_its_own_keys():
    schema = {"type": "object", "properties": {"c": {}}, "anyOf": [
        {"properties": {key: {}}, "required": [key]} for key in "ab"]}
    assert [text for text in (b'{"a": 1}', b'{"b": 1, "c": 1}', b'{"c": 1}', b'{"a": 1, "b": 1}')
            if not reads(schema, text)] == [b'{"c": 1}', b'{"a": 1, "b": 1}']


def chain(length, last, link):
    """Schemas a0, a1 …, each made of the next."""
    return {"$defs": {f"a{length}": last, **{
        f"a{n}": link({"$ref": f"#/$defs/a{n + 1}"}) for n in range(length)}}}


@pytest.mark.parametrize("schema, more, fitting, loose", [
    ({"$ref": "#/$defs/a0"}, chain(40, {"type": "integer"}, lambda next: {
        "allOf": [next, dict(next)]}), 1, {"$ref", "type"}),
    ({"$ref": "#/$defs/a0"}, chain(30, {"type": "integer"}, lambda next: {
        "properties": dict.fromkeys("ab", next)}), {"a": {"b": {}}}, set()),
    ({"type": "object", "properties": dict.fromkeys("abcdefghijkl", {}), "allOf": [
        {"anyOf": [{"required": [key]}, {"properties": {key.upper(): {}}}]}
        for key in "abcdefghijkl"]}, {}, {"a": 1, "L": 1}, {"anyOf"}),
    ({"type": "integer", "anyOf": [{"const": n} for n in range(999)]}, {}, 500, set()),
    ({"oneOf": [{"const": n} for n in range(3000)]}, {}, 500, {"oneOf"}),
    ({"$ref": "#/$defs/s0"}, {"$defs": {f"s{n}": {"type": "object", "properties": {
        "a": {"allOf": [{"$ref": f"#/$defs/s{n}"}, {"$ref": f"#/$defs/s{(7 * n + 1) % 20}"}]},
        "b": {"$ref": f"#/$defs/s{(n + 1) % 20}"}}} for n in range(20)}},
     {"b": {"a": {"b": {}}}}, {"allOf", "$ref"})])
def test_a_short_schema_that_says_too_much_is_cut_off_and_told(schema, more, fitting, loose):
    assert reads(schema, json.dumps(fitting).encode(), **more)
    assert grammar(schema, **more).loose.get("f", set()) == loose


# --- words side by side: laws ---------------------------------------------------------------------

def words(**known):
    """Schemas of a few of these words."""
    return st.sets(st.sampled_from(sorted(known)), max_size=2).flatmap(
        lambda some: st.fixed_dictionaries({word: known[word] for word in sorted(some)}))


def mixed(plain, **more):
    """Schemas within schemas, by these words and by those that put several together."""
    def around(inner):
        several = st.lists(inner, min_size=1, max_size=3)
        return both(plain, words(**{word: make(inner) for word, make in more.items()},
                                 allOf=several, anyOf=several, oneOf=several))
    return st.recursive(plain, around, max_leaves=6)


def both(*schemas):
    return st.tuples(*schemas).map(lambda each: {word: one[word] for one in each for word in one})


small, sizes, names = st.integers(-2, 4), st.integers(0, 3), st.sampled_from("abc")
numbers = words(minimum=small, maximum=small, exclusiveMinimum=small, const=small,
                enum=st.lists(small | st.none(), min_size=2, max_size=5))
anything = mixed(
    words(type=st.sampled_from(["string", "integer", "float", "dict", "array", "any",
                                ["integer", "null"], ["object", "array", "string"]]),
          enum=st.lists(small | st.sampled_from(["a", None, True, {"a": 1}, [1]]), min_size=3),
          const=small | st.just("a"), minimum=small, maximum=small, minItems=sizes, maxItems=sizes,
          required=st.lists(names, max_size=2),
          **{"$ref": st.sampled_from(["#/$defs/n", "#/$defs/a~1b", "#/properties/v", "n"])}),
    properties=lambda inner: st.dictionaries(names, inner, max_size=3),
    additionalProperties=lambda inner: inner | st.booleans(),
    items=lambda inner: inner | st.booleans())


def drawn(automaton, state, rng):
    """A text that the grammar allows, drawn with little sense; the shortest end after a while."""
    text = bytearray()
    while () not in state:
        price = min(map(automaton.price, state))
        after = {byte: automaton.read(state, byte) for byte in symbols(state)}
        cheap = [byte for byte, each in after.items()
                 if each and min(map(automaton.price, each)) < price]
        free = len(text) < 60 and rng.random() < 0.4
        byte = rng.choice([byte for byte in after if after[byte]] if free else cheap)
        text.append(byte)
        state = after[byte]
    return text.decode()


@settings(LAW, max_examples=200)
@given(schema=anything, defs=st.fixed_dictionaries({"n": anything, "a/b": anything}),
       seed=st.integers(0, 2**32))
def test_what_is_drawn_from_any_schema_fits_it_or_the_words_not_kept_to_are_named(
        schema, defs, seed):
    tool = {"name": "f", "parameters": {"properties": {"v": schema}, "$defs": defs}}
    found, automaton, state = at_arguments(schema, **{"$defs": defs})
    rng = random.Random(seed)
    for _ in range(4 if state and not found.loose else 0):
        text = drawn(automaton, state, rng)
        try:
            problems = check_arguments(tool, json.loads(text))
        except UserError as error:  # an anyOf in which it is itself an option is not checked
            assert "not a JSON schema" in str(error)
            reject()
        assert problems == [], text


# Of one type, and all objects know the same keys: then the grammar bars nothing that fits.
whole = mixed(both(numbers, st.sampled_from([{"type": "integer"}, {"type": ["integer", "null"]}])))
records = mixed(both(
    st.fixed_dictionaries(dict.fromkeys("abc", whole)).map(
        lambda known: {"type": "object", "properties": known}),
    words(required=st.lists(names, max_size=2), additionalProperties=whole | st.booleans())))
lists = mixed(both(st.just({"type": "array"}), words(items=whole, minItems=sizes, maxItems=sizes)))
pairs = (st.tuples(whole, small | st.none())
         | st.tuples(records, st.dictionaries(st.sampled_from("abcz"), small | st.none()))
         | st.tuples(lists, st.lists(small | st.none(), max_size=4)))


@settings(LAW, max_examples=200)
@given(pair=pairs)
def test_what_fits_is_read_and_no_other_if_all_words_are_kept_to(pair):
    schema, value = pair
    fits = check_arguments({"name": "f", "parameters": {"properties": {"v": schema}}},
                           {"v": value}) == []
    read = reads(schema, json.dumps(value).encode())
    assert read >= fits
    assert read == fits or grammar(schema).loose


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
