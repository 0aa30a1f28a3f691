"""What a query may see, and the attention that honours it.

One rule serves training, packing, padding and decoding. A query sees a key if

    the key is not later            k ≤ q
    it is inside the window         q - k < window      (window layers only; strictly, as in Gemma)
    it is of the same document      doc(k) = doc(q)     (packed conversations; padding is another)

Indices count slots of the row, not positions: inside one document their differences are the same.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def visible(queries: Tensor, keys: Tensor, query_docs: Tensor | None = None,
            key_docs: Tensor | None = None, window: int | None = None) -> Tensor:
    """The mask [B or 1, 1, T, S], true where a query may look.

    queries [T] and keys [S] are slot numbers; query_docs [B, T] and key_docs [B, S] the documents.
    """
    distance = queries[:, None] - keys[None, :]                                     # [T, S]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    mask = mask[None, None]                                                         # [1, 1, T, S]
    if query_docs is not None:
        mask = mask & (query_docs[:, None, :, None] == key_docs[:, None, None, :])  # [B, 1, T, S]
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float,
           softcap: float | None = None) -> Tensor:
    """softmax(cap(scale · q kᵀ) where visible) v.

    q [B, N, T, H]; k and v [B, K, S, H] with N a multiple of K; returns [B, N, T, H]. The soft-cap
    c·tanh(s / c) comes before the mask (Gemma 2, arXiv:2408.00118, section 2), and no fused kernel
    of PyTorch knows it; without a cap PyTorch's own kernel serves.
    """
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale,
                                              enable_gqa=q.shape[1] != k.shape[1])
    B, N, T, H = q.shape
    K = k.shape[1]
    q = (q * scale).view(B, K, N // K, T, H)  # queries beside those that share their key head
    return _CappedAttention.apply(q, k, v, mask.expand(B, -1, -1, -1), softcap,
                                  torch.is_grad_enabled()).view(B, N, T, H)


BLOCK = 96  # queries at a time: their scores stay in a CPU's cache


class _CappedAttention(torch.autograd.Function):
    """Attention with a soft-cap, a block of queries at a time, its scores made anew in backward.

    The cap c·tanh(q kᵀ / c) is 2c·σ - c with σ = sigmoid(2 q kᵀ / c), and softmax does not see the
    - c. σ takes a CPU a third of tanh's time but rounds small scores by up to 4e-6, so it serves in
    training; where no gradient is wanted, tanh does. With p = softmax(2c σ) and o = p v:

        dv = pᵀ do        dp = do vᵀ        ds = 4 p (dp - Σ dp p) σ (1 - σ)
        dq = ds k         dk = dsᵀ q

    Autograd would keep four [B, N, T, S] tensors a layer; here one block's live at a time, and keys
    that no query of the block may see (later ones, other documents, past the window) are left out.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float,
                training: bool) -> Tensor:
        """q [B, K, G, T, H] scaled; k, v [B, K, S, H]; mask [B, 1, T, S] → [B, K, G, T, H]."""
        out = torch.empty_like(q)
        for row, queries, keys in _blocks(mask):
            _, p = _weights(q[row, :, :, queries], k[row, :, keys], mask[row, :, queries, keys],
                            softcap, training)
            out[row, :, :, queries] = p.to(v.dtype) @ v[row, :, None, keys]
        ctx.save_for_backward(q, k, v, mask)
        ctx.softcap = softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """grad [B, K, G, T, H] → gradients of q, k, v."""
        q, k, v, mask = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for row, queries, keys in _blocks(mask):
            q_block, do = q[row, :, :, queries], grad[row, :, :, queries]           # [K, G, t, H]
            sigma, p = _weights(q_block, k[row, :, keys], mask[row, :, queries, keys], ctx.softcap,
                                training=True)
            # Sums over a group's queries are one product: its G·t rows lie one under the other.
            dv[row, :, keys] += p.to(v.dtype).flatten(1, 2).mT @ do.flatten(1, 2)
            ds = (do @ v[row, :, None, keys].mT).to(p.dtype)                        # [K, G, t, s]
            ds.sub_((ds * p).sum(-1, keepdim=True)).mul_(p.mul_(sigma))
            ds = ds.addcmul_(ds, sigma, value=-1).to(q.dtype)                      # a quarter of it
            dq[row, :, :, queries] = ds @ (4 * k[row, :, None, keys])
            dk[row, :, keys] += ds.flatten(1, 2).mT @ (4 * q_block).flatten(1, 2)
        return dq, dk, dv, None, None, None


def _blocks(mask: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Row, queries and the range of keys that these see, over a whole mask [B, 1, T, S]."""
    T = mask.shape[2]
    for row, of_row in enumerate(mask[:, 0]):
        for start in range(0, T, BLOCK):
            queries = slice(start, min(start + BLOCK, T))
            seen = of_row[queries].any(0).nonzero()
            yield row, queries, slice(int(seen[0]), int(seen[-1]) + 1)


def _weights(q: Tensor, k: Tensor, mask: Tensor, softcap: float, training: bool,
             ) -> tuple[Tensor | None, Tensor]:
    """σ = sigmoid(2 q kᵀ / c), in training, and the softmax of the capped scores of a block.

    Both [K, G, t, s] in float32 or wider.
    """
    K, G, t, H = q.shape
    scores = (q.reshape(K, G * t, H) @ k.mT).view(K, G, t, -1)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if training:
        sigma = scores.mul_(2 / softcap).sigmoid_()
        capped = sigma * (2 * softcap)  # more than the cap by softcap everywhere
    else:
        sigma, capped = None, scores.div_(softcap).tanh_().mul_(softcap)
    return sigma, F.softmax(capped.masked_fill_(~mask, float("-inf")), -1)
