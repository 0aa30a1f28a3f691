#!/usr/bin/env python3
"""Where the time of one step goes: matrix products, attention, the loss, what is element-wise.

    python tests/bench/breakdown.py train MODEL BATCHES.safetensors
    python tests/bench/breakdown.py generate MODEL

Prints one JSON line: the seconds of a step without a profiler, the share of them that each kind of
kernel takes (`gaps`: the device waits), and the largest products by shape, each with its share of
the time and of the FLOP/s that a large square product reaches here. A product with the vocabulary,
and whatever else has its size, counts as the loss or the logits. A step of decoding is one of many
after the prompt was read and, on a GPU, the step was recorded. What a recording replays is not told
by shapes, so there the seconds are of a replay and the kernels those of the step as it is.
"""

import argparse
import importlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from minilora.bench import device_name, now, peaks, read_batches
from minilora.config import GenerateConfig, LoraConfig, TrainConfig, add_flags, from_flags
from minilora.generate import record
from minilora.generate import steps as decode
from minilora.lora import attach
from minilora.report import run_command
from minilora.trainer import make_optimizer, prepare, train_step
from minilora.weights import load_model, placement

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise",
            "aten::mkldnn_linear", "aten::addmv", "aten::mv")
FIRST = 3  # steps of decoding that are not measured: the prompt, a step as it is, the recording


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "generate"))
    parser.add_argument("model")
    parser.add_argument("batches", nargs="?")
    add_flags(parser, TrainConfig, only=("dtype", "device", "recompute", "compile"))
    flags = parser.parse_args(argv)
    config = from_flags(TrainConfig, flags)
    device, dtype = placement(config.device, config.dtype)
    model = load_model(config.model, dtype, device)
    if flags.what == "train":
        attach(model, LoraConfig())
        prepare(model, config)
        optimizer = make_optimizer(model, config)
        batch = read_batches(Path(flags.batches))[0]
        steps = 1

        def ready(watched: bool) -> Callable[[], object]:
            return lambda: train_step(model, optimizer, [batch], config.lr, config.clip)
    else:
        steps = 32

        def ready(watched: bool) -> Callable[[], object]:
            drawn = decode(model, [[10, 20, 30]], GenerateConfig(max_new=FIRST + steps), ())
            with patch.object(importlib.import_module("minilora.generate"), "record",
                              (lambda step, cache: step) if watched else record):
                for _ in range(FIRST):
                    next(drawn)
            return lambda: list(drawn)

    facts = measure(ready, device, dtype, model.config.vocab_size)
    facts["step_seconds"] /= steps
    print(json.dumps({"stack": "minilora", "device": device_name(device), **facts,
                      **peaks(device)}))


def measure(ready: Callable[[bool], Callable[[], object]], device: torch.device,
            dtype: torch.dtype, vocabulary: int) -> dict:
    """Seconds of a run, what they go into, and its largest products.

    `ready(watched)` does what comes before a run and is not measured, and returns the run. The last
    one is watched by a profiler.
    """
    seconds = []
    for _ in range(6):
        run = ready(False)
        start = now(device)
        run()
        seconds.append(now(device) - start)
    fastest = min(seconds[3:])
    run = ready(True)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds, record_shapes=True) as recorded:
        start = now(device)
        run()
        watched = now(device) - start
    # A GPU's kernels take no longer for being watched; a CPU's operations do.
    whole = (fastest if device.type == "cuda" else watched) * 1e6
    taken, products = account(recorded.events(), vocabulary, device.type == "cuda")
    shares = {name: round(time / whole, 3) for name, time in taken.items()}
    shares["gaps"] = round(max(0.0, 1 - sum(shares.values())), 3)
    largest = sorted(products.items(), key=lambda item: -item[1][1])[:12]
    most = peak_flops(device, dtype)
    return {"step_seconds": fastest, "shares": shares, "peak_flops": round(most), "products": {
        shape: {"share": round(time / whole, 3), "of_peak": round(flops / time * 1e6 / most, 3)}
        for shape, (flops, time) in largest}}


def account(events: Iterable[FunctionEvent], vocabulary: int, on_gpu: bool,
            ) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Microseconds of each kind of work; FLOPs and microseconds of each product, by its shapes.

    On a GPU each kernel is an event, and counts once, by its name. An operation of the CPU that has
    started it tells only, by its shapes, that it is of another kind. There are events of
    annotations, too, that span kernels and are no work.
    """
    taken, products = defaultdict(float), defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.device_type != DeviceType.CPU:
            if not event.is_user_annotation:
                taken[kind_of(event.key, [], vocabulary)] += event.self_device_time_total
            continue
        shapes = [tuple(shape) for shape in event.input_shapes or () if shape]
        kind = kind_of(event.key, shapes, vocabulary)
        if not on_gpu:
            time = event.self_cpu_time_total
            taken[kind] += time
        else:
            time = sum(kernel.duration for kernel in event.kernels)
            for kernel in event.kernels if kind != "element-wise" else ():
                taken[kind_of(kernel.name, [], vocabulary)] -= kernel.duration
                taken[kind] += kernel.duration
        if event.key in PRODUCTS and len(shapes) > 1 and time:
            multiplied = factors(event.key, shapes)
            made = products[" · ".join("×".join(map(str, shape)) for shape in multiplied)]
            made[0], made[1] = made[0] + product_flops(multiplied), made[1] + time
    return taken, products


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of several."""
    size = 8192 if device.type == "cuda" else 1024
    square, seconds = torch.randn(size, size, dtype=dtype, device=device), []
    for _ in range(8):
        start = now(device)
        square @ square
        seconds.append(now(device) - start)
    return 2 * size**3 / min(seconds)


def kind_of(name: str, shapes: list[tuple[int, ...]], vocabulary: int) -> str:
    """The kind of work of an operation or kernel, by its name and the shapes of its inputs.

    "triton_tem" begins the names of kernels that the compiler makes from a template: here they are
    flex attention's alone.
    """
    if any(size in (vocabulary, vocabulary + 1) for shape in shapes for size in shape):
        return "logits and loss"
    if name in PRODUCTS:
        return "products"
    for kind, words in (("attention", ("attention", "flash", "flex", "fmha", "triton_tem")),
                        ("products", ("gemm", "nvjet", "cutlass", "gemv", "splitk")),
                        ("optimizer", ("adam", "multi_tensor", "_foreach", "optimizer"))):
        if any(word in name.lower() for word in words):
            return kind
    return "element-wise"


def factors(name: str, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The two inputs that an operation multiplies, among those that it adds and those it fills."""
    if name.startswith("mkldnn::"):
        return [shapes[0], shapes[-1]]
    first = 1 if "add" in name else 0
    return shapes[first:first + 2]


def product_flops(shapes: list[tuple[int, ...]]) -> int:
    """2·m·n·k of the two inputs of a product, [.., m, k] and [.., k, n] or [n, k]."""
    first, second = shapes
    rows = first[:-1] if len(second) < 3 else first[-2:-1]
    return 2 * math.prod(second) * math.prod(rows) if first[-1] in second else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
