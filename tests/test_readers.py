"""readers.py: rows of four layouts, what is wrong with a file or a row."""

import json

import pytest
from conftest import LAW, TOOL
from hypothesis import given
from hypothesis import strategies as st

from minilora.chat import Message, ToolCall, render
from minilora.config import UserError
from minilora.readers import read_conversations


@pytest.fixture
def reader(tmp_path):
    """read(rows) -> conversations, problems, notices; rows are objects, or lines as they are."""
    def read(*rows, name="data.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
                 for row in rows]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        problems, notices = [], []
        found = read_conversations(tmp_path / name, problems.append, notices.append)
        return found, problems, notices
    return read


FLAT = TOOL["function"]
ARGUMENTS = {"city": "Zürich", "days": None}
RESULT = '{"sky": "clear"}'


def chat(*messages, **row) -> dict:
    """A row in OpenAI's layout from (role, content or fields) pairs."""
    return {"messages": [{"role": role, **({"content": value} if isinstance(value, str) else value)}
                         for role, value in messages], **row}


def call(arguments=ARGUMENTS, name="get_weather") -> dict:
    return {"tool_calls": [{"id": "c1", "type": "function",
                            "function": {"name": name, "arguments": arguments}}]}


def tagged(value) -> str:
    return f"<tool_call>\n{value}\n</tool_call>"


# --- the layouts ----------------------------------------------------------------------------------

_CALL_JSON = json.dumps({"name": "get_weather", "arguments": ARGUMENTS})
LAYOUTS = {
    "openai": chat(("system", "Brief."), ("user", "Weather?"), ("assistant", call()),
                   ("tool", {"content": RESULT, "tool_call_id": "c1"}), ("assistant", "Clear."),
                   tools=[TOOL]),
    "arguments as text, flat tools as text": chat(
        ("developer", "Brief."), ("user", "Weather?"),
        ("assistant", {"content": None, **call(json.dumps(ARGUMENTS))}), ("tool", RESULT),
        ("assistant", "Clear."), tools=json.dumps([{"type": "function", **FLAT}])),
    "older function_call": chat(
        ("system", "Brief."), ("user", {"content": [{"type": "text", "text": "Weather?"}]}),
        ("assistant", {"content": "", "function_call": {
            "name": "get_weather", "arguments": json.dumps(ARGUMENTS)}}),
        ("function", {"name": "get_weather", "content": RESULT}), ("assistant", "Clear."),
        functions=[FLAT]),
    "sharegpt with roles": {"system": "Brief.", "conversations": [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": _CALL_JSON}, {"from": "observation", "value": RESULT},
        {"from": "gpt", "value": "Clear."}], "tools": json.dumps([FLAT])},
    "sharegpt with tags": {"conversations": [
        {"from": "system", "value": "Brief. <tools> " + json.dumps([TOOL]) + " </tools>"},
        {"from": "human", "value": "Weather?"}, {"from": "gpt", "value": tagged(_CALL_JSON)},
        {"from": "tool", "value": f"<tool_response>\n{RESULT}\n</tool_response>"},
        {"from": "gpt", "value": "Clear."}]},
    "sharegpt with tags as Python prints": {"conversations": [
        {"from": "system", "value": "Brief.\n<tools>\n" + str([TOOL]) + "\n</tools>"},
        {"from": "human", "value": "Weather?"},
        {"from": "gpt", "value": tagged({"arguments": ARGUMENTS, "name": "get_weather"})},
        {"from": "human", "value": f"<tool_response>\n{RESULT}\n</tool_response>"},
        {"from": "gpt", "value": "Clear."}]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_as_the_same_conversation(reader, layout):
    (found,), problems, notices = reader(LAYOUTS[layout])
    assert problems == []
    assert [" as Python prints them" in notice for notice in notices] == (
        [True, True] if "Python" in layout else [])
    bare = [(m.role, m.content, tuple((c.name, c.arguments) for c in m.tool_calls))
            for m in found.messages]
    assert bare == [("system", "Brief.", ()), ("user", "Weather?", ()),
                    ("assistant", "", (("get_weather", ARGUMENTS),)), ("tool", RESULT, ()),
                    ("assistant", "Clear.", ())]
    assert found.tools == (TOOL,)


def test_fields_that_only_some_layouts_have(reader):
    (found,), problems, _ = reader(chat(
        ("system", " "), ("user", "?"),
        ("assistant", {"content": "Hm.", "reasoning_content": "Why?", **call("")}),
        ("tool", {"content": {"a": 1}, "tool_call_id": "c1", "name": "get_weather"}),
        ("assistant", "<think>\nSo.\n</think>\nYes."), ("user", "!"),
        ("assistant", {"content": tagged(_CALL_JSON), "thinking": "Now."}),
        tools=[{**TOOL, "strict": True}]))
    assert problems == []
    assert found.messages == (
        Message("user", "?"),
        Message("assistant", "Hm.", "Why?", (ToolCall("get_weather", {}, "c1"),)),
        Message("tool", '{"a": 1}', name="get_weather", tool_call_id="c1"),
        Message("assistant", "Yes.", "So."), Message("user", "!"),
        Message("assistant", "", "Now.", (ToolCall("get_weather", ARGUMENTS),)))
    assert found.tools == ({**TOOL, "strict": True},)


def test_calls_side_by_side_are_one_turn(reader):
    """A text and then calls, calls after calls, a list of calls: the model wrote them in one go."""
    two = f"[{_CALL_JSON}, {_CALL_JSON}]"
    (found,), problems, _ = reader({"conversations": [
        {"from": "human", "value": "?"}, {"from": "gpt", "value": "Wait."},
        {"from": "function_call", "value": _CALL_JSON}, {"from": "function_call", "value": two},
        {"from": "observation", "value": "1"}, {"from": "tool", "value":
         "<tool_response>2</tool_response>\n<tool_response>\n3\n</tool_response>"},
        {"from": "gpt", "value": "Done."}], "tools": [FLAT]})
    assert problems == []
    assert [len(m.tool_calls) for m in found.messages] == [0, 3, 0, 0, 0, 0]
    assert [m.content for m in found.messages] == ["?", "Wait.", "1", "2", "3", "Done."]


def test_tools_in_a_system_text(reader):
    """Prose may speak of the tags; one object a line is as good as a list; the row's own win."""
    prose = "Signatures are within <tools> </tools> tags.\n<tools>\n{}\n</tools>\nUse them."
    other = {"type": "function", "function": {"name": "clock"}}
    turns = (("user", "?"), ("assistant", "!"))
    lines = prose.format(json.dumps(TOOL) + "\n" + json.dumps(other))
    (two, own), problems, notices = reader(chat(("system", lines), *turns),
                                           chat(("system", lines), *turns, tools=[FLAT]))
    assert problems == []
    assert two.tools == (TOOL, other) and own.tools == (TOOL,)
    assert two.messages[0].content == "Signatures are within <tools> </tools> tags. Use them."
    assert len(notices) == 1 and "(row 2) has other tools in its system message" in notices[0]


def test_a_call_of_a_tool_not_on_offer_is_noticed(reader):
    row = chat(("user", "?"), ("assistant", call(name="nope")), tools=[FLAT])
    found, problems, notices = reader(row, row)
    assert len(found) == 2 and not problems
    assert len(notices) == 1 and "not among its tools (and 1 more rows" in notices[0]


arguments = st.dictionaries(st.text(), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just("</tool_call>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6), max_size=4)


@LAW
@given(wanted=st.lists(st.tuples(st.text(min_size=1), arguments), min_size=1, max_size=3))
def test_calls_are_read_as_they_were_written(tmp_path_factory, wanted):
    values = [{"name": name, "arguments": value} for name, value in wanted]
    function_calls = [{"from": "function_call", "value": json.dumps(value)} for value in values]
    tags = "\n".join(tagged(json.dumps(value, ensure_ascii=False)) for value in values)
    rows = [
        chat(("user", "?"), ("assistant", {"tool_calls": [{"function": v} for v in values]})),
        chat(("user", "?"), ("assistant", {"tool_calls": [
            {"function": {**v, "arguments": json.dumps(v["arguments"])}} for v in values]})),
        {"conversations": [{"from": "human", "value": "?"}, *function_calls]},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": tags}]},
    ]
    path = tmp_path_factory.mktemp("law") / "data.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    found = read_conversations(path, on_notice=lambda notice: None)
    for conversation in found:
        assert [(c.name, c.arguments) for c in conversation.messages[-1].tool_calls] == wanted
    assert len(found) == 4


# --- files ----------------------------------------------------------------------------------------

HELLO = chat(("user", "Hello"), ("assistant", "Hi\u2028there"))


def test_arrays_and_lines_read_alike_whatever_the_name(tmp_path):
    texts = {"a.json": json.dumps([HELLO, HELLO], indent=1), "b.json": json.dumps([HELLO, HELLO]),
             "c.jsonl": "\n\n".join([json.dumps(HELLO, ensure_ascii=False)] * 2) + "\n",
             "d.json": "\ufeff" + "\r\n".join([json.dumps(HELLO)] * 2)}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    found = read_conversations([tmp_path / name for name in texts])
    assert len(found) == 8 and len({conversation.messages for conversation in found}) == 1
    where = [conversation.source.rpartition("/")[2] for conversation in found]
    second = 1 + texts["a.json"].split("\n").index(" {", 2)
    assert where == ["a.json:2 (row 1)", f"a.json:{second} (row 2)", "b.json:1 (row 1)",
                     "b.json:1 (row 2)", "c.jsonl:1 (row 1)", "c.jsonl:3 (row 2)",
                     "d.json:1 (row 1)", "d.json:2 (row 2)"]


@pytest.mark.parametrize("text, problem", [
    ("", "data: no row in it"),
    ("[ ]", "data:1: no row in it"),
    ("not JSON", "data:1 (row 1): not JSON"),
    ('{"messages": [', "data:1 (row 1): not JSON"),
    ('[\n{"messages": []},\n{"messages": [}]', "data:3 (row 2): not JSON"),
    ('[{} {}]', "data:1 (row 1): no comma and no ]"),
    ('[{}', "data:1 (row 1): no comma and no ]"),
    ('[{},]', "data:1 (row 2): not JSON"),
    ('[{}]\n7', "data:2: text after the end of the array"),
    ('[{}]]', "data:1: text after the end of the array"),
    ('{"a": 1, "a": 2}', "'a' occurs twice"),
    ('{"a": NaN}', "NaN"),
    ("[" * 100_000, "nested deeper"),
])
def test_what_is_wrong_with_a_file(tmp_path, text, problem):
    (tmp_path / "data").write_text(text)
    problems = []
    assert read_conversations(tmp_path / "data", problems.append) == []
    assert problem in "\n".join(problems)
    assert all(line.startswith(str(tmp_path)) and "\n" not in line for line in problems)
    with pytest.raises(UserError):
        read_conversations(tmp_path / "data")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": "\xe9"}')
    for name, problem in [("none.jsonl", "no such file"), ("latin.jsonl", "UTF-8"), ("", "read")]:
        with pytest.raises(UserError, match=problem):
            read_conversations(tmp_path / name, on_problem=lambda problem: None)


def test_bad_rows_are_named_and_the_others_are_read(reader):
    found, problems, _ = reader(HELLO, "{", HELLO, {"messages": []}, "", HELLO)
    assert [c.source.rpartition(":")[2] for c in found] == ["1 (row 1)", "3 (row 3)", "6 (row 5)"]
    assert [problem.rpartition("data.jsonl")[2].partition(": ")[0] for problem in problems] == [
        ":2 (row 2)", ":4 (row 4)"]


USER, REPLY = ("user", "?"), ("assistant", "!")


@pytest.mark.parametrize("row, problem", [
    (7, "not an object"),
    ({}, "no messages in the row; expected messages or conversations, not an empty object"),
    ({"prompt": "a", "response": "b"}, "not 'prompt', 'response'"),
    ({"messages": {}}, "messages is not a list"),
    ({"messages": ["a"]}, "messages[0] is not an object"),
    (chat(("robot", "a")), "messages[0]: the role is 'robot'; expected one of system"),
    ({"messages": [{"content": "a"}]}, "messages[0]: the role is None"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0]: the role is ['user']"),
    (chat(("user", {"content": 7})), "messages[0]: the content is int; expected text"),
    (chat(("user", " ")), "messages[0]: the user says nothing"),
    (chat(("system", "a")), "no user message"),
    (chat(REPLY), "messages[0]: an assistant message at the start"),
    (chat(USER, USER), "messages[1]: a user message after a user message"),
    (chat(USER, REPLY, REPLY), "messages[2]: a second assistant message in a row"),
    (chat(USER, ("assistant", call()), REPLY), "messages[2]: a second assistant message in a row"),
    (chat(USER, REPLY, ("assistant", {"content": "b", **call()})), "messages[2]: a second assist"),
    (chat(USER, ("system", "a")), "messages[1]: a system message later on"),
    (chat(("system", "a"), USER, REPLY, system="b"), "messages[0]: a system message later on"),
    (chat(USER, REPLY, system=["a"]), "system: the content is list; expected text"),
    (chat(USER, ("assistant", "")), "messages[1]: the assistant says nothing and calls nothing"),
    (chat(USER, REPLY, ("tool", "a")), "messages[2]: a tool result without a call"),
    (chat(USER, ("tool", "a")), "messages[1]: a tool result without a call"),
    (chat(USER, ("assistant", call()), ("tool", "a"), ("tool", "b")), "messages[3]: a tool result"),
    (chat(USER, ("assistant", call()), ("tool", {"content": "a", "tool_call_id": "c9"})),
     "messages[2]: tool_call_id 'c9' is of no call"),
    (chat(USER, ("assistant", call()), ("tool", "a"), USER), "a user message after a tool message"),
    (chat(USER, ("assistant", {"tool_calls": {}, "content": 3})), "the content is int"),
    (chat(USER, ("assistant", {"tool_calls": {"a": 1}})), "messages[1].tool_calls is not a list"),
    (chat(USER, ("assistant", {"tool_calls": ["a"]})), "messages[1]: a call is not an object"),
    (chat(USER, ("assistant", {"tool_calls": [{"function": "a"}]})), "function of a call"),
    (chat(USER, ("assistant", call("{"))), "messages[1]: arguments: not JSON"),
    (chat(USER, ("assistant", call("[]"))), 'messages[1]: "arguments" of \'get_weather\''),
    (chat(USER, ("assistant", call('{"a": 1, "a": 1}'))), "'a' occurs twice"),
    (chat(USER, ("assistant", call(name=""))), 'messages[1]: "name" of a call is missing'),
    (chat(USER, ("assistant", {"content": tagged("{}")})), 'messages[1]: "name" of a call'),
    (chat(USER, ("assistant", {"content": tagged("{'name'")})), "messages[1]: not JSON"),
    (chat(USER, ("assistant", {"content": tagged("{'a': open('b')}")})), "messages[1]: not JSON"),
    (chat(USER, ("assistant", {"content": tagged(_CALL_JSON), **call()})), "calls both in the"),
    (chat(USER, ("assistant", call()), ("tool", "<tool_response>a</tool_response>b")),
     "messages[2]: text outside <tool_response>"),
    (chat(USER, ("function_call", "f()")), "messages[1]: not JSON"),
    (chat(USER, ("assistant", call()), ("tool", {"name": 3})), "messages[2].name is not text"),
    (chat(USER, REPLY, tools="["), "tools: not JSON"),
    (chat(USER, REPLY, tools={"name": "f"}), "tools is not a list"),
    (chat(USER, REPLY, tools=["f"]), "tools[0] is not an object"),
    (chat(USER, REPLY, tools=[{"name": 3}]), "tools[0]: the name is missing"),
    (chat(USER, REPLY, tools=[{"function": "f"}]), "tools[0]: the name is missing"),
    (chat(USER, REPLY, tools=[{"name": "f", "parameters": []}]), "tools[0].parameters is not an"),
    (chat(USER, REPLY, tools=[FLAT, TOOL]), "tools[1]: a second tool named 'get_weather'"),
    (chat(("system", "<tools>[{]</tools>"), USER, REPLY), "messages[0]: neither JSON nor a Python"),
])
def test_what_is_wrong_with_a_row(reader, row, problem):
    found, problems, _ = reader(HELLO, row)
    assert len(found) == 1 and len(problems) == 1
    assert problem in problems[0]
    assert "data.jsonl:2 (row 2): " in problems[0] and "\n" not in problems[0]


scraps = st.recursive(
    st.none() | st.integers() | st.sampled_from(
        ["", "a", "user", "assistant", "gpt", "tool", "function_call", _CALL_JSON, "[]", "{",
         tagged(_CALL_JSON), "<tool_call>", "<think>", "<tools>[</tools>", "<tool_response>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["messages", "conversations", "tools", "role", "from", "content", "value", "tool_calls",
         "function", "function_call", "name", "arguments", "text"]), inner, max_size=4),
    max_leaves=20)
turns = st.fixed_dictionaries({"role": st.sampled_from(
    ["user", "assistant", "tool", "function_call", "system"])}, optional={
        "content": scraps, "tool_calls": scraps, "function_call": scraps, "thinking": scraps,
        "tool_call_id": scraps, "name": scraps})


@LAW
@given(row=st.one_of(scraps, st.fixed_dictionaries(
    {"messages": st.lists(turns, max_size=4)}, optional={"tools": scraps})))
def test_any_row_reads_and_renders_or_is_a_problem(tmp_path_factory, tokenizer, row):
    path = tmp_path_factory.mktemp("any") / "data.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    problems = []
    found = read_conversations(path, problems.append, lambda notice: None)
    assert len(found) + len(problems) == 1 and "\n" not in "".join(problems)
    for conversation in found:
        render(conversation, tokenizer)
