"""Calls are compared as calls; a model's replies are counted in the order of the conversations."""

import itertools
import json

import pytest
from conftest import real_input, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import make_tokenizer_model

from minilora.chat import DIALECTS, Conversation, Message, ToolCall, render
from minilora.config import GenerateConfig, UserError
from minilora.evaluate import Case, Report, Share, check_calls, evaluate
from minilora.generate import generate
from minilora.tokenizer import Tokenizer

# --- exact calls ----------------------------------------------------------------------------------


def verdict(given_arguments, expected_arguments):
    return check_calls([ToolCall("f", given_arguments)], [], [ToolCall("f", expected_arguments)])


@pytest.mark.parametrize("given_value, expected_value, ok", [
    ("Paris", "Paris", True), ("Paris", "paris", False), ("Paris", "Paris ", False),
    (1, 1, True), (1.0, 1, True), (1, "1", False), (True, 1, False), (1, True, False),
    (0, False, False), (None, None, True), (None, 0, False), ("", None, False),
    ([1, 2], [1, 2], True), ([1, 2], [2, 1], False), ([1], [1, 1], False), ([True], [1], False),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True), ({"a": True}, {"a": 1}, False),
    ({"a": 1}, {"a": 1, "b": None}, False), ([], {}, False),
])
def test_exact_values(given_value, expected_value, ok):
    assert verdict({"x": given_value}, {"x": expected_value})[0] is ok


def test_exact_calls_say_what_is_wrong():
    assert verdict({"b": 2, "a": 1}, {"a": 1, "b": 2}) == (True, "")
    assert verdict({"a": 1}, {"a": 1, "b": 2}) == (False, "f: b is missing")
    assert verdict({"a": 1, "c": 2}, {"a": 1}) == (False, "f: c is not expected")
    assert verdict({"a": "é"}, {"a": 1}) == (False, 'f: a is "é", expected 1')
    assert check_calls([ToolCall("g", {})], [], [ToolCall("f", {})]) == (
        False, "called g, expected f")
    assert check_calls([ToolCall("f", {}, "id1")], [], [ToolCall("f", {}, "id2")])[0]


def test_the_number_of_calls():
    one = ToolCall("f", {})
    assert check_calls([], [], []) == (True, "")
    assert check_calls([one], [], []) == (False, "expected no calls, got 1 call")
    assert check_calls([], [], [one, one]) == (False, "expected 2 calls, got no calls")


def test_parallel_calls_have_no_order_but_each_counts_once():
    a, b = ToolCall("f", {"x": 1}), ToolCall("f", {"x": 2})
    assert check_calls([b, a], [], [a, b]) == (True, "")
    assert check_calls([a, a], [], [a, b]) == (False, "f: x is 1, expected 2")
    assert check_calls([a, ToolCall("g", {})], [], [b, ToolCall("h", {})])[0] is False
    # The reason is against the answer that was meant.
    assert check_calls([ToolCall("f", {"x": 3}), b], [], [ToolCall("g", {}), a]) == (
        False, "f: x is 3, expected 1")


# --- lists of accepted values, as the leaderboard has them ----------------------------------------

BOOK = {"name": "book", "parameters": {"type": "dict", "required": ["city", "nights"],
                                       "properties": {
    "city": {"type": "string"}, "nights": {"type": "integer"}, "price": {"type": "float"},
    "sure": {"type": "boolean"}, "tags": {"type": "array", "items": {"type": "string"}},
    "spot": {"type": "tuple", "items": {"type": "float"}}, "who": {"type": "dict"},
    "rooms": {"type": "array", "items": {"type": "dict"}}, "data": {"type": "any"},
    "counts": {"type": "array", "items": {"type": "integer"}},
    "rest": {"type": "array"}, "odd": {"type": "string"},
    "union": {"type": ["string", "null"]}, "free": {}}}}
GOOD = {"city": ["New York", "NYC"], "nights": [2]}


@pytest.mark.parametrize("arguments, accepted, ok", [
    ({"city": "NYC", "nights": 2}, GOOD, True),
    ({"city": "new-york.", "nights": 2}, GOOD, True),  # case, spaces and , . / - _ * ^ do not count
    ({"city": "New Jork", "nights": 2}, GOOD, False),
    ({"city": "NYC", "nights": 3}, GOOD, False),
    ({"city": "NYC", "nights": 2.0}, GOOD, False),     # a float is no integer
    ({"city": "NYC", "nights": "2"}, GOOD, False),
    ({"city": "NYC", "nights": True}, {**GOOD, "nights": [1]}, False),
    ({"nights": 2}, {**GOOD, "city": ["", "NYC"]}, False),  # required, whatever the answer says
    ({"city": "NYC", "nights": 2, "zip": 1}, {**GOOD, "zip": [1]}, False),  # not in the schema
    ({"city": "NYC", "nights": 2, "sure": True}, GOOD, False),              # not in the answer
    ({"city": "NYC", "nights": 2}, {**GOOD, "sure": [True]}, False),
    ({"city": "NYC", "nights": 2}, {**GOOD, "sure": [True, ""]}, True),
    ({"city": "NYC", "nights": 2, "sure": True}, {**GOOD, "sure": [True, ""]}, True),
    ({"city": "NYC", "nights": 2, "sure": False}, {**GOOD, "sure": [True, ""]}, False),
    ({"city": "NYC", "nights": 2, "sure": 1}, {**GOOD, "sure": [True, ""]}, False),
])
def test_which_parameters_and_values(arguments, accepted, ok):
    got, reason = check_calls([ToolCall("book", arguments)], [BOOK], [{"book": accepted}])
    assert got is ok and (reason == "") is ok


@pytest.mark.parametrize("key, value, accepted, ok", [
    ("price", 2, [2.0], True), ("price", 3, [2.5, 3], True), ("price", "2.5", [2.5], False),
    ("city", "x ^2", ["X2"], True), ("counts", [True], [[1]], False), ("counts", [1], [[1]], True),
    ("city", 'the "A"', ["The 'A'"], True), ("city", "", ["NYC", ""], True),
    ("tags", ["A b", "c"], [["ab", "C"]], True), ("tags", ["c", "ab"], [["ab", "c"]], False),
    ("tags", ["a", 1], [["a", 1]], False), ("tags", "a", [["a"]], False),
    ("tags", [], [["a"], ""], True), ("tags", ["a"], ["", ["A"]], True),
    ("spot", [1.5, 2.0], [[1.5, 2.0]], True), ("spot", [1, 2], [[1.0, 2.0]], False),
    ("spot", [1, 2], [[1, 2]], True),
    ("rest", [1, "A"], [[1, "a"]], True),
    ("who", {"name": "ann"}, [{"name": ["Ann", "Bob"], "age": [3, ""]}], True),
    ("who", {"name": "ann", "age": 4}, [{"name": ["Ann", "Bob"], "age": [3, ""]}], False),
    ("who", {"age": 3}, [{"name": ["Ann"], "age": [3, ""]}], False),
    ("who", {"name": "ann", "zip": 1}, [{"name": ["Ann"]}], False),
    ("who", {"name": "bob"}, [{"name": ["Ann"]}, "", {"name": ["Bob"]}], True),
    ("who", [], [{"name": ["Ann"]}], False), ("who", {}, [{"name": ["Ann"]}, ""], False),
    ("rooms", [{"a": 1}, {"a": 2}], [[{"a": [1]}, {"a": [2]}]], True),
    ("rooms", [{"a": 2}, {"a": 1}], [[{"a": [1]}, {"a": [2]}]], False),
    ("rooms", [{"a": 1}], [[{"a": [1]}, {"a": [2]}]], False),
    ("data", "My Data", ["my_data"], True), ("data", 3, [3], True), ("data", 3, ["3"], False),
    ("odd", 5, [5], True), ("odd", ["A"], [["A"]], True), ("odd", ["a"], [["A"]], False),
    ("odd", "a", [5, "A"], False),
    ("union", "A b", ["ab"], True), ("union", 1, ["1"], False),
    ("free", "A b", ["ab"], True), ("free", 2, [2], True), ("free", 2, [2.0], True),
])
def test_each_type(key, value, accepted, ok):
    arguments = {"city": "NYC", "nights": 2, key: value}
    answer = {"book": {**GOOD, key: accepted}}
    tools = [{"type": "function", "function": BOOK}]
    assert check_calls([ToolCall("book", arguments)], tools, [answer])[0] is ok


def test_an_answer_of_no_known_form_is_refused():
    call = [ToolCall("book", {})]
    for answer in ("b", {}, {"a": {}, "b": {}}):
        with pytest.raises(UserError, match="accepted answer"):
            check_calls(call, [BOOK], [answer])
    with pytest.raises(UserError, match="'cook', which is not among the tools: book"):
        check_calls([ToolCall("cook", {})], [BOOK], [{"cook": {}}])


PICK = {"name": "pick", "parameters": {"properties": {"x": {"type": "integer"}}}}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=st.lists(st.integers(0, 3), min_size=1, max_size=4), data=st.data())
def test_the_verdict_is_whether_any_order_fits(values, data):
    accepted = [data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)) for _ in values]
    fits = any(all(map(list.__contains__, order, values))
               for order in itertools.permutations(accepted))
    calls = [ToolCall("pick", {"x": value}) for value in values]
    ok, reason = check_calls(calls, [PICK], [{"pick": {"x": answer}} for answer in accepted])
    assert ok is fits and (reason == "") is fits


@pytest.fixture
def leaderboard():
    """Reads a file of the leaderboard, where they are at hand."""
    folder = real_input("bfcl")
    return lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()]


def plain(value):
    """A call's value of an accepted one: inside objects these are lists again."""
    if isinstance(value, dict):
        return {key: plain(values[0]) for key, values in value.items() if values[0] != ""}
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("category", ["simple_python", "multiple"])
def test_the_leaderboards_own_answers_are_right_and_changed_ones_wrong(leaderboard, category):
    rows = leaderboard
    for row, answers in zip(rows(f"{category}.jsonl"), rows(f"{category}.answers.jsonl"),
                            strict=True):
        accepted, tools = answers["ground_truth"], row["function"]
        calls = [ToolCall(name, {key: plain(next(value for value in values if value != ""))
                                 for key, values in arguments.items() if values != [""]})
                 for answer in accepted for name, arguments in answer.items()]
        assert check_calls(calls, tools, accepted) == (True, ""), row["id"]
        key = next(iter(calls[0].arguments), None)
        for wrong in ([], calls * 2, [ToolCall("nothing", calls[0].arguments)],
                      [ToolCall(calls[0].name, {**calls[0].arguments, "more": 1})],
                      [ToolCall(calls[0].name, {**calls[0].arguments, key: {"no": "value"}})]):
            assert not check_calls(wrong, tools, accepted)[0], row["id"]


# --- shares ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("right, total", [(0, 10), (3, 10), (10, 10), (95, 100), (1, 1)])
def test_wilsons_interval_holds_the_rates_that_the_share_does_not_contradict(right, total):
    share = Share(right, total)
    low, high = share.interval
    assert 0 <= low <= share.value == right / total <= high <= 1
    for end in {low, high} - {0.0, 1.0}:  # where the share is 1.96 standard deviations off
        off = abs(right / total - end) / (end * (1 - end) / total) ** 0.5
        assert off == pytest.approx(1.96, abs=1e-3)


def test_a_share_in_words():
    assert str(Share(19, 20)) == "0.950 (19/20, 95 % 0.764 to 0.991)"
    assert (Share(0, 0).value, Share(0, 0).interval, str(Share(0, 0))) == (None, (0, 1), "none")


# --- a model's replies ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer_model(folder)
    tokenizer = Tokenizer.load(folder)
    tokenizer.add_tokens([*DIALECTS["hermes"].tokens, *DIALECTS["mistral"].tokens], mode="reserved")
    return tokenizer


TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}}
CALL = ToolCall("f", {"x": 1})
ASKED = "Do it."


def conversation(number, *calls, more=()):
    """One whose question has a length of its own, so that batches by length have another order."""
    return Conversation((Message("system", "Be brief."),
                         Message("user", ASKED * (3 * number % 7 + 1)),
                         Message("assistant", "" if calls else "Hello.", tool_calls=tuple(calls)),
                         *more), (TOOL,), f"held_out.jsonl:{number}")


def called(call):
    return "\n".join(("<tool_call>", json.dumps({"name": call.name, "arguments": call.arguments}),
                      "</tool_call>"))


SAID = [  # conversation, what the model says, whether that is right, part of the reason
    (conversation(1, CALL), called(CALL), True, ""),
    (conversation(2, CALL), "<think>\nHm.\n</think>\n" + called(CALL), True, ""),
    (conversation(3, CALL), called(ToolCall("f", {"x": "1"})), False, 'x is "1", expected 1'),
    (conversation(4, CALL), called(ToolCall("g", {"x": 1})), False, "called g"),
    (conversation(5, CALL), "I cannot.", False, "expected 1 call, got no calls"),
    (conversation(6, CALL), '<tool_call>\n{"name": "f"', False, "malformed: not JSON"),
    (conversation(7), "Hello to you.", True, ""),
    (conversation(8), called(CALL), False, "expected no calls, got 1 call"),
    (conversation(9), "<tool_call>", False, "malformed"),
    (conversation(10, CALL, CALL), called(CALL) + "\n" + called(CALL), True, ""),
    (conversation(11, CALL, more=(Message("tool", "2"), Message("assistant", "It is 2."))),
     called(CALL), True, ""),
]


def scripted(monkeypatch, tokenizer, dialect="hermes"):
    """A `generate` that knows what to say to each prompt; what it was given is kept."""
    replies, batches = {}, []
    for asked, text, *_ in SAID:
        before = Conversation(asked.messages[:2], asked.tools)
        prompt = render(before, tokenizer, dialect, generate=True).ids
        replies[tuple(prompt), asked.source] = tokenizer.encode(text)

    def fake(model, prompts, config, stop_ids):
        batches.append((prompts, config, stop_ids))
        found = []
        for prompt in prompts:  # each text is said once, and equal prompts in their order
            key = next(key for key in replies if key[0] == tuple(prompt))
            found.append(replies.pop(key))
        return found

    monkeypatch.setattr("minilora.evaluate.generate", fake)
    return batches


def test_every_case_is_judged_and_kept_in_order(monkeypatch, tokenizer):
    batches = scripted(monkeypatch, tokenizer)
    told = []
    report = evaluate(tiny_model(), tokenizer, [asked for asked, *_ in SAID], "hermes",
                      GenerateConfig(max_new=7, temperature=0.9, top_p=0.5), batch=4,
                      progress=lambda *numbers: told.append(numbers))
    for case, (asked, text, ok, reason) in zip(report.cases, SAID, strict=True):
        assert (case.source, case.text, case.ok) == (asked.source, text, ok)
        assert case.expected == asked.messages[2].tool_calls
        assert reason in case.reason and (case.reason == "") is ok
    assert report.cases[0].calls == (CALL,) and report.cases[8].calls == ()
    assert (report.calls, report.no_tool) == (Share(4, 8), Share(1, 3))
    assert told == [(4, 11), (8, 11), (11, 11)]
    lengths = [len(prompt) for prompts, *_ in batches for prompt in prompts]
    assert lengths == sorted(lengths) and len(set(lengths)) > 4
    assert all(len(prompts) <= 4 for prompts, *_ in batches)
    for _, config, stop_ids in batches:
        assert (config.max_new, config.temperature) == (7, 0.0)  # greedy, whatever was asked
        assert stop_ids == tokenizer.stop_ids


def test_shares_of_nothing():
    case = Case("a:1", (), "Hello.", (), True, "")
    assert Report((case,)).calls == Share(0, 0) and Report((case,)).no_tool == Share(1, 1)


def test_a_real_model_is_decoded_greedily_from_before_the_first_reply(monkeypatch, tokenizer):
    model, prompts = tiny_model(), []

    def watched(model, batch, config, stop_ids):
        prompts.extend(batch)
        return generate(model, batch, config, stop_ids)

    monkeypatch.setattr("minilora.evaluate.generate", watched)
    asked = [conversation(1, CALL), conversation(2), conversation(4, CALL)]
    report = evaluate(model, tokenizer, asked, "mistral", GenerateConfig(max_new=5), batch=2)
    for each, case in zip(asked, report.cases, strict=True):
        before = Conversation(each.messages[:2], each.tools)
        prompt = render(before, tokenizer, "mistral", generate=True).ids
        assert prompt in prompts
        alone = generate(model, [prompt], GenerateConfig(max_new=5), tokenizer.stop_ids)[0]
        assert case.text == tokenizer.decode(alone)


def test_what_cannot_be_evaluated_is_named(tokenizer):
    model = tiny_model()
    silent = Conversation((Message("user", "Hi."),), source="held_out.jsonl:7")
    with pytest.raises(UserError, match="held_out.jsonl:7: no assistant turn"):
        evaluate(model, tokenizer, [silent])
    long = Conversation((Message("user", "long " * 400), Message("assistant", "Yes.")),
                        source="held_out.jsonl:8")
    with pytest.raises(UserError, match="held_out.jsonl:8: the prompt has .* context 512"):
        evaluate(model, tokenizer, [conversation(1), long])
