"""Every gradient that minilora makes by hand, and every closed form it states, in float64.

`gradcheck` compares a backward with finite differences of its forward, so that a sign, a factor or
a missing mask cannot hide. Nothing of the sort is run by the projects this one learned from.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch import nn
from torch.autograd import gradcheck

from minilora import loss as loss_module
from minilora.attention import attend, visible
from minilora.config import LoraConfig
from minilora.data import IGNORED
from minilora.lora import LoRALinear, attach, trainable
from minilora.loss import token_loss
from minilora.model import RMSNorm

WIDE = torch.float64


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=WIDE)).requires_grad_()


def lora_linear(rslora: bool = False, **variant) -> LoRALinear:
    """A LoRALinear in float64 with every number drawn, B too."""
    layer = LoRALinear(nn.Linear(7, 5, bias=False), 3, 4.5, rslora=rslora, **variant).to(WIDE)
    with torch.no_grad():
        for seed, tensor in enumerate([*layer.parameters(), *layer.buffers()]):
            tensor.copy_(draw(*tensor.shape, seed=seed))
    return layer


def _kept(shape: torch.Size, p: float) -> torch.Tensor:
    """Factors of a dropout that drops the same numbers each time, in every dtype."""
    keep = torch.rand(shape[-1], generator=torch.Generator().manual_seed(shape[-1])) >= p
    return keep.float() / (1 - p)


@pytest.mark.parametrize("rslora", [False, True])
def test_closed_forms_of_dA_and_dB(rslora):
    """dB = s · gᵀ (x Aᵀ) and dA = s · (g B)ᵀ x, as the head of lora.py states them."""
    layer, x, g = lora_linear(rslora), draw(11, 7, seed=8), draw(11, 5, seed=9)
    layer(x).backward(g)
    s = 4.5 / (3 ** 0.5 if rslora else 3)
    torch.testing.assert_close(layer.lora_B.grad, s * g.mT @ (x @ layer.lora_A.mT))
    torch.testing.assert_close(layer.lora_A.grad, s * (g @ layer.lora_B).mT @ x)
    torch.testing.assert_close(x.grad, g @ (layer.weight + s * layer.lora_B @ layer.lora_A))
    assert layer.weight.grad is None


@pytest.mark.parametrize("variant", [{}, dict(rslora=True), dict(init="pissa"), dict(dora=True),
                                     dict(dora=True, init="pissa"), dict(dropout=0.4),
                                     dict(dropout=0.4, init="pissa")])
def test_lora_linear_gradcheck(variant, monkeypatch):
    """DoRA's norm is held still here: no gradient flows through it (section 4.3 of its paper)."""
    layer = lora_linear(**variant)
    if "dropout" in variant:
        monkeypatch.setattr(F, "dropout", lambda x, p, training: x * _kept(x.shape, p))
    norm = layer._norm()
    monkeypatch.setattr(LoRALinear, "_norm", lambda self: norm)
    names = [name for name, _ in layer.named_parameters() if name != "weight"]
    assert ("lora_magnitude" in names) == ("dora" in variant)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = (draw(*layer.get_parameter(name).shape, seed=i) for i, name in enumerate(names, 4))
    assert gradcheck(run, (draw(4, 7, seed=3), *values))


def test_closed_forms_of_dora():
    """With V = W + ΔW and G = gᵀx: dm = Σ G ∘ V / ‖V‖ a row, dB = s · (m / ‖V‖ ∘ G) Aᵀ."""
    layer, x, g = lora_linear(dora=True), draw(11, 7, seed=8), draw(11, 5, seed=9)
    layer(x).backward(g)
    s, m, G = 1.5, layer.lora_magnitude, g.mT @ x
    V = layer.weight + s * layer.lora_B @ layer.lora_A
    length = V.norm(dim=1)
    torch.testing.assert_close(m.grad, (G * V).sum(1) / length)
    torch.testing.assert_close(layer.lora_B.grad, s * (m / length)[:, None] * G @ layer.lora_A.mT)
    torch.testing.assert_close(x.grad, g @ ((m / length)[:, None] * V))


def test_the_gradient_of_pissa_is_that_of_lora():
    """A₀ and B₀ move where A and B are, not how the loss changes with them."""
    layer, x, g = lora_linear(init="pissa"), draw(11, 7, seed=8), draw(11, 5, seed=9)
    layer(x).backward(g)
    torch.testing.assert_close(layer.lora_B.grad, 1.5 * g.mT @ (x @ layer.lora_A.mT))
    torch.testing.assert_close(layer.lora_A.grad, 1.5 * (g @ layer.lora_B).mT @ x)


def test_norm_gradcheck():
    """Of x and of w, which base training could want, on rows of several dimensions."""
    norm = RMSNorm(5, 0.1).to(WIDE)

    def run(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert gradcheck(run, (draw(2, 3, 5, seed=1), draw(5, seed=2)))
    assert gradcheck(lambda x: norm(x.mT), (draw(2, 5, 3, seed=1),))  # w frozen, x a view


@pytest.mark.parametrize("window, documents, softcap, heads",
                         [*itertools.product([None, 3], [False, True], [None, 2.0], [(4, 2)]),
                          (3, True, 2.0, (3, 1)), (None, True, 2.0, (2, 2))])
@pytest.mark.parametrize("block", [128, 2])
def test_attention_gradcheck(window, documents, softcap, heads, block, monkeypatch):
    monkeypatch.setattr("minilora.attention.BLOCK", block)
    N, K = heads
    docs = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]) if documents else None
    slots = torch.arange(6)
    mask = visible(slots, slots, docs, docs, window)
    q, k, v = draw(2, N, 6, 4, seed=1, scale=2), draw(2, K, 6, 4, seed=2), draw(2, K, 6, 4, seed=3)
    assert gradcheck(lambda q, k, v: attend(q, k, v, mask, 0.7, softcap), (q, k, v))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("block", [128, 4])
def test_attention_is_the_textbook_formula(softcap, block, monkeypatch):
    """Against four lines that anybody can check, with grouped heads and a mask."""
    monkeypatch.setattr("minilora.attention.BLOCK", block)
    q, k, v = draw(2, 4, 6, 8, seed=1), draw(2, 2, 6, 8, seed=2), draw(2, 2, 6, 8, seed=3)
    mask = visible(torch.arange(6), torch.arange(6), window=4)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(attend(q, k, v, mask, 0.3, softcap), expected)


def wide_model(mode: str | None, model_type: str = "gemma2", **overrides):
    """A tiny model in float64, new rows added as `mode` says."""
    model = tiny_model(model_type, dtype=WIDE, vocab_size=40, hidden_size=12, intermediate_size=16,
                       num_hidden_layers=2, head_dim=4, sliding_window=3, **overrides)
    if mode:
        ids = [40, 41, 42] if mode == "append" else [7, 5, 30]
        model.embed_tokens.add_rows(ids, draw(3, 12, seed=7).detach())
        model.embed_tokens.rows.data = model.embed_tokens.rows.data.to(WIDE)
    return model


def with_parameters(model, names, loss):
    """`loss()` as a function of the named parameters, for gradcheck."""
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return loss()

    module = Loss()
    return lambda *values: torch.func.functional_call(
        module, {f"model.{name}": value for name, value in zip(names, values, strict=True)}, ())


@pytest.mark.parametrize("mode", [None, "append", "reserved"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk, columns", [(2, 100), (100, 7)])
def test_loss_gradcheck(mode, softcap, chunk, columns, monkeypatch):
    """The chunked loss: hidden and rows, chunks and columns that do not divide, capped and not."""
    monkeypatch.setattr("minilora.loss.COLUMNS", columns)
    model = wide_model(mode, final_logit_softcapping=softcap)
    last = model.embed_tokens.num_embeddings - 1
    labels = torch.tensor([[IGNORED, 5, IGNORED, 30, 7], [IGNORED, 39, 5, 2, last]])

    def loss(hidden):
        return token_loss(model, hidden, labels, chunk)[0]

    hidden = draw(2, 5, 12, seed=1, scale=2.0)
    assert gradcheck(loss, (hidden,))
    if mode:
        run = with_parameters(model, ["embed_tokens.rows"], lambda: loss(hidden.detach()))
        assert gradcheck(run, (draw(3, 12, seed=2),))


@pytest.mark.parametrize("columns", [7, 100])
@pytest.mark.parametrize("mode", [None, "append", "reserved"])
def test_loss_is_cross_entropy_of_the_logits(mode, columns, monkeypatch):
    """The same number and gradient as the plain way: all logits, float64, F.cross_entropy."""
    monkeypatch.setattr("minilora.loss.COLUMNS", columns)
    model = wide_model(mode)
    hidden = draw(2, 6, 12, seed=1)
    labels = torch.randint(0, model.embed_tokens.num_embeddings, (2, 6))
    labels[0, :3] = IGNORED
    total, count = token_loss(model, hidden, labels, chunk=3)
    plain = F.cross_entropy(model.logits(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                            ignore_index=IGNORED, reduction="sum")
    assert count == int((labels[:, 1:] != IGNORED).sum()) == 8
    torch.testing.assert_close(total, plain)
    with torch.no_grad():
        torch.testing.assert_close(token_loss(model, hidden, labels)[0], plain)
    watched = [hidden, *trainable(model).values()]
    for got, expected in zip(torch.autograd.grad(3.0 * total, watched),
                             torch.autograd.grad(3.0 * plain, watched), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_compiler_takes_what_is_done_to_logits_whole(softcap):
    """On a GPU both are compiled: one graph without a break, and the same numbers."""
    z, y, taken = draw(6, 9, scale=3.0).detach(), torch.arange(6)[:, None] - 1, torch.tensor([3])
    total = z.logsumexp(-1, keepdim=True)
    for function, last in ((loss_module._sums, True), (loss_module._gradient, total)):
        whole = torch.compile(function, backend="aot_eager", fullgraph=True)
        for part in (None, taken):
            kept = z.clone()
            torch.testing.assert_close(whole(z, y, part, softcap, last),
                                       function(z, y, part, softcap, last))
            assert torch.equal(z, kept)


def test_a_batch_with_nothing_to_train_stays_connected():
    model = wide_model("append")
    hidden = draw(1, 4, 12)
    total, count = token_loss(model, hidden, torch.full((1, 4), IGNORED))
    total.backward()
    assert count == 0 and total.item() == 0.0
    assert not hidden.grad.any() and not model.embed_tokens.rows.grad.any()


@pytest.mark.parametrize("mode", ["append", "reserved"])
@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_whole_model_gradcheck(model_type, mode):
    """Blocks with LoRA on every linear, caps, windows, documents and new rows, down to the loss."""
    extra = dict(sliding_window_pattern=2) if model_type == "gemma3_text" else {}
    model = wide_model(mode, model_type, **extra)
    attach(model, LoraConfig(rank=2, alpha=3.0))
    model.embed_tokens.rows.requires_grad_(True)
    for seed, (name, parameter) in enumerate(trainable(model).items()):
        parameter.data = draw(*parameter.shape, seed=seed, scale=0.3).detach()
        assert "lora_" in name or name == "embed_tokens.rows"
    new = model.embed_tokens.row_ids.tolist()
    ids = torch.tensor([[2, 9, new[0], 4, 2, new[1], new[2], 0]])
    labels = torch.tensor([[IGNORED, 9, new[0], IGNORED, IGNORED, new[1], new[2], IGNORED]])
    documents = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]])
    names = ["layers.0.self_attn.k_proj.lora_A", "layers.1.self_attn.q_proj.lora_B",
             "layers.1.mlp.gate_proj.lora_A", "layers.0.mlp.down_proj.lora_B", "embed_tokens.rows"]
    parameters = dict(model.named_parameters())

    def loss():
        return token_loss(model, model.hidden_states(ids, positions, documents), labels)[0]

    values = tuple(parameters[name].detach().clone().requires_grad_() for name in names)
    assert gradcheck(with_parameters(model, names, loss), values, fast_mode=True)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_float32_takes_other_kernels_to_the_same_gradients(model_type, monkeypatch):
    """oneDNN for every product, however small, against float64, where there is no oneDNN."""
    gradients = {}
    for dtype in (torch.float32, WIDE):
        model = tiny_model(model_type, dtype=dtype)
        attach(model, LoraConfig(rank=4, dropout=0.2))
        for seed, parameter in enumerate(trainable(model).values()):
            parameter.data = draw(*parameter.shape, seed=seed, scale=0.1).detach().to(dtype)
        monkeypatch.setattr("minilora.linear.FEW", 0)
        ids = torch.arange(2 * 20).view(2, 20) * 31 % 512
        monkeypatch.setattr(F, "dropout", lambda x, p, training: x * _kept(x.shape, p))
        token_loss(model, model.hidden_states(ids), ids)[0].backward()
        gradients[dtype] = {name: p.grad for name, p in trainable(model).items()}
    for name, exact in gradients[WIDE].items():
        difference = (gradients[torch.float32][name] - exact).abs().max()
        assert exact.any() and difference <= 1e-4 * exact.abs().max(), name
