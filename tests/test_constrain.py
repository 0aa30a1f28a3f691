"""Whatever a model would like to write, its calls can be read and fit; what fits is not barred."""

import copy
import functools
import json
import random

import pytest
import torch
from conftest import LAW, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.chat import (
    Conversation,
    Message,
    ToolCall,
    decode_reply,
    parse_tool_calls,
    render,
    stop_ids,
)
from minilora.config import NANO, GenerateConfig, UserError
from minilora.constrain import Constraint, Vocabulary
from minilora.dialects import DIALECTS
from minilora.generate import generate, stream
from minilora.tokenizer import Tokenizer
from minilora.tools import check_arguments

OPENING = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]",
           "functiongemma": "<start_function_call>"}
every_dialect = pytest.mark.parametrize("dialect", OPENING)


@functools.cache
def vocabulary(dialect: str, source=NANO) -> Vocabulary:
    tokenizer = Tokenizer.load(source)
    tokenizer.add_tokens(DIALECTS[dialect].tokens)
    return Vocabulary(tokenizer)


def tool(name, **parameters):
    return {"type": "function", "function": {"name": name, "description": "",
                                             "parameters": {"type": "object", **parameters}}}


def allowed(constraint, left=10_000):
    """The ids that may come next."""
    logits = torch.zeros(constraint.vocabulary.size)
    constraint.bar(logits, left)
    return (logits == 0).nonzero()[:, 0].tolist()


def opened(tools, dialect="hermes"):
    """A constraint at the start of a call."""
    constraint = Constraint(vocabulary(dialect), tools, dialect)
    constraint.take(constraint.vocabulary.tokenizer.token_id(OPENING[dialect]))
    return constraint


def refused(constraint, ids, left=10_000):
    """The place of the first id that is barred, each taken after the others; None: none is."""
    for place, new in enumerate(ids):
        if new not in allowed(constraint, left - place):
            return place
        constraint.take(new)
    return None


def by_byte(words, text):
    """The ids of the byte pieces of a text."""
    return [words.exactly(bytes([byte]))[-1].item() for byte in text]


# --- what is allowed in arguments -----------------------------------------------------------------

CITY = {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"]}
TREE = {"properties": {"tree": {"$ref": "#/$defs/tree"}}, "required": ["tree"], "$defs": {"tree": {
    "type": "object", "properties": {"value": {"type": "number"}, "left": {"$ref": "#/$defs/tree"}},
    "required": ["value"]}}}
MANY = {"properties": {}, "additionalProperties": {"type": "integer"}}


def value(**schema):
    return {"properties": {"v": schema}, "required": ["v"]}


MERGED = value(allOf=[{"$ref": "#/$defs/a"}, {"required": ["c"]}]) | {"$defs": {
    "a": {"$ref": "#/$defs/b"},
    "b": {"type": "object", "allOf": [{"properties": {"b": {"type": "null"}}}, {"required": ["b"]},
                                      {"properties": {"c": {"type": "integer"}}}]}}}


@pytest.mark.parametrize(("schema", "arguments", "rest"), [
    (CITY, '{"city": "Paris"}', ""),
    (CITY, '{"city": "Paris", "days": 3}', ""),
    (CITY, '{"days": 3, "city": ""}', ""),                       # any order
    (CITY, '{}', "}"),                                           # city is required
    (CITY, '{"days": 3}', "}"),
    (CITY, '{"city": "", "city": ""}', 'city": ""}'),            # once only
    (CITY, '{"town": ""}', 'town": ""}'),                        # no such parameter
    (CITY, '{"city": 3}', "3}"),
    (CITY, '{"city":"x"}', '"x"}'),                              # not as the dialect spaces it
    (CITY, '{"city": "", "days": 3.5}', ".5}"),
    (CITY, '{"city": "", "days": 007}', "07}"),
    (CITY, '{"city": "", "days": -0}', ""),
    (CITY, '{"city": "", "days": -}', "}"),
    (CITY, '{"city": "a\nb"}', '\nb"}'),                         # raw control characters
    (CITY, r'{"city": "\n\"\\\u00e9"}', ""),
    (CITY, r'{"city": "\x"}', 'x"}'),
    (CITY, r'{"city": "\ud83d\ude00"}', r'83d\ude00"}'),         # halves of surrogate pairs
    (CITY, r'{"city": "\uD7ff"}', ""),
    (CITY, '{"city": "é 漢 😀"}', ""),
    (value(type="number"), '{"v": -1.5e-7}', ""),
    (value(type="number"), '{"v": 1e999}', "9}"),                # more than a number can hold
    (value(type="number"), '{"v": ' + "9" * 21 + "}", "9}"),
    (value(type="number"), '{"v": NaN}', "NaN}"),
    (value(type="boolean"), '{"v": true}', ""),
    (value(type="boolean"), '{"v": null}', "null}"),
    (value(type=["integer", "null"]), '{"v": null}', ""),
    (value(type=["integer", "null"]), '{"v": "3"}', '"3"}'),
    (value(enum=["C", "CF", 1, 12, None]), '{"v": "CF"}', ""),
    (value(enum=["C", "CF", 1, 12, None]), '{"v": 12}', ""),
    (value(enum=["C", "CF", 1, 12, None]), '{"v": "F"}', 'F"}'),
    (value(type="string", enum=["C", None]), '{"v": null}', "null}"),
    (value(const={"a": [1]}), '{"v": {"a": [1]}}', ""),
    (value(const={"a": [1]}), '{"v": {"a": [2]}}', "2]}}"),
    (value(type="array", items={"type": "integer"}), '{"v": [1, 2]}', ""),
    (value(type="array", items={"type": "integer"}), '{"v": []}', ""),
    (value(type="array", items={"type": "integer"}), '{"v": [1, ]}', "]}"),
    (value(type="array", items={"type": "integer"}), '{"v": ["a"]}', '"a"]}'),
    (value(type="array"), '{"v": [1, "a", null, {"b": [true]}]}', ""),
    (value(anyOf=[{"type": "string"}, CITY]), '{"v": "x"}', ""),
    (value(anyOf=[{"type": "string"}, CITY]), '{"v": {"city": "x"}}', ""),
    (value(oneOf=[{"type": "string"}, CITY]), '{"v": {"days": 3}}', "}}"),
    (value(type="object", **CITY), '{"v": {"city": "x", "days": 1}}', ""),
    (value(allOf=[{"$ref": "#/$defs/a"}, {"required": ["b"]}]) | {"$defs": {"a": {
        "type": "object", "properties": {"b": {"type": "null"}}}}}, '{"v": {}}', "}}"),
    (MERGED, '{"v": {"b": null}}', "}}"),
    (MERGED, '{"v": {"b": null, "c": 1}}', ""),
    (value(), '{"v": {"any": ["thing", {"at": "all"}]}}', ""),
    (value(type="dict", properties={"a": {"type": "float"}}), '{"v": {"a": 1.5}}', ""),
    (value(**{"$ref": "#/nowhere"}), '{"v": 1}', ""),
    (TREE, '{"tree": {"value": 1, "left": {"value": 2}}}', ""),
    (TREE, '{"tree": {"value": 1, "left": {}}}', "}}}"),
    (MANY, '{"a": 1, "ab": 2, "abc": 3, "b": 4}', ""),
    (MANY, '{"a": 1, "ab": 2, "a": 3}', '": 3}'),
    (MANY, '{"a": "1"}', '"1"}'),
    (MANY | CITY, '{"city": "x", "other": 1}', ""),
    (MANY | CITY, '{"other": 1, "city": 1}', "1}"),              # known: as the schema says
    (MANY | CITY, '{"other": 1}', "}"),
])
def test_arguments_are_those_of_the_schema(schema, arguments, rest):
    constraint = opened([tool("f", **schema)])
    tokenizer = constraint.vocabulary.tokenizer
    text = '\n{"name": "f", "arguments": ' + arguments
    at = refused(constraint, by_byte(constraint.vocabulary, text.encode()))
    assert ("" if at is None else text.encode()[at:].decode()) == rest
    constraint = opened([tool("f", **schema)])  # and by pieces
    assert (refused(constraint, tokenizer.encode(text)) is None) == (not rest)


def test_a_call_goes_as_deep_as_can_be_read_and_ends_in_time():
    deep = '\n{"name": "f", "arguments": {"v": ' + "[" * 80
    constraint = opened([tool("f", **value())])
    at = refused(constraint, constraint.vocabulary.tokenizer.encode(deep))
    assert at is not None
    recursive = value(**{"$ref": "#/$defs/a"}) | {"$defs": {"a": {
        "type": "object", "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"type": "null"}},
        "required": ["b"]}}}
    constraint = opened([tool("f", **recursive)])
    assert refused(constraint, constraint.vocabulary.tokenizer.encode(
        '\n{"name": "f", "arguments": {"v": ' + '{"a": ' * 80)) is not None
    assert allowed(constraint)  # not a dead end: what is required still has room


def test_a_key_that_is_there_already_can_go_on_in_the_last_room():
    constraint = opened([tool("f", **MANY)])
    words = constraint.vocabulary
    for new in by_byte(words, b'\n{"name": "f", "arguments": {"a": 1, "'):
        constraint.take(new)
    again, = by_byte(words, b"a")
    left = next(left for left in range(1, 99) if again in allowed(constraint, left))
    constraint.take(again)
    assert allowed(constraint, left - 1)


def test_only_tools_on_offer_can_be_named():
    tools = [tool("get_weather", **CITY), tool("get_time"), {"name": "bare", "parameters": None}]
    for name, arguments, fits in [("get_weather", {"city": "x"}, True), ("get_time", {}, True),
                                  ("bare", {}, True), ("get", {}, False), ("bare", {"a": 1}, False),
                                  ("get_time", {"city": "x"}, False)]:
        text = "\n" + json.dumps({"name": name, "arguments": arguments})
        constraint = opened(tools)
        ids = constraint.vocabulary.tokenizer.encode(text)
        assert (refused(constraint, ids) is None) == fits, name


def test_without_tools_there_is_no_call():
    constraint = Constraint(vocabulary("hermes"), [], "hermes")
    assert constraint.vocabulary.tokenizer.token_id("<tool_call>") not in allowed(constraint)


@pytest.mark.parametrize("schema", [
    value(enum=[]), value(anyOf=[{"enum": []}]), {"properties": {"v": False}, "required": ["v"]},
    value(enum=[{1, 2}]), value(type="integer", anyOf=[{"type": "string"}, {"enum": [None]}]),
    value(**{"$ref": "#/$defs/a"}) | {"$defs": {"a": {
        "type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}}},
    value(**{"$ref": "#/$defs/a"}) | {"$defs": {"a": {"$ref": "#/$defs/a"}}},
    value(**{"$ref": "#/$defs/a"}) | {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}])
def test_a_schema_that_nothing_fits_is_refused(schema):
    with pytest.raises(UserError, match="tool f: no arguments fit its schema"):
        Constraint(vocabulary("hermes"), [tool("f", **schema)], "hermes")


# --- around calls ---------------------------------------------------------------------------------

def test_control_tokens_come_only_where_they_belong():
    constraint = Constraint(vocabulary("hermes"), [tool("f")], "hermes")
    tokenizer = constraint.vocabulary.tokenizer
    texts = constraint.vocabulary.texts

    def control():
        return {tokenizer.decode([i]) for i in allowed(constraint) if i not in texts}

    def take(*texts):
        for text in texts:
            for new in tokenizer.encode(text) if text[0] != "<" else [tokenizer.token_id(text)]:
                assert new in allowed(constraint)
                constraint.take(new)

    ends = {"<eos>", "<end_of_turn>"}
    assert control() == {"<think>", "<tool_call>", *ends}
    take(" \n")
    assert control() == {"<think>", "<tool_call>", *ends}
    take("<think>", "so")
    assert control() == {"</think>", *ends}  # a call in thinking would not be read
    take("</think>")
    assert control() == {"<tool_call>", *ends}
    take("Well.", "<tool_call>", '\n{"name": "f", "arguments": {}')
    assert control() == set()
    take("}\n")
    assert control() == {"</tool_call>"}
    take("</tool_call>")
    assert control() == ends
    assert tokenizer.encode("a")[0] not in allowed(constraint)  # text after a call
    take("\n", "<tool_call>")


@every_dialect
def test_text_cannot_spell_a_tag(dialect):
    tag = OPENING[dialect]
    tokenizer = vocabulary(dialect).tokenizer
    constraint = Constraint(vocabulary(dialect), [tool("f")], dialect)
    text = f"x {tag[:-1]} {tag[:3]}{tag}"
    ids = by_byte(constraint.vocabulary, text.encode())
    assert refused(copy.copy(constraint), ids) == len(ids) - 1
    assert refused(constraint, tokenizer.encode(text)) is not None
    constraint = Constraint(vocabulary(dialect), [tool("f")], dialect)
    assert refused(constraint, tokenizer.encode("<html> [list] <tool </b>")) is None


def test_rows_of_the_table_without_a_token_are_barred():
    words = vocabulary("hermes")
    logits = torch.zeros(words.size + 24)
    Constraint(words, [tool("f")], "hermes").bar(logits, 100)
    assert logits[words.size:].isneginf().all()


# --- laws -----------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
keys = st.sampled_from(["a", "b", "ab", "city", "naïve key", 'q"\\', "x:y", " ", "né"])
scalars = (texts | st.integers(-10**12, 10**12) | st.booleans() | st.none()
           | st.floats(-1e50, 1e50, allow_subnormal=False).filter(lambda x: not 0 < abs(x) < 1e-50))


def unique(value):
    return json.dumps(value)


def objects(schemas):
    @st.composite
    def draw_object(draw):
        schema = {"type": "object", "properties": draw(st.dictionaries(keys, schemas, max_size=3))}
        schema["required"] = [key for key in schema["properties"] if draw(st.booleans())]
        others = draw(st.none() | st.booleans() | schemas)
        return schema if others is None else schema | {"additionalProperties": others}
    return draw_object()


schemas = st.recursive(
    st.sampled_from([{"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "null"},
                     {"type": "boolean"}, {"type": ["string", "null"]}, {}, {"type": "array"},
                     {"type": "object"}, {"type": "integer", "minimum": -3, "maximum": 120}])
    | st.lists(scalars, min_size=1, max_size=4, unique_by=unique).map(lambda v: {"enum": v}),
    lambda inner: (inner.map(lambda items: {"type": "array", "items": items}) | objects(inner)
                   | inner.map(lambda items: {"type": "array", "items": items, "minItems": 1,
                                              "maxItems": 2})
                   | st.lists(inner, min_size=1, max_size=2).map(lambda each: {"anyOf": each})),
    max_leaves=5)
tools = st.lists(objects(schemas), min_size=1, max_size=2).map(
    lambda each: [tool(f"tool_{n}", **parameters) for n, parameters in enumerate(each)])


def fitting(schema, draw, depth=0):
    """A value that fits."""
    if "enum" in schema:
        return draw(st.sampled_from(schema["enum"]))
    if "anyOf" in schema:
        return fitting(draw(st.sampled_from(schema["anyOf"])), draw, depth)
    kinds = schema.get("type", ["string", "number", "boolean", "null", "array", "object"])
    kind = draw(st.sampled_from([kinds] if isinstance(kinds, str) else kinds))
    if kind == "array":
        items = schema.get("items", {"type": "integer"})
        size = draw(st.integers(schema.get("minItems", 0), 2))
        return [fitting(items, draw, depth + 1) for _ in range(size)]
    if kind == "object":
        known = schema.get("properties", {})
        chosen = {key: item for key, item in known.items()
                  if key in schema.get("required", []) or draw(st.booleans())}
        others = schema.get("additionalProperties", "properties" not in schema)
        if others and depth < 3 and draw(st.booleans()):
            more = {"type": "integer"} if others is True else others
            chosen |= {key: more for key in ("zz", "cityx", "a1") if draw(st.booleans())}
        order = draw(st.permutations(list(chosen)))
        return {key: fitting(chosen[key], draw, depth + 1) for key in order}
    if "minimum" in schema:
        return draw(st.integers(schema["minimum"], schema["maximum"]))
    return draw(scalars.filter(lambda value: not check_arguments(
        tool("f", properties={"v": {"type": kind}}), {"v": value})))


@every_dialect
@settings(LAW, max_examples=20)
@given(data=st.data())
def test_a_reply_whose_calls_fit_is_not_barred(dialect, data):
    # Each of its ids may come, so that a model to which they are the likeliest writes the same.
    offered = data.draw(tools)
    calls = [ToolCall(each["function"]["name"],
                      fitting(each["function"]["parameters"], data.draw),
                      data.draw(st.none() | st.just("a1b2c3d4e")))
             for each in data.draw(st.lists(st.sampled_from(offered), max_size=2))]
    user = Message("user", "?")
    reply = Message("assistant", data.draw(st.sampled_from(["", "So, <b>", "x [TOOL"])),
                    data.draw(st.sampled_from(["", "Hm <tool"])), tuple(calls))
    words = vocabulary(dialect)
    asked = render(Conversation((user,)), words.tokenizer, dialect, generate=True).ids
    whole = render(Conversation((user, reply)), words.tokenizer, dialect).ids
    stops = stop_ids(words.tokenizer, dialect)
    end = next(at for at in range(len(asked), len(whole)) if whole[at] in stops)
    constraint = Constraint(words, offered, dialect)
    assert refused(constraint, whole[len(asked):end + 1]) is None


def walk(constraint, dialect, rng, left):
    """Ids drawn with little sense until the reply ends; calls are begun and ended gladly."""
    words, ids = constraint.vocabulary, []
    stops = stop_ids(words.tokenizer, dialect)
    opening = words.tokenizer.token_id(OPENING[dialect])
    while left:
        some = allowed(constraint, left)
        assert some, words.tokenizer.decode(ids)
        ending = [i for i in some if words.texts.get(i, b'"')[:1] in (b'"', b"}", b"]")]
        new = (opening if opening in some and rng.random() < 0.8 else
               rng.choice(ending if ending and rng.random() < 0.3 else some))
        if new in stops:
            break
        constraint.take(new)
        ids.append(new)
        left -= 1
    return ids


def assert_fit(ids, offered, words, dialect):
    functions = {each["function"]["name"]: each for each in offered}
    texts = [decode_reply(ids, words.tokenizer, dialect), words.tokenizer.decode(ids)]
    for text in texts:  # a reader that knows the control tokens, and one that does not
        for call in parse_tool_calls(text, dialect):
            assert not check_arguments(functions[call.name], call.arguments), text
    return parse_tool_calls(texts[0], dialect)


@every_dialect
@settings(LAW, max_examples=20)
@given(offered=tools, seed=st.integers(0, 2**32), left=st.integers(1, 90))
def test_whatever_is_drawn_the_calls_can_be_read_and_fit(dialect, offered, seed, left):
    constraint = Constraint(vocabulary(dialect), offered, dialect)
    ids = walk(constraint, dialect, random.Random(seed), left)
    assert_fit(ids, offered, constraint.vocabulary, dialect)


@every_dialect
def test_such_walks_do_make_calls_and_fill_their_room(dialect):
    offered = [tool("f", **CITY), tool("g", **MANY)]
    words, rng, calls, full = vocabulary(dialect), random.Random(0), [], 0
    for left in range(1, 61):
        ids = walk(Constraint(words, offered, dialect), dialect, rng, left)
        full += len(ids) == left
        calls += assert_fit(ids, offered, words, dialect)
    assert {call.name for call in calls} == {"f", "g"} and full > 5
    assert any(len(call.arguments) > 1 for call in calls)


@every_dialect
@settings(LAW, max_examples=4)
@given(offered=tools, seed=st.integers(0, 2**32))
def test_a_piece_is_allowed_if_its_bytes_are(dialect, offered, seed):
    # The shortcuts through the vocabulary must not change what fits.
    words = vocabulary(dialect)
    rng, constraint = random.Random(seed), opened(offered, dialect)
    pieces = rng.sample(sorted(words.texts), 60)
    for _ in range(rng.randrange(25)):
        constraint.take(rng.choice(allowed(constraint)))
        some = set(allowed(constraint))
        if not some:  # the last was a stop id
            break
        if rng.random() < 0.8:
            continue
        fit = {i for i in pieces
               if refused(copy.copy(constraint), by_byte(words, words.texts[i])) is None}
        assert fit == some & set(pieces)


# --- with a model ---------------------------------------------------------------------------------

def talkative(words, dialect):
    """A model with no sense, but a bent for calls."""
    model = tiny_model(vocab_size=words.size)
    model.embed_tokens.weight.mul_(0.2)
    opening, logits = words.tokenizer.token_id(OPENING[dialect]), model.logits

    def bent(hidden, **more):
        out = logits(hidden, **more)
        out[..., opening] += 100
        return out

    model.logits = bent
    return model


@every_dialect
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_generate_and_stream_keep_to_it(dialect, temperature):
    words, offered = vocabulary(dialect), [tool("f", **CITY), tool("g", **TREE)]
    model, prompts = talkative(words, dialect), [[5], [9, 8, 7]]
    stops = stop_ids(words.tokenizer, dialect)

    def fresh():
        return Constraint(words, offered, dialect)

    for max_new in (3, 60):
        config = GenerateConfig(max_new=max_new, temperature=temperature)
        replies = generate(model, prompts, config, stops, [fresh() for _ in prompts])
        calls = [assert_fit(ids, offered, words, dialect) for ids in replies]
        assert all(calls) == (max_new > 3)  # in three tokens no call has room
        for prompt, reply in zip(prompts, replies, strict=True):
            alone = list(stream(model, prompt, config, stops, constraint=fresh()))
            assert assert_fit(alone, offered, words, dialect) or max_new == 3
            assert alone == reply or temperature  # the draws of a batch are others
    free = generate(model, prompts, config, stops)
    with pytest.raises(ValueError):  # what it would write otherwise
        assert_fit(free[0], offered, words, dialect)


def test_the_vocabulary_of_gemma_2(gemma2_tokenizer_model):
    words = vocabulary("hermes", gemma2_tokenizer_model.parent)
    offered = [tool("get_weather", **CITY), tool("g", **TREE)]
    text = '\n{"name": "get_weather", "arguments": {"city": "Zürich 😀\\n", "days": 31}}\n'
    constraint = Constraint(words, offered, "hermes")
    constraint.take(words.tokenizer.token_id("<tool_call>"))
    assert refused(constraint, words.tokenizer.encode(text)) is None
    for seed in range(10):
        ids = walk(Constraint(words, offered, "hermes"), "hermes", random.Random(seed), 60)
        assert_fit(ids, offered, words, "hermes")
