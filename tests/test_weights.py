"""Weights: what is written is read, once, into its place; anything else is refused by name."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import tiny_model, tiny_raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minilora import weights
from minilora.config import FAMILIES, GemmaConfig, UserError
from minilora.model import Gemma
from minilora.weights import checkpoint_name, load_model, locate, model_name

LAYOUTS = ["model.", "language_model.model.", "model.language_model."]


def tensors_of(model, prefix="model."):
    return {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}


def write_checkpoint(folder, tensors, raw=None, shards=1):
    """A folder in the hub's layout, its tensors dealt out to `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw or tiny_raw()))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for n in range(shards):
        name = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        keys = sorted(tensors)[n::shards]
        save_file({key: tensors[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    write_index(folder, weight_map)
    return folder


def write_index(folder, weight_map):
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def refusal(call, *args, **kwargs):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is written is read ----------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_number_comes_back(tmp_path, family, shards):
    model = tiny_model(family)
    write_checkpoint(tmp_path, tensors_of(model), tiny_raw(family), shards)
    loaded = load_model(tmp_path, torch.float32)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [weights.BLOCK, 240])
def test_read_into_the_dtype_asked_for(tmp_path, monkeypatch, stored, dtype, block):
    monkeypatch.setattr(weights, "BLOCK", block)  # bytes: less than any tensor has
    tensors = {key: tensor.to(stored) for key, tensor in tensors_of(tiny_model()).items()}
    loaded = load_model(write_checkpoint(tmp_path, tensors), dtype)
    for name, tensor in loaded.named_parameters():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[checkpoint_name(name)].to(dtype)), name


def test_the_model_does_not_hang_on_the_file(tmp_path):
    tensors = tensors_of(tiny_model())
    loaded = load_model(write_checkpoint(tmp_path, tensors), torch.float32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # as an export over its own base would
    assert torch.equal(loaded.norm.weight, tensors["model.norm.weight"])


@pytest.mark.parametrize("prefix", LAYOUTS)
def test_image_text_checkpoints_give_their_text_part(tmp_path, prefix, caplog):
    model, text = tiny_model("gemma3_text"), tiny_raw("gemma3_text")
    vision = "model." if prefix == "model.language_model." else ""
    tensors = tensors_of(model, prefix) | {
        f"{vision}vision_tower.vision_model.embeddings.patch_embedding.bias": torch.zeros(3),
        f"{vision}multi_modal_projector.mm_input_projection_weight": torch.zeros(3, 2)}
    raw = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    with caplog.at_level(logging.WARNING):
        loaded = load_model(write_checkpoint(tmp_path, tensors, raw), torch.float32)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    [line] = caplog.messages
    assert "2 tensors of the vision part" in line and "multi_modal_projector" in line


def test_a_vision_part_belongs_to_gemma_3_only(tmp_path):
    tensors = tensors_of(tiny_model()) | {"vision_tower.bias": torch.zeros(3)}
    assert "vision_tower.bias" in refusal(load_model, write_checkpoint(tmp_path, tensors))


@pytest.mark.parametrize("prefix", LAYOUTS)
def test_names_of_checkpoint_and_model(prefix):
    for name in tiny_model("gemma3_text").state_dict():
        assert model_name(prefix + name) == name
        assert model_name(checkpoint_name(name)) == name
        assert model_name(name) is None and model_name("x." + name) is None


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_head_is_read_past_only_where_it_is_the_embedding(tmp_path, monkeypatch, head, shards):
    monkeypatch.setattr(weights, "BLOCK", 1000)
    model = tiny_model()
    table = model.embed_tokens.weight
    same = tensors_of(model) | {head: table.clone()}
    loaded = load_model(write_checkpoint(tmp_path / "same", same, shards=shards), torch.float32)
    assert torch.equal(loaded.embed_tokens.weight, table)
    nudged = table.clone()
    nudged.view(torch.int32)[3, 5] += 1  # the smallest change there is
    halves = {key: tensor.half() for key, tensor in same.items()}
    relabelled = halves[head].view(torch.bfloat16)  # the same bytes, other numbers
    for tensors, other in ((same, nudged), (same, table[:-1].clone()), (same, torch.tensor(1.0)),
                           (same, table.half()), (halves, relabelled)):
        folder = write_checkpoint(tmp_path / "other", tensors | {head: other}, shards=shards)
        line = refusal(load_model, folder)
        assert head in line and "model.embed_tokens.weight" in line and ".safetensors" in line


# --- what is not as it should be is refused by name -----------------------------------------------

def drop(folder, tensors):
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"},
              folder / "model.safetensors")
    return ["model.norm.weight", "lacks 1 of"]


def add(folder, tensors):
    save_file(tensors | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)},
              folder / "model.safetensors")
    return ["model.safetensors", "model.layers.9.mlp.up_proj.weight", "gemma2"]


def misshape(folder, tensors):
    save_file(tensors | {"model.norm.weight": torch.zeros(71)}, folder / "model.safetensors")
    return ["model.safetensors", "model.norm.weight", "[71]", "[72]"]


def transpose(folder, tensors):
    key = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {key: tensors[key].T.contiguous()}, folder / "model.safetensors")
    return [key, "[72, 144]", "[144, 72]"]


def quantise(folder, tensors):
    save_file(tensors | {"model.norm.weight": torch.zeros(72, dtype=torch.int8)},
              folder / "model.safetensors")
    return ["model.norm.weight", "I8", "BF16", "quantised"]


def two_layouts(folder, tensors):
    save_file(tensors | {"language_model.model.norm.weight": torch.zeros(72)},
              folder / "model.safetensors")
    return ["model.norm.weight", "language_model.model.norm.weight", "once"]


def no_prefix(folder, tensors):
    save_file({key.removeprefix("model."): tensor for key, tensor in tensors.items()},
              folder / "model.safetensors")
    return ["model.safetensors", "embed_tokens.weight"]


def truncate(folder, tensors):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return ["model.safetensors", "not a whole safetensors file", "download"]


def a_folder(folder, tensors):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    return ["model.safetensors", "missing"]


def pickled(folder, tensors):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return ["pytorch_model.bin", "pickled", "safetensors"]


def nothing(folder, tensors):
    (folder / "model.safetensors").unlink()
    return ["neither", "model.safetensors.index.json"]


def both(folder, tensors):
    write_index(folder, dict.fromkeys(tensors, "model.safetensors"))
    return ["both", "model.safetensors.index.json"]


def outside(folder, tensors):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")
    return ["model.safetensors", "link", "elsewhere.safetensors"]


def no_config(folder, tensors):
    (folder / "config.json").unlink()
    return ["config.json", "no such file"]


def other_family(folder, tensors):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return ["config.json", "llama"]


@pytest.mark.parametrize("break_it", [
    drop, add, misshape, transpose, quantise, two_layouts, no_prefix, truncate, a_folder, pickled,
    nothing, both, outside, no_config, other_family], ids=lambda f: f.__name__)
def test_a_broken_checkpoint_is_refused(tmp_path, break_it):
    tensors = tensors_of(tiny_model())
    expected = break_it(write_checkpoint(tmp_path / "it", tensors), tensors)
    line = refusal(load_model, tmp_path / "it")
    assert str(tmp_path / "it") in line
    for word in expected:
        assert word in line


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def shard_missing(folder, tensors):
    (folder / TWO).unlink()
    return ["index.json", TWO, "missing", "download"]


def shard_truncated(folder, tensors):
    (folder / TWO).write_bytes((folder / TWO).read_bytes()[:1000])
    return [TWO, "not a whole"]


def shard_has_more(folder, tensors):
    index = read_index(folder)
    key = next(key for key, shard in index.items() if shard == TWO)
    del index[key]
    write_index(folder, index)
    return [TWO, key, "holds", "index"]


def shard_has_less(folder, tensors):
    index = read_index(folder)
    key = next(key for key, shard in index.items() if shard == TWO)
    write_index(folder, index | {key: ONE})
    return [ONE, key, "lacks", "index"]


def index_has_more(folder, tensors):
    write_index(folder, read_index(folder) | {"model.more.weight": TWO})
    return [TWO, "model.more.weight", "lacks"]


def in_two_shards(folder, tensors):
    index = read_index(folder)
    key = next(key for key, shard in index.items() if shard == ONE)
    mine = {k: tensors[k] for k, shard in index.items() if shard == TWO}
    save_file(mine | {key: tensors[key]}, folder / TWO)
    return [ONE, TWO, key, "once"]


def climbing(folder, tensors):
    (folder / TWO).rename(folder.parent / TWO)
    write_index(folder, {key: f"../{TWO}" if shard == TWO else shard
                         for key, shard in read_index(folder).items()})
    return ["index.json", f"../{TWO}", "in the folder"]


def absolute(folder, tensors):
    write_index(folder, {key: str(folder / shard) for key, shard in read_index(folder).items()})
    return ["index.json", str(folder / ONE), "in the folder"]


def linked(folder, tensors):
    (folder / TWO).rename(folder.parent / TWO)
    (folder / TWO).symlink_to(Path("..") / TWO)
    return [TWO, "link"]


def not_a_name(folder, tensors):
    write_index(folder, dict.fromkeys(tensors, 7))
    return ["index.json", "7"]


def another_kind(folder, tensors):
    write_index(folder, dict.fromkeys(tensors, "model.bin"))
    return ["index.json", "model.bin"]


def empty_index(folder, tensors):
    write_index(folder, {})
    return ["index.json", "weight_map"]


def index_is_a_list(folder, tensors):
    (folder / "model.safetensors.index.json").write_text("[]")
    return ["index.json", "weight_map"]


def index_is_no_json(folder, tensors):
    (folder / "model.safetensors.index.json").write_text('{"weight_map":\n')
    return ["index.json:2"]


def index_gone(folder, tensors):
    (folder / "model.safetensors.index.json").unlink()
    return [ONE, "no model.safetensors.index.json"]


@pytest.mark.parametrize("break_it", [
    shard_missing, shard_truncated, shard_has_more, shard_has_less, index_has_more, in_two_shards,
    climbing, absolute, linked, not_a_name, another_kind, empty_index, index_is_a_list,
    index_is_no_json, index_gone], ids=lambda f: f.__name__)
def test_broken_shards_are_refused(tmp_path, break_it):
    tensors = tensors_of(tiny_model())
    expected = break_it(write_checkpoint(tmp_path / "it", tensors, shards=2), tensors)
    line = refusal(load_model, tmp_path / "it")
    assert str(tmp_path) in line
    for word in expected:
        assert word in line


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    tensors = tensors_of(tiny_model("gemma", num_hidden_layers=1))
    return write_checkpoint(tmp_path_factory.mktemp("whole"), tensors,
                            tiny_raw("gemma", num_hidden_layers=1))


@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_harmless(whole, tmp_path, data):
    """Cut anywhere, or with bytes of the header changed: UserError, or all tensors as they were."""
    content = (whole / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, header) | st.integers(0, len(content) - 1)):]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(damaged)
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    try:
        loaded = load_model(tmp_path, torch.float32)
    except UserError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
        return
    for name, tensor in load_model(whole, torch.float32).named_parameters():
        assert loaded.get_parameter(name).shape == tensor.shape


@pytest.mark.parametrize("stored, dtype, head", [
    (torch.float32, torch.float32, False), (torch.float32, torch.bfloat16, False),
    (torch.bfloat16, torch.float32, False), (torch.bfloat16, torch.bfloat16, True)])
def test_one_copy_in_memory(tmp_path, stored, dtype, head):
    """The most memory that a load needs is that of the weights and a tenth more, the pages of a
    file that were mapped counted too; to see that a head is the embedding needs no more."""
    raw = tiny_raw(num_hidden_layers=1, vocab_size=200_000)
    with torch.device("meta"):
        model = Gemma(GemmaConfig.from_dict(raw))
    tensors = {checkpoint_name(name): torch.zeros(tensor.shape, dtype=stored)
               for name, tensor in model.state_dict().items()}
    if head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_checkpoint(tmp_path, tensors, raw)
    peak_memory()  # or there is nothing to measure with
    script = ("import sys, torch\nfrom test_weights import load_model, peak_memory\n"
              "load_model('nano', dtype := getattr(torch, sys.argv[2]))  # and what is made once\n"
              "before = peak_memory(reset=True)\n"
              "loaded = load_model(sys.argv[1], dtype)\n"
              "print(peak_memory() - before, sum(p.nbytes for p in loaded.parameters()))")
    # In a process of its own: this one has memory at hand that earlier tests have left.
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(dtype).removeprefix("torch.")],
        capture_output=True, text=True, check=True, env=os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    taken, size = map(int, done.stdout.split())
    assert 0.8 * size <= taken <= 1.1 * size + weights.BLOCK


def peak_memory(reset=False):
    """Most bytes that were in memory at once, from the latest reset on; after one, what is now."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        pytest.skip("needs Linux's account of a process's memory")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_a_file_that_ends_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """As where somebody writes over it: headers were whole, numbers are not there any more."""
    def match(*args):
        stored = real(*args)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        return stored

    real = weights._match
    monkeypatch.setattr(weights, "_match", match)
    for dtype in (torch.float32, torch.bfloat16):
        write_checkpoint(tmp_path, tensors_of(tiny_model()))
        assert "was written to while it was read" in refusal(load_model, tmp_path, dtype)
        with monkeypatch.context() as patch:  # nobody tells of it
            patch.setattr(weights, "unchanged", lambda *_: contextlib.nullcontext())
            write_checkpoint(tmp_path, tensors_of(tiny_model()))
            line = refusal(load_model, tmp_path, dtype)
            assert "model.safetensors: not a whole" in line and "ends within model." in line


# --- where a checkpoint comes from ----------------------------------------------------------------

def test_a_folder_is_itself(tmp_path):
    assert locate(tmp_path, ["config.json"]) == tmp_path
    assert locate(str(tmp_path), ["config.json"]) == tmp_path


def test_a_hub_id_is_a_snapshot_of_what_is_allowed(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, *, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate("google/gemma-2-2b-it", ("config.json", "*.model")) == tmp_path
    assert asked == {"name": "google/gemma-2-2b-it", "patterns": ["config.json", "*.model"]}


def test_a_model_loads_from_the_hubs_cache(tmp_path, monkeypatch):
    """There the files of a snapshot are links into blobs/."""
    write_checkpoint(tmp_path / "blobs", tensors_of(tiny_model()), shards=2)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    loaded = load_model("some/body", torch.float32)
    assert torch.equal(loaded.norm.weight, tiny_model().norm.weight)


def hub_error(name):
    kind = getattr(huggingface_hub.errors, name)
    error = kind.__new__(kind)  # their constructors want a response, which differs by release
    Exception.__init__(error, f"{name}: told by the hub\nand more")
    return error


@pytest.mark.parametrize("error, expected", [
    ("GatedRepoError", ["licence", "https://huggingface.co/google/gemma-2-2b-it", "HF_TOKEN",
                        "hf auth login"]),
    ("RepositoryNotFoundError", ["no such repository", "HF_TOKEN"]),
    ("HFValidationError", ["org/name"]),
    ("LocalEntryNotFoundError", ["could not be read", "online"]),
    ("OfflineModeIsEnabled", ["could not be read", "online"]),
    ("HfHubHTTPError", ["could not be read", "online"]),
])
def test_what_the_hub_refuses_is_told_in_one_line(monkeypatch, error, expected):
    def snapshot_download(*args, **kwargs):
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    line = refusal(load_model, "google/gemma-2-2b-it")
    assert line.startswith("google/gemma-2-2b-it: ")
    for word in expected:
        assert word in line
    assert ("licence" in line) == (error == "GatedRepoError")


@pytest.mark.parametrize("source", ["gemma", "", "/no/where", "./no/where", "~/gemma", "a/b/c",
                                    "org/", "/name", "../gemma"])
def test_what_is_no_folder_and_no_hub_id_never_asks_the_hub(monkeypatch, tmp_path, source):
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    assert "org/name" in refusal(locate, source, [])


def test_a_file_is_not_a_checkpoint(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/name").write_text("")
    assert "org/name" in refusal(locate, "org/name", [])
