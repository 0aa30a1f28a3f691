#!/usr/bin/env python3
"""Where the time of one step goes: matrix products, attention, the loss, what is element-wise.

    python tests/bench/breakdown.py train MODEL BATCHES.safetensors
    python tests/bench/breakdown.py generate MODEL

Prints one JSON line: the seconds of a step without a profiler, the share of them that each kind of
kernel takes (`gaps`: the device waits), and the largest products by shape, each with its share of
the time and of the FLOP/s that a large square product reaches here. A product with the vocabulary,
and whatever else has its size, counts as the loss or the logits.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from minilora.bench import device_name, now, peaks, read_batches
from minilora.config import GenerateConfig, LoraConfig, TrainConfig, add_flags, from_flags
from minilora.generate import generate
from minilora.lora import attach
from minilora.report import run_command
from minilora.trainer import make_optimizer, prepare, train_step
from minilora.weights import load_model, placement

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise",
            "aten::mkldnn_linear", "aten::addmv", "aten::mv")


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

        def run() -> None:
            train_step(model, optimizer, [batch], config.lr, config.clip)
    else:
        steps = 32

        def run() -> None:
            generate(model, [[10, 20, 30]], GenerateConfig(max_new=steps), ())

    facts = measure(run, device, dtype, model.config.vocab_size)
    facts["step_seconds"] /= steps
    print(json.dumps({"stack": "minilora", "device": device_name(device), **facts,
                      **peaks(device)}))


def measure(run: Callable[[], None], device: torch.device, dtype: torch.dtype,
            vocabulary: int) -> dict:
    """Seconds of `run`, what they go into, and its largest products."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(3):
        start = now(device)
        run()
        seconds.append(now(device) - start)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds, record_shapes=True) as recorded:
        start = now(device)
        run()
        watched = now(device) - start
    # A GPU's kernels take no longer for being watched; a CPU's operations do.
    whole = (min(seconds) if device.type == "cuda" else watched) * 1e6
    taken, products = defaultdict(float), defaultdict(lambda: [0, 0.0])
    for event in recorded.key_averages(group_by_input_shape=True):
        time = (event.self_device_time_total if device.type == "cuda"
                else event.self_cpu_time_total)
        shapes = [tuple(shape) for shape in event.input_shapes or () if shape]
        taken[kind_of(event.key, shapes, vocabulary)] += time
        if event.key in PRODUCTS and len(shapes) > 1 and time:
            flops = event.count * product_flops(shapes[-2:])
            made = products[" · ".join("×".join(map(str, shape)) for shape in shapes[-2:])]
            made[0], made[1] = made[0] + flops, made[1] + time
    shares = {name: round(time / whole, 3) for name, time in taken.items()}
    shares["gaps"] = round(max(0.0, 1 - sum(shares.values())), 3)
    largest = sorted(products.items(), key=lambda item: -item[1][1])[:12]
    most = peak_flops(device, dtype)
    return {"step_seconds": min(seconds), "shares": shares, "peak_flops": round(most), "products": {
        shape: {"share": round(time / whole, 3), "of_peak": round(flops / time * 1e6 / most, 3)}
        for shape, (flops, time) in largest}}


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
    """The kind of work of an operation or kernel, by its name and the shapes of its inputs."""
    if any(size in (vocabulary, vocabulary + 1) for shape in shapes for size in shape):
        return "logits and loss"
    if name in PRODUCTS or any(word in name for word in ("gemm", "nvjet", "cutlass", "gemv")):
        return "products"
    if any(word in name.lower() for word in ("attention", "flash", "flex")):
        return "attention"
    if any(word in name.lower() for word in ("adam", "multi_tensor", "_foreach", "optimizer")):
        return "optimizer"
    return "element-wise"


def product_flops(shapes: list[tuple[int, ...]]) -> int:
    """2·m·n·k of the last two inputs of a product, [.., m, k] and [.., k, n] or [n, k]."""
    first, second = shapes
    rows = first[:-1] if len(second) < 3 else first[-2:-1]
    return 2 * math.prod(second) * math.prod(rows) if first[-1] in second else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
