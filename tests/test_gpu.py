"""Training and loading as they are on a GPU alone: the fused loss, AdamW's fused step, the device's
random states. Attention and decoding are in test_attention.py and test_generate.py."""

import math

import pytest
import torch
from conftest import GPU, tiny_model
from test_checkpoint import write_base
from test_trainer import some_examples

from minilora import weights
from minilora.config import LoraConfig, TrainConfig
from minilora.lora import attach, trainable
from minilora.loss import token_loss
from minilora.model import Gemma
from minilora.state import load_state, save_state
from minilora.trainer import make_optimizer, prepare, stream_batches, train_step

DEVICE = torch.device("cuda")


def model_with_lora(reserved: bool = False, dtype: torch.dtype = torch.float32, **settings,
                    ) -> Gemma:
    """With a new row of its own, and adapters that count."""
    model = tiny_model("gemma2", dtype=dtype).to(DEVICE)
    attach(model, LoraConfig(rank=2, alpha=4.0, **settings))
    model.embed_tokens.add_rows([300 if reserved else 512], torch.full((1, 72), 0.05))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@GPU
@pytest.mark.parametrize("reserved", [False, True])
@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_the_fused_loss_is_the_plain_one_on_a_gpu(dtype, bar, reserved):
    """And its gradients, over chunks of which the last is shorter, with and without a row trained.
    """
    model = model_with_lora(reserved, dtype)
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 512, (2, 40), generator=generator).to(DEVICE)
    labels[0, 10:20], labels[1, ::7] = -100, 300 if reserved else 512
    start = 3 * torch.randn(2, 40, 72, generator=generator)
    found = []
    for model.compiled in (False, True):
        hidden = start.to(DEVICE, dtype).requires_grad_()
        loss, count = token_loss(model, hidden, labels, chunk=30)
        with torch.no_grad():
            looked = token_loss(model, hidden, labels, chunk=30)[0]
        gradients = torch.autograd.grad(loss / count, [hidden, model.embed_tokens.rows])
        found.append([loss[None], looked[None], *gradients])
    for plain, fused in zip(*found, strict=True):
        assert plain.any() and (fused - plain).norm() < bar * plain.norm()


@GPU
@pytest.mark.parametrize("recompute", ["none", "offload"])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_resumed_run_is_the_uninterrupted_one_on_a_gpu(compile, recompute, tmp_path):
    """With its dropout, and with what AdamW knows.

    Sums on a GPU may come in another order each time, so the last bits may differ, and AdamW makes
    much of small gradients: a thousandth of what the steps changed. With other dropout than the
    run's own it is a quarter.
    """
    torch._dynamo.reset()
    config = TrainConfig(batch=2, length=48, compile=compile, recompute=recompute, seed=4)
    stream = stream_batches(some_examples(20), config, fill=True)
    parts = [next(stream) for _ in range(6)]

    def begun() -> tuple[Gemma, torch.optim.Optimizer]:
        model = model_with_lora(dropout=0.3)
        prepare(model, config)
        return model, make_optimizer(model, config)

    def go_on(model: Gemma, optimizer: torch.optim.Optimizer, parts: list) -> list[float]:
        return [train_step(model, optimizer, [part], 1e-2, 1.0).loss for part in parts]

    model, optimizer = begun()
    before = {name: each.detach().clone() for name, each in trainable(model).items()}
    torch.manual_seed(1)
    losses = go_on(model, optimizer, parts[:3])
    save_state(tmp_path, 3, model, optimizer, {})
    losses += go_on(model, optimizer, parts[3:])
    other, again = begun()
    torch.manual_seed(2)
    load_state(tmp_path, other, again)
    assert go_on(other, again, parts[3:]) == pytest.approx(losses[3:], rel=1e-4)
    mine, theirs = trainable(model), trainable(other)
    changed = sum((mine[name] - before[name]).square().sum() for name in mine)
    apart = sum((mine[name] - theirs[name]).square().sum() for name in mine)
    assert changed > 0 and apart.sqrt() < 1e-3 * changed.sqrt()


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_is_lost_in_200_steps_on_a_gpu(dtype):
    """Compiled layers, packed rows, dropout, a row of its own: all is finite and learns."""
    config = TrainConfig(batch=4, length=64, recompute="cheap", seed=4)
    model = model_with_lora(dtype=dtype, dropout=0.1)
    prepare(model, config)
    assert model.compiled
    optimizer, stream = make_optimizer(model, config), stream_batches(
        some_examples(60), config, fill=True)
    done = [train_step(model, optimizer, [next(stream)], 3e-3, 1.0) for _ in range(200)]
    assert all(step.applied and step.grad_norm > 0 for step in done)
    losses = [step.loss for step in done]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20]) and not math.isnan(sum(losses))


@GPU
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_to_the_device_is_loading_to_the_host_on_a_gpu(stored, dtype, tmp_path,
                                                              monkeypatch):
    """Bit for bit, a tensor in several blocks."""
    base = write_base(tmp_path / "base", dtype=stored)
    there = weights.load_model(base, dtype)
    monkeypatch.setattr(weights, "BLOCK", 1000)
    loaded = weights.load_model(base, dtype, DEVICE)
    for (name, mine), theirs in zip(loaded.named_parameters(), there.parameters(), strict=True):
        assert mine.device.type == DEVICE.type and mine.dtype == dtype, name
        assert torch.equal(mine.cpu(), theirs), name
