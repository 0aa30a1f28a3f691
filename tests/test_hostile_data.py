"""Data that somebody made to do harm: each row reads right or is named once, in one line.

Right is what an independent reader finds there: `json` and `gzip` alone. How the cases are run, and
what they may not do, is in hostile.py.
"""

import copy
import gzip
import json
import os
import shutil
from pathlib import Path
from random import Random

import pytest
from conftest import TOOL, load_tokenizer
from hostile import (
    STRANGE,
    Refused,
    attempt,
    flipped,
    hostile_file,
    hostile_json,
    hostile_text,
    reading,
    survive,
)
from test_bfcl import answer, row
from test_readers import LAYOUTS, call, chat
from tiny_tokenizer import make_tokenizer_model

from minilora import cache, sources
from minilora.bfcl import read_questions
from minilora.cache import load_examples
from minilora.chat import Conversation, render
from minilora.check import check_data
from minilora.config import TrainConfig
from minilora.data import make_parts
from minilora.dialects import DIALECTS
from minilora.jsontext import MAX_DEPTH, dump_json, load_json
from minilora.readers import openai_row, read_conversations, read_row, refuse
from minilora.sources import DataFile, read_rows
from minilora.tokenizer import Tokenizer
from minilora.view import html_page

MUTATED = "data files, mutated"  # the row of the README's table
BAD = object()
ROWS = [*LAYOUTS.values(),
        {"query": "?", "tools": json.dumps([{"name": "f", "parameters": {
            "x": {"type": "str, optional", "default": ""}, "y": {"type": "List[int]"}}}]),
         "answers": '[{"name": "f", "arguments": {"y": [1]}}]'},
        chat(("user", "<tool_call>"), ("assistant", {"content": "<think>", "weight": 0}),
             ("user", "?"), ("assistant", {**call(), "reasoning_content": "Hm. </tools>"}),
             ("tool", {"content": "[1]", "tool_call_id": "c1", "name": "get_weather"}),
             ("assistant", "é\u2028☃"), hermes_tags=False,
             tools=[{"type": "function", "function": {"name": "f", "parameters": {
                 "type": "object", "$defs": {"a": {"$ref": "#/$defs/a"}},
                 "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"$ref": "#"}}}}}])]


def quiet(_) -> None:
    pass


def same(ours: Conversation, theirs: Conversation) -> bool:
    return (ours.messages, ours.tools) == (theirs.messages, theirs.tools)


TEXTS = [dump_json(each) for each in ROWS]
WHOLE = [read_row(each, quiet) for each in ROWS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(make_tokenizer_model(tmp_path_factory.mktemp("tokenizer")), *DIALECTS)


# --- an independent reader ------------------------------------------------------------------------

def strictly(text: bytes) -> object:
    """The JSON value that a text is, or BAD."""
    def once(pairs: list) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    def depth(value: object) -> int:
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max(map(depth, inner), default=0) if isinstance(value, dict | list) else 0

    try:
        value = json.loads(text.decode(), object_pairs_hook=once)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        return value if depth(value) <= MAX_DEPTH else BAD
    except (ValueError, RecursionError):
        return BAD


def lines_of(data: bytes) -> list[tuple[int, object]]:
    """Of each line that holds something its number, and its value or BAD."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [(number, strictly(line.decode(errors="surrogateescape").rstrip().encode(
        errors="surrogateescape"))) for number, line in enumerate(lines, 1) if line.strip()]


def check_lines(path: Path, data: bytes, found: list[Conversation], problems: list[str]) -> None:
    """Every row of a file of lines was read or named, once, and those that are good were read."""
    rows = lines_of(data)
    wanted = {f"{path}:{line} (row {n})": value for n, (line, value) in enumerate(rows, 1)}
    read = {each.source: each for each in found}
    named = [problem.partition("): ")[0] + ")" for problem in problems if ": no row in" not in
             problem]
    assert sorted([*read, *named]) == sorted(wanted)
    assert rows or len(problems) == 1  # an empty file is a problem, too
    for where, value in wanted.items():
        if value is BAD:
            assert where in named
        elif dump_json(value) in TEXTS:
            assert same(read[where], WHOLE[TEXTS.index(dump_json(value))]), where


def check_read(path: Path, tokenizer, random: Random) -> tuple[object, list[str]]:
    """Reads a file, told of its problems and then refusing the first; all of it can be used."""
    problems: list[str] = []
    found = attempt(read_conversations, path, problems.append, quiet, about=path.name)
    first = attempt(read_conversations, path, refuse, quiet, about=path.name)
    for problem in problems:
        assert problem.startswith(str(path)) and len(problem.splitlines()) == 1, problem
        assert len(problem) < 1000, problem
    if isinstance(found, Refused):
        return found, problems
    assert first == problems[0] if problems else not isinstance(first, Refused)
    for each in found:
        render(each, tokenizer, random.choice(list(DIALECTS)))
        again = read_row(load_json(dump_json(openai_row(each))), quiet)  # as --fix writes it
        assert again.messages == each.messages and again.tools == each.tools
    return found, problems


# --- rows and files -------------------------------------------------------------------------------

def write(random: Random, path: Path, data: bytes) -> Path:
    """Writes a file, now and then as .gz; returns its path."""
    if random.random() < 0.2:
        path, data = path.with_name(f"{path.name}.gz"), gzip.compress(data, 1)
    path.write_bytes(data)
    return path


def mutated_row(random: Random) -> bytes:
    """A row of some layout with something wrong in it, most often as a value."""
    value, how = random.choice(ROWS), random.random()
    if how < 0.2:
        return dump_json(value).encode()
    if how < 0.3:  # a field of another type, wherever it may be
        value = copy.deepcopy(value)
        value[random.choice([*value, "tools", "system", "messages", "hermes_tags"])] = (
            random.choice(STRANGE))
        return json.dumps(value).encode()
    return hostile_json(random, value)


def test_rows_of_every_layout(place, tokenizer, cases, tried):
    """Lines as they come: one that is broken does not touch the others, whatever is in it."""
    def case(random, folder):
        data = b"\n".join(mutated_row(random) for _ in range(random.randint(1, 4)))
        data += random.choice([b"", b"\n", b"\r\n\n"])
        if data.lstrip(b"\n").startswith(b"["):
            data = b"{}\n" + data
        data = random.choice([b"", b"", b"\xef\xbb\xbf"]) + data
        path = write(random, folder / "rows.jsonl", data)
        found, problems = check_read(path, tokenizer, random)
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            assert "UTF-16" in found
        else:
            assert not isinstance(found, Refused)
            check_lines(path, data, found, problems)
        return found

    number = cases(3000, 20_000)
    assert number / 4 < survive("rows", place, number, case)
    tried(MUTATED, number)


def test_arrays(place, tokenizer, cases, tried):
    """Read piece by piece, however small: what is JSON is read whole, what is not up to there."""
    def case(random, folder):
        rows = [mutated_row(random) for _ in range(random.randint(0, 3))]
        sources.ROW = max(map(len, rows), default=1) + random.choice([0, 1, 2, 7, 2**20])
        sources.BLOCK = random.choice([8, 9, 100, 2**17]) if sources.ROW < 2**14 else 2**17
        gap = random.choice([b",", b", ", b" ,\n\n", b",\r\n"])
        data = b"[" + random.choice([b"", b"\n "]) + gap.join(rows) + random.choice([b"]", b"\n]"])
        whole = random.random() < 0.8
        data = data if whole else hostile_text(random, data)
        if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
            return Refused("lines")
        path = write(random, folder / "rows.json", data)
        found, problems = check_read(path, tokenizer, random)
        assert not isinstance(found, Refused)
        good = []  # the rows before the first bad one
        for each in map(strictly, rows):
            if each is BAD:
                break
            good.append(each)
        if whole and len(good) == len(rows):
            assert len(found) + len(problems) == max(1, len(rows))
        if whole:
            wanted = [WHOLE[TEXTS.index(dump_json(each))] for each in good
                      if dump_json(each) in TEXTS]
            assert all(any(same(one, other) for other in found) for one in wanted)
            assert len(problems) >= (len(good) < len(rows))
        assert len({each.source for each in found}) == len(found)
        return found

    number = cases(2000, 10_000)
    assert number / 5 < survive("arrays", place, number, case)
    tried(MUTATED, number)


def test_packed_files(place, tokenizer, cases, tried):
    """Cut, changed, longer, in several parts: what `gzip` itself unpacks, or refused."""
    def case(random, folder):
        text = b"\n".join(dump_json(random.choice(ROWS)).encode() for _ in range(3))
        data = gzip.compress(text, random.choice([0, 1, 9]))
        data = random.choice([
            lambda: data[:random.randrange(len(data))], lambda: flipped(random, data),
            lambda: data + b"rubbish", lambda: data + bytes(random.randint(1, 600)),
            lambda: data + b"\n" + data, lambda: text,
            lambda: flipped(random, data, 0, 12), lambda: flipped(random, data, len(data) - 8),
            lambda: data[:3] + bytes([random.randrange(256)]) + data[4:]])()
        path = folder / "rows.jsonl.gz"
        path.write_bytes(data)
        found, problems = check_read(path, tokenizer, random)
        try:
            text = gzip.decompress(data)
        except Exception:
            assert isinstance(found, Refused)
            return found
        check_lines(path, text, found, problems)
        return found

    number = cases(800, 4000)
    assert number / 20 < survive("gz", place, number, case)
    tried(MUTATED, number)


def test_rows_that_are_too_long(place, tokenizer, cases, tried, monkeypatch):
    """Just below the limit, just above it, with what is larger behind: of an array the row and all
    before, and of lines all others, too, if the end of the long one is not too far.
    """
    monkeypatch.setattr(sources, "ROW", 300)
    monkeypatch.setattr(sources, "FAR", 2)

    def case(random, folder):
        sources.BLOCK = random.choice([8, 10, 299, 300, 301, 5000])
        size = random.choice([250, 290, 297, 298, 299, 300, 301, 302, 310, 598, 599, 600, 601, 898,
                              899, 900, 901, 5000])
        row = '{"messages": [{"role": "user", "content": "%s"}]}'
        before = row % "a"
        long = row % ("b" * (size - len(row) + 2))
        assert len(long) == size
        rows = random.choice([[before, long, before], [long, before], [before, long], [long]])
        array = random.random() < 0.5
        path = folder / "rows.json"
        path.write_text(f"[{', '.join(rows)}]" if array else "\n".join(rows))
        found, problems = check_read(path, tokenizer, random)
        last = rows[-1] == long
        if size <= 300 - (not array):  # a line has an end besides
            assert len(found) == len(rows) and not problems
        elif not array and size >= 3 * 300 + last:
            assert "what follows cannot be read (the line has no end in" in found, (size, found)
        else:
            where = rows.index(long)
            assert len(found) == (where if array else len(rows) - 1) and len(problems) == 1
            assert f"(row {where + 1}): " in problems[0] and "MiB" in problems[0]
            assert ("the rest of the file is not read" in problems[0]) == array
        return found

    number = cases(300, 1000)
    survive("long", place, number, case)
    tried(MUTATED, number)


BOMBS = {"spaces": b" ", "brackets": b"[", "a list of lists": b"[],", "objects": b'{"a":',
         "zeros": b"\0", "digits": b"9", "bytes": b"\xff", "commas": b"[1,", "lines": b"[]\n" * 40}


@pytest.mark.parametrize("start", [b'{"messages": "', b"[", b'[{"messages": [', b""])
@pytest.mark.parametrize("what", BOMBS)
def test_what_a_small_file_unpacks_to(place, tried, monkeypatch, what, start):
    """A megabyte of gzip that holds a gigabyte: no more of it is unpacked than a row may have."""
    if what == "a list of lists":  # Python's own JSON needs most of a second for a megabyte of it
        monkeypatch.setattr(sources, "ROW", 2**18)
    part = gzip.compress(BOMBS[what] * (2**20 // len(BOMBS[what])), 1)
    data = gzip.compress(start) + part * 1024

    def case(random, folder):
        path = folder / "bomb.jsonl.gz"
        path.write_bytes(data)
        found = attempt(read_conversations, path, about=f"{path}:1")
        assert isinstance(found, Refused) and len(found) < 1000
        return found

    survive("bomb", place, 1, case)
    tried(MUTATED, 1)


# --- rows that take time --------------------------------------------------------------------------

def test_rows_that_would_take_time(place, tokenizer, cases, tried):
    """Much in a row, of what a careless reader goes through once for each part of it."""
    n = cases(600_000, 900_000)  # characters
    few = n // 4                 # of what takes long for each
    call, result = '{"name": "f", "arguments": {}}', "<tool_response>"
    asked = ("user", "?"), ("assistant", {"tool_calls": [{"name": "f", "arguments": {}}]})

    def reply(text: str) -> dict:
        return chat(("user", "?"), ("assistant", text))

    def system(text: str) -> dict:
        return chat(("system", text), ("user", "?"), ("assistant", "!"))

    def glaive(text: str, system: str = "") -> dict:
        return {"system": system, "chat": f"USER: ?{text}\nASSISTANT: !"}

    def tool(**parameters) -> dict:
        return chat(("user", "?"), ("assistant", "!"), tools=[
            {"name": "f", "parameters": parameters}])

    def many(text: str, n: int = n) -> str:
        return text * (n // len(text))

    def calls(name: str, number: int = n // 75) -> list[dict]:
        return [{"id": f"{name}{i}", "function": {"name": "f", "arguments": {}}}
                for i in range(number)]

    rows = [
        reply("<tool_call>" + many(" ")), reply(many("<tool_call>")),
        reply(many("<tool_call> </tool_call>")), reply(many(f"<tool_call>{call}</tool_call>")),
        reply(many(f"<tool_call>{call}</tool_call> x", few)), reply(many("<think>")),
        reply(many(" <think>")), reply(many("<tool_call>[")),
        reply("<tool_call>" + many("{'a':", few)),
        chat(*asked, ("tool", result + many(" "))), chat(*asked, ("tool", many(result))),
        chat(*asked, ("tool", many(f"{result}a</tool_response>"))),
        system("<tools>" + many(" ")), system(many("<tools>[")), system(many("<tools>[]</tools>")),
        system(many("<tools>" + " " * 999)), system(f"<tools>{many('{}', few)}</tools>"),
        system(f"<tools>{many('[] ')}</tools>"),
        glaive(many("\n") + "x"), glaive(many("\n ") + "x"), glaive(many("<|endoftext|>")),
        glaive("", "{" + many(" ")), glaive(many("\nUSER: ", few)),
        glaive(many("\nASSISTANT:", few)),
        glaive("\nASSISTANT: <functioncall> {\"name\": \"f\", \"arguments\": '" + many("\\'")),
        glaive("\nASSISTANT: <functioncall> {" + many(" ")), glaive(many("\nASSISTANT: <f>")),
        tool(type=many("[")), tool(type=many("list[")), tool(type="list[" + many("]")),
        {"query": "?", "answers": f"[{call}]", "tools": [
            {"name": "f", "parameters": {"a": {"type": many(", ")}}}]},
        {"query": "?", "answers": many("-"), "tools": []},
        {"query": "?", "answers": many("("), "tools": []},
        {"query": "?", "answers": "{" + many("'a': 1, ") + "}", "tools": []},
        chat(*[("user", "?")] * (n // 30), ("assistant", "!")),
        chat(("user", "?"), *[("assistant", {"tool_calls": calls("a", 1)})] * (few // 90)),
        chat(("user", "?"), ("assistant", {"tool_calls": calls("a")}), *[
            ("tool", {"content": "", "tool_call_id": one["id"]}) for one in calls("a")[::-1]],
            ("assistant", "!")),
        chat(("user", "?"), ("assistant", {"tool_calls": [{**one, "id": None}
                                                          for one in calls("a")]}), *[
            ("tool", {"content": "", "tool_call_id": one["id"]}) for one in calls("b")]),
        chat(("user", {"content": [{"type": "text", "text": "x" * 9}] * (n // 40)}),
             ("assistant", "!")),
        chat(("user", "?"), ("assistant", {"content": [
            *[{"type": "thinking", "thinking": "x" * 9}] * (n // 50), {"text": "!"}]}))]
    # Objects with a key twice, and numbers, as texts.
    keys = ", ".join(f'"{i}": 0' for i in range(n // 14))
    texts = [*map(dump_json, rows), f'{{"messages": {{{keys}, "-": 0, "-": 1}}}}',
             f'{{"messages": {many("9")}}}', f'{{"messages": 0.{many("9")}e-9999}}',
             f'{{"messages": "{many("[0]")}", "conversations": [{many("[0], ")}0]}}']
    left = iter(texts)

    def case(random, folder):
        path = folder / "rows.jsonl"
        path.write_text(next(left))
        problems = []
        found = attempt(read_conversations, path, problems.append, quiet)
        assert len(found) + len(problems) == 1 and len("".join(problems)) < 1000
        for each in found if path.stat().st_size <= 300_000 else ():
            with reading():
                render(each, tokenizer, "functiongemma")
        return found

    number = len(texts)
    survive("slow", place, number, case)
    tried(MUTATED, number)


def test_a_page_of_a_character_that_looks_unfinished(place, tokenizer, tried):
    """U+FFFD is what half a character decodes to."""
    example, = make_parts(read_row(chat(("user", "\ufffd" * 6000), ("assistant", "!")), quiet),
                          tokenizer)

    def case(random, folder):
        return attempt(html_page, [example], tokenizer, "title", "about")

    survive("page", place, 1, case)
    tried(MUTATED, 1)


# --- what is named and what is there --------------------------------------------------------------

def test_what_lies_in_a_folder(place, cases, tried):
    """Pipes, devices, links that lead out, or to nothing, or round in a circle."""
    def case(random, folder):
        data = folder / "in" / "data"
        (data / "deep").mkdir(parents=True)
        texts = {f"{n}": dump_json(chat(("user", f"{n}"), ("assistant", "!"))) for n in range(4)}
        files = [data / "0.jsonl", data / "1.json", data / "2.jsonl.gz", data / "deep" / "3.jsonl"]
        for path, text in zip(files, texts.values(), strict=True):
            path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else
                             text.encode())
        if random.random() < 0.3:  # two links up: 2 ** 40 paths
            (data / "deep" / "up").symlink_to("..")
            (data / "deep" / "again").symlink_to(data)
        changed = random.choice(files)
        if random.random() < 0.2:
            at = files.index(changed)
            files[at] = changed = changed.rename(changed.with_name(random.choice(
                ["\n.jsonl", "\udcff.json"])))
            odd = unshown = True
        else:
            hostile_file(random, changed)
            unshown = False
            odd = os.path.lexists(changed) and not changed.is_dir()
        named, seen = random.choice([
            (data, files[:3]), (f"{data}/", files[:3]), (f"{data}/*", files[:3]),
            (f"{data}/*.json*", files[:3]), (f"{data}/**/*.json*", files), (f"{data}/**", files),
            (f"{folder}/i*/data/?.*", files[:3]), (f"{data}/[!x]*", files[:3])])
        home = folder if "i*" in str(named) else data
        problems = []
        found = attempt(read_conversations, str(named), problems.append, quiet)
        good = [path for path in seen if path.is_file() and path.resolve().is_relative_to(home)]
        said = dict(zip(files, texts, strict=True))
        if isinstance(found, Refused):
            assert odd and changed in seen and changed.parent.name in found, found
        else:
            assert not (unshown and changed in seen)
            assert {said[path] for path in good} - {said[changed]} <= {
                each.messages[0].content for each in found}
            if changed in seen and odd:  # it is there, and something else now
                assert changed in good and (problems or said[changed] in [
                    each.messages[0].content for each in found])
        return found

    number = cases(400, 3000)
    assert number / 10 < survive("folders", place, number, case)
    tried(MUTATED, number)


def test_names_of_data(place, cases, tried):
    """What --data is given, which may be no name at all; each of its parts begins here."""
    words = ["", "a", "..", ".", "*", "**", "[", "]", "?", "/", "@", "@2", "@1e999", ":", ",",
             "x" * 300, "\0", "\n", "~", "{", "a.jsonl", "in", "in/a.jsonl", "link.jsonl",
             "é", "\udcff"]

    def case(random, folder):
        (folder / "in").mkdir()
        (folder / "in" / "a.jsonl").write_text(dump_json(ROWS[0]))
        (folder / "link.jsonl").symlink_to("in/a.jsonl")
        os.chdir(folder)
        name = "".join(random.choices(words, k=3)).replace(",", ",./")
        return attempt(read_conversations, f"./{name}", quiet, quiet)

    number = cases(400, 3000)
    assert survive("names", place, number, case) > 3
    tried(MUTATED, number)


# --- other readers of data ------------------------------------------------------------------------

def test_questions_and_accepted_answers(place, cases, tried):
    """Of the leaderboard's form: what was left as it is is the same question as ever."""
    rows = [row(f"simple_{n}") for n in range(3)] + [row("irrelevance_0", function=[])]
    truths = [answer(f"simple_{n}") for n in range(3)]
    calm = place.parent / "calm"
    calm.mkdir()
    for name, values in (("q.jsonl", rows), ("q.answers.jsonl", truths)):
        (calm / name).write_text("\n".join(map(dump_json, values)))
    whole = {each.id: each for each in read_questions(str(calm / "q.jsonl"))}
    assert len(whole) == 4

    def case(random, folder):
        for name, values in (("q.jsonl", rows), ("q.answers.jsonl", truths)):
            lines = [dump_json(each).encode() for each in values]
            if random.random() < 0.6:
                at = random.randrange(len(lines))
                lines[at] = hostile_json(random, values[at])
            (folder / name).write_bytes(b"\n".join(lines))
        found = attempt(read_questions, str(folder / "q.jsonl"), about=str(folder))
        if not isinstance(found, Refused):
            assert sum(each.tools == whole["simple_0"].tools for each in found) >= 2
        return found

    number = cases(800, 4000)
    assert number / 10 < survive("questions", place, number, case)
    tried(MUTATED, number)


def test_validate_and_its_mended_copy(place, tokenizer, cases, tried):
    """Each row is good or named, and the copy holds the good ones."""
    out = place.parent / "out"
    out.mkdir()

    def case(random, folder):
        data = b"\n".join(mutated_row(random) for _ in range(random.randint(1, 3)))
        path = folder / "rows.jsonl"
        path.write_bytes((b"{}\n" if data.lstrip().startswith(b"[") else b"") + data)
        copied = random.random() < 0.5
        found = attempt(lambda: check_data(str(path), tokenizer, TrainConfig(length=300),
                                           str(out / "copy.jsonl") if copied else None),
                        about="rows.jsonl", writes=out)
        if not isinstance(found, Refused):
            facts, rows = found.facts, lines_of(path.read_bytes())
            assert facts["conversations"] + facts["unread"] == max(len(rows), not rows)
            assert len(facts["problems"]) == facts["unread"] + facts["refused"]
            if copied:
                again = read_conversations(out / "copy.jsonl", quiet, quiet)
                assert len(again) == facts["conversations"] - facts["refused"]
        return found

    number = cases(200, 2000)
    assert number / 4 < survive("validate", place, number, case)
    tried(MUTATED, number)


def test_damaged_entries_of_the_cache(place, tokenizer, cases, tried, monkeypatch):
    """One bit, one byte, the end, a file, the entry of other data: made again, never wrong."""
    home = place.parent / "home"
    (home / "code").mkdir(parents=True)
    monkeypatch.setattr(cache, "__file__", str(home / "code" / "cache.py"))
    monkeypatch.chdir(home)
    for name in "ab":
        (home / f"{name}.jsonl").write_text("\n".join(
            dump_json(chat(("user", f"{name}{n}"), ("assistant", f"{n}{name}"))) for n in "12"))

    def load() -> list[tuple]:
        found = load_examples("a.jsonl", tokenizer, on_notice=quiet)
        return [(each.ids.tolist(), each.kinds.tolist(), each.labels.tolist(), each.source,
                 each.weight, each.part) for each in found] + found.conversations(9)

    monkeypatch.setenv("MINILORA_CACHE", str(home / "cache"))
    wanted = load()
    entry, = (home / "cache").iterdir()
    load_examples("b.jsonl", tokenizer, on_notice=quiet)
    other, = set((home / "cache").iterdir()) - {entry}

    def case(random, folder):
        monkeypatch.setenv("MINILORA_CACHE", str(folder))
        shutil.copytree(other if random.random() < 0.1 else entry, folder / entry.name)
        path = random.choice(sorted((folder / entry.name).iterdir()))
        data, at = path.read_bytes(), random.random()
        at = int(at * len(data))
        random.choice([
            lambda: path.write_bytes(data[:at] + bytes([data[at] ^ 1 << random.randrange(8)])
                                     + data[at + 1:] if data else b"x"),
            lambda: path.write_bytes(flipped(random, data)),
            lambda: path.write_bytes(data[:at]), lambda: path.write_bytes(data + b"\0"),
            lambda: path.write_bytes(data[:at] + data[at + 1:]), lambda: path.unlink(),
            lambda: path.write_bytes((other / path.name).read_bytes()),
            lambda: path.write_bytes(bytes(len(data))), lambda: None])()
        assert load() == wanted

    number = cases(300, 3000)
    survive("cache", place, number, case)
    tried(MUTATED, number)


def test_parquet(place, cases, tried):
    """Changed bytes of a parquet file: its rows, or others that are no worse, or refused."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pyarrow.set_cpu_count(1)
    calm = place.parent / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(
        [chat(("user", f"{n}"), ("assistant", "!"), tools=dump_json([TOOL])) for n in range(5)]),
        calm)
    data = calm.read_bytes()
    assert len(read_conversations(calm)) == 5

    def case(random, folder):
        path = folder / "rows.parquet"
        path.write_bytes(random.choice([
            lambda: data[:random.randrange(len(data))], lambda: flipped(random, data),
            lambda: flipped(random, data, len(data) - 800), lambda: data + b"x"])())
        problems = []
        found = attempt(read_conversations, path, problems.append, quiet, about=path.name)
        assert all(len(each.splitlines()) == 1 for each in problems)
        return found

    number = cases(300, 3000)
    survive("parquet", place, number, case)
    tried(MUTATED, number)


def test_a_small_parquet_of_large_rows(tmp_path, tried):
    """A text may be there once and stand in each of its rows."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = pyarrow.array(["a" * (sources.ROW - 100), "a" * sources.ROW]).dictionary_encode()
    many = values.take(pyarrow.array([1, 0] * 100))
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table({"messages": many}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    del values, many
    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    problems = [(row.problem, pool.bytes_allocated() - before) for row in
                read_rows(DataFile(path, path.name))]
    assert [problem for problem, _ in problems] == ["longer than 1 MiB", ""] * 100
    assert max(size for _, size in problems) < 32 * sources.ROW
    tried(MUTATED, 1)
