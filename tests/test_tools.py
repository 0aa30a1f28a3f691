"""Functions become schemas, calls are checked before they run, and the loop ends."""

import dataclasses
import datetime
import enum
import json
import re
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import numpy as np
import pytest
import torch
from conftest import LAW
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.chat import Message, ToolCall
from minilora.config import UserError
from minilora.dialects import DIALECTS
from minilora.tools import (
    REPEATS,
    check_arguments,
    converse,
    latest,
    load_tools,
    run_call,
    shorten,
    tool_schema,
)


def parameters(function):
    return tool_schema(function)["function"]["parameters"]


def hint_schema(hint):
    def tool(value): ...
    tool.__annotations__["value"] = hint
    return parameters(tool)["properties"]["value"]


# --- schemas --------------------------------------------------------------------------------------

class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


def get_weather(city: str, days: int = 1, *, unit: Unit = Unit.CELSIUS) -> dict:
    """Tells the weather
    of a city.

    Asks nobody.

    Args:
        city (str, never a village): The city,
            with its country: "Paris, FR".
        days: How many days.

    Returns:
        city: this is no description of the parameter.
    """
    return {"city": city, "days": days, "unit": unit.name}


def test_a_whole_schema():
    assert tool_schema(get_weather) == {"type": "function", "function": {
        "name": "get_weather", "description": "Tells the weather of a city. Asks nobody.",
        "parameters": {"type": "object", "properties": {
            "city": {"type": "string", "description": 'The city, with its country: "Paris, FR".'},
            "days": {"type": "integer", "description": "How many days."},
            "unit": {"type": "string", "enum": ["celsius", "kelvin"]}}, "required": ["city"]}}}


@pytest.mark.parametrize("hint, expected", [
    (str, {"type": "string"}), (int, {"type": "integer"}), (float, {"type": "number"}),
    (bool, {"type": "boolean"}), (None, {"type": "null"}), (Any, {}),
    (list, {"type": "array"}), (dict, {"type": "object"}), (dict[str, Any], {"type": "object"}),
    (list[list[int]], {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
    (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
    (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
    (Literal[1, "b", True], {"type": ["integer", "string", "boolean"], "enum": [1, "b", True]}),
    (int | None, {"type": ["integer", "null"]}),
    (Union[int, str], {"type": ["integer", "string"]}),  # noqa: UP007 (it has another origin)
    ("int | None", {"type": ["integer", "null"]}),
    (list[str] | None, {"anyOf": [{"type": "array", "items": {"type": "string"}},
                                  {"type": "null"}]}),
    (Annotated[int, 7, "How many.", "x"], {"type": "integer", "description": "How many."}),
    (Annotated[int, []], {"type": "integer"}),
])
def test_hints(hint, expected):
    assert hint_schema(hint) == expected


@pytest.mark.parametrize("hint", [set, bytes, complex, object, tuple[int, str], dict[int, str],
                                  list[bytes], int | set, Literal[b"x"], enum.Enum("Empty", []),
                                  enum.Enum("Odd", {"A": object()})])
def test_a_hint_that_json_lacks_is_refused_with_function_and_parameter(hint):
    with pytest.raises(UserError, match="tool tool, parameter value: "):
        hint_schema(hint)


def test_functions_that_a_call_cannot_reach_are_refused():
    def bare(city): ...
    def stars(*cities: str): ...
    def named(**cities: str): ...
    def positional(city: str, /): ...
    def unknown(city: "Nowhere"): ...  # noqa: F821
    async def later(city: str): ...
    def one_by_one(city: str): yield city

    for function, message in [(bare, "tool bare, parameter city: no type hint"),
                              (stars, "tool stars, parameter cities: a call passes"),
                              (named, "tool named, parameter cities: a call passes"),
                              (positional, "tool positional, parameter city: a call passes"),
                              (unknown, "tool unknown: its type hints cannot be read"),
                              (later, "tool later is async"),
                              (one_by_one, "tool one_by_one yields"),
                              (lambda: 1, "tool <lambda>: not a function with a name"),
                              (Unit, "tool Unit: not a function with a name")]:
        with pytest.raises(UserError, match=message) as caught:
            tool_schema(function)
        assert "\n" not in str(caught.value)


REST = """Adds.

:returns: city, the sum
:param int first: The first
    note: it
    Example:
    is a number.
:type second: int
:param second: The second.

No description of anything.
"""
NUMPY = """Adds.

Parameters
----------
first : int
    The first
    note: it
    Example:
    is a number.
second : int, optional
    The second.

    No description of anything.

Returns
-------
int
    The sum.
"""
GOOGLE = """Adds.

Args:
  first: The first
    note: it
    Example:
    is a number.
  second (Optional[int]): The second.
No description of anything.
"""


@pytest.mark.parametrize("text", [REST, NUMPY, GOOGLE], ids=["reST", "NumPy", "Google"])
def test_docstring_styles(text):
    def add(first: int, second: int = 0): ...
    add.__doc__ = text
    schema = tool_schema(add)["function"]
    assert schema["description"] == "Adds."
    assert [each.get("description") for each in schema["parameters"]["properties"].values()] == [
        "The first note: it Example: is a number.", "The second."]


def test_annotated_wins_over_the_docstring_and_neither_is_needed():
    def both(city: Annotated[str, "From the hint."]):
        """Args:
            city: From the docstring."""

    def neither(city: str): ...

    assert parameters(both)["properties"]["city"]["description"] == "From the hint."
    assert tool_schema(neither)["function"]["description"] == ""
    assert parameters(neither)["properties"] == {"city": {"type": "string"}}


# --- arguments ------------------------------------------------------------------------------------

def plan(days: int, share: float, name: str, sure: bool, tags: list[str],
         kind: Literal["a", 1] = "a", note: str | None = None,
         rooms: dict[str, list[int]] | None = None): ...


GOOD = {"days": 1, "share": 2, "name": "x", "sure": True, "tags": ["a"]}


@pytest.mark.parametrize("change, problems", [
    ({}, []), ({"share": 0.5}, []), ({"note": None}, []), ({"kind": 1}, []), ({"tags": []}, []),
    ({"rooms": {"a": [1]}}, []),
    ({"days": True}, ["days: expected an integer, got true"]),
    ({"days": 1.0}, ["days: expected an integer, got 1.0"]),
    ({"days": "1"}, ['days: expected an integer, got "1"']),
    ({"days": None}, ["days: expected an integer, got null"]),
    ({"share": True}, ["share: expected a number, got true"]),
    ({"share": "2"}, ['share: expected a number, got "2"']),
    ({"name": 5}, ["name: expected a string, got 5"]),
    ({"sure": 1}, ["sure: expected a boolean, got 1"]),
    ({"tags": "a"}, ['tags: expected an array, got "a"']),
    ({"tags": ["a", 2]}, ["tags[1]: expected a string, got 2"]),
    ({"kind": "c"}, ['kind: expected one of "a", 1, got "c"']),
    ({"kind": True}, ['kind: expected one of "a", 1, got true']),
    ({"note": 3}, ["note: expected a string or null, got 3"]),
    ({"rooms": {"a": ["b"]}}, ['rooms: expected an object or null, got {"a": ["b"]}']),
    ({"town": 1}, ["town: unknown parameter (known: days, share, name, sure, tags, kind, note, "
                   "rooms)"]),
    ({"nmae": 1}, ["nmae: unknown parameter, did you mean name? (known: days, share, name, sure, "
                   "tags, kind, note, rooms)"]),
    ({"days": "1", "sure": "é"}, ['days: expected an integer, got "1"',
                                 'sure: expected a boolean, got "é"']),
])
def test_what_is_wrong_with_arguments(change, problems):
    assert check_arguments(tool_schema(plan), {**GOOD, **change}) == problems


def test_what_is_missing():
    assert check_arguments(tool_schema(plan), {"days": 1, "share": 1.0, "sure": False}) == [
        "name: missing, expected a string", "tags: missing, expected an array"]
    assert check_arguments(tool_schema(plan), [1]) == ["arguments: expected an object, got [1]"]


def test_nested_objects_of_a_foreign_schema():
    # As data sets write them: bare, with dict, float and any, with objects inside.
    schema = {"name": "find", "parameters": {"type": "dict", "properties": {
        "near": {"type": "dict", "properties": {"x": {"type": "float"}, "y": {}},
                 "required": ["x"]},
        "what": {"type": "any"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}}]},
    }}}
    assert check_arguments(schema, {"near": {"x": 1, "y": True}, "what": True, "either": [None]}) \
        == []
    assert check_arguments(schema, {"near": {"y": 1, "z": 2}, "either": "x"}) == [
        "near.x: missing, expected a float", "near.z: unknown parameter (known: x, y)",
        'either: expected an integer or an array, got "x"']
    choice = {"name": "pick", "parameters": {"properties": {"x": {"enum": [1, "a"]}}}}
    assert check_arguments(choice, {"x": 1}) == []
    assert check_arguments(choice, {"x": True}) == ['x: expected one of 1, "a", got true']
    assert check_arguments({"name": "now"}, {}) == []
    assert check_arguments({"name": "now"}, [1]) == ["arguments: expected an object, got [1]"]
    assert check_arguments({"name": "now"}, {"zone": 1}) == ["zone: unknown parameter "
                                                              "(known: none)"]


@pytest.mark.parametrize("schema, good, bad, expected", [
    ({"type": "integer", "minimum": 1}, [1, 9], [0, -5], "at least 1"),
    ({"type": "number", "maximum": 1.5}, [1, 1.5], [1.6, 2], "at most 1.5"),
    ({"type": "number", "exclusiveMinimum": 0}, [0.1, 1], [0, -1], "more than 0"),
    ({"exclusiveMaximum": 0}, [-1, "text", True, None], [0, 0.5], "less than 0"),
    ({"minimum": 3, "exclusiveMinimum": True}, [4, 3.5], [3], "more than 3"),  # OpenAPI 3.0
    ({"maximum": 3, "exclusiveMaximum": False}, [3], [4], "at most 3"),
    ({"multipleOf": 0.1}, [0.3, 2, 0, -0.7], [0.25], "a multiple of 0.1"),
    ({"type": "string", "minLength": 2}, ["éé", "abc"], ["", "😀"], "at least 2 characters"),
    ({"maxLength": 1}, ["", "😀", ["a", "b"]], ["ab"], "at most 1 characters"),
    ({"pattern": "^[A-Z]{2}$"}, ["AB"], ["A", "ABC", "ab"], "text that matches ^[A-Z]{2}$"),
    ({"type": "array", "minItems": 1}, [[0], [1, 2]], [[]], "at least 1 items"),
    ({"maxItems": 1}, [[], [1], "ab"], [[1, 2]], "at most 1 items"),
    ({"uniqueItems": True}, [[], [1, "1"]], [[1, 1], [{"a": 1}, {"a": 1}]], "items that differ"),
    ({"uniqueItems": False}, [[1, 1]], [], ""),
    ({"minProperties": 1}, [{"a": 1}], [{}], "at least 1 keys"),
    ({"maxProperties": 1}, [{}, {"a": 1}], [{"a": 1, "b": 2}], "at most 1 keys"),
])
def test_what_narrows_a_type_is_checked(schema, good, bad, expected):
    schema = {"name": "f", "parameters": {"properties": {"x": {"type": "array", "items": schema}}}}
    assert check_arguments(schema, {"x": good}) == []
    assert check_arguments(schema, {"x": bad}) == [
        f"x[{place}]: expected {expected}, got {json.dumps(value, ensure_ascii=False)}"
        for place, value in enumerate(bad)]


@pytest.mark.parametrize("schema, value", [({"minimum": "1"}, 1), ({"multipleOf": 0}, 1),
                                           ({"pattern": "("}, "x"), ({"maxItems": "2"}, [])])
def test_a_bound_that_is_none_is_told(schema, value):
    with pytest.raises(UserError, match=f"the schema of x has {next(iter(schema))} .*, which"):
        check_arguments({"name": "f", "parameters": {"properties": {"x": schema}}}, {"x": value})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner,
                                                                max_size=2), max_leaves=5)


def json_type(value):
    """What JSON Schema calls a Python value."""
    return {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string",
            list: "array", dict: "object"}[type(value)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(value=JSON, kind=st.sampled_from(["null", "boolean", "integer", "number", "string", "array",
                                         "object"]))
def test_a_value_fits_its_own_type_and_no_other(value, kind):
    schema = {"name": "f", "parameters": {"properties": {"x": {"type": kind}}}}
    fits = json_type(value) == kind or (json_type(value) == "integer" and kind == "number")
    assert (check_arguments(schema, {"x": value}) == []) is fits


# --- running --------------------------------------------------------------------------------------

def run(function, timeout=30.0, budget=4000, **arguments):
    return run_call({function.__name__: function}, ToolCall(function.__name__, arguments), timeout,
                    budget)


def test_a_result_is_text_or_json():
    def text() -> str:
        return 'plain "é"'

    def number():
        return 3.5

    def nothing():
        pass

    assert run(text) == 'plain "é"'
    assert run(number) == "3.5" and run(nothing) == "null"
    assert run(get_weather, city="Zürich", unit="kelvin") == (
        '{"city": "Zürich", "days": 1, "unit": "KELVIN"}')


@dataclasses.dataclass
class Place:
    name: str
    since: datetime.date


@pytest.mark.parametrize("value, text", [
    (Place("Ur", datetime.date(2026, 1, 2)), '{"name": "Ur", "since": "2026-01-02"}'),
    ([Unit.KELVIN, Path("a") / "b", Decimal("1.50")], '["kelvin", "a/b", "1.50"]'),
    ({"b", "a"}, '["a", "b"]'), ((1, 2), "[1, 2]"),
    ([np.float32(0.5), np.int64(3), np.bool_(True), np.arange(3)], "[0.5, 3, true, [0, 1, 2]]"),
    (torch.ones(2, 1), "[[1.0], [1.0]]"),
])
def test_what_json_lacks_becomes_the_nearest_that_it_has(value, text):
    def give():
        return value

    assert run(give) == text


def test_methods_are_tools_and_a_tool_may_print_and_start_threads(capsys):
    class Office:
        def greet(self, name: str) -> str:
            print("working")
            thread = threading.Thread(target=print, args=("on it",))
            thread.start()
            thread.join()
            return f"Hello {name}"

    assert run(Office().greet, name="Ann") == "Hello Ann"


def test_what_a_function_does_to_its_arguments_is_not_what_was_called():
    def empty(items: list, options: dict):
        items.clear()
        options["done"] = True

    call = ToolCall("empty", {"items": [1, [2]], "options": {}})
    assert run_call({"empty": empty}, call) == "null"
    assert call.arguments == {"items": [1, [2]], "options": {}}


def test_arguments_are_converted_as_the_hints_ask():
    def types(a: float, b: list[Unit], c: Annotated[dict[str, float], "x"],
              d: Unit | None = None, e: float | None = None, f: int | float = 0):
        assert b == [Unit.KELVIN] and d is None
        return [type(each).__name__ for each in (a, *c.values(), e, f)]

    assert run(types, a=1, b=["kelvin"], c={"x": 2}, d=None, e=3, f=4) == (
        '["float", "float", "float", "int"]')


def test_what_goes_wrong_goes_back_to_the_model():
    def bad_result():
        return b"bytes"

    def generator():
        return (number for number in range(3))

    def not_a_number():
        return [float("nan")]

    def circular():
        value = []
        value.append(value)
        return value

    def explode(city: str):
        raise LookupError(f"no such city:\n{city}")

    def leave():
        raise SystemExit(3)

    def error(function, **arguments):
        return json.loads(run(function, **arguments))["error"]

    assert error(explode, city="Ur") == "LookupError: no such city: Ur"
    assert error(leave) == "SystemExit: 3"
    assert "a result of type bytes is not JSON" in error(bad_result)
    assert "a result of type generator is not JSON" in error(generator)
    assert "Out of range float" in error(not_a_number)
    assert "Circular" in error(circular)
    assert error(explode, city=1) == "city: expected a string, got 1"
    assert error(get_weather) == "city: missing, expected a string"
    call = ToolCall("get_wether", {})
    functions = {"get_weather": get_weather, "leave": leave}
    assert json.loads(run_call(functions, call)) == {
        "error": "get_wether: unknown tool, did you mean get_weather? (known: get_weather, leave)"}
    assert json.loads(run_call({}, call)) == {"error": "get_wether: unknown tool (known: none)"}


def test_a_bad_call_never_reaches_the_function():
    reached = []

    def touch(count: int):
        reached.append(count)

    for arguments in ({}, {"count": "1"}, {"count": True}, {"count": 1, "force": True}):
        assert "error" in json.loads(run_call({"touch": touch}, ToolCall("touch", arguments)))
    assert reached == []
    run(touch, count=1)
    assert reached == [1]


@pytest.fixture
def impatient(monkeypatch):
    """Time runs out as soon as a tool has set `began`. Gives the threads that were waited for."""
    threads, join = [], threading.Thread.join

    def give_up(thread, timeout=None):
        threads.append(thread)
        assert began.wait(10) and thread.daemon  # so that it does not keep the program from ending
        began.clear()
        if timeout is None:
            raise KeyboardInterrupt

    began = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", give_up)
        yield threads, began, lambda thread: join(thread, 10)


def test_a_function_that_takes_too_long_is_told_to_end(impatient):
    (threads, began, join), gate, went_on = impatient, threading.Event(), []

    def wait():
        began.set()
        gate.wait()
        went_on.append("wait")

    def loop():
        began.set()
        while True:
            try:
                while True:
                    pass
            except Exception:  # a tool that shrugs off what goes wrong ends, too
                went_on.append("loop")

    _, events, _ = talk([hermes("wait"), "Too slow."], [wait], timeout=3)
    assert events[1].text == '{"error": "wait took longer than 3 seconds"}'
    run(loop, timeout=3)
    join(threads[1])
    assert [thread.is_alive() for thread in threads] == [True, False]
    for _ in range(9):  # it costs one thread, however often it is called
        assert "wait is still at an earlier call" in json.loads(run(wait))["error"]
    assert len(threads) == 2
    gate.set()  # what waits ends when it has waited
    for thread in threads:
        join(thread)
        assert not thread.is_alive()
    assert went_on == []
    run(wait, timeout=3)
    assert len(threads) == 3  # then it may be called again
    join(threads[2])


def test_a_function_whose_caller_is_interrupted_is_told_to_end(impatient):
    threads, began, join = impatient

    def loop():
        began.set()
        while True:
            pass

    with pytest.raises(KeyboardInterrupt):
        run(loop, timeout=None)
    join(threads[0])
    assert not threads[0].is_alive()


def test_a_function_that_takes_too_long_in_true_time():
    gate = threading.Event()

    def wait():
        gate.wait()

    assert run(wait, timeout=0.01) == '{"error": "wait took longer than 0.01 seconds"}'
    gate.set()


def test_a_long_result_is_cut_and_says_so():
    def long():
        return "é" * 50 + "z"

    assert run(long, budget=51) == "é" * 50 + "z"
    assert run(long, budget=40) == (
        "é" * 30 + " … (21 of 51 characters left out) … ")
    assert run(long, budget=50) == "é" * 37 + " … (13 of 51 characters left out) … z"

    def endless():
        return "x" * 10_000_000

    assert len(run(endless)) < 4100
    huge = ToolCall("y" * 1_000_000, {"z" * 1_000_000: "w" * 1_000_000})
    for functions in ({}, {"y" * 1_000_000: long}):
        assert len(run_call(functions, huge)) < 4100


@LAW
@given(value=st.text(max_size=200) | st.text("\\\"\n\u00e9u0a", max_size=200),
       ascii=st.booleans(), budget=st.integers(1, 80))
def test_what_is_left_of_a_long_text_is_its_two_ends_with_whole_escapes(value, ascii, budget):
    text = json.dumps(value, ensure_ascii=ascii)
    short = shorten(text, budget)
    if len(text) <= budget:
        assert short == text
        return
    found = re.fullmatch(r"(.*) … \((\d+) of (\d+) characters left out\) … (.*)", short,
                         re.DOTALL)
    head, missing, whole, tail = found.groups()
    assert text.startswith(head) and text.endswith(tail) and len(head) + len(tail) <= budget
    assert int(whole) == len(text) == len(head) + int(missing) + len(tail)
    assert len(head) + len(tail) > budget - 2 * 12 - 2  # two escapes, two roundings
    if head.startswith('"'):
        assert value.startswith(json.loads(head + '"'))  # an escape cut in two is no JSON
    if tail.endswith('"') and len(tail) > 1:
        assert value.endswith(json.loads('"' + tail))


def test_half_a_surrogate_pair_does_not_get_through():
    def broken():
        return "a\ud800b"

    def raises():
        raise ValueError("a\ud800b")

    assert run(broken) == "a?b"
    assert run(raises).encode()


# --- a file of tools ------------------------------------------------------------------------------

def write(folder, text, name="my_tools.py"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_public_functions_of_a_file(tmp_path):
    write(tmp_path, "def helper(x: int): return x + 1\n", "neighbour.py")
    path = write(tmp_path, "from __future__ import annotations\n"
                           "import json\nfrom dataclasses import dataclass\n"
                           "from neighbour import helper\n"
                           "def one(x: int): return helper(x)\n"
                           "def _hidden(x): ...\n"
                           "@dataclass\nclass Thing:\n    x: int\n"
                           "def two(): return Thing(2).x\n")
    functions = load_tools(path)
    assert list(functions) == ["one", "two"]
    assert run(functions["one"], x=1) == "2" and run(functions["two"]) == "2"


def test_a_list_of_tools_decides(tmp_path):
    path = write(tmp_path, "import math\ndef _area(r: float) -> float: return r * r\n"
                           "def other(): ...\nTOOLS = [_area]\n")
    assert list(load_tools(path)) == ["_area"]


@pytest.mark.parametrize("text, message", [
    ("def f(:\n", r"my_tools.py:1: "),
    ("import os\n\nimport no_such_module\n", r"my_tools.py:3: importing it raised "
                                              r"ModuleNotFoundError: No module"),
    ("raise SystemExit(0)", r"my_tools.py:1: importing it raised SystemExit: 0"),
    ("", r"my_tools.py: no tools in it"),
    ("import json\nfrom json import dumps\n_x = 1\ndef _f(): ...\n", r"no tools in it"),
    ("\0", r"my_tools.py: .*null bytes"),
    ("raise SyntaxError('no')", r"my_tools.py:1: importing it raised SyntaxError: no"),
    ("\nraise BaseException", r"my_tools.py:2: importing it raised BaseException"),
    ("raise GeneratorExit", r"my_tools.py:1: importing it raised GeneratorExit"),
    ("import os\nos.chdir('/')\nraise ValueError", r"my_tools.py:3: importing it raised ValueErr"),
    ("import sys\nsys.path.clear()\n1 / 0", r"my_tools.py:3: importing it raised ZeroDivision"),
    ("from minilora.config import UserError\nraise UserError('bad')", r"my_tools.py: bad$"),
    ("globals()[5] = lambda: 5", r"my_tools.py"),
    ("def __getattr__(name): return 1 / 0", r"my_tools.py: no tools in it"),
    ("TOOLS = 5", r"my_tools.py: TOOLS is of type int; write TOOLS = \[function\]"),
    ("def f(): ...\nTOOLS = f", r"my_tools.py: TOOLS is of type function; write TOOLS = \["),
    ("def TOOLS(): ...", r"my_tools.py: TOOLS is of type function"),
    ("def f(): ...\nTOOLS = {'f': f}", r"my_tools.py: TOOLS is of type dict"),
    ("class Odd(list):\n    def __iter__(self): 1 / 0\nTOOLS = Odd()",
     r"my_tools.py:2: importing it raised ZeroDivisionError"),
    ("class Odd:\n    __name__ = 5\n    def __call__(self): ...\n"
     "TOOLS = [Odd()]", r"my_tools.py: TOOLS holds <.*Odd object at .*; expected functions"),
    ("class Odd:\n    def __repr__(self): return 'a\\n' * 500\nTOOLS = [Odd()]",
     r"my_tools.py: TOOLS holds (a )+a?; expected functions"),
    ("class Odd:\n    def __getattr__(self, name): 1 / 0\n    def __call__(self): ...\n"
     "TOOLS = [Odd()]", r"my_tools.py:2: importing it raised ZeroDivisionError"),
    ("def f(x: [str]): ...", r"my_tools.py: tool f, parameter x: .*cannot be told"),
    ("TOOLS = [3]", r"TOOLS holds 3; expected functions"),
    ("import json\nTOOLS = [json]", r"TOOLS holds <module 'json'"),
    ("def f(): ...\ndef g(): ...\ng.__name__ = 'f'\n", r"two tools are called f"),
    ("def f(x): ...", r"tool f, parameter x: no type hint"),
])
def test_a_bad_file_is_told_in_one_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    write(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        load_tools("my_tools.py")
    assert "my_tools.py" in str(caught.value) and "\n" not in str(caught.value)


def test_ctrl_c_while_a_file_is_imported_ends_the_command(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        load_tools(write(tmp_path, "raise KeyboardInterrupt"))


def test_a_file_that_is_not_there(tmp_path):
    folder = tmp_path / "folder.py"
    folder.mkdir()
    for path in (tmp_path / "none.py", folder, write(tmp_path, "x", "tools.txt")):
        with pytest.raises(UserError, match="no such Python file"):
            load_tools(path)


# --- think, act, observe --------------------------------------------------------------------------

def talk(replies, functions=(get_weather,), dialect="hermes", **options):
    """What `converse` makes of a model that says these replies: messages and (kind, text)."""
    messages, said = [Message("user", "Weather?")], iter(replies)
    seen = []  # how many messages each reply could see

    def reply(history):
        seen.append(len(history))
        return next(said)

    named = {function.__name__: function for function in functions}
    events = list(converse(messages, reply, named, dialect, **options))
    return messages, events, seen


def hermes(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_think_call_observe_answer():
    messages, events, seen = talk([
        "<think>\nI need it.\n</think>\nLet me look.\n" + hermes("get_weather", city="Paris"),
        "Sunny."])
    result = '{"city": "Paris", "days": 1, "unit": "CELSIUS"}'
    call = ToolCall("get_weather", {"city": "Paris"})
    assert [(event.kind, event.text) for event in events] == [
        ("thinking", "I need it."), ("text", "Let me look."),
        ("call", 'get_weather(city="Paris")'), ("result", result), ("answer", "Sunny.")]
    assert [event.call for event in events] == [None, None, call, call, None]
    assert messages == [
        Message("user", "Weather?"),
        Message("assistant", "Let me look.", "I need it.", (call,)),
        Message("tool", result, name="get_weather"), Message("assistant", "Sunny.")]
    assert seen == [1, 3]


def test_several_calls_run_in_their_order_and_ids_come_along():
    values = [{"name": "get_weather", "arguments": {"city": city}, "id": f"id{city}"}
              for city in "AB"]
    messages, events, _ = talk(["[TOOL_CALLS] " + json.dumps(values), "Both."], dialect="mistral")
    assert [event.kind for event in events] == ["call", "result", "call", "result", "answer"]
    assert [message.tool_call_id for message in messages] == [None, None, "idA", "idB", None]


def test_errors_go_back_and_the_model_may_mend_them():
    messages, events, _ = talk([hermes("weather"), hermes("get_weather", town="Ur"),
                                hermes("get_weather", city="Ur"), "Dry."])
    assert [event.kind for event in events] == ["call", "result"] * 3 + ["answer"]
    assert ["error" in json.loads(message.content) for message in messages[2:7:2]] == [
        True, True, False]


def test_a_call_that_cannot_be_read_goes_back_as_it_stood_and_leaves_when_it_has_served():
    broken = '<tool_call>\n{"name": "get_weather"'
    messages, said = [Message("user", "Weather?")], iter([broken, hermes("nothing"), "Sorry."])
    seen = []

    def reply(history):
        seen.append(list(history))
        return next(said)

    events = list(converse(messages, reply, {}))
    assert [event.kind for event in events] == ["malformed", "call", "result", "answer"]
    assert seen[1][1] == Message("assistant", broken) and seen[1][2].role == "tool"
    assert "could not be read: not JSON" in json.loads(seen[1][2].content)["error"]
    assert seen[2][:3] == seen[1]  # for the whole question
    assert [message.role for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1].tool_calls == (ToolCall("nothing", {}),)


def test_two_calls_of_one_name_both_run():
    count = []

    def add():
        count.append(1)
        return len(count)

    messages, _, _ = talk([hermes("add") + "\n" + hermes("add"), "Two."], [add])
    assert [message.content for message in messages if message.role == "tool"] == ["1", "2"]


def test_a_model_that_never_stops_calling_is_told_and_stopped():
    reached = []

    def look(at: int):
        reached.append(at)

    messages, events, seen = talk([hermes("look", at=number) for number in range(9)], [look],
                                  rounds=3)
    assert reached == [0, 1, 2] and len(seen) == 5
    errors = [json.loads(event.text)["error"] for event in events[-5:] if event.kind == "result"]
    assert errors == ["not run; no more calls, for 3 rounds of calls were made: answer with what "
                      "is known"] * 2
    assert (events[-1].kind, events[-1].text) == ("limit",
                                                  "no answer: 3 rounds of calls were made")
    assert messages[-1] == Message("assistant", "[no answer: 3 rounds of calls were made]")
    assert len(messages) == 1 + 2 * 5 + 1


def test_a_model_may_still_answer_after_the_last_round():
    for replies in ([hermes("get_weather", city="Ur"), "Dry."],
                    [hermes("get_weather", city="Ur")] * 2 + ["Dry."]):
        messages, events, _ = talk(replies, rounds=1)
        assert (events[-1].kind, events[-1].text) == ("answer", "Dry.")
        assert messages[-1] == Message("assistant", "Dry.")


@pytest.mark.parametrize("reply", [hermes("get_weather", city=5), hermes("nothing"), "<tool_call>"])
def test_a_model_that_repeats_what_failed_is_stopped_early(reply):
    messages, events, seen = talk([reply] * 9, rounds=8)
    assert len(seen) == REPEATS + 2
    assert events[-1].text == f"no answer: the same call failed {REPEATS} times"
    assert any("no more calls" in event.text for event in events) is (reply != "<tool_call>")
    assert messages[-1].content == f"[{events[-1].text}]"
    assert all("<tool_call>" not in message.content for message in messages)


def test_a_call_that_succeeds_may_be_made_again():
    replies = [hermes("get_weather", city="Ur")] * 5 + ["Dry."]
    assert talk(replies)[1][-1].text == "Dry."


def test_a_turn_without_a_word_is_told_apart():
    messages, events, _ = talk(["<think>\nhm"])
    assert [(event.kind, event.text) for event in events] == [("thinking", "hm"), ("answer", "")]
    assert messages[-1] == Message("assistant", "[no answer]", "hm")


def test_text_of_the_model_is_never_evaluated():
    evil = '__import__("os").system("true")'
    reached = []

    def save(text: str):
        reached.append(text)

    talk([hermes("save", text=evil), hermes(evil), evil], [save])
    assert reached == [evil]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_answer_without_a_call_ends_at_once_in_every_dialect(dialect):
    messages, events, _ = talk([" Hello. "], (), dialect)
    assert [(event.kind, event.text) for event in events] == [("answer", "Hello.")]
    assert messages[-1] == Message("assistant", "Hello.")


@LAW
@given(asked=st.lists(st.integers(0, 3), min_size=1, max_size=5), system=st.booleans(),
       room=st.integers(0, 30), since=st.integers(0, 12))
def test_what_is_kept_of_a_long_chat(asked, system, room, since):
    """System, the latest question and its latest round stay; what goes is the oldest, and no more
    than need be; nothing comes back; what is left is a conversation."""
    messages = [Message("system", "s")] if system else []
    for number, calls in enumerate(asked):
        messages.append(Message("user", f"u{number}"))
        for _ in range(calls):
            messages += [Message("assistant", f"a{len(messages)}"),
                         Message("tool", f"t{len(messages)}")]
        if number < len(asked) - 1:
            messages.append(Message("assistant", f"a{len(messages)}"))

    def fits(some):
        return len(some) <= room

    kept, start = latest(messages, fits, since)
    assert kept[:system] == messages[:system] and kept[-1] is messages[-1]
    rest = kept[system:]
    assert rest[0].role == "user" and Message("user", f"u{len(asked) - 1}") in rest
    for before, after in zip(rest, rest[1:], strict=False):
        assert after.role != "tool" or before.role == "assistant"
    assert [message for message in messages if message in kept] == kept  # none twice, none moved
    question = messages.index(Message("user", f"u{len(asked) - 1}"))
    assert start >= min(since, question)
    assert latest(messages, fits, start) == (kept, start)
    for at in range(max(min(since, question), system), start):  # what is longer does not fit
        assert messages[at].role != "user" or not fits(messages[:system] + messages[at:])
    if not fits(kept):  # then nothing would
        assert len(rest) <= 3
    larger, earlier = latest(messages, lambda some: len(some) <= room + 1, since)
    assert earlier <= start and larger[len(larger) - len(rest) + 1:] == rest[1:]
