#!/usr/bin/env python3
"""The other side of every comparison: transformers + peft on the inputs of `minilora bench`.

    python tests/bench/peer.py train MODEL BATCHES.safetensors --seed-lora FILE --attn eager
    python tests/bench/peer.py generate MODEL --batch 8 --static
    python tests/bench/peer.py load MODEL
    python tests/bench/peer.py merge MODEL

Each prints one JSON line with the fields of `python -m minilora bench`. It knows nothing of
minilora, so that what both find is found twice. Needs transformers and peft.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "generate", "load", "merge"))
    parser.add_argument("model")
    parser.add_argument("batches", nargs="?")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto", help="auto: the GPU where there is one")
    parser.add_argument("--attn", default="eager", help="eager, sdpa or flex_attention")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--seed-lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--static", action="store_true", help="static cache, compiled")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch")
    flags = parser.parse_args(argv)
    if flags.device == "auto":
        flags.device = "cuda" if torch.cuda.is_available() else "cpu"
    flags.device = torch.device(flags.device)
    on_gpu = flags.device.type == "cuda"
    torch.manual_seed(0)
    facts = {"stack": "transformers + peft", "dtype": flags.dtype, "attn": flags.attn,
             "device": torch.cuda.get_device_name(flags.device) if on_gpu else "cpu"}
    facts |= {"train": train, "generate": generate, "load": load, "merge": merge}[flags.what](flags)
    held = torch.cuda.max_memory_allocated(flags.device) / 2**30 if on_gpu else None
    unit = 1 if sys.platform == "darwin" else 1024
    facts |= {"peak_device_gb": held,
              "peak_host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    print(json.dumps(facts))


def read_model(flags: argparse.Namespace):
    return AutoModelForCausalLM.from_pretrained(
        flags.model, dtype=getattr(torch, flags.dtype),
        attn_implementation=flags.attn).to(flags.device)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train(flags: argparse.Namespace) -> dict:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    model = read_model(flags)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(
        r=flags.rank, lora_alpha=flags.alpha, target_modules=LINEARS, task_type="CAUSAL_LM"))
    if flags.seed_lora:
        set_peft_model_state_dict(model, load_file(flags.seed_lora))
    if flags.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, flags.lr, weight_decay=0.0,
                                  fused=flags.device.type == "cuda")
    forward = torch.compile(model) if flags.compile else model

    losses, norms, seconds, counts = [], [], [], []
    for batch in read_steps(load_file(flags.batches)):
        start = now(flags.device)
        batch = {name: tensor.to(flags.device) for name, tensor in batch.items()}
        loss = forward(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(now(flags.device) - start)
        norms.append(norm.item())
        counts.append((batch["input_ids"].numel(), int((batch["labels"][:, 1:] >= 0).sum())))
    warm = 2 if len(seconds) > 2 else 0
    step = statistics.median_high(seconds[warm:])
    return {"compile": flags.compile, "checkpointing": flags.checkpointing, "step_seconds": step,
            "tokens_per_second": counts[0][0] / step,
            "trained_per_second": sum(n for _, n in counts[warm:]) / sum(seconds[warm:]),
            "losses": losses, "grad_norms": norms}


def read_steps(tensors: dict[str, torch.Tensor]):
    """The arguments of each step. Packed rows are told by positions that begin again at 0."""
    documents = tensors.get("documents")
    for number, ids in enumerate(tensors["input_ids"]):
        batch = {"input_ids": ids, "labels": tensors["labels"][number]}
        if documents is not None:
            held = documents[number] > 0
            if documents[number].max() > 1:
                batch["position_ids"] = tensors["positions"][number]
            else:
                batch["attention_mask"] = held.long()
            width = int(held.any(0).nonzero().max()) + 1
            batch = {name: tensor[:, :width] for name, tensor in batch.items()}
        yield batch


def generate(flags: argparse.Namespace) -> dict:
    model = read_model(flags).eval()
    torch.manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (flags.batch, flags.prompt),
                        device=flags.device)
    cache = {"cache_implementation": "static"} if flags.static else {}

    def run(new: int) -> tuple[float, list[list[int]]]:
        start = now(flags.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             min_new_tokens=new, max_new_tokens=new, **cache)
        return now(flags.device) - start, out[:, flags.prompt:].tolist()

    run(flags.new)
    first = min(run(1)[0] for _ in range(3))
    whole, (row, *rows) = min(run(flags.new) for _ in range(3))
    return {"static": flags.static, "prefill_seconds": first,
            "decode_tokens_per_second": flags.batch * (flags.new - 1) / (whole - first),
            "ids": row, "other_ids": rows}


def load(flags: argparse.Namespace) -> dict:
    for path in Path(flags.model).glob("*.safetensors"):
        with open(path, "rb") as file:  # into the system's cache
            while file.read(8 * 2**20):
                pass
    seconds = []
    for _ in range(flags.rounds):
        start = now(flags.device)
        model = read_model(flags)
        for parameter in model.parameters():  # a page that is only mapped is not loaded
            parameter.detach().view(-1)[::1024].sum().item()
        seconds.append(now(flags.device) - start)
        del model
    return {"load_seconds": seconds}


def merge(flags: argparse.Namespace) -> dict:
    from peft import LoraConfig, get_peft_model

    seconds = []
    for _ in range(flags.rounds):
        model = get_peft_model(read_model(flags), LoraConfig(
            r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.01)
        with tempfile.TemporaryDirectory(dir=flags.scratch) as folder:
            start = now(flags.device)
            model.merge_and_unload().save_pretrained(folder)
            for path in Path(folder).iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            seconds.append(now(flags.device) - start)
        del model
    return {"export_seconds": seconds}


if __name__ == "__main__":
    main()
