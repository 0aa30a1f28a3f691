"""sources.py: what DATA may name, files of every kind, the hub without a network."""

import contextlib
import gzip
import json
import re
import sys
import types

import huggingface_hub
import pytest
from test_cli import program

from minilora.config import NANO, UserError
from minilora.readers import iterate_conversations, read_conversations
from minilora.sources import DataFile, find_files, split_data, would_read


def row(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "!"}]}


def write(path, *texts: str, array: bool = False):
    rows = [json.dumps(row(text)) for text in texts]
    text = f"[{','.join(rows)}]" if array else "\n".join(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def said(data) -> list[tuple[str, float]]:
    """What the user of each conversation says, and its weight."""
    return [(found.messages[0].content, found.weight) for found in read_conversations(data)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with data of every kind, and other things, as the current one."""
    write(tmp_path / "a.jsonl", "a1", "a2")
    write(tmp_path / "b.json", "b1", array=True)
    write(tmp_path / "parts/2.jsonl.gz", "p2", "p3")
    write(tmp_path / "parts/1.json", "p1")
    (tmp_path / "parts/README.md").write_text("no data")
    (tmp_path / "parts/dataset_infos.json").write_text("{}")
    write(tmp_path / "parts/deep/3.jsonl", "p4")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("data, wanted", [
    ("a.jsonl", "a1 a2"),
    (" b.json , a.jsonl,", "b1 a1 a2"),
    ("parts", "p1 p2 p3"),
    ("parts/", "p1 p2 p3"),
    ("*.json*", "a1 a2 b1"),
    ("parts/**/*.jsonl", "p4"),
    ("**/*.json*,a.jsonl", None),
])
def test_files_folders_and_globs(here, data, wanted):
    if wanted is None:  # dataset_infos.json is data where a pattern asks for it
        with pytest.raises(UserError, match="dataset_infos.json"):
            read_conversations(data)
    else:
        assert said(data) == [(text, 1.0) for text in wanted.split()]


def test_weights(here):
    assert said("a.jsonl@0.5,b.json@2,*.json@3e0") == [
        ("a1", 0.5), ("a2", 0.5), ("b1", 2.0), ("b1", 3.0)]
    assert said("parts@0") == [("p1", 0), ("p2", 0), ("p3", 0)]
    write(here / "odd@2", "odd")  # what exists is meant
    assert said("odd@2") == [("odd", 1.0)] and said("odd@2@4") == [("odd", 4.0)]
    assert said(["a.jsonl@2", here / "b.json"]) == [("a1", 2.0), ("a2", 2.0), ("b1", 1.0)]
    assert split_data("x/y:test@0.25, z") == [("x/y:test", 0.25), ("z", 1.0)]
    for bad in ("a.jsonl@-1", "a.jsonl@1e999", "a.jsonl@1.2.3", "a.jsonl@1e-9", "a.jsonl@1001"):
        with pytest.raises(UserError, match="weight after @ is .*; expected 0, or a number"):
            find_files(bad)


def test_the_built_in_data_and_paths_with_odd_names(here):
    assert find_files("nano/train.jsonl") == [
        DataFile(NANO / "train.jsonl", "nano/train.jsonl", 1.0)]
    write(here / "a,b*@2", "odd")  # a Path is a file and nothing else
    assert said(here / "a,b*@2") == [("odd", 1.0)]


@pytest.mark.parametrize("data, problem", [
    ("none.jsonl", "none.jsonl: no such file"), ("no/ne.jsonl", "no/ne.jsonl: no such file"),
    ("*.csv", "no file has a name of that pattern"), ("empty", "no data in this folder; expected"),
    (" ,", "no data is named"), ("broken.jsonl.gz", "broken.jsonl.gz: cannot be read"),
    ("cut.json.gz", "cut.json.gz:1 (row 1): what follows cannot be read"),
])
def test_what_is_not_there(here, data, problem):
    (here / "empty").mkdir()
    (here / "broken.jsonl.gz").write_text("no gzip")
    (here / "cut.json.gz").write_bytes((here / "parts/2.jsonl.gz").read_bytes()[:-12])
    with pytest.raises(UserError, match=re.escape(problem)) as caught:
        read_conversations(data)
    assert "\n" not in str(caught.value)


def test_lines_are_read_one_by_one(here):
    """What is asked for is read; a file may be larger than the memory."""
    (here / "long.jsonl").write_text(json.dumps(row("first")) + "\n{\n")
    found = iterate_conversations("long.jsonl")
    assert next(found).messages[0].content == "first"
    with pytest.raises(UserError, match=r"long.jsonl:2 \(row 2\): not JSON"):
        next(found)


# --- the hub --------------------------------------------------------------------------------------

@pytest.fixture
def hub(here, monkeypatch):
    """A hub that holds what was put in the folder `hub`; remembers what it was asked for."""
    asked = []

    def snapshot_download(name, *, allow_patterns, repo_type):
        asked.append((name, repo_type))
        if not (here / "hub" / name).is_dir():
            raise ConnectionError("no network\nat all")
        return str(here / "hub" / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_hub_dataset_and_its_splits(here, hub):
    for name in ("data/train-0.jsonl", "data/test-0.jsonl", "constrained/x.json"):
        write(here / "hub/org/set" / name, name)
    assert said("org/set@2") == [("data/train-0.jsonl", 2.0)]
    assert said("org/set:test") == [("data/test-0.jsonl", 1.0)]
    assert said("org/set:constrained/x.json") == [("constrained/x.json", 1.0)]
    assert set(hub) == {("org/set", "dataset")}
    assert find_files("org/set:test")[0].name == "org/set:data/test-0.jsonl"
    for part in (":valid", ":data/none.jsonl"):
        with pytest.raises(UserError, match="org/set: no data for .*huggingface.co/datasets/org"):
            find_files("org/set" + part)


def test_a_hub_dataset_without_splits_is_read_whole(here, hub):
    write(here / "hub/org/set/b.jsonl", "b")
    write(here / "hub/org/set/a.json", "a")
    assert said("org/set") == [("a", 1.0), ("b", 1.0)]
    write(here / "org/set", "mine")  # what exists is meant
    assert said("org/set") == [("mine", 1.0)]


def test_a_hub_that_is_out_of_reach(here, hub):
    with pytest.raises(UserError, match=r"org/none: not a file or folder here, and the hub could "
                                        r"not be read \(no network\); go online, or") as caught:
        find_files("org/none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["parts/new.jsonl", "new.jsonl", "parts/deep/new.jsonl",
                                  "parts/deep/more/new.jsonl", "other/new.jsonl", "new.json"])
def test_whether_a_file_would_be_read_is_known_before_it_is_there(here, path):
    for data in ("a.jsonl", ".", "parts", "parts/@0.5", "*.jsonl", "parts/*.json*", "*/*.jsonl",
                 "parts/**/*.jsonl", "**/*.json", "parts/**", "parts/deep,a.jsonl", "*/d*/*.json*",
                 str(here / "parts"), str(here / "*/*.jsonl"), "parts/deep/..", "[p]arts/*.jsonl"):
        expected = would_read(data, here / path)
        assert would_read(data, path) == expected
        write(here / path, "new")
        with contextlib.suppress(UserError):  # of a pattern that even now has no file
            found = []
            found += (file.path.resolve() for file in find_files(data))
        assert (here / path in found) == expected, (data, path)
        (here / path).unlink()


# --- parquet --------------------------------------------------------------------------------------

def test_parquet_asks_for_pyarrow_by_name(here, monkeypatch):
    (here / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="x.parquet: .*pip install pyarrow"):
        read_conversations("x.parquet")


def test_parquet_rows_lose_what_a_column_filled_in(here, monkeypatch):
    """The rows that pyarrow gives, with a null for every key that another row has."""
    rows = [{**row("one"), "tools": None, "when": object()}, row("two"), {"n": float("nan")}]
    rows[0]["messages"][1] |= {"tool_calls": [{"function": {
        "name": "f", "arguments": {"a": 1, "b": None}}}], "content": None}

    class ParquetFile:
        def __init__(self, path): ...
        def __enter__(self): return self
        def __exit__(self, *_): ...
        def iter_batches(self, batch_size, use_threads):
            return [types.SimpleNamespace(to_pylist=lambda: rows[:1]),
                    types.SimpleNamespace(to_pylist=lambda: rows[1:])]

    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(ArrowException=RuntimeError))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet",
                        types.SimpleNamespace(ParquetFile=ParquetFile))
    (here / "x.parquet").write_bytes(b"")
    problems = []
    one, two = read_conversations("x.parquet", problems.append, lambda notice: None)
    assert one.messages[1].tool_calls[0].arguments == {"a": 1}
    assert one.source == "x.parquet (row 1)" and two.messages[0].content == "two"
    assert len(problems) == 1 and "x.parquet (row 3): NaN" in problems[0]


# --- the folder of a run --------------------------------------------------------------------------

def test_a_run_is_named_after_its_data(here):
    new_folder = program("train").__globals__["new_folder"]
    assert [str(new_folder(data)) for data in (
        "a.jsonl@0.5,b.json", "nano/train.jsonl", "parts/*.jsonl", "org/set:test", "*")] == [
        "runs/a", "runs/nano", "runs/data", "runs/set-test", "runs/data-2"]
