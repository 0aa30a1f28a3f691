"""LoRA's laws: nothing changes at the start, only A and B are trained, merging is exact."""

import math

import pytest
import torch
from conftest import tiny_model

from minilora.config import LINEARS, LoraConfig, UserError
from minilora.lora import LoRALinear, adapted, attach, merge, trainable, unmerge

IDS = (torch.arange(40).view(2, 20) * 31 + 7) % 512


def with_lora(dtype=torch.float32, tokens: str | None = "append", **settings):
    """A tiny Gemma with LoRA whose B is not zero, and two new rows."""
    model = tiny_model("gemma2", dtype=dtype)
    attach(model, LoraConfig(rank=4, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_B.normal_(0, 0.05, generator=generator)
    if tokens:
        rows = 0.2 * torch.randn(2, 72, generator=generator)
        model.embed_tokens.add_rows([512, 513] if tokens == "append" else [9, 8], rows)
    return model


@torch.no_grad()
def test_identity_at_the_start():
    model = tiny_model("gemma2")
    before = model(IDS)
    attach(model, LoraConfig(rank=4))
    assert torch.equal(model(IDS), before)


@torch.no_grad()
def test_start_of_a_and_b():
    """A is uniform within 1 / √in, as the paper's code and peft draw it; B is zero."""
    model = tiny_model("gemma2")
    attach(model, LoraConfig(rank=16))
    for layer in adapted(model).values():
        bound = 1 / math.sqrt(layer.weight.shape[1])
        assert layer.lora_A.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not layer.lora_B.any()
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_seed_decides_a_and_leaves_the_global_generator_alone():
    draws = []
    for seed in (1, 1, 2):
        model = tiny_model("gemma2")
        torch.manual_seed(5)
        attach(model, LoraConfig(), seed)
        draws.append(model.layers[0].mlp.up_proj.lora_A)
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("targets, count", [
    (LINEARS, 28), (("q_proj",), 4), (("q_proj", "*.mlp.*"), 16), (("layers.[13].*",), 14),
    (("layers.0.mlp.down_proj", "o_proj"), 5)])
def test_targets_by_name_and_pattern(targets, count):
    model = tiny_model("gemma2")
    names = attach(model, LoraConfig(targets=targets))
    assert len(names) == count and names == list(adapted(model))
    assert {name.rpartition(".")[0] for name in trainable(model)} == set(names)


def test_what_is_trained():
    """A, B and the new rows; all else is frozen, and a step leaves its bytes as they were."""
    model = with_lora()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert set(trainable(model)) == {
        f"{name}.{key}" for name in adapted(model) for key in ("lora_A", "lora_B")
    } | {"embed_tokens.rows"}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    for _ in range(2):
        model(torch.cat([IDS, torch.full((2, 1), 513)], 1)).square().mean().backward()
        optimizer.step()
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), name


@pytest.mark.parametrize("tokens", [None, "append", "reserved"])
@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_merged_equals_unmerged(tokens, rslora):
    model = with_lora(tokens=tokens, rslora=rslora)
    before = model(IDS)
    merge(model)
    after = model(IDS)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert not trainable(model)


@torch.no_grad()
def test_merge_adds_in_float32_and_rounds_once():
    model = with_lora(torch.bfloat16)
    layer = model.layers[1].mlp.up_proj
    exact = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    merge(model)
    assert layer.weight.dtype == torch.bfloat16
    # A double rounding, or a sum in bfloat16, misses the nearest bfloat16 in many places.
    assert (layer.weight == exact.to(torch.bfloat16)).float().mean() > 0.9999


@pytest.mark.parametrize("tokens", ["append", "reserved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_unmerge_restores_every_byte(tokens, dtype):
    model = with_lora(dtype, tokens)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train = set(trainable(model))
    merge(model, undo=True)
    assert not torch.equal(model.layers[0].mlp.up_proj.weight,
                           before["layers.0.mlp.up_proj.weight"])
    unmerge(model)
    assert set(trainable(model)) == train
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


@torch.no_grad()
def test_eval_and_train_change_no_weight():
    model = with_lora()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.eval()
    model.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_merging_twice_and_unmerging_the_unmerged_are_refused():
    model = with_lora()
    with pytest.raises(UserError, match="not merged with undo"):
        unmerge(model)
    merge(model)
    with pytest.raises(UserError, match="merged already"):
        merge(model)
    with pytest.raises(UserError, match="not merged with undo"):
        unmerge(model)
    with pytest.raises(UserError, match="nothing to merge"):
        merge(tiny_model("gemma2"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["layers.3.mlp.down_proj.lora_B", "embed_tokens.rows",
                                   "layers.2.self_attn.q_proj.weight"])
def test_a_merge_that_meets_nan_changes_nothing(bad, where):
    model = with_lora()
    with torch.no_grad():
        model.get_parameter(where).view(-1)[3] = bad
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=where):
        merge(model)
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(64, 8, bias=False), 4, 8.0, dropout=0.5)
    torch.nn.init.ones_(layer.lora_B)
    x = torch.randn(3, 64)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    mean = torch.stack([layer(x) for _ in range(2000)]).mean(0)
    layer.eval()
    torch.testing.assert_close(mean, layer(x), rtol=0.1, atol=0.15)  # unbiased


@pytest.mark.parametrize("settings, message", [
    (dict(rank=0), "rank is 0"), (dict(dropout=1.0), "dropout"), (dict(alpha=math.nan), "alpha"),
    (dict(targets=()), "targets is empty")])
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**settings)


def test_attach_refuses_what_matches_nothing_and_a_second_time():
    model = tiny_model("gemma2")
    with pytest.raises(UserError, match="'qproj' matches no linear; use names such as q_proj"):
        attach(model, LoraConfig(targets=("q_proj", "qproj")))
    assert not adapted(model)
    attach(model, LoraConfig())
    with pytest.raises(UserError, match="already"):
        attach(model, LoraConfig())
