"""What a run will need, told from the model's shape alone: no weights are read.

    parameters  counted on a model without memory (PyTorch's meta device)
    weights     theirs, with gradient and AdamW's two moments for what is trained
    activations what autograd keeps of one layer for a token, times layers and tokens, and the
                logits of one chunk of the loss. Where whole layers are made again, of all but one
                only the input is kept, or nothing on a GPU whose host keeps it
    time        one layer of that shape, with random weights, is run forward and backward for about
                a second on the device; times layers and tokens. The vocabulary's share is taken to
                run at the same speed: 4·V·D FLOPs for each token that carries loss, against the
                layer's 4 per parameter (2 forward, 2 backward; a frozen weight has no gradient of
                its own, which would be 2 more, but a layer that is made again runs forward twice)

The layer is not compiled for this. Compiled layers, on a GPU, keep less and are faster.
"""

import dataclasses
import os
import re
import resource
import sys
import time

import torch

from minilora.config import GemmaConfig, LoraConfig, TrainConfig
from minilora.lora import attach, trainable
from minilora.loss import CHUNK
from minilora.model import Gemma
from minilora.recompute import pack, unpack
from minilora.report import count
from minilora.trainer import weight_bytes
from minilora.weights import locate, placement, read_config

LOOK = 0.5  # seconds that the last look at the layer shall take at least


@dataclasses.dataclass(frozen=True)
class Needs:
    """Of a run: numbers of parameters, bytes and seconds."""

    parameters: int
    trained_parameters: int
    weight_bytes: int
    activation_bytes: int
    seconds_per_step: float


def expect(shape: GemmaConfig, lora: LoraConfig, config: TrainConfig, new_tokens: int,
           trained_share: float, device: torch.device, dtype: torch.dtype) -> Needs:
    """What a run with these settings needs on the device; `trained_share` of its tokens carry loss.

    Takes a second or two, and on a GPU the time to compile its attention. Raises UserError for LoRA
    settings that do not fit the model.
    """
    model = _without_memory(shape, lora, dtype)
    rows = new_tokens * shape.hidden_size
    trained = sum(p.numel() for p in trainable(model).values())
    parameters = sum(p.numel() for p in model.parameters()) - trained
    trained += rows
    layers, tokens = shape.num_hidden_layers, config.batch * config.length

    layer = _one_layer(shape, lora, device, dtype)
    # On a GPU at once what is asked for: kernels are compiled for each shape, and run fast.
    trial = (config.batch if device.type == "cuda" else 1,
             config.length if device.type == "cuda" else min(64, config.length))
    kept = _kept_bytes(layer, *trial, config.recompute == "cheap")
    again = config.recompute in ("all", "offload")
    layer.recompute = config.recompute
    seconds = _seconds_per_token(layer, *trial, config)
    weights = sum(p.numel() for p in layer.layers.parameters() if not p.requires_grad)
    speed = (6 if again else 4) * weights / seconds  # FLOPs a second
    head = 4 * shape.vocab_size * shape.hidden_size * trained_share / speed
    return Needs(parameters + (rows if config.new_tokens == "append" else 0), trained,
                 weight_bytes(model) + 16 * rows, _all_bytes(shape, config, kept, device, dtype),
                 config.accumulate * tokens * (layers * seconds + head))


def _without_memory(shape: GemmaConfig, lora: LoraConfig, dtype: torch.dtype) -> Gemma:
    with torch.device("meta"):
        model = Gemma(shape).to(dtype)
    attach(model, dataclasses.replace(lora, init="kaiming"))  # the numbers do not matter here
    return model


def _all_bytes(shape: GemmaConfig, config: TrainConfig, kept: float, device: torch.device,
               dtype: torch.dtype) -> int:
    """Of all layers together and of the loss, where autograd keeps `kept` bytes of one for a token.
    """
    layers, tokens = shape.num_hidden_layers, config.batch * config.length
    total = tokens * kept * layers + 3 * 4 * CHUNK * shape.vocab_size
    if config.recompute in ("all", "offload"):  # one layer at a time
        width = shape.hidden_size * dtype.itemsize
        if config.recompute == "offload" and device.type == "cuda":
            width = 0
        total -= tokens * (kept - width) * (layers - 1)
    return int(total)


def _one_layer(shape: GemmaConfig, lora: LoraConfig, device: torch.device, dtype: torch.dtype,
               ) -> Gemma:
    """A model of one layer and a table of a few rows, with random weights."""
    small = dataclasses.replace(shape, num_hidden_layers=1, layer_types=shape.layer_types[:1],
                                vocab_size=8)
    with torch.device("meta"):
        model = Gemma(small).to(dtype)
    attach(model, LoraConfig(rank=lora.rank, dora=lora.dora, dropout=lora.dropout))
    model.to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # As in every layer but the first, the gradient goes on to what came before.
    model.embed_tokens.weight.requires_grad_(True)
    return model


def _forward(model: Gemma, rows: int, length: int) -> torch.Tensor:
    ids = torch.zeros(rows, length, dtype=torch.long, device=model.embed_tokens.weight.device)
    return model.hidden_states(ids, documents=torch.ones_like(ids))


def _kept_bytes(model: Gemma, rows: int, length: int, cheap: bool) -> float:
    """Bytes that autograd keeps of the layer for one token more, so without what it keeps of the
    parameters, in whatever dtype.
    """
    less = _all_kept_bytes(model, rows, length // 2, cheap)
    return (_all_kept_bytes(model, rows, length, cheap) - less) / (rows * (length - length // 2))


def _all_kept_bytes(model: Gemma, rows: int, length: int, cheap: bool) -> int:
    kept: dict[int, torch.Tensor] = {}  # by where their memory is

    def keep(tensor: torch.Tensor) -> object:
        less = pack(tensor) if cheap else tensor
        if less is tensor:  # and it stays alive, so that no other gets its place
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return less

    with torch.autograd.graph.saved_tensors_hooks(keep, unpack):
        _forward(model, rows, length)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _seconds_per_token(model: Gemma, rows: int, length: int, config: TrainConfig) -> float:
    """Of the layer, forward and backward: with more tokens each time, up to a batch or `LOOK`."""

    def once() -> float:
        began = time.perf_counter()
        _forward(model, rows, length).sum().backward()
        if model.embed_tokens.weight.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    while True:
        took = min(once(), once())  # the first time also warms up
        if took > LOOK or (rows, length) == (config.batch, config.length):
            return took / (rows * length)
        if length < config.length:
            length = min(2 * length, config.length)
        else:
            rows = min(2 * rows, config.batch)


def host_peak() -> int:
    """The most memory that this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far, on the GPU or, without one, by this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_peak()


# --- when there was not enough --------------------------------------------------------------------

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}  # as PyTorch names them


def advise_on_memory(reason: str, lora: LoraConfig, config: TrainConfig, resumed: bool) -> str:
    """One line for a run that ran out of memory: what it held, and what to change, in the order of
    what helps at the least cost, with the bytes that the run would need then.

    `reason`: the error's text. A resumed run may change only what leaves its steps as they are.
    """
    device, dtype = placement(config.device, config.dtype)
    held = peak_bytes(device)
    whole = (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else
             os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    asked = re.search(r"ried to allocate ([\d.]+) (bytes|[KMG]iB)", reason)
    more = f", and asked for {count(float(asked[1]) * _UNITS[asked[2]])}B more" if asked else ""
    shape = read_config(locate(config.model, ["config.json"]))
    kept: dict[tuple, float] = {}

    def needs(changed: TrainConfig, dtype: torch.dtype) -> str:
        """Roughly how many bytes in all, as text. A row of one layer is looked at, once."""
        key = dtype, changed.length, changed.recompute == "cheap"
        try:
            if key not in kept:
                layer = _one_layer(shape, lora, device, dtype)
                kept[key] = _kept_bytes(layer, 1, changed.length, changed.recompute == "cheap")
        except (MemoryError, RuntimeError):  # not even that fits
            return "more"
        weights = weight_bytes(_without_memory(shape, lora, dtype))
        return f"about {count(weights + _all_bytes(shape, changed, kept[key], device, dtype))}B"

    changes: list[tuple[str, dict, torch.dtype]] = []
    if not resumed:
        if config.batch > 1:
            part = next(n for n in range(2, config.batch + 1) if config.batch % n == 0)
            fewer = {"batch": config.batch // part, "accumulate": config.accumulate * part}
            changes.append(("--batch {batch} --accumulate {accumulate} (the same step)".format(
                **fewer), fewer, dtype))
        half = max(8, config.length // 2)
        changes.append((f"--length {half}", {"length": half}, dtype))
    steps = ("none", "cheap", "all", "offload")
    changes += [(f"--recompute {step}", {"recompute": step}, dtype)
                for step in steps[steps.index(config.recompute) + 1:]
                if step != "offload" or device.type == "cuda"]
    if not resumed and dtype == torch.float32:
        changes.append(("--dtype bfloat16", {}, torch.bfloat16))
    told = [f"{text}: {needs(dataclasses.replace(config, **changed), type_)}"
            for text, changed, type_ in changes]
    return (f"out of memory on {device}: the run held {count(held)}B at most of {count(whole)}B"
            f"{more}; weights and activations at --batch {config.batch} --length {config.length} "
            f"--recompute {config.recompute} take {needs(config, dtype)}; " + (
                f"what helps, best first: {', '.join(told)}" if told else
                "go on where there is more memory, or start a new run with a smaller --batch"))
