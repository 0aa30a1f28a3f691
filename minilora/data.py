"""Conversations to examples, examples to batches of a fixed length.

`split` holds some conversations out. An example is one conversation as tokens, each with its kind
and, where it carries loss, a label; what is too long is cut after a whole turn. `summary` counts
what was made. `batches` packs the examples of an epoch, several to a row, in an order that seed and
epoch decide. A conversation with nothing to train is a problem with file and line, as in
minilora.readers.
"""

import bisect
import hashlib
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.chat import Conversation, Kind, render
from minilora.config import UserError
from minilora.readers import refuse
from minilora.tokenizer import Tokenizer

IGNORED = -100  # the label of a position that carries no loss


# --- conversations -> examples --------------------------------------------------------------------

def split(conversations: Sequence[Conversation], share: float, seed: int,
          ) -> tuple[list[Conversation], list[Conversation]]:
    """(kept, held out), both in the given order; `share` of all are held out, at least one.

    Who is held out depends on the conversation itself and the seed, not on where it stands, so
    copies of one conversation are never on both sides. share 0 holds out none.
    """
    if not 0 <= share < 1:
        raise UserError(f"the held-out share is {share}; expected at least 0 and less than 1")

    def draw(conversation: Conversation) -> bytes:
        text = f"{seed} {conversation.tools!r} {conversation.messages!r}"
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    draws = [draw(conversation) for conversation in conversations]
    count = max(1, round(share * len(draws))) if share and draws else 0
    chosen = set(sorted(draws)[:count])
    return ([item for item, drawn in zip(conversations, draws, strict=True) if drawn not in chosen],
            [item for item, drawn in zip(conversations, draws, strict=True) if drawn in chosen])


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation as tokens. `labels[t] == ids[t]` where t is a target, else -100."""

    ids: Tensor      # [n] int64
    kinds: Tensor    # [n] uint8, values of Kind
    labels: Tensor   # [n] int64; not shifted
    source: str      # file:line (row n)
    cut: int = 0     # trained tokens that did not fit

    def __len__(self) -> int:
        return len(self.ids)


def trained_kinds(train_on: str) -> frozenset[Kind]:
    """The kinds that carry loss: `assistant` is all that the model writes, or a comma list.

    Raises UserError for a kind that there is not.
    """
    if train_on == "assistant":
        return frozenset({Kind.THINK, Kind.TOOL_CALL, Kind.ANSWER, Kind.END})
    names = {kind.name.lower(): kind for kind in Kind}
    chosen = [word.strip() for word in train_on.split(",") if word.strip()]
    unknown = [word for word in chosen if word not in names]
    if unknown or not chosen:
        raise UserError(f"train-on {unknown[0] if unknown else train_on!r} is not known; choose "
                        f"assistant, or some of {', '.join(names)} with commas between")
    return frozenset(names[word] for word in chosen)


def make_example(conversation: Conversation, tokenizer: Tokenizer, dialect: str = "hermes",
                 length: int | None = None, train_on: str = "assistant") -> Example:
    """Renders a conversation and labels it.

    An `<end_of_turn>` is also trained where the token before it is: who learns to call learns to
    stop. The first token never is a target. What is longer than `length` ends after the last model
    turn that fits whole, so system and tools are always there and no call is cut.

    Raises UserError naming the conversation where no trained token is in it, or none is left.
    """
    rendered = render(conversation, tokenizer, dialect)
    ids = torch.tensor(rendered.ids)                                     # [n]
    kinds = torch.tensor(rendered.kinds, dtype=torch.uint8)              # [n]
    trained = torch.isin(kinds, torch.tensor(sorted(trained_kinds(train_on)), dtype=torch.uint8))
    trained[1:] |= (kinds[1:] == Kind.END) & trained[:-1]
    trained[0] = False
    name = conversation.source or "conversation"
    total, size = int(trained.sum()), len(ids)
    if total == 0:
        raise UserError(f"{name}: nothing to train with train-on {train_on}; expected at least one "
                        "token of that kind: leave it out with --skip, or train on assistant")
    if length is not None and size > length:
        ends = (kinds[:length] == Kind.END).nonzero()
        size = int(ends[-1]) + 1 if len(ends) else 0
        if not trained[:size].any():
            raise UserError(f"{name}: nothing to train in the turns that fit {length} of its "
                            f"{len(ids)} tokens: raise --length, or leave it out with --skip")
    ids, kinds, trained = ids[:size], kinds[:size], trained[:size]
    return Example(ids, kinds, torch.where(trained, ids, IGNORED), conversation.source,
                   total - int(trained.sum()))


def make_examples(conversations: Sequence[Conversation], tokenizer: Tokenizer,
                  dialect: str = "hermes", length: int | None = None, train_on: str = "assistant",
                  on_problem: Callable[[str], None] = refuse) -> list[Example]:
    """`make_example` of each; what it refuses goes to `on_problem`, which raises by default."""
    trained_kinds(train_on)  # a wrong setting is one error, not one for each conversation
    examples = []
    for conversation in conversations:
        try:
            examples.append(make_example(conversation, tokenizer, dialect, length, train_on))
        except UserError as error:
            on_problem(str(error))
    return examples


def summary(conversations: Sequence[Conversation], examples: Sequence[Example]) -> dict:
    """Numbers on data and on what was made of it, for a person to read or for JSON.

    tokens and trained tokens in all and by kind; lengths in tokens; rows cut to fit (and trained
    tokens lost by that) and rows refused.
    """
    messages = [message for conversation in conversations for message in conversation.messages]
    calls = [call for message in messages for call in message.tool_calls]
    offered = {tool["function"]["name"] for item in conversations for tool in item.tools}
    tokens, trained = torch.zeros(len(Kind), dtype=torch.long), torch.zeros(len(Kind)).long()
    for example in examples:
        tokens += torch.bincount(example.kinds, minlength=len(Kind))
        trained += torch.bincount(example.kinds[example.labels != IGNORED], minlength=len(Kind))
    lengths = sorted(map(len, examples)) or [0]
    return {
        "conversations": len(conversations),
        "messages": len(messages),
        "calls": len(calls),
        "with_calls": sum(any(message.tool_calls for message in item.messages)
                          for item in conversations),
        "tools_offered": len(offered),
        "tools_called": len({call.name for call in calls}),
        "tokens": int(tokens.sum()),
        "trained": int(trained.sum()),
        "kinds": {kind.name.lower(): {"tokens": int(tokens[kind]), "trained": int(trained[kind])}
                  for kind in Kind},
        "length": {"min": lengths[0], "median": int(statistics.median(lengths)),
                   "p95": lengths[math.ceil(0.95 * len(lengths)) - 1], "max": lengths[-1]},
        "cut": sum(example.cut > 0 for example in examples),
        "cut_trained": sum(example.cut for example in examples),
        "refused": len(conversations) - len(examples),
    }


# --- examples -> batches --------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens, each holding one conversation or several end to end, then padding.

    A conversation is one document: its positions begin at 0, its number within the row at 1.
    Padding is document 0 and never a target.
    """

    input_ids: Tensor  # [B, T] int64
    labels: Tensor     # [B, T] int64; input_ids where a target, else -100; not shifted
    positions: Tensor  # [B, T] int64
    documents: Tensor  # [B, T] int64
    kinds: Tensor      # [B, T] uint8

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def pack_rows(examples: Sequence[Example], length: int) -> list[list[int]]:
    """Which examples share a row of `length` tokens: indices, each once. Best fit, longest first.

    Raises UserError where an example is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and index of each row, sorted
    for index in sorted(range(len(examples)), key=lambda index: -len(examples[index])):
        need = len(examples[index])
        if need > length:
            raise UserError(f"{examples[index].source}: {need} tokens; a row has {length}")
        at = bisect.bisect_left(room, (need, 0))  # the fullest row that still has room
        if at == len(room):
            rows.append([])
            free, row = length, len(rows) - 1
        else:
            free, row = room.pop(at)
        rows[row].append(index)
        bisect.insort(room, (free - need, row))
    return rows


def collate(rows: Sequence[Sequence[Example]], length: int, pad_id: int = 0) -> Batch:
    """A batch of rows, each the given examples end to end and padded to `length` tokens."""
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_id)                                # [B, T]
    labels = torch.full(shape, IGNORED)                                  # [B, T]
    positions, documents = torch.zeros(2, *shape, dtype=torch.int64)     # [B, T] each
    kinds = torch.full(shape, int(Kind.PROMPT), dtype=torch.uint8)       # [B, T]
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples, 1):
            here = slice(at, at + len(example))
            input_ids[row, here] = example.ids
            labels[row, here] = example.labels
            positions[row, here] = torch.arange(len(example))
            documents[row, here] = number
            kinds[row, here] = example.kinds
            at += len(example)
    return Batch(input_ids, labels, positions, documents, kinds)


class Batches(Sequence[Batch]):
    """The batches of one epoch, each made when it is asked for."""

    def __init__(self, groups: list[list[list[Example]]], length: int | None) -> None:
        self._groups, self._length = groups, length  # batch -> row -> examples

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Batch:
        rows = self._groups[index]
        return collate(rows, self._length or max(len(example) for row in rows for example in row))


def batches(examples: Sequence[Example], batch_size: int, length: int, seed: int = 0,
            epoch: int = 0, pack: bool = True) -> Batches:
    """The batches of one epoch: a sequence, `batches(…)[i]` being batch i.

    Their order is a function of examples, seed and epoch alone, so a run resumes by its index.
    Packed rows have `length` tokens; unpacked, each row is one example, padded to the longest of
    its batch. The last batch may have fewer rows.
    """
    rng = random.Random(f"{seed} {epoch}")
    shuffled = rng.sample(examples, len(examples))
    indices = pack_rows(shuffled, length) if pack else [[index] for index in range(len(shuffled))]
    rng.shuffle(indices)
    rows = [[shuffled[index] for index in row] for row in indices]
    groups = [rows[at:at + batch_size] for at in range(0, len(rows), batch_size)]
    return Batches(groups, length if pack else None)
