"""Conversations to examples, examples to batches of a fixed length.

`split` holds some conversations out. An example is a conversation as tokens, each with its kind
and, where it carries loss, a label; one that is too long becomes several, cut between what the user
asks. `batches` packs the examples of an epoch, several to a row, in an order that seed and epoch
decide, and `count_tokens` sums them up. A conversation with nothing to train is a problem with file
and line, as in minilora.readers. minilora.cache keeps examples on disk.
"""

import bisect
import hashlib
import heapq
import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minilora.chat import Conversation, Kind, Message, ToolCall, render
from minilora.config import UserError
from minilora.readers import refuse
from minilora.tokenizer import Tokenizer

IGNORED = -100  # the label of a position that carries no loss
WRITTEN = frozenset({Kind.THINK, Kind.TOOL_CALL, Kind.ANSWER, Kind.END})  # by the model


# --- who is held out ------------------------------------------------------------------------------

def digest(conversation: Conversation) -> int:
    """64 bits that tell conversations apart by what is said in them and by their tools alone."""
    def fields(item: Message | ToolCall) -> dict:
        return {key: value for key, value in vars(item).items() if key != "trained"}

    text = json.dumps([conversation.tools, conversation.messages], default=fields)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def split(digests: Sequence[int], share: float, seed: int) -> np.ndarray:
    """Which of some conversations are held out: `share` of all, at least one.  [n] bool

    Who is held out depends on the conversation itself and the seed, not on where it stands, so
    copies of one conversation are never on both sides. share 0 holds out none.
    """
    if not 0 <= share < 1:
        raise UserError(f"the held-out share is {share}; expected at least 0 and less than 1")
    hashes = (hashlib.blake2b(f"{seed} {each}".encode(), digest_size=8) for each in digests)
    draws = np.fromiter((int.from_bytes(each.digest()) for each in hashes), np.uint64, len(digests))
    if not share or not len(draws):
        return np.zeros(len(draws), dtype=bool)
    return draws <= np.sort(draws)[max(1, round(share * len(draws))) - 1]


# --- conversations -> examples --------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Example:
    """A conversation, or a part of it, as tokens. `labels[t] == ids[t]` at a target, else -100."""

    ids: Tensor          # [n] int64
    kinds: Tensor        # [n] uint8, values of Kind
    labels: Tensor       # [n] int64; not shifted
    source: str          # file:line (row n)
    cut: int = 0         # trained tokens of the conversation that fit no part; at part 0
    part: int = 0        # of its conversation, from 0
    weight: float = 1.0  # how often an epoch sees it

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def counts(self) -> np.ndarray:
        """Tokens, and trained tokens, of each kind.  [2, kinds]"""
        kinds, trained = self.kinds.numpy(), self.labels.numpy() != IGNORED
        return np.stack([np.bincount(kinds, minlength=len(Kind)),
                         np.bincount(kinds[trained], minlength=len(Kind))])


def column(examples: Sequence[Example], name: str) -> np.ndarray:
    """One of length, weight, cut, part and counts, of every example.  [n, …]

    Examples on disk (`minilora.cache.Dataset`) have it as an array, and none of them is read.
    """
    if hasattr(examples, "column"):
        return examples.column(name)
    return np.array([getattr(example, name) for example in examples])


def trained_kinds(train_on: str) -> frozenset[Kind]:
    """The kinds that carry loss: `assistant` is all that the model writes, or a comma list.

    Raises UserError for a kind that there is not.
    """
    if train_on == "assistant":
        return WRITTEN
    names = {kind.name.lower(): kind for kind in Kind}
    chosen = [word.strip() for word in train_on.split(",") if word.strip()]
    unknown = [word for word in chosen if word not in names]
    if unknown or not chosen:
        raise UserError(f"train-on {unknown[0] if unknown else train_on!r} is not known; choose "
                        f"assistant, or some of {', '.join(names)} with commas between")
    return frozenset(names[word] for word in chosen)


def make_parts(conversation: Conversation, tokenizer: Tokenizer, dialect: str = "hermes",
               length: int | None = None, train_on: str = "assistant") -> list[Example]:
    """Renders a conversation and labels it: one example, or several where `length` is too short.

    An `<end_of_turn>` is also trained where the token before it is: who learns to call learns to
    stop. The first token never is a target, nor is what an untrained message says.

    What is longer than `length` is cut before a message of the user. Each part has the system text
    and the tools again and then as many whole exchanges (a question and all up to the next) as fit,
    so no call is cut and no result is without its call; what was said in earlier parts is left
    out, and no token carries loss twice. Of an exchange too long for a part of its own the model
    turns that fit are kept, and the trained tokens of the others are counted in `cut`.

    Raises UserError naming the conversation where no trained token is in it, or none is left.
    """
    whole = _label(conversation, tokenizer, dialect, train_on)
    name = conversation.source or "conversation"
    size, total = len(whole[0]), int(whole[2].sum())
    if total == 0:
        raise UserError(f"{name}: nothing to train with train-on {train_on}; expected at least one "
                        "token of that kind: try --train-on assistant")
    parts = [whole]
    if length is not None and size > length:
        parts = [part for part in _parts(conversation, tokenizer, dialect, length, train_on)
                 if part[2].any()]
        if not parts:
            raise UserError(f"{name}: nothing to train in the turns that fit {length} of its "
                            f"{size} tokens: raise --length")
    cut = total - sum(int(trained.sum()) for _, _, trained in parts)
    return [Example(ids, kinds, torch.where(trained, ids, IGNORED), conversation.source,
                    0 if number else cut, number, conversation.weight)
            for number, (ids, kinds, trained) in enumerate(parts)]


def _label(conversation: Conversation, tokenizer: Tokenizer, dialect: str, train_on: str,
           ) -> tuple[Tensor, Tensor, Tensor]:
    """ids, kinds, and which of them are trained."""
    rendered = render(conversation, tokenizer, dialect)
    ids = torch.tensor(rendered.ids)                                     # [n] int64
    kinds = torch.tensor(rendered.kinds, dtype=torch.uint8)              # [n]
    trained = _among(kinds, trained_kinds(train_on))                     # [n] bool
    ends = kinds == Kind.END
    trained[1:] |= ends[1:] & trained[:-1]
    trained[0] = False
    replies = [message.trained for message in conversation.messages if message.role == "assistant"]
    if not all(replies):
        turn = ends.cumsum(0) - ends.long()  # how many turns of the model end before a token
        trained &= torch.tensor([*replies, True])[turn] | ~_among(kinds, WRITTEN)
    return ids, kinds, trained


def _among(kinds: Tensor, chosen: Iterable[Kind]) -> Tensor:
    return torch.isin(kinds, torch.tensor(sorted(chosen), dtype=torch.uint8))


def _parts(conversation: Conversation, tokenizer: Tokenizer, dialect: str, length: int,
           train_on: str) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """The parts of a conversation that is too long, none longer than `length`; some may be empty.

    A turn has the same ids wherever it stands, but for the first, which system and tools precede.
    """
    messages = conversation.messages
    asked = [place for place, message in enumerate(messages) if message.role == "user"]
    opening = messages[:asked[0]]  # the system message, or nothing
    exchanges = [messages[a:b] for a, b in zip(asked, [*asked[1:], None], strict=True)]

    def size(said: tuple[Message, ...], tools: tuple[dict, ...]) -> int:
        made = replace(conversation, messages=said, tools=tools)
        return len(render(made, tokenizer, dialect).ids)

    if size((*opening, Message("user", "?")), conversation.tools) >= length:
        return  # no part can hold more than its opening
    sizes = [size(exchange, ()) - 1 for exchange in exchanges]  # less <bos>
    first = 0
    while first < len(exchanges):
        room = length - size(opening + exchanges[first], conversation.tools)
        after = first + 1
        while after < len(exchanges) and sizes[after] <= room:
            room -= sizes[after]
            after += 1
        while True:
            said = sum(exchanges[first:after], ())
            part = replace(conversation, messages=opening + said)
            ids, kinds, trained = _label(part, tokenizer, dialect, train_on)
            if len(ids) <= length or after == first + 1:
                break
            after -= 1  # a call without a result has another end where something follows it
        if first:  # what stands in every part carries loss in the first one only
            alone, _, _ = _label(replace(part, messages=said, tools=()), tokenizer, dialect,
                                 train_on)
            differ = (ids.flip(0)[:len(alone)] != alone.flip(0)).nonzero()
            trained[:len(ids) - int(differ[0] if len(differ) else len(alone))] = False
        if len(ids) > length:  # one exchange that is too long: the model turns of it that fit
            ends = (kinds[:length] == Kind.END).nonzero()
            fit = int(ends[-1]) + 1 if len(ends) else 0
            ids, kinds, trained = ids[:fit], kinds[:fit], trained[:fit]
        yield ids, kinds, trained
        first = after


def make_examples(conversations: Iterable[Conversation], tokenizer: Tokenizer,
                  dialect: str = "hermes", length: int | None = None, train_on: str = "assistant",
                  on_problem: Callable[[str], None] = refuse) -> list[Example]:
    """`make_parts` of each; what it refuses goes to `on_problem`, which raises by default."""
    trained_kinds(train_on)  # a wrong setting is one error, not one for each conversation
    examples = []
    for conversation in conversations:
        try:
            examples += make_parts(conversation, tokenizer, dialect, length, train_on)
        except UserError as error:
            on_problem(str(error))
    return examples


def count_tokens(examples: Sequence[Example]) -> dict:
    """Numbers on examples, for a person to read or for JSON.

    Tokens and trained tokens in all and by kind; how many conversations they are of, how many of
    those were split to fit, and how many were cut, with the trained tokens lost.
    """
    counts = column(examples, "counts").reshape(-1, 2, len(Kind)).sum(0).tolist()
    parts, cut = column(examples, "part"), column(examples, "cut")
    return {
        "used": int((parts == 0).sum()),
        "tokens": sum(counts[0]),
        "trained": sum(counts[1]),
        "kinds": {kind.name.lower(): {"tokens": counts[0][kind], "trained": counts[1][kind]}
                  for kind in Kind},
        "split": int((parts == 1).sum()),
        "cut": int((cut > 0).sum()),
        "cut_trained": int(cut.sum()),
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


def pack_rows(lengths: Sequence[int], length: int) -> np.ndarray:
    """Which row of `length` tokens each example goes to. Best fit, longest first.  [n]

    `lengths` are those of the examples, none above `length`. O(n log n): the rows that have the
    same room left are one heap, and there are no more rooms than tokens in a row.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    with_room: dict[int, list[int]] = {}  # free tokens -> the rows that have just these
    rooms: list[int] = []                 # its keys, sorted
    count = 0
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        need = int(lengths[index])
        at = bisect.bisect_left(rooms, need)  # the fullest rows that still have room
        if at == len(rooms):
            free, row, count = length, count, count + 1
        else:
            free = rooms[at]
            row = heapq.heappop(with_room[free])
            if not with_room[free]:
                del with_room[free], rooms[at]
        rows[index] = row
        if free - need not in with_room:
            with_room[free - need] = []
            bisect.insort(rooms, free - need)
        heapq.heappush(with_room[free - need], row)
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

    def __init__(self, examples: Sequence[Example], order: np.ndarray, starts: np.ndarray,
                 batch_size: int, length: int | None) -> None:
        """Row r holds the examples order[starts[r]:starts[r + 1]]."""
        self._examples, self._order, self._starts, self._length = examples, order, starts, length
        self._firsts = range(0, len(starts) - 1, batch_size)

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, index: int) -> Batch:
        rows = self.rows(index)
        return collate(rows, self._length or max(len(example) for row in rows for example in row))

    def rows(self, index: int) -> list[list[Example]]:
        """The examples in each row of a batch."""
        first = self._firsts[index]
        bounds = self._starts[first:first + self._firsts.step + 1].tolist()
        return [[self._examples[i] for i in self._order[a:b].tolist()]
                for a, b in itertools.pairwise(bounds)]


def times_in_epoch(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """How often each example is in an epoch: `weight` times on average.  [n] int

    2 is twice in each. 0.5 is once in every second one; the seed draws whether in the even ones, so
    an epoch has about half of a file of that weight and any two in a row have all of it.
    """
    rng = random.Random(f"{seed} weights")
    start = np.array([rng.random() for _ in weights])
    whole = np.floor(weights)
    before, after = (np.floor(start + (weights - whole) * done) for done in (epoch, epoch + 1))
    return (whole + after - before).astype(np.int64)


def batches(examples: Sequence[Example], batch_size: int, length: int, seed: int = 0,
            epoch: int = 0, pack: bool = True) -> Batches:
    """The batches of one epoch: a sequence, `batches(…)[i]` being batch i.

    Their order is a function of examples, seed and epoch alone, so a run resumes by its index.
    Packed rows have `length` tokens; unpacked, each row is one example, padded to the longest of
    its batch. The last batch may have fewer rows. Examples are in it as often as their weights say.

    Raises UserError where an example is longer than a row.
    """
    times = times_in_epoch(column(examples, "weight"), seed, epoch)
    chosen = np.repeat(np.arange(len(examples)), times)
    rng = random.Random(f"{seed} {epoch}")
    shuffled = chosen[np.array(rng.sample(range(len(chosen)), len(chosen)), dtype=np.int64)]
    lengths = column(examples, "length")[shuffled]
    if pack and (lengths > length).any():
        example = examples[int(shuffled[lengths.argmax()])]
        raise UserError(f"{example.source}: {len(example)} tokens; a row has {length}")
    row_of = pack_rows(lengths, length) if pack else np.arange(len(shuffled))
    sizes = np.bincount(row_of)  # how many examples are in each row
    order = np.arange(len(sizes))
    rng.shuffle(order)
    at = np.argsort(order)  # where a row stands once the rows are shuffled
    by_row = np.lexsort((-lengths, at[row_of]))  # in a row the longest comes first
    starts = np.concatenate([[0], sizes[order].cumsum()])
    return Batches(examples, shuffled[by_row], starts, batch_size, length if pack else None)
