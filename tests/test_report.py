"""What is shown: mistakes as one line, metrics that survive a crash, a curve, tokens by kind."""

import json

import pytest
from tiny_tokenizer import make_tokenizer_model

from minilora.chat import DIALECTS, Conversation, Message, ToolCall
from minilora.config import UserError
from minilora.data import make_example
from minilora.report import (
    append_metrics,
    color_tokens,
    count,
    draw_curve,
    duration,
    forget_metrics_after,
    read_metrics,
    run_command,
    table,
)
from minilora.tokenizer import Tokenizer


@pytest.mark.parametrize("error, status, line", [
    (None, 0, ""), (UserError("calls.jsonl:3: bad"), 2, "error: calls.jsonl:3: bad\n"),
    (PermissionError(13, "Permission denied", "runs/a"), 2, "error: runs/a: Permission denied\n"),
    (OSError(28, "No space left on device"), 2, "error: the disk: No space left on device\n"),
    (KeyboardInterrupt(), 130, "stopped\n")])
def test_a_mistake_is_one_line(error, status, line, capsys):
    def main():
        if error:
            raise error

    assert run_command(main) == status
    assert capsys.readouterr().err == line


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_numbers_for_people():
    assert [count(n) for n in (7, 1234, 20_800_000, 2.6e9)] == ["7", "1.23 k", "20.8 M", "2.6 G"]
    assert [duration(s) for s in (4.6, 95, 4020)] == ["5 s", "1 min 35 s", "1 h 07 min"]
    assert table([("a", "1"), ("long", "2")]) == "a     1\nlong  2"


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


def test_tokens_by_kind(tmp_path):
    tokenizer = Tokenizer.load(make_tokenizer_model(tmp_path).parent)
    tokenizer.add_tokens(DIALECTS["hermes"].tokens)
    call = ToolCall("find_book", {"title": "Paris"})
    example = make_example(Conversation((
        Message("user", "find Paris"), Message("assistant", thinking="a book", tool_calls=(call,)),
        Message("tool", "42"), Message("assistant", "42."))), tokenizer)
    plain = color_tokens(example, tokenizer, color=False)
    assert plain.replace("⟦", "").replace("⟧", "") == tokenizer.decode(example.ids.tolist())
    assert '⟦<tool_call>\n{"name": "find_book", "arguments": {"title": "Paris"}}\n' in plain
    assert "⟦42.⟧⟦<end_of_turn>⟧" in plain and "⟦<tool_response>" not in plain
    colored = color_tokens(example, tokenizer)
    assert "\033[36;4m<tool_call>\033[0m" in colored and "\033[33m42\033[0m" in colored
