"""The same numbers as transformers: live where it is installed, stored ones always."""

import pytest
import torch
from conftest import tiny_model
from make_references import COLUMNS, FAMILIES, REFERENCES, reference_ids, transformers_model
from safetensors.torch import load_file

from minilora.config import LoraConfig
from minilora.data import IGNORED
from minilora.lora import adapted, attach
from minilora.loss import token_loss


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stored_logits(family):
    ours = tiny_model(family)(reference_ids())
    assert ours.dtype == torch.float32
    assert difference(ours[..., COLUMNS], load_file(REFERENCES)[family]) <= 1e-4


# What each generation can get wrong: caps and scalars, one kv head, √D that bfloat16 rounds
# (D = 80), a head dim that does not divide, both spellings of the rotation.
SHAPES = [
    ("gemma", {}),
    ("gemma", dict(num_key_value_heads=4, hidden_size=80)),
    ("gemma2", {}),
    ("gemma2", dict(num_key_value_heads=1, query_pre_attn_scalar=24, hidden_size=80)),
    ("gemma2", dict(attn_logit_softcapping=None, final_logit_softcapping=None)),
    ("gemma2", dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    ("gemma3_text", {}),
    ("gemma3_text", dict(num_key_value_heads=1, num_attention_heads=3)),
]


@pytest.mark.parametrize("family, overrides", SHAPES)
@torch.no_grad()
def test_live_logits(family, overrides):
    pytest.importorskip("transformers")
    model = tiny_model(family, seed=3, **overrides)
    theirs = transformers_model(model, family, **overrides)
    ids = reference_ids()
    assert difference(model(ids), theirs(ids).logits) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_live_logits_in_bfloat16(family):
    """Roundings differ, so the bar is bfloat16's own error against float32, doubled."""
    pytest.importorskip("transformers")
    exact = tiny_model(family, seed=3)(reference_ids())
    model = tiny_model(family, seed=3, dtype=torch.bfloat16)
    theirs = transformers_model(model, family)
    ids = reference_ids()
    own_error = difference(theirs(ids).logits.float(), exact)
    assert difference(model(ids), exact) <= 2 * own_error + 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_padding_agrees(family):
    """A left-padded batch, told by documents here and by attention_mask there."""
    pytest.importorskip("transformers")
    model = tiny_model(family, seed=5)
    theirs = transformers_model(model, family)
    ids = reference_ids()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours = model(ids, positions, documents=mask)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    assert difference(ours[mask.bool()], expected[mask.bool()]) <= 1e-4


@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_agree_with_peft(rslora):
    """Same base, same A and B, same batch: loss and every adapter's gradient."""
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = tiny_model("gemma2", seed=4)
    theirs = transformers_model(model, "gemma2")
    config = LoraConfig(rank=4, alpha=6.0, rslora=rslora)
    attach(model, config)
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_B.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=4, lora_alpha=6.0, use_rslora=rslora, target_modules=list(config.targets),
        task_type="CAUSAL_LM"))
    ours_by_name = {}
    for name, layer in adapted(model).items():
        prefix = f"base_model.model.model.{name}"
        ours_by_name[f"{prefix}.lora_A.default.weight"] = layer.lora_A
        ours_by_name[f"{prefix}.lora_B.default.weight"] = layer.lora_B
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours_by_name[name])

    ids = reference_ids()
    labels = ids.clone()
    labels[:, :10] = IGNORED
    total, number = token_loss(model, model.hidden_states(ids), labels)
    loss = total / number
    loss.backward()
    expected = theirs(input_ids=ids, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            got = ours_by_name[name].grad
            assert (got - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name
