#!/usr/bin/env python3
"""Inputs that both sides of a comparison get: checkpoints, batches of tokens, a start for LoRA.

    python tests/bench/make.py checkpoint OUT --shape gemma2-small --dtype float32
    python tests/bench/make.py batches OUT.safetensors --model DIR --batch 2 --length 512
    python tests/bench/make.py conversations OUT.safetensors --model DIR --data FILE --packed
    python tests/bench/make.py lora OUT.safetensors --model DIR
    python tests/bench/make.py synthetic OUT.jsonl --count 1000

All of it is drawn from seed 0. Needs nothing but minilora.
"""

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from minilora.checkpoint import export_merged
from minilora.config import LINEARS, NANO, GemmaConfig, UserError
from minilora.data import IGNORED, batches, make_examples
from minilora.dialects import DIALECTS
from minilora.model import Gemma
from minilora.readers import read_conversations, warn
from minilora.report import run_command
from minilora.tokenizer import Tokenizer
from minilora.weights import checkpoint_name, placement, read_config

# model_type, V, layers, D, F, N, K, H, window: as published, and small ones of the same make.
SHAPES = {
    "tiny": ("gemma2", 4096, 2, 64, 128, 4, 2, 16, 8),
    "gemma2-small": ("gemma2", 256000, 6, 768, 3072, 8, 4, 96, 4096),
    "gemma3-270m": ("gemma3_text", 262144, 18, 640, 2048, 4, 1, 256, 512),
    "gemma2-2b": ("gemma2", 256000, 26, 2304, 9216, 8, 4, 256, 4096),
    "gemma2-9b": ("gemma2", 256000, 42, 3584, 14336, 16, 8, 256, 4096),
}
KEYS = ("model_type", "vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size",
        "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("checkpoint", "batches", "conversations", "lora",
                                         "synthetic"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", type=Path, help="the checkpoint that the inputs are for")
    parser.add_argument("--tokenizer", type=Path, default=NANO, help="folder of a tokenizer.model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--share", type=float, default=0.25, help="of the tokens, trained")
    parser.add_argument("--packed", action="store_true", help="several documents in a row")
    parser.add_argument("--data", default="nano/train.jsonl")
    parser.add_argument("--count", type=int, default=1000, help="conversations")
    flags = parser.parse_args(argv)
    torch.manual_seed(0)
    {"checkpoint": make_checkpoint, "batches": make_batches, "conversations": make_conversations,
     "lora": make_lora, "synthetic": make_synthetic}[flags.what](flags)


def make_checkpoint(flags: argparse.Namespace) -> None:
    """Random weights in the hub's layout, written by minilora itself.

    Linears are wide enough, and the last norm far enough from its start, that without a soft-cap
    losses would differ by more than is allowed. The table is narrow: being tied, a wide one would
    have every token predict itself, and all decoded ids would be one.
    """
    shape = dict(zip(KEYS, SHAPES[flags.shape], strict=True))
    config = shape | {"query_pre_attn_scalar": shape["head_dim"], "max_position_embeddings": 131072,
                      "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
    device, dtype = placement(flags.device, flags.dtype)
    with torch.device("meta"):
        model = Gemma(GemmaConfig.from_dict(config)).to(dtype)
    model.to_empty(device=device).requires_grad_(False)
    for name, parameter in model.named_parameters():
        wide = 0.5 if "embed" in name else 1.7
        parameter.normal_(0.0, 0.1 if "norm" in name else wide / math.sqrt(shape["hidden_size"]))
    model.norm.weight += 5
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=flags.out.parent) as folder:
        base = Path(folder)
        (base / "config.json").write_text(json.dumps(config))
        shutil.copyfile(flags.tokenizer / "tokenizer.model", base / "tokenizer.model")
        export_merged(model, Tokenizer.load(base), base, flags.out)


def make_batches(flags: argparse.Namespace) -> None:
    """Random tokens; of every document the last `share` is trained, as an answer would be."""
    shape = (flags.steps, flags.batch, flags.length)
    ids = torch.randint(10, read_config(flags.model).vocab_size, shape)     # [steps, B, T]
    documents, positions = torch.ones(2, *shape, dtype=torch.int64)
    trained = torch.zeros(shape, dtype=torch.bool)
    rng = random.Random(0)
    for step in range(flags.steps):
        for row in range(flags.batch):
            at, number = 0, 0
            while at < flags.length:
                number += 1
                size = flags.length - at
                if flags.packed:
                    size = min(size, rng.randint(flags.length // 16 + 2, flags.length // 2))
                documents[step, row, at:at + size] = number
                positions[step, row, at:at + size] = torch.arange(size)
                asked = max(1, round((1 - flags.share) * size))  # never the first token
                trained[step, row, at + asked:at + size] = True
                at += size
    tensors = {"input_ids": ids, "labels": torch.where(trained, ids, IGNORED)}
    if flags.packed:
        tensors |= {"documents": documents, "positions": positions}
    save_file(tensors, flags.out)


def make_conversations(flags: argparse.Namespace) -> None:
    """Real conversations, the first `count`: packed into rows of `length`, or a row for each.

    All steps are as wide as the widest; what no row of a step needs is document 0. A last step of
    fewer rows is left out.
    """
    tokenizer = Tokenizer.load(flags.tokenizer)
    tokenizer.add_tokens(DIALECTS["hermes"].tokens, "reserved")  # ids that every model has
    examples = make_examples(read_conversations(flags.data)[:flags.count], tokenizer, "hermes",
                             flags.length, on_problem=warn)
    made = [batch for batch in batches(examples, flags.batch, flags.length, pack=flags.packed)
            if len(batch.input_ids) == flags.batch]
    if not made:
        raise UserError(f"{len(examples)} conversations make less than a batch of {flags.batch} "
                        "rows; give more with --count, or fewer rows with --batch")
    width = max(batch.input_ids.shape[1] for batch in made)

    def widened(name: str, fill: int) -> torch.Tensor:
        parts = [getattr(batch, name) for batch in made]
        return torch.stack([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill)
                            for part in parts])

    save_file({"input_ids": widened("input_ids", 0), "labels": widened("labels", IGNORED),
               "documents": widened("documents", 0), "positions": widened("positions", 0)},
              flags.out)


def make_lora(flags: argparse.Namespace) -> None:
    """A and B of all linears under peft's names, none of them zero: so every gradient counts."""
    with torch.device("meta"):
        model = Gemma(read_config(flags.model))
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LINEARS:
            peft = f"base_model.model.{checkpoint_name(name)}"
            outputs, inputs = module.weight.shape
            tensors[f"{peft}.lora_A.weight"] = torch.randn(flags.rank, inputs) / inputs ** 0.5
            tensors[f"{peft}.lora_B.weight"] = 0.02 * torch.randn(outputs, flags.rank)
    save_file(tensors, flags.out)


def make_synthetic(flags: argparse.Namespace) -> None:
    """Conversations with a call each, no two the same, in OpenAI's layout."""
    rng = random.Random(0)
    tool = {"type": "function", "function": {
        "name": "get_weather", "description": "Weather of a place", "parameters": {
            "type": "object", "properties": {"place": {"type": "string"}}}}}
    with open(flags.out, "w") as file:
        for number in range(flags.count):
            place = f"{rng.choice('BDFGKLMNPRST')}{rng.choice('aeiou')}{rng.randint(0, 9999)}"
            call = {"type": "function", "function": {
                "name": "get_weather", "arguments": json.dumps({"place": place})}}
            file.write(json.dumps({"tools": [tool], "messages": [
                {"role": "user", "content": f"Question {number}: what is it like in {place}? "
                                            + "Please be quick. " * rng.randint(0, 20)},
                {"role": "assistant", "content": "", "tool_calls": [call]}]}) + "\n")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
