#!/usr/bin/env python3
"""`python -m minilora bench` with one technique taken out: what was there, or is obvious, instead.

    python tests/bench/without.py columns train MODEL BATCHES.safetensors
    python tests/bench/without.py raw-logits generate MODEL

So that each can be said to pay, or dropped. What is computed stays the same: `compare.py
techniques` refuses a figure where losses differ.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from minilora import attention, linear, lora, loss, model, trainer
from minilora.__main__ import main as minilora
from minilora.config import UserError
from minilora.data import IGNORED
from minilora.model import Gemma
from minilora.report import run_command


def main(argv: list[str] | None = None) -> None:
    name, *command = sys.argv[1:] if argv is None else argv
    if name not in TAKE_OUT:
        raise UserError(f"no technique is called {name}; there are {', '.join(TAKE_OUT)}")
    TAKE_OUT[name]()
    minilora(["bench", *command])


def onednn() -> None:
    """F.linear, which is MKL in float32."""
    linear._onednn = lambda x, weight: False


def one_row() -> None:
    """oneDNN for one row of bfloat16, too."""
    linear._one_row = F.linear


def attention_by_blocks() -> None:
    """All scores of a layer at once, kept for backward."""
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float,
               softcap: float | None) -> Tensor:
        B, N, T, H = q.shape
        q = (q * scale).view(B, k.shape[1], -1, T, H)
        return attention._plain(q, k, v, mask, softcap).view(B, N, T, H)

    model.attend = attend


def sdpa() -> None:
    """On a GPU a single query, too, by products of its own, where SDPA takes one without a cap."""
    attend = attention.attend

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float,
              softcap: float | None) -> Tensor:
        B, N, T, H = q.shape
        if T > 1:
            return attend(q, k, v, mask, scale, softcap)
        q = (q * scale).view(B, k.shape[1], -1, T, H)
        return attention._plain(q, k, v, mask, softcap).view(B, N, T, H)

    model.attend = plain


def gathering() -> None:
    """The logits of all tokens, whether they are trained or not."""
    def token_loss(model: Gemma, hidden: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        logits, targets = model.logits(hidden[:, :-1]), labels[:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED,
                                reduction="sum")
        return total, int((targets != IGNORED).sum())

    trainer.token_loss = token_loss


def gradient_in_forward() -> None:
    """Logits of the trained tokens alone, kept for autograd."""
    def token_loss(model: Gemma, hidden: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        trained = labels[:, 1:] != IGNORED
        logits, targets = model.logits(hidden[:, :-1][trained]), labels[:, 1:][trained]
        return F.cross_entropy(logits, targets, reduction="sum"), len(targets)

    trainer.token_loss = token_loss


def columns() -> None:
    """All columns of some rows of the logits at once."""
    loss.COLUMNS = sys.maxsize


def lora_function() -> None:
    """The same products under autograd."""
    def adapted(x: Tensor, dropped: Tensor, weight: Tensor, A: Tensor, B: Tensor,
                scale: float) -> Tensor:
        low = linear.linear(linear.linear(dropped, A), B)
        return torch.add(linear.linear(x, weight), low, alpha=scale)

    lora._adapted = adapted


def norm_function() -> None:
    """RMSNorm under autograd."""
    model.RMSNorm.forward = lambda self, x: model._normalized(x, self.weight, self.eps)


def kept_memory() -> None:
    """Memory goes back after each step."""
    trainer.keep_memory = lambda: None


def raw_logits() -> None:
    """Greedy decoding that caps all logits, which changes none of their order."""
    logits = Gemma.logits
    Gemma.logits = lambda self, hidden, capped=True: logits(self, hidden)


TAKE_OUT = {function.__name__.replace("_", "-"): function for function in (
    onednn, one_row, attention_by_blocks, sdpa, gathering, gradient_in_forward, columns,
    lora_function, norm_function, kept_memory, raw_logits)}

if __name__ == "__main__":
    raise SystemExit(run_command(main))
