"""What is shown: mistakes as one line, text that cannot act, metrics that survive a crash, a curve.
"""

import io
import json
import sys
import unicodedata

import pytest

from minilora.config import UserError
from minilora.report import (
    append_metrics,
    colors,
    count,
    draw_curve,
    duration,
    forget_metrics_after,
    read_metrics,
    run_command,
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


@pytest.mark.parametrize("records", [
    [], [{"step": 1, "loss": 2.0}], [{"step": s, "loss": 3 / s, "held_out_loss": 4 / s}
                                     for s in range(1, 30)]])
def test_the_curve_is_a_picture(tmp_path, records):
    for record in records:
        append_metrics(tmp_path / "metrics.jsonl", record)
    assert draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
