"""Questions and what is right: from conversations, and from files in the leaderboard's form."""

import json

import pytest
from conftest import TOOL, real_input

from minilora.bfcl import ask, read_questions
from minilora.chat import Conversation, Message, ToolCall
from minilora.compare import check_calls
from minilora.config import UserError

FUNCTION = {"name": "weather.get", "description": "Weather.", "parameters": {
    "type": "dict", "required": ["city"], "properties": {
        "city": {"type": "string"}, "days": {"type": "float"},
        "more": {"type": "tuple", "items": {"type": "any"}}}}}
TRUTH = [{"weather.get": {"city": ["Paris"], "days": [2.0, ""]}}]
OWN = {"tools": [TOOL], "messages": [
    {"role": "user", "content": "Weather in Paris and Rome?"},
    {"role": "assistant", "tool_calls": [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
        for city in ("Paris", "Rome")]},
    {"role": "tool", "content": "Rain."}, {"role": "tool", "content": "Sun."},
    {"role": "assistant", "content": "Rain in Paris, sun in Rome."}]}


def row(id, **changed):
    return {"id": id, "question": [[{"role": "system", "content": "Be brief."},
                                    {"role": "user", "content": f"{id}?"}]],
            "function": [FUNCTION], **changed}


def answer(id, truth=None):
    return {"id": id, "ground_truth": TRUTH if truth is None else truth}


def write(path, rows, array=False):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) if array else
                    "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_the_leaderboard(tmp_path):
    data = write(tmp_path / "simple_python.jsonl", [row("simple_python_0"), row("simple_python_1")])
    write(tmp_path / "simple_python.answers.jsonl",
          [answer("simple_python_1", [{"weather.get": {"city": ["Rome"]}}]),
           answer("simple_python_0")])  # found by id, whatever the order
    first, second = read_questions(data)
    assert (first.id, first.category) == ("simple_python_0", "simple_python")
    assert first.accepted == tuple(TRUTH)
    assert second.accepted[0]["weather.get"]["city"] == ["Rome"]
    conversation = first.conversation
    assert conversation.messages == (Message("system", "Be brief."),
                                     Message("user", "simple_python_0?"))
    assert conversation.source == f"{data}:1 (row 1)"
    # Shown in JSON Schema's words, checked in the leaderboard's.
    shown = conversation.tools[0]
    assert shown["type"] == "function" and shown["function"]["name"] == "weather.get"
    assert shown["function"]["parameters"]["type"] == "object"
    assert shown["function"]["parameters"]["properties"]["days"] == {"type": "number"}
    assert first.tools == (FUNCTION,)
    call = ToolCall("weather.get", {"city": "paris", "days": 2})
    assert check_calls([call], first.tools, first.accepted) == (True, "")


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("name, beside", [
    ("BFCL_v4_multiple.json", "possible_answer/BFCL_v4_multiple.json"),
    ("multiple.json", "multiple.answers.json"), ("multiple.jsonl", "elsewhere.jsonl")])
def test_where_answers_are_found(tmp_path, name, beside, array):
    data = write(tmp_path / name, [row("multiple_0")], array)
    answers = write(tmp_path / beside, [answer("multiple_0")], array)
    given = answers if "elsewhere" in beside else ""
    assert [question.accepted for question in read_questions(data, given)] == [tuple(TRUTH)]
    (tmp_path / beside).unlink()
    with pytest.raises(UserError, match="no such file" if given else "multiple_0 is missing"):
        read_questions(data, given)


def test_given_answers_come_before_those_beside(tmp_path):
    data = write(tmp_path / "simple.jsonl", [row("simple_0")])
    write(tmp_path / "simple.answers.jsonl", [answer("simple_0")])
    rome = answer("simple_0", [{"weather.get": {"city": ["X"]}}])
    other = write(tmp_path / "other.jsonl", [rome])
    assert read_questions(data, other)[0].accepted[0]["weather.get"] == {"city": ["X"]}
    nothing = write(tmp_path / "nothing.jsonl", [answer("simple_9")])
    with pytest.raises(UserError, match=r"row 1.*simple_0 is not in the files of --answers"):
        read_questions(data, nothing)


@pytest.mark.parametrize("id, category, accepted", [
    ("simple_3", "simple", tuple(TRUTH)), ("live_simple_12-3-0", "live_simple", tuple(TRUTH)),
    ("parallel_multiple_7", "parallel_multiple", tuple(TRUTH)),
    ("irrelevance_1", "irrelevance", ()), ("live_irrelevance_0-0-0", "live_irrelevance", ()),
    ("live_relevance_0-0-0", "live_relevance", None), ("7", "mine", tuple(TRUTH)),
])
def test_the_category_is_in_the_id(tmp_path, id, category, accepted):
    data = write(tmp_path / "mine.json", [row(id)])
    if accepted:
        write(tmp_path / "mine.answers.json", [answer(id)])
    question, = read_questions(data)
    assert (question.category, question.accepted) == (category, accepted)


def test_no_tool_may_be_offered(tmp_path):
    """As in a few rows of live_irrelevance."""
    data = write(tmp_path / "q.jsonl", [row("live_irrelevance_1-0-0", function=[])])
    question, = read_questions(data)
    assert question.tools == question.conversation.tools == question.accepted == ()


@pytest.mark.parametrize("bad, told", [
    (row("multi_turn_base_0"), "multi_turn_base_0 is scored over several turns"),
    (row("memory_kv_3"), "leave this file out"),
    (row("simple_0", question=[[{"role": "user", "content": "A?"}]] * 2), "several turns"),
    (row("simple_java_0"), "another language than Python"),
    (row("simple_javascript_0"), "another language than Python"),
    ({**row("simple_0"), "id": 3}, "id is missing or not a text"),
    (row("simple_0", question="A?"), "question is missing or not a list"),
    (row("simple_0", question=[{"role": "user", "content": "A?"}]), "list of one list of messages"),
    (row("simple_0", question=[[{"role": "tool", "content": "A?"}]]), "with role and content"),
    (row("simple_0", question=[[{"role": "user"}]]), "with role and content"),
    (row("simple_0", function={}), "function is missing or not a list"),
    (row("simple_0", question=[[]]), "with role and content"),
    (row("simple_0", function=["f"]), r"function\[0\] is not an object with name"),
    (row("simple_0", function=[FUNCTION, {"name": "f"}]), r"function\[1\] is not an object"),
    (row("simple_0"), "the answer to simple_0 is missing; expected it in q.answers.jsonl or "
                      "possible_answer/q.jsonl"),
])
def test_a_row_that_cannot_be_asked_is_named(tmp_path, bad, told):
    data = write(tmp_path / "q.jsonl", [row("irrelevance_0"), bad])
    with pytest.raises(UserError, match=rf"q.jsonl:2 \(row 2\): .*{told}") as error:
        read_questions(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad, told", [
    ({"id": "simple_0"}, r"row 2\): expected an object with id and ground_truth"),
    (answer("simple_0", "f()"), r"row 2\): expected an object with id and ground_truth"),
    (answer("irrelevance_0"), r"row 2\): a second answer to irrelevance_0"),
    (answer("simple_0", [{"rain": {}}]), r"q.jsonl:1 .*'rain', which is not among the tools"),
    (answer("simple_0", [{"weather.get": {"city": "Paris"}}]), "city is 'Paris'; expected a list"),
    (answer("simple_0", ["f()"]), "accepted answer 'f..'"),
])
def test_an_answer_that_is_none_is_named(tmp_path, bad, told):
    data = write(tmp_path / "q.jsonl", [row("simple_0")])
    write(tmp_path / "q.answers.jsonl", [answer("irrelevance_0"), bad])
    with pytest.raises(UserError, match=told):
        read_questions(data)


def test_broken_lines_are_named(tmp_path):
    data = write(tmp_path / "q.jsonl", [row("irrelevance_0")])
    with open(data, "a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"q.jsonl:2 \(row 2\): not JSON"):
        read_questions(data)


# --- own conversations ----------------------------------------------------------------------------

def test_own_conversations_are_asked_for_their_first_turn_or_for_all(tmp_path):
    data = write(tmp_path / "own.jsonl", [OWN])
    question, = read_questions(data)
    assert (question.category, question.id) == ("several calls", f"{data}:1 (row 1)")
    assert [turn.role for turn in question.conversation.messages] == ["user"]
    assert question.accepted == (ToolCall("get_weather", {"city": "Paris"}),
                                 ToolCall("get_weather", {"city": "Rome"}))
    first, second = read_questions(data, every_turn=True)
    assert first.accepted == question.accepted and first.conversation == question.conversation
    assert (second.category, second.accepted) == ("no call", ())
    assert [turn.role for turn in second.conversation.messages] == [
        "user", "assistant", "tool", "tool"]  # the true turns before
    assert (first.id, second.id) == (f"{data}:1 (row 1) turn 1", f"{data}:1 (row 1) turn 2")


def test_a_conversation_without_a_reply_is_named():
    with pytest.raises(UserError, match="held_out.jsonl:7: no assistant turn"):
        ask([Conversation((Message("user", "Hi."),), source="held_out.jsonl:7")])


def test_files_of_both_forms_are_mixed(tmp_path):
    """Own files are told apart where there are several; answers in a folder are no questions."""
    folder = tmp_path / "data"
    write(folder / "irrelevance.jsonl", [row("irrelevance_0")])
    write(folder / "simple.jsonl", [row("simple_0")])
    write(folder / "simple.answers.jsonl", [answer("simple_0")])
    one = write(folder / "own.jsonl", [OWN])
    assert [question.category for question in read_questions(str(folder))] == [
        "irrelevance", "several calls", "simple"]
    two = write(tmp_path / "more.jsonl", [OWN, OWN])
    assert [question.category for question in read_questions(f"{two},{folder}")] == [
        f"{two}: several calls"] * 2 + ["irrelevance", f"{one}: several calls", "simple"]
    with pytest.raises(UserError, match="no question in it"):
        read_questions(str(folder / "simple.answers.jsonl"))


# --- the leaderboard's own files, where they are at hand ------------------------------------------

@pytest.mark.parametrize("category, count", [
    ("simple_python", 400), ("multiple", 200), ("irrelevance", 240)])
def test_the_leaderboards_files(category, count):
    questions = read_questions(str(real_input("bfcl") / f"{category}.jsonl"))
    assert {question.category for question in questions} == {category}
    assert len({question.id for question in questions}) == len(questions) == count
    assert all(bool(question.accepted) == (category != "irrelevance") for question in questions)
