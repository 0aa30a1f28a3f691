"""data.py: who is held out, labels, cuts, and packed batches."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LAW, TOOL, load_tokenizer, make_example, real_input
from hypothesis import given
from hypothesis import strategies as st

from minilora.chat import Conversation, Kind, Message, ToolCall, parse_tool_calls
from minilora.config import UserError
from minilora.data import (
    IGNORED,
    Example,
    batches,
    collate,
    count_tokens,
    digest,
    make_examples,
    make_parts,
    pack_rows,
    split,
    times_in_epoch,
    trained_kinds,
)
from minilora.dialects import DIALECTS
from minilora.readers import read_conversations, warn

# --- split ----------------------------------------------------------------------------------------

def talk(text, reply="Yes.", source="") -> Conversation:
    return Conversation((Message("user", text), Message("assistant", reply)), source=source)


@LAW
@given(numbers=st.lists(st.integers(0, 30), max_size=40), share=st.floats(0, 0.99),
       seed=st.integers())
def test_split_keeps_copies_together_wherever_they_stand(numbers, share, seed):
    digests = [digest(talk(str(number), source=str(place)))
               for place, number in enumerate(numbers)]
    held = split(digests, share, seed)
    assert held.shape == (len(numbers),) and held.dtype == bool
    sides = dict(zip(digests, held.tolist(), strict=True))
    assert [sides[each] for each in digests] == held.tolist()
    assert split(digests[::-1], share, seed).tolist() == held.tolist()[::-1]
    if len(sides) == len(numbers):
        assert held.sum() == (max(1, round(share * len(numbers))) if share and numbers else 0)


def test_split_depends_on_the_seed_and_refuses_a_share_of_one():
    digests = [digest(talk(str(number))) for number in range(50)]
    assert len({tuple(split(digests, 0.2, seed)) for seed in range(5)}) == 5
    with pytest.raises(UserError, match="share is 1"):
        split(digests, 1, 0)


def test_a_digest_is_of_what_is_said_and_of_the_tools_alone():
    one = digest(LONG)
    said = list(LONG.messages)
    said[4] = replace(said[4], trained=False)
    assert digest(replace(LONG, source="copy.jsonl:9", weight=2.0, messages=tuple(said))) == one
    said[4] = replace(said[4], content="Cloudy.")
    assert len({one, digest(replace(LONG, messages=tuple(said))),
                digest(replace(LONG, tools=()))}) == 3


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


def stretches(example, tokenizer) -> list[str]:
    """The trained stretches of one kind, each as a line."""
    return [line for line in columns(example, tokenizer) if line[14] == "+"]


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
        examples = make_examples(given_, tokenizer, length=400, train_on=train_on, on_problem=warn)
        assert [example.source for example in examples] == [item.source for item in left]
    captured = capsys.readouterr()
    not_there = "nothing to train with train-on tool_call; expected at least one token of that kind"
    assert captured.out == "" and captured.err.splitlines() == [
        f"note: {no_call.source}: {not_there}: try --train-on assistant",
        f"note: {too_long.source}: {not_there}: try --train-on assistant",
        f"note: {too_long.source}: nothing to train in the turns that fit 400 of its {size} "
        "tokens: raise --length"]
    with pytest.raises(UserError, match=r"data.jsonl:7 \(row 7\): .* --train-on"):
        make_examples(given_, tokenizer, train_on="tool_call")


def test_an_untrained_message_is_only_read(tokenizer):
    """`trained` false on the first two replies: only the last one carries loss, to its end."""
    said = [replace(message, trained=False) if place in (2, 4) else message
            for place, message in enumerate(LONG.messages)]
    marked = make_example(replace(LONG, messages=tuple(said)), tokenizer, train_on="assistant")
    assert torch.equal(marked.ids, make_example(LONG, tokenizer).ids)
    assert stretches(marked, tokenizer) == [
        "ANSWER        + 'Welcome.'", "END           + '<end_of_turn>'"]
    with pytest.raises(UserError, match="nothing to train"):
        make_example(Conversation((Message("user", "a"), Message("assistant", "b", trained=False))),
                     tokenizer)


# --- conversations that are too long --------------------------------------------------------------

def test_a_long_conversation_goes_on_in_another_example_with_its_tools(tokenizer):
    whole = make_example(LONG, tokenizer)
    first, second = make_parts(LONG, tokenizer, length=len(whole) - 1)
    assert columns(first, tokenizer) == columns(whole, tokenizer)[:10] + [
        r"PROMPT        - '\n'"]
    assert columns(second, tokenizer) == [
        rf"PROMPT        - '<bos><start_of_turn>user\nBrief.\n\n<tools>\n{json.dumps(TOOL)}\n"
        r"</tools>\n\nThanks!<end_of_turn>\n<start_of_turn>model\n'",
        "ANSWER        + 'Welcome.'", "END           + '<end_of_turn>'", r"PROMPT        - '\n'"]
    assert [(part.part, part.cut, part.source) for part in (first, second)] == [
        (0, 0, LONG.source), (1, 0, LONG.source)]


def test_an_exchange_that_is_too_long_keeps_the_turns_that_fit(tokenizer):
    """Down to nothing; the other exchange is not harmed, and what is lost is counted."""
    whole = make_example(LONG, tokenizer)
    total = trained_in(whole)
    ends = [int(end) + 1 for end in (whole.kinds == Kind.END).nonzero()]
    alone = len(make_parts(LONG, tokenizer, length=len(whole) - 1)[1])  # Thanks! Welcome.
    assert alone < ends[0]  # so the second exchange fits wherever a turn of the first does
    found = set()
    for length in range(1, len(whole) + 1):
        if length < alone - 1:
            with pytest.raises(UserError, match=rf"{length} of its {len(whole)} tokens"):
                make_parts(LONG, tokenizer, length=length)
            continue
        parts = make_parts(LONG, tokenizer, length=length)
        assert all(len(part) <= length for part in parts)
        assert parts[0].cut + sum(map(trained_in, parts)) == total
        found.add(tuple(map(len, parts)))
    assert found == {(alone - 1,), (alone,), (ends[0], alone), (ends[1] + 1, alone),
                     (ends[1], alone), (len(whole),)}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_parts_are_few(tokenizer, dialect):
    """As many exchanges in each as fit to the token, also where they end with an open call."""
    tokenizer.add_tokens(DIALECTS[dialect].tokens)
    chat = replace(LONG, messages=LONG.messages[1:3] * 6)
    sizes = [len(make_example(replace(chat, messages=chat.messages[:2 * n]), tokenizer, dialect))
             for n in range(1, 7)]
    for n, size in enumerate(sizes, 1):
        assert len(make_parts(chat, tokenizer, dialect, size)) == math.ceil(6 / n)
        if n > 1:
            assert len(make_parts(chat, tokenizer, dialect, size - 1)) == math.ceil(6 / (n - 1))


def trained_in(example) -> int:
    return int((example.labels != IGNORED).sum())


def trained_ids(example, end=None) -> list[int]:
    return [label for label in example.labels[:end].tolist() if label != IGNORED]


words = st.text("ab <>/\n", min_size=1, max_size=12).filter(str.strip)
calls = st.builds(ToolCall, st.just("get_weather"), st.dictionaries(words, words, max_size=2))


@st.composite
def exchanges(draw) -> list[Message]:
    """A question, rounds of calls with their results, mostly an answer."""
    said = [Message("user", draw(words))]
    for made in draw(st.lists(st.lists(calls, min_size=1, max_size=2), max_size=2)):
        said.append(Message("assistant", thinking=draw(words | st.just("")), tool_calls=tuple(made),
                            trained=draw(st.booleans())))
        said += [Message("tool", draw(words)) for _ in made]
    if said[-1].role == "user" or draw(st.booleans()):
        said.append(Message("assistant", draw(words), trained=draw(st.booleans())))
    return said


@LAW
@given(said=st.lists(exchanges(), min_size=1, max_size=6), system=st.sampled_from(["", "Brief."]),
       tools=st.sampled_from([(), (TOOL,)]), room=st.floats(0.2, 1.0),
       train_on=st.sampled_from(["assistant", "tool_call", "prompt,answer"]),
       dialect=st.sampled_from(["hermes", "hermes", *DIALECTS]))
def test_parts_train_each_token_once_and_cut_no_call(tokenizer, said, system, tools, room,
                                                     train_on, dialect):
    opening = (Message("system", system),) if system else ()
    chat = Conversation((*opening, *sum(said, [])), tools, "here")
    for known in DIALECTS.values():
        tokenizer.add_tokens(known.tokens)
    try:
        whole = make_parts(chat, tokenizer, dialect, train_on=train_on)[0]
        length = int(room * len(whole))
        parts = make_parts(chat, tokenizer, dialect, length, train_on)
    except UserError:
        return
    found = sum(map(trained_ids, parts), [])
    if train_on == "prompt,answer":  # what every part begins with is trained once, or not at all
        rest = iter(trained_ids(whole))
        assert all(id in rest for id in found)
    else:  # of each exchange all that is trained, or as much as fits with the tools before it
        wanted = []
        for exchange in said:
            try:
                alone = make_example(replace(chat, messages=(*opening, *exchange)), tokenizer,
                                     dialect, train_on=train_on)
            except UserError:
                continue
            ends = (alone.kinds[:length] == Kind.END).nonzero().flatten().tolist()
            fit = len(alone) if len(alone) <= length else ends[-1] + 1 if ends else 0
            wanted += trained_ids(alone, fit)
        assert found == wanted
    assert parts[0].cut + sum(map(trained_in, parts)) == trained_in(whole)
    assert [part.part for part in parts] == list(range(len(parts)))
    for part in parts:
        assert len(part) <= length and trained_in(part)
        ids, kinds = part.ids.tolist(), part.kinds
        assert ids.count(tokenizer.bos) == 1 and ids[0] == tokenizer.bos
        if dialect != "hermes":
            continue
        text = tokenizer.decode(ids)
        assert text.startswith(f"<bos><start_of_turn>user\n{system}")
        assert ids.count(tokenizer.token_id("</tools>")) == len(tools)
        turns = text.split("<start_of_turn>model\n")[1:]
        made = [parse_tool_calls(turn.split("<end_of_turn>")[0]) for turn in turns]
        results = [turn.count("<tool_response>") for turn in turns]
        for number, (some, back) in enumerate(zip(made, results, strict=True), 1):
            assert back == len(some) or number == len(turns) and back == 0
        assert int((kinds == Kind.END).sum()) == len(turns)


def test_counts(tokenizer):
    given_ = [LONG, talk("a"), talk("b", "No. " * 200)]
    problems = []
    limit = len(make_example(LONG, tokenizer)) - 5
    examples = make_examples(given_, tokenizer, length=limit, on_problem=problems.append)
    numbers = count_tokens(examples)
    kinds = Counter(kind for e in examples for kind in e.kinds.tolist())
    assert numbers["kinds"]["tool_call"] == {"tokens": kinds[Kind.TOOL_CALL],
                                             "trained": kinds[Kind.TOOL_CALL]}
    assert numbers["kinds"]["prompt"] == {"tokens": kinds[Kind.PROMPT], "trained": 0}
    assert numbers["tokens"] == sum(map(len, examples))
    assert numbers["trained"] == sum(map(trained_in, examples))
    few = ("used", "split", "cut", "cut_trained")
    assert [numbers[name] for name in few] == [2, 1, 0, 0] and len(problems) == 1
    sizes = sorted(map(len, examples))
    shorter = make_examples(given_, tokenizer, length=sizes[2] - 2, on_problem=problems.append)
    numbers = count_tokens(shorter)
    assert numbers["cut"] == 1 and numbers["cut_trained"] == shorter[0].cut > 0
    assert count_tokens([])["tokens"] == 0
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
    rows = pack_rows(sizes, 20)
    assert rows.shape == (len(sizes),)
    fill = np.bincount(rows, sizes) if sizes else np.zeros(0)
    assert all(0 < tokens <= 20 for tokens in fill)
    assert sum(tokens <= 10 for tokens in fill) <= 1  # two such rows would have been one


def test_packing_takes_the_tightest_fit():
    a, b, c, d = pack_rows([5, 12, 15, 8], 20)
    assert a == c != b == d
    with pytest.raises(UserError, match="row 1: 21 tokens; a row has 20"):
        batches(numbered([3, 21]), 1, 20)


@LAW
@given(sizes=st.lists(st.integers(1, 20), max_size=60))
def test_packing_is_best_fit_longest_first(sizes):
    """As plainly as it can be written, in quadratic time."""
    free, rows = [], {}
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fits = [(room, row) for row, room in enumerate(free) if room >= sizes[index]]
        rows[index] = min(fits)[1] if fits else len(free)
        free += [] if fits else [20]
        free[rows[index]] -= sizes[index]
    assert pack_rows(sizes, 20).tolist() == [rows[index] for index in range(len(sizes))]


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


# --- weights --------------------------------------------------------------------------------------

def seen(examples, seed, epoch, pack=True) -> list[int]:
    """How often each of some `numbered` examples is in an epoch."""
    found = Counter(int(batch.input_ids[row, at]) // 1000 - 1
                    for batch in batches(examples, 2, 20, seed, epoch, pack)
                    for row, at in ((batch.documents > 0) & (batch.positions == 0)).nonzero())
    return [found[n] for n in range(len(examples))]


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_has_an_example_as_often_as_its_weight_says(pack):
    weights = [1.0, 2.0, 0.0, 0.5, 2.25, 1.0]
    examples = [replace(example, weight=weight) for example, weight
                in zip(numbered([7, 3, 12, 20, 1, 9]), weights, strict=True)]
    for seed in range(3):
        epochs = [seen(examples, seed, epoch, pack) for epoch in range(8)]
        assert epochs == [seen(examples, seed, epoch, pack) for epoch in range(8)]
        assert np.sum(epochs, 0).tolist() == [8 * weight for weight in weights]
        for times in epochs:
            assert [times[0], times[1], times[2], times[5]] == [1, 2, 0, 1]
            assert times[3] in (0, 1) and times[4] in (2, 3)
        assert [times[3] for times in epochs] in ([0, 1] * 4, [1, 0] * 4)


def test_half_of_a_file_of_half_the_weight_is_in_each_epoch():
    first, second = (times_in_epoch(np.full(1000, 0.5), 0, epoch) for epoch in (0, 1))
    assert 400 < first.sum() < 600 and (first + second == 1).all()
    assert (first != times_in_epoch(np.full(1000, 0.5), 1, 0)).any()


def test_an_epoch_may_be_empty():
    examples = [replace(example, weight=0.0) for example in numbered([7, 3])]
    for pack in (True, False):
        assert len(batches(examples, 2, 20, pack=pack)) == 0 == len(batches([], 2, 20, pack=pack))


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
