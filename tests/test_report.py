"""What is shown: mistakes as one line, text that cannot act, metrics that survive a crash, a curve.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from minilora.config import UserError
from minilora.jsontext import dump_json
from minilora.report import (
    append_metrics,
    colors,
    count,
    draw_curve,
    duration,
    forget_metrics_after,
    read_metrics,
    run_command,
    say,
    table,
    visible,
)

OUT_OF_MEMORY = ("error: out of memory; take fewer tokens or rows at a time, --dtype bfloat16, or "
                 "a smaller model\n")


@pytest.mark.parametrize("error, status, line", [
    (None, 0, ""), (UserError("calls.jsonl:3: bad"), 2, "error: calls.jsonl:3: bad\n"),
    (UserError("role \x1b[2J"), 2, "error: role \\x1b[2J\n"),
    (PermissionError(13, "Permission denied", "runs/a"), 2, "error: runs/a: Permission denied\n"),
    (OSError(28, "No space left on device"), 2, "error: the disk: No space left on device\n"),
    (MemoryError(), 2, OUT_OF_MEMORY),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, OUT_OF_MEMORY),
    (KeyboardInterrupt(), 130, "stopped\n")])
def test_a_mistake_is_one_line(error, status, line, capsys):
    def main():
        if error:
            raise error

    assert run_command(main) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("bug", [ZeroDivisionError(), RuntimeError("shapes do not match")])
def test_a_bug_is_not_hidden(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)):
        run_command(main)


# --- streams that are closed, or that cannot hold every character --------------------------------

ROOT = Path(__file__).parents[1]


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """What comes of `python` with the rest of a line of shell, in a folder; the output as bytes."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        f"{shlex.quote(sys.executable)} {line}", shell=True, cwd=folder, capture_output=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment})


@pytest.mark.parametrize("closed", [["stdin"], ["stdout"], ["stderr"],
                                    ["stdin", "stdout", "stderr"]])
def test_a_command_does_its_work_where_a_stream_is_closed(closed, monkeypatch):
    """Python has None for it then, on which `print` is silent and all else is an error."""
    for name in closed:
        monkeypatch.setattr(sys, name, None)

    def main():
        assert not any(colors(getattr(sys, name)) for name in closed)
        assert "stdin" not in closed or sys.stdin.readline() == ""
        sys.stdout.write("out")
        say("a note")
        raise UserError("the mistake")

    assert run_command(main) == 2


@pytest.mark.parametrize("encoding, plain", [
    ("ascii", "a"), ("latin-1", "aü"), ("cp1252", "aü€"), ("utf-8", "aü€█⟦👩"),
    ("utf-16", "aü€█⟦👩"), ("shift_jis", "a★"), ("cp037", "aü")])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second in the C locale
def test_json_is_json_whatever_stdout_can_hold(encoding, plain, errors, monkeypatch):
    """What the encoding has is written as it is, all else as JSON writes it in ASCII."""
    value = {"text": "aü€█⟦👩★\u2028\ud800 \udcff\n\\", "ü": ["", "⟦" * 9]}
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    monkeypatch.setattr(sys, "stdout", out)
    assert run_command(lambda: print(dump_json(value))) == 0
    text = out.buffer.getvalue().decode(encoding)
    assert json.loads(text) == value
    assert all(char in text for char in plain)


def test_input_that_is_not_utf_8_is_no_traceback(monkeypatch):
    """Its bytes become half surrogate pairs, which the tokenizer refuses in one line."""
    read, write = os.pipe()
    os.write(write, b"h\xffi\n" * 2)
    os.close(write)
    with open(read, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        for _ in range(2):  # the second time it was read from before, and cannot be seeked in
            assert run_command(lambda: print(ascii(next(stdin)))) == 0


def test_a_command_shows_what_its_stream_cannot_hold(tmp_path):
    """A whole command, on a screen that has "ü" and no "⟦"."""
    (tmp_path / "ü.jsonl").write_text(json.dumps({"messages": [
        {"role": "user", "content": "Für wen?"}, {"role": "assistant", "content": "█"}]}))
    done = shell("-m minilora show ü.jsonl", tmp_path, PYTHONIOENCODING="cp1252")
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode("cp1252")
    assert "ü.jsonl:1" in text and "Für wen?" in text
    assert "\\u27e6" in text and "\\u2588" in text


def test_a_chat_without_an_input_ends(tmp_path):
    done = shell(f"{ROOT / 'infer.py'} --model nano <&-", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"model nano\n")


def test_a_run_ends_well_without_an_output_and_without_a_picture(tmp_path):
    """matplotlib reads MPLBACKEND when it is imported, after the last step; stdout is closed."""
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": "Yes."}]}) + "\n"
        for n in range(9)))
    done = shell(f"{ROOT / 'train.py'} --data calls.jsonl --length 64 --batch 1 --steps 1 --rank 1 "
                 "--eval-calls 0 --json --out run >&-", tmp_path, MPLBACKEND="nonsense")
    said = done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in said, said
    assert re.search(r"^note: curve.png is not drawn: .*nonsense", said, re.MULTILINE), said
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 1
    assert not (tmp_path / "run/curve.png").exists()


# --- for people -----------------------------------------------------------------------------------

def test_numbers_for_people():
    assert [count(n) for n in (7, 1234, 20_800_000, 2.6e9)] == ["7", "1.23 k", "20.8 M", "2.6 G"]
    assert [duration(s) for s in (4.6, 95, 4020)] == ["5 s", "1 min 35 s", "1 h 07 min"]
    assert table([("a", "1"), ("long", "2")]) == "a     1\nlong  2"


def test_every_character_is_shown_as_it_is_or_cannot_act():
    """What a terminal obeys, what turns text around and what cannot be seen is named instead."""
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if visible(char) == char:
            assert (unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
                    or char in "\n\t\u200c\u200d"), hex(code)
        else:
            assert visible(char).isascii() and visible(char).isprintable()
            assert visible(char).encode().decode("unicode_escape") == char
    assert visible("a\x1b[31m\r\n\tü 👩\u200d👧\u202e\ud800") == (
        "a\\x1b[31m\\r\n\tü 👩\u200d👧\\u202e\\ud800")


def test_colours_only_where_they_are_wanted(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colors(Terminal()) and not colors(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colors(Terminal())


def test_metrics_survive_a_cut_line_and_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    for step in range(1, 6):
        append_metrics(path, {"step": step, "loss": 1 / step})
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]
    forget_metrics_after(path, 3)
    append_metrics(path, {"step": 4, "loss": 9.0})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()][2:] == [1 / 3, 9.0]


RUBBISH = ["5", "null", "[1]", "{}", '"step"', "[" * 100_000, "1" * 5000, "\0" * 9, "", "\udcff",
           '{"step": 3', '{"step": "3", "loss": 1}', '{"step": 3.0}', '{"step": true}',
           '{"step": 3, "step": 4}', '{"step": 3, "loss": "1"}', '{"step": 3, "loss": {}}',
           '{"step": 3, "loss": null}', '{"step": 3, "loss": false}', '{"step": 3, "loss": NaN}',
           '{"step": 3, "loss": 1e999}', f'{{"step": 3, "loss": {"1" * 5000}}}',
           '{"step": 3, "held_out_loss": [1]}', f'{{"step": 3, "rows": {"[" * 900}{"]" * 900}}}']


@pytest.mark.parametrize("line", RUBBISH, ids=lambda line: line[:30])
def test_a_line_that_is_no_record_costs_its_step_alone(tmp_path, capsys, line):
    """The others stay, whatever comes between them, and the step that is missing is told."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 2.0, "rows": [1]}) for step in (1, 2, 4, 5)]
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n", errors="surrogateescape")
    forget_metrics_after(path, 4)
    assert path.read_text() == "".join(f"{line}\n" for line in lines[:3])
    assert capsys.readouterr().err == (f"note: {path} has no record of 1 of the first 4 steps: "
                                       "curve.png is drawn without them (the first is step 3)\n")


def test_only_metrics_that_are_missing_are_told(tmp_path, capsys):
    """What is lost of later steps is written again."""
    path = tmp_path / "metrics.jsonl"
    forget_metrics_after(path, 0)
    for step in (1, 2, 3):
        append_metrics(path, {"step": step})
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    forget_metrics_after(path, 3)
    assert capsys.readouterr().err == ""
    path.unlink()
    forget_metrics_after(path, 3)
    assert "no record of 3 of the first 3 steps" in capsys.readouterr().err


def test_metrics_that_are_no_file(tmp_path):
    """A pipe would be waited for, for ever."""
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder):
        with pytest.raises(UserError, match=f"{path}: cannot be read: it is no plain file"):
            forget_metrics_after(path, 1)


# --- the curve ------------------------------------------------------------------------------------

@pytest.mark.parametrize("records", [
    [], [{"step": 1, "loss": 2.0}], [{"step": s, "loss": 3 / s, "held_out_loss": 4 / s}
                                     for s in range(1, 30)]])
def test_the_curve_is_a_picture(tmp_path, capsys, records):
    for record in records:
        append_metrics(tmp_path / "metrics.jsonl", record)
    draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("how, told", [
    ("missing", "(pip install matplotlib)"),
    ("import", r"x\x1b'\n two lines"),
    ("drawing", "RuntimeError('no fonts')"), ("silent", "MemoryError"),
    ("folder", "Is a directory"), ("pipe", "metrics.jsonl: cannot be read"),
    ("numbers", "OverflowError")])
def test_without_a_picture_a_run_goes_on(tmp_path, monkeypatch, capsys, how, told):
    def fail(*_, **__):
        raise {"import": ValueError("Key backend: 'x\x1b'\n two lines"), "silent": MemoryError(),
               "drawing": RuntimeError("no fonts")}[how]

    run = tmp_path / "run\x1b"
    run.mkdir()
    metrics, picture = run / "metrics.jsonl", run / "curve.png"
    append_metrics(metrics, {"step": 1, "loss": 10**400 if how == "numbers" else 1.0})
    if how == "missing":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    elif how == "import":
        monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
        monkeypatch.setattr("importlib._bootstrap._find_spec", fail)
    elif how in ("drawing", "silent"):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    elif how == "folder":
        picture.mkdir()
    elif how == "pipe":
        metrics.unlink()
        os.mkfifo(metrics)
    draw_curve(metrics, picture)
    said = capsys.readouterr().err
    assert said.startswith("note: curve.png is not drawn: ") and told in said, said
    assert said.count("\n") == 1 and "\x1b" not in said
    assert not list(run.glob(".curve*"))
