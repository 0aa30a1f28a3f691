"""What a model writes is data, and what a tool does is its own affair: a chat survives both.

Replies are ids, drawn at random or good ones mutated, read in a forked child that may take a
second for each and 64 MiB for all (hostile.py). Tools raise, hang, print, return what JSON has not:
each is a line for the user and a result for the model, and the chat goes on.
"""

import contextlib
import itertools
import json
import sys
import threading
import tracemalloc
from random import Random

import pytest
import torch
from conftest import load_tokenizer
from hostile import reading, survive
from tiny_tokenizer import make_tokenizer_model

from minilora.automaton import Automaton
from minilora.bfcl import Question
from minilora.chat import (
    Conversation,
    MalformedCall,
    Message,
    ToolCall,
    decode_reply,
    parse_tool_calls,
    render,
    split_reply,
    stop_ids,
)
from minilora.compare import REASON
from minilora.config import UserError
from minilora.constrain import Constraint, Vocabulary
from minilora.dialects import DIALECTS
from minilora.evaluate import check_reply
from minilora.notation import DEPTH, Written
from minilora.readers import openai_row, read_row
from minilora.tokenizer import Tokenizer
from minilora.tools import CALLS, check_arguments, converse, run_call, tool_schema

EACH = pytest.mark.parametrize("dialect", DIALECTS)
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {
    "type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "string"}}}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """One that knows the tokens of all dialects: each may turn up in a reply of another."""
    return load_tokenizer(make_tokenizer_model(tmp_path_factory.mktemp("tokenizer")), *DIALECTS)


def written(message: Message, tokenizer: Tokenizer, dialect: str) -> list[int]:
    """The ids of a reply as the renderer writes it, less what stops it."""
    asked = Conversation((Message("user", "?"),))
    start = len(render(asked, tokenizer, dialect, generate=True).ids)
    ids = render(Conversation((*asked.messages, message)), tokenizer, dialect).ids[start:]
    stops = stop_ids(tokenizer, dialect)
    return ids[:next(at for at, i in enumerate(ids) if i in stops)]


# --- any reply is read or refused -----------------------------------------------------------------

ODD = ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 80, '{"a":' * 70, '"a":1,"a":2,', "\\ud800",
       '"\\udc00"', "null", "true", "{}", "[]", '""', "\\", '"', "'", ",", ":", "}", "]", "\0",
       "\x1b[2J", "\n", "▁", " ", "é😀", "\u202e", "call:f{", "<escape>", "</think>",
       "<tool_call>", "[TOOL_CALLS] [", "<end_function_call>",
       '{"name": "f", "arguments": {"a": 1}}']
VALUES = [0, -1, 2.5, 1e300, True, None, "", "x", "<escape>", "é\n\"", [], [1, [2]], {},
          {"c": [{}]}]


def good_reply(rng: Random) -> Message:
    calls = tuple(ToolCall(rng.choice(["f", "get weather", "<f>"]),
                           dict(zip(rng.sample("abcd", rng.randint(0, 3)), rng.sample(VALUES, 4),
                                    strict=False)), rng.choice([None, "id1"]))
                  for _ in range(rng.choice([0, 1, 1, 2, 3])))
    return Message("assistant", rng.choice(["", "So.", "a <tool_call> b"]),
                   rng.choice(["", "Hm", "I call f"]), calls)


def any_reply(rng: Random, tokenizer: Tokenizer, dialect: str) -> list[int]:
    """Ids at random, or those of a good reply with some left out, doubled, moved or put in."""
    every = tokenizer.vocab_size + 9
    own, *tags = (list(map(tokenizer.token_id, DIALECTS[each].tokens)) for each in [
        dialect, *DIALECTS])
    tags = [*range(8), *itertools.chain(*tags)]  # and <pad>, <bos> and their like
    if rng.random() < 0.2:
        return [rng.choice(tags) if rng.random() < 0.3 else rng.randrange(every)
                for _ in range(rng.randint(0, 60))]
    ids = written(good_reply(rng), tokenizer, dialect)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        start, end = sorted(rng.choices(range(len(ids) + 1), k=2))
        few = min(end, start + rng.choice([0, 0, 1, 3]))
        before, part, after = ids[:start], ids[start:end], ids[end:]
        times = rng.choice([2, 2, 3, 40 if len(ids) < 2000 else 2])
        new = rng.choice([[], [rng.choice(own)], [rng.choice(tags)], [rng.randrange(every)],
                          tokenizer.encode(rng.choice(ODD))])
        ids = rng.choice([
            *[[*before, *new, *ids[few:]]] * 5, [*before, *part * times, *after],
            [*before, *part[::-1], *after], [*before, *part], [*before, *after]])
    return ids


def as_it_returns(message: Message, dialect: str) -> Message:
    """What a dialect's writer keeps of a message: ids of calls where it writes them."""
    return Message("assistant", message.content, message.thinking, tuple(
        ToolCall(call.name, call.arguments, call.id or None if dialect == "mistral" else None)
        for call in message.tool_calls))


def check_reading(ids: list[int], tokenizer: Tokenizer, dialect: str) -> bool:
    """The reply is read, comes back when it is written again, and can be data; or is refused."""
    reply = decode_reply(ids, tokenizer, dialect)
    tags = {tokenizer.token_id(tag): tag for tag in DIALECTS[dialect].tokens}
    control = (tags[i] for i in ids if i in tags)
    assert all(itertools.starmap(reply.has, zip(control, reply.controls, strict=True)))
    with contextlib.suppress(MalformedCall), reading():
        parse_tool_calls(str(reply), dialect)  # nobody knows which tags are control tokens
    try:
        with reading():
            message = split_reply(reply, dialect)
    except MalformedCall as error:
        line = str(error)
        assert line and len(line) < 200 and "\n" not in line, line
        return False
    again = written(message, tokenizer, dialect)
    assert split_reply(decode_reply(again, tokenizer, dialect), dialect) == as_it_returns(
        message, dialect), reply
    if message.content or message.tool_calls:
        row = json.loads(json.dumps(openai_row(Conversation((Message("user", "?"), message)))))
        assert read_row(row, lambda notice: None).messages[1] == message
    return True


@EACH
def test_any_reply_is_read_and_returns_or_is_refused(dialect, tokenizer, tmp_path, cases, tried):
    each, count = 40, cases(3400, 34_000) // 40 * 40

    def case(rng, folder):
        return sum(check_reading(any_reply(rng, tokenizer, dialect), tokenizer, dialect)
                   for _ in range(each)) or None

    accepted = survive(f"replies {dialect}", tmp_path / "case", count // each, case)
    assert accepted == count // each  # some of each forty are read
    tried("replies, random and mutated", count)


def calls_of(dialect: str, arguments: str, count: int) -> Written:
    """A reply of many calls, as the ids would give it."""
    opening, between, closing = DIALECTS[dialect].calls
    call = f"call:f{arguments}" if dialect == "functiongemma" else (
        f'{{"name": "f", "arguments": {arguments}}}')
    reply = Written(opening + between.join([call] * count) + closing)
    tokens = [token for token in DIALECTS[dialect].tokens if token in reply]
    reply.controls = sorted(at for token in tokens for at in range(len(reply))
                            if reply.startswith(token, at))
    return reply


def huge_replies(dialect: str):
    """What they are, and the start of the complaint; "" where it is read."""
    gemma = dialect == "functiongemma"
    quote = "<escape>" if gemma else '"'
    key = "{}" if gemma else '"{}"'
    many = ",".join(f"{key.format(f'k{n}')}:1" for n in range(20_000))
    yield calls_of(dialect, "{}", 20_000), ""
    yield calls_of(dialect, f"{{{key.format('a')}:{quote}{'x' * 10**6}{quote}}}", 1), ""
    yield calls_of(dialect, f"{{{many}}}", 1), ""
    yield calls_of(dialect, f"{{{many},{key.format('k19999')}:2}}", 1), "key 'k19999' occurs twice"
    yield calls_of(dialect, f"{{{key.format('a')}:[{'0,' * 60_000}0]}}", 1), ""
    yield calls_of(dialect, f"{{{key.format('a')}:{'9' * 10**5}}}", 1), "a number of 100000 digits"
    yield calls_of(dialect, f"{{{key.format('a')}:0.{'9' * 10**5}e{'9' * 10**5}}}", 1), "0.9999"
    yield calls_of(dialect, f"{{{key.format('a')}:{'[' * 10**5}", 1), "JSON nested deeper than 64"
    yield calls_of(dialect, f"{{{key.format('a')}:" * 10**5, 1), ""
    yield calls_of(dialect, f"{{{key.format('a')}:{quote}", 1), ""
    yield calls_of(dialect, "\\" * 10**6, 1), ""


@EACH
def test_a_huge_reply_is_read_in_time(dialect, tmp_path):
    """Each within a second. What takes the square of the length takes minutes."""
    replies = list(huge_replies(dialect))

    def case(rng, folder):
        reply, complaint = replies.pop(0)
        for text in (reply, str(reply)):
            try:
                with reading():
                    calls = parse_tool_calls(text, dialect)
                assert calls and not complaint
            except MalformedCall as error:
                assert str(error).startswith(complaint) and len(str(error)) < 200
        return None

    survive("huge", tmp_path / "case", len(replies), case)


@EACH
def test_the_deepest_call_that_is_read_can_be_written_as_data(dialect, tokenizer):
    def reply(depth):
        inner = {"a": 1}
        for _ in range(depth - 1):
            inner = {"a": inner}
        return decode_reply(written(Message("assistant", tool_calls=(ToolCall("f", inner),)),
                                    tokenizer, dialect), tokenizer, dialect)

    message = split_reply(reply(DEPTH), dialect)
    row = json.dumps(openai_row(Conversation((Message("user", "?"), message))))
    assert read_row(json.loads(row), print).messages[1] == message
    with pytest.raises(MalformedCall, match=f"\"arguments\" of 'f': .* deeper than {DEPTH} levels"):
        split_reply(reply(DEPTH + 1), dialect)


def test_an_id_that_only_the_table_has_is_no_text(tokenizer):
    size, (a,), (b,) = tokenizer.vocab_size, tokenizer.encode("a"), tokenizer.encode("b")
    assert decode_reply([a, size, size + 60, b], tokenizer) == "a\ufffd\ufffdb"


# --- whatever a tool does -------------------------------------------------------------------------

class Unreadable(Exception):
    def __str__(self):
        raise SystemExit("no")


class Wordless(Exception):
    def __str__(self):
        return 5


class Agreeable:
    """Has whatever it is asked for, and it is more of the same."""

    def __getattr__(self, name):
        return Agreeable()

    def __call__(self, *args):
        return self


class Rude(str):
    def __len__(self):
        raise KeyboardInterrupt

    __str__ = __getitem__ = encode = __len__


class Nameless:
    @property
    def __class__(self):
        raise SystemExit

    def __repr__(self):
        raise RecursionError


def raises(error):
    def tool():
        raise error
    return tool


def gives(make):
    def tool():
        return make()
    return tool


def recurse():
    return recurse()


def cyclic():
    value = {}
    value["a"] = [value]
    return value


def deep():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


def recurses():
    sys.setrecursionlimit(sys.getrecursionlimit())
    return recurse()


TOOLS = {
    **{f"raises {n}": (raises(error), said) for n, (error, said) in enumerate([
        (ValueError("a\nb\x1b[2J"), "ValueError: a b\x1b[2J"), (BaseException("x"), "BaseExc"),
        (SystemExit(3), "SystemExit: 3"), (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"), (MemoryError(), "MemoryError"),
        (Unreadable(), "Unreadable"), (Wordless(), "Wordless"),
        (ValueError("x" * 10_000_000), "ValueError: xxx"), (ValueError("a\ud800"), "ValueError: a"),
        (KeyError(Nameless()), ""), (ExceptionGroup("g", [OSError("o")]), "ExceptionGroup: g"),
        (SyntaxError("s", ("f", "not a number", None, 3)), ""), (UserError("u"), "UserError: u")])},
    "recurses": (recurses, "RecursionError"),
    **{f"gives {n}": (gives(make), said) for n, (make, said) in enumerate([
        (lambda: b"bytes", "a result of type bytes is not JSON"),
        (lambda: {1, "a", None}, None), (lambda: [float("nan")], "Out of range"),
        (lambda: float("-inf"), "Out of range"), (cyclic, "Circular"), (deep, "Recursion"),
        (lambda: (x for x in "ab"), "generator is not JSON"), (Agreeable, ""), (Nameless, ""),
        (lambda: {(1, 2): 3}, "keys must be"), (lambda: 10**100_000, "digits"),
        (lambda: {Nameless()}, ""), (object, "object is not JSON"), (lambda: tool_schema, ""),
        (lambda: Rude("text"), None), (lambda: "x" * 100_000_000, None),
        (lambda: "\\" * 1_000_000, None), (lambda: "\x1b[2J\ud800", None),
        (lambda: ["x" * 1_000_000] * 9, None), (lambda: {1: 1, "1": 2}, None)])},
}


@pytest.mark.parametrize("name", TOOLS)
def test_whatever_a_tool_does_is_a_line_for_the_model(name, tried):
    """None for a result; else how the error begins or what is in it."""
    tool, said = TOOLS[name]
    text = run_call({"tool": tool}, ToolCall("tool", {}), 20)
    assert type(text) is str and len(text) < 4100 and text.encode()
    if said is None:
        assert not text.startswith('{"error"')
    else:
        assert text.startswith('{"error": "') and said in text.replace("\\u001b", "\x1b")
        assert "\n" not in text
    tried("tools that misbehave", 1)


def test_a_chat_goes_on_whatever_its_tools_do():
    """And what stays of it is data."""
    functions = {name: tool for name, (tool, _) in TOOLS.items()}
    replies = (f"<tool_call>\n{json.dumps({'name': name, 'arguments': {}})}\n</tool_call>"
               for name in TOOLS)
    messages = [Message("user", "?")]
    events = list(converse(messages, lambda history: next(replies, "Done."), functions, rounds=99))
    assert [event.kind for event in events] == ["call", "result"] * len(TOOLS) + ["answer"]
    row = json.loads(json.dumps(openai_row(Conversation(tuple(messages)))))
    assert list(read_row(row, lambda notice: None).messages) == messages


def test_a_tool_that_will_not_end_costs_its_time_once():
    """It swallows what tells it to end; it is not begun a second time while it goes on."""
    begun, gate = [], threading.Event()

    def stubborn(n: int):
        begun.append(n)
        while not gate.is_set():
            with contextlib.suppress(BaseException):
                gate.wait()

    replies = (hermes("stubborn", n=n) for n in range(3))
    events = list(converse([Message("user", "?")], lambda history: next(replies, "Done."),
                           {"stubborn": stubborn}, timeout=0.05))
    told = [json.loads(event.text)["error"] for event in events if event.kind == "result"]
    gate.set()
    assert begun == [0] and events[-1].text == "Done."
    assert told[0] == "stubborn took longer than 0.05 seconds"
    assert all(line.startswith("stubborn is still at an earlier call") for line in told[1:])


def hermes(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


# --- whatever a model asks for --------------------------------------------------------------------

def converse_with(replies, functions):
    """Events, messages, and the longest history that the model was shown, in characters."""
    messages, said, sizes = [Message("user", "?")], iter(replies), []

    def reply(history):
        sizes.append(sum(len(message.content) for message in history))
        return next(said)

    return list(converse(messages, reply, functions)), messages, max(sizes)


def test_thousands_of_calls_in_one_reply_are_not_run():
    made = []

    def touch():
        made.append(1)
        return "x" * 10_000

    many = "\n".join([hermes("touch")] * 5000)
    events, messages, _ = converse_with([many, many, *["Enough."]], {"touch": touch})
    assert made == []
    assert [event.kind for event in events] == ["malformed", "malformed", "answer"]
    assert events[0].text == f"5000 calls in one reply; make {CALLS} at most"
    assert messages == [Message("user", "?"), Message("assistant", "Enough.")]
    most = "\n".join([hermes("touch")] * CALLS)
    events, _, size = converse_with([most, "Enough."], {"touch": touch})
    assert len(made) == CALLS and size < 7000  # the results share what the model is shown


def test_a_model_that_calls_for_ever_is_told_and_stopped():
    """The same call that succeeds, other calls each time, tools that nobody has, all at once."""
    made = []

    def touch(n: int = 0):
        made.append(n)

    endless = (hermes("touch", n=n) for n in itertools.count())
    for replies in (itertools.repeat(hermes("touch")), endless,
                    (hermes(f"tool{n}") for n in itertools.count()),
                    itertools.repeat("<tool_call>"), itertools.repeat("</tool_call>" * 1000)):
        made.clear()
        events, messages, size = converse_with(replies, {"touch": touch})
        assert events[-1].kind == "limit" and len(made) <= 8 and len(events) < 40
        assert messages[-1].content.startswith("[no answer:") and size < 60_000


@EACH
def test_any_replies_in_a_chat(dialect, tokenizer, cases, tried):
    """Some of them call a tool that there is. The question ends, and what stays is data."""
    count = cases(300, 5000)
    rng = Random(f"chat {dialect}")
    made = []

    def f(a: float = 0, b: str = ""):
        made.append((a, b))

    def reply(history):
        return decode_reply(any_reply(rng, tokenizer, dialect), tokenizer, dialect)

    for _ in range(count):
        messages = [Message("user", "?")]
        events = list(converse(messages, reply, {"f": f}, dialect, rounds=3))
        assert events[-1].kind in ("answer", "limit")
        conversation = Conversation(tuple(messages), (tool_schema(f),))
        render(conversation, tokenizer, dialect)
        row = json.loads(json.dumps(openai_row(conversation)))
        assert list(read_row(row, lambda notice: None).messages) == messages
    assert made
    tried("chats of such replies", count)


# --- how they are judged --------------------------------------------------------------------------

@EACH
def test_any_reply_is_judged(dialect, tokenizer, cases, tried):
    rng, count, kinds = Random(f"judged {dialect}"), cases(500, 5000), set()
    answers = [(), None, (ToolCall("f", {"a": 1}),), ({"f": {"a": [1, 2.5], "b": ["x", ""]}},)]
    for _ in range(count):
        reply = decode_reply(any_reply(rng, tokenizer, dialect), tokenizer, dialect)
        asked = Conversation((Message("user", "?"),), (TOOL,))
        case = check_reply(reply, Question(asked, rng.choice(answers), "c", "1", (TOOL,)), dialect)
        json.dumps(case.row())
        kinds.add(case.problem.kind if case.problem else "")
        assert case.ok or len(case.problem.reason) <= REASON + 2
    assert {"", "malformed", "wrong name", "no call"} <= kinds
    tried("replies judged", count)


def test_a_value_of_any_size_is_judged():
    tools = ({"name": "f", "parameters": {"properties": {"a": {"type": "float"}}}},)
    for value in (10**4000, -10**400, 1e308, "x" * 10**6, [[]] * 10**5, None, True):
        for answer in ({"f": {"a": [1.5]}}, ToolCall("f", {"a": 1})):
            question = Question(Conversation(()), (answer,), "c", "1", tools)
            case = check_reply(hermes("f", a=value), question, "hermes")
            assert not case.ok and len(case.problem.reason) <= REASON + 2


# --- schemas --------------------------------------------------------------------------------------

def of(schema, **more):
    return {"name": "f", "parameters": {"properties": {"x": schema}, **more}}


@pytest.mark.parametrize("schema, good, bad, complaint", [
    ({"const": 1}, [1, 1.0], [True, 2, "1", None], "expected 1, got"),
    ({"const": None}, [None], [0, False, ""], "expected null"),
    ({"enum": []}, [], [1], "expected one of "),
    ({"not": {"type": "string"}}, [1, None], ["a"], "expected anything but a string"),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 5}]}, [3, 5], [2, 6, 3.5], ""),
    ({"allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {}}}]},
     [{"a": 1, "b": 2}, {}], [{"a": "1"}, {"c": 1}], "x."),
    ({"type": "number", "anyOf": [{"minimum": 5}, {"maximum": 1}]}, [7, 0], [3, "a"], "expected"),
    ({"anyOf": [{"type": "object", "properties": {"a": {"type": "integer"}}},
                {"type": "object", "properties": {"b": {"type": "integer"}}}]},
     [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}], [{"c": 1}, 3], "an object"),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None], "an integer or "),
    ({"oneOf": [{"minimum": 1}, {"minimum": 5}]}, [1], [0, 7], "expected "),
    ({"oneOf": [{"properties": {"a": {}}, "additionalProperties": False},
                {"properties": {"b": {}}, "additionalProperties": False}]},
     [{"a": 1}, {"b": 1}], [{"a": 1, "b": 1}, {}], ""),
    ({"properties": {"kind": {}}, "oneOf": [{"properties": {"a": {}}, "required": ["a"]},
                                            {"properties": {"b": {}}, "required": ["b"]}]},
     [{"kind": 0, "a": 1}], [{"kind": 0}, {"a": 1, "z": 2}], ""),
    ({"$ref": "#/$defs/id"}, [3], ["3", 2], "x: expected "),
    ({"$ref": "#/$defs/a~1b"}, ["3"], [3], "expected a string"),
    ({"$ref": "#/$defs/tree"}, [{}, {"in": [{"in": []}]}], [{"in": [{"in": 1}]}, {"out": 1}], "x."),
    (True, [1, None, "a"], [], ""), (False, [], [1, None], "no such value"),
    ({"items": False}, [[]], [[1]], "x[0]: expected no such value"),
    ({"multipleOf": 0.01}, [1e300, 10**4000, 0.07, 19.99], [0.001], "a multiple of 0.01"),
])
def test_what_schemas_add_is_checked(schema, good, bad, complaint):
    tool = of(schema, **{"$defs": {
        "id": {"type": "integer", "minimum": 3}, "a/b": {"type": "string"},
        "tree": {"type": "object", "properties": {
            "in": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}}})
    assert [value for value in good if check_arguments(tool, {"x": value})] == []
    for value in bad:
        found = check_arguments(tool, {"x": value})
        assert found and complaint in found[0], value


def test_arguments_may_be_defined_elsewhere():
    tool = {"name": "f", "parameters": {"allOf": [{"$ref": "#/$defs/p"}], "$defs": {
        "p": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}}}
    assert check_arguments(tool, {"a": 1}) == []
    assert check_arguments(tool, {}) == ["a: missing, expected an integer"]
    assert check_arguments(tool, {"a": 1, "b": 1}) == ["b: unknown parameter (known: a)"]


def test_what_is_not_checked_is_said_once(capsys):
    check_arguments(of({"$ref": "https://example.com/x"}), {"x": 1})
    tool = of({"if": {"type": "string"}, "then": {"minLength": 9}})
    for _ in range(3):
        assert check_arguments(tool, {"x": "a"}) == []
    assert capsys.readouterr().err.count("if in a tool's schema is not checked") <= 1
    assert check_arguments(of({"patternProperties": {"^a": {}}, "properties": {}}),
                           {"x": {"ab": 1}}) == []


CYCLE: dict = {}
CYCLE["anyOf"] = [CYCLE]
WIDE = {"$defs": {"t": {"anyOf": [{"items": {"$ref": "#/$defs/t"}, "type": "array"}] * 3}}}
NEST = "[" * 40 + "1" + "]" * 40


@pytest.mark.parametrize("schema, more, value", [
    ({"$ref": "#"}, {}, 1), ({"$ref": "#/properties/x"}, {}, 1), (CYCLE, {}, 1),
    ({"$ref": "#/$defs/t"}, WIDE, json.loads(NEST)),
    ({"allOf": [{"$ref": "#/properties/x"}] * 9}, {}, {"a": 1}),
    ({"pattern": "(a+)+$"}, {}, "a" * 40 + "b"), ({"pattern": "(a|a)*$"}, {}, "a" * 40 + "b"),
    ({"pattern": "a*" * 40 + "b"}, {}, "a" * 40), ({"pattern": "a?" * 40 + "a" * 40}, {}, "a" * 40),
    ({"pattern": "((a{0,9}){0,9}){0,9}b"}, {}, "a" * 99), ({"pattern": ".*b"}, {}, "a" * 10**5),
    ({"pattern": "(a|a){40}b"}, {}, "a" * 60), ({"pattern": 5}, {}, "a"),
    ({"pattern": "("}, {}, "a"), ({"type": "array"}, {}, [0] * 10**6),
    ({"items": {}}, {}, [0] * 10**6),
    ({"properties": {f"k{n}": {} for n in range(500)}}, {}, {f"j{n}": 0 for n in range(10**5)}),
    ({"uniqueItems": True}, {}, [[n] for n in range(10**5)]),
    ({"enum": [[[n]] for n in range(10**5)]}, {}, 7), ({"type": 5}, {}, 1), ({"type": [[]]}, {}, 1),
    ({"properties": []}, {}, {}), ({"properties": {"a": 3}}, {}, {"a": 1}), ("x", {}, 1),
    ({"required": 3}, {}, {}), ({"anyOf": 3}, {}, 1), ({"allOf": "ab"}, {}, 1), (None, {}, 1),
    ({"enum": 3}, {}, 1), ({"oneOf": {"a": 1}}, {}, 1), ({"minimum": "x" * 10**6}, {}, 1),
    ({"multipleOf": 1e-300}, {}, 10**4000), ({"multipleOf": float("nan")}, {}, 1),
    ({"$ref": ["a"]}, {}, 1), ({"$ref": "#/" + "a/" * 10**5}, {}, 1), ({"not": 7}, {}, 1)])
def test_a_hostile_schema_is_checked_or_refused_in_time(schema, more, value, tmp_path):
    def case(rng, folder):
        try:
            with reading():
                found = check_arguments(of(schema, **more), {"x": value})
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert len(found) <= 20 and all(len(line) < 9000 for line in found)

    survive("schema", tmp_path / "case", 1, case)


# --- calls held to a schema -----------------------------------------------------------------------

def held_to(tool, arguments, tokenizer, dialect):
    """Walks through the vocabulary, ways to go on that were looked at and bytes of memory until the
    right reply was written, of which no id is barred."""
    call = ToolCall(tool["name"], arguments)
    ids = written(Message("assistant", tool_calls=(call,)), tokenizer, dialect)
    words, walks, looked = Vocabulary(tokenizer), [], []
    walk, read = Constraint._walk, Automaton.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Automaton, "read", lambda *each: looked.append(len(each[1])) or read(*each))
        patch.setattr(Constraint, "_walk", lambda *each: walks.append(1) or walk(*each))
        tracemalloc.start()
        constraint = Constraint(words, [tool], dialect)
        for place, new in enumerate(ids):
            logits = torch.zeros(words.size)
            constraint.bar(logits, len(ids) - place + 9)  # the room for a closing tag and a stop
            assert logits[new] == 0, place
            constraint.take(new)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return len(walks), sum(looked), memory


@pytest.mark.parametrize("place, size, dialect", [
    *itertools.product(["name", "key", "enum"], [1200], DIALECTS), ("enum", 20_000, "hermes")])
def test_a_long_text_of_a_schema_takes_no_more_than_it_is_long(place, size, dialect, tokenizer):
    name, key, value = (("What a text this is! " * size)[:size] if place == each else "f"
                        for each in ("name", "key", "enum"))
    tool = {"name": name, "parameters": {"properties": {key: {"enum": [value, "x"]}},
                                         "required": [key]}}
    _, looked, memory = held_to(tool, {key: value}, tokenizer, dialect)
    assert looked < 4 * (size + 200) and memory < 800 * (size + 200)


@EACH
def test_thousands_of_choices_are_looked_at_together(dialect, tokenizer):
    """Of an enum and of keys: one walk for all of them, in which each is looked at once a byte."""
    many = [f"value {n:03} of these" for n in range(1000)]
    tool = {"name": "f", "parameters": {"properties": {"a": {"enum": many}}, "required": ["a"]}}
    walks, looked, _ = held_to(tool, {"a": many[567]}, tokenizer, dialect)
    assert walks < 200 and looked < 25 * len(many)
    keys = many[:200]
    tool = {"name": "f", "parameters": {"properties": dict.fromkeys(keys, {"type": "integer"})}}
    walks, looked, _ = held_to(tool, {keys[150]: 1, keys[3]: 2}, tokenizer, dialect)
    assert walks < 200 and looked < 3 * 25 * len(keys)


def test_an_object_of_more_keys_than_that_is_any_object(tokenizer):
    words = Vocabulary(tokenizer)
    for count, loose in ((200, {}), (201, {"f": {"properties", "required",
                                                 "additionalProperties"}})):
        keys = [f"k{n}" for n in range(count)]
        tool = {"name": "f", "parameters": {"properties": dict.fromkeys(keys, {}),
                                            "required": keys}}
        assert Constraint(words, [tool], "hermes").loose == loose
    assert held_to(tool, {"k7": 1, "z": [None]}, tokenizer, "hermes")
