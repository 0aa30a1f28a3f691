"""readers.py, formats.py: rows of many layouts, what is wrong with a file or a row."""

import itertools
import json
from dataclasses import replace

import pytest
from conftest import LAW, TOOL
from hypothesis import given
from hypothesis import strategies as st

from minilora.chat import Conversation, Message, ToolCall, render
from minilora.config import UserError
from minilora.formats import standard_tool
from minilora.readers import iterate_rows, openai_row, read_conversations, read_row


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
USER, REPLY = ("user", "?"), ("assistant", "!")


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
    "tools and schemas as text, typed parts": chat(
        ("system", {"content": [{"type": "text", "text": "Brief."}]}),
        ("user", {"content": [{"type": "input_text", "text": "Wea"}, {"text": "ther?"}]}),
        ("assistant", {"content": None, **call()}),
        ("tool", {"content": [{"type": "text", "text": RESULT}]}),
        ("assistant", {"content": [{"type": "output_text", "text": "Clear."}]}),
        tools=[json.dumps({**FLAT, "parameters": json.dumps(FLAT["parameters"])})]),
    "Glaive's text": {
        "system": f"SYSTEM: Brief. -\n{json.dumps(FLAT, indent=1)}\n",
        "chat": "USER: Weather?\n\n\nASSISTANT: <functioncall> {\"name\": \"get_weather\", "
                f"\"arguments\": '{json.dumps(ARGUMENTS)}'}} <|endoftext|>\n\n\nFUNCTION RESPONSE: "
                f"{RESULT}\n\n\nASSISTANT: Clear. <|endoftext|>\n\n"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_as_the_same_conversation(reader, layout):
    (found,), problems, notices = reader(LAYOUTS[layout])
    assert problems == []
    assert [" read as JSON" in notice for notice in notices] == (
        [True] * {"Glaive's text": 1, "sharegpt with tags as Python prints": 2}.get(layout, 0))
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
        ("assistant", "<think>\nSo.\n</think>\nYes."), tools=[{**TOOL, "strict": True}]))
    assert problems == []
    assert found.messages == (
        Message("user", "?"),
        Message("assistant", "Hm.", "Why?", (ToolCall("get_weather", {}, "c1"),)),
        Message("tool", '{"a": 1}', name="get_weather", tool_call_id="c1"),
        Message("assistant", "Yes.", "So."))
    assert found.tools == ({**TOOL, "strict": True},)
    (found,), problems, _ = reader(chat(
        USER, ("assistant", {"content": tagged(_CALL_JSON), "thinking": "Now."})))
    assert not problems and found.messages[1] == Message(
        "assistant", "", "Now.", (ToolCall("get_weather", ARGUMENTS),))


def test_calls_side_by_side_are_one_turn(reader):
    """A text and then calls, calls after calls, a list of calls: the model wrote them in one go."""
    two = f"[{_CALL_JSON}, {_CALL_JSON}]"
    (found,), problems, _ = reader({"conversations": [
        {"from": "human", "value": "?"}, {"from": "gpt", "value": "Wait."},
        {"from": "function_call", "value": _CALL_JSON}, {"from": "function_call", "value": two},
        {"from": "observation", "value": "1"}, {"from": "tool", "value":
         "<tool_response>2</tool_response>\n<tool_response>\n3\n</tool_response>"},
        {"from": "gpt", "value": "Done."}], "tools": [FLAT], "hermes_tags": True})
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
    (both,), _, _ = reader(chat(("system", f"A <tools>{json.dumps([TOOL])}</tools> b "
                                           f"<tools>{json.dumps([other])}</tools>"), *turns))
    assert both.tools == (TOOL, other) and both.messages[0].content == "A b"


def test_a_call_of_a_tool_not_on_offer_is_noticed(reader):
    row = chat(("user", "?"), ("assistant", call(name="nope")), tools=[FLAT])
    found, problems, notices = reader(row, row)
    assert len(found) == 2 and not problems
    assert len(notices) == 1 and "not among its tools (and 1 more rows" in notices[0]


arguments = st.dictionaries(st.text(), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text()
    | st.sampled_from(["</tool_call>", "<tool_call>\n{}", "<think>"]),
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


# --- one conversation in every layout -------------------------------------------------------------

words = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), min_size=1).map(
    str.strip).filter(bool)
results = st.dictionaries(st.text(max_size=3), st.integers(), max_size=2).map(json.dumps)


@st.composite
def conversations(draw, words=words, results=results) -> Conversation:
    """System text or none, questions with calls and results or without, answers, thinking."""
    names = draw(st.lists(words, min_size=1, max_size=3, unique=True))
    tools = tuple({"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {}}}} for name in names)
    messages = [Message("system", draw(words))] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 2))):
        messages.append(Message("user", draw(words)))
        calls = tuple(ToolCall(draw(st.sampled_from(names)), draw(arguments), f"c{turn}{number:07}")
                      for number in range(draw(st.integers(0, 3))))
        if calls:
            messages.append(Message("assistant", "", "", calls))
            messages += [Message("tool", draw(results), tool_call_id=call.id) for call in calls]
        messages.append(Message("assistant", draw(words), draw(st.just("") | words)))
    return Conversation(tuple(messages), tools)


def plain(call: ToolCall) -> dict:
    return {"name": call.name, "arguments": call.arguments}


def mistral(conversation: Conversation) -> dict:
    """mistral-finetune's: arguments as text, no content beside calls; results out of order."""
    row = openai_row(conversation)
    for message in row["messages"]:
        for each in message.get("tool_calls", ()):
            each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
            message.pop("content", None)
    for at, message in enumerate(row["messages"]):
        if message["role"] == "tool" and row["messages"][at - 1]["role"] == "tool":
            row["messages"][at - 1:at + 1] = row["messages"][at - 1:at + 1][::-1]
    return row


def typed(conversation: Conversation) -> dict:
    row = openai_row(conversation)
    for message in row["messages"]:
        message["content"] = [{"type": "text", "text": message["content"]}]
        if "reasoning_content" in message:
            message["content"].insert(0, {"type": "reasoning",
                                          "text": message.pop("reasoning_content")})
    return row


def sharegpt(conversation: Conversation) -> dict:
    """Roles for calls and results; no ids."""
    turns = []
    for message in conversation.messages:
        if message.tool_calls:
            turns.append({"from": "function_call", "value": json.dumps(
                [plain(call) for call in message.tool_calls])})
        else:
            kind = {"tool": "observation", "user": "human", "assistant": "gpt"}
            turns.append({"from": kind.get(message.role, message.role), "value": message.content,
                          "thinking": message.thinking})
    return {"conversations": turns, "tools": json.dumps(
        [tool["function"] for tool in conversation.tools])}


def hermes(conversation: Conversation, write=json.dumps) -> dict:
    """Everything in the text."""
    head = (f"<tools> {write(list(conversation.tools))} </tools>")
    messages = list(conversation.messages)
    if messages[0].role == "system":
        head = f"{messages.pop(0).content}\n{head}"
    turns = [{"from": "system", "value": head}]
    for role, group in itertools.groupby(messages, key=lambda message: message.role):
        for message in group if role != "tool" else ():
            tags = [tagged(write(plain(call))) for call in message.tool_calls]
            think = [f"<think>\n{message.thinking}\n</think>"] if message.thinking else []
            turns.append({"from": {"user": "human", "assistant": "gpt"}[role],
                          "value": "\n".join([*think, message.content, *tags])})
        if role == "tool":
            turns.append({"from": "tool", "value": "\n".join(
                f"<tool_response>\n{message.content}\n</tool_response>" for message in group)})
    return {"conversations": turns}


def without_ids(conversation: Conversation) -> Conversation:
    return replace(conversation, source="", messages=tuple(
        replace(message, tool_call_id=None, tool_calls=tuple(
            ToolCall(call.name, call.arguments) for call in message.tool_calls))
        for message in conversation.messages))


@LAW
@given(conversation=conversations())
def test_a_conversation_is_the_same_in_every_layout(tmp_path_factory, conversation):
    path = tmp_path_factory.mktemp("layouts") / "data.json"
    with_ids, without = [openai_row, mistral, typed], [sharegpt, hermes]
    text = repr([message.tool_calls for message in conversation.messages])
    if "</tool" not in text:  # in a string of Python, a tag cannot be told from a tag
        without.append(lambda conversation: hermes(conversation, str))
    rows = [layout(conversation) for layout in with_ids + without]
    path.write_text(json.dumps(rows), encoding="utf-8")
    found = read_conversations(path, on_notice=lambda notice: None)
    for layout, one in zip(with_ids + without, found, strict=True):
        if layout in with_ids:
            assert replace(one, source="") == conversation, layout
        else:
            assert without_ids(one) == without_ids(conversation), layout


tags = st.lists(st.sampled_from([
    "<tools>", "</tools>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
    "</tool_response>", "<tool_", "call>", "\n", " ", "x", "[]", json.dumps([TOOL]), _CALL_JSON]),
    min_size=1, max_size=6).map("".join).filter(str.strip)


@LAW
@given(conversation=conversations(tags, tags | st.just("")))
def test_a_row_written_here_reads_back_whatever_its_texts_spell(conversation):
    """Transcripts and mended copies: not even a Hermes tag in a text is taken for structure."""
    notes = set()
    assert read_row(json.loads(json.dumps(openai_row(conversation))), notes.add) == conversation
    assert not notes


def test_a_mark_stands_where_a_text_spells_a_tag_and_nowhere_else():
    def row(text):
        return openai_row(Conversation((Message("user", text), Message("assistant", "!"))))

    assert row("What is <tool_call>?")["hermes_tags"] is False
    assert row("What is a tool_call in <b>?").keys() == {"messages"}


def test_calls_stand_in_one_place(reader):
    """Tags of calls are text in a row that has calls in fields, unless it says otherwise."""
    response = "<tool_response>\n1\n</tool_response>"
    fields = (("assistant", {"content": "<think>Hm.</think>", **call()}), ("tool", response),
              ("assistant", f"It said {tagged('?')}"), ("user", response), REPLY)
    read, problems, notices = reader(
        chat(USER, *fields), chat(USER, *fields, hermes_tags=False), {"conversations": [
            {"from": "human", "value": response}, {"from": "function_call", "value": _CALL_JSON}]},
        chat(USER, *fields[:2], hermes_tags=True), chat(USER, ("assistant", tagged(_CALL_JSON)),
                                                       ("user", response), REPLY))
    assert problems == []
    said = [(m.role, m.content, m.thinking, len(m.tool_calls)) for m in read[0].messages]
    assert said == [("user", "?", "", 0), ("assistant", "", "Hm.", 1), ("tool", response, "", 0),
                    ("assistant", f"It said {tagged('?')}", "", 0), ("user", response, "", 0),
                    ("assistant", "!", "", 0)]
    assert read[1].messages[1].content == "<think>Hm.</think>"  # all that is spelled is text there
    assert read[1].messages[2:] == read[0].messages[2:] and read[2].messages[0].content == response
    assert read[3].messages[2].content == read[4].messages[2].content == "1"
    assert len(notices) == 2 and "(row 1) has <tool_call> or <tool_response> in a text, read as " \
        "text, for its calls are in fields (and 1 more rows" in "".join(notices)


def test_xlam_rows(reader):
    """Tools with parameters by name, types of Python; calls as text."""
    tool = {"name": "find", "description": "Finds", "parameters": {
        "type": {"description": "Kind", "type": "str"},
        "ids": {"description": "Ids", "type": "List[int], optional", "default": []},
        "deep": {"type": "Dict[str, int], optional"}, "any": {"type": "Any"}}}
    row = {"id": 1, "query": "Find it.", "tools": json.dumps([tool]), "answers": json.dumps(
        [{"name": "find", "arguments": {"type": "a"}}, {"name": "find", "arguments": {}}])}
    listed = {**row, "tools": [tool], "answers": json.loads(row["answers"])}
    found, problems, notices = reader(row, listed, {**row, "answers": "[]"}, {**row, "query": ""})
    assert [found[0].messages, found[0].tools] == [found[1].messages, found[1].tools]
    assert found[0].messages == (Message("user", "Find it."), Message("assistant", tool_calls=(
        ToolCall("find", {"type": "a"}), ToolCall("find", {}))))
    assert found[0].tools[0]["function"]["parameters"] == {"type": "object", "properties": {
        "type": {"description": "Kind", "type": "string"},
        "ids": {"description": "Ids", "items": {"type": "integer"}, "type": "array", "default": []},
        "deep": {"type": "object"}, "any": {}}, "required": ["type", "any"]}
    assert "(row 3): answers: the assistant says nothing" in problems[0]
    assert "(row 4): query: the user says nothing" in problems[1]
    assert len(notices) == 1 and "types in its tools that JSON Schema lacks" in notices[0]


def test_glaive_rows(reader):
    r"""Turns begin a line, quotes in arguments are \', text and call are one turn."""
    call = r'''{"name": "say", "arguments": '{"text": "it\'s \"x\"", "n": true}'}'''
    text = (f"USER: Say it: USER: me\n\n\nASSISTANT: Wait. <functioncall> {call} <|endoftext|>"
            "\n\n\nFUNCTION RESPONSE: ok\n\n\nASSISTANT: Said. <|endoftext|>")
    row = {"system": "SYSTEM: No functions.", "chat": text}
    (found,), problems, _ = reader(row, {"chat": "Hello"}, {"chat": text.replace("true", "?")},
                                   {**row, "system": "SYSTEM: {x"})
    assert found.messages == (
        Message("system", "No functions."), Message("user", "Say it: USER: me"),
        Message("assistant", "Wait.", tool_calls=(
            ToolCall("say", {"text": 'it\'s "x"', "n": True}),)),
        Message("tool", "ok"), Message("assistant", "Said."))
    assert "(row 2): chat: begins with 'Hello'; expected USER:" in problems[0]
    assert "(row 3): chat, part 2: arguments: not JSON" in problems[1]
    assert "(row 4): system: neither JSON" in problems[2] and len(problems) == 3


@pytest.mark.parametrize("mark, trained", [
    ({"weight": 0}, False), ({"weight": 1}, True), ({"weight": None}, True),
    ({"weight": 0.0}, False), ({"train": False}, False), ({"loss": False}, False),
    ({"train": True, "loss": False}, False),
])
def test_messages_that_carry_no_loss(reader, mark, trained):
    (found,), problems, _ = reader(chat(USER, ("assistant", {"content": "a", **mark}), USER, REPLY))
    assert not problems and [m.trained for m in found.messages] == [True, trained, True, True]


def test_results_go_in_the_order_of_their_calls(reader):
    """Where all have ids; where one has none, or ids are not unique, they stay as they stand."""
    def row(ids, given):
        return chat(USER, ("assistant", {"tool_calls": [
            {"id": id, "function": {"name": "f", "arguments": {}}} for id in ids]}),
            *(("tool", {"content": str(n), **({} if id is None else {"tool_call_id": id})})
              for n, id in enumerate(given)))

    found, problems, notices = reader(
        row("abc", "cab"), row("abc", "ca"), row("abc", ["c", None, "a"]), row(["a", None], "a"),
        row("aa", "aa"), row("ab", "aa"), row(["", "a"], ["", "a"]))
    assert [[m.content for m in one.messages[2:]] for one in found] == [
        ["1", "2", "0"], ["1", "0"], ["0", "1", "2"], ["0"], ["0", "1"], ["0", "1"]]
    assert len(problems) == 1 and "(row 6): two results of one call" in problems[0]
    assert "results in another order" in notices[1] and "(and 1 more rows" in notices[1]


GOOD = {"type": "object", "properties": {
    "type": {"type": "string", "enum": ["dict", "float"]}, "dict": {"type": ["integer", "null"]},
    "items": {"type": "array", "items": {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/a"}]}}},
    "$defs": {"a": {"type": "boolean", "default": {"type": "dict"}}}, "required": ["type"],
    "additionalProperties": False}


def test_schemas_get_the_words_of_json_schema():
    assert standard_tool(TOOL) == TOOL
    assert standard_tool({"name": "f", "parameters": GOOD}) == {"name": "f", "parameters": GOOD}
    bfcl = {"type": "dict", "properties": {
        "a": {"type": "float"}, "b": {"type": "tuple", "items": {"type": "String"}},
        "c": {"type": "any", "description": "What"}, "type": {"type": "dict", "properties": {
            "d": {"type": "HashMap", "additionalProperties": {"type": "long"}}}},
        "e": {"anyOf": [{"type": "Boolean"}, {"type": ["ArrayList", "null"]}]},
        "f": {"type": ["float", "any"]}, "g": {"type": "list[float]"}, "h": {"type": "Matrix"}}}
    wanted = {"type": "object", "properties": {
        "a": {"type": "number"}, "b": {"type": "array", "items": {"type": "string"}},
        "c": {"description": "What"}, "type": {"type": "object", "properties": {
            "d": {"type": "object", "additionalProperties": {"type": "integer"}}}},
        "e": {"anyOf": [{"type": "boolean"}, {"type": ["array", "null"]}]},
        "f": {}, "g": {"items": {"type": "number"}, "type": "array"}, "h": {"type": "Matrix"}}}
    for nested in (False, True):
        def tool(parameters, nested=nested):
            flat = {"name": "f", "parameters": parameters}
            return {"type": "function", "function": flat} if nested else flat
        assert standard_tool(tool(bfcl)) == tool(wanted)
        assert list(standard_tool(tool(bfcl))) == list(tool(wanted))


def test_what_mending_puts_right(reader, tmp_path):
    twice = chat(USER, USER, REPLY, ("user", " "), tools=[FLAT, TOOL])
    rows = [twice, chat(USER, REPLY), chat(USER, ("assistant", "")), chat(USER, REPLY, REPLY),
            chat(USER, ("tool", "a")), chat(USER, REPLY, tools=[FLAT, {**FLAT, "strict": True}]),
            chat(USER, ("assistant", call()), ("tool", ""), tools=[FLAT])]
    found, problems, _ = reader(*rows)
    assert len(found) == 2
    mended = list(iterate_rows(tmp_path / "data.jsonl", mend=True))
    assert [row.conversation is not None for row in mended] == [
        True, True, True, False, False, False, True]
    assert [(m.role, m.content) for m in mended[0].conversation.messages] == [
        ("user", "?\n\n?"), ("assistant", "!")]
    assert mended[0].notes == ("has a tool twice, read as one", "has an empty message at its end, "
                               "left out", "has user messages that follow each other, joined")
    for row, readable in ((mended[1], found[0]), (mended[6], found[1])):
        assert row.conversation == readable and row.notes == ()
    assert [m.role for m in mended[2].conversation.messages] == ["user"]


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
    (tmp_path / "wide.jsonl").write_text("{}", encoding="utf-16")
    for name, problem in [("none.jsonl", "no such file"), ("wide.jsonl", "UTF-8"), ("", "read")]:
        with pytest.raises(UserError, match=problem):
            read_conversations(tmp_path / name, on_problem=lambda problem: None)


def test_bad_rows_are_named_and_the_others_are_read(reader):
    found, problems, _ = reader(HELLO, "{", HELLO, {"messages": []}, "", HELLO)
    assert [c.source.rpartition(":")[2] for c in found] == ["1 (row 1)", "3 (row 3)", "6 (row 5)"]
    assert [problem.rpartition("data.jsonl")[2].partition(": ")[0] for problem in problems] == [
        ":2 (row 2)", ":4 (row 4)"]


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
    (chat(USER, ("assistant", tagged(_CALL_JSON)), ("tool", "<tool_response>a</tool_response>b")),
     "messages[2]: text outside <tool_response>: 'b' (if the tags are text: \"hermes_tags\": fals"),
    (chat(USER, REPLY, hermes_tags=0), "hermes_tags is 0; expected false (tags are text) or true"),
    (chat(USER, ("function_call", "f()")), "messages[1]: not JSON"),
    (chat(USER, ("assistant", call()), ("tool", {"name": 3})), "messages[2].name is not text"),
    (chat(USER, ("assistant", {"content": "b", "weight": 0.5})), "messages[1].weight is 0.5; exp"),
    (chat(USER, ("assistant", {"content": "b", "train": "no"})), "messages[1].train is 'no'; exp"),
    (chat(("user", {"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]})),
     "messages[0]: the content[1]: a part of type 'image_url'; expected text"),
    (chat(("user", {"content": [{"type": "text"}]})), "the content[0]: a part without a text"),
    (chat(("user", {"content": [{"type": "thinking", "text": "a"}, {"text": "b"}]})),
     "messages[0]: thinking of a user"),
    (chat(USER, ("assistant", {"content": "<think>a</think>b", "thinking": "c"})), "in two places"),
    (chat(USER, ("assistant", {"content": "<think>a</think><think>b</think>c"})), "in two places"),
    (chat(USER, ("assistant", {"content": "a", "weight": 0}), ("assistant", call())), "one half"),
    (chat(USER, REPLY, tools=[{"name": "f", "parameters": "["}]), "tools[0].parameters: not JSON"),
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
        path.write_text(json.dumps(openai_row(conversation)))
        assert read_conversations(path, on_notice=lambda notice: None)[0].messages == (
            conversation.messages)
