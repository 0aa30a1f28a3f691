"""Cross-entropy over what the assistant must write: a sum and a count.

Four ideas keep a vocabulary of 256,000 affordable:

    gather    only the hidden states whose next token is trained reach the table
    chunk     their logits are made a few hundred rows at a time, never all at once
    columns   on a CPU also a few thousand columns at a time, so that what is done to them is done
              in its cache: the share of each in the softmax is known once all have been seen. A GPU
              takes all columns at once, and the compiler makes one pass of what is done to them
    forward   the gradient of a chunk is made while its logits are still there; backward only scales

With z the raw logits, c the cap and l = c·tanh(z / c), the loss of one row is logΣexp(l) - l_y and

    ∂loss/∂z = (softmax(l) - onehot(y)) · (1 - (l / c)²)

A sum, because a mean of means is not a mean: whoever accumulates several batches divides once, by
all the trained tokens of the optimizer step (transformers#34191 is what happens otherwise).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.attention import compiled
from minilora.data import IGNORED
from minilora.embedding import TokenEmbedding
from minilora.linear import product
from minilora.model import Gemma

CHUNK = 512     # rows of logits alive at a time: half a gigabyte at 256,000 columns in float32
COLUMNS = 4096  # of them at a time, on a CPU


def token_loss(model: Gemma, hidden: Tensor, labels: Tensor, chunk: int = CHUNK,
               ) -> tuple[Tensor, int]:
    """hidden [B, T, D] and labels [B, T] → the sum of the losses (float32 scalar) and their number.

    labels[t] is input_ids[t] where token t is trained and -100 elsewhere: not shifted, the shift
    is made here. A batch with nothing to train gives a zero that still has a gradient.
    """
    trained = F.pad(labels[:, 1:] != IGNORED, (0, 1))                # [B, T]: the next one is
    at = trained.flatten().nonzero()[:, 0]                          # [M]
    table = model.embed_tokens
    total = _ChunkedCrossEntropy.apply(
        hidden.flatten(0, 1)[at], table.rows, labels.flatten()[at + 1], table,
        model.config.final_logit_softcapping, chunk, torch.is_grad_enabled(),
        model.compiled and hidden.is_cuda)
    return total, len(at)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the rows' losses; gradients of hidden and of the new rows, not of the table."""

    @staticmethod
    def forward(ctx, hidden: Tensor, rows: Tensor | None, targets: Tensor, table: TokenEmbedding,
                softcap: float | None, chunk: int, wanted: bool, fuse: bool) -> Tensor:
        """hidden [M, D], targets [M] → scalar."""
        sums, gradient = map(compiled, (_sums, _gradient)) if fuse else (_sums, _gradient)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted else None                 # [M, D]
        d_rows = torch.zeros_like(rows) if wanted and rows is not None else None  # [n, D]
        parts = _parts(table, hidden.dtype)
        targets = _columns(table, targets)
        for start in range(0, len(hidden), chunk):
            h, y = hidden[start:start + chunk], targets[start:start + chunk, None]
            raw, log_sum, of_target = [], None, torch.zeros_like(y, dtype=wide)
            for first, matrix, taken in parts:
                z = product(h, matrix)                                          # [m, columns]
                more, found = sums(z, y - first, taken, softcap, wanted)       # [m, 1]
                log_sum = more if log_sum is None else torch.logaddexp(log_sum, more)
                of_target += found
                if wanted:
                    raw.append(z)
            total += (log_sum - of_target).sum()
            if not wanted:
                continue
            d_h = torch.zeros_like(h, dtype=wide)                               # [m, D]
            for first, matrix, taken in parts:
                grad = gradient(raw.pop(0), y - first, taken, softcap, log_sum)
                d_h += product(grad, matrix.mT)
            if d_rows is not None:  # their part is the last one
                d_rows += product(grad.mT, h.mT)
            d_hidden[start:start + chunk] = d_h
        ctx.save_for_backward(d_hidden, d_rows)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """The gradients made in forward, times what comes from above (one number)."""
        d_hidden, d_rows = ctx.saved_tensors
        return (d_hidden * grad.to(d_hidden.dtype),
                None if d_rows is None else d_rows * grad.to(d_rows.dtype),
                None, None, None, None, None, None)


class _Part(NamedTuple):
    """Some columns of the logits."""

    first: int            # the number of its first column
    matrix: Tensor        # [columns, D], what hidden states are multiplied by
    taken: Tensor | None  # its columns that do not count, because a new row took over their id


def _parts(table: TokenEmbedding, dtype: torch.dtype) -> list[_Part]:
    """The columns of the table in order, then those of the new rows, whatever their ids are."""
    V = len(table.weight)
    step = COLUMNS if table.weight.device.type == "cpu" else V
    parts = [_Part(first, table.weight[first:first + step], None) for first in range(0, V, step)]
    if table.rows is None:
        return parts
    if table.reserved:
        ids = [table.row_ids - part.first for part in parts]
        parts = [part._replace(taken=i[(i >= 0) & (i < len(part.matrix))])
                 for part, i in zip(parts, ids, strict=True)]
    return [*parts, _Part(V, table.rows.to(dtype), None)]


def _columns(table: TokenEmbedding, ids: Tensor) -> Tensor:
    """The columns of ids [M]: their own, or, where a new row took over an id, the row's."""
    if table.rows is None or not table.reserved:
        return ids
    is_row = ids[:, None] == table.row_ids                                      # [M, n]
    return torch.where(is_row.any(-1), len(table.weight) + is_row.int().argmax(-1), ids)


def _capped(z: Tensor, taken: Tensor | None, softcap: float | None, training: bool) -> Tensor:
    """The logits [m, columns] of z in float32 or wider; in training more than that by softcap.

    Softmax does not see that, and c·tanh(z / c) + c is 2c·sigmoid(2z / c), which takes a CPU a
    third of the time and rounds small logits by up to 4e-6.
    """
    logits = z.to(torch.promote_types(z.dtype, torch.float32), copy=True)
    if softcap is not None and training:
        logits.mul_(2 / softcap).sigmoid_().mul_(2 * softcap)
    elif softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits if taken is None else logits.index_fill_(-1, taken, float("-inf"))


def _sums(z: Tensor, y: Tensor, taken: Tensor | None, softcap: float | None,
          training: bool) -> tuple[Tensor, Tensor]:
    """logΣexp(l) over the columns of z, and l_y where y [m, 1] is one of them, else 0: [m, 1]."""
    logits = _capped(z, taken, softcap, training)
    found = logits.gather(-1, y.clamp(0, z.shape[-1] - 1))
    inside = (y >= 0) & (y < z.shape[-1])
    return logits.logsumexp(-1, keepdim=True), found.masked_fill_(~inside, 0)


def _gradient(z: Tensor, y: Tensor, taken: Tensor | None, softcap: float | None,
              log_sum: Tensor) -> Tensor:
    """∂loss/∂z [m, columns] in z's dtype, from logΣexp(l) [m, 1] over all columns."""
    logits = _capped(z, taken, softcap, training=True)
    grad = torch.sub(logits, log_sum).exp_()
    inside = (y >= 0) & (y < z.shape[-1])
    grad.scatter_add_(-1, y.clamp(0, z.shape[-1] - 1), -inside.to(grad.dtype))
    if softcap is not None:  # 1 - (l / c)² = u (2 - u), with u = l / c + 1
        u = logits.div_(softcap)
        grad.mul_(u).mul_(u.neg_().add_(2))
        if taken is not None:
            grad.index_fill_(-1, taken, 0)
    return grad.to(z.dtype)
