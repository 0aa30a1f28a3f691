"""Are calls right? Exact answers, and the leaderboard's rules on hand-made right and wrong ones."""

import itertools
import json

import pytest
from conftest import real_input
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.chat import ToolCall
from minilora.compare import check_calls, find_problem
from minilora.config import UserError

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
    "union": {"type": ["string", "null"]}, "free": {},
    "odd_items": {"type": "array", "items": [{"type": "integer"}]}}}}
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
    ("spot", [1, 2], [[1.0, 2.0], ""], True),  # where it may be left out, items have any type
    ("spot", [1, 2.5], [[1, 2.5]], True), ("spot", ["1", 2.5], [[1.0, 2.5]], False),
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
    ("rooms", [], [[{"a": [1]}]], False), ("rooms", ["x"], [["x"]], False),
    ("rooms", [{"a": "B c"}], [[{"a": ["bc", ""], "d": [1, ""]}]], True),
    ("who", {"at": {"x": "A"}}, [{"at": [{"x": "A"}]}], True),  # deeper down, as it is
    ("who", {"at": {"x": "a"}}, [{"at": [{"x": "A"}]}], False),
    ("who", "ann", [{"name": ["Ann"]}], False), ("who", "x = y", ["x = y"], True),
    ("tags", "names", ["names"], True), ("tags", ["a"], ["names"], False),
    ("sure", "True", [True], False), ("sure", 1, [1], True), ("price", True, [1.0], False),
    ("counts", [1.0], [[1]], False), ("counts", [2, 1], [[1, 2], [2, 1]], True),
    ("city", "nyc!", ["NYC"], False), ("city", "ny\nc", ["NYC"], False),
    ("city", "N^Y*C", ["NYC"], True),
    ("data", "My Data", ["my_data"], True), ("data", 3, [3], True), ("data", 3, ["3"], False),
    ("odd", 5, [5], True), ("odd", ["A"], [["A"]], True), ("odd", ["a"], [["A"]], False),
    ("odd", "a", [5, "A"], False),
    ("union", "A b", ["ab"], True), ("union", 1, ["1"], False),
    ("odd_items", ["A"], [["a"]], True),
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
    for answer, told in (({"book": ["NYC"]}, "book: .'NYC'. is not an object"),
                         ({"book": {"city": "NYC"}}, "book: city is 'NYC'; expected a list"),
                         ({"book": {"who": [{"name": "Ann"}]}}, "book.who: name is 'Ann'"),
                         ({"book": {"rooms": [[{"a": 1}]]}}, "book.rooms: a is 1")):
        with pytest.raises(UserError, match=told):
            check_calls(call, [BOOK], [answer])


# --- each category, by hand -----------------------------------------------------------------------

def tool(name, required=(), **types):
    return {"name": name, "parameters": {"type": "dict", "required": list(required), "properties": {
        key: {"type": kind} for key, kind in types.items()}}}


WEATHER = tool("weather.get", ["city"], city="string", unit="string", days="integer")
TIME = tool("time", ["zone"], zone="string")
PARIS = {"weather.get": {"city": ["Paris", "Paris, France"], "unit": ["celsius", ""], "days": [2]}}
ROME = {"weather.get": {"city": ["Rome"], "unit": [""], "days": ["", 1]}}
CET = {"time": {"zone": ["CET", "Europe/Paris"]}}
IN_PARIS = ToolCall("weather.get", {"city": "paris france", "days": 2})
IN_ROME = ToolCall("weather.get", {"city": "Rome"})
AT_CET = ToolCall("time", {"zone": "europe paris"})


def weather(**arguments):
    return ToolCall("weather.get", arguments)


ONE_WRONG = [
    ([], "no call"), ([IN_PARIS, IN_PARIS], "number of calls"), ([AT_CET], "wrong name"),
    ([ToolCall("weather_get", IN_PARIS.arguments)], "wrong name"),
    ([ToolCall("Weather.get", IN_PARIS.arguments)], "wrong name"),
    ([weather(days=2)], "missing parameter"), ([weather(city="Paris")], "missing parameter"),
    ([weather(city="Paris", days=2, town="Paris")], "unknown parameter"),
    ([weather(city="Rome", days=2)], "wrong value"),
    ([weather(city="Paris", days=3)], "wrong value"),
    ([weather(city="Paris", days="2")], "wrong type"),
    ([weather(city=["Paris"], days=2)], "wrong type"), ([weather(city=None, days=2)], "wrong type"),
    ([weather(city="Paris", days=2, unit="kelvin")], "wrong value"),
]
TWO_WRONG = [
    ([], "no call"), ([IN_PARIS], "number of calls"), ([IN_PARIS, IN_PARIS], "wrong value"),
    ([IN_ROME, IN_PARIS, IN_ROME], "number of calls"), ([IN_PARIS, AT_CET], "wrong name"),
    ([IN_PARIS, weather(city="Rome", days=2)], "wrong value"),
    ([weather(city="Rome", days=2), weather(city="Paris")], "wrong value"),
]
CATEGORIES = {  # tools, accepted, right, wrong with its kind
    "simple": ([WEATHER], [PARIS], [[IN_PARIS], [weather(city="Paris", days=2, unit="Celsius")]],
               ONE_WRONG),
    "multiple": ([TIME, WEATHER], [PARIS], [[IN_PARIS]], ONE_WRONG),
    "parallel": ([WEATHER], [PARIS, ROME], [[IN_PARIS, IN_ROME], [IN_ROME, IN_PARIS]], TWO_WRONG),
    "parallel_multiple": ([WEATHER, TIME], [PARIS, CET, ROME], [
        list(order) for order in itertools.permutations([IN_PARIS, IN_ROME, AT_CET])], [
            ([IN_PARIS, IN_ROME], "number of calls"), ([AT_CET] * 3, "wrong name"),
            ([AT_CET, IN_ROME, ToolCall("time", {"zone": "UTC"})], "wrong name"),
            ([IN_PARIS, IN_ROME, ToolCall("time", {"zone": "UTC"})], "wrong value"),
            ([IN_PARIS, IN_ROME, ToolCall("time", {})], "missing parameter")]),
    "irrelevance": ([WEATHER], [], [[]], [
        ([IN_PARIS], "unneeded call"), ([IN_PARIS, AT_CET], "unneeded call")]),
    "relevance": ([WEATHER], None, [[IN_PARIS], [weather(town="Oslo")], [IN_ROME, IN_PARIS]], [
        ([], "no call")]),
}


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_category(category):
    tools, accepted, right, wrong = CATEGORIES[category]
    for calls in right:
        assert check_calls(calls, tools, accepted) == (True, "")
    for calls, kind in wrong:
        problem = find_problem(calls, tools, accepted)
        assert (problem.kind, bool(problem.reason)) == (kind, True), calls
        assert check_calls(calls, tools, accepted) == (False, problem.reason)


def test_of_two_tools_of_one_name_the_first_counts():
    twice = [tool("f", x="integer"), tool("f", x="string")]
    assert check_calls([ToolCall("f", {"x": 1})], twice, [{"f": {"x": [1]}}])[0]
    assert not check_calls([ToolCall("f", {"x": "a b"})], twice, [{"f": {"x": ["ab"]}}])[0]


def test_a_call_passes_its_answer_on():
    """Greedy pairing would give the first answer to the first call and find none for the second."""
    answers = [{"f": {"x": [1, ""]}}, {"f": {"x": ["", 2]}}]
    for calls in itertools.permutations([ToolCall("f", {}), ToolCall("f", {"x": 1})]):
        assert check_calls(calls, [tool("f", x="integer")], answers) == (True, "")


def test_exact_answers_have_kinds_too():
    for given_arguments, kind in (
            ({"x": "1"}, "wrong type"), ({"x": True}, "wrong type"), ({"x": 2}, "wrong value"),
            ({"x": 1.5}, "wrong value"), ({}, "missing parameter"),
            ({"x": 1, "y": 1}, "unknown parameter")):
        problem = find_problem([ToolCall("f", given_arguments)], [], [ToolCall("f", {"x": 1})])
        assert problem.kind == kind


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
