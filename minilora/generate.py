"""Cached decoding: the prompts are read once, then each step runs the one new token of every row.

    prompts   a b c d e      step 1   f      step 2   g     …  until a stop id, `max_new`
              · · p q r               s               t        or the end of the context

Prompts of different lengths are padded on the left, so that all rows write at the same slot.
Padding is a document of its own, which no token of the text sees, and positions count from the
first token of the text: a row writes what it would write alone. Only the last hidden state of a row
meets the vocabulary.

On a GPU a step is a thousand small kernels, which run faster than Python starts them. Its shapes
are the same each time, so its layers are compiled, and it is recorded once and replayed.

A reply may be held to what a `Constraint` (constrain.py) allows: it bars ids before each draw.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from minilora.attention import compiles
from minilora.config import GenerateConfig, UserError
from minilora.constrain import Constraint
from minilora.model import Gemma, KVCache
from minilora.tokenizer import Tokenizer


def generate(model: Gemma, prompts: list[list[int]], config: GenerateConfig,
             stop_ids: Collection[int],
             constraints: Sequence[Constraint] = ()) -> list[list[int]]:
    """The new ids of each prompt, without the stop id that ended them. Raises what `steps` does."""
    replies = [[] for _ in prompts]
    for step in steps(model, prompts, config, stop_ids, constraints=constraints):
        for reply, new in zip(replies, step, strict=True):
            if new is not None:
                reply.append(new)
    return replies


class Held:
    """What a model has read and written of a chat, for prompts that go on from there.

    A chat is not read anew at each turn: of a prompt only what comes after the ids that the cache
    holds. It has room for twice what was needed when it was made.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []  # that the cache holds, in its order
        self.cache: KVCache | None = None

    def take(self, model: Gemma, prompt: list[int], size: int) -> KVCache:
        """A cache for `prompt` and what follows, `size` tokens in all, that holds some of it."""
        pairs = zip(self.ids, prompt[:-1], strict=False)  # the last one is read for its logits
        same = next((at for at, (a, b) in enumerate(pairs) if a != b),
                    min(len(self.ids), len(prompt) - 1))
        if not self.cache or size > self.cache.capacity:
            weight = model.embed_tokens.weight
            room = min(2 * size, model.config.max_position_embeddings)
            self.cache = KVCache(model.config, 1, room, weight.dtype, weight.device)
        elif not self.cache.rewind(same):
            self.cache.rewind(0)
        self.ids = []  # until it is known what has been written
        return self.cache


def stream(model: Gemma, prompt: list[int], config: GenerateConfig, stop_ids: Collection[int],
           barred: Collection[int] = (), constraint: Constraint | None = None,
           held: Held | None = None) -> Iterator[int]:
    """The new ids of one prompt, each as soon as it is drawn. Raises what `steps` does.

    What `held` has of the prompt is not read again; after the last id it has that one's, too.
    """
    constraints, written = [constraint] if constraint else [], []
    for new, in steps(model, [prompt], config, stop_ids, barred, constraints, held):
        written.append(new)
        yield new
    if held:
        held.ids = [*prompt, *written][:held.cache.length]


@torch.no_grad()
def steps(model: Gemma, prompts: list[list[int]], config: GenerateConfig,
          stop_ids: Collection[int], barred: Collection[int] = (),
          constraints: Sequence[Constraint] = (),
          held: Held | None = None) -> Iterator[list[int | None]]:
    """Yields each step's new id for every prompt, None for those that have ended.

    The ids in `barred` are never drawn, nor what a prompt's constraint bars; `constraints` are
    fresh ones, one for each prompt, or none at all. `held` is for a single prompt, as in `stream`.

    The model is in eval mode (no dropout) while this runs. The same seed draws the same ids for the
    same batch. Raises UserError for a prompt that is empty or fills the model's context, and for
    logits that are not finite.
    """
    limit = model.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) < limit:
            raise UserError(f"the prompt has {len(prompt)} tokens and the model's context {limit}; "
                            "it needs at least one and room to answer (shorten the conversation, "
                            "or offer fewer tools)")
    if not prompts:
        return
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    left = [min(config.max_new, limit - len(prompt)) for prompt in prompts]  # tokens yet to write
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)                # [B, T]
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt):] = torch.tensor(prompt)
    positions = torch.arange(width) - (width - lengths)[:, None]             # [B, T], padding < 0
    documents = (positions >= 0).long()                                      # [B, T], padding 0
    ids, documents = ids.to(device), documents.to(device)
    positions = positions.clamp(min=0).to(device)

    size = width + max(left) - 1
    cache = (held.take(model, prompts[0], size) if held else
             KVCache(model.config, len(prompts), size, dtype, device))
    ids, positions, documents = (each[:, cache.length:] for each in (ids, positions, documents))
    cache.compiled = records(device) and compiles(device)

    def read(ids: Tensor, positions: Tensor, documents: Tensor | None = None) -> Tensor:
        """Reads more tokens of every row: ids [B, T] → logits [B, V'] after the last."""
        hidden = model.hidden_states(ids, positions, documents, cache)       # [B, T, D]
        return model.logits(hidden[:, -1], capped=not greedy(config))        # [B, V']

    step = replayed(read, cache) if records(device) else read
    bars = torch.tensor(list(barred), dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    rows = list(range(len(prompts)))  # the prompt that each row of the batch continues
    going = set(rows)
    training = model.training
    model.eval()
    try:
        while going:
            logits = (step(ids, positions) if cache.length >= width else
                      read(ids, positions, documents))
            logits.index_fill_(1, bars, -torch.inf)                          # [B, V']
            for row, prompt in enumerate(rows if constraints else ()):
                if prompt in going:
                    constraints[prompt].bar(logits[row], left[prompt])
            new = pick(logits, config, generator)                            # [B]
            drawn: list[int | None] = [None] * len(prompts)
            for prompt, each in zip(rows, new.tolist(), strict=True):
                if prompt not in going:
                    continue
                if each in stop_ids:
                    going.remove(prompt)
                    continue
                if constraints:
                    constraints[prompt].take(each)
                drawn[prompt] = each
                left[prompt] -= 1
                if not left[prompt]:
                    going.remove(prompt)
            if any(each is not None for each in drawn):
                yield drawn
            ids, positions = new[:, None], positions[:, -1:] + 1
            if going and 2 * len(going) <= len(rows):
                # Rows that have ended leave, not one by one, because leaving copies the cache.
                kept = [row for row, prompt in enumerate(rows) if prompt in going]
                rows = [rows[row] for row in kept]
                ids, positions = ids[kept], positions[kept]
                cache.keep(kept)
                step = replayed(read, cache) if records(device) else read
    finally:
        model.train(training)


def records(device: torch.device) -> bool:
    """Whether steps on a device are recorded and replayed."""
    return device.type == "cuda"


def replayed(step: Callable[[Tensor, Tensor], Tensor], cache: KVCache,
             ) -> Callable[[Tensor, Tensor], Tensor]:
    """`step(ids, positions)`, both [B, 1], recorded when it is called the second time.

    The first time it runs as it is: what compiles or chooses kernels cannot be recorded. Where the
    second fails it goes on so, with a warning.
    """
    inputs: tuple[Tensor, Tensor] | None = None  # a recording reads them where they are
    replay: Callable[[], Tensor] | None = None

    def plain() -> Tensor:
        return step(*inputs)

    def run(ids: Tensor, positions: Tensor) -> Tensor:
        nonlocal inputs, replay
        if inputs is None:
            inputs = ids.clone(), positions.clone()
            return plain()
        for held, new in zip(inputs, (ids, positions), strict=True):
            held.copy_(new)
        if replay is None:
            try:
                replay = record(plain, cache)
            except RuntimeError as error:
                warnings.warn(f"steps of decoding are not recorded, and slower: {error}",
                              stacklevel=2)
                replay = plain
        return replay()

    return run


def record(step: Callable[[], Tensor], cache: KVCache) -> Callable[[], Tensor]:
    """Records a step as a CUDA graph, which runs nothing; returns what replays it.

    Each replay's result lies where the last one's was.
    """
    graph, length = torch.cuda.CUDAGraph(), cache.length
    try:
        with torch.cuda.graph(graph):
            out = step()
    finally:
        cache.length = length

    def replay() -> Tensor:
        graph.replay()
        cache.length += 1
        return out

    return replay


def greedy(config: GenerateConfig) -> bool:
    """Whether the likeliest id is taken: at temperature 0 (below 1e-6 nothing else is left)."""
    return config.temperature < 1e-6 or config.top_k == 1


def pick(logits: Tensor, config: GenerateConfig, generator: torch.Generator) -> Tensor:
    """Draws one id a row from logits [B, V]; returns [B].

    Temperature 0 and top_k 1 take the likeliest (`greedy`). Otherwise
    softmax(logits / temperature) is cut to the `top_k` likeliest ids, then to the nucleus: the
    fewest of these whose share reaches `top_p` (Holtzman et al. 2019, arXiv:1904.09751, section
    3.1), which is one id at least.
    """
    if not logits.amax(-1).isfinite().all():
        raise UserError("the model's logits are not finite; its weights or adapter are broken, or "
                        "its dtype is too narrow (try --dtype float32)")
    if greedy(config):
        return logits.argmax(-1)
    scaled = logits / config.temperature                                     # [B, V]
    if not config.top_k and config.top_p == 1:
        return torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]
    count = min(config.top_k or logits.shape[-1], logits.shape[-1])
    scaled, ids = scaled.topk(count)                                         # [B, k], falling
    shares = scaled.softmax(-1)
    before = shares.cumsum(-1) - shares                                      # of all likelier ids
    shares[:, 1:].masked_fill_(before[:, 1:] >= config.top_p, 0.0)           # the likeliest stays
    return ids.gather(-1, torch.multinomial(shares, 1, generator=generator))[:, 0]


def stream_text(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of `ids` piece by piece, as it comes; all pieces together are the text of all ids.

    A character may be spread over several byte pieces: text that ends inside one waits for the
    rest. `Tokenizer.decode` looks at no neighbours apart from bytes, so what is out is done with.
    """
    waiting: list[int] = []
    for new in ids:
        waiting.append(new)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):  # what an unfinished character is decoded to
            yield text
            waiting = []
    if waiting:
        yield tokenizer.decode(waiting)
