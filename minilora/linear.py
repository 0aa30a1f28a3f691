"""x Wᵀ, the product that nearly all of the time goes into, by PyTorch's fastest kernel for it.

In float32 on a CPU `F.linear` is MKL's, which leaves half of an AMD processor's width unused: 90
GFLOP/s a core of a Zen 5, where oneDNN, which PyTorch ships as well, does 200. In bfloat16 PyTorch
takes oneDNN by itself, and on a GPU cuBLAS; there, and for small products, it is `F.linear` here.
The compiler of PyTorch calls oneDNN by the same operators (`torch/_inductor/mkldnn_ir.py`).
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW = 2**20  # multiplications below which starting oneDNN takes longer than it saves

# Half a megabyte is kept for each shape of a product that oneDNN has met, of 1,024 of them unless
# told otherwise, and prompts and trained tokens make new shapes all the time. Read at first use.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's, PyTorch's
    os.environ.setdefault(_cache, "256")


class Linear(nn.Linear):
    """A linear without bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., in], weight [out, in] → [.., out]; differentiable in both."""
    if torch.is_grad_enabled() and _onednn(x, weight):
        return _Linear.apply(x, weight)
    return product(x, weight)


def product(x: Tensor, weight: Tensor, more: Tensor | None = None) -> Tensor:
    """x [.., in], weight [out, in] → x weightᵀ (+ more) [.., out], without a gradient in oneDNN."""
    if _onednn(x, weight):
        if not weight.is_contiguous() and not weight.mT.is_contiguous():
            weight = weight.contiguous()  # rows with gaps between them take 1,000 times as long
        if more is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, more, weight, None, "add")
    if more is None:
        one = x.numel() == x.shape[-1] and x.dtype == torch.bfloat16 and x.device.type == "cpu"
        return _one_row(x, weight) if one else F.linear(x, weight)
    return torch.addmm(more.flatten(0, -2), x.flatten(0, -2), weight.mT).view(more.shape)


def _one_row(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear without oneDNN, which reads weights for one bfloat16 row at two thirds of the speed.

    PyTorch's own product of a matrix and a vector takes them as fast as memory gives them: decoding
    is little else.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight)
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        return F.linear(x, weight)
    finally:
        torch.backends.mkldnn.enabled = before


def _onednn(x: Tensor, weight: Tensor) -> bool:
    return (x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
            and x.numel() * len(weight) >= FEW and torch.backends.mkldnn.is_available()
            and not torch.compiler.is_compiling())


class _Linear(torch.autograd.Function):
    """dx = g W and dW = gᵀ x, as products of the same kernel."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """grad [.., out] → gradients of x and weight."""
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        return (product(grad, weight.mT) if of_x else None,
                product(grad.flatten(0, -2).mT, x.flatten(0, -2).mT) if of_weight else None)
