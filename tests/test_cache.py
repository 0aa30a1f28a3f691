"""cache.py: examples from disk are those made in memory, and an entry is whole or not used."""

import json
import os
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import TOOL

from minilora import cache, sources
from minilora.cache import Dataset, load_examples
from minilora.config import TrainConfig, UserError
from minilora.data import IGNORED, batches, column, count_tokens, digest, make_examples, split
from minilora.readers import read_conversations
from minilora.trainer import plan_steps, stream_batches

LENGTH = 400


def row(number: int, rounds: int = 1) -> dict:
    said = [{"role": "system", "content": "Brief. ✓"}]
    for place in range(rounds):
        call = {"name": "get_weather", "arguments": {"city": f"C{number}", "days": 1.5 + place}}
        said += [{"role": "user", "content": f"Weather {number}?"},
                 {"role": "assistant", "tool_calls": [{"id": "abc", "function": call}]},
                 {"role": "tool", "content": '{"sky": "clear"}', "tool_call_id": "abc"},
                 {"role": "assistant", "content": "Clear."}]
    return {"messages": said, "tools": [TOOL]}


@pytest.fixture
def data(tmp_path, monkeypatch) -> str:
    """Two files, the second of half the weight, one long conversation, one odd; a cache of its own.
    """
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "code" / "cache.py"))
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path)
    files = {"a.jsonl": [row(n) for n in range(12)] + [row(12, rounds=4)],
             "b.jsonl": [row(n) for n in range(20, 28)] + [{**row(28), "tools": []}]}
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in rows))
    return "a.jsonl,b.jsonl@0.5"


def entries(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def never(*_) -> None:
    raise AssertionError("made again")


def same(ours, theirs) -> None:
    """Every field of every example."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for field in fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert type(a) is type(b), field.name
            if isinstance(a, torch.Tensor):
                assert a.dtype == b.dtype and torch.equal(a, b), field.name
            else:
                assert a == b, field.name


@pytest.mark.parametrize("writable", [True, False])
def test_made_found_and_not_cached_at_all_are_the_same(data, tokenizer, tmp_path, writable):
    if not writable:
        (tmp_path / "cache").write_text("a file is no folder")
    conversations = read_conversations(data, on_notice=lambda notice: None)
    examples = make_examples(conversations, tokenizer, length=LENGTH)
    assert {example.part for example in examples} >= {0, 1}
    for attempt in range(2):
        rows, told = [], []
        found = load_examples(data, tokenizer, length=LENGTH, on_notice=told.append,
                              on_row=lambda rows=rows: rows.append(1))
        assert len(rows) == (0 if attempt and writable else len(conversations))
        assert len(told) == 1 + (not writable)
        assert "calls a tool that is not among its tools" in told[0]
        assert writable or "the next run makes it again" in told[1]
        same(found, examples)
        assert found.conversations(100) == conversations
        assert found.conversations(3) == conversations[:3]
        for name in ("length", "weight", "part", "cut", "counts"):
            assert np.array_equal(column(found, name), column(examples, name)), name
        assert count_tokens(found) == count_tokens(examples)
    if writable:
        assert len(entries(tmp_path)) == 1


def test_a_run_is_the_same_from_disk(data, tokenizer):
    """The batches of three epochs, resumed or not, of kept and held out."""
    config = TrainConfig(batch=2, length=LENGTH, epochs=3)
    conversations = read_conversations(data, on_notice=lambda notice: None)
    held = split([digest(each) for each in conversations], 0.3, 5).tolist()
    sides = [[each for each, out in zip(conversations, held, strict=True) if out is side]
             for side in (False, True)]
    for _ in range(2):
        found = load_examples(data, tokenizer, length=LENGTH, on_notice=lambda notice: None)
        for ours, side in zip(found.split(0.3, 5), sides, strict=True):
            theirs = make_examples(side, tokenizer, length=LENGTH)
            same(ours, theirs)
            assert ours.conversations(2) == side[:2] != []
            steps = plan_steps(ours, config)
            assert steps == plan_steps(theirs, config) > 3
            streams = stream_batches(ours, config, skip=1), stream_batches(theirs, config, skip=1)
            for _, one, other in zip(range(steps), *streams, strict=False):
                assert all(torch.equal(a, b) for a, b
                           in zip(vars(one).values(), vars(other).values(), strict=True))
            assert [len(batches(ours, 1, LENGTH, pack=False, epoch=epoch)) for epoch in (0, 1)] == [
                len(batches(theirs, 1, LENGTH, pack=False, epoch=epoch)) for epoch in (0, 1)]
        kept, rest = found.split(0.3, 5)
        both = (kept.split(0.5, 1), rest.split(0.5, 1))  # a side can be split again
        assert sum(len(part) for pair in both for part in pair) == len(found)


def test_what_decides_is_in_the_key(data, tokenizer, tmp_path):
    def load(data=data, tokenizer=tokenizer, **settings) -> int:
        load_examples(data, tokenizer, on_notice=lambda notice: None, **{"length": 400, **settings})
        return len(entries(tmp_path))

    assert [load(), load()] == [1, 1]
    other = type(tokenizer).load(tokenizer._folder)
    other.add_tokens(["<x>", *tokenizer.new_tokens])  # the same tokens, other ids
    assert [load(length=300), load(train_on="tool_call"), load("a.jsonl"), load("b.jsonl@0.5"),
            load("b.jsonl"), load(tokenizer=other), load()] == [2, 3, 4, 5, 6, 7, 7]
    shutil.copy("b.jsonl", "c.jsonl")  # the same text, but sources have another name
    assert load("c.jsonl") == 8
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text.replace("Weather 3?", "Weather 4?"))
    assert load() == 9
    (tmp_path / "code" / "chat.py").write_text("# as somebody has edited it")
    assert load() == 10


@pytest.mark.parametrize("name", ["ids", "trained", "examples", "texts", "told", "checksum"])
@pytest.mark.parametrize("harm", ["missing", "short", "changed"])
def test_a_damaged_entry_is_made_again(data, tokenizer, tmp_path, name, harm):
    def load(on_row=lambda: None) -> Dataset:
        return load_examples(data, tokenizer, length=LENGTH, on_notice=lambda notice: None,
                             on_row=on_row)

    load()
    path = tmp_path / "cache" / entries(tmp_path)[0] / name
    bytes_ = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes_[:-2] if harm == "short" else
                         bytes([bytes_[0] ^ 1]) + bytes_[1:])
    rows = []
    again = load(on_row=lambda: rows.append(1))
    assert len(rows) == 22 and len(entries(tmp_path)) == 1
    same(again, load(on_row=never))


def test_a_run_that_stops_half_way_leaves_nothing(data, tokenizer, tmp_path):
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_examples(data, tokenizer, on_row=interrupt)
    assert entries(tmp_path) == []


def test_problems_are_told_again_and_refused_again(data, tokenizer, tmp_path):
    with open("a.jsonl", "a") as file:
        file.write('{"messages": 3}\n')
    with pytest.raises(UserError, match=r"a.jsonl:14 \(row 14\): messages is not a list"):
        load_examples(data, tokenizer)
    assert entries(tmp_path) == []
    told, again = [], []
    first = load_examples(data, tokenizer, "hermes", 250, on_problem=told.append,
                          on_notice=told.append)
    assert "b.jsonl:9" in "".join(told) and "a.jsonl:14" in "".join(told)
    same(first, load_examples(data, tokenizer, "hermes", 250, on_problem=again.append,
                              on_notice=again.append, on_row=never))
    assert again == told
    with pytest.raises(UserError, match=r"a.jsonl:14 \(row 14\): messages is not a list"):
        load_examples(data, tokenizer, "hermes", 250, on_row=never)


def test_what_is_cut_is_one_notice_with_counts(tokenizer, data, capsys):
    whole = make_examples(read_conversations("a.jsonl"), tokenizer)
    trained = [int((each.labels != IGNORED).sum()) for each in whole]
    found = load_examples("a.jsonl", tokenizer, length=len(whole[0]) - 20)
    lost = column(found, "cut")
    assert (lost[column(found, "part") == 0] > 0).all() and len(found) == 12 + 4
    assert capsys.readouterr().err == (
        f"note: a.jsonl:1 (row 1): cut: {lost[0]} of its {trained[0]} trained tokens are in turns "
        f"that do not fit --length with the question before them (and 12 more rows; {lost.sum()} "
        f"of {sum(trained)} trained tokens in all)\n")


def test_the_files_are_looked_for_once(data, tokenizer, monkeypatch):
    """A hub dataset would be asked for again."""
    asked, find = [], sources._named
    monkeypatch.setattr(sources, "_named", lambda *name: asked.append(name) or find(*name))
    load_examples(data, tokenizer, length=LENGTH, on_notice=lambda notice: None)
    assert asked == [("a.jsonl", 1.0), ("b.jsonl", 0.5)]


def test_settings_that_are_wrong_are_one_error(data, tokenizer):
    for settings in ({"train_on": "robot"}, {"dialect": "klingon"}):
        with pytest.raises(UserError, match="not known"):
            load_examples(data, tokenizer, on_problem=never, **settings)
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        load_examples("nowhere.jsonl", tokenizer)


def test_nothing_usable_is_an_empty_dataset(data, tokenizer):
    problems = []
    for _ in range(2):
        found = load_examples(data, tokenizer, length=8, on_problem=problems.append,
                              on_notice=lambda notice: None)
        assert len(found) == 0 and list(found) == [] == found.conversations(3)
        assert count_tokens(found)["tokens"] == 0
        assert [len(part) for part in found.split(0.5, 0)] == [0, 0]
        assert len(batches(found, 2, 8)) == 0
    assert len(problems) == 2 * 22


def test_the_cache_is_bounded_and_the_oldest_goes_first(data, tokenizer, tmp_path, monkeypatch):
    def load(length: int) -> set[str]:
        load_examples(data, tokenizer, length=length, on_notice=lambda notice: None)
        return set(entries(tmp_path))

    first = load(400)
    second = load(401) - first
    os.utime(tmp_path / "cache" / next(iter(first)), (1, 1))
    os.utime(tmp_path / "cache" / next(iter(second)), (2, 2))
    load(400)  # which makes the second one the oldest
    size = sum(path.stat().st_size for path in (tmp_path / "cache" / next(iter(first))).iterdir())
    left, other = tmp_path / "cache" / ".minilora-crashed", tmp_path / "cache" / "photos"
    for path in (left, other):
        path.mkdir()
        os.utime(path, (1, 1))
    monkeypatch.setattr(cache, "LIMIT", int(2.5 * size))
    assert load(402) & (first | second) == first and not left.exists()
    monkeypatch.setattr(cache, "LIMIT", 0)
    assert len(load(403) - {other.name}) == 1 and other.is_dir()  # the one in use stays


def test_large_vocabularies_and_small_ones(data, tokenizer, tmp_path, monkeypatch):
    def size() -> int:
        found = load_examples(data, tokenizer, length=LENGTH, on_notice=lambda notice: None)
        (path,) = (path for path in (tmp_path / "cache").iterdir() if path.name not in seen)
        seen.add(path.name)
        return (path / "ids").stat().st_size // (path / "kinds").stat().st_size, found

    seen = set()
    small, ours = size()
    monkeypatch.setattr(type(tokenizer), "vocab_size", 256_000)
    monkeypatch.setattr(type(tokenizer), "fingerprint", lambda self: "another")
    large, theirs = size()
    assert (small, large) == (2, 4)
    same(ours, theirs)


def test_a_conversation_comes_back_as_it_was(data, tokenizer, tmp_path):
    """Thinking, ids, untrained messages, weights, numbers of both kinds."""
    odd = row(1)
    odd["messages"][2] |= {"reasoning_content": "Hm. ☃", "weight": 0}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd) + "\n")
    for _ in range(2):
        (found,) = load_examples("odd.jsonl@2", tokenizer).conversations(9)
        (wanted,) = read_conversations("odd.jsonl@2")
        assert found == wanted and not found.messages[2].trained and found.weight == 2
        assert found.messages[2].tool_calls[0].id == "abc"
        assert type(found.messages[2].tool_calls[0].arguments["days"]) is float
