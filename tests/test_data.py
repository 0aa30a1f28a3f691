"""data.py: rows of four layouts, what is wrong with a row, labels, cuts, and packed batches."""

import json
from collections import Counter

import pytest
import torch
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import make_tokenizer_model

from minilora.chat import DIALECTS, Conversation, Kind, Message, ToolCall, parse_tool_calls, render
from minilora.config import UserError
from minilora.data import (
    IGNORED,
    Example,
    batches,
    collate,
    make_example,
    make_examples,
    pack_rows,
    read_conversations,
    split,
    summary,
    trained_kinds,
)
from minilora.tokenizer import Tokenizer

LAW = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def load(model) -> Tokenizer:
    tokenizer = Tokenizer.load(model.parent)
    tokenizer.add_tokens(DIALECTS["hermes"].tokens)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load(make_tokenizer_model(tmp_path_factory.mktemp("tokenizer")))


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


FLAT = {"name": "get_weather", "description": "Weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": FLAT}
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


# --- split ----------------------------------------------------------------------------------------

def talk(text, reply="Yes.", source="") -> Conversation:
    return Conversation((Message("user", text), Message("assistant", reply)), source=source)


@LAW
@given(numbers=st.lists(st.integers(0, 30), max_size=40), share=st.floats(0, 0.99),
       seed=st.integers())
def test_split_is_a_partition_that_keeps_order_and_copies_together(numbers, share, seed):
    given_ = [talk(str(number), source=str(place)) for place, number in enumerate(numbers)]
    kept, held = split(given_, share, seed)
    assert sorted(map(int, (c.source for c in kept + held))) == list(range(len(numbers)))
    for part in (kept, held):
        assert [int(c.source) for c in part] == sorted(int(c.source) for c in part)
    assert not {c.messages for c in kept} & {c.messages for c in held}
    assert {c.messages for c in split(given_[::-1], share, seed)[1]} == {c.messages for c in held}
    if len(set(numbers)) == len(numbers):
        assert len(held) == (max(1, round(share * len(numbers))) if share and numbers else 0)


def test_split_depends_on_the_seed_and_refuses_a_share_of_one():
    given_ = [talk(str(number)) for number in range(50)]
    assert len({tuple(split(given_, 0.2, seed)[1]) for seed in range(5)}) == 5
    with pytest.raises(UserError, match="share is 1"):
        split(given_, 1, 0)


# --- examples -------------------------------------------------------------------------------------

LONG = Conversation((
    Message("system", "Brief."),
    Message("user", "Weather?"),
    Message("assistant", "Wait.", "A call.", (ToolCall("get_weather", {"city": "Rome"}),)),
    Message("tool", RESULT),
    Message("assistant", "Clear."),
    Message("user", "Thanks!"),
    Message("assistant", "Welcome."),
), (TOOL,), "data.jsonl:1 (row 1)")


def columns(example, tokenizer) -> list[str]:
    """A line for each stretch of one kind: the kind, + where trained, the text."""
    lines, at, ids = [], 0, example.ids.tolist()
    marks = [(int(kind), bool(label != IGNORED))
             for kind, label in zip(example.kinds, example.labels, strict=True)]
    for t in range(1, len(marks) + 1):
        if t == len(marks) or marks[t] != marks[at]:
            kind, trained = marks[at]
            text = tokenizer.decode(ids[at:t])
            lines.append(f"{Kind(kind).name:<13} {'+' if trained else '-'} {text!r}")
            at = t
    return lines


def test_what_is_trained_by_default(tokenizer):
    tools = json.dumps(TOOL)
    assert columns(make_example(LONG, tokenizer), tokenizer) == [
        rf"PROMPT        - '<bos><start_of_turn>user\nBrief.\n\n<tools>\n{tools}\n</tools>\n\n"
        r"Weather?<end_of_turn>\n<start_of_turn>model\n'",
        r"THINK         + '<think>\nA call.\n</think>\n'",
        r"ANSWER        + 'Wait.\n'",
        """TOOL_CALL     + '<tool_call>\\n{"name": "get_weather", "arguments": {"city": "Rome"}}"""
        r"\n</tool_call>'",
        r"END           + '<end_of_turn>'",
        r"PROMPT        - '\n<start_of_turn>user\n'",
        r"""TOOL_RESPONSE - '<tool_response>\n{"sky": "clear"}\n</tool_response>'""",
        r"PROMPT        - '<end_of_turn>\n<start_of_turn>model\n'",
        r"ANSWER        + 'Clear.'",
        r"END           + '<end_of_turn>'",
        r"PROMPT        - '\n<start_of_turn>user\nThanks!<end_of_turn>\n<start_of_turn>model\n'",
        r"ANSWER        + 'Welcome.'",
        r"END           + '<end_of_turn>'",
        r"PROMPT        - '\n'",
    ]


@pytest.mark.parametrize("train_on, trained", [
    ("tool_call", ["TOOL_CALL", "END"]),  # the end of the call's turn, not of the other turns
    ("answer", ["ANSWER", "END", "ANSWER", "END"]),
    ("end", ["END", "END", "END"]),
    ("think, tool_call ,tool_response", ["THINK", "TOOL_CALL", "END", "TOOL_RESPONSE"]),
])
def test_what_is_trained_is_a_choice(tokenizer, train_on, trained):
    lines = columns(make_example(LONG, tokenizer, train_on=train_on), tokenizer)
    found = [line.split()[0] for line in lines if line[14] == "+"]
    if train_on == "answer":  # the first ANSWER is followed by a call
        trained = ["ANSWER", *trained]
    assert found == trained


def test_the_first_token_is_never_a_target(tokenizer):
    example = make_example(LONG, tokenizer, train_on="prompt,end")
    assert example.labels[0] == IGNORED and example.labels[1] == example.ids[1]


def test_bad_choices_and_empty_ones(tokenizer):
    for wrong in ("tool_calls", "", ",", "assistant,robot"):
        with pytest.raises(UserError, match="train-on"):
            trained_kinds(wrong)
        with pytest.raises(UserError, match="train-on"):  # not a problem of each conversation
            make_examples([LONG], tokenizer, train_on=wrong, on_problem=lambda problem: None)
    no_call = talk("a", source="data.jsonl:7 (row 7)")
    with pytest.raises(UserError, match=r"data.jsonl:7 \(row 7\): nothing to train"):
        make_example(no_call, tokenizer, train_on="tool_call")
    with pytest.raises(UserError, match="nothing to train"):
        make_example(Conversation((Message("user", "a"),)), tokenizer)
    problems = []
    examples = make_examples([LONG, no_call], tokenizer, train_on="tool_call",
                             on_problem=problems.append)
    assert [example.source for example in examples] == [LONG.source] and len(problems) == 1


def test_a_cut_ends_after_a_whole_turn_and_keeps_the_tools(tokenizer):
    whole = make_example(LONG, tokenizer)
    trained = int((whole.labels != IGNORED).sum())
    ends = [int(end) + 1 for end in (whole.kinds == Kind.END).nonzero()]
    sizes = set()
    for length in range(1, len(whole) + 2):
        if length < ends[0]:
            with pytest.raises(UserError, match=rf"{length} of its {len(whole)} tokens"):
                make_example(LONG, tokenizer, length=length)
            continue
        example = make_example(LONG, tokenizer, length=length)
        assert len(example) <= length and (len(example) in ends or len(example) == len(whole))
        assert torch.equal(example.ids, whole.ids[:len(example)])
        assert torch.equal(example.labels, whole.labels[:len(example)])
        assert example.cut + int((example.labels != IGNORED).sum()) == trained
        assert tokenizer.token_id("</tools>") in example.ids
        parse_tool_calls(tokenizer.decode(example.ids[example.kinds == Kind.TOOL_CALL].tolist()))
        sizes.add(len(example))
    assert sizes == {*ends, len(whole)}


def test_summary_counts(tokenizer):
    given_ = [LONG, talk("a"), talk("b", "No. " * 200)]
    problems = []
    limit = len(make_example(LONG, tokenizer)) - 5
    examples = make_examples(given_, tokenizer, length=limit, on_problem=problems.append)
    numbers = summary(given_, examples)
    kinds = Counter(kind for e in examples for kind in e.kinds.tolist())
    assert numbers["kinds"]["tool_call"] == {"tokens": kinds[Kind.TOOL_CALL],
                                             "trained": kinds[Kind.TOOL_CALL]}
    assert numbers["kinds"]["prompt"] == {"tokens": kinds[Kind.PROMPT], "trained": 0}
    assert numbers["tokens"] == sum(map(len, examples))
    assert numbers["trained"] == sum(int((e.labels != IGNORED).sum()) for e in examples)
    few = ("conversations", "messages", "calls", "with_calls", "tools_offered", "tools_called",
           "cut", "refused")
    assert [numbers[name] for name in few] == [3, 11, 1, 1, 1, 1, 1, 1]
    assert numbers["cut_trained"] == examples[0].cut > 0
    assert numbers["length"]["min"] == len(examples[1]) and numbers["length"]["max"] == len(
        examples[0]) == numbers["length"]["p95"]
    assert summary([], [])["tokens"] == 0
    json.dumps(numbers)


# --- batches --------------------------------------------------------------------------------------

def numbered(sizes) -> list[Example]:
    """Examples whose ids tell which example and which position they are."""
    examples = []
    for n, size in enumerate(sizes):
        ids = 1000 * (n + 1) + torch.arange(size)
        labels = torch.where(torch.arange(size) % 3 == 1, ids, IGNORED)
        examples.append(Example(ids, (ids % 5).to(torch.uint8), labels, f"row {n}"))
    return examples


sizes = st.lists(st.integers(1, 20), max_size=40)


@LAW
@given(sizes=sizes)
def test_packing_places_each_example_once_and_tightly(sizes):
    rows = pack_rows(numbered(sizes), 20)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    fill = [sum(sizes[index] for index in row) for row in rows]
    assert all(0 < tokens <= 20 for tokens in fill)
    assert sum(tokens <= 10 for tokens in fill) <= 1  # two such rows would have been one


def test_packing_takes_the_tightest_fit():
    assert sorted(map(sorted, pack_rows(numbered([5, 12, 15, 8]), 20))) == [[0, 2], [1, 3]]
    with pytest.raises(UserError, match="row 1: 21 tokens; a row has 20"):
        pack_rows(numbered([3, 21]), 20)


@pytest.mark.parametrize("pack", [True, False])
@LAW
@given(sizes=sizes, batch_size=st.integers(1, 4), seed=st.integers(0, 3))
def test_batches_hold_every_example_exactly_once(pack, sizes, batch_size, seed):
    examples = numbered(sizes)
    seen = []
    for batch in batches(examples, batch_size, 20, seed, pack=pack):
        assert all(tensor.shape == batch.input_ids.shape for tensor in vars(batch).values())
        assert all(tensor.dtype == torch.int64 for name, tensor in vars(batch).items()
                   if name != "kinds") and batch.kinds.dtype == torch.uint8
        rows, length = batch.input_ids.shape
        assert rows <= batch_size and (length == 20 if pack else length <= 20)
        for row in range(rows):
            numbers = batch.documents[row]
            filled = int((numbers > 0).sum())
            assert (numbers[filled:] == 0).all() and (batch.labels[row, filled:] == IGNORED).all()
            assert pack or numbers.max() == 1
            for number in range(1, int(numbers.max()) + 1):
                where = (numbers == number).nonzero().flatten()
                assert torch.equal(where, torch.arange(where[0], where[-1] + 1))
                n = int(batch.input_ids[row, where[0]]) // 1000 - 1
                example = examples[n]
                assert torch.equal(batch.input_ids[row, where], example.ids)
                assert torch.equal(batch.labels[row, where], example.labels)
                assert torch.equal(batch.kinds[row, where], example.kinds)
                assert torch.equal(batch.positions[row, where], torch.arange(len(example)))
                seen.append(n)
    assert sorted(seen) == list(range(len(sizes)))


@pytest.mark.parametrize("pack", [True, False])
def test_order_is_a_function_of_seed_and_epoch(pack):
    examples = numbered([7, 3, 12, 20, 1, 9, 9, 4, 16, 2])

    def order(seed, epoch):
        found = batches(examples, 2, 20, seed, epoch, pack)
        backwards = [found[i].input_ids.tolist() for i in reversed(range(len(found)))]
        return str(backwards[::-1])

    torch.manual_seed(0)
    first = order(0, 0)
    torch.manual_seed(1)
    assert order(0, 0) == first
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_collate_pads_with_what_is_never_seen():
    batch = collate([numbered([2])], 4, pad_id=9)
    assert batch.input_ids.tolist() == [[1000, 1001, 9, 9]]
    assert batch.labels.tolist() == [[IGNORED, 1001, IGNORED, IGNORED]]
    assert batch.documents.tolist() == [[1, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 0, 0]]
    assert batch.to("cpu").kinds.tolist() == batch.kinds.tolist()


# --- real data ------------------------------------------------------------------------------------

def test_the_glaive_file_reads_whole(gemma2_tokenizer_model):
    path = SHARED / "data" / "glaive_toolcall_en_250.json"
    if not path.exists():
        pytest.skip("the glaive file is not at hand")
    notices = []
    found = read_conversations(path, on_notice=notices.append)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert len(found) == len(rows) == 250 and notices == []
    tokenizer = load(gemma2_tokenizer_model)
    examples = make_examples(found, tokenizer)
    assert len(examples) == 250
    for row, conversation, example in zip(rows, found, examples, strict=True):
        values = [turn["value"] for turn in row["conversations"] if turn["from"] == "function_call"]
        wanted = [json.loads(value) for value in values]
        text = tokenizer.decode(example.ids[example.kinds == Kind.TOOL_CALL].tolist())
        calls = [{"name": c.name, "arguments": c.arguments} for c in parse_tool_calls(text)]
        assert calls == wanted
        assert [m.content for m in conversation.messages if m.role == "tool"] == [
            turn["value"] for turn in row["conversations"] if turn["from"] == "observation"]
        assert [t["function"] for t in conversation.tools] == json.loads(row["tools"] or "[]")
        assert example.cut == 0 and int((example.ids == tokenizer.bos).sum()) == 1
