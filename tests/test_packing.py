"""Packing is a layout: it changes neither loss nor gradient, and neighbours know nothing of each
other. In float64, so that what is left is not rounding."""

import pytest
import torch
from conftest import tiny_model

from minilora.config import FAMILIES, LoraConfig, TrainConfig
from minilora.data import IGNORED, Batch, Example, batches, collate
from minilora.lora import attach, trainable
from minilora.loss import token_loss
from minilora.model import Gemma
from minilora.trainer import batch_loss, make_optimizer, train_step

NEW = [512, 513]  # ids of the new tokens
SIZES = [20, 6, 17, 9, 13, 20, 11, 8]  # the window is 8


def conversations(sizes: list[int]) -> list[Example]:
    """Random tokens with new ones among them; the first half, the third or less is not trained."""
    generator = torch.Generator().manual_seed(6)
    examples = []
    for number, size in enumerate(sizes):
        ids = torch.randint(3, 500, (size,), generator=generator)
        ids[number % 5::5] = NEW[number % 2]
        labels = ids.clone()
        labels[:1 + size // (2 + number % 3)] = IGNORED
        examples.append(Example(ids, torch.zeros(size, dtype=torch.uint8), labels, f"row {number}"))
    return examples


def model_with_lora(family: str) -> Gemma:
    """LoRA on every linear and new rows, every number of them drawn, in float64."""
    model = tiny_model(family)
    attach(model, LoraConfig(rank=2, alpha=3.0))
    model.embed_tokens.add_rows(NEW, torch.zeros(2, model.config.hidden_size))
    model.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(0, 0.1, generator=generator)
    return model


def step_gradients(family: str, step: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss that an optimizer step reports, and the gradients that it hands to the optimizer."""
    model = model_with_lora(family)
    optimizer = make_optimizer(model, TrainConfig())
    seen = {}
    optimizer.step = lambda: seen.update(
        {name: parameter.grad.clone() for name, parameter in trainable(model).items()})
    done = train_step(model, optimizer, step, lr=0.0, clip=0.0)
    return done.loss, seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_of_a_step_changes_neither_loss_nor_gradient(family):
    """1 × 8 rows, 8 × 1 and what lies between, padded or packed: every trained tensor alike."""
    examples = conversations(SIZES)
    loss, gradients = step_gradients(family, list(batches(examples, 1, 20, pack=False)))
    assert len(gradients) == 7 * 2 * tiny_model(family).config.num_hidden_layers + 1
    assert all(gradient.any() for gradient in gradients.values())
    for size, length, pack in ((8, 20, False), (3, 20, False), (8, 40, True), (1, 40, True),
                               (2, 33, True), (1, 104, True)):
        step = list(batches(examples, size, length, seed=size, pack=pack))
        got_loss, got = step_gradients(family, step)
        assert got_loss == pytest.approx(loss, rel=1e-6)  # it is reported in float32
        assert got.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (got[name] - gradient).norm() <= 1e-10 * gradient.norm(), (name, size, pack)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_has_the_losses_of_its_conversations(family):
    """In float64 to the end: the sum over a row is the sum over rows of one."""
    model, examples = model_with_lora(family), conversations(SIZES)
    with torch.no_grad():
        alone = sum(batch_loss(model, collate([[example]], len(example))) for example in examples)
        together = batch_loss(model, collate([examples[:3], examples[3:]], 70))
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_has_no_gradient_from_another(family):
    """Exactly zero, wherever in the row it stands, within reach of the window and out of it."""
    model, examples = model_with_lora(family), conversations([12, 5, 9, 3])
    batch = collate([examples, examples[::-1]], 33)
    x = model.embed_tokens.encode(batch.input_ids).detach().requires_grad_()    # [2, 33, D]
    model.embed_tokens.encode = lambda _: x  # watch what enters the first layer
    hidden = model.hidden_states(batch.input_ids, batch.positions, batch.documents)
    for row in range(2):
        for document in range(1, 5):
            inside = torch.zeros_like(batch.documents, dtype=torch.bool)        # [2, 33]
            inside[row] = batch.documents[row] == document
            total, _ = token_loss(model, hidden, torch.where(inside, batch.labels, IGNORED))
            (grad,) = torch.autograd.grad(total, x, retain_graph=True)
            assert (grad[~inside] == 0).all()
            # All of its own tokens but the last, which predicts nothing.
            assert grad[inside][:-1].abs().amax(-1).gt(0).all()
