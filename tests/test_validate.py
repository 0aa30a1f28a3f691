"""`python -m minilora validate`: check.py, estimate.py and the command; bad rows, mended copies."""

import gzip
import json
from dataclasses import replace

import pytest
import torch
from conftest import LAW, NANO, TOOL
from hypothesis import given
from test_cli import call, one_line, rows, write_rows  # noqa: F401
from test_readers import FLAT, HELLO, REPLY, USER, chat, conversations, scraps, tagged, tags, turns

from minilora import estimate
from minilora.cache import load_examples
from minilora.check import check_data, histogram
from minilora.config import LoraConfig, TrainConfig
from minilora.data import make_parts
from minilora.dialects import DIALECTS
from minilora.estimate import expect
from minilora.lora import attach, trainable
from minilora.readers import openai_row, read_conversations
from minilora.tokenizer import Tokenizer
from minilora.trainer import add_dialect, plan_steps, weight_bytes
from minilora.weights import load_model, read_config


@pytest.fixture(scope="module")
def nano_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.load(NANO)
    tokenizer.add_tokens(DIALECTS["hermes"].tokens)
    return tokenizer


def messages(data) -> list:
    return [(found.messages, found.tools)
            for found in read_conversations(data, lambda _: None, lambda _: None)]


PYTHON = {"conversations": [
    {"from": "system", "value": f"<tools>{[TOOL]}</tools>"}, {"from": "human", "value": "?"},
    {"from": "gpt", "value": tagged({"name": "get_weather", "arguments": {"city": None}})}]}
BFCL = chat(USER, REPLY, tools=[{"name": "f", "parameters": {"type": "dict", "properties": {}}}])
SWAPPED = chat(USER, ("assistant", {"tool_calls": [
    {"id": id, "function": {"name": "get_weather", "arguments": "{}"}} for id in "ab"]}),
    ("tool", {"content": "B", "tool_call_id": "b"}),
    ("tool", {"content": "A", "tool_call_id": "a"}),
    ("assistant", {"content": "c", "weight": 0}), USER, REPLY, tools=[FLAT])
MENDED = chat(USER, USER, REPLY, tools=[FLAT, FLAT])
UNTRAINED = chat(USER, ("assistant", {"content": "c", "weight": 0}))
BROKEN = chat(USER, REPLY, REPLY)


def test_fix_writes_what_can_be_used_and_names_the_rest(call, tmp_path):  # noqa: F811
    write_rows(tmp_path / "a.jsonl", [HELLO, PYTHON, BROKEN, BFCL])
    write_rows(tmp_path / "b.jsonl", [SWAPPED, MENDED, UNTRAINED])
    line = "python -m minilora validate a.jsonl,b.jsonl"
    status, out, error = call(line)
    assert status == 2 and "3 rows cannot be used" in error and "--skip" not in out + error
    before = [line.partition(": ")[0] for line in out.splitlines() if line[1:6] == ".json"]
    assert before == ["a.jsonl:3 (row 3)", "b.jsonl:2 (row 2)", "b.jsonl:3 (row 3)"]
    for note in ("a.jsonl: 1 rows: has calls written as Python prints them",
                 "a.jsonl: 1 rows: has types in its tools", "b.jsonl: 1 rows: has results in an"):
        assert note in out

    status, out, error = call(f"{line} --fix copy.jsonl --json")
    assert status == 2 and "2 rows cannot be used and are not in copy.jsonl" in error
    facts = json.loads(out)
    assert ["row 3" in problem for problem in facts["problems"]] == [True, True]
    assert [line.partition(" has ")[0] for line in facts["mended"]] == [
        "a.jsonl:2 (row 2)", "a.jsonl:2 (row 2)", "a.jsonl:4 (row 4)", "b.jsonl:1 (row 1)",
        "b.jsonl:2 (row 2)", "b.jsonl:2 (row 2)"]
    assert facts["used"] == 5 and facts["fixed"] == "copy.jsonl"
    # The copy reads as the originals do, and nothing is wrong or odd about it.
    read = messages(["a.jsonl", "b.jsonl"])
    copied = messages("copy.jsonl")
    mended = copied.pop(4)
    assert copied == read[:4] and len(read) == 5  # the fifth cannot be trained on
    assert [m.content for m in mended[0]] == ["?\n\n?", "!"] and len(mended[1]) == 1
    status, out, error = call("python -m minilora validate copy.jsonl --json")
    again = json.loads(out)
    assert status == 0 and again["problems"] == [] and again["notes"] == {}
    assert {key: again[key] for key in ("tokens", "trained", "kinds", "calls", "turns")} == {
        key: facts[key] for key in ("tokens", "trained", "kinds", "calls", "turns")} | {
        "turns": {**facts["turns"], "user": facts["turns"]["user"] - 1,
                  "assistant": facts["turns"]["assistant"] - 1}}
    kept = [json.loads(line) for line in (tmp_path / "copy.jsonl").read_text().split("\n")[:-1]]
    assert kept[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": None}
    assert kept[3]["messages"][4]["weight"] == 0


@LAW
@given(conversation=conversations() | conversations(tags, tags), scrap=turns | scraps)
def test_a_copy_reads_as_the_original(tmp_path_factory, nano_tokenizer, conversation, scrap):
    """Whatever the rows are: what was readable is the same, and the copy has nothing to mend."""
    folder = tmp_path_factory.mktemp("fix")
    row = openai_row(conversation)
    odd = {**row, "messages": [*row["messages"], scrap]}
    path, copy = folder / "data.json", folder / "copy.jsonl"
    path.write_text(json.dumps([row, odd, scrap]), encoding="utf-8")
    config = TrainConfig(length=10**6)
    told = []
    facts, _ = check_data(str(path), nano_tokenizer, config, str(copy), told.append)
    assert facts["used"] + len(facts["problems"]) == 3
    assert told == sorted(facts["problems"] + facts["mended"], key=told.index)
    readable, copied = messages(path), messages(copy)
    assert copied[:1] == readable[:1] and all(each in copied for each in readable)
    assert len(copied) == facts["used"]
    again, _ = check_data(str(copy), nano_tokenizer, config, str(folder / "again.jsonl"))
    assert again["problems"] == again["mended"] == []
    assert copy.read_bytes() == (folder / "again.jsonl").read_bytes()


def test_a_tool_that_is_read_from_text_is_not_too_deep_for_the_copy(nano_tokenizer, tmp_path):
    def tools(depth: int) -> list[dict]:
        schema = {}
        for _ in range(depth):
            schema = {"not": schema}
        return [{"type": "function", "function": {"name": "f", "parameters": schema}}]

    data, copy = tmp_path / "a.jsonl", tmp_path / "copy.jsonl"
    write_rows(data, [HELLO | {"tools": json.dumps(tools(depth))} for depth in range(45, 70)])
    facts, _ = check_data(str(data), nano_tokenizer, TrainConfig(length=10**6), str(copy))
    assert 0 < facts["used"] < 25 and facts["used"] + facts["unread"] == 25
    again, _ = check_data(str(copy), nano_tokenizer, TrainConfig(length=10**6))
    assert again["used"] == facts["used"] and not again["problems"]


@pytest.mark.parametrize("data, told", [
    ("a.jsonl", None), ("a.jsonl@0.5", "none are in a copy: name it copy.jsonl@0.5"),
    ("a.jsonl@0.5,b.jsonl", "mend files of different weights one by one")])
def test_a_copy_has_no_weights_and_says_so(call, tmp_path, data, told):  # noqa: F811
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [HELLO])
    status, out, _ = call(f"python -m minilora validate {data} --fix copy.jsonl")
    assert status == 0 and (told in out if told else "weight" not in out)


def test_what_is_told_of_data_cannot_steer_a_terminal(call, tmp_path):  # noqa: F811
    """Names of files are the data's, too, and so is what stands in a row."""
    evil = "\x1b[31m\x9b\u202e"
    named = {"tool_calls": [{"function": {"name": evil, "arguments": evil}}]}
    rows = [{**BFCL, **chat(USER, ("assistant", evil))}, chat((evil, evil)), {evil: evil},
            UNTRAINED, chat(USER, ("assistant", named))]
    lines = [*map(json.dumps, rows), f"{{{evil}"]
    (tmp_path / f"a{evil}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for command in ("validate .", "validate . --fix copy.jsonl", "show . --row all", "show . --row "
                    "all --tokens"):
        _, out, error = call(f"python -m minilora {command}")
        assert not {"\x1b", "\x9b", "\u202e"} & set(out + error), command
        assert all(f"row {n}" in out + error for n in (2, 3, 4, 5, 6))


def test_a_copy_is_never_half_there(call, tmp_path):  # noqa: F811
    write_rows(tmp_path / "a.jsonl", [HELLO])
    same = "is what is read"
    for words, told in (("--fix a.jsonl", same), ("--fix ./a.jsonl", same),
                        ("--fix copy.json", "ends in .jsonl")):
        status, _, error = call(f"python -m minilora validate a.jsonl {words}")
        one_line(status, error, told)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(HELLO).encode() + b"\n")[:-9])
    status, _, error = call("python -m minilora validate cut.jsonl.gz --fix copy.jsonl")
    one_line(status, error, "cut.jsonl.gz", "cannot be read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "cut.jsonl.gz"]


def test_a_row_that_is_no_object_of_its_own_is_told_once(nano_tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n" + json.dumps(HELLO))
    facts, examples = check_data(str(tmp_path / "a.jsonl"), nano_tokenizer, TrainConfig())
    assert facts["unread"] == 1 and facts["conversations"] == facts["used"] == 1
    assert facts["refused"] == 0 and "fixed" not in facts


def test_lengths_and_what_is_cut(nano_tokenizer, tmp_path):
    """Lengths are of whole conversations; what is split or cut to fit is counted."""
    long = chat(USER, ("assistant", "word " * 50), USER, ("assistant", "word " * 50))
    write_rows(tmp_path / "a.jsonl", [HELLO, long, chat(USER, ("assistant", "word " * 400), USER,
                                                        REPLY)])
    found = read_conversations(tmp_path / "a.jsonl")
    whole = [len(make_parts(each, nano_tokenizer)[0]) for each in found]
    length = whole[1] - 1
    facts, examples = check_data(str(tmp_path / "a.jsonl"), nano_tokenizer,
                                 TrainConfig(length=length, eval_share=0))
    assert facts["length"] == {"min": min(whole), "median": whole[1], "p95": max(whole),
                               "max": max(whole)}
    assert (facts["split"], facts["cut"]) == (1, 1) and facts["cut_trained"] > 0
    assert all(example.length <= length for example in examples)
    assert facts["trained"] == sum(example.counts[1].sum() for example in examples)


def test_histogram():
    assert histogram([]) == []
    assert histogram([1]) == [(1, 1)] and histogram([8, 9, 40]) == [(8, 1), (16, 1), (32, 0),
                                                                     (64, 1)]
    lengths = list(range(3, 300, 7))
    found = histogram(lengths)
    assert sum(number for _, number in found) == len(lengths)
    assert all(number == sum(edge // 2 < n <= edge for n in lengths) for edge, number in found)


# --- what a run will need -------------------------------------------------------------------------

def test_the_steps_are_those_of_training(call, tmp_path, nano_tokenizer):  # noqa: F811
    write_rows(tmp_path / "a.jsonl", rows(30))
    write_rows(tmp_path / "b.jsonl", rows(9))
    line = "--batch 2 --length 512 --accumulate 2 --epochs 3 --eval-share 0.2 --seed 3"
    plan = json.loads(call(f"python -m minilora validate a.jsonl@0.4,b.jsonl@2 {line} --json")[1])
    config = TrainConfig(batch=2, length=512, accumulate=2, epochs=3.0, seed=3)
    kept, _ = load_examples("a.jsonl@0.4,b.jsonl@2", nano_tokenizer, length=512).split(0.2, 3)
    assert plan["run"]["steps"] == plan_steps(kept, config) > 3
    assert plan["run"]["seconds"] > 0


@pytest.mark.parametrize("settings", [{}, {"recompute": "all"}])
def test_the_estimate_against_a_real_model(settings):
    """Parameters and bytes of weights are exact; what autograd keeps is within a fifth."""
    lora, config = LoraConfig(rank=3, layers=("1-2",)), TrainConfig(batch=2, length=96, **settings)
    model = load_model(NANO, torch.float32)
    tokenizer = Tokenizer.load(NANO)
    base = sum(p.numel() for p in model.parameters())
    attach(model, lora)
    rows = len(add_dialect(model, tokenizer, "hermes", "append"))
    needs = expect(read_config(NANO), lora, config, rows, 0.3, torch.device("cpu"), torch.float32)
    trained = sum(p.numel() for p in trainable(model).values())
    assert (needs.parameters, needs.trained_parameters) == (
        base + rows * model.config.hidden_size, trained)
    assert needs.weight_bytes == weight_bytes(model)
    assert needs.seconds_per_step > 0
    most = expect(read_config(NANO), lora, TrainConfig(batch=4, length=96), rows, 0.3,
                  torch.device("cpu"), torch.float32)
    again = config.recompute == "all"
    assert needs.activation_bytes < most.activation_bytes / (2 if again else 1)
    cheap = expect(read_config(NANO), lora, replace(config, recompute="cheap"), rows, 0.3,
                   torch.device("cpu"), torch.float32)
    between = needs.activation_bytes, cheap.activation_bytes
    assert between == tuple(sorted(between, reverse=not again)) and len(set(between)) == 2
    model.recompute = config.recompute
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(2, 96, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden_states(ids, documents=torch.ones_like(ids))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    chunk = 3 * 4 * 512 * model.config.vocab_size
    estimate = needs.activation_bytes - chunk
    if not again:  # a layer without LoRA keeps less than one with it
        assert 0.8 < real / estimate < 1.2
    else:  # beside what is kept, one layer at a time has the rest
        assert real < estimate < needs.activation_bytes


def test_what_a_token_keeps_is_the_same_in_a_short_trial():
    """Whatever is kept once, as A and B are in the base's dtype, counts for no token. (The mask,
    which grows with the square of the length, is a tenth here at most.)
    """
    shape, device = read_config(NANO), torch.device("cpu")
    layer = estimate._one_layer(shape, LoraConfig(rank=64), device, torch.bfloat16)
    short, long = (estimate._kept_bytes(layer, 1, length, False) for length in (64, 512))
    assert abs(short / long - 1) < 0.1


def test_no_config_no_estimate(call, tmp_path):  # noqa: F811
    """A folder with a tokenizer alone is enough to count."""
    (tmp_path / "words").mkdir()
    (tmp_path / "words/tokenizer.model").write_bytes((NANO / "tokenizer.model").read_bytes())
    write_rows(tmp_path / "a.jsonl", [HELLO])
    status, out, _ = call("python -m minilora validate a.jsonl --model words --eval-share 0")
    assert status == 0 and "words/config.json: no such file" in out and "1 read" in out
    status, out, _ = call("python -m minilora validate a.jsonl --model words")
    assert status == 0 and "no conversation is left to train on" in out  # all are held out
