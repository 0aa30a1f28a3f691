"""What people look at: the plan of a run, its progress, its curve, and one line for a mistake."""

import codecs
import contextlib
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from minilora.config import UserError, check_file
from minilora.files import replacing, write_file
from minilora.jsontext import load_json


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: for the host's PyTorch has no type of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in (
        "DefaultCPUAllocator", "out of memory", "could not create a primitive"))  # so says oneDNN


def run_command(main: Callable[[], None]) -> int:
    """Runs a command; a user's mistake is one line on stderr and status 2, Ctrl-C is status 130."""
    _ready_streams()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or 'the disk'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory; take fewer tokens or rows at a time, --dtype bfloat16, or a "
              "smaller model", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _ready_streams() -> None:
    """Makes stdin, stdout and stderr bear whatever a command reads and writes.

    One that was closed, which Python has as None, is as if it were /dev/null. What the encoding of
    stdout lacks is written as JSON's own escape, \\u2588: there JSON stays JSON, for it has such
    characters only inside strings. Input that is no text comes as half surrogate pairs, which
    whoever needs text refuses.
    """
    for name, mode, errors in (("stdin", "r", "surrogateescape"), ("stdout", "w", "escape_json"),
                               ("stderr", "w", "backslashreplace")):
        stream = getattr(sys, name) or open(os.devnull, mode)  # noqa: SIM115 - to the end
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors=errors)  # unless it holds text, or was read from before
        setattr(sys, name, stream)


def _escape_json(error: UnicodeEncodeError) -> tuple[str, int]:
    """What stands for the characters that cannot be encoded, and where to go on after them."""
    return json.dumps(error.object[error.start:error.end])[1:-1], error.end


codecs.register_error("escape_json", _escape_json)


_JOINERS = "\u200c\u200d"  # parts of Persian words and of emoji


def visible(text: str) -> str:
    """`text` as it may be shown: a character that would act instead of being seen, by its code.

    Terminal escapes and all other control characters but newline and tab, marks that turn the
    direction of text around, invisible ones, half surrogate pairs: \\x1b, \\r, \\u202e, \\ud800.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in "\n\t" or char in _JOINERS
        or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else char.encode("unicode_escape").decode() for char in text)


def colors(stream: TextIO) -> bool:
    """Whether colours may be written to `stream`: a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def say(text: str) -> None:
    """A line for a person, on stderr, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def count(number: float) -> str:
    """12_345_678 → 12.3 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """4000 → 1 h 07 min; 95 → 1 min 35 s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
    return f"{seconds // 60} min {seconds % 60:02} s" if seconds >= 60 else f"{seconds} s"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two aligned columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def progress(total: int, done: int = 0, unit: str = "step") -> tqdm:
    """A bar with the time left, on a terminal; silent where stderr is a file."""
    return tqdm(total=total, initial=done, unit=unit, disable=None, dynamic_ncols=True)


# --- metrics: one JSON object a line --------------------------------------------------------------

def append_metrics(path: Path, record: dict) -> None:
    """Adds a line to metrics.jsonl of a run. Raises UserError where the disk refuses."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); free the disk and go on with: "
                        f"python train.py --resume {path.parent}") from None


_LOSSES = ("loss", "held_out_loss")  # numbers of a record, which may lack either


def read_metrics(path: Path) -> list[dict]:
    """The records in metrics.jsonl, less lines that are none: a crash has cut them short or left
    other bytes there, or somebody has written to them. Raises UserError for what is no plain file.
    """
    if not path.exists():
        return []
    check_file(path)
    records = []
    for line in path.read_text("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError):
            record = load_json(line)
            if isinstance(record, dict) and type(record.get("step")) is int and all(
                    type(record.get(name, 0.0)) in (int, float) for name in _LOSSES):
                records.append(record)
    return records


def forget_metrics_after(path: Path, step: int) -> None:
    """Drops the lines of later steps, which a run resumed at `step` will write again, and those
    that are no records; a note tells of earlier steps that then have none.
    """
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    if missing := sorted({*range(1, step + 1)} - {record["step"] for record in kept}):
        say(f"note: {path} has no record of {len(missing)} of the first {step} steps: curve.png is "
            f"drawn without them (the first is step {missing[0]})")
    write_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def draw_curve(metrics: Path, picture: Path) -> None:
    """Draws loss and held-out loss over the steps as a PNG. Where that fails a note says why: a run
    is worth more than its picture.
    """
    try:
        _draw(read_metrics(metrics), picture)
    except ImportError as error:
        reason = f"{error} (pip install matplotlib)"
    except UserError as error:
        reason = str(error)
    except Exception as error:  # from matplotlib: its settings, its fonts
        reason = repr(error)
    else:
        return
    say(visible(f"note: {picture.name} is not drawn: {reason}"))


def _draw(records: list[dict], picture: Path) -> None:
    from matplotlib.figure import Figure

    train, held = ([(record["step"], record[name]) for record in records if name in record]
                   for name in _LOSSES)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9bb7d4", linewidth=1, label="training, each step")
        window = max(1, len(losses) // 20)
        smooth = [sum(losses[max(0, i - window + 1):i + 1]) / min(i + 1, window)
                  for i in range(len(losses))]
        axes.plot(steps, smooth, color="#1f5a96", linewidth=2, label=f"mean of {window} steps")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="#c8502d", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)",
             title="Loss on what the assistant must write")
    if min((loss for _, loss in train + held), default=0) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    if train or held:
        axes.legend()
    with replacing(picture) as aside:
        figure.savefig(aside, format="png", dpi=120)
