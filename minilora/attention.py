"""What a query may see, and the attention that honours it.

One rule serves training, packing, padding and decoding. A query sees a key if

    the key is not later            k ≤ q
    it is inside the window         q - k < window      (window layers only; strictly, as in Gemma)
    it is of the same document      doc(k) = doc(q)     (packed conversations; padding is another)

Indices count slots of the row, not positions: inside one document their differences are the same.
"""

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
    # The N / K queries that share a key head are laid one under the other: no copy of k and v.
    out = _CappedAttention.apply((q * scale).reshape(B, K, N // K * T, H), k, v, mask, softcap)
    return out.view(B, N, T, H)


class _CappedAttention(torch.autograd.Function):
    """Attention with a soft-cap, one row of the batch at a time, its scores made anew in backward.

    With t = tanh(q kᵀ / c), p = softmax(c t) and o = p v:

        dv = pᵀ do        dp = do vᵀ        ds = p (dp - Σ dp p) (1 - t²)
        dq = ds k         dk = dsᵀ q

    Autograd would keep four [B, N, T, S] tensors a layer; here one row's live at a time, which on a
    CPU is also several times faster, because they stay small enough for the cache.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float) -> Tensor:
        """q [B, K, G·T, H] scaled; k, v [B, K, S, H]; mask [B or 1, 1, T, S] → [B, K, G·T, H]."""
        out = torch.empty_like(q)
        mask = mask.expand(len(q), -1, -1, -1)
        for row in range(len(q)):
            _, weights = _weights(q[row], k[row], mask[row], softcap)
            torch.matmul(weights.to(v.dtype), v[row], out=out[row])
        ctx.save_for_backward(q, k, v, mask)
        ctx.softcap = softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """grad [B, K, G·T, H] → gradients of q, k, v."""
        q, k, v, mask = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for row in range(len(q)):
            capped, weights = _weights(q[row], k[row], mask[row], ctx.softcap)
            torch.matmul(weights.to(v.dtype).mT, grad[row], out=dv[row])
            ds = (grad[row] @ v[row].mT).to(weights.dtype)                          # [K, G·T, S]
            ds.sub_((ds * weights).sum(-1, keepdim=True)).mul_(weights)
            ds = ds.addcmul_(ds * capped, capped, value=-1).to(q.dtype)
            torch.matmul(ds, k[row], out=dq[row])
            torch.matmul(ds.mT, q[row], out=dk[row])
        return dq, dk, dv, None, None


def _weights(q: Tensor, k: Tensor, mask: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """tanh(q kᵀ / c) and softmax(c · that), in float32 or wider; both [K, G·T, S] of one row."""
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    capped = scores.div_(softcap).tanh_()
    K, GT, S = capped.shape
    logits = (capped * softcap).view(K, -1, *mask.shape[-2:])                       # [K, G, T, S]
    logits.masked_fill_(~mask, float("-inf"))
    return capped, F.softmax(logits, -1).view(K, GT, S)
