"""data.py: who is held out, labels, cuts, and packed batches."""

import json
from collections import Counter

import pytest
import torch
from conftest import LAW, TOOL, load_tokenizer, real_input
from hypothesis import given
from hypothesis import strategies as st

from minilora.chat import Conversation, Kind, Message, ToolCall, parse_tool_calls
from minilora.config import UserError
from minilora.data import (
    IGNORED,
    Example,
    batches,
    collate,
    make_example,
    make_examples,
    pack_rows,
    split,
    summary,
    trained_kinds,
)
from minilora.readers import read_conversations, warn

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
    Message("tool", '{"sky": "clear"}'),
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


def test_what_is_left_out_is_told_with_a_way_out(tokenizer, capsys):
    no_call = talk("a", source="data.jsonl:7 (row 7)")
    too_long = talk("Why? " * 200, source="data.jsonl:9 (row 9)")
    size = len(make_example(too_long, tokenizer, train_on="assistant"))
    given_ = [no_call, LONG, too_long]
    for train_on, left in ("tool_call", [LONG]), ("assistant", [no_call, LONG]):
        examples = make_examples(given_, tokenizer, length=250, train_on=train_on, on_problem=warn)
        assert [example.source for example in examples] == [item.source for item in left]
    captured = capsys.readouterr()
    not_there = "nothing to train with train-on tool_call; expected at least one token of that kind"
    assert captured.out == "" and captured.err.splitlines() == [
        f"note: {no_call.source}: {not_there}: leave it out with --skip, or train on assistant",
        f"note: {too_long.source}: {not_there}: leave it out with --skip, or train on assistant",
        f"note: {too_long.source}: nothing to train in the turns that fit 250 of its {size} "
        "tokens: raise --length, or leave it out with --skip"]
    with pytest.raises(UserError, match=r"data.jsonl:7 \(row 7\): .* --skip"):
        make_examples(given_, tokenizer, train_on="tool_call")


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
    path = real_input("glaive_toolcall_en_250.json")
    notices = []
    found = read_conversations(path, on_notice=notices.append)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert len(found) == len(rows) == 250 and notices == []
    tokenizer = load_tokenizer(gemma2_tokenizer_model)
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
