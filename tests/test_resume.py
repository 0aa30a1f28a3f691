"""A run that is stopped goes on as if it had not been, and notices what has changed meanwhile; and
what a run does when its numbers or its memory give out. All by train.py, as a user runs it.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NANO
from safetensors.torch import load_file, save_file
from test_checkpoint import write_base
from test_cli import ROOT, interrupted_at, one_line, program

import minilora.trainer as trainer
from minilora.__main__ import main as minilora
from minilora.config import UserError
from minilora.report import read_metrics, run_command
from minilora.state import FREE, latest_state
from minilora.tokenizer import Tokenizer
from minilora.trainer import IN_A_ROW
from minilora.weights import load_model

WORDS = "what is the weather in Paris London set timer find book price of a".split()


def row(number: int) -> dict:
    """A conversation of 20 to 60 tokens; every third has a second exchange."""
    rng = random.Random(number)
    text = [" ".join(rng.choices(WORDS, k=rng.randint(2, 7))) for _ in range(4)]
    said = [{"role": ("user", "assistant")[place % 2], "content": each}
            for place, each in enumerate(text if number % 3 == 0 else text[:2])]
    return {"messages": said}


def write(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(each) + "\n" for each in rows))


@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    """A folder with a base of random weights and two files of data; runs train.py in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    write_base(tmp_path / "base", num_hidden_layers=2)
    write("a.jsonl", [row(n) for n in range(9)])
    write("b.jsonl", [row(n) for n in range(20, 25)])

    def run(*words: str, main=None) -> tuple[int, str]:
        """(status, stderr) of train.py, or of another program."""
        handler = signal.getsignal(signal.SIGINT)
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        capfd.readouterr()
        try:
            status = run_command(main or program("train"))
        finally:
            signal.signal(signal.SIGINT, handler)
        return status, capfd.readouterr().err

    return run


RECIPE = ("--model base --data a.jsonl,b.jsonl@0.5 --length 96 --batch 2 --rank 2 --lr 1e-2 "
          "--eval-share 0.15").split()
TIMES = {"seconds", "train_seconds", "tokens_per_second", "peak_bytes"}  # differ by nature


def left(run: str) -> dict:
    """All that a run has left behind and that must be the same, whatever stopped it."""
    folder = Path(run)
    state = latest_state(folder / "checkpoints")
    progress = json.loads((state / "state.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    return {
        "metrics": [{key: value for key, value in record.items() if key not in TIMES}
                    for record in read_metrics(folder / "metrics.jsonl")],
        "result": {key: value for key, value in result.items() if key not in TIMES | {"out"}},
        "adapter": (folder / "adapter/adapter_model.safetensors").read_bytes(),
        "state": (state / "state.safetensors").read_bytes(),  # moments, random states
        "progress": {**progress, "progress": {key: value for key, value
                                              in progress["progress"].items() if key not in TIMES}},
    }


@contextlib.contextmanager
def killed_at(batch: int, monkeypatch):
    """Ends train.py in the middle of a step, before the loss of that batch: nothing is saved."""
    real, seen = trainer.batch_loss, []

    def counted(*arguments):
        seen.append(1)
        if len(seen) == batch:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "batch_loss", counted)
        yield


# --- stopped and resumed --------------------------------------------------------------------------

def some_recipe(rng: random.Random) -> list[str]:
    def draw(*choices: str) -> str:
        return rng.choice(choices)

    words = [draw("--dropout 0.3", "--dropout 0.1 --dora", "--init pissa --dropout 0.2",
                  "--rslora", "--dora --lr-ratio 4"),
             f"--accumulate {rng.randint(1, 3)} --steps {rng.randint(5, 8)} --seed {rng.random()}"
             .partition(".")[0], draw("--pack", "--no-pack"),
             draw("--schedule cosine", "--schedule linear --warmup 0.4"),
             draw("--new-tokens append", "--new-tokens reserved"), draw("--recompute all", ""),
             f"--eval-every {rng.randint(1, 3)} --weight-decay 0.1",
             f"--save-every {rng.randint(1, 3)}"]
    return " ".join(words).split()


def test_stopped_anywhere_and_resumed_is_never_stopped_bit_for_bit(here, monkeypatch, cases, tried):
    """Metrics, result, adapter, moments and random states: over epochs, in the middle of one, in
    the middle of a step of several batches; by Ctrl-C or killed; twice; with the cache of the data
    as it was, deleted, or out of order.
    """
    stops = 0
    for seed in range(cases(3, 40)):
        rng = random.Random(seed)
        recipe = [*RECIPE, *some_recipe(rng)]
        for run in ("whole", "parts"):
            shutil.rmtree(run, ignore_errors=True)
        status, error = here(*recipe, "--out", "whole")
        assert status == 0, error
        steps = json.loads(Path("whole/result.json").read_text())["steps"]
        words = [*recipe, "--out", "parts"]
        for _ in range(2):
            if rng.random() < 0.5:
                with interrupted_at(rng.randint(1, 3), monkeypatch):
                    status, error = here(*words)
                assert status == 0 and ("go on with" in error or
                                        (Path("parts") / "result.json").exists()), error
            else:
                with killed_at(rng.randint(4, 3 * steps), monkeypatch):
                    status, error = here(*words)
                assert status in (0, 130), error
            stops += 1
            words = ["--resume", "parts"]
            cache = rng.choice(["there", "deleted", "damaged"])
            if cache == "deleted":
                shutil.rmtree("cache")
            elif cache == "damaged":
                for path in Path("cache").glob("*/ids"):
                    path.write_bytes(b"")
        status, error = here("--resume", "parts")
        assert status == 0, error
        whole, parts = left("whole"), left("parts")
        for what in whole:
            assert whole[what] == parts[what], f"{what}, seed {seed}: {' '.join(recipe)}"
        assert len(whole["metrics"]) == steps
    tried("runs stopped and resumed, bit for bit", stops)


def test_the_best_look_is_kept_through_a_stop(here, monkeypatch):
    recipe = [*RECIPE, *"--steps 4 --eval-every 1".split()]

    def best(run: str) -> tuple[float, int]:
        result = json.loads(Path(run, "result.json").read_text())
        return result["best_held_out_loss"], result["best_step"]

    for run in ("whole", "better"):
        with interrupted_at(3, monkeypatch):
            assert here(*recipe, "--out", run)[0] == 0
    state = latest_state("better/checkpoints") / "state.json"
    kept = json.loads(state.read_text())
    kept["progress"] |= {"best_held_out_loss": 0.0, "best_step": 2}  # as no later step can have it
    state.write_text(json.dumps(kept))
    for run in ("whole", "better"):
        assert here("--resume", run)[0] == 0
    assert best("whole") == min((record["held_out_loss"], record["step"])
                                for record in read_metrics(Path("whole/metrics.jsonl")))
    assert best("better") == (0.0, 2)


def test_with_other_threads_the_data_comes_in_the_same_order(here, monkeypatch):
    """Sums may round otherwise then; which conversations are in which step is the same."""
    recipe = [*RECIPE, *"--steps 2 --dropout 0.1".split()]
    assert here(*recipe, "--out", "whole")[0] == 0
    with interrupted_at(1, monkeypatch):
        assert here(*recipe, "--out", "parts")[0] == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert here("--resume", "parts", "--device", "cpu")[0] == 0
    finally:
        torch.set_num_threads(threads)
    whole, parts = (read_metrics(Path(run) / "metrics.jsonl") for run in ("whole", "parts"))
    assert len(whole) == len(parts) == 2
    for one, other in zip(whole, parts, strict=True):
        assert (one["tokens"], one["trained"]) == (other["tokens"], other["trained"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


# --- what has changed -----------------------------------------------------------------------------

CHANGES = {  # of config.json: another value of each, and how it is told
    "rank": (4, "rank is 4 and was 2"), "alpha": (8.0, "alpha is 8.0 and was 32.0"),
    "lr": (0.5, "lr is 0.5 and was 0.01"), "seed": (1, "seed is 1 and was 0"),
    "batch": (3, "batch"), "accumulate": (3, "accumulate"), "length": (80, "length"),
    "pack": (False, "pack is False and was True"), "dropout": (0.5, "dropout"),
    "targets": (["q_proj"], "targets"), "rslora": (True, "rslora"), "dora": (True, "dora"),
    "init": ("pissa", "init"), "rank_pattern": (["q_proj=3"], "rank_pattern"),
    "alpha_pattern": (["q_proj=3"], "alpha_pattern"), "layers": (["0"], "layers"),
    "lr_ratio": (2.0, "lr_ratio"), "schedule": ("linear", "schedule"), "warmup": (0.5, "warmup"),
    "weight_decay": (0.5, "weight_decay"), "clip": (0.5, "clip"),
    "dtype": ("bfloat16", "dtype is bfloat16 and was float32"),
    "train_on": ("answer", "train_on"), "dialect": ("mistral", "dialect"),
    "new_tokens": ("reserved", "new_tokens"), "eval_share": (0.3, "eval_share"),
}


@pytest.fixture
def stopped(here):
    """`here`, with a run of two steps in `run`."""
    assert here(*RECIPE, "--steps", "2", "--out", "run")[0] == 0
    return here


def kept() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()
            and path.name != "config.json"}


def test_a_changed_recipe_is_noticed_and_named(stopped):
    path = Path("run/config.json")
    text = path.read_text()
    settings, before = json.loads(text), kept()
    assert settings.keys() == CHANGES.keys() | FREE  # each setting is checked, or free
    for key, (value, told) in CHANGES.items():
        assert settings[key] != value
        path.write_text(json.dumps({**settings, key: value}))
        status, error = stopped("--resume", "run")
        line = error.strip().splitlines()[-1]
        assert status == 2 and line.startswith("error: run/config.json: ") and told in line, error
        assert "put that back" in line and "--config run/config.json --out NEW" in line
    assert kept() == before
    path.write_text(text)
    assert stopped("--resume", "run")[0] == 0


def test_changed_data_is_noticed_and_named(stopped):
    rows = [row(n) for n in range(9)]
    edited = row(3)
    edited["messages"][1]["content"] += "!"
    untrained = row(3)
    untrained["messages"][1]["weight"] = 0
    before = kept()
    for new, told in [
            ([*rows, row(99)], "a.jsonl has more conversations than it had, 10 instead of 9"),
            (rows[1:], "a.jsonl has fewer conversations than it had, 8 instead of 9"),
            ([rows[1], rows[0], *rows[2:]], "a.jsonl has its conversations in another order"),
            ([*rows[:3], edited, *rows[4:]], "a.jsonl has conversations that were edited"),
            ([*rows[:3], untrained, *rows[4:]], "which messages carry loss")]:
        write("a.jsonl", new)
        status, error = stopped("--resume", "run")
        line = error.strip().splitlines()[-1]
        assert status == 2 and told in line and "put that back" in line, error
        assert kept() == before
    write("a.jsonl", rows)
    for data, told in [("a.jsonl,b.jsonl@0.5,c.jsonl", "c.jsonl is new"),
                       ("a.jsonl", "b.jsonl is gone"), ("a.jsonl,b.jsonl", "weights"),
                       ("b.jsonl@0.5,a.jsonl", "b.jsonl has fewer conversations")]:
        write("c.jsonl", rows)
        status, error = stopped("--resume", "run", "--data", data)
        assert status == 2 and told in error, error
    Path("a.jsonl").rename("moved.jsonl")
    status, error = stopped("--resume", "run")
    assert status == 2 and "a.jsonl: no such file" in error
    assert kept() == before
    # The same conversations elsewhere, with other spaces, are the same data.
    write("moved.jsonl", rows)
    Path("moved.jsonl").write_text(Path("moved.jsonl").read_text().replace('": ', '" : '))
    assert stopped("--resume", "run", "--data", "moved.jsonl,b.jsonl@0.5", "--steps", "3")[0] == 0
    assert stopped("--resume", "run")[0] == 0  # and is remembered


def test_changed_held_out_data_is_noticed(here):
    assert here(*RECIPE[:-2], "--eval-data", "b.jsonl", "--steps", "1", "--out", "run")[0] == 0
    write("b.jsonl", [row(n) for n in range(19, 25)])
    status, error = here("--resume", "run")
    assert status == 2 and "b.jsonl has more conversations" in error


def test_a_changed_base_and_tokenizer_are_noticed(stopped):
    before = kept()
    weights = Path("base/model.safetensors")
    bytes_ = weights.read_bytes()
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.01
    save_file(tensors, weights, metadata={"format": "pt"})
    status, error = stopped("--resume", "run")
    assert status == 2 and "another base" in error and "--model" in error
    weights.write_bytes(bytes_)
    shutil.copytree("base", "elsewhere")
    path = Path("base/tokenizer.model")
    path.write_bytes(path.read_bytes().replace(b"eather", b"eathex"))
    status, error = stopped("--resume", "run")
    line = error.strip().splitlines()[-1]
    assert status == 2 and "tokenizer is not the one that it was" in line and "put that" in line
    assert kept() == before
    assert stopped("--resume", "run", "--model", "elsewhere")[0] == 0  # moved, and the same


def test_what_a_resumed_run_may_change(stopped):
    """How far it goes, above all: a run that has ended gets more steps."""
    assert stopped("--resume", "run", "--steps", "4", "--eval-every", "3", "--save-every", "1",
                   "--recompute", "all", "--compile", "off")[0] == 0
    records = read_metrics(Path("run/metrics.jsonl"))
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["step"] for record in records[2:] if "held_out_loss" in record] == [3, 4]
    status, error = stopped("--resume", "run", "--steps", "5")
    assert status == 0 and "resumed at step 4 of 5, where it was 4" in error
    status, error = stopped("--resume", "run", "--steps", "3")
    one_line(status, error.strip().splitlines()[-1], "has done 5 steps already", "3")
    for words in (["--lr", "1"], ["--out", "other"], ["--config", "run/config.json"]):
        status, error = stopped("--resume", "run", *words)
        one_line(status, error, f"leave out {words[0]}")


@pytest.mark.parametrize("wrong", ["x", {}, None, ...], ids=["text", "object", "null", "none"])
def test_a_checkpoint_that_does_not_go_with_itself_is_refused(stopped, wrong):
    """Whichever of the things that the run keeps there is of another kind, or not there."""
    path = latest_state("run/checkpoints") / "state.json"
    whole = json.loads(path.read_text())
    assert len(whole["progress"]) == 11
    for key, value in whole["progress"].items():
        damaged = {name: wrong if name == key else value
                   for name, value in whole["progress"].items() if name != key or wrong is not ...}
        if wrong is None and key.startswith(("best", "before", "no_tool")):
            continue  # not known yet
        path.write_text(json.dumps(whole | {"progress": damaged}))
        status, error = stopped("--resume", "run", "--steps", "3")
        one_line(status, error.strip().splitlines()[-1], "state.json", "does not go with itself")


def test_a_checkpoint_with_another_bit_is_refused(stopped):
    path = latest_state("run/checkpoints") / "state.safetensors"
    whole = path.read_bytes()
    for at in (len(whole) - 5, len(whole) - 4001):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1:])
        status, error = stopped("--resume", "run", "--steps", "3")
        one_line(status, error.strip().splitlines()[-1], "state.safetensors: has other bytes",
                 "delete run/checkpoints/step-000002 to go on from the one before")
    path.write_bytes(whole)
    assert stopped("--resume", "run", "--steps", "3")[0] == 0


def test_a_run_is_not_written_among_its_data(here):
    Path("data").mkdir()
    shutil.copy("a.jsonl", "data")
    for data, out in (("data", "data"), ("b.jsonl,data/**/*.jsonl", "data/run")):
        status, error = here(*RECIPE, "--data", data, "--steps", "1", "--out", out)
        one_line(status, error, f"--out {out}: what the run writes there would be read as data")
    status, error = here(*RECIPE, "--eval-data", "data/*/*.json", "--out", "data/run")
    one_line(status, error, "which is data/*/*.json")
    assert [path.name for path in Path("data").iterdir()] == ["a.jsonl"]


def test_a_folder_that_was_there_stays_there(here):
    Path("mine").mkdir()
    for out in ("mine", "new"):
        one_line(*here(*RECIPE, "--data", "none.jsonl", "--out", out), "none.jsonl: no such file")
    assert Path("mine").is_dir() and not Path("new").exists()


def test_the_end_of_a_job_is_a_stop(here, monkeypatch):
    """SIGTERM, as Slurm and Docker send it: the step is finished and saved."""
    with interrupted_at(2, monkeypatch, signal.SIGTERM):
        status, error = here(*RECIPE, "--steps", "4", "--out", "run")
    assert status == 0 and "stopped after step 2 of 4" in error
    assert latest_state("run/checkpoints").name == "step-000002"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# --- numbers that go wrong ------------------------------------------------------------------------

def poison(base: str = "base") -> None:
    """Makes the base unable to bear one byte, of é: times √D its row is infinite where it is read,
    while the soft-cap bears it where the id is one of the logits.
    """
    ids = set(Tokenizer.load(base).encode("é")) - set(Tokenizer.load(base).encode("è"))
    path = Path(base, "model.safetensors")
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][ids.pop(), 0] = torch.finfo(torch.float32).max
    save_file(tensors, path, metadata={"format": "pt"})


def with_accent(number: int) -> dict:
    bad = row(number)
    bad["messages"][0]["content"] += " é"
    return bad


POISONED = ("--model base --data a.jsonl --eval-data b.jsonl --length 96 --rank 2 --lr 1e-2 "
            "--batch 2 --accumulate 2 --dropout 0.2 --no-pack --steps 9 --save-every 2").split()


def test_a_conversation_that_breaks_the_numbers_is_left_out_and_named(here, monkeypatch):
    """The others train on; stopped and resumed it is all the same."""
    poison()
    write("a.jsonl", [*(row(n) for n in range(5)), with_accent(5), *(row(n) for n in range(6, 9))])
    status, error = here(*POISONED, "--out", "whole")
    assert status == 0, error
    records = read_metrics(Path("whole/metrics.jsonl"))
    bad = [record for record in records if "not_applied" in record]
    assert len(records) == 9 and 1 < len(bad) < 5  # once an epoch
    for record in bad:
        assert record["alone"] == ["a.jsonl:6 (row 6)"] and "loss" not in record
        assert record["not_applied"] == "loss nan, gradient norm nan"
        (number,) = record["batches"]
        assert f"step {record['step']} is not applied: loss nan, gradient norm nan; batch " \
               f"{number}: a.jsonl:6 (row 6)\n" in error
        assert len(record["rows"]) <= 2 and "a.jsonl:6 (row 6)" in record["rows"]
    result = json.loads(Path("whole/result.json").read_text())
    assert result["left_out_steps"] == len(bad)
    assert all(tensor.isfinite().all() for tensor in load_file(
        "whole/adapter/adapter_model.safetensors").values())
    with interrupted_at(bad[0]["step"], monkeypatch):  # stopped in a step that is not applied
        assert here(*POISONED, "--out", "parts")[0] == 0
    assert here("--resume", "parts")[0] == 0
    assert left("whole") == left("parts")


@pytest.mark.parametrize("every", ["a row", "all"])
def test_too_many_such_steps_stop_the_run_at_a_good_checkpoint(here, monkeypatch, every):
    """After `IN_A_ROW` in a row, counted through a stop; or after `IN_ALL` in all."""
    monkeypatch.setattr(trainer, "IN_ALL", 3)
    poison()
    bad = every == "a row"
    write("a.jsonl", [with_accent(n) if bad or n == 2 else row(n) for n in range(3)])
    recipe = [*"--model base --data a.jsonl --length 96 --rank 2 --batch 1 --eval-data b.jsonl "
              "--no-pack --epochs 20 --out run".split()]
    if bad:
        with interrupted_at(2, monkeypatch):
            assert here(*recipe)[0] == 0
        monkeypatch.setattr(trainer, "IN_ALL", 50)
        recipe = ["--resume", "run"]
    status, error = here(*recipe)
    records = read_metrics(Path("run/metrics.jsonl"))
    wrong = [record["step"] for record in records if "not_applied" in record]
    saved = latest_state("run/checkpoints")
    assert len(wrong) == (IN_A_ROW if bad else 3) and wrong[-1] == records[-1]["step"]
    assert saved.name == f"step-{wrong[-1]:06}"
    good = 0 if bad else wrong[-1] - 1
    line = error.strip().splitlines()[-1]
    one_line(status, line, f"{len(wrong)} steps in {every}", "metrics.jsonl", str(saved),
             f"the weights of step {good}", "--resume run")
    tensors = load_file(saved / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    status, error = here("--resume", "run")  # goes on, as many steps more
    assert f"resumed at step {wrong[-1]} of" in error
    more = read_metrics(Path("run/metrics.jsonl"))
    assert more[:len(records)] == records and len(more) > len(records)


def test_a_run_of_which_no_step_was_applied_has_failed(here):
    poison()
    write("a.jsonl", [with_accent(0)])
    status, error = here(*POISONED[:-4], "--steps", "2", "--out", "run")
    one_line(status, error.strip().splitlines()[-1], "2 steps in all", "the weights of step 0")


def test_held_out_numbers_that_go_wrong_are_named(here):
    poison()
    write("b.jsonl", [row(1), with_accent(2)])
    status, error = here(*POISONED[:-4], "--steps", "2", "--out", "run")
    assert status == 0 and "held-out loss is not finite: b.jsonl:2 (row 2)\n" in error
    for record in read_metrics(Path("run/metrics.jsonl")):
        assert record["held_out_rows"] == ["b.jsonl:2 (row 2)"] and "held_out_loss" not in record
    result = json.loads(Path("run/result.json").read_text())
    assert result["best_held_out_loss"] is result["best_step"] is None
    for line in Path("run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN, which is no JSON


# --- memory ---------------------------------------------------------------------------------------

TOO_LITTLE = """
import resource, sys
sys.path.insert(0, {root!r})
import train
from minilora.report import run_command
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 300 * 2**20,) * 2)
raise SystemExit(run_command(train.main))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_out_of_memory_for_real_is_one_line_with_numbers(tmp_path):
    """By a limit of the system's on the process, which a step of 16 rows exceeds."""
    with open(NANO / "train.jsonl", encoding="utf-8") as lines:
        (tmp_path / "calls.jsonl").write_text("".join(line for line, _ in zip(
            lines, range(40), strict=False)))
    done = subprocess.run(
        [sys.executable, "-c", TOO_LITTLE.format(root=str(ROOT)), "--data", "calls.jsonl",
         *"--batch 16 --length 800 --steps 2 --out run".split()], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = done.stderr.strip().splitlines()
    one_line(done.returncode, lines[-1], "out of memory on cpu", "the run held",
             "--batch 16 --length 800 --recompute none", "--batch 8 --accumulate 2 (the same step)")
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
                 " memory: you tried to allocate 2147483648 bytes. Error code 12"),
    MemoryError()])
def test_out_of_memory_says_what_helps_best_first(here, monkeypatch, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "batch_loss", fail)
        status, text = here(*RECIPE, "--batch", "6", "--steps", "2", "--out", "run")
    line = text.strip().splitlines()[-1]
    asked = "" if isinstance(error, MemoryError) else ", and asked for 2.15 GB more"
    assert status == 2 and re.sub(r"[\d.]+ [kMG]B(?! more)", "N", line) == (
        f"error: out of memory on cpu: the run held N at most of N{asked}; weights and activations "
        "at --batch 6 --length 96 --recompute none take about N; what helps, best first: --batch 3 "
        "--accumulate 2 (the same step): about N, --length 48: about N, --recompute cheap: about N,"
        " --recompute all: about N, --dtype bfloat16: about N")
    sizes = [float(each) * {"k": 1e3, "M": 1e6, "G": 1e9}[unit] for each, unit in
             re.findall(r"about ([\d.]+) ([kMG])B", line)]
    assert all(size < sizes[0] for size in sizes[1:]) and sizes[3] > sizes[4]

    with monkeypatch.context() as patch:  # a resumed run may change less, and says only that
        patch.setattr(trainer, "batch_loss", fail)
        status, text = here("--resume", "run")
    line = text.strip().splitlines()[-1]
    assert "--recompute all" in line and "--length 48" not in line and "bfloat16" not in line


def test_another_error_is_not_taken_for_memory(here, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(trainer, "batch_loss", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        here(*RECIPE, "--steps", "2", "--out", "run")


# --- float16 --------------------------------------------------------------------------------------

def test_float16_is_refused_by_every_command_that_has_a_dtype(here):
    for line in ("train.py", "infer.py hello", "validate a.jsonl", "eval --data a.jsonl",
                 "merge --adapter a --out b", "bench train base c", "bench generate base",
                 "bench load base", "bench merge base"):
        name, *words = line.split()
        if name.endswith(".py"):
            main = program(name.removesuffix(".py"))
        else:
            main, words = minilora, [name, *words]
        for dtype in ("float16", "fp16"):
            status, error = here(*words, "--dtype", dtype, main=main)
            one_line(status, error, f"dtype is '{dtype}'", "auto, float32, bfloat16", "65504")


def test_float16_is_refused_wherever_it_may_be_asked_for_and_read_wherever_it_lies(here):
    Path("settings.json").write_text('{"dtype": "float16"}')
    one_line(*here("--config", "settings.json"), "dtype is 'float16'", "bfloat16")
    with pytest.raises(UserError, match="dtype is 'float16'"):
        load_model("base", dtype=torch.float16)
    tensors = {name: tensor.half() for name, tensor in load_file("base/model.safetensors").items()}
    save_file(tensors, "base/model.safetensors", metadata={"format": "pt"})
    assert here(*RECIPE, "--steps", "1", "--out", "run")[0] == 0
    assert load_model("base", torch.float32).norm.weight.equal(tensors["model.norm.weight"].float())
