#!/usr/bin/env python3
"""Steps fed from the data cache, to see whether they depend on how many conversations there are.

    MINILORA_CACHE=FOLDER python tests/bench/stream.py DATA.jsonl --model nano --length 512

Prints one JSON line: conversations, seconds until the first batch, median seconds of a step with
the making of its batch, peak memory. Run it twice: the first time the cache is filled.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from minilora.bench import device_name, now, peaks
from minilora.cache import load_examples
from minilora.config import LoraConfig, TrainConfig, add_flags, from_flags
from minilora.lora import attach
from minilora.report import run_command
from minilora.tokenizer import Tokenizer
from minilora.trainer import (
    add_dialect,
    make_optimizer,
    plan_steps,
    prepare,
    stream_batches,
    train_step,
)
from minilora.weights import load_model, placement


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    add_flags(parser, TrainConfig, only=("model", "length", "batch", "steps", "dtype", "device",
                                          "compile"))
    config = from_flags(TrainConfig, parser.parse_args(argv))
    device, dtype = placement(config.device, config.dtype)
    model, tokenizer = load_model(config.model, dtype, device), Tokenizer.load(config.model)
    attach(model, LoraConfig())
    prepare(model, config)
    add_dialect(model, tokenizer, config.dialect, "reserved")
    optimizer = make_optimizer(model, config)

    start = time.perf_counter()
    examples = load_examples(config.data, tokenizer, config.dialect, config.length)
    plan_steps(examples, config)
    stream = stream_batches(examples, config, fill=model.compiled)
    batch = next(stream)
    begin = time.perf_counter() - start
    seconds = []
    for _ in range(config.steps):
        at = now(device)
        train_step(model, optimizer, [batch], config.lr, config.clip)
        batch = next(stream)
        seconds.append(now(device) - at)
    print(json.dumps({"stack": "minilora", "device": device_name(device),
                      "examples": len(examples), "threads": torch.get_num_threads(),
                      "start_seconds": round(begin, 3),
                      "step_seconds": round(statistics.median_high(seconds[2:]), 4),
                      **peaks(device)}))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
