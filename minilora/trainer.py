"""The parts of training that can be tested on their own; `train.py` is the loop that uses them.

New tokens and their rows, how the layers run, the learning rate of a step, the parameter groups,
one optimizer step over several batches, the endless stream of batches, the loss on held-out
conversations, and which conversations are to blame for numbers that are not finite.
"""

import ctypes
import itertools
import math
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.attention import compiles
from minilora.config import TrainConfig, UserError
from minilora.data import IGNORED, Batch, Batches, Example, batches, collate
from minilora.dialects import get_dialect
from minilora.lora import is_finite, trainable
from minilora.loss import token_loss
from minilora.model import Gemma
from minilora.tokenizer import Tokenizer

# A run stops, with a checkpoint, at every 5th step in a row whose numbers are not finite (the
# weights themselves are at fault then, and no batch will be better) and at every 50th in all (so
# that a run on bad data does not go on for days, learning from what is left).
IN_A_ROW, IN_ALL = 5, 50


def add_dialect(model: Gemma, tokenizer: Tokenizer, dialect: str, mode: str) -> list[int]:
    """Gives the dialect's tokens their ids and trainable rows, in one step; returns the ids.

    Each row starts from the mean of the pieces of the token's description. A token that the base
    knows already (a merged model, FunctionGemma) keeps the row that it has.
    """
    described = get_dialect(dialect).tokens
    table = model.embed_tokens
    fresh = [token for token in described if not tokenizer.knows(token)]
    ids = tokenizer.add_tokens(described, mode, first=table.num_embeddings)
    new = [(i, text) for i, (token, text) in zip(ids, described.items(), strict=True)
           if token in fresh or i >= table.num_embeddings]
    if new:
        start = table.start([tokenizer.encode(text) for _, text in new])
        table.add_rows([i for i, _ in new], start)
    return [i for i, _ in new]


def prepare(model: Gemma, config: TrainConfig) -> None:
    """Sets how training runs the layers: compiled or not, and what of them backward makes again.

    Raises UserError where they shall be compiled and cannot be.
    """
    device = model.embed_tokens.weight.device
    if config.compile == "on" and not compiles(device):
        raise UserError(f"compile is on, and nothing here compiles for {device.type}: a GPU needs "
                        "to be of NVIDIA's Ampere or later, with Triton and gcc, a CPU needs g++; "
                        "leave --compile out")
    model.compiled = config.compile == "on" or (
        config.compile == "auto" and device.type == "cuda" and compiles(device))
    model.recompute = config.recompute
    if device.type == "cpu":
        keep_memory()


def keep_memory() -> None:
    """Has the C library keep what a step frees for the next one, where it would give it back.

    Memory that is taken anew comes page by page, each with an interrupt: on a virtual machine that
    was a seventh of a step of 4 × 1024 tokens. Does nothing where the library is not glibc, whose
    mallopt(3) has the numbers.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-4, 0)      # M_MMAP_MAX: large blocks come from the heap, not from pages of their own
    mallopt(-1, -1)     # M_TRIM_THRESHOLD: the heap's free end stays
    mallopt(-2, 2**26)  # M_TOP_PAD: and it grows in large steps


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of step 0 … steps - 1: a linear rise, then cosine, linear or constant to the end.

    The rise takes `warmup` of the steps and ends at `lr`; cosine and linear reach 0 one step after
    the last, so that every step learns something.
    """
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)  # 1 after the rise, 0 at the end
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return config.lr * (left if config.schedule == "linear" else 1.0)


def make_optimizer(model: Gemma, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over A and B, with weight decay, and over magnitudes and new rows, without.

    Towards zero is no sensible place for a magnitude or an embedding. B's rate is `lr_ratio` times
    the others' (LoRA+, arXiv:2402.12354, section 4.2): `train_step` multiplies by a group's
    `ratio`.
    """
    trained = trainable(model)
    A = [p for name, p in trained.items() if name.endswith("lora_A")]
    B = [p for name, p in trained.items() if name.endswith("lora_B")]
    others = [p for name, p in trained.items() if not name.endswith(("lora_A", "lora_B"))]
    groups = [{"params": A, "weight_decay": config.weight_decay, "ratio": 1.0},
              {"params": B, "weight_decay": config.weight_decay, "ratio": config.lr_ratio},
              {"params": others, "weight_decay": 0.0, "ratio": 1.0}]
    fused = model.embed_tokens.weight.device.type == "cuda"
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr,
                             betas=(0.9, 0.999), fused=fused)


def weight_bytes(model: Gemma) -> int:
    """Bytes of weights and, for what is trained, of gradient and AdamW's two moments (float32)."""
    trained = sum(p.numel() for p in trainable(model).values())
    return sum(p.numel() * p.element_size() for p in model.parameters()) + 12 * trained


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    loss: float       # mean over the trained tokens of the step
    grad_norm: float  # before clipping
    tokens: int       # of conversations, padding left out
    trained: int      # tokens that carry loss

    @property
    def applied(self) -> bool:
        """Whether its numbers are finite; otherwise nothing was changed."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def trained_tokens(batch: Batch) -> int:
    """How many tokens of a batch carry loss."""
    return int((batch.labels[:, 1:] != IGNORED).sum())


def batch_loss(model: Gemma, batch: Batch) -> Tensor:
    """The sum of the losses of a batch's trained tokens."""
    hidden = model.hidden_states(batch.input_ids, batch.positions, batch.documents)  # [B, T, D]
    return token_loss(model, hidden, batch.labels)[0]


def train_step(model: Gemma, optimizer: torch.optim.Optimizer, step: Sequence[Batch], lr: float,
               clip: float) -> Step:
    """One optimizer step over one or several batches.

    The sum of all losses is divided once, by all the trained tokens of the step, so that eight
    batches of one row are one batch of eight rows. Where loss or gradient is not finite the step is
    not applied: weights and optimizer keep every bit, its count of steps included.
    """
    model.train()
    device = model.embed_tokens.weight.device
    trained = sum(map(trained_tokens, step))
    loss = torch.zeros((), device=device)
    for batch in [batch.to(device) for batch in step]:  # copied before the device is busy
        total = batch_loss(model, batch) / trained
        total.backward()
        loss += total.detach()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    mean, size = torch.stack([loss, norm]).tolist()  # waits for the device, once a step
    tokens = sum(int((batch.documents > 0).sum()) for batch in step)
    done = Step(mean, size, tokens, trained)
    if done.applied:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return done


@torch.no_grad()
def held_out_loss(model: Gemma, held_out: Iterable[Batch]) -> float:
    """The mean loss over all trained tokens of the batches; NaN where there is none."""
    training, device = model.training, model.embed_tokens.weight.device
    model.eval()
    total, count = 0.0, 0
    for batch in held_out:
        total += batch_loss(model, batch.to(device)).item()
        count += trained_tokens(batch)
    model.train(training)
    return total / count if count else math.nan


def plan_steps(examples: Sequence[Example], config: TrainConfig) -> int:
    """How many optimizer steps the run has: as `steps` says, or as `epochs` over the data give."""
    if config.steps:
        return config.steps
    each = len(batches(examples, config.batch, config.length, config.seed, 0, config.pack))
    return max(1, math.ceil(config.epochs * each / config.accumulate))


def stream_batches(examples: Sequence[Example], config: TrainConfig, skip: int = 0,
                   fill: bool = False) -> Iterator[Batch]:
    """Endless batches, epoch after epoch, each epoch in an order of its own.

    The order follows from the seed alone, so that a resumed run skips what it has seen and goes on.
    With `fill` an epoch's last batch gets rows of padding, so that all have as many: compiled
    layers are compiled for one shape.
    """
    for of_epoch, index in _places(examples, config, skip):
        yield filled(of_epoch[index], config.batch) if fill else of_epoch[index]


def _places(examples: Sequence[Example], config: TrainConfig, skip: int,
            ) -> Iterator[tuple[Batches, int]]:
    """Where in which epoch each batch of a run stands, from batch `skip` on."""
    for epoch in itertools.count():
        of_epoch = batches(examples, config.batch, config.length, config.seed, epoch, config.pack)
        yield from ((of_epoch, index) for index in range(skip, len(of_epoch)))
        skip = max(0, skip - len(of_epoch))


def filled(batch: Batch, rows: int) -> Batch:
    """The batch with rows of padding after its own, `rows` in all."""
    length = batch.input_ids.shape[1]
    padding = vars(collate([[]] * (rows - len(batch.input_ids)), length))
    return Batch(**{name: torch.cat([tensor, padding[name]])
                    for name, tensor in vars(batch).items()})


# --- numbers that are not finite ------------------------------------------------------------------

@dataclass(frozen=True)
class Fault:
    """Where a step's numbers went wrong."""

    batches: list[int]  # of the step, from 1
    rows: list[str]     # all conversations in these: file:line (row n)
    alone: list[str]    # those that have no finite loss and gradient even by themselves

    def __str__(self) -> str:
        """In a few words; `rows` may be hundreds."""
        which = "" if self.alone else "one or more of "
        return (f"batch {', '.join(map(str, self.batches))}: {which}"
                f"{some_of(self.alone or self.rows)}")


def some_of(rows: Sequence[str]) -> str:
    """The first eight, and how many more there are."""
    return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def find_fault(model: Gemma, examples: Sequence[Example], config: TrainConfig, step: int) -> Fault:
    """What is to blame for a step (from 0) that `train_step` did not apply.

    The batches of the step are made again, and each of their conversations is tried by itself. That
    takes as long as a step or two, so it is asked for only when it has happened.
    """
    places = _places(examples, config, step * config.accumulate)
    tried = [list(itertools.chain(*of_epoch.rows(index)))
             for of_epoch, index in itertools.islice(places, config.accumulate)]
    alone = [not_finite(model, batch, config) for batch in tried]
    blamed = [number for number, bad in enumerate(alone) if bad] or range(len(tried))
    rows = [example.source for number in blamed for example in tried[number]]
    return Fault([number + 1 for number in blamed], list(dict.fromkeys(rows)), sum(alone, []))


def not_finite(model: Gemma, examples: Iterable[Example], config: TrainConfig) -> list[str]:
    """The sources of those examples whose loss is not finite by itself, or whose gradient is not.

    Under `torch.no_grad` the loss alone decides. Nothing is changed, and no random number is drawn:
    it is tried without dropout.
    """
    training, device = model.training, model.embed_tokens.weight.device
    model.eval()
    bad = []
    for example in examples:
        batch = collate([[example]], config.length if model.compiled else len(example))
        batch = filled(batch, config.batch) if model.compiled else batch
        loss = batch_loss(model, batch.to(device))
        numbers = [loss]
        if loss.requires_grad:
            numbers += torch.autograd.grad(loss, list(trainable(model).values()),
                                           materialize_grads=True)
        if not all(map(is_finite, numbers)):
            bad.append(example.source)
    model.train(training)
    return list(dict.fromkeys(bad))  # a conversation may be several examples
