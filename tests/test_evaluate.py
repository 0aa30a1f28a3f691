"""A model's replies are judged, and counted by category, by problem, and in pairs."""

import itertools
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import LAW, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import make_tokenizer_model

from minilora.__main__ import main
from minilora.bfcl import Question, ask
from minilora.chat import Conversation, Message, ToolCall, render
from minilora.checkpoint import save_adapter
from minilora.compare import Problem
from minilora.config import NANO, GenerateConfig, LoraConfig, UserError
from minilora.dialects import DIALECTS
from minilora.evaluate import (
    Case,
    Change,
    Report,
    Share,
    changes,
    check_calls,
    check_reply,
    evaluate,
    mean_interval,
)
from minilora.generate import generate
from minilora.lora import adapted, attach
from minilora.tokenizer import Tokenizer
from minilora.trainer import add_dialect
from minilora.weights import load_model

# --- shares ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("right, total", [(0, 10), (3, 10), (10, 10), (95, 100), (1, 1)])
def test_wilsons_interval_holds_the_rates_that_the_share_does_not_contradict(right, total):
    share = Share(right, total)
    low, high = share.interval
    assert 0 <= low <= share.value == right / total <= high <= 1
    for end in {low, high} - {0.0, 1.0}:  # where the share is 1.96 standard deviations off
        off = abs(right / total - end) / (end * (1 - end) / total) ** 0.5
        assert off == pytest.approx(1.96, abs=1e-3)


def test_a_share_in_words():
    assert str(Share(19, 20)) == "0.950 (19/20, 95 % 0.764 to 0.991)"
    assert (Share(0, 0).value, Share(0, 0).interval, str(Share(0, 0))) == (None, (0, 1), "none")


def test_the_interval_of_a_mean_is_that_of_one_category_and_narrows_with_more():
    def interval(*shares):
        report = Report(tuple(case(ok, str(name)) for name, (right, total) in enumerate(shares)
                              for ok in [True] * right + [False] * (total - right)))
        low, high = report.mean_interval
        assert 0 <= low <= report.mean <= high <= 1
        assert json.loads(json.dumps(report.summary()))["mean_of_categories_95"] == [low, high]
        return low, high

    for share in ((0, 10), (3, 10), (10, 10), (95, 100)):
        assert interval(share) == pytest.approx(Share(*share).interval)
    assert Report(()).mean_interval == (0, 1)
    widths = [high - low for low, high in (interval((5, 10)), interval((5, 10), (5, 10)),
                                           interval(*[(5, 10)] * 4), interval(*[(50, 100)] * 4))]
    assert widths[0] / 2 ** 0.5 == pytest.approx(widths[1]) and widths == sorted(widths)[::-1]
    assert widths[0] / 2 == pytest.approx(widths[2])
    low, high = interval((0, 1000), (5, 10))  # the few questions tell the width
    assert high - low == pytest.approx(widths[0] / 2, abs=0.01)


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.9, 0.3), (0.99, 0.6), (0.8, 0.95)])
def test_the_interval_of_a_mean_holds_it_95_times_in_100(rates):
    """Counted over all that two categories of 20 and 40 questions may come to."""
    totals, held = (20, 40), 0.0
    for counts in itertools.product(*(range(total + 1) for total in totals)):
        chance = math.prod(math.comb(total, right) * rate ** right * (1 - rate) ** (total - right)
                           for total, right, rate in zip(totals, counts, rates, strict=True))
        low, high = mean_interval([Share(*each) for each in zip(counts, totals, strict=True)])
        held += chance * (low <= sum(rates) / 2 <= high)
    assert 0.93 < held < 0.98


# --- a model's replies ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer_model(folder)
    tokenizer = Tokenizer.load(folder)
    tokenizer.add_tokens([*DIALECTS["hermes"].tokens, *DIALECTS["mistral"].tokens], mode="reserved")
    return tokenizer


TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}}
CALL = ToolCall("f", {"x": 1})
ASKED = "Do it."


def conversation(number, *calls, more=()):
    """One whose question has a length of its own, so that batches by length have another order."""
    return Conversation((Message("system", "Be brief."),
                         Message("user", ASKED * (3 * number % 7 + 1)),
                         Message("assistant", "" if calls else "Hello.", tool_calls=tuple(calls)),
                         *more), (TOOL,), f"held_out.jsonl:{number}")


def called(call):
    return "\n".join(("<tool_call>", json.dumps({"name": call.name, "arguments": call.arguments}),
                      "</tool_call>"))


SAID = [  # conversation, what the model says, the kind of problem, part of the reason
    (conversation(1, CALL), called(CALL), "", ""),
    (conversation(2, CALL), "<think>\nHm.\n</think>\n" + called(CALL), "", ""),
    (conversation(3, CALL), called(ToolCall("f", {"x": "1"})), "wrong type",
     'x is "1", expected 1'),
    (conversation(4, CALL), called(ToolCall("g", {"x": 1})), "wrong name", "called g"),
    (conversation(5, CALL), "I cannot.", "no call", "expected 1 call, got no calls"),
    (conversation(6, CALL), '<tool_call>\n{"name": "f"', "malformed", "malformed: not JSON"),
    (conversation(7), "Hello to you.", "", ""),
    (conversation(8), called(CALL), "unneeded call", "expected no calls, got 1 call"),
    (conversation(9), "<tool_call>", "malformed", "malformed"),
    (conversation(10, CALL, CALL), called(CALL) + "\n" + called(CALL), "", ""),
    (conversation(11, CALL, more=(Message("tool", "2"), Message("assistant", "It is 2."))),
     called(CALL), "", ""),
]


def written(text, tokenizer):
    """The ids of a reply whose tags are the tokens that they should be."""
    return [id for part in re.split(r"(</?\w+>)", text)
            for id in ([tokenizer.token_id(part)] if part[:1] == "<" else tokenizer.encode(part))]


def scripted(monkeypatch, tokenizer, dialect="hermes"):
    """A `generate` that knows what to say to each prompt; what it was given is kept."""
    replies, batches = {}, []
    for asked, text, *_ in SAID:
        before = Conversation(asked.messages[:2], asked.tools)
        prompt = render(before, tokenizer, dialect, generate=True).ids
        replies[tuple(prompt), asked.source] = written(text, tokenizer)

    def fake(model, prompts, config, stop_ids, constraints):
        batches.append((prompts, config, stop_ids))
        found = []
        for prompt in prompts:  # each text is said once, and equal prompts in their order
            key = next(key for key in replies if key[0] == tuple(prompt))
            found.append(replies.pop(key))
        return found

    monkeypatch.setattr("minilora.evaluate.generate", fake)
    return batches


def test_every_case_is_judged_and_kept_in_order(monkeypatch, tokenizer):
    batches = scripted(monkeypatch, tokenizer)
    told = []
    report = evaluate(tiny_model(), tokenizer, ask([asked for asked, *_ in SAID]), "hermes",
                      GenerateConfig(max_new=70, temperature=0.9, top_p=0.5), batch=4,
                      progress=lambda *numbers: told.append(numbers))
    for case, (asked, text, kind, reason) in zip(report.cases, SAID, strict=True):
        assert (case.question.id, case.text, case.ok) == (asked.source, text, not kind)
        assert case.question.accepted == asked.messages[2].tool_calls
        assert (case.problem.kind if kind else case.problem or "") == kind
        assert reason in case.row()["reason"] and case.row()["problem"] == kind
    assert report.cases[0].calls == (CALL,) and report.cases[8].calls == ()
    assert (report.calls, report.no_tool) == (Share(4, 8), Share(1, 3))
    assert report.categories == {"one call": Share(3, 7), "no call": Share(1, 3),
                                 "several calls": Share(1, 1)}
    assert report.total == Share(5, 11) and report.mean == pytest.approx((3 / 7 + 1 / 3 + 1) / 3)
    assert report.problems == {"malformed": 2, "wrong type": 1, "wrong name": 1, "no call": 1,
                               "unneeded call": 1}
    assert told == [(4, 11), (8, 11), (11, 11)]
    lengths = [len(prompt) for prompts, *_ in batches for prompt in prompts]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 4
    assert all(len(prompts) <= 4 for prompts, *_ in batches)
    for _, config, stop_ids in batches:
        assert (config.max_new, config.temperature) == (70, 0.0)  # greedy, whatever was asked
        assert stop_ids == tokenizer.stop_ids


def test_a_batch_has_as_many_rows_as_its_tokens_allow(monkeypatch, tokenizer):
    batches = scripted(monkeypatch, tokenizer)
    evaluate(tiny_model(), tokenizer, ask([asked for asked, *_ in SAID]), "hermes",
             GenerateConfig(max_new=100), batch_tokens=900)
    sizes = [(len(prompts), max(map(len, prompts)) + 100) for prompts, *_ in batches]
    assert all(rows * width <= 900 < (rows + 1) * width for rows, width in sizes[:-1])
    assert len({rows for rows, _ in sizes}) > 1 and sum(rows for rows, _ in sizes) == len(SAID)
    batches = scripted(monkeypatch, tokenizer)
    evaluate(tiny_model(), tokenizer, ask([asked for asked, *_ in SAID]), batch_tokens=1)
    assert [len(prompts) for prompts, *_ in batches] == [1] * len(SAID)


def test_tools_are_checked_as_written_and_constrained_as_shown(monkeypatch, tokenizer):
    """The leaderboard's "any" is a string to its check; what a call may hold is in JSON Schema."""
    raw = {"name": "f", "parameters": {"type": "dict", "properties": {"x": {"type": "any"}}}}
    question = Question(SAID[0][0], ({"f": {"x": [""]}},), "simple", "simple_0", (raw,))
    assert check_reply(called(ToolCall("f", {"x": ""})), question, "hermes").ok
    given = []
    monkeypatch.setattr("minilora.evaluate.Constraint", lambda words, tools, dialect:
                        given.append(tools) or SimpleNamespace(loose={}))
    monkeypatch.setattr("minilora.evaluate.generate", lambda *arguments: [[]])
    evaluate(tiny_model(), tokenizer, [question], config=GenerateConfig(constrained=True))
    assert given[-1] == SAID[0][0].tools


def test_what_constrained_calls_are_not_held_to_is_told_before_the_first_reply(
        monkeypatch, tokenizer, capsys):
    def question(name, **schema):
        tool = {"name": name, "parameters": {"properties": {"x": schema}}}
        return replace(ask([SAID[0][0]])[0], conversation=replace(SAID[0][0], tools=(tool,)))

    def notes(*questions, constrained=True):
        evaluate(tiny_model(), tokenizer, questions, config=GenerateConfig(
            max_new=2, constrained=constrained))
        return capsys.readouterr().err

    monkeypatch.setattr("minilora.evaluate.generate",
                        lambda model, prompts, *_: [[]] * len(prompts))
    held = question("f", type="integer", minimum=1)
    loose = [question(name, type="string", pattern="a", maxLength=3) for name in ("g", "h", "h")]
    assert notes(held) == "" and notes(*loose, constrained=False) == ""
    told = "note: calls are held to the tools' schemas, but not to maxLength, pattern of g"
    assert notes(held, loose[0]) == told + "\n"
    assert notes(*loose) == told + " and the like in 1 more\n"
    monkeypatch.setattr("minilora.evaluate.generate", None)  # is not reached
    with pytest.raises(UserError, match="tool f: no arguments fit its schema"):
        notes(replace(held, conversation=replace(held.conversation, tools=(
            {"name": "f", "parameters": {"properties": {"x": {"enum": []}}, "required": ["x"]}},))))


def test_a_case_as_json(monkeypatch, tokenizer):
    scripted(monkeypatch, tokenizer)
    row = evaluate(tiny_model(), tokenizer, ask([SAID[0][0]])).cases[0].row()
    assert json.loads(json.dumps(row)) == {
        "id": "held_out.jsonl:1", "source": "held_out.jsonl:1", "category": "one call",
        "question": ASKED * 4, "expected": [{"name": "f", "arguments": {"x": 1}}],
        "got": called(CALL), "calls": [{"name": "f", "arguments": {"x": 1}}], "ok": True,
        "problem": "", "reason": ""}
    listed = Question(SAID[0][0], ({"f": {"x": [1, ""]}},), "simple", "simple_0", (TOOL,))
    assert Case(listed, "", (), None).row()["expected"] == [{"f": {"x": [1, ""]}}]
    any_call = Question(SAID[0][0], None, "relevance", "relevance_0", (TOOL,))
    assert Case(any_call, "", (), None).row()["expected"] == "any call"


def test_sums_of_nothing():
    assert Report(()).calls == Share(0, 0) and Report(()).mean is None
    report = Report((case(True, "no call", ()),))
    assert report.calls == Share(0, 0) and report.no_tool == Share(1, 1)
    assert report.summary()["calls"] is None and report.summary()["calls_95"] == (0, 1)


def test_a_summary_has_every_category():
    report = Report((case(True, "simple"), case(False, "simple"), case(True, "relevance", None),
                     case(False, "irrelevance", ())))
    found = json.loads(json.dumps(report.summary()))
    assert (found["calls"], found["no_tool"], found["right"], found["cases"]) == (2 / 3, 0, 0.5, 4)
    assert found["mean_of_categories"] == 0.5 and found["problems"] == {"wrong value": 2}
    assert {name: (each["right"], each["total"], each["share"])
            for name, each in found["categories"].items()} == {
        "simple": (1, 2, 0.5), "relevance": (1, 1, 1.0), "irrelevance": (0, 1, 0.0)}
    low, high = found["categories"]["simple"]["share_95"]
    assert 0 < low < 0.5 < high < 1


# --- before and after -----------------------------------------------------------------------------

def case(ok, category="simple", accepted=(CALL,)):
    return Case(Question(SAID[0][0], accepted, category, "simple_0", (TOOL,)), "", (),
                None if ok else Problem("wrong value", "x is 2"))


def test_changes_are_counted_in_pairs_and_by_category():
    before, after = (Report(tuple(case(mark == "+", "ab"[index > 5])
                                  for index, mark in enumerate(marks)))
                     for marks in ("---+++--++", "+++-++-+--"))
    assert changes(before, after) == {"a": Change(3, 1, 6), "b": Change(1, 2, 4),
                                      "all": Change(4, 3, 10)}
    assert str(Change(3, 1, 6)) == "+0.333: 3 better, 1 worse, p = 0.62"
    with pytest.raises(ValueError):  # not the same questions
        changes(before, Report(after.cases[:-1]))


@LAW
@given(better=st.integers(0, 60), worse=st.integers(0, 60))
def test_mcnemars_p_is_the_chance_of_a_split_as_uneven(better, worse):
    """By its definition: all ways in which as many answers could change, weighed alike."""
    changed, p = better + worse, Change(better, worse, 200).p
    weights = [1.0]
    for _ in range(changed):  # Pascal's triangle, halved at each row
        weights = [(a + b) / 2 for a, b in zip([0, *weights], [*weights, 0], strict=True)]
    off = abs(better - worse)
    assert p == pytest.approx(sum(weight for number, weight in enumerate(weights)
                                  if abs(2 * number - changed) >= off))
    assert p == Change(worse, better, 200).p


def test_mcnemars_p_of_known_tables():
    assert (Change(0, 0, 5).p, Change(4, 4, 9).p) == (1, 1)
    assert Change(5, 0, 9).p == 2 / 2 ** 5
    assert Change(1500, 20, 3000).p < 1e-300


# --- a real model ---------------------------------------------------------------------------------

def test_a_real_model_is_decoded_greedily_from_before_the_first_reply(monkeypatch, tokenizer):
    model, prompts = tiny_model(), []

    def watched(model, batch, *more):
        prompts.extend(batch)
        return generate(model, batch, *more)

    monkeypatch.setattr("minilora.evaluate.generate", watched)
    asked = [conversation(1, CALL), conversation(2), conversation(4, CALL)]
    report = evaluate(model, tokenizer, ask(asked), "mistral", GenerateConfig(max_new=5), batch=2)
    for each, case in zip(asked, report.cases, strict=True):
        before = Conversation(each.messages[:2], each.tools)
        prompt = render(before, tokenizer, "mistral", generate=True).ids
        assert prompt in prompts
        alone = generate(model, [prompt], GenerateConfig(max_new=5), tokenizer.stop_ids)[0]
        assert case.text == tokenizer.decode(alone)
        assert case.ok or ("(cut at 5 tokens)" in case.problem.reason) is (len(alone) == 5)
    assert not all(case.ok for case in report.cases)


def test_a_prompt_that_leaves_no_room_is_counted_and_named(tokenizer, capsys):
    def long(number, source):
        return Conversation((Message("user", "long " * number), Message("assistant", "Yes.")),
                            source=source)

    told = []
    asked = [long(400, "held_out.jsonl:8"), conversation(1), long(500, "held_out.jsonl:9")]
    report = evaluate(tiny_model(), tokenizer, ask(asked), config=GenerateConfig(max_new=2),
                      progress=lambda *numbers: told.append(numbers))
    assert [case.problem and case.problem.kind for case in report.cases] == [
        "too long", None, "too long"]
    assert "the model's context 512" in report.cases[0].problem.reason
    assert report.no_tool == Share(1, 3) and told == [(3, 3)]
    note = capsys.readouterr().err
    assert "2 of 3 questions" in note and "held_out.jsonl:8" in note and note.count("\n") == 1
    assert evaluate(tiny_model(), tokenizer, ask(asked[2:])).total == Share(0, 1)


def test_check_calls_is_asked_for_here():
    assert check_calls([CALL], [TOOL], [CALL]) == (True, "")


# --- the command ----------------------------------------------------------------------------------

def measured(capsys, *words):
    main(["eval", "--max-new", "3", "--json", *map(str, words)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_constrained_calls_are_never_malformed(monkeypatch):
    """A model of random weights that must call writes what cannot be read, unless it is held."""
    model, tokenizer = load_model(NANO, torch.float32), Tokenizer.load(NANO)
    add_dialect(model, tokenizer, "hermes", "append")
    torch.manual_seed(0)
    noise, call = torch.randn(model.embed_tokens.num_embeddings), tokenizer.token_id("<tool_call>")
    logits, new = model.logits, []

    def calling(hidden, **more):
        new.append(None)
        found = logits(hidden, **more) + 9 * noise
        found[..., call] = 1e4 if len(new) == 1 else -1e4
        return found

    monkeypatch.setattr(model, "logits", calling)
    conversation = Conversation((Message("user", "Hello"), Message("assistant", "Hello.")), (TOOL,))
    problems = []
    for constrained in (False, True):
        new.clear()
        config = GenerateConfig(max_new=48, constrained=constrained)
        (case,) = evaluate(model, tokenizer, ask([conversation]), config=config).cases
        problems.append(case.problem.kind)
    assert problems[0] == "malformed" and problems[1] == "unneeded call"
    assert case.calls[0].name == TOOL["function"]["name"]


def test_before_and_after_in_one_command(tmp_path, capsys):
    """An adapter that has learned nothing changes nothing; one that has is told from its base."""
    model, tokenizer = load_model(NANO, torch.float32), Tokenizer.load(NANO)
    torch.manual_seed(0)
    attach(model, LoraConfig(rank=2))
    add_dialect(model, tokenizer, "hermes", "append")
    save_adapter(model, tokenizer, tmp_path / "run/adapter", "nano", "hermes")
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"tools": [TOOL], "messages": [
        {"role": "user", "content": f"Question {number}"},
        {"role": "assistant", "content": "Hello."}]}) + "\n" for number in range(3)))
    asked = ["--adapter", tmp_path / "run", "--data", tmp_path / "own.jsonl"]
    cases = tmp_path / "cases.jsonl"
    *rows, sums = measured(capsys, *asked, "--before", "--cases", cases)
    assert [json.loads(line) for line in cases.read_text().splitlines()] == rows
    assert [row.pop("when") for row in rows] == ["before", "after"] * 3
    assert rows[::2] == rows[1::2] and sums["before"] == sums["after"]
    assert sums["change"]["all"] == {"better": 0, "worse": 0, "total": 3, "p": 1.0}
    *alone, sums = measured(capsys, *asked)
    assert alone == rows[::2] and sums["no_tool"] == 1

    with torch.no_grad():
        for module in adapted(model).values():
            module.lora_B.normal_()
    save_adapter(model, tokenizer, tmp_path / "run/adapter", "nano", "hermes")
    *rows, sums = measured(capsys, *asked, "--before")
    assert [row["got"] for row in rows[::2]] == [row["got"] for row in alone]
    assert all(row["got"] != base["got"] for row, base in zip(rows[1::2], alone, strict=True))
    main(["eval", "--max-new", "3", "--before", *map(str, asked)])
    table = capsys.readouterr().out
    assert "no call" in table and "p = 1" in table and "before" in table


def test_a_base_without_the_dialects_tokens_is_measured_as_training_starts(tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text(json.dumps({"tools": [TOOL], "messages": [
        {"role": "user", "content": "Question"}, {"role": "assistant", "content": "Hello."}]}))
    main(["eval", "--max-new", "3", "--data", str(tmp_path / "own.jsonl")])
    out, error = capsys.readouterr()
    assert "note: nano has no tokens for hermes tool calls, so they get rows" in error
    assert "mean     1.000 (95 % 0.207 to 1.000) over the categories" in out
    model, tokenizer = load_model(NANO, torch.float32), Tokenizer.load(NANO)
    attach(model, LoraConfig(rank=2))
    add_dialect(model, tokenizer, "hermes", "append")
    save_adapter(model, tokenizer, tmp_path / "run/adapter", "nano", "hermes")
    with pytest.raises(UserError, match="run has no tokens for mistral tool calls; leave"):
        main(["eval", "--adapter", str(tmp_path / "run"), "--dialect", "mistral", "--data",
              str(tmp_path / "own.jsonl")])


def test_before_needs_an_adapter():
    with pytest.raises(UserError, match="--before needs --adapter"):
        main(["eval", "--before"])


def test_a_batch_holds_tokens():
    for few in ("0", "-5"):
        with pytest.raises(UserError, match=f"--batch-tokens is {few}; expected at least 1"):
            main(["eval", "--batch-tokens", few])
