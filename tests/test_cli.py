"""The commands as a user runs them: those of the README, word for word, and a user's mistakes.

Training is cut to a few steps by flags at the end of the line; all else is what the README says.
"""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NANO
from safetensors.torch import load_file, save_file
from test_hub import FakeHub

from minilora import hub
from minilora.__main__ import main as minilora
from minilora.nano import learning
from minilora.report import read_metrics, run_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for language, block in FENCES if language == "bash"
            for line in block.replace("\\\n", " ").splitlines() if line.strip()]
TOOLS = next(block for language, block in FENCES if language == "python" and "def " in block)


def program(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """Runs a command line in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGINT)

    def run(line: str) -> tuple[int, str, str]:
        words = shlex.split(line)
        assert words.pop(0) == "python"
        if words[0] == "-m":
            assert words[1] == "minilora"
            main, words = minilora, words[1:]
        else:
            main = program(words[0].removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", words)
        capfd.readouterr()
        try:
            status = run_command(main)
        except SystemExit as leave:  # argparse
            status = leave.code or 0
        finally:
            signal.signal(signal.SIGINT, handler)
        return status, *capfd.readouterr()

    return run


def rows(count: int) -> list[dict]:
    """Rows of the data that ships, in OpenAI's layout; the first of them with a call."""
    with open(NANO / "train.jsonl", encoding="utf-8") as file:
        chosen = [json.loads(line) for line, _ in zip(file, range(100), strict=False)]
    return sorted(chosen, key=lambda row: "tool_calls" not in row["messages"][1])[:count]


@pytest.mark.parametrize("line, of", [
    ("train.py --recompute most", "--recompute: invalid choice: 'most'"),
    ("train.py --steps many", "--steps: invalid int value: 'many'"),
    ("train.py --stepps 3", "--stepps 3"),
    ("infer.py --top-k few", "--top-k"),
    ("-m minilora", "COMMAND"),
    ("-m minilora evaluate", "'evaluate'"),
    ("-m minilora bench train", "MODEL, BATCHES.safetensors"),
])
def test_a_wrong_flag_is_one_line(call, line, of):
    """argparse's own way is twenty lines of usage, and the mistake under them."""
    status, _, error = call(f"python {line}")
    one_line(status, error, of, "--help")


def write_rows(path: Path, data: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))


def nano_copy(folder: Path) -> Path:
    """The nano base in a folder of its own, to be broken."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.model"):
        (folder / name).write_bytes((NANO / name).read_bytes())
    return folder


SHORT = "--steps 3 --batch 2 --length 512 --eval-share 0.1 --rank 2"


def train(extra: str = "", out: str = "runs/calls") -> str:
    return f"python train.py --data calls.jsonl --out {out} {SHORT} {extra}"


# --- the README, command by command ---------------------------------------------------------------

def test_the_readme_in_one_sitting(call, tmp_path):
    """Every command line of the README, in its order, with the run cut short and no hub."""
    (tmp_path / "my_tools.py").write_text(TOOLS)
    write_rows(tmp_path / "calls.jsonl", rows(30))
    write_rows(tmp_path / "held_out.jsonl", rows(4))
    ran = []
    for line in COMMANDS:
        if line.startswith("pip install"):
            assert line in ('pip install -e ".[report]" && python train.py',
                            'pip install -e ".[test]" && pytest')
            line = "python train.py" if "train.py" in line else None
        if not line:
            continue
        line = line.partition("#")[0].strip().replace("google/gemma-2-2b-it", "nano")
        if "train.py" in line and "--resume" not in line:
            line += " --steps 2 --batch 2 --rank 2"
            line += " --eval-calls 2 --eval-data held_out.jsonl" if "--data" not in line else ""
        status, out, error = call(line)
        assert status == 0, f"{line}\n{out}\n{error}"
        ran.append(line)
    assert len(ran) >= 2


def test_the_default_run_is_the_recipe(call, tmp_path):
    """`python train.py` alone: the nano base, real decoding, all that is promised."""
    write_rows(tmp_path / "few.jsonl", rows(4))
    less = "--batch 2 --eval-data few.jsonl"
    status, out, error = call(f"python train.py --json --steps 2 --eval-calls 4 {less}")
    assert status == 0, error
    result = json.loads(out.splitlines()[-1])
    assert set(result) >= {"before", "after", "no_tool_after", "seconds", "trained_parameters",
                           "out"}
    assert result["before"] == 0.0
    run = tmp_path / result["out"]
    names = {path.name for path in run.iterdir()}
    assert names == {"adapter", "merged", "checkpoints", "metrics.jsonl", "config.json",
                     "result.json", "curve.png"}
    assert json.loads((run / "result.json").read_text()) == result
    for name, library in (("adapter", "peft"), ("merged", "transformers")):
        card = (run / name / "README.md").read_text()
        assert f"library_name: {library}" in card and str(tmp_path) not in card
        assert f"train.jsonl: {result['conversations']} conversations" in card
        assert "(few.jsonl)" in card and f"| {result['after']:.3f} (95 %" in card
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2]
    assert "trains" in error and "memory" in error and "tokens" in error
    out = call(f"python train.py --json --steps 1 --eval-calls 1 {less}")[1]
    again = json.loads(out.splitlines()[-1])
    assert again["out"] != result["out"]  # an earlier run is never written over


def test_train_infer_eval_merge_agree(call, tmp_path):
    """Adapter, merged model and `--merge` give the same text and the same accuracy."""
    write_rows(tmp_path / "calls.jsonl", rows(30))
    (tmp_path / "my_tools.py").write_text(TOOLS)
    status, out, error = call(train("--merge --json"))
    assert status == 0, error
    assert call("python -m minilora merge --adapter runs/calls --out merged")[0] == 0
    for name in ("model.safetensors", "config.json", "tokenizer.model", "tokenizer_config.json"):
        assert ((tmp_path / "merged" / name).read_bytes()
                == (tmp_path / "runs/calls/merged" / name).read_bytes()), name
    answers = [call(f'python infer.py {which} --json --max-new 12 "Hello!"')
               for which in ("--adapter runs/calls", "--model merged")]
    assert answers[0][0] == answers[1][0] == 0
    assert answers[0][1] == answers[1][1]
    line = "python -m minilora eval --data calls.jsonl --max-new 4 --json"
    evals = [call(f"{line} {which}") for which in ("--adapter runs/calls", "--model merged")]
    assert evals[0][0] == 0 and evals[0][1] == evals[1][1]
    assert len(evals[0][1].splitlines()) == 31


def test_merge_checks_what_it_wrote(call, tmp_path):
    """In float32 at rounding's own size, in bfloat16 told; the pair of --extended-base likewise."""
    write_rows(tmp_path / "calls.jsonl", rows(12))
    assert call(train())[0] == 0
    merge = "python -m minilora merge --adapter runs/calls --check calls.jsonl"
    facts = {}
    for name, more in (("float32", ""), ("bfloat16", "--dtype bfloat16 --length 250"),
                       ("pair", "--extended-base")):
        status, out, error = call(f"{merge} --out {name} {more} --json")
        assert status == 0, error
        facts[name] = json.loads(out)["check"]
    status, out, _ = call("python -m minilora validate calls.jsonl --json")
    assert facts["float32"]["tokens"] == facts["pair"]["tokens"] == json.loads(out)["tokens"]
    assert 0 < facts["bfloat16"]["tokens"] < facts["pair"]["tokens"]  # cut to --length
    assert facts["bfloat16"]["within_1e-5"] is None
    assert 0.5 < facts["bfloat16"]["argmax_agreement"] <= 1
    for name in ("float32", "pair"):
        assert facts[name]["argmax_agreement"] == 1 and 0 < facts[name]["largest_share"] < 2e-5
        assert facts[name]["within_1e-5"] is (facts[name]["largest_share"] <= 1e-5)
        assert facts[name]["largest_share"] == pytest.approx(
            facts[name]["largest_change"] / facts[name]["largest_logit"])
    status, out, error = call(f"{merge} --out float32")
    assert status == 0 and "within 1e-5" in out and "100.0" in out
    assert ("NOT" in out) is not facts["float32"]["within_1e-5"]

    card = (tmp_path / "float32/README.md").read_text()
    assert "library_name: transformers" in card and "| `rank` | 2 |" in card
    answers = [call(f'python infer.py --adapter {which} --json --max-new 12 "Hello!"')
               for which in ("runs/calls", "pair/adapter")]
    assert answers[0][0] == 0 and answers[0][1] == answers[1][1]
    # Not into the run, whose adapter it would replace; and no data, no merge.
    before = (tmp_path / "runs/calls/adapter/adapter_config.json").read_bytes()
    status, _, error = call("python -m minilora merge --adapter runs/calls --out runs/calls "
                            "--extended-base")
    one_line(status, error, "runs/calls/adapter", "would be lost")
    assert (tmp_path / "runs/calls/adapter/adapter_config.json").read_bytes() == before
    status, _, error = call("python -m minilora merge --adapter runs/calls --out new "
                            "--check nowhere.jsonl")
    one_line(status, error, "nowhere.jsonl")
    status, _, error = call("python -m minilora merge --adapter runs/calls --out new "
                            "--check calls.jsonl --length 8")
    one_line(status, error, "calls.jsonl", "is left")
    assert not (tmp_path / "new").exists()


def test_push_after_training_and_merging(call, tmp_path, monkeypatch):
    """Refused before any work where it cannot succeed; where it fails after, nothing is lost."""
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    write_rows(tmp_path / "calls.jsonl", rows(10))
    for words, told in (("--push Ann/calls", "no token"), ("--push calls", "org/name"),
                        ("--public", "--push")):
        status, _, error = call(train(words))
        one_line(status, error, told)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    nano_copy(tmp_path / "base")
    status, _, error = call(train("--push Ann/calls --model base"))
    one_line(status, error, "hub id")
    assert not (tmp_path / "runs").exists()

    monkeypatch.setattr(fake, "upload_folder", lambda **_: 1 / 0)
    status, out, error = call(train("--push Ann/calls --json"))
    one_line(status, error, "division by zero", "hf upload Ann/calls runs/calls/adapter .")
    assert json.loads(out)["steps"] == 3
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    status, out, error = call("python train.py --resume runs/calls --push Ann/calls")
    assert status == 0 and "https://hub.test/Ann/calls" in error
    merge = "python -m minilora merge --adapter runs/calls --out merged"
    status, _, error = call(f"{merge} --push team/calls --public")
    assert status == 0 and fake.repos == {"Ann/calls": True, "team/calls": False}
    for repo, folder in (("Ann/calls", "runs/calls/adapter"), ("team/calls", "merged")):
        assert fake.files[repo] == {path.name: path.read_bytes()
                                    for path in (tmp_path / folder).iterdir()}
        assert "README.md" in fake.files[repo]
        assert not any(str(tmp_path).encode() in each for each in fake.files[repo].values())
    status, _, error = call(f"{merge} --push team/calls --extended-base")
    one_line(status, error, "--extended-base")
    with interrupted_at(1, monkeypatch):
        status, _, error = call(train("--push Ann/calls --public", "parts"))
    assert status == 0 and "train.py --resume parts --push Ann/calls --public" in error
    assert "pushed" not in error


def test_a_chat_on_standard_input(tmp_path):
    """No prompt: one answer for each line, and quietly out at the end."""
    done = subprocess.run(
        [sys.executable, ROOT / "infer.py", "--model", "nano", "--max-new", "8"], cwd=tmp_path,
        input="Hello!\nWhat is the opposite of hot?\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "Traceback" not in done.stderr


def test_validate_and_show(call, tmp_path):
    write_rows(tmp_path / "calls.jsonl", rows(5))
    status, out, _ = call("python -m minilora validate calls.jsonl")
    assert status == 0 and "5 read" in out
    facts = json.loads(call("python -m minilora validate calls.jsonl --json")[1])
    assert facts["conversations"] == 5 and facts["problems"] == []
    status, out, _ = call("python -m minilora show calls.jsonl --row 2")
    assert status == 0 and "⟦" in out and "<start_of_turn>user" in out
    shown = json.loads(call("python -m minilora show calls.jsonl --row 2 --json")[1])
    assert len(shown["ids"]) == len(shown["kinds"]) == len(shown["labels"])


def test_help_of_every_command(call):
    for line in ("train.py", "infer.py", "-m minilora", "-m minilora eval", "-m minilora show"):
        status, out, _ = call(f"python {line} --help")
        assert status == 0 and "usage:" in out


# --- stopping and going on ------------------------------------------------------------------------

@contextlib.contextmanager
def interrupted_at(step: int, monkeypatch, number: int = signal.SIGINT):
    """Sends this process Ctrl-C, or another signal, in the middle of a step of train.py."""
    import minilora.trainer as trainer

    real, seen = trainer.train_step, []

    def counted(*arguments):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), number)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", counted)
        yield


def test_resumed_equals_uninterrupted_bit_for_bit(call, tmp_path, monkeypatch):
    """Ctrl-C saves and leaves; --resume ends at the same adapter, dropout and all."""
    write_rows(tmp_path / "calls.jsonl", rows(20))
    more = "--dropout 0.2 --accumulate 2 --steps 6"
    assert call(train(more, "whole"))[0] == 0
    with interrupted_at(3, monkeypatch):
        status, _, error = call(train(more, "parts"))
    assert status == 0 and "stopped after step 3 of 6" in error and "--resume parts" in error
    assert call("python train.py --resume parts")[0] == 0
    whole, parts = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors")
                    for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    losses = [[record["loss"] for record in read_metrics(tmp_path / run / "metrics.jsonl")]
              for run in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_run_folder_is_not_written_over(call, tmp_path):
    write_rows(tmp_path / "calls.jsonl", rows(10))
    assert call(train())[0] == 0
    status, _, error = call(train())
    assert status == 2 and "holds a run already" in error and "--resume runs/calls" in error
    status, _, error = call("python train.py --resume runs/calls --lr 1")
    assert status == 2 and "leave out --lr" in error
    status, _, error = call("python train.py --resume nowhere")
    assert status == 2 and "nowhere" in error


# --- a user's mistakes: one line, where and what to do, status 2 ----------------------------------

def broken_base(folder: Path, how: str) -> Path:
    base = nano_copy(folder)
    weights = base / "model.safetensors"
    if how == "missing shard":
        tensors = load_file(weights)
        weights.unlink()
        index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "wrong shape":
        tensors = load_file(weights)
        tensors["model.norm.weight"] = torch.zeros(7)
        save_file(tensors, weights)
    elif how == "missing tensor":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights)
    elif how == "other family":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    return base


def one_line(status: int, error: str, *told: str) -> None:
    assert status == 2, error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in error
    for text in told:
        assert text in last, last


@pytest.mark.parametrize("how, told", [
    ("missing shard", ["model-00001-of-00001.safetensors"]),
    ("truncated", ["model.safetensors"]),
    ("wrong shape", ["model.safetensors", "norm.weight", "192", "7"]),
    ("missing tensor", ["norm.weight"]),
    ("other family", ["config.json", "llama", "gemma2"]),
])
def test_a_broken_base(call, tmp_path, how, told):
    broken_base(tmp_path / "base", how)
    write_rows(tmp_path / "calls.jsonl", rows(4))
    status, _, error = call(train("--model base"))
    one_line(status, error, *told)
    status, _, error = call('python infer.py --model base "Hello!"')
    one_line(status, error, *told)


@pytest.mark.parametrize("row, told", [
    ("{not json", ["calls.jsonl:3"]),
    ('{"messages": []}', ["calls.jsonl:3", "messages"]),
    ('{"text": "hello"}', ["calls.jsonl:3", "messages"]),
    ('{"messages": [{"role": "user", "content": "hi"}]}', ["calls.jsonl:3", "nothing to train"]),
])
def test_a_bad_row(call, tmp_path, row, told):
    write_rows(tmp_path / "calls.jsonl", rows(2))
    with open(tmp_path / "calls.jsonl", "a") as file:
        file.write(row + "\n")
    status, _, error = call(train("--eval-share 0"))
    one_line(status, error, *told)
    status, out, _ = call("python -m minilora validate calls.jsonl")
    assert status == 2 and told[0] in out


@pytest.mark.parametrize("flags, told", [
    ("--rank 0", ["rank is 0"]),
    ("--targets qproj", ["'qproj'", "q_proj"]),
    ("--device cuda:77", ["cuda:77"]),
    ("--train-on nothing", ["nothing"]),
    ("--model no/such/folder", ["no/such/folder"]),
    ("--data nowhere.jsonl", ["nowhere.jsonl"]),
    ("--config nowhere.json", ["nowhere.json"]),
    ("--batch 0", ["batch is 0"]),
])
def test_a_bad_setting(call, tmp_path, flags, told):
    write_rows(tmp_path / "calls.jsonl", rows(4))
    status, _, error = call(train(flags))
    one_line(status, error, *told)


def test_an_adapter_for_another_base(call, tmp_path):
    write_rows(tmp_path / "calls.jsonl", rows(6))
    assert call(train())[0] == 0
    other = nano_copy(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    for tensor in tensors.values():
        tensor.mul_(0.5)
    save_file(tensors, other / "model.safetensors")
    status, _, error = call('python infer.py --model other --adapter runs/calls "Hello!"')
    one_line(status, error, "runs/calls", "base")


def test_settings_from_a_file_are_checked(call, tmp_path):
    write_rows(tmp_path / "calls.jsonl", rows(4))
    for text, told in (('{"rnak": 4}', "'rnak'"), ('{"rank": "4"}', "rank"), ("[1]", "object"),
                       ('{"schedule": "sine"}', "schedule")):
        (tmp_path / "settings.json").write_text(text)
        status, _, error = call(train("--config settings.json"))
        one_line(status, error, "settings.json", told)


def test_no_traceback_from_a_real_process(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--rank", "0"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: rank is 0; expected 1 to 65536 (try --rank 16)"]
    assert not done.stdout


def test_the_command_that_prints_the_readme_s_table():
    """On a part of it: the whole is what the suite runs."""
    command = re.search(r"`pytest (tests/test_parity.py .*) --table`", README)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *command[1].split(), "--table",
                           "-k", "test_merged_equals_unmerged"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout
    assert "| logits, float32, merged | minilora, unmerged |" in done.stdout


BENCH = ROOT / "tests/bench"


def test_the_benchmark_of_learning(tmp_path, monkeypatch, capfd):
    """The README's command, on one short run; its table and picture are those of the results."""
    command = re.search(r"`python -m minilora.nano.learning (.*?)`", README)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learning, "runs", lambda lora, config: {"recipe": (lora, config)})
    monkeypatch.setattr(sys, "argv", ["learning", *command[1].split(), "--steps", "6",
                                      "--questions", "2", "--workers", "1"])
    assert run_command(learning.main) == 0
    found = {path.name for path in (tmp_path / "runs/learning").iterdir()}
    assert found == {"learning.json", "learning.png"}
    kept = json.loads((BENCH / "learning.json").read_text())
    assert learning.markdown(kept["curves"]) in README
    assert "(tests/bench/learning.png)" in README and (BENCH / "learning.png").exists()
    assert capfd.readouterr().out.startswith("| the recipe with | step 1 |")
