"""A card states what is known and nothing else; a push uploads just that, or says why not."""

import argparse
import dataclasses
import json
import re
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from test_checkpoint import (
    assert_close,
    logits,
    refusal,
    transformers_model,
    tuned,
    with_new,
    write_base,
)

from minilora import hub
from minilora.checkpoint import export_merged, save_adapter
from minilora.config import LoraConfig, TrainConfig
from minilora.hub import add_push_flags, check_push, model_card, push

RESULT = {"before": 0.0, "after": 0.7273, "after_95": [0.6546, 0.7894], "after_of": 165,
          "no_tool_before": 1.0, "no_tool_after": 0.973, "no_tool_after_95": [0.907, 0.993],
          "no_tool_after_of": 75, "steps": 440, "conversations": 950}


def write_run(folder, result=RESULT, lora=None, **settings):
    """A run's folder as train.py leaves it, less what no card reads."""
    (folder / "adapter").mkdir(parents=True)
    settings = {"data": str(folder / "secret/calls.jsonl"), "out": str(folder),
                "eval_data": f"{folder}/held_out.jsonl,nano/other.jsonl", **settings}
    config = (LoraConfig(**lora or {}), TrainConfig(**settings))
    (folder / "config.json").write_text(json.dumps(
        {key: value for each in config for key, value in dataclasses.asdict(each).items()}))
    if result:
        (folder / "result.json").write_text(json.dumps({**result, "out": str(folder)}))
    return folder


def table_of(card, title):
    """The rows of the table below a heading, the heads left out; None of no table."""
    part = card.partition(f"## {title}\n" if title else "\n# ")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return {first.strip().strip("`"): [cell.strip() for cell in others] for first, *others in cells}


# --- the card -------------------------------------------------------------------------------------

def test_a_card_states_base_data_recipe_and_accuracy(tmp_path):
    run = write_run(tmp_path / "runs/calls", lora={"rank": 8, "alpha": 16.5, "rslora": True},
                    data="a/ca|lls.jsonl@0.5,b/more.jsonl", batch=8, length=400, accumulate=2,
                    lr=3e-4, warmup=0.1)
    card = model_card("peft", "google/gemma-2-2b-it", "hermes", run, 256008)
    facts = table_of(card, "")
    assert facts["data"] == [r"ca\|lls.jsonl (weight 0.5), more.jsonl: 950 conversations"]
    assert "google/gemma-2-2b-it" in facts["base"][0]
    assert facts["steps"] == ["440, each of 8 × 400 tokens × 2"]
    assert "hermes" in facts["dialect"][0] and "`<tool_call>`" in facts["dialect"][0]
    assert table_of(card, "Measured") == {
        "calls right": ["0.000", "0.727 (95 %: 0.655 to 0.789)"],
        "no tool needed": ["1.000", "0.973 (95 %: 0.907 to 0.993)"]}
    assert "(held_out.jsonl, other.jsonl)" in card and "(165)" in card and "(75)" in card
    recipe = {key: value for key, (value,) in table_of(card, "Recipe").items()}
    assert recipe.items() >= {
        "rank": "8", "alpha": "16.5", "rslora": "True", "lr": "0.0003", "batch": "8",
        "accumulate": "2", "warmup": "0.1", "train_on": "assistant", "schedule": "cosine",
        "targets": "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"}.items()
    # A setting at its default is told only if it is a main one; where things are, never.
    assert not recipe.keys() & {"seed", "clip", "pack", "model", "data", "eval_data", "out"}
    assert "resize_token_embeddings(256008" in card and "--extended-base" in card
    assert "before the merge" not in card
    assert "before the merge" in model_card("transformers", "org/base", "hermes", run)


@pytest.mark.parametrize("library", ["peft", "transformers"])
@pytest.mark.parametrize("base", ["google/gemma-2-2b-it", "nano", "folder"])
def test_the_hub_reads_the_head_and_no_path_is_told(tmp_path, library, base):
    run = write_run(tmp_path / "runs/calls", device="cpu", merge=True, eval_calls=9)
    if base == "folder":
        base = str(tmp_path / "bases/my-gemma")
    card = model_card(library, base, "mistral", run, 520)
    assert str(tmp_path) not in card and "secret" not in card
    assert not re.search(r"(?<![\w.:/<\[])/\w", card)  # tags and addresses apart
    data = ModelCard(card).data
    assert data.library_name == library and data.pipeline_tag == "text-generation"
    assert {"lora", "function-calling", "minilora"} <= set(data.tags)
    # The hub refuses a base_model that is not one of its own.
    assert data.base_model == (base if base.startswith("google/") else None)
    assert base.rpartition("/")[2] in card.partition("# ")[2].partition("\n")[0]


@pytest.mark.parametrize("known", ["nothing", "settings", "no accuracy"])
def test_what_is_not_known_is_said_to_be_unknown(tmp_path, known):
    nobody = {"after": None, "no_tool_after": None, "after_of": 0, "no_tool_after_of": 0,
              "after_95": [0, 1], "no_tool_after_95": [0, 1], "before": None}
    run = write_run(tmp_path / "run", {**RESULT, **nobody} if known == "no accuracy" else None)
    if known == "nothing":
        run = run / "adapter"
    card = model_card("peft", "org/base", "hermes", run)
    assert "## Measured\n\nNot measured." in card and "0.0" not in card.partition("## Recipe")[0]
    facts = table_of(card, "")
    assert facts["steps"] == ["440, each of 4 × 1024 tokens" if known == "no accuracy"
                              else "not recorded"]
    assert facts["data"] == [{"nothing": "not recorded", "settings": "calls.jsonl",
                              "no accuracy": "calls.jsonl: 950 conversations"}[known]]
    assert ("## Recipe\n\nNot recorded." in card) == (known == "nothing")
    assert "resize" not in card


def test_a_folder_that_is_no_run_has_no_recipe(tmp_path):
    """The pair of --extended-base, and an adapter folder with the config.json of a model."""
    pair, foreign = write_run(tmp_path / "pair"), tmp_path / "foreign"
    (pair / "config.json").unlink()
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "gemma2"}')
    for folder in (pair, foreign):
        card = model_card("transformers", "org/base", "hermes", folder)
        assert "Not recorded." in card and "Not measured." in card


def test_a_part_that_was_not_asked_is_not_measured(tmp_path):
    result = {**RESULT, "no_tool_before": None, "no_tool_after": None, "no_tool_after_of": 0}
    card = model_card("peft", "org/base", "hermes", write_run(tmp_path / "run", result))
    assert table_of(card, "Measured")["no tool needed"] == ["not measured", "not measured"]


@pytest.mark.parametrize("library", ["peft", "transformers"])
def test_the_python_of_a_card_loads_the_model(tmp_path, library):
    pytest.importorskip("peft")
    base = write_base(tmp_path / "base")
    model, tokenizer = tuned(base)
    if library == "peft":
        save_adapter(model, tokenizer, tmp_path / "out", base)
    else:
        export_merged(model, tokenizer, base, tmp_path / "out")
    card = model_card(library, str(base), "hermes", tmp_path, model.embed_tokens.num_embeddings)
    code, = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    out = tmp_path / "out"
    for word, folder in (("BASE", base), ("ADAPTER", out), ("MODEL", out)):
        code = code.replace(f'"{word}"', f'"{folder}"')
    names = {}
    exec(code, names)
    ids = with_new(torch.arange(20).reshape(2, 10), model)
    theirs = names["model"].float().eval()
    assert_close(logits(model, ids), logits(theirs, ids))
    assert names["tokenizer"].convert_tokens_to_ids("<tool_call>") == tokenizer.token_id(
        "<tool_call>")
    if library == "transformers":
        assert_close(logits(theirs, ids), logits(transformers_model(tmp_path / "out"), ids))


# --- the hub --------------------------------------------------------------------------------------

class Refused(Exception):
    """The hub's answer, with its status, as every release of huggingface_hub gives it."""

    def __init__(self, status):
        super().__init__(f"{status} Client Error\nRequest ID: 7")
        self.response = SimpleNamespace(status_code=status)


class FakeHub:
    """What HfApi does, without a network: remembers what it was asked to store."""

    def __init__(self):
        self.account = {"name": "Ann", "orgs": [{"name": "team"}],
                        "auth": {"accessToken": {"role": "write"}}}
        self.repos, self.files, self.deletes, self.error = {}, {}, [], None

    def whoami(self):
        if self.error:
            raise self.error
        return self.account

    def create_repo(self, repo, *, private, exist_ok):
        assert exist_ok
        self.repos.setdefault(repo, private)
        return f"https://hub.test/{repo}"

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        if self.error:
            raise self.error
        self.deletes = delete_patterns
        self.files[repo_id] = {path.relative_to(folder_path).as_posix(): path.read_bytes()
                               for path in folder_path.rglob("*") if path.is_file()}


@pytest.fixture
def fake(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    return fake


def flags(line):
    parser = argparse.ArgumentParser()
    add_push_flags(parser, "it")
    return parser.parse_args(line.split())


def test_a_push_uploads_the_card_the_adapter_and_the_tokenizer(fake, tmp_path):
    base = write_base(tmp_path / "base")
    model, tokenizer = tuned(base)
    save_adapter(model, tokenizer, tmp_path / "run/adapter", "org/base")
    (tmp_path / "run/adapter/README.md").write_text("a card")
    (tmp_path / "run/metrics.jsonl").write_text("{}")
    assert push(tmp_path / "run/adapter", "Ann/calls") == "https://hub.test/Ann/calls"
    assert fake.repos == {"Ann/calls": True}  # private
    assert fake.files["Ann/calls"].keys() == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "minilora.json",
        "tokenizer.model", "tokenizer_config.json"}
    export_merged(model, tokenizer, base, tmp_path / "merged")
    push(tmp_path / "merged", "team/calls", public=True)
    assert fake.repos["team/calls"] is False
    assert fake.files["team/calls"].keys() == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model",
        "tokenizer_config.json"}
    for text in (each.decode("latin-1") for files in fake.files.values() for each in
                 files.values()):
        assert str(tmp_path) not in text and "hf_secret" not in text
    # Old shards and an old adapter go; what its owner put there stays.
    gone = {name for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json",
                              "adapter_config.json", "LICENSE", "notes.md", "figure.png")
            if any(fnmatchcase(name, pattern) for pattern in fake.deletes)}
    assert gone == {"model-00001-of-00002.safetensors", "model.safetensors.index.json",
                    "adapter_config.json"}


@pytest.mark.parametrize("repo", ["Ann/calls", "ann/calls", "team/calls.v2"])
@pytest.mark.parametrize("base", [None, "nano", "google/gemma-2-2b-it"])
def test_a_push_that_can_succeed_passes(fake, repo, base):
    check_push(flags(f"--push {repo} --public"), base)
    check_push(flags(""), base)
    del fake.account["auth"], fake.account["orgs"]
    check_push(flags("--push Ann/calls"), base)
    assert not fake.repos  # nothing is made before there is something to upload


@pytest.mark.parametrize("repo", [
    "calls", "a/b/c", "Ann/", "/calls", "Ann/ca--lls", "Ann/-x", "./run", "Ann/calls.git",
    "https://huggingface.co/Ann/calls"])
def test_a_name_that_is_none_is_refused(fake, repo):
    line = refusal(check_push, flags(f"--push {repo}"))
    assert "org/name" in line and repo in line


def test_a_push_that_would_fail_is_refused_first(fake, tmp_path, monkeypatch):
    wish = flags("--push Ann/calls")
    assert "--push org/name" in refusal(check_push, flags("--public"))
    line = refusal(check_push, wish, str(tmp_path))
    assert "hub id" in line and "merge" in line
    assert "Ann" in refusal(check_push, flags("--push other/calls"))
    fake.account["auth"]["accessToken"]["role"] = "read"
    assert "may only read" in refusal(check_push, wish)
    for error, said in ((Refused(401), "HF_TOKEN"), (ConnectionError("no route"), "go online"),
                        (OfflineModeIsEnabled("offline"), "go online"), (OSError(), "OSError")):
        fake.error = error
        assert said in refusal(check_push, wish)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    line = refusal(check_push, wish)
    assert "no token" in line and "HF_TOKEN" in line and "hf auth login" in line


@pytest.mark.parametrize("public", [False, True])
def test_a_push_that_fails_says_what_is_safe_and_how_to_go_on(fake, tmp_path, public):
    folder = tmp_path / "my run/adapter"
    for error, said in ((Refused(403), "the hub said no (403 Client Error); make a token"),
                        (Refused(429), "the hub said no (429 Client Error); wait"),
                        (ConnectionError("no route"), "go online")):
        fake.error = error
        line = refusal(push, folder, "Ann/calls", public)
        assert said in line and f"{folder} is whole on the disk" in line
        again = f"hf upload Ann/calls '{folder}' ." + ("" if public else " --private")
        assert line.endswith(again)
        assert "hf_secret" not in line
