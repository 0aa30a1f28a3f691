"""What a query may see, and the attention that honours it.

One rule, `sees`, serves training, packing, padding and decoding. A query sees a key if

    the key is not later            k ≤ q
    it is inside the window         q - k < window      (window layers only; strictly, as in Gemma)
    it is of the same document      doc(k) = doc(q)     (packed conversations; padding is another)

Indices count slots of the row, not positions: inside one document their differences are the same.

Two things are made of the rule. `visible` is a dense mask, which every device takes; `blocks` says
which tiles of 128 × 128 have something to see, and flex attention skips the others: on a GPU, where
a row reads itself, in training and when a prompt is read. `attend` takes either.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from minilora.linear import product


def sees(query: Tensor, key: Tensor, query_doc: Tensor | None = None,
         key_doc: Tensor | None = None, window: int | None = None) -> Tensor:
    """Whether a query sees a key, from the slots and the documents of both.

    Of any shapes that broadcast: whole rows for a dense mask, single numbers in flex attention.
    """
    distance = query - key
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    if query_doc is not None:
        seen = seen & (query_doc == key_doc)
    return seen


def visible(queries: Tensor, keys: Tensor, query_docs: Tensor | None = None,
            key_docs: Tensor | None = None, window: int | None = None) -> Tensor:
    """The mask [B or 1, 1, T, S], true where a query may look.

    queries [T] and keys [S] are slot numbers; query_docs [B, T] and key_docs [B, S] the documents.
    """
    if query_docs is not None:
        query_docs, key_docs = query_docs[:, None, :, None], key_docs[:, None, None, :]
    return sees(queries[None, None, :, None], keys[None, None, None, :], query_docs, key_docs,
                window)


class Blocks(NamedTuple):
    """The mask of a row that reads itself, as flex attention takes it."""

    mask: BlockMask
    options: dict[str, int]  # of the kernels: tile sizes that the GPU has room for


def blocks(length: int, documents: Tensor | None, window: int | None, head_dim: int,
           device: torch.device, dtype: torch.dtype) -> Blocks:
    """What `visible` is for T queries and the same T keys, documents [B, T], by blocks.

    Made once a batch and kind of layer: making it costs more than a layer's use of it.
    """
    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if documents is None:
            return sees(query, key, window=window)
        return sees(query, key, documents[b, query], documents[b, key], window)

    make = compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    rows = 1 if documents is None else len(documents)
    return Blocks(make(mask, rows, 1, length, length, device=device),
                  kernel_options(head_dim, device, dtype))


# Options of the kernels (`FlexKernelOptions`) on an A100, H100 or B200: {} leaves all to PyTorch.
FLEX_OPTIONS: dict[str, int] = {}
_TILES = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2",
          "bwd_BLOCK_N2")


def kernel_options(head_dim: int, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """The options of flex attention's kernels on a device.

    Other GPUs than those have some 100 KB for the tiles of a kernel and not 160 to 230, and what
    PyTorch (2.13) chooses for Gemma's head dim of 256 does not fit there (pytorch#198224).
    """
    if device.type != "cuda" or head_dim <= 128:
        return FLEX_OPTIONS
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10) or (major, minor) == (8, 0):
        return FLEX_OPTIONS
    return dict.fromkeys(_TILES, 64 // dtype.itemsize) | {"num_stages": 2, "num_warps": 4}


@functools.cache
def compiles(device: torch.device) -> bool:
    """Whether PyTorch can compile for a device: flex attention needs that, and layers may be.

    A GPU needs Triton, bfloat16 (NVIDIA's Ampere and later) and a C compiler; a CPU a C++ compiler.
    """
    def found(variable: str, *names: str) -> bool:
        return any(map(shutil.which, [os.environ.get(variable, names[0]), *names]))

    if device.type == "cuda":
        return (importlib.util.find_spec("triton") is not None and found("CC", "gcc", "clang")
                and torch.cuda.get_device_capability(device) >= (8, 0))
    return device.type == "cpu" and found("CXX", "g++", "clang++")


LONG = 1024  # tokens of a prompt from which flex attention is worth the seconds of compiling it


def flex_fits(device: torch.device, head_dim: int, length: int) -> bool:
    """Whether flex attention is to serve rows of `length` tokens: in training, and long prompts.

    On a CPU it has no backward, and a dense mask is faster.
    """
    return (device.type == "cuda" and head_dim >= 16 and compiles(device)
            and length >= (2 if torch.is_grad_enabled() else LONG))


@functools.cache
def compiled(function: Callable) -> Callable:
    """torch.compile(function), made when it is first needed: the compiler takes seconds to load."""
    import torch._dynamo

    # For each shape, window or layer that differs in kind there is one version; 8 are too few.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Blocks, scale: float,
           softcap: float | None = None) -> Tensor:
    """softmax(cap(scale · q kᵀ) where visible) v.

    q [B, N, T, H]; k and v [B, K, S, H] with N a multiple of K; returns [B, N, T, H]. The soft-cap
    c·tanh(s / c) comes before the mask (Gemma 2, arXiv:2408.00118, section 2). Flex attention takes
    it as a function of a score; the other fused kernels of PyTorch do not know it.
    """
    if isinstance(mask, Blocks):
        return _flex(q, k, v, mask, scale, softcap)
    B, N, T, H = q.shape
    K = k.shape[1]
    if q.device.type == "cpu" and T > 1 and not torch.compiler.is_compiling():
        q = (q * scale).view(B, K, N // K, T, H)  # queries beside those that share their key head
        return _BlockAttention.apply(q, k, v, mask.expand(B, -1, -1, -1), softcap,
                                     torch.is_grad_enabled()).view(B, N, T, H)
    if softcap is None and (T > 1 or q.device.type != "cpu"):  # a tenth as fast for one query there
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale,
                                              enable_gqa=N != K)
    return _plain((q * scale).view(B, K, N // K, T, H), k, v, mask, softcap).view(B, N, T, H)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None) -> Tensor:
    """Attention as it is written, all scores at once: a step of decoding, and soft-caps on GPUs.

    q [B, K, G, T, H] scaled; k, v [B, K, S, H]; mask [B or 1, 1, T, S] → [B, K, G, T, H].
    """
    scores = (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])                # [B, K, G, T, S]
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    p = scores.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1).to(v.dtype)
    return (p.flatten(2, 3) @ v).unflatten(2, q.shape[2:4])


def _flex(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float,
          softcap: float | None) -> Tensor:
    """Flex attention: on a GPU a compiled kernel, on a CPU (for tests) plain and forward only."""
    def cap(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # c·tanh(s / c) + c; softmax does not see the + c, and σ is faster than tanh here too.
        return 2 * softcap * torch.sigmoid(score * (2 / softcap))

    inside = torch.compiler.is_compiling()  # a layer, with all that is in it
    kernel = compiled(flex_attention) if q.is_cuda and not inside else flex_attention
    return kernel(q, k, v, cap if softcap is not None else None, blocks.mask, scale=scale,
                  enable_gqa=q.shape[1] != k.shape[1], kernel_options=blocks.options)


BLOCK = 128  # queries at a time: their scores stay in a CPU's cache
TILE = 64    # keys


class _BlockAttention(torch.autograd.Function):
    """Attention on a CPU, a block of queries at a time, its scores made anew in backward.

    With p = softmax(l), l = cap(q kᵀ) and o = p v:

        dv = pᵀ do        dp = do vᵀ        ds = p (dp - Σ dp p) (1 - (l / c)²)
        dq = ds k         dk = dsᵀ q

    The cap c·tanh(s / c) is 2c·σ - c with σ = sigmoid(2s / c), and softmax does not see the - c. σ
    takes a CPU a third of tanh's time but rounds small scores by up to 4e-6, so it serves in
    training, where 1 - (l / c)² is 4σ (1 - σ); where no gradient is wanted, tanh does.

    Autograd would keep several [B, N, T, S] tensors a layer; here one block's live at a time, and
    keys that no query of the block may see (later ones, other documents, past the window) are left
    out. A group's queries share keys: they lie one under the other in one product.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None,
                training: bool) -> Tensor:
        """q [B, K, G, T, H] scaled; k, v [B, K, S, H]; mask [B, 1, T, S] → [B, K, G, T, H]."""
        out = torch.empty_like(q)
        ctx.blocks = [(row, head, queries, keys) for row, queries, keys in _blocks(mask)
                      for head in range(k.shape[1])]
        for row, head, queries, keys in ctx.blocks:
            q_block = q[row, head, :, queries]                                      # [G, t, H]
            _, p = _weights(q_block.flatten(0, 1), k[row, head, keys], mask[row, :, queries, keys],
                            softcap, training)
            out[row, head, :, queries] = product(
                p.to(v.dtype), v[row, head, keys].mT).view(q_block.shape)
        ctx.save_for_backward(q, k, v, mask)
        ctx.softcap = softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """grad [B, K, G, T, H] → gradients of q, k, v."""
        q, k, v, mask = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for row, head, queries, keys in ctx.blocks:
            q_block = q[row, head, :, queries].flatten(0, 1)                        # [G t, H]
            do = grad[row, head, :, queries].flatten(0, 1)                          # [G t, H]
            k_block, v_block = k[row, head, keys], v[row, head, keys]               # [s, H]
            sigma, p = _weights(q_block, k_block, mask[row, :, queries, keys], ctx.softcap,
                                training=True)
            dv[row, head, keys] += product(p.to(v.dtype).mT, do.mT)
            ds = product(do, v_block).to(p.dtype)                                   # [G t, s]
            ds.sub_((ds * p).sum(-1, keepdim=True)).mul_(p)
            if sigma is not None:
                ds.mul_(sigma).mul_(sigma.neg_().add_(1)).mul_(4)
            ds = ds.to(q.dtype)
            dq[row, head, :, queries] = product(ds, k_block.mT).view(q.shape[2], -1, q.shape[4])
            dk[row, head, keys] += product(ds.mT, q_block.mT)
        return dq, dk, dv, None, None, None


def _blocks(mask: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Row, queries and the range of keys that these see, over a whole mask [B, 1, T, S].

    Ranges begin and end at a multiple of TILE: oneDNN keeps what it made for each shape it met.
    """
    T, S = mask.shape[2:]
    for row, of_row in enumerate(mask[:, 0]):
        for start in range(0, T, BLOCK):
            queries = slice(start, min(start + BLOCK, T))
            seen = of_row[queries].any(0).nonzero()
            first, last = int(seen[0]) // TILE * TILE, (int(seen[-1]) // TILE + 1) * TILE
            yield row, queries, slice(first, min(last, S))


def _weights(q: Tensor, k: Tensor, mask: Tensor, softcap: float | None, training: bool,
             ) -> tuple[Tensor | None, Tensor]:
    """σ = sigmoid(2 q kᵀ / c), in training with a cap, and the softmax of a block's scores.

    q [G t, H], k [s, H], mask [1, t, s]; both [G t, s] in float32 or wider.
    """
    scores = product(q, k).to(torch.promote_types(q.dtype, torch.float32))
    sigma = None
    if softcap is not None and training:
        sigma = scores.mul_(2 / softcap).sigmoid_()
        scores = sigma * (2 * softcap)  # more than the cap by softcap everywhere
    elif softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores.view(-1, *mask.shape[1:]).masked_fill_(~mask, float("-inf"))
    return sigma, F.softmax(scores, -1)
