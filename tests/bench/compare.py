#!/usr/bin/env python3
"""minilora beside transformers + peft: the same inputs, in turn, several times in one go.

    python tests/bench/compare.py train --shape gemma2-small --dtype float32 --peer eager
    python tests/bench/compare.py generate --shape gemma2-small --batch 8
    python tests/bench/compare.py load | merge
    python tests/bench/compare.py packing --data calls.jsonl --tokenizer FOLDER
    python tests/bench/compare.py scaling | feeding | profile
    python tests/bench/compare.py techniques | decoding     what each technique gives
    python tests/bench/compare.py cpu            all that the README's table shows of a CPU
    python tests/bench/compare.py table          that table, from the files in results/

Checkpoint, batches and a start for LoRA are made (make.py); every figure is of a process of its
own. A side is what follows --ours (flags of `minilora bench` with + between: recompute=all) or
--peer (an attention of transformers, then flags of peer.py: sdpa+compile+checkpointing). The first
peer is the one whose losses all others must have; a run of ours that disagrees, that moved the base
or did not move the adapters is refused, and nothing is written. A side that cannot run, and a peer
that disagrees, is left out and named. The result is a JSON file in --out.

A ratio is the median over the rounds, with the smallest and the largest, of minilora's figure over
that of the best peer in the same round.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")
JOBS = ("train", "generate", "load", "merge", "packing", "scaling", "feeding", "techniques",
        "decoding", "profile")

# How far a loss may be from the peer's, and a gradient norm, as a share of it. In float32 sums in
# another order make 1e-5 of a loss of 17. In bfloat16 a logit of 10 is known to 1/32 and each side
# rounds in its own places: with 128 trained tokens transformers was 0.03 from its float32 loss and
# minilora 0.02 from its own. The bar is three times that: a missing soft-cap of the logits, which
# makes 0.2, is outside; what is finer is for float32 to show.
BARS = {"float32": (1e-3, 1e-3), "bfloat16": (0.1, 0.05)}


class Refused(Exception):
    """A figure that does not count, and why."""


def main(argv: list[str] | None = None) -> None:
    flags = parse(argv)
    if flags.job == "table":
        results = read_results(flags.out)
        if flags.bundle:
            flags.bundle.write_text(json.dumps(results, indent=1) + "\n")
        print(table(results))
        return
    with tempfile.TemporaryDirectory(prefix="minilora-bench-") as folder:
        flags.work = (flags.work or Path(folder)).resolve()
        flags.work.mkdir(parents=True, exist_ok=True)
        done, refused = [], []
        for job, settings in ([(job, {"device": "cpu"} | settings) for job, settings in CPU]
                              if flags.job == "cpu" else [(flags.job, {})]):
            try:
                done.append(RUN[job](argparse.Namespace(**{**vars(flags), "job": job, **settings})))
            except Refused as reason:
                refused.append(f"refused: {reason}")
                continue
            flags.out.mkdir(parents=True, exist_ok=True)
            path = flags.out / f"{file_name(done[-1])}.json"
            path.write_text(json.dumps(done[-1], indent=1) + "\n")
    if done:
        print(table(done))
    if refused:
        raise SystemExit("\n".join(refused))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=(*JOBS, "cpu", "table"))
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of results")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="with table: write all results "
                        "into one file, too, which a folder of results may hold")
    parser.add_argument("--work", type=Path, help="folder where inputs are kept from run to run "
                        "(default: a temporary one)")
    parser.add_argument("--shape", default="gemma2-small", help="a name in make.py")
    parser.add_argument("--dtype", default="float32", choices=tuple(BARS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=3600, help="most seconds of one process")
    parser.add_argument("--most", type=float, default=math.inf, help="seconds after which no "
                        "further round begins, and in the first no further side runs")
    parser.add_argument("--ours", action="append", help="may be given again (default: plain)")
    parser.add_argument("--peer", action="append", help="may be given again (default: eager); "
                        "none: no peer")
    parser.add_argument("--batch", type=int, default=0, help="rows (default: as the job has it)")
    parser.add_argument("--steps", type=int, default=7, help="of training")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--share", type=float, default=0.25, help="of the tokens, trained")
    parser.add_argument("--packed", action="store_true", help="several documents in a row")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--data", default="nano/train.jsonl", help="conversations, for packing")
    parser.add_argument("--tokenizer", help="folder of a tokenizer.model (default: nano's)")
    parser.add_argument("--count", type=int, default=64, help="conversations, for packing")
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096],
                        help="of rows, for scaling")
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch, for scaling: as many "
                        "rows as make that, one at least")
    parser.add_argument("--without", nargs="*", help="techniques, for decoding, in the words of "
                        "without.py (default: those of a CPU)")
    parser.add_argument("--conversations", type=int, nargs="*", default=[1000, 100_000],
                        help="for feeding")
    return parser.parse_args(argv)


# What the README shows of a CPU: `cpu` runs all of it.
CPU = [
    ("train", {}), ("train", {"dtype": "bfloat16"}),
    ("train", {"shape": "gemma3-270m", "peer": ["sdpa"]}),
    ("train", {"shape": "gemma3-270m", "peer": ["sdpa"], "dtype": "bfloat16"}),
    *(("generate", {"batch": batch, "dtype": dtype})
      for dtype, batch in itertools.product(BARS, (1, 8))),
    *((job, {"dtype": dtype}) for job, dtype in itertools.product(("load", "merge"), BARS)),
    ("scaling", {}), ("feeding", {"steps": 20}), ("techniques", {}),
    ("decoding", {"dtype": "bfloat16"}),
    ("packing", {"peer": ["none"], "rounds": 1}),  # a peer's logits of 8 rows are 8 GB, many times
]


# --- jobs -----------------------------------------------------------------------------------------

def run_train(flags: argparse.Namespace) -> dict:
    """Steps of training on random batches."""
    flags.batch = flags.batch or 2
    runs, left_out = in_turn(flags, sides(flags, "train", random_batches(flags)))
    left_out |= check_training(runs, flags.dtype)
    return result(flags, runs, left_out, batch=flags.batch, length=flags.length, share=flags.share,
                  packed=flags.packed, steps=flags.steps)


def random_batches(flags: argparse.Namespace) -> list:
    """The arguments of a bench of training: a model, batches and a start for LoRA."""
    model = checkpoint(flags)
    made = ("batches", "--model", model, "--steps", flags.steps, "--batch", flags.batch,
            "--length", flags.length, "--share", flags.share, *["--packed"][:flags.packed])
    return [model, make(flags, ".safetensors", *made),
            "--seed-lora", make(flags, ".safetensors", "lora", "--model", model)]


def run_generate(flags: argparse.Namespace) -> dict:
    """Greedy decoding of random prompts."""
    batch = flags.batch or 1
    size = ["--batch", batch, "--prompt", flags.prompt, "--new", flags.new]
    runs, left_out = in_turn(flags, sides(flags, "generate", [checkpoint(flags), *size]))
    left_out |= check_ids(runs, flags.dtype)
    return result(flags, runs, left_out, batch=batch, prompt=flags.prompt, new=flags.new)


def run_files(flags: argparse.Namespace) -> dict:
    """Loading, or merging and writing; a process has its own rounds."""
    size = ["--rounds", 3, *(["--scratch", flags.work] if flags.job == "merge" else [])]
    return result(flags, *in_turn(flags, sides(flags, flags.job, [checkpoint(flags), *size])))


def run_packing(flags: argparse.Namespace) -> dict:
    """Real conversations, packed into rows of 1024, and padded to the longest of eight."""
    model = checkpoint(flags)
    seed = ["--seed-lora", make(flags, ".safetensors", "lora", "--model", model)]
    made = ["conversations", "--model", model, "--data", flags.data, "--length", 1024, "--count",
            flags.count, *(["--tokenizer", flags.tokenizer] if flags.tokenizer else [])]
    rows = flags.batch or 4
    inputs = {"packed": make(flags, ".safetensors", *made, "--packed", "--batch", rows),
              "padded": make(flags, ".safetensors", *made, "--batch", 8)}
    packed = sides(flags, "train", [model, inputs["packed"], *seed])
    padded = sides(flags, "train", [model, inputs["padded"], *seed])
    both = {f"{name}, packed": side for name, side in packed.items() if is_ours(name)}
    both |= {f"{name}, padded": side for name, side in padded.items()}
    runs, left_out = in_turn(flags, both)
    for layout in inputs:  # each sees other batches, so only like is compared with like
        like = {name: found for name, found in runs.items() if name.endswith(layout)}
        left_out |= check_training(like, flags.dtype)
    runs = {name: found for name, found in runs.items() if name not in left_out}
    return result(flags, runs, left_out, count=flags.count, length=1024, rows=rows,
                  data=Path(flags.data).name)


def run_scaling(flags: argparse.Namespace) -> dict:
    """Our step in rows of other lengths, as many tokens in all."""
    model, each = checkpoint(flags), {}
    for length, spec in itertools.product(flags.lengths, flags.ours or ["plain"]):
        rows = max(1, flags.tokens // length)
        inputs = make(flags, ".safetensors", "batches", "--model", model, "--steps", flags.steps,
                      "--batch", rows, "--length", length, "--share", flags.share)
        each[f"minilora, {rows} × {length} tokens{label(spec)}"] = ours(
            flags, "train", spec, [model, inputs])
    runs, left_out = in_turn(flags, each)
    check_training(runs, flags.dtype, alike=False)
    return result(flags, runs, left_out, share=flags.share)


def run_feeding(flags: argparse.Namespace) -> dict:
    """Steps of the built-in model, fed from data caches of few conversations and of many.

    A first process fills each cache, others are measured.
    """
    flags.shape, rows, length, each = "nano", flags.batch or 4, 512, {}
    for count in flags.conversations:
        data = make(flags, ".jsonl", "synthetic", "--count", count)
        line = [sys.executable, HERE / "stream.py", data, "--steps", flags.steps, "--batch", rows,
                "--length", length, "--dtype", flags.dtype, "--device", flags.device]
        run("filling the cache", line, flags)
        each[f"minilora, {count:,} conversations"] = line
    return result(flags, *in_turn(flags, each), rows=rows, tokens=rows * length)


TECHNIQUES = ("onednn", "attention-by-blocks", "gathering", "gradient-in-forward", "columns",
              "lora-function", "norm-function", "kept-memory")  # in the words of without.py


def run_techniques(flags: argparse.Namespace) -> dict:
    """Our step, and with one technique taken out, which must compute the same."""
    flags.batch = flags.batch or 2
    runs, left_out = in_turn(flags, taken_out(flags, TECHNIQUES, "train", random_batches(flags)))
    check_training(runs, flags.dtype)
    return result(flags, runs, left_out, batch=flags.batch, length=flags.length, share=flags.share,
                  steps=flags.steps)


def run_decoding(flags: argparse.Namespace) -> dict:
    """The same for decoding."""
    batch = flags.batch or 1
    size = [checkpoint(flags), "--batch", batch, "--prompt", flags.prompt, "--new", flags.new]
    names = flags.without or ["onednn" if flags.dtype == "float32" else "one-row", "raw-logits"]
    runs, left_out = in_turn(flags, taken_out(flags, names, "generate", size))
    check_ids(runs, flags.dtype)
    return result(flags, runs, left_out, batch=batch, prompt=flags.prompt, new=flags.new)


def taken_out(flags: argparse.Namespace, names: Sequence[str], what: str,
              arguments: list) -> dict[str, list]:
    """Our command, and the same without each of some techniques."""
    whole = ours(flags, what, "plain", arguments)
    less = [sys.executable, HERE / "without.py"]
    return {"minilora": whole} | {f"minilora, without {name}": [*less, name, *whole[4:]]
                                  for name in names}


def run_profile(flags: argparse.Namespace) -> dict:
    """Where the time of a step of training goes, and of a step of decoding."""
    model, batch = checkpoint(flags), flags.batch or 2
    inputs = make(flags, ".safetensors", "batches", "--model", model, "--steps", 4, "--batch",
                  batch, "--length", flags.length, "--share", flags.share, "--packed")
    line = [sys.executable, HERE / "breakdown.py", "--dtype", flags.dtype, "--device", flags.device]
    runs, left_out = in_turn(flags, {
        "minilora, training": [*line, "train", model, inputs],
        "minilora, decoding": [*line, "generate", model]})
    return result(flags, runs, left_out, batch=batch, length=flags.length, share=flags.share)


RUN = {"train": run_train, "generate": run_generate, "load": run_files, "merge": run_files,
       "packing": run_packing, "scaling": run_scaling, "feeding": run_feeding,
       "techniques": run_techniques, "decoding": run_decoding, "profile": run_profile}


# --- inputs and processes -------------------------------------------------------------------------

def make(flags: argparse.Namespace, suffix: str, what: str, *settings: object) -> Path:
    """The path of an input, made unless the same was made before."""
    words = [str(word) for word in (what, *settings)]
    name = re.sub(r"[^\w.,]+", "-", " ".join(Path(word).name for word in words))
    path = flags.work / f"{name}{suffix}"
    if not path.exists():
        aside = path.with_name(f"making-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        finished(f"making {path.name}", [sys.executable, HERE / "make.py", what, aside,
                                         *words[1:]], flags)
        os.replace(aside, path)
    return path


def checkpoint(flags: argparse.Namespace) -> Path:
    return make(flags, "", "checkpoint", "--shape", flags.shape, "--dtype", flags.dtype,
                "--device", flags.device)


def sides(flags: argparse.Namespace, what: str, arguments: list) -> dict[str, list]:
    """The command of every side, by its name."""
    found = {f"minilora{label(spec)}": ours(flags, what, spec, arguments)
             for spec in flags.ours or ["plain"]}
    for spec in flags.peer or ["eager"]:
        if spec != "none":
            attention, *more = spec.split("+")
            found[f"transformers + peft{label(spec)}"] = [
                sys.executable, HERE / "peer.py", what, *arguments, "--dtype", flags.dtype,
                "--device", flags.device, "--attn", attention, *(f"--{word}" for word in more)]
    return found


def ours(flags: argparse.Namespace, what: str, spec: str, arguments: list) -> list:
    words = [f"--{word}" for word in spec.split("+") if word != "plain"]  # --recompute=all
    return [sys.executable, "-m", "minilora", "bench", what, *arguments, "--dtype", flags.dtype,
            "--device", flags.device, *words]


def label(spec: str) -> str:
    return "" if spec == "plain" else ", " + spec.replace("+", ", ")


def is_ours(name: str) -> bool:
    return name.startswith("minilora")


def in_turn(flags: argparse.Namespace, commands: dict[str, list],
            ) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """What every side printed in every round; every second round goes backwards.

    A side that fails (out of memory, not supported) is left out: the second value says why, by
    name. Raises Refused where no side of ours is left.
    """
    runs: dict[str, list[dict]] = {name: [] for name in commands}
    left_out, end = {}, time.monotonic() + flags.most
    for number in range(flags.rounds):
        if number and time.monotonic() > end:
            break
        order = list(runs)[::-1] if number % 2 else list(runs)
        for name in order:
            title = f"round {number + 1}, {name}"
            try:
                if not number and time.monotonic() > end:
                    raise Refused(f"{title}: no time was left")
                runs[name].append(run(title, commands[name], flags))
            except Refused as reason:
                left_out[name] = str(reason).removeprefix(f"{title}: ")
                print(f"left out: {reason}", file=sys.stderr)
                del runs[name]
    if not any(map(is_ours, runs)):
        raise Refused("no side of minilora is left")
    return runs, left_out


def run(title: str, command: list, flags: argparse.Namespace) -> dict:
    """The JSON line that a process prints last. Raises Refused where it fails."""
    lines = finished(title, command, flags).splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        raise Refused(f"{title}: printed no JSON line") from None


def finished(title: str, command: list, flags: argparse.Namespace) -> str:
    print(title, file=sys.stderr, flush=True)
    cache = {"MINILORA_CACHE": str(flags.work / "cache")}
    try:
        done = subprocess.run([str(word) for word in command], cwd=ROOT, text=True,
                              capture_output=True, timeout=flags.limit, env=os.environ | cache)
    except subprocess.TimeoutExpired:
        raise Refused(f"{title}: took more than {flags.limit:g} seconds") from None
    if done.returncode:
        last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise Refused(f"{title}: {last}")
    return done.stdout


# --- what counts ----------------------------------------------------------------------------------

def check_training(runs: dict[str, list[dict]], dtype: str, alike: bool = True) -> dict[str, str]:
    """Refuses ours where it does not compute what the first peer does; drops peers that do not.

    Takes the dropped out of `runs` and returns why, by name. Without a peer, or with `alike` off
    (each side has batches of its own), only what each says of itself is checked.
    """
    first = next((name for name in runs if not is_ours(name)), next(iter(runs)))
    reference, left_out = runs[first][0], {}
    for name, found in list(runs.items()):
        problem = next(filter(None, (training_problem(
            one, reference if alike else one, dtype) for one in found)), None)
        if problem and (is_ours(name) or name == first):
            raise Refused(f"{name}: {problem}")
        if problem:
            left_out[name] = problem
            print(f"left out: {name}: {problem}", file=sys.stderr)
            del runs[name]
    return left_out


def training_problem(one: dict, reference: dict, dtype: str) -> str | None:
    """Why a run of training does not count, if it does not."""
    loss_bar, norm_bar = BARS[dtype]
    norms, losses = one["grad_norms"], one["losses"]
    if len(losses) != len(reference["losses"]):
        return f"{len(losses)} steps, not {len(reference['losses'])}"
    if not all(map(math.isfinite, losses)):
        return f"losses are not all finite: {losses}"
    if not all(math.isfinite(norm) and norm > 0 for norm in norms):
        return f"gradient norms are not all positive and finite: {norms}"
    for step, (a, b) in enumerate(zip(losses, reference["losses"], strict=True), 1):
        if not abs(a - b) <= loss_bar:
            return f"loss {a:g} at step {step}, the peer's {b:g}; {loss_bar:g} apart is allowed"
    for step, (a, b) in enumerate(zip(norms, reference["grad_norms"], strict=True), 1):
        if not abs(a - b) <= norm_bar * b:
            return (f"gradient norm {a:g} at step {step}, the peer's {b:g}; {norm_bar:g} of it is "
                    "allowed")
    if not one.get("base_unchanged", True):
        return "the base's bytes changed"
    if not one.get("adapters_changed", True):
        return "the adapters did not change"
    return None


def check_ids(runs: dict[str, list[dict]], dtype: str) -> dict[str, str]:
    """The same for decoding: in float32 all ids must be the first peer's.

    In bfloat16 the two likeliest ids are often closer than a rounding, so ids part after a while;
    there every row must still have as many.
    """
    first = next((name for name in runs if not is_ours(name)), next(iter(runs)))
    reference, left_out = rows_of(runs[first][0]), {}
    for name, found in list(runs.items()):
        for rows in map(rows_of, found):
            problem = None
            if [len(row) for row in rows] != [len(row) for row in reference]:
                problem = f"{len(rows)} rows of {len(rows[0])} ids"
            elif dtype == "float32" and rows != reference:
                row = next(n for n, (a, b) in enumerate(zip(rows, reference, strict=True))
                           if a != b)
                at = next(n for n, (a, b) in enumerate(zip(rows[row], reference[row], strict=True))
                          if a != b)
                problem = f"row {row + 1} has another id than the peer from token {at + 1} on"
            if problem and is_ours(name):
                raise Refused(f"{name}: {problem}")
            if problem:
                left_out[name] = problem
        if name in left_out:
            print(f"left out: {name}: {left_out[name]}", file=sys.stderr)
            del runs[name]
    return left_out


def rows_of(one: dict) -> list[list[int]]:
    return [one["ids"], *one["other_ids"]]


# --- results --------------------------------------------------------------------------------------

def result(flags: argparse.Namespace, runs: dict[str, list[dict]], left_out: dict[str, str],
           **settings: object) -> dict:
    """What is kept: figures of every round, the first round's losses and norms, the machine."""
    device = next(iter(runs.values()))[0].get("device", "cpu")
    made = {}
    for name, found in runs.items():
        kept = ("losses", "grad_norms", "shares", "products")
        made[name] = {key: [figure(key, one[key]) for one in found] for key in found[0]
                      if is_number(figure(key, found[0][key]))}
        made[name] |= {key: found[0][key] for key in kept if key in found[0]}
    return {"job": flags.job, "shape": flags.shape, "dtype": flags.dtype,
            "device": processor() if device == "cpu" else device, "cores": cores(),
            "versions": {"python": platform.python_version()} | {
                name: importlib.metadata.version(name) for name in PACKAGES if installed(name)},
            "settings": settings, "sides": made, "left_out": left_out}


def figure(key: str, value: object) -> object:
    """A value as it is; the seconds of a process's own rounds as their median."""
    if isinstance(value, list) and key.endswith("_seconds"):
        return round(statistics.median(value), 4)
    return value


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def processor() -> str:
    """The processor's name, as Linux tells it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return found[1].strip() if found else platform.machine()


def cores() -> int:
    """Processor cores that PyTorch takes."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(os.environ.get("OMP_NUM_THREADS") or mine)


def file_name(found: dict) -> str:
    settings = found["settings"]
    size = [f"{key[0]}{settings[key]}" for key in ("batch", "prompt", "length", "share")
            if key in settings]
    words = [found["job"], found["shape"], found["dtype"], *size,
             *["packed"][:settings.get("packed", False)], found["device"]]
    return re.sub(r"[^\w.]+", "-", " ".join(words)).strip("-").lower()


def read_results(folder: Path) -> list[dict]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SystemExit(f"{folder}: no results there; run a job first")
    results = []
    for found in (json.loads(path.read_text()) for path in files):
        results += found if isinstance(found, list) else [found]
    return sorted(results, key=lambda found: JOBS.index(found["job"]))


# --- the table ------------------------------------------------------------------------------------

# Of each job the figure that is compared, its unit, and whether more of it is better.
FIGURES = {
    "train": ("tokens_per_second", "tokens/s", True),
    "generate": ("decode_tokens_per_second", "tokens/s", True),
    "load": ("load_seconds", "s", False),
    "merge": ("export_seconds", "s", False),
    "packing": ("trained_per_second", "trained tokens/s", True),
    "scaling": ("step_seconds", "s a step", False),
    "feeding": ("step_seconds", "s a step", False),
    "techniques": ("tokens_per_second", "tokens/s", True),
    "decoding": ("decode_tokens_per_second", "tokens/s", True),
    "profile": ("step_seconds", "s a step", False),
}


def table(results: list[dict]) -> str:
    """Markdown: a table for each machine, a line for each side of ours."""
    parts = []
    for machine, group in itertools.groupby(sorted(results, key=machine_of), machine_of):
        lines = [f"On {machine}:", "",
                 "| what | minilora | other | times as fast | peak memory | |",
                 "| --- | --- | --- | --- | --- | --- |"]
        for found in group:
            lines += [f"| {' | '.join(line)} |" for line in lines_of(found)]
            lines += [f"| {described(found)}, {name} | left out: {reason} | | | | |"
                      for name, reason in found["left_out"].items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def machine_of(found: dict) -> str:
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in
                         ("torch", "transformers", "peft") if name in found["versions"])
    return f"{found['device']}, {found['cores']} cores, {versions}"


def lines_of(found: dict) -> list[list[str]]:
    """The table's lines of one result, the cells of each."""
    mine = [name for name in found["sides"] if is_ours(name)]
    peer = best([name for name in found["sides"] if not is_ours(name)], found)
    if found["job"] == "packing":
        padded = best([name for name in mine if name.endswith("padded")], found)
        return [cells(found, name, other) for name in mine if name != padded
                for other in (padded, peer) if other]
    if found["job"] in ("techniques", "decoding"):
        return [cells(found, mine[0], name) for name in mine[1:]]
    if found["job"] in ("scaling", "feeding"):  # each beside the first
        return [cells(found, name, mine[0]) for name in mine]
    return [cells(found, name, peer) for name in mine]


def best(names: list[str], found: dict) -> str | None:
    """The side whose figure is the best."""
    key, _, more = FIGURES[found["job"]]
    return max(names, default=None, key=lambda name: (
        statistics.median(found["sides"][name][key]) * (1 if more else -1)))


def cells(found: dict, name: str, other: str | None) -> list[str]:
    key, unit, more = FIGURES[found["job"]]
    side = found["sides"][name]
    line = [described(found) + name.removeprefix("minilora"),
            f"{shown(statistics.median(side[key]))} {unit}", "", "", f"{shown(peak(side))} GB"]
    if other and other != name:
        beside = found["sides"][other]
        short = re.sub("^transformers [+] peft, |^minilora, (?=without )", "", other)
        line[2] = f"{shown(statistics.median(beside[key]))} ({short})"
        ratios = [a / b if more else b / a for a, b in zip(side[key], beside[key], strict=True)]
        line[3] = f"{shown(statistics.median(ratios))} ({shown(min(ratios))}–{shown(max(ratios))})"
        line[4] += f", {shown(peak(side) / peak(beside))} of {shown(peak(beside))}"
    return [*line, remark(side)]


def described(found: dict) -> str:
    settings = found["settings"]
    share = f"{settings.get('share', 0):.0%} trained"
    return {
        "train": "{batch} × {length} tokens, " + share + ", packed" * settings.get("packed", False),
        "generate": "decode {new} after {prompt}, batch {batch}",
        "packing": "{count} conversations of {data}",
        "scaling": "a step, " + share,
        "feeding": "a step of {tokens} tokens",
        "techniques": "{batch} × {length} tokens, " + share,
        "decoding": "decode {new} after {prompt}, batch {batch}",
        "profile": "{batch} × {length} tokens, " + share,
    }.get(found["job"], found["job"]).format(**settings) + f", {found['shape']}, {found['dtype']}"


def remark(side: dict) -> str:
    """What else is worth a place: shares of what the machine allows."""
    middle = {key: statistics.median(value) for key, value in side.items()
              if key in ("share_of_bound", "ratio", "host_over_weights", "prefill_seconds")}
    parts = [f"{name} {share:.0%}" for name, share in side.get("shares", {}).items()]
    if "share_of_bound" in middle:
        parts += [f"{middle['share_of_bound']:.0%} of what memory allows",
                  f"prefill {shown(middle['prefill_seconds'])} s"]
    if "ratio" in middle:
        against = "reading" if "read_seconds" in side else "copying"
        parts.append(f"{shown(middle['ratio'])} × {against} the files")
    if "host_over_weights" in middle:
        parts.append(f"host peak {shown(middle['host_over_weights'])} × the weights")
    return ", ".join(parts)


def peak(side: dict) -> float:
    """The most memory of any round, in GiB: the GPU's where there is one."""
    return max(side.get("peak_device_gb", side["peak_host_gb"]))


def shown(number: float) -> str:
    """Three digits: 0.456, 12.3, 1,234."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    main()
