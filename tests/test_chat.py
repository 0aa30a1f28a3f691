"""chat.py: ids and kinds in one pass, calls read back exactly, a template that says the same."""

import dataclasses
import functools
import html
import itertools
import json
import pathlib
import random
import re

import pytest
import torch
from conftest import real_input
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_readers import hermes, mistral, sharegpt, typed, without_ids
from tiny_tokenizer import make_tokenizer_model

from minilora.chat import (
    Conversation,
    Kind,
    MalformedCall,
    Message,
    ToolCall,
    chat_template,
    decode_reply,
    parse_tool_calls,
    render,
    split_reply,
    stop_ids,
)
from minilora.config import TrainConfig, UserError
from minilora.constrain import Constraint, Vocabulary
from minilora.dialects import DIALECTS
from minilora.jsontext import dump_json, load_json
from minilora.notation import Block, Dialect, call_from
from minilora.readers import openai_row, read_row
from minilora.tokenizer import Tokenizer
from minilora.tools import converse, tool_schema

LAW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
EACH = pytest.mark.parametrize("dialect", DIALECTS)


def load(model) -> Tokenizer:
    tokenizer = Tokenizer.load(model.parent)
    for dialect in DIALECTS.values():
        tokenizer.add_tokens(dialect.tokens)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load(make_tokenizer_model(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def nano_tokenizer(nano_dir) -> Tokenizer:
    return load(nano_dir / "tokenizer.model")


@pytest.fixture(scope="module")
def gemma2_tokenizer() -> Tokenizer:
    return load(real_input("gemma2_tokenizer/tokenizer.model"))


WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a <b>city</b>, e.g. \"Zürich\"",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
FULL_CLOCK = {"type": "function", "function": {"name": "clock", "description": "",
                                               "parameters": {}}}

FULL = Conversation((
    Message("system", "Be brief."),
    Message("user", "Weather in Paris and Rome?"),
    Message("assistant", "One moment.", "Two cities.", (
        ToolCall("get_weather", {"city": "Paris"}, "c1"), ToolCall("clock", {}, "c2"))),
    Message("tool", '{"sky": "clear"}', name="get_weather", tool_call_id="c1"),
    Message("tool", "noon", tool_call_id="c2"),
    Message("assistant", "Clear at noon."),
    Message("user", "Thanks!"),
    Message("assistant", "Welcome."),
), (WEATHER, CLOCK))


def columns(conversation, tokenizer, dialect, generate=False) -> list[tuple[str, str]]:
    """The rendering as (kind, text) of each stretch of one kind."""
    rendered = render(conversation, tokenizer, dialect, generate)
    runs = itertools.groupby(zip(rendered.kinds, rendered.ids, strict=True), lambda pair: pair[0])
    return [(kind.name, tokenizer.decode([i for _, i in run])) for kind, run in runs]


# --- the layout, to be read -----------------------------------------------------------------------

def test_hermes_layout_and_kinds(tokenizer):
    tools = f"{json.dumps(WEATHER, ensure_ascii=False)}\n{json.dumps(CLOCK)}"
    assert columns(FULL, tokenizer, "hermes", generate=True) == [
        ("PROMPT", f"<bos><start_of_turn>user\nBe brief.\n\n<tools>\n{tools}\n</tools>\n\n"
                   "Weather in Paris and Rome?<end_of_turn>\n<start_of_turn>model\n"),
        ("THINK", "<think>\nTwo cities.\n</think>\n"),
        ("ANSWER", "One moment.\n"),
        ("TOOL_CALL", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
                      '</tool_call>\n<tool_call>\n{"name": "clock", "arguments": {}}\n'
                      "</tool_call>"),
        ("END", "<end_of_turn>"),
        ("PROMPT", "\n<start_of_turn>user\n"),
        ("TOOL_RESPONSE", '<tool_response>\n{"sky": "clear"}\n</tool_response>\n'
                          "<tool_response>\nnoon\n</tool_response>"),
        ("PROMPT", "<end_of_turn>\n<start_of_turn>model\n"),
        ("ANSWER", "Clear at noon."),
        ("END", "<end_of_turn>"),
        ("PROMPT", "\n<start_of_turn>user\nThanks!<end_of_turn>\n<start_of_turn>model\n"),
        ("ANSWER", "Welcome."),
        ("END", "<end_of_turn>"),
        ("PROMPT", "\n<start_of_turn>model\n"),
    ]


def test_mistral_layout_and_kinds(tokenizer):
    tools = json.dumps([WEATHER, FULL_CLOCK], ensure_ascii=False)
    assert columns(FULL, tokenizer, "mistral")[:9] == [
        ("PROMPT", "<bos><start_of_turn>user\nBe brief.\n\n[AVAILABLE_TOOLS] "
                   f"{tools}[/AVAILABLE_TOOLS]\n\nWeather in Paris and Rome?<end_of_turn>\n"
                   "<start_of_turn>model\n"),
        ("THINK", "Two cities.\n"),
        ("ANSWER", "One moment.\n"),
        ("TOOL_CALL", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, '
                      '"id": "c1"}, {"name": "clock", "arguments": {}, "id": "c2"}]'),
        ("END", "<end_of_turn>"),
        ("PROMPT", "\n<start_of_turn>user\n"),
        ("TOOL_RESPONSE", '[TOOL_RESULTS] {"content": {"sky": "clear"}, "call_id": "c1"}'
                          '[/TOOL_RESULTS][TOOL_RESULTS] {"content": "noon", "call_id": "c2"}'
                          "[/TOOL_RESULTS]"),
        ("PROMPT", "<end_of_turn>\n<start_of_turn>model\n"),
        ("ANSWER", "Clear at noon."),
    ]


def test_functiongemma_layout_and_kinds(tokenizer):
    """The turns of "full function calling sequence" on ai.google.dev, and more of them."""
    assert columns(FULL, tokenizer, "functiongemma", generate=True) == [
        ("PROMPT", "<bos><start_of_turn>developer\nBe brief.<start_function_declaration>"
                   "declaration:get_weather{description:<escape>Weather of a <b>city</b>, e.g. "
                   '"Zürich"<escape>,parameters:{properties:{city:{description:<escape><escape>,'
                   "type:<escape>STRING<escape>}},type:<escape>OBJECT<escape>}}"
                   "<end_function_declaration><start_function_declaration>declaration:clock{"
                   "description:<escape><escape>}<end_function_declaration><end_of_turn>\n"
                   "<start_of_turn>user\nWeather in Paris and Rome?<end_of_turn>\n"
                   "<start_of_turn>model\n"),
        ("THINK", "Two cities.\n"),
        ("ANSWER", "One moment."),
        ("TOOL_CALL", "<start_function_call>call:get_weather{city:<escape>Paris<escape>}"
                      "<end_function_call><start_function_call>call:clock{}<end_function_call>"),
        ("END", "<start_function_response>"),
        ("TOOL_RESPONSE", 'response:get_weather{value:<escape>{"sky": "clear"}<escape>}'
                          "<end_function_response><start_function_response>response:clock{"
                          "value:<escape>noon<escape>}<end_function_response>"),
        ("ANSWER", "Clear at noon."),
        ("END", "<end_of_turn>"),
        ("PROMPT", "\n<start_of_turn>user\nThanks!<end_of_turn>\n<start_of_turn>model\n"),
        ("ANSWER", "Welcome."),
        ("END", "<end_of_turn>"),
        ("PROMPT", "\n<start_of_turn>model\n"),
    ]
    assert stop_ids(tokenizer, "functiongemma") == (
        *tokenizer.stop_ids, tokenizer.token_id("<start_function_response>"))
    assert stop_ids(tokenizer, "hermes") == tokenizer.stop_ids


def test_functiongemma_closes_a_turn_whose_calls_got_no_result(tokenizer):
    call = Message("assistant", tool_calls=(ToolCall("clock", {}),))
    for then in (Message("user", "?"), Message("assistant", "?")):
        messages = (Message("user", "Hi"), call, then)
        text = tokenizer.decode(render(Conversation(messages), tokenizer, "functiongemma").ids)
        assert "<start_function_response><end_of_turn>\n<start_of_turn>" in text
    result = Message("tool", "noon")  # named after the call in its place
    text = tokenizer.decode(render(Conversation((Message("user", "Hi"), call, result, then)),
                                   tokenizer, "functiongemma").ids)
    assert "<start_function_response>response:clock{value:<escape>noon<escape>}" in text
    assert text.endswith("<end_function_response>?<end_of_turn>\n")


def test_the_dialects_are_those_that_a_run_can_choose():
    field = {field.name: field for field in dataclasses.fields(TrainConfig)}["dialect"]
    assert tuple(DIALECTS) in field.metadata.values()


@EACH
def test_every_new_token_of_a_dialect_occurs_and_is_one_id(tokenizer, dialect):
    ids = render(FULL, tokenizer, dialect).ids
    tokens = {token for token, i in tokenizer.new_tokens.items() if i in ids}
    assert tokens == set(DIALECTS[dialect].tokens)
    assert all(DIALECTS[dialect].tokens.values())  # each described, for its row to start from


def test_what_is_empty_leaves_no_trace(tokenizer):
    hello = Conversation((Message("system", " \n"), Message("user", "Hello")))
    assert columns(hello, tokenizer, "hermes") == [
        ("PROMPT", "<bos><start_of_turn>user\nHello<end_of_turn>\n")]


def test_misplaced_messages_are_refused(tokenizer):
    user, system, reply = Message("user", "a"), Message("system", "b"), Message("assistant", "c")
    for messages in [(), (system,), (reply, user), (system, reply), (user, system)]:
        with pytest.raises(UserError, match="x.json:3: "):
            render(Conversation(messages, source="x.json:3"), tokenizer)
    with pytest.raises(UserError, match="hermes, mistral"):
        render(Conversation((user,)), tokenizer, "klingon")


# --- laws of render -------------------------------------------------------------------------------

keys = st.text() | st.sampled_from(["", " ", " a", "a b", "B", "a:b", "{", "x,y", "</tool_call>",
                                    "<escape>", "type", "properties", "description", "name"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text() | st.sampled_from(["</tool_call>", "<tool_call>\n{}", '"}]', "[TOOL_CALLS]", "\\",
                                   "<escape>", "<escape>,b:<escape>", "<end_function_call>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8)
arguments = st.dictionaries(keys, json_values, max_size=4)
calls = st.builds(ToolCall, st.text(min_size=1), arguments)
# Mostly what texts are made of where layouts go wrong: white space at the ends, quotes, tags, these
# whole or in parts that a neighbouring text may complete.
tags = st.lists(st.sampled_from([
    "<end_of_turn>", "<start_of", "_turn>", "user\n", "model\n", "<bos>", "<unused0>", "<tool",
    "_call>", "</", "[TOOL", "_CALLS]", "<think>", "think>"]), max_size=6).map("".join)
texts = (st.text(st.sampled_from("\n\n \t\"'{}<ab▁é\u2028\U0001f600"), max_size=12) | tags
         | st.text())
replies = st.builds(Message, st.just("assistant"), texts, texts,
                    st.lists(calls, max_size=2).map(tuple))
results = st.builds(Message, st.just("tool"), texts, name=st.none(),
                    tool_call_id=st.none() | st.text(min_size=1))
rounds = st.tuples(st.builds(Message, st.just("user"), texts), replies, results, results, replies)


@st.composite
def conversations(draw):
    system = [Message("system", draw(texts))] if draw(st.booleans()) else []
    turns = [message for turn in draw(st.lists(rounds, min_size=1, max_size=2)) for message in turn]
    tools = tuple({"type": "function", "function": {"name": name, "parameters": draw(arguments)}}
                  for name in draw(st.lists(st.text(min_size=1), max_size=2)))
    return Conversation((*system, *turns[:draw(st.integers(1, len(turns)))]), tools)


@EACH
@LAW
@given(conversation=conversations())
def test_a_generation_prompt_is_a_prefix_of_the_training_ids(tokenizer, dialect, conversation):
    """What the model is given to go on from is what it was trained to go on from."""
    whole = render(conversation, tokenizer, dialect)
    assert len(whole.ids) == len(whole.kinds)
    for n, message in enumerate(conversation.messages):
        if message.role == "assistant":
            before = Conversation(conversation.messages[:n], conversation.tools)
            prompt = render(before, tokenizer, dialect, generate=True)
            assert whole.ids[:len(prompt.ids)] == prompt.ids
            assert whole.kinds[:len(prompt.ids)] == prompt.kinds


@EACH
@LAW
@given(conversation=conversations())
def test_control_tokens_are_those_of_the_layout(tokenizer, dialect, conversation):
    """They are the same whatever the texts spell, alone or together with their neighbours."""
    # How many <escape> there are says which keys and texts FunctionGemma's notation has to mark.
    control = set(tokenizer._ids.values()) - {tokenizer.token_id("<escape>")}

    def harmless(text):
        tool_keys = ("type", "function", "name", "parameters")
        return text if text in tool_keys else re.sub(r"\S", "x", text)

    found, expected = ([i for i in render(each, tokenizer, dialect).ids if i in control]
                       for each in (conversation, rewritten(conversation, harmless)))
    assert found == expected


def rewritten(value, rewrite):
    """A conversation, or a value in one, with every text rewritten."""
    if isinstance(value, str):
        return rewrite(value)
    if isinstance(value, dict):
        return {rewrite(key): rewritten(item, rewrite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(rewritten(item, rewrite) for item in value)
    if dataclasses.is_dataclass(value):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return type(value)(**{name: item if name == "role" else rewritten(item, rewrite)
                              for name, item in fields.items()})
    return value


@EACH
@LAW
@given(conversation=conversations())
def test_kinds_mark_exactly_what_the_model_writes(tokenizer, dialect, conversation):
    """The ids of a reply, decoded, are the reply: thinking, content and calls, then END."""
    rendered = render(conversation, tokenizer, dialect)
    written = (Kind.THINK, Kind.TOOL_CALL, Kind.ANSWER, Kind.END)
    runs = itertools.groupby(zip(rendered.kinds, rendered.ids, strict=True),
                             lambda pair: pair[0] in written)
    turns = [[i for _, i in run] for mine, run in runs if mine]
    replies = [message for message in conversation.messages if message.role == "assistant"]
    assert len(turns) == len(replies)
    for ids, message in zip(turns, replies, strict=True):
        assert ids.pop() in (tokenizer.end_of_turn, *stop_ids(tokenizer, dialect))
        reply = split_reply(decode_reply(ids, tokenizer, dialect), dialect)
        assert reply.tool_calls == message.tool_calls
        at = 0
        for part in (message.thinking.strip(), message.content.strip()):
            at = tokenizer.decode(ids).index(part, at) + len(part)


def test_neighbouring_texts_of_one_kind_are_encoded_as_one():
    """Pieces may cross the seam of two texts, as they do for a tokenizer that sees the text."""
    class Recorder:
        seen = []

        def encode(self, text):
            self.seen.append(text)
            return [0] * len(text)

        def token_id(self, token):
            return 1

    render(FULL, Recorder(), "mistral")
    assert Recorder.seen[:6] == [
        "user\nBe brief.\n\n", " " + json.dumps([WEATHER, FULL_CLOCK], ensure_ascii=False),
        "\n\nWeather in Paris and Rome?", "\n", "model\n", "Two cities.\n"]


# --- reply -> calls -------------------------------------------------------------------------------

def reply_ids(message, tokenizer, dialect) -> list[int]:
    """What the model would have to write for this message, less what ends it."""
    question = (Message("user", "?"),)
    start = len(render(Conversation(question), tokenizer, dialect, generate=True).ids)
    whole = render(Conversation((*question, message)), tokenizer, dialect)
    return whole.ids[start:whole.kinds.index(Kind.END)]


def rendered_reply(message, tokenizer, dialect) -> str:
    return tokenizer.decode(reply_ids(message, tokenizer, dialect))


@EACH
@LAW
@given(wanted=st.lists(calls, max_size=3))
def test_calls_survive_the_way_through_ids_and_back(tokenizer, dialect, wanted):
    """From ids always; from text too, but for a string that itself spells <escape>."""
    ids = reply_ids(Message("assistant", tool_calls=tuple(wanted)), tokenizer, dialect)
    reply = decode_reply(ids, tokenizer, dialect)
    assert reply == tokenizer.decode(ids)
    assert parse_tool_calls(reply, dialect) == wanted
    assert dump_json([call.arguments for call in parse_tool_calls(reply, dialect)]).count(
        ".0") == dump_json([call.arguments for call in wanted]).count(".0")  # floats stay floats
    if dialect != "functiongemma" or "<escape>" not in dump_json([[c.name, c.arguments]
                                                                  for c in wanted]):
        assert parse_tool_calls(str(reply), dialect) == wanted


@EACH
def test_a_tag_that_is_spelled_is_text(tokenizer, dialect):
    """Its string in plain pieces is no control token to who reads ids, and is one in text."""
    call = reply_ids(Message("assistant", tool_calls=(ToolCall("f", {"a": "b"}),)), tokenizer,
                     dialect)
    spelled = tokenizer.encode(tokenizer.decode(call))
    assert spelled != call and tokenizer.decode(spelled) == tokenizer.decode(call)
    assert len(parse_tool_calls(tokenizer.decode(spelled), dialect)) == 1
    reply = split_reply(decode_reply(spelled, tokenizer, dialect), dialect)
    assert reply == Message("assistant", tokenizer.decode(call))
    both = split_reply(decode_reply(spelled + call, tokenizer, dialect), dialect)
    assert both.content == reply.content and len(both.tool_calls) == 1
    halves = [*call[:1], *tokenizer.encode(tokenizer.decode(call[1:]))]  # only the first is real
    if dialect != "mistral":  # which has no other in a call
        with pytest.raises(MalformedCall, match="missing|no value"):
            parse_tool_calls(decode_reply(halves, tokenizer, dialect), dialect)
    with pytest.raises(MalformedCall):  # a real one inside a string
        at = call.index(tokenizer.encode("b")[0])
        inside = [*call[:at], tokenizer.token_id(next(iter(DIALECTS[dialect].tokens))), *call[at:]]
        parse_tool_calls(decode_reply(inside, tokenizer, dialect), dialect)


def test_mistral_calls_keep_their_ids(tokenizer):
    wanted = [ToolCall("clock", {}, "abcDEF123"), ToolCall("clock", {})]
    text = rendered_reply(Message("assistant", tool_calls=tuple(wanted)), tokenizer, "mistral")
    assert parse_tool_calls(text, "mistral") == wanted


plain = st.text(st.sampled_from("ab \n\"'{}é▁")).map(str.strip)


@LAW
@given(content=plain, thinking=plain, wanted=st.lists(calls, max_size=2).map(tuple))
def test_a_hermes_reply_comes_back_whole(tokenizer, content, thinking, wanted):
    message = Message("assistant", content, thinking, wanted)
    assert split_reply(rendered_reply(message, tokenizer, "hermes"), "hermes") == message


def test_thinking_may_speak_of_calls_and_may_be_cut_off():
    text = "<think>\nI could write <tool_call> here\n</think>\nNo need."
    assert split_reply(text).content == "No need."
    assert parse_tool_calls(text) == []
    assert split_reply("<think>\nhm") == Message("assistant", thinking="hm")


def test_thinking_has_no_token_in_mistral_and_comes_back_as_content(tokenizer):
    message = Message("assistant", "Yes.", "Is it?")
    text = rendered_reply(message, tokenizer, "mistral")
    assert split_reply(text, "mistral") == Message("assistant", "Is it?\nYes.")


GOOD = '{"name": "f", "arguments": {}}'


@pytest.mark.parametrize("inside, complaint", [
    ("", "not JSON"),
    ("{'name': 'f', 'arguments': {}}", "not JSON"),
    ('{"name": "f", "arguments": {"a": 1}', "not JSON"),
    ('{"name": "f", "arguments": {"a": 1, "a": 2}}', "'a' occurs twice"),
    ('{"name": "f", "name": "g", "arguments": {}}', "'name' occurs twice"),
    ('{"name": "f", "arguments": {"a": NaN}}', "NaN"),
    ('{"name": "f", "arguments": {"a": -Infinity}}', "Infinity"),
    ('{"name": "f", "arguments": {"a": 1e999}}', "1e999"),
    ('{"name": "f", "arguments": {"a": "\\ud800"}}', "surrogate"),
    ('{"name": "f", "arguments": {"a": "\n"}}', "not JSON"),
    ('{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}", "digits"),
    ('{"name": "f", "arguments": {"a": ' + "[" * 70 + "]" * 70 + "}}", "nested deeper"),
    ('{"name": "f", "arguments": ' + '{"a": ' * 100_000, "nested deeper"),
    ('{"name": "f"}', "\"arguments\" of 'f' is missing"),
    ('{"name": "f", "arguments": "{}"}', "not a JSON object"),
    ('{"name": "f", "arguments": [1]}', "not a JSON object"),
    ('{"name": "", "arguments": {}}', '"name"'),
    ('{"name": 3, "arguments": {}}', '"name"'),
    ('{"arguments": {}}', '"name"'),
    ('{"name": "f", "arguments": {}, "id": 3}', '"id"'),
    ('{"name": "f", "arguments": {}, "why": ""}', "'why'"),
    ('"f"', "not str"),
    ("null", "not NoneType"),
])
def test_what_is_no_call_is_named(inside, complaint):
    for dialect, text in [("hermes", f"<tool_call>\n{inside}\n</tool_call>"),
                          ("mistral", f"[TOOL_CALLS] [{inside}]")]:
        if dialect == "hermes" or inside:
            with pytest.raises(MalformedCall, match=re.escape(complaint)) as caught:
                parse_tool_calls(text, dialect)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("dialect, text, complaint", [
    ("hermes", f"<tool_call>\n{GOOD}", "</tool_call> is missing"),
    ("hermes", f"<tool_call>\n{GOOD} and more\n</tool_call>", "</tool_call> is missing"),
    ("hermes", f"<tool_call>{GOOD}</tool_call> and so on", "text after a call"),
    ("hermes", f"{GOOD}</tool_call>", "without <tool_call>"),
    ("hermes", f"<tool_call>{GOOD}</tool_call>" * 9 + f"<tool_call>{GOOD}", "</tool_call> is miss"),
    ("mistral", "[TOOL_CALLS] []", "not JSON"),
    ("mistral", f"[TOOL_CALLS] {GOOD}", "begin with '[TOOL_CALLS] ['"),
    ("mistral", "[TOOL_CALLS]", "begin with '[TOOL_CALLS] ['"),
    ("mistral", f"[TOOL_CALLS] [{GOOD}", "] is missing after the call of 'f'"),
    ("mistral", f"[TOOL_CALLS] [{GOOD},]", "not JSON"),
    ("mistral", f"[TOOL_CALLS] [{GOOD}] and so on", "text after a call"),
    ("functiongemma", "call:f{}<end_function_call>", "without <start_function_call>"),
])
def test_calls_end_where_they_should(dialect, text, complaint):
    with pytest.raises(MalformedCall, match=re.escape(complaint)):
        parse_tool_calls(text, dialect)


@pytest.mark.parametrize("inside, complaint", [
    ("", "call:name{…}, not the end"),
    ('{"name": "f"}', "call:name{…}, not"),
    ("call:", "a name or key is missing at the end"),
    ("call:{}", "a name or key is missing at '{}'"),
    ("call:<escape><escape>{}", "the name of a call is empty"),
    ("call:f", "{ is missing after 'f', at the end"),
    ("call:f{", "a name or key is missing at the end"),
    ("call:f{a:1", ", or } is missing at the end"),
    ("call:f{a:[1", ", or ] is missing at the end"),
    ("call:f{a}", ": is missing after 'a'"),
    ("call:f{a:}", "no value at '}'"),
    ("call:f{a:Paris}", "no value at 'Paris}'"),
    ("call:f{a:NaN}", "no value at 'NaN}'"),
    ("call:f{a:-Infinity}", "no value at '-Infinity}'"),
    ("call:f{a:1e999}", "1e999 is not a JSON number"),
    ("call:f{a:007}", "text after the JSON value"),
    ("call:f{a:" + "9" * 5000 + "}", "digits"),
    ("call:f{a:1,a:2}", "'a' occurs twice"),
    ("call:f{a:1,<escape>a<escape>:2}", "'a' occurs twice"),
    ("call:f{a:1,}", "a name or key is missing"),
    ("call:f{a:<escape>Paris}", "<escape> is missing after the text that begins 'Paris}'"),
    ("call:f{a:<escape>x<escape>y<escape>}", ", or } is missing at 'y<escape>}'"),
    ("call:f{a:<escape>\ud800<escape>}", "surrogate"),
    ("call:f{a:" + "[" * 70 + "]" * 70 + "}", "nested deeper"),
    ("call:f{a:" * 1 + "{a:" * 100_000, "nested deeper"),
    ("call:f{} and more", "<end_function_call> is missing after the call of 'f'"),
])
def test_what_is_no_call_of_functiongemma_is_named(inside, complaint):
    with pytest.raises(MalformedCall, match=re.escape(complaint)) as caught:
        parse_tool_calls(f"<start_function_call>{inside}", "functiongemma")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_functiongemma_reads_what_its_own_examples_have():
    text = ("<start_function_call>call:get_weather{location:<escape>Tokyo, Japan<escape>,days:[1, "
            "2.5], deep: {a:None,b:null,c:true} }<end_function_call>")
    wanted = [ToolCall("get_weather", {"location": "Tokyo, Japan", "days": [1, 2.5],
                                       "deep": {"a": None, "b": None, "c": True}})]
    assert parse_tool_calls(text, "functiongemma") == wanted
    # what a model goes on to write where nothing has stopped it
    text += "<start_function_response>response:get_weather{value:<escape>made up<escape>}"
    assert parse_tool_calls(text, "functiongemma") == wanted
    assert split_reply("Hm.<start_function_response>x", "functiongemma").content == "Hm."


@LAW
@given(text=st.text() | st.tuples(
    st.sampled_from(["<tool_call>", "[TOOL_CALLS] [", "<start_function_call>call:f{"]),
    st.lists(st.sampled_from([*'<>/{}[]":, namef1\\', "<escape>", "</tool_call>", "null",
                              "<end_function_call>", '"name"', '"arguments"'])).map("".join),
).map("".join))
def test_any_text_parses_or_is_malformed_and_nothing_else(text):
    for dialect in DIALECTS:
        try:
            found = parse_tool_calls(text, dialect)
        except MalformedCall:
            continue
        assert all(isinstance(call, ToolCall) for call in found)


def test_strict_json():
    assert load_json(' {"a": [1, 2.5, "é"]} ') == {"a": [1, 2.5, "é"]}
    assert load_json("[" * 64 + "1" + "]" * 64) is not None
    with pytest.raises(ValueError, match="deeper than 64"):
        load_json("[" * 65 + "]" * 65)
    with pytest.raises(ValueError, match="text after the JSON value: '2'"):
        load_json("1 2")
    assert dump_json({"a": "é<", "b": 1.0}) == '{"a": "é<", "b": 1.0}'
    assert call_from({"name": "f", "arguments": {}}) == ToolCall("f", {})


# --- hostile text ---------------------------------------------------------------------------------

INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\xad\u034f\u202e\u2067\0\u0338\u20d2\u0301\ufe0f"
LOOKALIKES = [str.maketrans("<>[]_eo", each) for each in (  # Cyrillic, and what NFKC makes plain
    "＜＞［］＿ео", "﹤﹥〔〕‿ℯℴ", "‹›⁅⁆_𝐞𝐨", "≮≯[]﹍ｅｏ")]
BRACES = {"<": "{\ue000", "[": "{\ue001"}  # what a notation quotes as it does these, and no tag has
VOCABULARIES = {"tokenizer": "a tiny vocabulary", "nano_tokenizer": "nano",
                "gemma2_tokenizer": "Gemma 2"}
LAYOUTS = [openai_row, mistral, typed, sharegpt, hermes]


def hostile_texts(rng, tokens, number) -> list[str]:
    """Tags whole, nested, cut in two by what nobody sees, look-alikes, halves that only two texts
    together make whole, and what would close a call, a string or a turn if it were not text."""
    texts = [""] * number
    for n in range(number):
        if rng.random() < 0.3:
            half = rng.choice(tokens)
            at = rng.randrange(1, len(half))
            texts[n - 1], texts[n] = texts[n - 1] + half[:at], half[at:]
        for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
            tag, inner = rng.sample(tokens, 2)
            at = rng.randrange(1, len(tag))
            texts[n] += rng.choice([
                tag, tag + inner, tag[:at] + inner + tag[at:], tag[:at] + rng.choice(INVISIBLE)
                + tag[at:], tag.translate(rng.choice(LOOKALIKES)), html.escape(tag), tag[::-1],
                tag.replace("_", "▁"), tag.upper(), "\u202e" + tag[::-1],
                "".join(char + rng.choice(INVISIBLE) for char in tag),
                "".join(f"<0x{byte:02X}>" for byte in tag.encode()), tag[at:],
                f"\n{tag}model\n", f'"}}}}\n{tag}', f"\\{tag}", f"{tag}}},x:{{", "a ", " \n", "é"])
    return texts


def hostile_conversation(texts, rng) -> Conversation:
    """One with a text at every place that has one, mostly in the order in which they are rendered.

    Of several keys in an object each begins with another letter, for they may be sorted.
    """
    text = texts.__next__
    system, name, said = text(), text() or "f", text()
    schema = {"type": "object", f"a{text()}": text(), "properties": {text(): {
        "type": "string", "description": text(), "enum": [text(), {text(): text()}],
        "default": text(), "title": [text()], "items": {"properties": {text(): {"type": text()}}}}}}
    tool = {"type": "function", "function": {
        "name": name, "description": said, "parameters": schema, f"z{text()}": text()}}
    asked, thought, told = text(), text(), text()
    calls = tuple(ToolCall(
        text() or "f", {text(): text()} if rng.random() < 0.5 else
        {f"a{text()}": text(), f"b{text()}": [text(), {text(): text()}]}, text() or None)
        for _ in range(rng.choice([0, 1, 2])))
    some = [text(), dump_json(text()), dump_json({text(): [text()], text(): {text(): text()}})]
    results = [Message("tool", result, name=text() or None, tool_call_id=call.id)
               for call, result in zip(calls, rng.sample(some, 2), strict=False)]
    answers = [Message("assistant", text(), text())] if calls and rng.random() < 0.8 else []
    return Conversation((
        Message("system", system), Message("user", asked),
        Message("assistant", told, thought, calls), *results, *answers,
        Message("user", text()), Message("assistant", text())), (tool,))


def spans(ids, kinds, tokenizer) -> list[tuple]:
    """The stretches of one kind between control tokens, and these: kind, whether control, text."""
    control = tokenizer._control - tokenizer._bytes.keys()
    marked = [(kind, i in control, i) for kind, i in zip(kinds, ids, strict=True)]
    return [(*key, tokenizer.decode([i for *_, i in run]))
            for key, run in itertools.groupby(marked, lambda each: each[:2])]


def harmless(text) -> str:
    return "".join(BRACES.get(char, char) for char in text)


def harmful(found: list[tuple]) -> list[tuple]:
    """The stretches of what was harmless, with the texts as they were."""
    def text(each):
        for char, braces in BRACES.items():
            each = each.replace(braces, char)
        return each

    return [(kind, control, each if control else text(each)) for kind, control, each in found]


def tokens_of(tokenizer) -> list[str]:
    special = ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<unused9>"]
    return [token for token in [*special, *tokenizer.new_tokens] if tokenizer.knows(token)]


def check_hostile_texts(tokenizer, dialect, number, seed=0) -> int:
    """No text yields a control id or ends a span, and all come back; how many texts there were."""
    rng, tokens, tried = random.Random(f"{seed} {dialect}"), tokens_of(tokenizer), 0
    while tried < number:
        texts = hostile_texts(rng, tokens, 60)
        state, left = rng.getstate(), iter(texts)
        hostile = hostile_conversation(left, rng)
        tried += len(texts) - len(list(left))
        rng.setstate(state)
        peaceful = hostile_conversation(map(harmless, texts), rng)
        found, wanted = (render(each, tokenizer, dialect) for each in (hostile, peaceful))
        assert spans(found.ids, found.kinds, tokenizer) == harmful(
            spans(wanted.ids, wanted.kinds, tokenizer)), texts
        for message in hostile.messages:
            if message.role == "assistant":
                check_reply(message, tokenizer, dialect)
        for layout in rng.sample(LAYOUTS, 2):
            check_row(layout, texts, tokenizer, dialect)
    return tried


def check_reply(message, tokenizer, dialect) -> None:
    """What the model would write for this message is read as this message."""
    reply = split_reply(decode_reply(reply_ids(message, tokenizer, dialect), tokenizer, dialect),
                        dialect)
    if dialect != "mistral":  # which alone writes ids
        message = dataclasses.replace(message, tool_calls=tuple(
            dataclasses.replace(call, id=None) for call in message.tool_calls))
    thinking, content = message.thinking.strip(), message.content.strip()
    if dialect != "hermes":  # which alone has tags for thinking
        thinking, content = "", "\n".join(filter(None, [thinking, content]))
    assert reply == dataclasses.replace(message, thinking=thinking, content=content), message


def check_row(layout, texts, tokenizer, dialect) -> None:
    """A data set's fields are the texts that they were; where Hermes tags are structure, others are
    not, and no tag is a control token that was not read as structure."""
    control = tokenizer._control - tokenizer._bytes.keys()
    structure = layout is hermes
    words = (each.strip() or "x" for each in texts)
    if structure:
        words = (re.sub(r"</?(tool|think)", "</", each) for each in words)
    text = words.__next__
    tool = {"type": "function", "function": {"name": text(), "description": text(), "parameters": {
        "type": "object", "properties": {text(): {"description": text()}}}}}
    calls = tuple(ToolCall(text(), {text(): text(), text(): {text(): text()}}, f"{n}{text()}")
                  for n in range(2))
    wanted = Conversation((
        Message("system", text()), Message("user", text()), Message("assistant", tool_calls=calls),
        *(Message("tool", text(), tool_call_id=call.id) for call in calls),
        Message("assistant", text(), text()), Message("user", text()),
        Message("assistant", text())), (tool,))
    row = json.loads(json.dumps(layout(wanted)))
    found = read_row(row | ({} if structure else {"hermes_tags": False}), lambda notice: None)
    if layout in (sharegpt, hermes):
        assert without_ids(found) == without_ids(wanted), layout
    else:
        assert found == wanted, layout
    try:  # by the rule that Hermes tags are structure, whatever comes of it
        found = read_row({key: row[key] for key in row if key != "hermes_tags"}, lambda _: None)
    except ValueError:
        return
    ids, others = (render(each, tokenizer, dialect).ids
                   for each in (found, rewritten(found, harmless)))
    assert [i for i in ids if i in control] == [i for i in others if i in control], layout


@EACH
@pytest.mark.parametrize("which", ["tokenizer", "nano_tokenizer", "gemma2_tokenizer"])
def test_no_text_becomes_a_control_token_or_ends_a_span(request, which, dialect, cases, tried):
    """Over ten thousand of them on each vocabulary."""
    number = check_hostile_texts(request.getfixturevalue(which), dialect, cases(3400, 34_000))
    tried(f"hostile texts, {VOCABULARIES[which]}", number)


@EACH
@pytest.mark.parametrize("which", ["nano_tokenizer", "gemma2_tokenizer"])
def test_no_text_gets_out_of_its_place_in_a_chat(request, which, dialect, cases, tried):
    """Whatever is asked, called, returned or raised, each prompt goes on from the last one and from
    what the model then wrote, and its control tokens are those of the layout."""
    tokenizer, rng = request.getfixturevalue(which), random.Random(dialect)

    def prompts_of(text) -> list:
        def f(a: str, more: dict) -> object:
            how = rng.randrange(4)
            if how == 0:
                raise ValueError(text())
            return [text(), {text(): [text(), {text(): text()}]}, [text()]][how - 1]

        def reply(shown):
            prompt = render(Conversation(tuple(shown), tools), tokenizer, dialect, generate=True)
            calls = [ToolCall("f", {"a": text(), "more": {text(): text()}})
                     for _ in range(len(prompts) % 3)]
            thought = text() if dialect == "hermes" else ""  # which alone has tags for it
            ids = reply_ids(Message("assistant", text(), thought, tuple(calls)), tokenizer, dialect)
            assert all(prompt.ids[:len(start)] == start for start in whole[-1:])
            prompts.append(prompt)
            whole.append(prompt.ids + ids)
            return decode_reply(ids, tokenizer, dialect)

        prompts, whole, messages, tools = [], [], [], (tool_schema(f),)
        for _ in range(2):
            messages.append(Message("user", text()))
            for _ in converse(messages, reply, {"f": f}, dialect, timeout=None, budget=10**6):
                pass
            whole.clear()  # an empty answer is shown as another
        return prompts

    number, many = 0, cases(400, 4000)
    while number < many:
        texts = hostile_texts(rng, tokens_of(tokenizer), 100)
        state, left = rng.getstate(), iter(texts)
        found = prompts_of(left.__next__)
        number += len(texts) - len(list(left))
        rng.setstate(state)
        wanted = prompts_of(map(harmless, texts).__next__)
        for one, other in zip(found, wanted, strict=True):
            assert spans(one.ids, one.kinds, tokenizer) == harmful(
                spans(other.ids, other.kinds, tokenizer))
    tried(f"hostile texts, {VOCABULARIES[which]}", number)


# --- the chat template ----------------------------------------------------------------------------

def openai(conversation, as_text=False) -> list[dict]:
    """The messages as OpenAI's API has them, arguments as objects or `as_text`."""
    arguments = dump_json if as_text else lambda value: value
    rows = []
    for message in conversation.messages:
        row = {"role": message.role, "content": message.content}
        if message.thinking:
            row["reasoning_content"] = message.thinking
        if message.tool_calls:
            row["tool_calls"] = [
                {"type": "function",
                 "function": {"name": call.name, "arguments": arguments(call.arguments)},
                 **({"id": call.id} if call.id else {})} for call in message.tool_calls]
        if message.name:
            row["name"] = message.name
        if message.tool_call_id:
            row["tool_call_id"] = message.tool_call_id
        rows.append(row)
    return rows


@functools.cache
def jinja(dialect):
    """The template as transformers compiles it (`utils/chat_template_utils.py`)."""
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)

    def refuse(message):
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    template = environment.from_string(chat_template(dialect))
    return lambda messages, **names: template.render(messages=messages, bos_token="<bos>", **names)


def spelled_as_json(conversation):
    """Results that a template can tell to be JSON or text: as `dump_json` has them, or neither."""
    def plain(message):
        text = message.content.strip()
        try:
            text = dump_json(load_json(text))
        except ValueError:
            text = f"x {text}" if text[:1] in ("{", "[") else text
        return dataclasses.replace(message, content="x" + text if text[:1] == '"' else text)

    return dataclasses.replace(conversation, messages=tuple(
        plain(each) if each.role == "tool" else each for each in conversation.messages))


@EACH
@pytest.mark.parametrize("generate", [False, True])
@LAW
@given(conversation=conversations().map(spelled_as_json))
def test_the_template_says_what_render_says(tokenizer, dialect, generate, conversation):
    text = jinja(dialect)(openai(conversation), tools=list(conversation.tools),
                          add_generation_prompt=generate)
    assert text == tokenizer.decode(render(conversation, tokenizer, dialect, generate).ids)


@EACH
def test_the_template_takes_what_servers_send(tokenizer, dialect):
    """Arguments as text, calls without "function", content null, `tools` and fields left out."""
    call = FULL.messages[2].tool_calls[0]
    as_text = json.dumps(call.arguments)
    say = jinja(dialect)
    question = {"role": "user", "content": "?"}
    for arguments in (as_text, call.arguments):
        sent = {"id": "c1", "name": call.name, "arguments": arguments}
        sent = {"id": "c1", "function": sent} if arguments == as_text else sent
        if dialect == "functiongemma" and arguments == as_text:
            with pytest.raises(ValueError, match="as an object"):
                say([question, {"role": "assistant", "tool_calls": [sent]}])
            continue
        text = say([question, {"role": "assistant", "content": None, "tool_calls": [sent]}])
        wanted = Conversation((Message("user", "?"), Message("assistant", tool_calls=(call,))))
        assert text == tokenizer.decode(render(wanted, tokenizer, dialect).ids)
    for wrong in [[], [{"role": "assistant", "content": "a"}],
                  [question, {"role": "system", "content": "b"}]]:
        with pytest.raises(ValueError, match="first"):
            say(wrong)


@EACH
def test_transformers_renders_the_template(tokenizer, dialect):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template(
        [openai(FULL)], tools=list(FULL.tools), chat_template=chat_template(dialect),
        add_generation_prompt=True, bos_token="<bos>")
    assert rendered[0] == tokenizer.decode(render(FULL, tokenizer, dialect, generate=True).ids)


EXPORTS = [(which, dialect) for which in ("tiny", "gemma2") for dialect in DIALECTS]


@pytest.fixture(scope="module", params=EXPORTS, ids="-".join)
def export(request, tmp_path_factory):
    """An export's tokenizer, its dialect, transformers' reading of it, and what texts may not hold.

    A text that spells a control token or has a U+2581 is another text to transformers, and it cuts
    a run of spaces that is longer than the longest piece otherwise.
    """
    transformers = pytest.importorskip("transformers")
    which, dialect = request.param
    model = (make_tokenizer_model(tmp_path_factory.mktemp("base")) if which == "tiny"
             else real_input("gemma2_tokenizer/tokenizer.model"))
    tokenizer, folder = Tokenizer.load(model.parent), tmp_path_factory.mktemp("export")
    tokenizer.add_tokens(DIALECTS[dialect].tokens)
    tokenizer.save(folder, chat_template(dialect))
    tokens = "|".join(map(re.escape, sorted(tokenizer._ids, key=len, reverse=True)))
    foreign = re.compile(rf"{tokens}|▁| {{{5 if which == 'tiny' else 32},}}")
    return tokenizer, dialect, transformers.AutoTokenizer.from_pretrained(folder), foreign


@LAW
@given(conversation=conversations(), generate=st.booleans(), as_text=st.booleans())
def test_transformers_renders_an_export_to_the_same_ids(export, conversation, generate, as_text):
    tokenizer, dialect, theirs, foreign = export
    conversation = spelled_as_json(rewritten(conversation, lambda text: foreign.sub("×", text)))
    as_text = as_text and dialect != "functiongemma"
    ids = theirs.apply_chat_template(openai(conversation, as_text), tools=list(conversation.tools),
                                     add_generation_prompt=generate, return_dict=True)["input_ids"]
    assert ids == render(conversation, tokenizer, dialect, generate).ids


@EACH
@pytest.mark.parametrize("which", ["tokenizer", "gemma2_tokenizer"])
def test_ids_are_those_of_the_template_text(request, which, dialect):
    """A tokenizer that cuts the text at control tokens and encodes the rest gets the same ids."""
    tokenizer = request.getfixturevalue(which)
    control = ["<bos>", "<start_of_turn>", "<end_of_turn>", *DIALECTS[dialect].tokens]
    pattern = "(" + "|".join(map(re.escape, control)) + ")"
    ids = []
    for n, part in enumerate(re.split(pattern, jinja(dialect)(openai(FULL), tools=FULL.tools))):
        ids += [tokenizer.token_id(part)] if n % 2 else tokenizer.encode(part)
    assert render(FULL, tokenizer, dialect).ids == ids


@pytest.mark.parametrize("mode", ["append", "reserved"])
@pytest.mark.parametrize("how", ["user_defined_symbols", "control_symbols", "named slots"])
def test_functiongemmas_own_vocabulary_has_the_tokens_already(tmp_path, how, mode):
    """On functiongemma-270m-it they are ids 46 to 52, <unused40> to <unused46> of Gemma 3: pieces
    of their own, of either type, or slots that only its tokenizer_config.json names. Beyond the
    table are two tokens of images, and its config has a field for each of the tokens."""
    tokens = list(DIALECTS["functiongemma"].tokens)
    images = {512: "<image_soft_token>", 513: "<end_of_image>"}
    slots = [f"<unused{n}>" for n in range(40, 47)]
    turns = ["<start_of_turn>", "<end_of_turn>"]
    symbols = {"user_defined_symbols": [*turns, *slots, "<unused50>"]}
    if how == "user_defined_symbols":
        symbols = {how: [*turns, *tokens, "<unused50>"]}
    elif how == "control_symbols":
        symbols = {"user_defined_symbols": [*turns, "<unused50>"], how: tokens}
    base = make_tokenizer_model(tmp_path / "base", **symbols).parent
    bare = Tokenizer.load(base)
    named = dict(zip([bare.token_id(t) for t in (slots if how == "named slots" else tokens)],
                     tokens, strict=True))
    (base / "tokenizer_config.json").write_text(json.dumps({
        "sfc_token": "<start_function_call>", "escape_token": "<escape>",
        "added_tokens_decoder": {i: {"content": token, "special": True}
                                 for i, token in {**named, **images}.items()}}))
    tokenizer = Tokenizer.load(base)
    for _ in range(2):  # and again from what is saved
        assert tokenizer.add_tokens(tokens, mode, 512) == list(named) and not tokenizer.new_tokens
        ids = reply_ids(FULL.messages[2], tokenizer, "functiongemma")
        assert set(ids) >= {tokenizer.token_id("<escape>"), *list(named)[2:4]}
        reply = decode_reply(ids, tokenizer, "functiongemma")
        assert split_reply(reply, "functiongemma").tool_calls == tuple(
            dataclasses.replace(call, id=None) for call in FULL.messages[2].tool_calls)
        assert stop_ids(tokenizer, "functiongemma")[-1] == list(named)[4]
        assert not set(named) & set(tokenizer.encode("".join([*tokens, *slots])))
        tokenizer.save(tmp_path / "saved", chat_template("functiongemma"))
        tokenizer = Tokenizer.load(tmp_path / "saved")
    Constraint(Vocabulary(tokenizer), FULL.tools, "functiongemma").bar(torch.zeros(512), 99)
    new = tokenizer.add_tokens(["<tool_call>"], mode, 512)  # none of its slots is taken
    assert new == [512 if mode == "append" else bare.token_id("<unused50>")]


# --- other implementations ------------------------------------------------------------------------

CITY = {"type": "object", "required": ["city"], "properties": {
    "unit": {"type": "string", "enum": ["°C", "°F"], "description": "of <b>all</b> \"degrees\""},
    "city": {"type": "string", "description": "Its name"},
    "where": {"type": "object", "description": "", "properties": {
        "zip": {"type": "integer", "description": "Code"}}, "required": ["zip"]},
    "days": {"type": "array", "description": "Which", "items": {"type": "number"}}}}
TOOLS = ({"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a city", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}})
REFERENCE = Conversation((
    Message("system", "Be brief."), Message("user", "Weather?"),
    Message("assistant", tool_calls=(
        ToolCall("get_weather", {"city": 'Zü"rich', "days": [1, 2.5, True, {"a": {}}], "D": []},
                 "abcDEF123"),
        ToolCall("clock", {}, "abcDEF124"))),
    Message("tool", '{"sky":["clear"], "t": 1.50}', name="get_weather", tool_call_id="abcDEF123"),
    Message("tool", 'a "quoted" word', name="clock", tool_call_id="abcDEF124"),
    Message("assistant", "Clear."), Message("user", "Again"),
    Message("assistant", tool_calls=(ToolCall("clock", {"x": None}, "abcDEF125"),)),
    Message("tool", "12.50", name="clock", tool_call_id="abcDEF125"),
    Message("assistant", "12.5")), TOOLS)
MISTRAL_BLOCKS = re.compile(r"\[AVAILABLE_TOOLS\].*?\[/AVAILABLE_TOOLS\]|\[TOOL_CALLS\].*?\}\](?=<)"
                            r"|(?:\[TOOL_RESULTS\].*?\[/TOOL_RESULTS\])+")


def reference(name):
    path = pathlib.Path(__file__).parent / "references" / "dialects.json"
    return json.loads(path.read_text())[name]


def test_mistral_blocks_are_those_of_mistral_common(tokenizer):
    """Tools, calls and results as InstructTokenizerV3 writes them; all but the tools in its order.

    It shows the tools before the last question, here they are in the first turn.
    """
    ours = MISTRAL_BLOCKS.findall(tokenizer.decode(render(REFERENCE, tokenizer, "mistral").ids))
    theirs = reference("mistral")
    assert ours == sorted(theirs, key=lambda block: not block.startswith("[AVAILABLE_TOOLS]"))
    assert len(ours) == 5


def test_functiongemma_is_that_of_the_published_template(tokenizer):
    ours = tokenizer.decode(render(REFERENCE, tokenizer, "functiongemma").ids)
    assert ours == reference("functiongemma")


def test_references_are_what_mistral_common_makes():
    pytest.importorskip("mistral_common")
    from make_references import mistral_blocks
    assert mistral_blocks() == reference("mistral")


# --- a dialect of one's own -----------------------------------------------------------------------

@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The whole of a new dialect, and a tokenizer that knows it."""
    monkeypatch.setitem(DIALECTS, "toy", Dialect(
        tokens={"<call>": "a call", "<end>": "end of calls, tools or results", "<got>": "results",
                "<have>": "tools"},
        tools=Block("<have>", "; ", "<end>"),
        calls=Block("<call>", "<call>", "<end>"),
        results=Block("<got> ", " | ", "<end>")))
    tokenizer = Tokenizer.load(make_tokenizer_model(tmp_path).parent)
    tokenizer.add_tokens(DIALECTS["toy"].tokens)
    return tokenizer


@settings(LAW, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.lists(calls, min_size=1, max_size=3), conversation=conversations())
def test_a_new_dialect_is_one_small_table(toy, wanted, conversation):
    """Its renderer, its reader and its template all come from it."""
    ids = reply_ids(Message("assistant", "So:", tool_calls=tuple(wanted)), toy, "toy")
    for reply in (decode_reply(ids, toy, "toy"), toy.decode(ids)):
        assert parse_tool_calls(reply, "toy") == wanted
    text = jinja("toy")(openai(conversation), tools=list(conversation.tools))
    assert text == toy.decode(render(conversation, toy, "toy").ids)
