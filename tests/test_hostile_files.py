"""Files of a model that somebody made to do harm: each loads right or is refused in one line.

Right is what an independent reader finds there: safetensors itself, `json`, SentencePiece. How the
cases are run, and what they may not do, is in hostile.py.
"""

import ast
import copy
import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import torch
from conftest import load_tokenizer, tiny_raw
from hostile import (
    Refused,
    attempt,
    flipped,
    hostile_file,
    hostile_json,
    survive,
)
from test_checkpoint import tuned, write_base

from minilora.checkpoint import adapter_base, export_merged, load_adapter, save_adapter
from minilora.config import (
    GemmaConfig,
    LoraConfig,
    TrainConfig,
    UserError,
    read_file,
    read_json,
    read_settings,
)
from minilora.files import FLOATS, read_tensors
from minilora.lora import adapted, trainable
from minilora.model import Gemma
from minilora.state import load_state, save_state
from minilora.tokenizer import Tokenizer
from minilora.trainer import make_optimizer
from minilora.weights import load_model, read_config

SMALL = dict(num_hidden_layers=2, hidden_size=8, intermediate_size=8, head_dim=4,
             num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base", "gemma2", **SMALL)


# --- safetensors ----------------------------------------------------------------------------------

def stored(tensors: dict) -> tuple[dict, bytes]:
    """The header of a safetensors file as an object, and the bytes that follow it."""
    data = safetensors.torch.save(tensors)
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + size]), data[8 + size:]


def laid_out(header: bytes, data: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def hostile_tensors(random: Random, header: dict, data: bytes) -> bytes:
    """A safetensors file that lies in its header, its sizes or its end."""
    header = json.loads(json.dumps(header))
    names = [name for name in header if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    part = header[name]
    start, end = part["data_offsets"]
    text = json.dumps(header).encode()
    huge = random.choice([2**31, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
                          10**9, 10**30])

    def change(**changes) -> bytes:
        header[name] = part | changes
        return laid_out(json.dumps(header).encode(), data)

    def twice() -> bytes:
        again = json.dumps({name: random.choice([part, header[other], {**part, "shape": [0]}])})
        pair = again[1:-1].encode()
        return laid_out(random.choice([b"{" + pair + b", " + text[1:],
                                       text[:-1] + b", " + pair + b"}"]), data)

    def without(more: bytes = b"") -> bytes:
        del header[name]
        return laid_out(json.dumps(header).encode(), data + more)

    def added(extra: dict, more: bytes = b"") -> bytes:
        return laid_out(json.dumps(header | extra).encode(), data + more)

    end_of_data = len(data)
    return random.choice([
        lambda: laid_out(text, data),
        lambda: laid_out(text + b" " * random.randint(0, 16), data),
        lambda: laid_out(text, data, random.choice(
            [0, 1, 7, len(text) - 1, len(text) + 1, len(text) + len(data) + 1, 10**8, 10**8 + 1,
             2**32, 2**63 - 1, 2**63, 2**64 - 1])),
        lambda: laid_out(text, data)[:random.randrange(16 + len(text) + len(data))],
        lambda: laid_out(text, data + bytes(random.choice([1, 4, 8, 4096]))),
        lambda: laid_out(text, bytes(random.choice([1, 8])) + data),
        lambda: change(data_offsets=header[other]["data_offsets"]),
        lambda: change(data_offsets=[start + 1, end], shape=[end - start - 1], dtype="U8"),
        lambda: change(data_offsets=[start, end - 4]),
        lambda: change(data_offsets=[start + 4, end + 4]),
        lambda: change(data_offsets=[end, start]),
        lambda: change(data_offsets=[start, huge]),
        lambda: change(data_offsets=[huge, huge]),
        lambda: change(data_offsets=[-4, end]),
        lambda: change(data_offsets=[float(start), float(end)]),
        lambda: change(data_offsets=random.choice([[], [start], [start, end, end], {}, None])),
        lambda: change(shape=[huge]),
        lambda: change(shape=[huge, huge]),
        lambda: change(shape=[huge, 0], data_offsets=[start, start]),
        lambda: change(shape=[0], data_offsets=[end, end]),
        lambda: change(shape=[], data_offsets=[start, start + 4]),
        lambda: change(shape=[1] * random.choice([2, 64, 65, 100_000])),
        lambda: change(shape=[*part["shape"], 1]),
        lambda: change(shape=[-1, -end + start]),
        lambda: change(shape=part["shape"][::-1]),
        lambda: change(dtype=random.choice(
            ["F64", "F16", "BF16", "I32", "U32", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4",
             "F6_E2M3", "C64", "float32", "", "f32", "\ud800"])),
        lambda: change(dtype=random.choice(["I32", "U32"])),
        lambda: change(more=1),
        lambda: added({random.choice(["x", "", "é\n", "model.", "y" * 5000, "__metadata__"]):
                       random.choice([part, {"dtype": "F32", "shape": [1],
                                             "data_offsets": [end_of_data, end_of_data + 4]}])},
                      random.choice([b"", bytes(4)])),
        lambda: added({f"z{n}": {"dtype": "F32", "shape": [0], "data_offsets": [
            end_of_data, end_of_data]} for n in range(random.choice([1, 300]))}),
        lambda: added({"__metadata__": random.choice([{"a": 1}, [], 7, {"a": "b\n"}, {"": ""}])}),
        lambda: without(),
        lambda: twice(),
        lambda: twice(),
        lambda: laid_out(hostile_json(random, header), data),
        lambda: laid_out(hostile_json(random, header), data),
        lambda: laid_out(text.replace(name[-3:].encode(), b"\xff\xfe\xfd"), data),
        lambda: flipped(random, laid_out(text, data), 0, 8),
        lambda: flipped(random, laid_out(text, data), 8, 8 + len(text)),
        lambda: flipped(random, laid_out(text, data)),
    ])()


def by_safetensors(path: Path) -> dict | None:
    """What the package itself reads, less what minilora refuses on top: a name that comes twice."""
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception:  # also what it raises for dtypes that torch lacks
        return None
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    pairs = json.loads(data[8:8 + size], object_pairs_hook=list)
    return tensors if len({key for key, _ in pairs}) == len(pairs) else None


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    theirs = theirs.to(ours.dtype)
    return ours.shape == theirs.shape and torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(
        ours.nan_to_num(), theirs.nan_to_num())


def test_weights(tmp_path, place, cases, tried):
    base = write_base(tmp_path / "base", "gemma", **SMALL | {"num_hidden_layers": 1})
    right = safetensors.torch.load_file(base / "model.safetensors")
    header, data = stored(right)
    config = (base / "config.json").read_bytes()

    def case(random, folder):
        (folder / "config.json").write_bytes(config)
        path = folder / "model.safetensors"
        path.write_bytes(hostile_tensors(random, header, data))
        loaded = attempt(load_model, folder, torch.float32, about=str(folder))
        theirs = by_safetensors(path)
        fits = theirs is not None and theirs.keys() == right.keys() and all(
            theirs[name].shape == right[name].shape and theirs[name].dtype in FLOATS.values()
            for name in right)
        assert fits == (not isinstance(loaded, Refused)), loaded
        if fits:
            for name, tensor in loaded.named_parameters():
                assert same(tensor, theirs[f"model.{name}"]), name
        return loaded

    count = cases(500, 4000)
    assert count / 100 < survive("weights", place, count, case) < count / 2
    tried("safetensors files, mutated", count)


def test_tensors(place, cases, tried):
    """As adapters and checkpoints are read: any names and shapes, those and no others."""
    def case(random, folder):
        shapes = {random.choice("abc") * n: random.choices([1, 2, 3, 5], k=random.randint(1, 3))
                  for n in range(1, random.randint(2, 4))}
        tensors = {name: torch.tensor(random.choices(range(100), k=1)).float().expand(shape).clone()
                   for name, shape in shapes.items()}
        path = folder / "adapter_model.safetensors"
        path.write_bytes(hostile_tensors(random, *stored(tensors)))
        read = attempt(read_tensors, path, shapes, "look again", about=str(path))
        theirs = by_safetensors(path)
        fits = theirs is not None and theirs.keys() == shapes.keys() and all(
            list(theirs[name].shape) == shapes[name] and theirs[name].dtype in FLOATS.values()
            for name in shapes)
        assert fits == (not isinstance(read, Refused)), read
        assert not fits or all(same(read[name], theirs[name]) for name in shapes)
        return read

    count = cases(4500, 20_000)
    assert count / 100 < survive("tensors", place, count, case) < count / 2
    tried("safetensors files, mutated", count)


# --- the index ------------------------------------------------------------------------------------

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def sharded(base, tmp_path_factory):
    """The base in two files."""
    folder = tmp_path_factory.mktemp("sharded")
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    shards = {ONE: sorted(tensors)[::2], TWO: sorted(tensors)[1::2]}
    for shard, names in shards.items():
        safetensors.torch.save_file({name: tensors[name] for name in names}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {}, "weight_map": {name: shard for shard in shards for name in shards[shard]}}))
    shutil.copy(base / "config.json", folder)
    return folder


def test_index(sharded, place, cases, tried):
    right = load_model(sharded, torch.float32).state_dict()
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    names = list(index["weight_map"])

    def case(random, folder):
        shutil.copytree(sharded, folder, dirs_exist_ok=True)
        outside = folder.parent / "outside"
        if not outside.exists():
            shutil.copytree(sharded, outside)
        path = folder / "model.safetensors.index.json"
        where = random.choice([
            f"../outside/{TWO}", f"{outside}/{TWO}", f"./{TWO}", f"x/../{TWO}", f"{TWO}/", "", ".",
            "..", f"..\\outside\\{TWO}", TWO.upper(), f"{TWO}\0", f"{TWO}\n", "~/" + TWO, ONE,
            "/dev/zero", "/dev/stdin", "config.json", "pytorch_model.bin", f"file://{outside}/{TWO}",
            f"https://example.com/{TWO}", ".safetensors", "a" * 300 + ".safetensors", "\ud800", 7,
            None, [TWO], {"a": TWO}, f"linked/{TWO}"])
        how = random.randrange(6)
        if how == 0:  # one tensor lies elsewhere
            path.write_text(json.dumps({"weight_map": index["weight_map"] | {
                random.choice(names): where}}))
        elif how == 1:  # a whole shard does
            path.write_text(json.dumps({"weight_map": {
                name: where if shard == TWO else shard
                for name, shard in index["weight_map"].items()}}))
        elif how == 2:
            hostile_file(random, folder / random.choice([ONE, TWO, path.name, "config.json"]))
        elif how == 3:  # one tensor in two shards
            tensors = safetensors.torch.load_file(folder / TWO)
            name = random.choice(names)
            tensors[name] = torch.zeros(3)
            safetensors.torch.save_file(tensors, folder / TWO)
        elif how == 4:  # two names of one file
            (folder / TWO).unlink()
            (folder / TWO).symlink_to(ONE)
        else:
            path.write_bytes(hostile_json(random, index))
        loaded = attempt(load_model, folder, torch.float32, about=str(folder))
        if not isinstance(loaded, Refused):
            assert all(path.resolve().is_relative_to(folder) for path in folder.iterdir())
            for name, tensor in loaded.named_parameters():
                assert torch.equal(tensor, right[name])
        return loaded

    count = cases(400, 2000)
    assert count / 100 < survive("index", place, count, case) < count / 2
    tried("index files, mutated; links, pipes and devices as shards", count)


# --- config.json ----------------------------------------------------------------------------------

def configs() -> list[dict]:
    """A config.json of every family, in its old and its new keys, and of an image-text model."""
    text = tiny_raw("gemma3_text", **SMALL, sliding_window_pattern=2, rope_theta=1e6,
                    rope_local_base_freq=1e4)
    new = {**text, "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    return [tiny_raw("gemma", **SMALL), tiny_raw("gemma2", **SMALL, attn_logit_softcapping=50.0,
                                                 final_logit_softcapping=None),
            text, new, {"model_type": "gemma3", "text_config": new, "vision_config": {}}]


def test_config(base, place, cases, tried):
    """What is accepted is the shape of a model that runs, and its numbers are those of the file."""
    raws, ids = configs(), torch.zeros(1, 5, dtype=torch.long)
    whole = json.loads((base / "config.json").read_text())

    def case(random, folder):
        path = folder / "config.json"
        if random.random() < 0.02:
            path.write_text(json.dumps(whole))
            hostile_file(random, path)
        else:
            path.write_bytes(hostile_json(random, random.choice(raws)))
        config = attempt(read_config, folder, about=str(path))
        if isinstance(config, Refused):
            return config
        raw = json.loads(path.read_text())
        raw = raw.get("text_config", raw)
        for key, value in dataclasses.asdict(config).items():
            assert type(value) in (int, float, str, tuple, type(None))
            if raw.get(key) is not None and not key.startswith("rope_"):
                assert raw[key] == (list(value) if isinstance(value, tuple) else value) or (
                    value is None)
        assert len(config.layer_types) == config.num_hidden_layers <= 256
        sizes = (config.vocab_size, config.hidden_size, config.intermediate_size,
                 config.num_attention_heads * config.head_dim)
        if max(sizes) < 10_000 and random.random() < 0.2:
            with torch.device("meta"):
                model = Gemma(config)
            with torch.no_grad():
                assert model.to_empty(device="cpu")(ids).shape == (1, 5, config.vocab_size)
        if random.random() < 0.2:  # the weights are of one shape: another takes no memory
            shutil.copy(base / "model.safetensors", folder)
            attempt(load_model, folder, torch.float32, about=str(folder))
        return config

    count = cases(2500, 10_000)
    assert count / 50 < survive("config", place, count, case) < count / 2
    tried("config.json, mutated", count)


@pytest.mark.parametrize("change", [
    dict(num_hidden_layers=10**9), dict(num_hidden_layers=-1), dict(vocab_size=10**12),
    dict(hidden_size=2**31), dict(head_dim=10**400), dict(head_dim=True),
    dict(rms_norm_eps=10**400), dict(rope_theta=10**400), dict(layer_types=[[]] * 2),
    dict(rope_scaling=[1]), dict(sliding_window_pattern=0), dict(rope_parameters={
        "full_attention": 7})], ids=" ".join)
def test_a_config_names_the_key_that_is_absurd(change):
    with pytest.raises(UserError, match=rf"^here: .*{[*change][-1]}|full_attention"):
        GemmaConfig.from_dict(tiny_raw("gemma3_text", **SMALL) | change, "here")


# --- settings and generation_config.json ----------------------------------------------------------

def test_settings(place, cases, tried):
    """--config, a recipe, and the config.json of a run that is resumed."""
    whole = {**dataclasses.asdict(LoraConfig()), **dataclasses.asdict(TrainConfig())}

    def case(random, folder):
        path = folder / "recipe.json"
        path.write_bytes(hostile_json(random, dict(random.sample([*whole.items()], 8))))
        read = attempt(read_settings, path, LoraConfig, TrainConfig, about=str(path))
        if not isinstance(read, Refused):
            for key, value in read.items():
                assert type(value) is type(whole[key])
                assert not isinstance(value, tuple) or all(type(word) is str for word in value)
            for cls in (LoraConfig, TrainConfig):
                cls(**{field.name: read[field.name] for field in dataclasses.fields(cls)
                       if field.name in read})
            raw = json.loads(path.read_text())
            assert read.keys() == raw.keys() and all(
                json.loads(json.dumps(read[key])) == raw[key] for key in raw if key != "recompute")
        return read

    count = cases(3000, 10_000)
    assert count / 50 < survive("settings", place, count, case) < count / 2
    tried("settings (--config), mutated", count)


# --- the tokenizer --------------------------------------------------------------------------------

def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def part(number: int, value: bytes | int | float) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def hostile_sentencepiece(random: Random, data: bytes) -> bytes:
    """A tokenizer.model with odd pieces, odd settings, or other bytes."""
    def piece(text: bytes = b"zzz", score: float = -1.0, kind: int = 1) -> bytes:
        return part(1, part(1, text) + part(2, score) + part(3, kind))

    at = random.randrange(len(data))
    number = random.choice([0, 1, 2, 3, 5, 255, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1, 2**70])
    junk = bytes(random.choices(range(256), k=random.choice([0, 1, 4, 8, 64, 1024, 1028])))
    # A table that maps characters: its size, a trie of 32-bit units, then the texts they become.
    trie = struct.pack("<I", random.choice([4, 1024, len(junk), 2**31])) + junk
    field = random.choice([1, 2, 3, 4, 5, 6, 7, 10, 24, 35, 36, 40, 41, 42, 43, 44, 45, 46, 99])
    value = random.choice([number, junk, b"x", float("nan"), 1.0])
    return random.choice([
        lambda: data,
        lambda: data[:at],
        lambda: data[:at] + junk + data[at:],
        lambda: data[:at] + data[at + random.choice([1, 2, 8, 1000]):],
        lambda: flipped(random, data),
        lambda: flipped(random, data),
        lambda: flipped(random, data, 0, 200),
        lambda: flipped(random, data, len(data) - 400),  # the settings come last
        lambda: flipped(random, data, len(data) - 400),
        lambda: piece(random.choice([b"", b"\0", b"\xff", b"a" * 10_000, b"<unk>", b"<pad>", b" ",
                                     "▁".encode(), b"<0x41>", b"<0xZZ>", b"\n", b"<zzz>"]),
                      random.choice([0.0, -1.0, 1e38, float("nan"), float("inf"), -float("inf")]),
                      random.choice([0, 1, 2, 3, 4, 5, 6, 7, 2**31, 2**63])) + data,
        lambda: data + piece(random.choice([b"", b"\xff", b"zz", b"<unk>", b"<zzz>", b"a\0",
                                            b"a" * 999]),
                             random.choice([float("nan"), float("inf"), 0.0]),
                             random.choice([0, 1, 2, 3, 4, 5, 6, 7, 2**40])),
        lambda: data + b"".join(piece(b"q%d" % n) for n in range(random.choice([1, 100]))),
        lambda: data + part(2, part(field, value)),  # the trainer's settings
        lambda: data + part(2, part(3, random.choice([1, 2, 3, 4, 5, 9]))),  # unigram, bpe …
        lambda: data + part(3, part(2, random.choice([junk, trie, trie]))),
        lambda: data + part(5, part(2, random.choice([junk, trie]))),
        lambda: data + part(3, part(field, value)),
        lambda: data + part(field, value),
        lambda: data + part(4, part(1, part(1, b"a" * 100) + part(2, b"b"))),
        lambda: data + part(1, b""),
        lambda: data + varint(1 << 3 | 2) + varint(random.choice([2**31, 2**63, 2**64 - 1])),
        lambda: data + b"\x80" * random.choice([1, 10, 100_000]),
        lambda: data + b"\x0b" * random.choice([1, 100, 100_000]),  # groups in groups
        lambda: data * 2,
    ])()


TEXTS = ["weather ▁ é", "<end_of_turn> <b> 12\n\n\n  x", "\0 \t 𝕏 <0x41>", "a" * 300]


def check_tokenizer(tokenizer: Tokenizer) -> None:
    named = {i for token, i in tokenizer._ids.items()} | set(tokenizer.stop_ids)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids) and not named.intersection(ids)
    for token in tokenizer._ids:
        token.encode()
        assert tokenizer.decode([tokenizer.token_id(token)]) == token
    assert tokenizer.token_id("<end_of_turn>") == tokenizer.end_of_turn
    assert tokenizer.decode([tokenizer.end_of_turn]) == "<end_of_turn>"


def test_tokenizer_model(base, place, cases, tried):
    data = (base / "tokenizer.model").read_bytes()

    def case(random, folder):
        path = folder / "tokenizer.model"
        path.write_bytes(hostile_sentencepiece(random, data))
        if random.random() < 0.02:
            hostile_file(random, path)
        tokenizer = attempt(Tokenizer.load, folder, about=str(path))
        if not isinstance(tokenizer, Refused):
            check_tokenizer(tokenizer)
        return tokenizer

    count = cases(600, 4000)
    assert count / 50 < survive("tokenizer.model", place, count, case) < count * 0.8
    tried("tokenizer.model, mutated", count)


def test_tokenizer_files(base, place, cases, tried):
    """tokenizer_config.json, tokenizer.json and the template: read, and written again."""
    model = (base / "tokenizer.model").read_bytes()
    tokenizer = load_tokenizer(base / "tokenizer.model")
    saved = base.parent / "saved"
    tokenizer.save(saved, "{{ bos_token }}")
    config = json.loads((saved / "tokenizer_config.json").read_text())
    few = dict([*config["added_tokens_decoder"].items()][-12:])
    tokens = [{"id": int(i), **token} for i, token in few.items()]
    old = {"model": {"type": "BPE", "vocab": {"<pad>": 0, "a": 300}, "merges": []},
           "added_tokens": [token for token in tokens if token["id"] < 512]}
    old["added_tokens"].append({"id": 512, "content": "<image_soft_token>", "special": True})
    files = {"tokenizer_config.json": config | {"added_tokens_decoder": few},
             "tokenizer.json": old}

    def case(random, folder):
        name = random.choice([*files])
        own = name == "tokenizer_config.json"
        (folder / "tokenizer.model").write_bytes(
            (saved / "tokenizer.model").read_bytes() if own else model)
        path = folder / name
        path.write_bytes(hostile_json(random, files[name]))
        template = folder / "chat_template.jinja"
        if random.random() < 0.2:
            template.write_text("{{ x }}")
            hostile_file(random, random.choice([path, template]))
        tokenizer = attempt(Tokenizer.load, folder, about=str(folder))
        if isinstance(tokenizer, Refused):
            return tokenizer
        check_tokenizer(tokenizer)
        if random.random() < 0.7 and not os.path.lexists(template):
            return tokenizer
        out = folder.parent / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        refused = attempt(tokenizer.save, out, about=str(folder), writes=out)
        if isinstance(refused, Refused):
            assert not [*out.iterdir()]
            return refused
        again = Tokenizer.load(out)
        assert again._ids == tokenizer._ids
        return tokenizer

    count = cases(300, 2000)
    assert count / 50 < survive("tokenizer files", place, count, case) < count * 0.8
    tried("tokenizer_config.json and tokenizer.json, mutated", count)


# --- adapters -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Adapters as minilora and as peft write them: with rows and without, their names as a list."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, settings in {"plain": {}, "patterns": dict(rank_pattern=("o_proj=2",), dora=True)
                           }.items():
        model, tokenizer = tuned(base, "append" if name == "plain" else None,
                                 targets=("q_proj", "o_proj"), **settings)
        save_adapter(model, tokenizer, folder / name, str(base))
    peft = shutil.copytree(folder / "plain", folder / "peft")
    (peft / "minilora.json").unlink()
    config = json.loads((peft / "adapter_config.json").read_text())
    (peft / "adapter_config.json").write_text(json.dumps(config | {
        "target_modules": ["q_proj", "o_proj"], "layers_pattern": None, "auto_mapping": None,
        "peft_version": "0.21.0", "bias": "none", "modules_to_save": None}))
    return folder


def test_adapters(base, adapters, place, cases, tried):
    model, tokenizer = load_model(base, torch.float32), Tokenizer.load(base)
    names = [path.name for path in adapters.iterdir()]

    def case(random, folder):
        name = random.choices(names, [0.1 if name == "patterns" else 1 for name in names])[0]
        for file in ("adapter_config.json", "minilora.json", "adapter_model.safetensors"):
            if (adapters / name / file).exists():
                shutil.copy(adapters / name / file, folder)
        path = folder / random.choice(sorted(path.name for path in folder.iterdir()))
        if random.random() < 0.05:
            hostile_file(random, path)
        elif path.suffix == ".json":
            path.write_bytes(hostile_json(random, json.loads(path.read_text())))
        else:
            tensors = safetensors.torch.load_file(path)
            path.write_bytes(hostile_tensors(random, *stored(tensors)))
        inside = Path(os.path.realpath(path)).is_relative_to(folder)
        ours, words = copy.deepcopy(model), copy.copy(tokenizer)
        for kept in ("_pieces", "_ids", "_added", "_control", "new_tokens", "_forgotten"):
            setattr(words, kept, copy.copy(getattr(tokenizer, kept)))
        attempt(adapter_base, folder, about=str(folder))
        done = attempt(load_adapter, ours, words, folder, about=str(folder))
        if isinstance(done, Refused):
            assert not adapted(ours) and ours.embed_tokens.rows is None
            return done
        assert inside
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        for name, module in adapted(ours).items():
            for key in ("lora_A", "lora_B"):
                assert same(getattr(module, key),
                            tensors[f"base_model.model.model.{name}.{key}.weight"])
        rows = ours.embed_tokens.num_embeddings
        assert all(0 <= i < rows for i in words.new_tokens.values())
        with torch.no_grad():
            assert ours(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, rows)
        return done

    count = cases(400, 2000)
    assert count / 50 < survive("adapters", place, count, case) < count * 0.8
    tried("adapters (adapter_config.json, minilora.json, tensors), mutated", count)


@pytest.mark.parametrize("change", [
    dict(lora_alpha=10**400), dict(r=True), dict(use_dora="false"), dict(use_rslora=1),
    dict(rank_pattern={"o_proj": "x=4"}), dict(alpha_pattern=[1]), dict(target_modules="("),
    dict(layers_to_transform=[0], layers_pattern="(x)?layers")], ids=" ".join)
def test_an_adapter_names_the_key_that_is_absurd(base, adapters, tmp_path, change):
    folder = shutil.copytree(adapters / "peft", tmp_path / "it")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=f"adapter_config.json: .*{[*change][-1]}"):
        load_adapter(load_model(base, torch.float32), Tokenizer.load(base), folder)


@pytest.mark.parametrize("change", [
    dict(target_modules="(.*)*(.*)*(.*)*!"), dict(exclude_modules=r"(\w+\.?)+!"),
    dict(layers_to_transform=[0], layers_pattern="(.*)*(.*)*"),
    dict(rank_pattern={"(.*)*(.*)*(.*)*!": 4})], ids=" ".join)
def test_expressions_that_take_years_are_refused(base, adapters, place, change):
    """In a second of the processor, which is not this process's."""
    config = json.loads((adapters / "peft" / "adapter_config.json").read_text())

    def case(random, folder):
        shutil.copytree(adapters / "peft", folder, dirs_exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        line = attempt(load_adapter, load_model(base, torch.float32), Tokenizer.load(base), folder,
                       about=str(folder / "adapter_config.json"))
        assert isinstance(line, Refused)
        return line

    assert survive("expressions", place, 1, case) == 0


# --- checkpoints ----------------------------------------------------------------------------------

def test_checkpoints(base, place, cases, tried):
    """A refused one changes neither model nor optimizer nor random numbers."""
    model, _ = tuned(base, "append", targets=("q_proj",))
    optimizer = make_optimizer(model, TrainConfig())
    for parameter in trainable(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    start = {"step": 0, "tokens": 0, "seconds": 0.0, "best": None, "made_from": {
        "settings": {"lr": 0.1, "targets": ["all"]}, "tokenizer": "a",
        "files": [{"name": "a.jsonl", "rows": 2, "content": "b", "order": "c", "tokens": "d"}]}}
    written = save_state(base.parent / "checkpoints", 3, model, optimizer,
                         start | {"step": 3, "tokens": 54, "seconds": 0.5, "best": 0.1})
    state, whole = (json.loads((written / "state.json").read_text()),
                    (written / "state.safetensors").read_bytes())
    header, data = stored(safetensors.torch.load_file(written / "state.safetensors"))

    def snapshot():
        moments = [(key, value.clone() if isinstance(value, torch.Tensor) else value)
                   for state in optimizer.state.values() for key, value in state.items()]
        return ({name: p.detach().clone() for name, p in trainable(model).items()}, moments,
                torch.get_rng_state(), str(optimizer.param_groups[0]["lr"]))

    def case(random, folder):
        there = folder / "step-000003"
        shutil.copytree(written, there)
        how = random.random()
        if how < 0.05:
            hostile_file(random, there / random.choice(["state.json", "state.safetensors"]))
        elif how < 0.55:
            (there / "state.json").write_bytes(hostile_json(random, state))
        else:
            (there / "state.safetensors").write_bytes(hostile_tensors(random, header, data))
        before = snapshot()
        done = attempt(load_state, folder, model, optimizer, start,
                       about=str(folder.parent))
        after = snapshot()
        if isinstance(done, Refused):
            for a, b in zip(before[0].values(), after[0].values(), strict=True):
                assert same(a, b)
            assert len(before[1]) == len(after[1])
            assert torch.equal(before[2], after[2]) and before[3] == after[3]
            return done
        assert all(path.resolve().is_relative_to(there) for path in there.iterdir())
        assert done["step"] == 3 and done["tokens"] + done["seconds"] + (done["best"] or 0) >= 0
        tensors = safetensors.torch.load_file(there / "state.safetensors")
        for name, parameter in trainable(model).items():
            assert same(parameter.detach(), tensors[f"model.{name}"])
        assert (there / "state.safetensors").read_bytes() == whole
        optimizer.step()  # what was put in place can be gone on with
        return done

    count = cases(400, 3000)
    assert count / 50 < survive("checkpoints", place, count, case) < count * 0.8
    tried("checkpoints (state.json, state.safetensors), mutated", count)


@pytest.mark.parametrize("random_state", [None, torch.zeros(5056, dtype=torch.uint8)])
def test_a_checkpoint_without_random_numbers_changes_nothing(base, tmp_path, random_state):
    model, _ = tuned(base, None, targets=("q_proj",))
    optimizer = make_optimizer(model, TrainConfig())
    path = save_state(tmp_path, 3, model, optimizer, {})
    tensors = safetensors.torch.load_file(path / "state.safetensors")
    state = json.loads((path / "state.json").read_text())
    del tensors["rng.cpu"], state["shapes"]["rng.cpu"]
    if random_state is not None:
        tensors["rng.cpu"], state["shapes"]["rng.cpu"] = random_state, [5056]
    safetensors.torch.save_file(tensors, path / "state.safetensors")
    state["sha256"] = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest()
    (path / "state.json").write_text(json.dumps(state))
    next(iter(trainable(model).values())).data.fill_(7.0)
    before = torch.get_rng_state()
    with pytest.raises(UserError, match="random state"):
        load_state(tmp_path, model, optimizer)
    assert torch.equal(torch.get_rng_state(), before)
    assert (next(iter(trainable(model).values())) == 7.0).all()


# --- files that are none --------------------------------------------------------------------------

def test_what_is_no_plain_file_is_refused_before_it_is_opened(tmp_path):
    """A pipe that nobody writes to would be waited for; a device never ends."""
    pipe, endless, itself = (tmp_path / name for name in ("pipe", "endless", "itself"))
    os.mkfifo(pipe)
    endless.symlink_to("/dev/zero")
    itself.symlink_to("itself")
    for path in (pipe, endless, itself, tmp_path, tmp_path / "none", tmp_path / "a\0b"):
        for read in (read_json, read_file, lambda path: read_tensors(path, {}, "look again")):
            with pytest.raises(UserError, match=f"^{re.escape(str(path))}: ") as caught:
                read(path)
            assert "no plain file" in str(caught.value) or path not in (pipe, endless, tmp_path)


def test_only_the_file_that_the_user_named_may_lie_elsewhere(tmp_path):
    (tmp_path / "there" / "within").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "a.json").write_text("{}")
    outside, within = tmp_path / "here" / "a.json", tmp_path / "there" / "within.json"
    outside.symlink_to("../there/a.json")
    (tmp_path / "there" / "within" / "b.json").write_text("{}")
    within.symlink_to("within/b.json")
    with pytest.raises(UserError, match="a link that leaves the folder"):
        read_json(outside)
    assert read_json(within) == {} == read_settings(outside, LoraConfig)
    snapshot = tmp_path / "snapshots" / "abc"  # the hub's cache
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "hash").write_text("{}")
    (snapshot / "a.json").symlink_to("../../blobs/hash")
    assert read_json(snapshot / "a.json") == {}
    (snapshot / "b.json").symlink_to("../../there/a.json")
    with pytest.raises(UserError, match="a link that leaves the folder"):
        read_json(snapshot / "b.json")


def test_a_file_of_holes_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 2**40)  # bytes that take no disk
    with pytest.raises(UserError, match="1099511627776 bytes"):
        read_json(path)


def test_an_error_is_one_line_of_bounded_length():
    assert str(UserError("a\nb\r\nc\u2028d")) == r"a\nb\nc\nd"
    line = str(UserError("file: " + "x" * 10**6 + "; do this"))
    assert len(line) < 2000 and line.startswith("file: ") and line.endswith("; do this")


# --- what else an export reads --------------------------------------------------------------------

def test_generation_config(base, place, cases, tried):
    """And the fields of config.json that minilora does not know: exported as they were, or not."""
    model, tokenizer = load_model(base, torch.float32), Tokenizer.load(base)
    files = {"generation_config.json": {"top_k": 64, "eos_token_id": [1, 107], "a": {"b": "é"}},
             "config.json": json.loads((base / "config.json").read_text()) | {
                 "initializer_range": 0.02, "architectures": ["X"], "dtype": "float32"}}

    def case(random, folder):
        for name, value in files.items():
            (folder / name).write_text(json.dumps(value))
        name = random.choice([*files])
        if random.random() < 0.1:
            hostile_file(random, folder / name)
        else:
            (folder / name).write_bytes(hostile_json(random, files[name]))
        out = folder.parent / "merged"
        shutil.rmtree(out, ignore_errors=True)
        done = attempt(export_merged, model, tokenizer, folder, out, about=str(folder),
                       writes=folder.parent)
        if isinstance(done, Refused):
            assert not out.exists()
            return done
        path = folder / "generation_config.json"
        raw = json.loads(path.read_text()) if path.exists() else {}
        assert json.loads((out / path.name).read_text()).keys() >= raw.keys()
        return done

    count = cases(200, 1000)
    assert count / 50 < survive("generation_config.json", place, count, case) < count * 0.8
    tried("generation_config.json and config.json of an export, mutated", count)


# --- no code --------------------------------------------------------------------------------------

FORBIDDEN = {"eval", "exec", "compile()", "__import__", "pickle", "cPickle", "dill", "marshal",
             "shelve", "trust_remote_code=", "torch.load", "import_module", "joblib", "numpy.load"}


def names_of(tree: ast.AST) -> set[str]:
    """Every name that code calls, imports or passes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(f"{node.func.id}()")
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            found.add(f"{owner}.{node.attr}")
        elif isinstance(node, ast.keyword):
            found.add(f"{node.arg}=")
    return found


def test_no_code_reads_code():
    root = Path(__file__).parents[1]
    for path in [*(root / "minilora").rglob("*.py"), root / "train.py", root / "infer.py"]:
        found = names_of(ast.parse(path.read_text())) & FORBIDDEN
        assert not found, f"{path}: {found}"


def test_code_in_a_model_folder_is_never_run(base, adapters, tmp_path):
    """Pickled weights, a modeling file that the config points to, a sitecustomize: none leaves its
    mark, neither from the folder itself nor from the working directory."""
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w').write('was here')"

    class Mark:
        def __reduce__(self):
            return (exec, (code,))

    for source in (base, adapters / "peft"):
        folder = shutil.copytree(source, tmp_path / source.name)
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.pt"):
            (folder / name).write_bytes(pickle.dumps(Mark()))
        for name in ("modeling_x.py", "sitecustomize.py", "tokenization_x.py", "torch.py",
                     "sentencepiece.py", "__init__.py"):
            (folder / name).write_text(code)
        for name in ("config.json", "tokenizer_config.json", "adapter_config.json"):
            if (folder / name).exists():
                raw = json.loads((folder / name).read_text())
                auto = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "x.Y"}}
                raw |= {"auto_mapping": auto} if name.startswith("adapter") else auto
                (folder / name).write_text(json.dumps(raw | (
                    {"target_modules": ".*(q_proj|o_proj)"} if name.startswith("adapter") else {})))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "base")  # the child that matches expressions starts here
        model, tokenizer = load_model(".", torch.float32), Tokenizer.load(".")
        load_adapter(model, tokenizer, tmp_path / "peft")
    assert len(adapted(model)) == 4
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled"):
        load_model(tmp_path / "base")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        load_adapter(load_model(base), Tokenizer.load(base), tmp_path / "peft")
    assert not mark.exists()
