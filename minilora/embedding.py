r"""The tied embedding, and new tokens as a handful of trainable rows beside the frozen table.

    ids ──► table [V, D] ──► replaced by a row where the id is a new token's ──► × √D ──► x
    logits ◄── table and rows ◄── hidden            (tied: the same numbers on the way out)

The table is one tensor, used for both ways, and is never copied, resized or wrapped. A new token is
a row of `rows` [n, D], in float32. `append` gives it an id after the vocabulary, so logits grow by
n columns; `reserved` gives it the id of an `<unusedN>` slot, whose column its row then takes over.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.linear import linear


class TokenEmbedding(nn.Module):
    """The table [V, D] and, once tokens are added, their rows [n, D] with their ids."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))  # [V, D]
        self.rows: nn.Parameter | None = None                             # [n, D] float32
        self.row_ids: Tensor | None = None                                # [n] int64
        self.reserved = False  # whether the rows take over ids of the table

    @property
    def num_embeddings(self) -> int:
        """V': the table's rows and those appended after it."""
        return len(self.weight) + self.appended

    @property
    def appended(self) -> int:
        """How many rows come after the table; 0 where the rows are reserved slots inside it."""
        return 0 if self.rows is None or self.reserved else len(self.rows)

    def add_rows(self, ids: list[int], values: Tensor) -> None:
        """Makes `ids` trainable, starting from `values` [n, D].

        The ids are either V, V + 1, … or all inside the table. Raises ValueError otherwise, and
        where rows were added before.
        """
        size = len(self.weight)
        after = ids == list(range(size, size + len(ids)))
        inside = len(set(ids)) == len(ids) and all(0 <= i < size for i in ids)
        if self.rows is not None or not ids or not (after or inside):
            raise ValueError(f"rows for ids {ids}: expected {size}, {size} + 1, … or ids below it, "
                             "once")
        if values.shape != (len(ids), self.weight.shape[1]):
            raise ValueError(f"rows have shape {tuple(values.shape)}; expected "
                             f"{(len(ids), self.weight.shape[1])}")
        device = self.weight.device
        self.rows = nn.Parameter(values.detach().to(device, torch.float32, copy=True))
        self.row_ids = torch.tensor(ids, device=device)
        self.reserved = inside
        self.merged, self.base = False, None

    @torch.no_grad()
    def start(self, pieces: list[list[int]]) -> Tensor:
        """Where new rows start: for each token the mean of the pieces of its description, [n, D].

        A token with no pieces starts from the mean of the whole table. A row far from the others
        (random, or zero) would put the loss in the hundreds (transformers#29219).
        """
        return torch.stack([(self.weight[ids] if ids else self.weight).float().mean(0)
                            for ids in pieces])  # [n, D]

    def encode(self, ids: Tensor) -> Tensor:
        """ids [..] → x [.., D]: looked up and scaled by √D.

        √D is rounded to the table's dtype first: transformers `modeling_gemma3.py`,
        `Gemma3TextScaledWordEmbedding` (in bfloat16 √2304 stays 48, √3584 becomes 59.75).
        """
        scale = torch.tensor(math.sqrt(self.weight.shape[1]), dtype=self.weight.dtype)
        if self.rows is None:
            return F.embedding(ids, self.weight) * scale                       # [.., D]
        is_row = ids[..., None] == self.row_ids                                 # [.., n]
        # A one-hot product: exact, and its gradient is a product too, the same in every run.
        new = is_row.to(self.rows.dtype) @ self.rows                            # [.., D]
        old = F.embedding(ids.clamp(max=len(self.weight) - 1), self.weight)     # [.., D]
        return torch.where(is_row.any(-1, keepdim=True), new.to(old.dtype), old) * scale

    def decode(self, hidden: Tensor) -> Tensor:
        """hidden [.., D] → logits [.., V'] before any soft-cap, in hidden's dtype."""
        logits = linear(hidden, self.weight)                                    # [.., V]
        if self.rows is None:
            return logits
        new = linear(hidden, self.rows.to(hidden.dtype))                        # [.., n]
        if self.appended:
            return torch.cat([logits, new], -1)                                 # [.., V + n]
        return logits.index_copy(-1, self.row_ids, new)                         # [.., V]

    @torch.no_grad()
    def merge(self, undo: bool = False) -> None:
        """Puts the rows in place, rounded once to the table's dtype.

        Reserved rows are written into the table. Appended ones stay beside it (the table is never
        resized) and are written after it by an export.
        """
        if self.reserved:
            self.base = self.weight[self.row_ids] if undo else None
            self.weight[self.row_ids] = self.rows.to(self.weight.dtype)
        else:
            self.base = self.rows.detach().clone() if undo else None
            self.rows.copy_(self.rows.to(self.weight.dtype))
        self.rows.requires_grad_(False)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back what `merge(undo=True)` changed, bit for bit."""
        if self.reserved:
            self.weight[self.row_ids] = self.base
        else:
            self.rows.copy_(self.base)
        self.rows.requires_grad_(True)
        self.base, self.merged = None, False

    def extra_repr(self) -> str:
        new = f", {len(self.rows)} new rows" if self.rows is not None else ""
        return f"{self.weight.shape[0]} × {self.weight.shape[1]}{new}"
