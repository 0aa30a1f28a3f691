"""LoRA's laws: nothing changes at the start, only A and B are trained, merging is exact."""

import math

import pytest
import torch
from conftest import tiny_model

from minilora.config import LINEARS, LoraConfig, UserError
from minilora.lora import LoRALinear, adapted, attach, merge, trainable, unmerge

IDS = (torch.arange(40).view(2, 20) * 31 + 7) % 512


VARIANTS = {
    "plain": {}, "rslora": dict(rslora=True), "dora": dict(dora=True), "pissa": dict(init="pissa"),
    "all": dict(rslora=True, dora=True, init="pissa_niter_16", rank_pattern=("*.mlp.*=2",),
                alpha_pattern=("o_proj=3.5", "layers.1.*=40")),
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def with_lora(dtype=torch.float32, tokens: str | None = "append", **settings):
    """A tiny Gemma with LoRA as training might leave it, and two new rows."""
    model = tiny_model("gemma2", dtype=dtype)
    attach(model, LoraConfig(rank=4, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_B += 0.05 * torch.randn(layer.lora_B.shape, generator=generator)
            if layer.lora_magnitude is not None:
                layer.lora_magnitude *= 1 + 0.1 * torch.randn(len(layer.weight),
                                                              generator=generator)
    if tokens:
        rows = 0.2 * torch.randn(2, 72, generator=generator)
        model.embed_tokens.add_rows([512, 513] if tokens == "append" else [9, 8], rows)
    return model


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_identity_at_the_start(settings, dtype):
    model = tiny_model("gemma2", dtype=dtype)
    before = model(IDS)
    attach(model, LoraConfig(rank=4, **settings))
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


@variants
def test_what_is_trained(settings):
    """A, B, magnitudes and new rows; all else is frozen, and a step leaves its bytes alone."""
    model = with_lora(**settings)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    frozen |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    keys = ("lora_A", "lora_B", *(["lora_magnitude"] if "dora" in settings else []))
    assert set(trainable(model)) == {
        f"{name}.{key}" for name in adapted(model) for key in keys
    } | {"embed_tokens.rows"}
    assert all(p.grad is None and p.dtype == torch.float32 for p in trainable(model).values())
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    for _ in range(2):
        model(torch.cat([IDS, torch.full((2, 1), 513)], 1)).square().mean().backward()
        optimizer.step()
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, before in frozen.items():
        assert torch.equal(after[name], before), name


@pytest.mark.parametrize("tokens", [None, "append", "reserved"])
@variants
@torch.no_grad()
def test_merged_equals_unmerged(tokens, settings):
    model = with_lora(tokens=tokens, **settings)
    before = model(IDS)
    merge(model)
    after = model(IDS)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert not trainable(model)


@variants
@torch.no_grad()
def test_merge_adds_in_float32_and_rounds_once(settings):
    model = with_lora(torch.bfloat16, **settings)
    layer = model.layers[1].mlp.up_proj
    A, B = (tensor.double() for tensor in layer.pair())
    exact = layer.weight.double() + layer.scaling * B @ A
    if layer.lora_magnitude is not None:
        exact *= layer.lora_magnitude[:, None] / exact.norm(dim=1, keepdim=True)
    merge(model)
    assert layer.weight.dtype == torch.bfloat16
    # A double rounding, or a sum in bfloat16, misses the nearest bfloat16 in many places.
    assert (layer.weight == exact.to(torch.bfloat16)).float().mean() > 0.999


@pytest.mark.parametrize("tokens", ["append", "reserved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@variants
@torch.no_grad()
def test_unmerge_restores_every_byte(tokens, dtype, settings):
    model = with_lora(dtype, tokens, **settings)
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
    (dict(targets=()), "targets is empty"), (dict(rank_pattern=("q_proj=0",)), "rank_pattern"),
    (dict(rank_pattern=("q_proj=2.5",)), "PATTERN=NUMBER"), (dict(rank_pattern=("8",)), "'8'"),
    (dict(alpha_pattern=("q_proj=x",)), "alpha_pattern"),
    (dict(alpha_pattern=("q_proj=nan",)), "alpha_pattern"),
    (dict(layers=("3-",)), "layers: '3-'"), (dict(layers=("all",)), "layers: 'all'")])
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


# --- variants -------------------------------------------------------------------------------------

@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
@torch.no_grad()
def test_pissa_starts_from_the_largest_singular_vectors(init):
    """s · B₀A₀ is the best matrix of rank r for W (Eckart and Young), split evenly in two."""
    model = tiny_model("gemma2")
    attach(model, LoraConfig(rank=4, alpha=6.0, init=init))
    for layer in adapted(model).values():
        assert torch.equal(layer.lora_A, layer.lora_start_A)
        assert torch.equal(layer.lora_B, layer.lora_start_B)
        values = torch.linalg.svdvals(layer.weight)
        residual = layer.weight - layer.scaling * layer.lora_B @ layer.lora_A
        rest = torch.linalg.svdvals(residual)[:len(values) - 4]
        torch.testing.assert_close(rest, values[4:], rtol=1e-2, atol=1e-4)
        for gram in (layer.lora_A @ layer.lora_A.mT, layer.lora_B.mT @ layer.lora_B):
            torch.testing.assert_close(gram, torch.diag(values[:4]) / layer.scaling,
                                       rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_pissa_as_plain_lora_has_the_same_change():
    layer = with_lora(init="pissa", rslora=True).layers[2].mlp.gate_proj
    A, B = layer.pair()
    assert len(A) == B.shape[1] == 8
    start = layer.lora_start_B @ layer.lora_start_A
    torch.testing.assert_close(B @ A, layer.lora_B @ layer.lora_A - start)


def test_pissa_refuses_a_rank_that_the_matrix_does_not_have():
    with pytest.raises(UserError, match="rank 65: PiSSA takes at most"):
        attach(tiny_model("gemma2"), LoraConfig(rank=65, init="pissa"))


@torch.no_grad()
def test_dora_rows_have_the_length_of_their_magnitude():
    for layer in adapted(with_lora(dora=True)).values():
        merged = layer.merged_weight()
        torch.testing.assert_close(merged.norm(dim=1), layer.lora_magnitude)
        plain = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
        cosine = torch.nn.functional.cosine_similarity(merged, plain, dim=1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_rank_and_alpha_by_pattern():
    """The first pattern that matches counts; what none matches keeps the common number."""
    model = tiny_model("gemma2")
    attach(model, LoraConfig(rank=4, alpha=8.0, rank_pattern=("layers.1.mlp.*=2", "down_proj=6"),
                             alpha_pattern=("q_proj=3",)))
    for name, layer in adapted(model).items():
        rank = 2 if name.startswith("layers.1.mlp.") else 6 if name.endswith("down_proj") else 4
        assert layer.rank == len(layer.lora_A) == layer.lora_B.shape[1] == rank
        assert layer.scaling == (3 if name.endswith("q_proj") else 8) / rank


@pytest.mark.parametrize("layers, numbers", [
    (("1",), {1}), (("0-2",), {0, 1, 2}), (("3", "0"), {0, 3}), (("1-2", "2-3"), {1, 2, 3})])
def test_layers_to_adapt(layers, numbers):
    model = tiny_model("gemma2")
    names = attach(model, LoraConfig(targets=("q_proj", "*.mlp.*"), layers=layers))
    assert {int(name.split(".")[1]) for name in names} == numbers and len(names) == 4 * len(numbers)


@pytest.mark.parametrize("settings, message", [
    (dict(layers=("4",)), "layers: 4 is not in this model, which has layers 0 to 3"),
    (dict(layers=("2-9",)), "layers: 2-9"), (dict(layers=("3-1",)), "layers: 3-1"),
    (dict(layers=("1",), targets=("layers.2.*",)), "hold none of the targets"),
    (dict(rank_pattern=("qproj=2",)), "rank_pattern: 'qproj' matches no adapted linear"),
    (dict(alpha_pattern=("o_proj=2",), targets=("q_proj",)), "alpha_pattern: 'o_proj'")])
def test_patterns_and_layers_that_choose_nothing_are_refused(settings, message):
    model = tiny_model("gemma2")
    with pytest.raises(UserError, match=message):
        attach(model, LoraConfig(**settings))
    assert not adapted(model)
