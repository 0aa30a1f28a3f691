"""Checkpoints: what is written is read back by minilora, peft and transformers; never half."""

import contextlib
import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import difference, tiny_model, tiny_raw
from make_references import COLUMNS, PEFT_ADAPTERS, reference_ids, stored
from safetensors.torch import load_file, save_file
from test_weights import peak_memory
from tiny_tokenizer import make_tokenizer_model

from minilora import checkpoint, lora
from minilora.chat import Conversation, Message, ToolCall, chat_template, render
from minilora.checkpoint import (
    adapter_base,
    compare_logits,
    export_extended,
    export_merged,
    fingerprint,
    load_adapter,
    open_model,
    save_adapter,
)
from minilora.config import FAMILIES, LINEARS, LoraConfig, UserError
from minilora.data import Example
from minilora.dialects import DIALECTS
from minilora.lora import adapted, attach, merge, trainable
from minilora.state import latest_state, load_state, save_state
from minilora.tokenizer import Tokenizer
from minilora.weights import load_model

TOKENS = list(DIALECTS["hermes"].tokens)
IDS = torch.arange(20).reshape(2, 10) * 23 % 512


def write_base(folder, family="gemma2", seed=0, dtype=torch.float32, **raw):
    """A base in the hub's layout: random weights, config, tokenizer."""
    folder.mkdir(parents=True)
    model = tiny_model(family, seed, dtype, **raw)
    save_file({"model." + name: tensor for name, tensor in model.state_dict().items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tiny_raw(family, **raw)))
    (folder / "generation_config.json").write_text('{"top_k": 64, "eos_token_id": 1}')
    make_tokenizer_model(folder)
    return folder


def tuned(base, mode="append", dtype=torch.float32, seed=1, **settings):
    """The base with an adapter as training might leave it: B not zero, rows moved."""
    model, tokenizer = load_model(base, dtype), Tokenizer.load(base)
    attach(model, LoraConfig(**{"rank": 4, "alpha": 8.0, **settings}), seed)
    generator = torch.Generator().manual_seed(seed)
    if mode:
        ids = tokenizer.add_tokens(TOKENS, mode)
        model.embed_tokens.add_rows(ids, torch.randn(len(ids), model.config.hidden_size,
                                                     generator=generator))
    for module in adapted(model).values():
        module.lora_B.data.normal_(0.0, 0.2, generator=generator)
        if module.lora_magnitude is not None:
            module.lora_magnitude.data *= 1 + 0.2 * torch.rand(len(module.weight),
                                                               generator=generator)
    return model, tokenizer


def fresh(base, dtype=torch.float32):
    return load_model(base, dtype), Tokenizer.load(base)


def with_new(ids, model):
    """The same ids with some of the model's new tokens among them."""
    ids = ids.clone()
    if model.embed_tokens.rows is not None:
        rows = model.embed_tokens.row_ids
        ids[:, 2:2 + len(rows)] = rows[:8]
    return ids


@torch.no_grad()
def logits(model, ids):
    out = model(ids)
    return (out if isinstance(out, torch.Tensor) else out.logits).float()


def assert_close(a, b, limit=1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= limit * b.abs().max()


def refusal(call, *args, **kwargs):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def adapter(base, tmp_path):
    """A saved adapter, with rows appended."""
    save_adapter(*tuned(base), tmp_path / "adapter", str(base))
    return tmp_path / "adapter"


# --- adapters: minilora to minilora ---------------------------------------------------------------

@pytest.mark.parametrize("mode", ["append", "reserved", None])
@pytest.mark.parametrize("settings", [
    {}, {"rslora": True, "targets": ("layers.[13].mlp.*",)},
    {"dora": True, "rank_pattern": ("down_proj=2",), "alpha_pattern": ("layers.2.*=3.5",)}])
def test_an_adapter_comes_back_bit_for_bit(base, tmp_path, mode, settings):
    model, tokenizer = tuned(base, mode, **settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_adapter(model, tokenizer, tmp_path / "run/adapter", str(base), "mistral")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    for folder in (tmp_path / "run", tmp_path / "run/adapter"):
        other, words = fresh(base)
        assert load_adapter(other, words, folder) == {"dialect": "mistral", "base": str(base)}
        assert adapter_base(folder) == str(base)
        assert trainable(other).keys() == trainable(model).keys()
        assert other.state_dict().keys() == before.keys()
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert words.new_tokens == tokenizer.new_tokens
        ids = with_new(IDS, model)
        assert torch.equal(logits(other, ids), logits(model, ids))


def test_the_files_say_what_peft_expects(base, tmp_path):
    model, tokenizer = tuned(base, targets=("q_proj", "layers.0.mlp.up_proj"), dropout=0.1)
    save_adapter(model, tokenizer, tmp_path / "a", "org/base")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config | {"target_modules": None} == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base",
        "inference_mode": True, "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none",
        "rank_pattern": {}, "alpha_pattern": {},
        "target_modules": None, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
        "modules_to_save": None, "init_lora_weights": True,
        "trainable_token_indices": {"embed_tokens": list(range(512, 512 + len(TOKENS)))}}
    assert type(config["lora_alpha"]) is int
    assert sorted(config["target_modules"]) == ["model.layers.0.mlp.up_proj", "q_proj"]
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    prefix = "base_model.model.model."
    assert tensors.keys() == {
        f"{prefix}{module}.lora_{key}.weight" for key in "AB"
        for module in ["layers.0.mlp.up_proj", *(f"layers.{i}.self_attn.q_proj" for i in range(4))]
    } | {prefix + "embed_tokens.token_adapter.trainable_tokens_delta"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert Tokenizer.load(tmp_path / "a").new_tokens == tokenizer.new_tokens


def test_a_bfloat16_base_keeps_float32_masters_and_its_fingerprint(base, tmp_path):
    model, tokenizer = tuned(base, dtype=torch.bfloat16)
    save_adapter(model, tokenizer, tmp_path / "a", str(base))
    for dtype in (torch.bfloat16, torch.float32):
        other, words = fresh(base, dtype)
        load_adapter(other, words, tmp_path / "a")
        for name, parameter in trainable(other).items():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, trainable(model)[name])


def test_a_base_with_one_other_row_is_another(base):
    """As one whose rows of new tokens were trained is: in the middle of no tensor that is looked at
    from its start only.
    """
    model = load_model(base)
    first = fingerprint(model)
    assert fingerprint(load_model(base, torch.bfloat16)) == first
    for parameter in model.parameters():
        with torch.no_grad():
            for some in (parameter[-1:], parameter.view(len(parameter), -1)[20:, 1:]):
                if some.numel():
                    kept = some.clone()
                    some += 1
                    assert fingerprint(model) != first
                    some.copy_(kept)
    assert fingerprint(model) == first


def test_files_are_as_readable_as_any_other(adapter):
    plain = adapter / "plain"
    plain.write_text("")
    assert {path.stat().st_mode for path in adapter.iterdir()} == {plain.stat().st_mode}


def test_a_merged_or_plain_model_has_no_adapter_to_save(base, tmp_path):
    model, tokenizer = tuned(base)
    merge(model)
    assert "is merged" in refusal(save_adapter, model, tokenizer, tmp_path / "a", "b")
    assert "no adapter" in refusal(save_adapter, *fresh(base), tmp_path / "a", "b")
    model, tokenizer = tuned(base, mode=None)
    tokenizer.add_tokens(TOKENS)
    assert "has id 512" in refusal(save_adapter, model, tokenizer, tmp_path / "a", "b")
    assert not (tmp_path / "a").exists()


# --- adapters: what is refused --------------------------------------------------------------------

NAME = "base_model.model.model.layers.2.mlp.up_proj.lora_{}.weight".format
DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("edit, complaint", [
    (lambda t: t.pop(NAME("B")), f"lacks {NAME('B')}"),
    (lambda t: t.pop(DELTA), f"lacks {DELTA}"),
    (lambda t: t.update({NAME("C"): torch.ones(1)}), f"unexpected {NAME('C')}"),
    (lambda t: t.update({NAME("A"): torch.ones(4, 5)}), f"{NAME('A')} has shape [4, 5]"),
    (lambda t: t.update({DELTA: t[DELTA][1:].clone()}), f"{DELTA} has shape"),
])
def test_tensors_must_be_exactly_those(base, adapter, edit, complaint):
    edit_tensors(adapter / "adapter_model.safetensors", edit)
    model, tokenizer = fresh(base)
    line = refusal(load_adapter, model, tokenizer, adapter)
    assert complaint in line and "adapter_model.safetensors" in line
    assert not adapted(model) and model.embed_tokens.rows is None
    assert not tokenizer.new_tokens


@pytest.mark.parametrize("change", [
    {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"lora_bias": True},
    {"rank_pattern": {"q_proj": 2.5}}, {"rank_pattern": ["q_proj"]},
    {"alpha_pattern": {"q_proj": "x"}}, {"alpha_pattern": {"(": 1}},
    {"alora_invocation_tokens": [3]}, {"layer_replication": [[0, 2]]},
    {"peft_type": "IA3"}, {"init_lora_weights": "pissa"}, {"layers_to_transform": [9]},
    {"target_modules": ["embed_tokens"]}, {"target_modules": "("}, {"target_modules": None},
    {"target_modules": [3]}, {"target_modules": ["roj"]}, {"r": 0}, {"r": 4.0},
    {"lora_alpha": None}, {"lora_dropout": 2},
    {"trainable_token_indices": {"lm_head": [1]}}, {"trainable_token_indices": [511, 512]},
    {"trainable_token_indices": [7, 7]}, {"trainable_token_indices": [-1]},
    {"trainable_token_indices": ["7"]},
    {"some_key_of_next_year": 1},
])
def test_what_cannot_be_represented_is_refused_by_name(base, adapter, change):
    edit_json(adapter / "adapter_config.json", **change)
    model, tokenizer = fresh(base)
    line = refusal(load_adapter, model, tokenizer, adapter)
    name = {"r": "rank is 0" if change.get("r") == 0 else "r is 4.0",
            "lora_dropout": "dropout is 2"}.get(next(iter(change)), next(iter(change)))
    assert name in line and "adapter_config.json" in line
    assert not adapted(model)


@pytest.mark.parametrize("what", ["weights", "family", "vocabulary", "tokenizer"])
def test_an_adapter_of_another_base_is_refused(base, adapter, tmp_path, what):
    if what == "weights":
        other, said = write_base(tmp_path / "other", seed=7), "other weights"
    elif what == "family":
        other, said = write_base(tmp_path / "other", "gemma"), "model_type gemma2, not gemma"
    elif what == "tokenizer":
        other, said = base, "<tools> is row 512"
    else:
        model = tiny_model(vocab_size=520)
        tokenizer = Tokenizer.load(base)
        line = refusal(load_adapter, model, tokenizer, adapter)
        assert "vocab_size 512, not 520" in line and str(base) in line
        return
    model, tokenizer = fresh(other)
    if what == "tokenizer":
        tokenizer.add_tokens(["<other>", *TOKENS])
    line = refusal(load_adapter, model, tokenizer, adapter)
    assert said in line and str(base) in line
    assert not adapted(model)


def test_a_folder_without_an_adapter_or_a_second_one_is_refused(base, adapter, tmp_path):
    model, tokenizer = fresh(base)
    assert "no adapter there" in refusal(load_adapter, model, tokenizer, tmp_path / "none")
    load_adapter(model, tokenizer, adapter)
    assert "already" in refusal(load_adapter, model, tokenizer, adapter)
    edit_json(adapter / "minilora.json", format=1)
    assert "format is 1" in refusal(load_adapter, *fresh(base), adapter)
    (adapter / "minilora.json").write_text('{"format": 2, "dialect": "hermes"}')
    assert "tokens is not a dict" in refusal(load_adapter, *fresh(base), adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 30)
    (adapter / "minilora.json").unlink()
    assert "not a whole safetensors file" in refusal(load_adapter, *fresh(base), adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    assert "--model" in refusal(adapter_base, adapter)


# --- peft -----------------------------------------------------------------------------------------

def transformers_model(folder, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


@pytest.mark.parametrize("family, mode, settings", [
    ("gemma2", "append", {"rslora": True}),
    ("gemma2", "append", {"dora": True}),
    ("gemma2", None, {"init": "pissa"}),
    ("gemma2", "reserved", {"init": "pissa", "rslora": True, "dora": True, "layers": ("1-2",),
                            "rank_pattern": ("*.mlp.*=2",), "alpha_pattern": ("q_proj=3",)}),
    ("gemma", "reserved", {"targets": ("layers.1.*", "q_proj")}),
    ("gemma3_text", "append", {"targets": ("layers.*.v_proj", "layers.[0-4].mlp.*")}),
])
def test_peft_reads_what_minilora_writes(tmp_path, family, mode, settings, measure):
    peft = pytest.importorskip("peft")
    base = write_base(tmp_path / "base", family)
    model, tokenizer = tuned(base, mode, **settings)
    save_adapter(model, tokenizer, tmp_path / "a", str(base))
    theirs = transformers_model(base)
    # peft copies the base's rows when it loads an adapter, so appended rows need their room first.
    theirs.resize_token_embeddings(model.embed_tokens.num_embeddings, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a")
    adapters = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert adapters == {f"base_model.model.model.{name}" for name in adapted(model)}
    ids = with_new(IDS, model)
    for other in (theirs, theirs.merge_and_unload()):
        measure("logits, float32, adapters that minilora wrote (also merged there)", "peft",
                difference(logits(model, ids), logits(other, ids)), 1e-4)


@pytest.mark.parametrize("rows, settings", [
    ([512, 513, 514], {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    ([30, 9], {"target_modules": r".*\.layers\.(0|2)\..*(v|gate)_proj"}),
    (None, {"target_modules": "all-linear"}),
    (None, {"target_modules": "all-linear", "use_dora": True}),
    ([512, 513, 514], {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3]}),
    (None, {"target_modules": ["o_proj", "v_proj", "model.layers.2.mlp.up_proj"],
            "layers_to_transform": 2, "layers_pattern": "layers", "use_dora": True,
            "exclude_modules": ["v_proj"]}),
    (None, {"target_modules": ["q_proj", "up_proj", "down_proj"], "use_rslora": True,
            "rank_pattern": {"q_proj": 5, r"layers\.[12]\.mlp.*": 2},
            "alpha_pattern": {"mlp.up_proj": 7, "^model.layers.0.self_attn.*": 1.5}}),
])
def test_minilora_reads_what_peft_writes(base, tmp_path, rows, settings, measure):
    peft = pytest.importorskip("peft")
    theirs = transformers_model(base)
    if rows and rows[0] == 512:
        theirs.resize_token_embeddings(515, mean_resizing=False)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, lora_dropout=0.1,
                             trainable_token_indices=rows, **settings)
    theirs = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "tokens_delta" in name or "magnitude" in name:
            with torch.no_grad():
                parameter += 0.2 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    model, tokenizer = fresh(base)
    assert load_adapter(model, tokenizer, tmp_path / "a") == {"dialect": "hermes",
                                                             "base": str(base)}
    model.eval()
    ids = with_new(IDS, model)
    measure("logits, float32, adapters that peft wrote", "peft",
            difference(logits(model, ids), logits(theirs, ids)), 1e-4)
    save_adapter(model, tokenizer, tmp_path / "b", str(base))
    again, tokenizer = fresh(base)
    load_adapter(again, tokenizer, tmp_path / "b")
    assert torch.equal(logits(again.eval(), ids), logits(model, ids))


@pytest.mark.parametrize("case", PEFT_ADAPTERS)
def test_minilora_reads_what_peft_once_wrote(base, tmp_path, case, measure):
    """The same where peft is not installed: its files and its logits, stored."""
    files = stored("interop")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes(files[f"{case}/{file}"].numpy().tobytes())
    model, tokenizer = fresh(base)
    load_adapter(model, tokenizer, tmp_path)
    got = logits(model.eval(), reference_ids())[..., COLUMNS]
    assert difference(logits(fresh(base)[0], reference_ids())[..., COLUMNS], got) > 0.01
    measure("logits, float32, adapters that peft wrote", "peft",
            difference(got, files[f"{case}/logits"]), 1e-4)


@pytest.mark.parametrize("convert", [False, True])
def test_a_pissa_adapter_of_peft(base, tmp_path, convert):
    """As peft trains it, it belongs to a base that peft has changed; converted, to the base."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(transformers_model(base), peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], init_lora_weights="pissa")).eval()
    theirs.save_pretrained(tmp_path / "start")
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name:
            parameter.data += 0.1
    theirs.save_pretrained(tmp_path / "a", **(
        {"path_initial_model_for_weight_conversion": str(tmp_path / "start")} if convert else {}))
    model, tokenizer = fresh(base)
    if not convert:
        assert "init_lora_weights is 'pissa'" in refusal(load_adapter, model, tokenizer,
                                                         tmp_path / "a")
        return
    load_adapter(model, tokenizer, tmp_path / "a")
    assert_close(logits(model.eval(), IDS), logits(theirs, IDS))


def test_a_dora_adapter_without_its_magnitudes_is_refused(base, adapter):
    edit_json(adapter / "adapter_config.json", use_dora=True)
    assert "lora_magnitude_vector" in refusal(load_adapter, *fresh(base), adapter)


# --- merged models --------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["append", "reserved"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_merged_export_computes_the_same(tmp_path, monkeypatch, family, mode, merged):
    monkeypatch.setattr(lora, "BLOCK", 4 * 72 * 10)  # the new rows do not stand in one block
    base = write_base(tmp_path / "base", family)
    model, tokenizer = tuned(base, mode, targets=("q_proj", "layers.1.mlp.*"))
    ids = with_new(IDS, model)
    want = logits(model, ids)
    if merged:
        merge(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_merged(model, tokenizer, base, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    plain = load_model(tmp_path / "out", torch.float32)
    assert not adapted(plain) and plain.embed_tokens.rows is None
    assert plain.config.vocab_size == (512 + len(TOKENS) if mode == "append" else 512)
    assert_close(logits(plain, ids), want)
    assert Tokenizer.load(tmp_path / "out").new_tokens == tokenizer.new_tokens
    stored, old = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    assert stored.keys() == old.keys() and "lm_head.weight" not in stored
    changed = {f"model.{name}.weight" for name in adapted(model)} | {"model.embed_tokens.weight"}
    for name in stored:
        assert torch.equal(stored[name], old[name]) == (name not in changed), name
    kept = [i for i in range(512) if i not in model.embed_tokens.row_ids]
    table = "model.embed_tokens.weight"
    assert torch.equal(stored[table][kept], old[table][kept])


@pytest.mark.parametrize("mode", ["append", "reserved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_a_merged_export(base, tmp_path, mode, dtype):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = tuned(base, mode, dtype)
    export_merged(model, tokenizer, base, tmp_path / "out")
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", attn_implementation="eager", output_loading_info=True)
    assert not any(loading.values())
    assert theirs.dtype == dtype
    assert theirs.generation_config.eos_token_id == [1, 107] == theirs.config.eos_token_id
    ids = with_new(IDS, model)
    merge(model)
    limit = 1e-4 if dtype == torch.float32 else 0.05  # bfloat16 rounds in another order
    assert_close(logits(model, ids), logits(theirs.eval(), ids), limit)

    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.convert_tokens_to_ids(TOKENS) == [tokenizer.token_id(each) for each in TOKENS]
    messages = (Message("user", "weather in Paris?"),
                Message("assistant", tool_calls=(ToolCall("get_weather", {"city": "Paris"}),)),
                Message("tool", "sunny", name="get_weather"))
    want = render(Conversation(messages), tokenizer, generate=True).ids
    plain = [{"role": "user", "content": "weather in Paris?"},
             {"role": "assistant", "tool_calls": [{"type": "function", "function": {
                 "name": "get_weather", "arguments": {"city": "Paris"}}}]},
             {"role": "tool", "name": "get_weather", "content": "sunny"}]
    got = words.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)
    assert got["input_ids"] == want


def test_the_other_fields_of_the_base_stay(base, tmp_path):
    model, tokenizer = tuned(base, dtype=torch.bfloat16)
    export_merged(model, tokenizer, base, tmp_path / "out", "mistral")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.items() >= (tiny_raw() | {
        "vocab_size": 512 + len(TOKENS), "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "eos_token_id": [1, 107], "bos_token_id": 2, "pad_token_id": 0,
        "architectures": ["Gemma2ForCausalLM"]}).items()
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"top_k": 64, "eos_token_id": [1, 107], "bos_token_id": 2,
                          "pad_token_id": 0}
    words = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert words["chat_template"] == chat_template("mistral")


def test_an_image_text_base_is_exported_as_a_text_model(tmp_path):
    base = write_base(tmp_path / "base", "gemma3_text")
    raw = tiny_raw("gemma3_text")
    del raw["model_type"]
    (base / "config.json").write_text(json.dumps({
        "model_type": "gemma3", "text_config": raw, "vision_config": {}, "image_token_index": 9,
        "architectures": ["Gemma3ForConditionalGeneration"]}))
    model, tokenizer = tuned(base)
    export_merged(model, tokenizer, base, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "gemma3_text" and "vision_config" not in config
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    ids = with_new(IDS, model)
    want = logits(model, ids)
    assert_close(logits(load_model(tmp_path / "out", torch.float32), ids), want)
    assert_close(logits(transformers_model(tmp_path / "out"), ids), want)


def test_a_large_model_is_written_in_shards(base, tmp_path, monkeypatch):
    model, tokenizer = tuned(base)
    export_merged(model, tokenizer, base, tmp_path / "one")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 200_000)
    export_merged(model, tokenizer, base, tmp_path / "many")
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    one = load_file(tmp_path / "one/model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(each.nbytes for each in tensors.values()) <= 200_000
        for name, tensor in tensors.items():
            assert index["weight_map"].pop(name) == path.name
            assert torch.equal(tensor, one.pop(name))
    assert not one and not index["weight_map"]
    ids = with_new(IDS, model)
    assert_close(logits(load_model(tmp_path / "many", torch.float32), ids), logits(model, ids))


@pytest.mark.parametrize("where", ["lora_A", "rows", "weight"])
def test_an_export_of_nan_is_refused(base, tmp_path, where):
    model, tokenizer = tuned(base)
    linear = model.layers[2].mlp.up_proj
    tensor = model.embed_tokens.rows if where == "rows" else getattr(linear, where)
    tensor.data[1, 3] = torch.inf if where == "weight" else torch.nan
    name = "embed_tokens" if where == "rows" else "layers.2.mlp.up_proj"
    line = refusal(export_merged, model, tokenizer, base, tmp_path / "out")
    assert f"model.{name}.weight holds NaN" in line
    assert [path.name for path in tmp_path.iterdir()] == []


def test_an_export_makes_no_second_model(tmp_path):
    base = write_base(tmp_path / "base", num_hidden_layers=1, vocab_size=120_000)
    model, tokenizer = tuned(base)
    before = peak_memory(reset=True)
    export_merged(model, tokenizer, base, tmp_path / "out")
    assert peak_memory() - before <= model.embed_tokens.weight.nbytes / 2


def test_a_merge_that_overflows_changes_nothing(base):
    """float16 is not offered, yet a model may be cast to it."""
    model, _ = tuned(base)
    for module in adapted(model).values():
        module.weight.data = module.weight.half()
    model.layers[2].mlp.up_proj.lora_B.data.fill_(1e5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = refusal(merge, model)
    assert "layers.2.mlp.up_proj: W + BA overflows torch.float16" in line
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_export_never_replaces_its_base_or_foreign_files(base, tmp_path):
    model, tokenizer = tuned(base)
    assert "base itself" in refusal(export_merged, model, tokenizer, base, base / ".")
    other = write_base(tmp_path / "other", "gemma")
    assert "another model" in refusal(export_merged, model, tokenizer, other, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("three years")
    for save in (lambda: export_merged(model, tokenizer, base, tmp_path / "out"),
                 lambda: save_adapter(model, tokenizer, tmp_path / "out", "b")):
        assert "thesis.txt" in refusal(save)
        assert bytes_of(tmp_path / "out") == {"thesis.txt": b"three years"}
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(save_adapter, model, tokenizer, tmp_path / "file/a", "b")


def test_a_merged_model_is_written_again_over_its_card(base, tmp_path):
    model, tokenizer = tuned(base)
    for _ in range(2):
        export_merged(model, tokenizer, base, tmp_path / "out")
        assert not (tmp_path / "out/README.md").exists()
        (tmp_path / "out/README.md").write_text("a card")


# --- what was written, compared -------------------------------------------------------------------

def conversations(model, lengths=(5, 23, 1, 12)):
    """Examples of these lengths, the model's new tokens among the others."""
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, model.embed_tokens.num_embeddings, (n,), generator=generator)
            for n in lengths]
    return [Example(ids, ids, ids, f"data.jsonl:{n}") for n, ids in enumerate(rows, 1)]


@pytest.mark.parametrize("mode, settings", [
    ("append", {}), ("reserved", {"rslora": True}), (None, {"dropout": 0.5}),
    ("append", {"dora": True}), ("reserved", {"init": "pissa"})])
def test_what_was_merged_in_float32_agrees(base, tmp_path, mode, settings):
    model, tokenizer = tuned(base, mode, **settings)
    export_merged(model, tokenizer, base, tmp_path / "out")
    found = compare_logits(model, load_model(tmp_path / "out", torch.float32),
                           conversations(model))
    assert found["tokens"] == 41 and found["argmax_agreement"] == 1
    assert 0 < found["largest_change"] <= 1e-5 * found["largest_logit"]


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_a_comparison_counts_every_token_once(base, monkeypatch, chunk):
    """Against the whole logits of each conversation; they are never whole in the comparison."""
    model, other = tuned(base)[0], tuned(base, seed=2)[0]
    examples, seen = conversations(model), []
    pairs = [[logits(each, example.ids[None])[0] for example in examples]
             for each in (model, other)]
    ours, theirs = (torch.cat(each) for each in pairs)
    for each in (model, other):
        monkeypatch.setattr(each, "logits", lambda hidden, real=each.logits:
                            seen.append(len(hidden)) or real(hidden))
    monkeypatch.setattr(checkpoint, "CHUNK", chunk)
    bar = []
    found = compare_logits(model, other, examples, lambda: bar.append(1))
    assert found == {
        "tokens": 41, "largest_logit": pytest.approx(ours.abs().max().item(), rel=1e-5),
        "argmax_agreement": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        "largest_change": pytest.approx((ours - theirs).abs().max().item(), rel=1e-5)}
    assert 0 < found["argmax_agreement"] < 1
    assert max(seen) <= chunk and sum(seen) == 2 * 41 and len(bar) == len(examples)
    same = compare_logits(model, model, examples)
    assert same["argmax_agreement"] == 1 and same["largest_change"] == 0


def test_a_comparison_that_meets_nan_is_refused(base):
    model, other = tuned(base)[0], tuned(base)[0]
    examples = conversations(model)
    other.norm.weight.data[3] = torch.nan
    for pair in ((model, other), (other, model)):
        line = refusal(compare_logits, *pair, examples)
        assert "data.jsonl:1" in line and "NaN" in line


# --- an extended base and its adapter -------------------------------------------------------------

@pytest.mark.parametrize("family, mode, settings", [
    ("gemma", "reserved", {}), ("gemma2", "append", {"dora": True}),
    ("gemma3_text", "append", {"targets": ("q_proj", "layers.1.mlp.*")})])
def test_an_extended_base_and_its_adapter_are_the_model(tmp_path, family, mode, settings):
    base = write_base(tmp_path / "base", family)
    model, tokenizer = tuned(base, mode, **settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):  # over itself, too
        export_extended(model, tokenizer, base, tmp_path / "out", "mistral")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    again, words, dialect = open_model(None, tmp_path / "out/adapter", "cpu", torch.float32)
    assert dialect == "mistral" and words.new_tokens == tokenizer.new_tokens
    assert again.embed_tokens.rows is None and adapted(again).keys() == adapted(model).keys()
    found = compare_logits(model, again, conversations(model))
    # The same numbers in another shape: a row of the product may be summed in another order.
    assert found["largest_change"] <= 1e-6 * found["largest_logit"]
    assert adapter_base(tmp_path / "out/adapter") == str(tmp_path / "out/base")
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["trainable_token_indices"] is None
    assert not [name for name in load_file(tmp_path / "out/adapter/adapter_model.safetensors")
                if "embed" in name]

    stored, old = (load_file(folder / "model.safetensors")
                   for folder in (tmp_path / "out/base", base))
    assert stored.keys() == old.keys()
    table = "model.embed_tokens.weight"
    assert all(torch.equal(stored[name], old[name]) for name in stored if name != table)
    rows = model.embed_tokens.row_ids
    assert torch.equal(stored[table][rows], model.embed_tokens.rows)
    kept = [i for i in range(512) if i not in rows]
    assert torch.equal(stored[table][kept], old[table][kept])
    config = json.loads((tmp_path / "out/base/config.json").read_text())
    assert config["vocab_size"] == len(stored[table]) == model.embed_tokens.num_embeddings
    words = json.loads((tmp_path / "out/base/tokenizer_config.json").read_text())
    assert words["chat_template"] == chat_template("mistral")


@pytest.mark.parametrize("mode", ["append", "reserved"])
def test_transformers_and_peft_read_an_extended_base(base, tmp_path, mode):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model, tokenizer = tuned(base, mode, rslora=True)
    export_extended(model, tokenizer, base, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(transformers_model(tmp_path / "out/base"),
                                            tmp_path / "out/adapter")
    ids = with_new(IDS, model)
    assert_close(logits(model, ids), logits(theirs, ids))
    for folder in ("base", "adapter"):
        words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / folder)
        assert words.convert_tokens_to_ids(TOKENS) == [*tokenizer.new_tokens.values()]


def test_an_extended_base_keeps_the_dtype_and_its_own_adapter(base, tmp_path):
    """In bfloat16 the rows are rounded as the forward pass rounds them; each half checks it."""
    model, tokenizer = tuned(base, dtype=torch.bfloat16)
    export_extended(model, tokenizer, base, tmp_path / "out")
    again, *_ = open_model(None, tmp_path / "out/adapter", "cpu", torch.bfloat16)
    found = compare_logits(model, again, conversations(model))
    assert found["largest_change"] <= 0.01 * found["largest_logit"]
    assert all(map(torch.equal, (t for n, t in trainable(again).items()),
                   (t for n, t in trainable(model).items() if "lora_" in n)))
    line = refusal(open_model, base, tmp_path / "out/adapter", "cpu", torch.bfloat16)
    assert "another base" in line
    save_adapter(model, tokenizer, tmp_path / "whole", base)
    line = refusal(open_model, tmp_path / "out/base", tmp_path / "whole", "cpu", torch.bfloat16)
    assert "another base" in line


@pytest.mark.parametrize("what", ["rows", "merged", "nan", "itself", "adapter"])
def test_what_cannot_be_an_extended_base_is_refused(tmp_path, what):
    base = write_base(tmp_path / "out/base" if what == "itself" else tmp_path / "base")
    out, (model, tokenizer) = tmp_path / "out", tuned(base, None if what == "rows" else "append")
    said = {"rows": "no rows of new tokens", "merged": "is merged", "itself": "is the base itself",
            "nan": "layers.1.mlp.up_proj.lora_A holds NaN", "adapter": "would be lost"}[what]
    if what == "merged":
        merge(model)
    elif what == "nan":
        model.layers[1].mlp.up_proj.lora_A.data[0, 0] = torch.nan
    elif what == "adapter":
        save_adapter(model, tokenizer, out / "adapter", base)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert said in refusal(export_extended, model, tokenizer, base, out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- atomicity ------------------------------------------------------------------------------------

class Killed(BaseException):
    """The process has died."""


@contextlib.contextmanager
def dying_at(monkeypatch, name, nth, error):
    """The nth call of `name` fails. If it kills, nothing after it touches the disk either."""
    calls, real = [], {"fsync": os.fsync, "rename": os.rename, "rmtree": shutil.rmtree}

    def wrap(each):
        def call(*args, **kwargs):
            calls.append(each)
            if each == name and calls.count(name) == nth:
                raise error
            if calls.count(name) >= nth and isinstance(error, Killed):
                raise Killed
            return real[each](*args, **kwargs)
        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", wrap("fsync"))
        patch.setattr(os, "rename", wrap("rename"))
        patch.setattr(shutil, "rmtree", wrap("rmtree"))
        yield
    assert calls.count(name) >= nth


# Of a save over an older adapter: the first file, one in the middle, the new folder, its renames.
POINTS = [("fsync", 1), ("fsync", 5), ("fsync", 14), ("rename", 1), ("rename", 2)]


@pytest.mark.parametrize("name, nth", POINTS)
def test_a_save_that_fails_leaves_the_old_adapter(base, adapter, monkeypatch, name, nth):
    old = bytes_of(adapter)
    model, tokenizer = tuned(base, seed=5)
    with dying_at(monkeypatch, name, nth, OSError(28, "No space left on device")):
        line = refusal(save_adapter, model, tokenizer, adapter, str(base))
    assert "No space left" in line
    assert bytes_of(adapter) == old
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]
    save_adapter(model, tokenizer, adapter, str(base))
    assert bytes_of(adapter) != old


@pytest.mark.parametrize("name, nth", [*POINTS, ("fsync", 15), ("rmtree", 2), ("rmtree", 4)])
def test_a_kill_leaves_an_adapter_that_is_whole(base, adapter, monkeypatch, name, nth):
    model, tokenizer = tuned(base, seed=5)
    with dying_at(monkeypatch, name, nth, Killed()), pytest.raises(Killed):
        save_adapter(model, tokenizer, adapter, str(base))
    done = (name, nth) in [("fsync", 15), ("rmtree", 4)]  # after the second rename
    want = trainable(model if done else tuned(base)[0]).values()
    for _ in range(2):
        for folder in (adapter, adapter.parent):
            found, words = fresh(base)
            load_adapter(found, words, folder)
            assert all(map(torch.equal, trainable(found).values(), want))
        with dying_at(monkeypatch, "fsync", 1, OSError("disk")):  # and the next save fails as well
            refusal(save_adapter, model, tokenizer, adapter, str(base))
    save_adapter(model, tokenizer, adapter, str(base))
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_all_is_on_the_disk_before_it_gets_its_name(base, tmp_path, monkeypatch):
    events = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        real_sync(handle)

    def rename(a, b):
        events.append("rename")
        real_rename(a, b)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to see which file is flushed")
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    export_merged(*tuned(base), base, tmp_path / "out")
    at = events.index("rename")
    new = str(tmp_path / ".out.new")
    assert {f"{new}/{path.name}" for path in (tmp_path / "out").iterdir()} | {new} <= {*events[:at]}
    assert events[at + 1:] == [str(tmp_path)]


# --- training state -------------------------------------------------------------------------------

def trainee(base, mode="append", dropout=0.2, **settings):
    """A model in training: dropout on, two groups, as trainer.py makes them."""
    model, _ = tuned(base, mode, dropout=dropout, **settings)
    model.train()
    rows = [p for name, p in trainable(model).items() if name == "embed_tokens.rows"]
    rest = [p for name, p in trainable(model).items() if name != "embed_tokens.rows"]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": rows, "weight_decay": 0.0}]
    return model, torch.optim.AdamW([group for group in groups if group["params"]], lr=3e-3)


def train(model, optimizer, steps):
    """Steps on data drawn from torch's own generator, with a rate that falls."""
    for _ in range(steps):
        ids = torch.randint(0, model.embed_tokens.num_embeddings, (2, 9))
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9


def state_of(model, optimizer):
    moments = [state[key].clone() for _, state in sorted(optimizer.state_dict()["state"].items())
               for key in sorted(state)]
    return [*(p.detach().clone() for p in trainable(model).values()), *moments,
            *(buffer.clone() for buffer in model.buffers()), torch.get_rng_state()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("mode, settings", [
    ("append", {}), ("reserved", {"dora": True, "init": "pissa_niter_16"})])
def test_resumed_is_uninterrupted_bit_for_bit(base, tmp_path, mode, settings):
    torch.manual_seed(3)
    model, optimizer = trainee(base, mode, **settings)
    train(model, optimizer, 3)
    saved = state_of(model, optimizer)
    progress = {"step": 3, "tokens": 54, "order": [2, 0], "best": 0.1}
    assert save_state(tmp_path, 3, model, optimizer, progress) == tmp_path / "step-000003"
    assert same(state_of(model, optimizer), saved)
    train(model, optimizer, 3)
    want = state_of(model, optimizer)

    torch.manual_seed(99)
    model, optimizer = trainee(base, mode, **settings)
    for name, buffer in model.named_buffers():  # another machine's decomposition
        if "lora_start" in name:
            buffer += 1e-6
    assert load_state(tmp_path, model, optimizer) == progress
    assert same(state_of(model, optimizer), saved)
    train(model, optimizer, 3)
    assert same(state_of(model, optimizer), want)
    assert [group["lr"] for group in optimizer.param_groups] == [
        pytest.approx(3e-3 * 0.9 ** 6)] * 2


def test_a_state_from_before_the_first_step_comes_back(base, tmp_path):
    model, optimizer = trainee(base)
    save_state(tmp_path, 0, model, optimizer, {})
    other, fresh_optimizer = trainee(base)
    train(other, fresh_optimizer, 1)
    load_state(tmp_path, other, fresh_optimizer)
    assert same(state_of(other, fresh_optimizer), state_of(model, optimizer))


def test_the_newest_complete_state_and_the_one_before_stay(base, tmp_path):
    model, optimizer = trainee(base)
    assert latest_state(tmp_path / "none") is None
    for step in (2, 9, 999998, 1000000):
        save_state(tmp_path, step, model, optimizer, {"step": step})
        assert load_state(tmp_path, *trainee(base)) == {"step": step}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999998"]
    (tmp_path / "step-2000000").mkdir()  # half written, by whatever
    (tmp_path / "step-2000000/state.safetensors").write_bytes(b"")
    shutil.copytree(tmp_path / "step-999998", tmp_path / ".step-3000000.new")
    assert latest_state(tmp_path) == tmp_path / "step-1000000"
    # A run that went back abandons what came later.
    save_state(tmp_path, 999999, model, optimizer, {})
    assert latest_state(tmp_path) == tmp_path / "step-999999"
    assert (tmp_path / "step-999998").exists() and not (tmp_path / "step-1000000").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name, nth", [("fsync", 1), ("fsync", 3), ("rename", 1)])
def test_a_state_that_fails_to_be_written_leaves_the_others(base, tmp_path, monkeypatch, name, nth):
    model, optimizer = trainee(base)
    for step in (1, 2):
        save_state(tmp_path, step, model, optimizer, {"step": step})
    with dying_at(monkeypatch, name, nth, OSError("disk")):
        assert "cannot be written" in refusal(save_state, tmp_path, 3, model, optimizer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert load_state(tmp_path, model, optimizer) == {"step": 2}


@pytest.mark.parametrize("what", ["none", "rank", "rows", "targets", "base", "groups", "lacks",
                                  "extra", "shape", "truncated"])
def test_a_state_of_something_else_is_refused(base, tmp_path, what):
    folder = tmp_path / "checkpoints"
    model, optimizer = trainee(base)
    train(model, optimizer, 1)
    path = save_state(folder, 1, model, optimizer, {}) / "state.safetensors"
    moment = "optimizer.embed_tokens.rows.exp_avg_sq"
    said = "not what is to be trained now"
    if what == "none":
        shutil.rmtree(folder)
        said = "no checkpoint"
    elif what == "rows":
        model, optimizer = trainee(base, mode=None)
    elif what in ("rank", "targets"):
        changed = {"rank": 5} if what == "rank" else {"targets": LINEARS[:5]}
        model, _ = tuned(base, **changed)
        optimizer = torch.optim.AdamW([{"params": group} for group in (
            [p for n, p in trainable(model).items() if "lora" in n], [model.embed_tokens.rows])])
    elif what == "groups":
        optimizer = torch.optim.AdamW(trainable(model).values())
    elif what == "base":
        model, optimizer = trainee(write_base(tmp_path / "other", seed=3))
        said = "another base"
    elif what == "lacks":
        edit_tensors(path, lambda tensors: tensors.pop(moment))
        said = f"lacks {moment}"
    elif what == "extra":
        edit_tensors(path, lambda tensors: tensors.update(more=torch.ones(1)))
        said = "unexpected more"
    elif what == "shape":
        edit_tensors(path, lambda tensors: tensors.update({moment: torch.ones(2)}))
        said = f"{moment} has shape [2]"
    else:
        path.write_bytes(path.read_bytes()[:-8])
        said = "not a whole safetensors file"
    before = state_of(model, optimizer)
    assert said in refusal(load_state, folder, model, optimizer)
    assert same(state_of(model, optimizer), before)


def test_nothing_is_pickled(base, tmp_path):
    model, optimizer = trainee(base)
    train(model, optimizer, 1)
    path = save_state(tmp_path / "checkpoints", 1, model, optimizer, {"a": [1]})
    assert {file.name for file in path.iterdir()} == {"state.safetensors", "state.json"}
    load_file(path / "state.safetensors")
    assert json.loads((path / "state.json").read_text())["progress"] == {"a": [1]}
