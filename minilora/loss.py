"""Cross-entropy over what the assistant must write: a sum and a count.

Three ideas keep a vocabulary of 256,000 affordable:

    gather    only the hidden states whose next token is trained reach the table
    chunk     their logits are made a few hundred rows at a time, never all at once
    forward   the gradient of a chunk is made while its logits are still there; backward only scales

With z the raw logits, c the cap and l = c·tanh(z / c), the loss of one row is logΣexp(l) - l_y and

    ∂loss/∂z = (softmax(l) - onehot(y)) · (1 - (l / c)²)

A sum, because a mean of means is not a mean: whoever accumulates several batches divides once, by
all the trained tokens of the optimizer step (transformers#34191 is what happens otherwise).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.data import IGNORED
from minilora.embedding import TokenEmbedding
from minilora.model import Gemma

CHUNK = 512  # rows of logits alive at a time: half a gigabyte at 256,000 columns in float32


def token_loss(model: Gemma, hidden: Tensor, labels: Tensor, chunk: int = CHUNK,
               ) -> tuple[Tensor, int]:
    """hidden [B, T, D] and labels [B, T] → the sum of the losses (float32 scalar) and their number.

    labels[t] is input_ids[t] where token t is trained and -100 elsewhere: not shifted, the shift
    is made here. A batch with nothing to train gives a zero that still has a gradient.
    """
    targets = labels[:, 1:]
    trained = targets != IGNORED                                    # [B, T - 1]
    table = model.embed_tokens
    total = _ChunkedCrossEntropy.apply(
        hidden[:, :-1][trained], table.weight, table.rows, targets[trained], table,
        model.config.final_logit_softcapping, chunk, torch.is_grad_enabled())
    return total, int(trained.sum())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the rows' losses; gradients of hidden and of the new rows, not of the table."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, rows: Tensor | None, targets: Tensor,
                table: TokenEmbedding, softcap: float | None, chunk: int, wanted: bool) -> Tensor:
        """hidden [M, D], targets [M] → scalar."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted else None                 # [M, D]
        d_rows = torch.zeros_like(rows) if wanted and rows is not None else None  # [n, D]
        for start in range(0, len(hidden), chunk):
            h, y = hidden[start:start + chunk], targets[start:start + chunk, None]
            logits = table.decode(h).to(wide)                                   # [m, V']
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            total += (logits.logsumexp(-1, keepdim=True) - logits.gather(-1, y)).sum()
            if not wanted:
                continue
            grad = torch.softmax(logits, -1)
            grad.scatter_add_(-1, y, grad.new_full(y.shape, -1.0))
            if softcap is not None:
                grad.mul_(1 - (logits / softcap).square_())
            _decode_backward(table, h, grad, d_hidden[start:start + chunk], d_rows)
        ctx.save_for_backward(d_hidden, d_rows)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """The gradients made in forward, times what comes from above (one number)."""
        d_hidden, d_rows = ctx.saved_tensors
        return (d_hidden * grad.to(d_hidden.dtype), None,
                None if d_rows is None else d_rows * grad.to(d_rows.dtype),
                None, None, None, None, None)


def _decode_backward(table: TokenEmbedding, hidden: Tensor, grad: Tensor, d_hidden: Tensor,
                     d_rows: Tensor | None) -> None:
    """Gradients of `table.decode(hidden)` [m, V']: into d_hidden [m, D], onto d_rows [n, D]."""
    grad = grad.to(hidden.dtype)
    if table.rows is None:
        torch.matmul(grad, table.weight, out=d_hidden)
        return
    of_rows = grad[:, table.row_ids]                                            # [m, n]
    if table.reserved:  # the table's own row is not used where a new row took its id
        grad[:, table.row_ids] = 0
    torch.matmul(grad[:, :len(table.weight)], table.weight, out=d_hidden)
    d_hidden += of_rows @ table.rows.to(hidden.dtype)
    if d_rows is not None:
        d_rows += (of_rows.mT @ hidden).to(d_rows.dtype)
