"""x Wᵀ by any kernel is x Wᵀ."""

import pytest
import torch
from torch import Tensor

from minilora import linear as module
from minilora.linear import Linear, linear, product

LAYOUTS = {
    "dense": lambda rows, columns: torch.randn(rows, columns),
    "transposed": lambda rows, columns: torch.randn(columns, rows).mT,
    "gaps": lambda rows, columns: torch.randn(rows, 3, columns)[:, 1],
    "gaps, transposed": lambda rows, columns: torch.randn(columns, 3, rows)[:, 1].mT,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(found: Tensor, expected: Tensor) -> bool:
    return (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 8, 200])
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_product_in_every_layout(of_x, of_weight, rows):
    """200 rows are enough for oneDNN, and one is not."""
    x, weight = LAYOUTS[of_x](rows, 96), LAYOUTS[of_weight](70, 96)
    expected = x.double() @ weight.double().mT
    assert close(product(x, weight), expected)
    more = torch.randn(rows, 70)
    kept = more.clone()
    assert close(product(x, weight, more), expected + more)
    assert torch.equal(more, kept)  # added, not added to


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_product_keeps_leading_dimensions_and_dtype(dtype):
    x, weight = torch.randn(2, 3, 200, 96).to(dtype), torch.randn(70, 96).to(dtype)
    y = product(x, weight)
    assert y.shape == (2, 3, 200, 70) and y.dtype == dtype
    both = product(x, weight, torch.ones_like(y))
    assert (both - 1 - y).abs().max() <= 4 * torch.finfo(dtype).eps * y.abs().max()


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("trained", ["x", "weight", "both"])
def test_gradients_are_those_of_float64(trained, rows):
    x, weight, g = torch.randn(2, rows, 96), torch.randn(70, 96), torch.randn(2, rows, 70)
    x.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "x")
    linear(x, weight).backward(g)
    if trained != "weight":
        assert close(x.grad, g.double() @ weight.detach().double())
    if trained != "x":
        assert close(weight.grad, torch.einsum("bto,bti->oi", g.double(), x.detach().double()))
    assert (x.grad is None) == (trained == "weight")


def test_without_a_gradient_nothing_is_kept():
    layer = Linear(96, 70)
    assert layer.bias is None and layer(torch.randn(200, 96)).requires_grad
    with torch.no_grad():
        assert layer(torch.randn(200, 96)).grad_fn is None


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this PyTorch")
def test_onednn_is_what_serves_float32(monkeypatch):
    """The operators have no public name: a PyTorch that drops them must be noticed here."""
    x, weight = torch.randn(200, 96), torch.randn(70, 96)
    with torch.profiler.profile() as profile:
        product(x, weight)
        product(x, weight, torch.randn(200, 70))
    names = [event.name for event in profile.events()]
    assert names.count("mkldnn::_linear_pointwise") == 2
    monkeypatch.setattr(module, "_onednn", lambda x, weight: False)
    assert close(product(x, weight), x.double() @ weight.double().mT)
