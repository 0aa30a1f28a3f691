#!/usr/bin/env python3
"""Long runs, to see whether memory stays flat and steps or turns stay quick.

    OMP_NUM_THREADS=1 python tests/bench/soak.py train --steps 5000
    python tests/bench/soak.py chat --adapter runs/nano --turns 500

`train` is train.py itself on short conversations of many lengths, one a step, with looks at the
held-out loss and checkpoints on the way. `chat` is infer.py itself with questions that never end:
real generation, and tools. Each prints one JSON object, memory and seconds at the start, in the
middle and at the end, and a line that says whether they are flat. Seconds are the processor's, so
that it may share a machine.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from minilora.config import NANO
from minilora.model import Gemma
from minilora.report import run_command

FLAT = 1.05, 1.25  # memory and seconds at the end, as shares of those in the middle, that count so


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    chat = parts.add_parser("chat", help="turns of infer.py with tools")
    chat.add_argument("--adapter", help="run folder (default: as infer.py has it)")
    chat.add_argument("--turns", type=int, default=500)
    chat.add_argument("--max-new", type=int, default=48)
    run = parts.add_parser("train", help="steps of train.py")
    run.add_argument("--steps", type=int, default=5000)
    flags = parser.parse_args(argv)
    {"train": soak_train, "chat": soak_chat}[flags.part](flags)


def resident() -> float:
    """MB of memory that the process has now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


def verdict(name: str, megabytes: list[float], seconds: list[float], more: dict) -> None:
    """Prints the figures of the first, the middle and the last tenth as JSON, and what they say.

    Seconds are medians. The start has warming up in it, so the end is held against the middle.
    """
    tenth = max(1, len(seconds) // 10)
    places = {"start": 0, "middle": (len(seconds) - tenth) // 2, "end": len(seconds) - tenth}
    facts = {"part": name, "count": len(seconds), **more}
    for place, at in places.items():
        facts[place] = {"MB": round(statistics.median(megabytes[at:at + tenth]), 1),
                        "seconds": round(statistics.median(seconds[at:at + tenth]), 4)}
    print(json.dumps(facts))
    grown = [facts["end"][key] / facts["middle"][key] for key in ("MB", "seconds")]
    flat = all(share <= most for share, most in zip(grown, FLAT, strict=True))
    print(f"{'flat' if flat else 'NOT FLAT'}: from the middle to the end memory × {grown[0]:.3f}, "
          f"seconds × {grown[1]:.3f}")


# --- a run ----------------------------------------------------------------------------------------

def soak_train(flags: argparse.Namespace) -> None:
    train = importlib.import_module("train")
    append, clock = train.append_metrics, [time.process_time()]
    megabytes, files, threads = [], [], []

    def watched(path: Path, record: dict) -> None:
        append(path, record)
        if "lr" in record:  # a step
            megabytes.append(resident())
            files.append(len(os.listdir("/proc/self/fd")))
            threads.append(len(os.listdir("/proc/self/task")))
            clock.append(time.process_time())

    train.append_metrics = watched
    with tempfile.TemporaryDirectory() as folder:
        rows = (NANO / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        data, out = Path(folder, "short.jsonl"), Path(folder, "run")
        data.write_text("".join(sorted(rows, key=len)[:400]), encoding="utf-8")
        sys.argv = ["train.py", "--data", str(data), "--out", str(out), "--batch", "1",
                    "--no-pack", "--length", "288", "--steps", str(flags.steps),
                    "--save-every", "100"]
        train.main()
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    warm = flags.steps // 10
    slope = statistics.linear_regression(range(warm, flags.steps), megabytes[warm:]).slope
    verdict("train", megabytes, seconds, {
        "MB per 1,000 steps": round(1000 * slope, 2),
        "MB, most less least": round(max(megabytes[warm:]) - min(megabytes[warm:]), 1),
        "open files": [files[warm], max(files[warm:]), files[-1]],
        "threads": [threads[warm], max(threads[warm:]), threads[-1]]})


# --- a chat ---------------------------------------------------------------------------------------

TOOLS = '''
def get_weather(city: str) -> dict:
    """Get the weather of a city."""
    return {"weather": len(city)}


def find_book(book: str) -> dict:
    """Find a book."""
    raise LookupError(f"no book is called {book}")
'''
ASKED = "What is the weather in {city}?", "Find the book {city} {n}.", "Get the weather of {city}."
CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Kyoto", "Quito", "Accra")


def soak_chat(flags: argparse.Namespace) -> None:
    infer = importlib.import_module("infer")
    seconds, megabytes, fed, starts = [], [], [], set()
    read, latest = Gemma.hidden_states, infer.latest

    def counted(model: Gemma, ids, *rest):
        fed.append(ids.shape[1])
        return read(model, ids, *rest)

    def watched(messages, fits, since=0):
        starts.add(since)
        return latest(messages, fits, since)

    def questions(*_) -> Iterator[str]:
        for number, asked in enumerate(itertools.islice(itertools.cycle(ASKED), flags.turns)):
            begin = time.process_time()
            yield asked.format(city=CITIES[number % len(CITIES)], n=number)
            seconds.append(time.process_time() - begin)
            megabytes.append(resident())

    Gemma.hidden_states, infer.latest, infer.lines = counted, watched, questions
    out = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
        (tools := Path(folder) / "tools.py").write_text(TOOLS)
        infer.main(["--tools", str(tools), "--json", "--max-new", str(flags.max_new),
                    "--constrained", *(["--adapter", flags.adapter] if flags.adapter else [])])
    events = [json.loads(line)["event"] for line in out.getvalue().splitlines()]
    replies = [size for size in fed if size > 1]  # of each the tokens that are read at its start
    verdict("chat", megabytes, seconds, {
        "calls": events.count("call"), "answers": events.count("answer"),
        "told that it has outgrown": events.count("context"), "cut": len(starts) - 1,
        "replies": len(replies), "tokens read per reply": round(statistics.mean(replies), 1),
        "most": max(replies)})


if __name__ == "__main__":
    raise SystemExit(run_command(main))
