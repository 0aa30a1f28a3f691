"""What this machine gives: training steps, decoding, loading, merging, each as the product does it.

    train      LoRA steps on given batches of tokens
    generate   greedy decoding of random prompts, beside what memory allows
    load       load_model, beside reading the same bytes
    merge      export_merged, beside copying the same files

Each returns plain values and is one JSON line on the command line. Seconds are of the wall clock;
`gb` are GiB. The host's peak is that of the whole process, Python and PyTorch included, so measure
each thing in a process of its own. `tests/bench/compare.py` does, with transformers and peft in
turn on the same inputs, and refuses figures of sides that do not compute the same.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minilora.attention import flex_fits
from minilora.checkpoint import MODEL_FILES, export_merged
from minilora.config import (
    GenerateConfig,
    LoraConfig,
    TrainConfig,
    UserError,
    add_flags,
    from_flags,
)
from minilora.data import IGNORED, Batch
from minilora.estimate import host_peak
from minilora.files import read_tensors
from minilora.generate import generate
from minilora.linear import product
from minilora.lora import adapted, attach, merge, trainable
from minilora.model import Gemma
from minilora.tokenizer import Tokenizer
from minilora.trainer import make_optimizer, prepare, train_step, trained_tokens
from minilora.weights import FILES, checkpoint_name, load_model, locate, placement

GB = 2**30
WARM = 2  # steps that are not counted: memory is taken, kernels are chosen


# --- training -------------------------------------------------------------------------------------

def bench_train(config: TrainConfig, lora: LoraConfig, file: str, seed_lora: str = "") -> dict:
    """An optimizer step for each batch in `file`: losses, gradient norms, seconds, peak memory.

    AdamW without weight decay, clipping at 1.0, the same rate at every step. Adapters start from
    the tensors of `seed_lora`, or as `attach` makes them. The base's bytes are summed up before and
    after, one piece at a time, outside of what is timed. Raises UserError for files that do not
    fit the model, and where a gradient is zero or not finite.
    """
    device, dtype = placement(config.device, config.dtype)
    steps = read_batches(Path(file))
    model = load_model(config.model, dtype, device)
    if (most := max(int(batch.input_ids.max()) for batch in steps)) >= model.config.vocab_size:
        raise UserError(f"{file}: input_ids holds {most}; {config.model} has "
                        f"{model.config.vocab_size} tokens: make the batches for this model")
    attach(model, lora)
    if seed_lora:
        set_adapters(model, Path(seed_lora))
    trained = trainable(model)
    base = [p for name, p in model.named_parameters() if name not in trained]
    before = byte_sum(base), byte_sum(trained.values())
    prepare(model, config)
    optimizer = make_optimizer(model, replace(config, weight_decay=0.0, lr_ratio=1.0))

    done, seconds = [], []
    for batch in steps:
        start = now(device)
        done.append(train_step(model, optimizer, [batch], config.lr, clip=1.0))
        seconds.append(now(device) - start)
    norms = [step.grad_norm for step in done]
    if not all(norms):
        raise UserError(f"{file}: the gradient norm is 0 at step {norms.index(0) + 1}; there is "
                        "nothing to measure")
    kept = slice(WARM if len(steps) > WARM else 0, None)
    step_seconds = statistics.median_high(seconds[kept])
    return {
        "stack": "minilora", "dtype": dtype_name(dtype), "device": device_name(device),
        "attn": attention_name(model, steps[0].input_ids), "compile": model.compiled,
        "checkpointing": config.recompute in ("all", "offload"), "recompute": config.recompute,
        "step_seconds": round(step_seconds, 4),
        "tokens_per_second": round(steps[0].input_ids.numel() / step_seconds, 1),
        "trained_per_second": round(
            sum(step.trained for step in done[kept]) / sum(seconds[kept]), 1),
        **peaks(device),
        "losses": [round(step.loss, 6) for step in done],
        "grad_norms": [round(norm, 6) for norm in norms],
        "base_unchanged": byte_sum(base) == before[0],
        "adapters_changed": byte_sum(trained.values()) != before[1],
    }


def read_batches(path: Path) -> list[Batch]:
    """The steps in a safetensors file: input_ids and labels, both int64 [steps, B, T].

    A label is its token's id where the token is trained, else -100; not shifted. `documents`, of
    the same shape, numbers the conversations of a packed row and is 0 on padding (default: a row is
    one conversation); columns that are padding in all rows of a step are cut off. `positions`
    default to a count from 0 in each document. Raises UserError that names the tensor.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); expected input_ids and "
                        "labels, int64 [steps, batch, seq]") from None
    for name in ("input_ids", "labels"):
        if name not in tensors:
            raise UserError(f"{path}: lacks {name}; it holds {', '.join(tensors) or 'nothing'}")
    ids, labels = tensors["input_ids"], tensors["labels"]
    for name, tensor in tensors.items():
        if name not in ("input_ids", "labels", "documents", "positions"):
            raise UserError(f"{path}: has an unexpected {name}; documents and positions are all "
                            "that may be beside input_ids and labels")
        if tensor.dtype != torch.int64 or tensor.dim() != 3 or tensor.shape != ids.shape:
            raise UserError(f"{path}: {name} is {dtype_name(tensor.dtype)} {list(tensor.shape)}; "
                            "expected int64 [steps, batch, seq], all alike")
    if not ids.numel() or ids.min() < 0:
        raise UserError(f"{path}: input_ids is empty or holds ids below 0")
    documents = tensors.get("documents", torch.ones_like(ids))          # [steps, B, T]
    if not ((labels == IGNORED) | (labels == ids) & (documents > 0)).all():
        raise UserError(f"{path}: a label is neither -100 nor its own token's id, or is on "
                        "padding; labels are not shifted")
    if "positions" not in tensors:
        slots = torch.arange(ids.shape[-1])
        begins = F.pad(documents[..., 1:] != documents[..., :-1], (1, 0))
        tensors["positions"] = slots - torch.where(begins, slots, 0).cummax(-1).values
    steps = []
    for number, used in enumerate((documents > 0).any(1), 1):           # used: [T]
        width = int(used.nonzero().amax()) + 1 if used.any() else 0
        rows = [tensor[number - 1, :, :width]
                for tensor in (ids, labels, tensors["positions"], documents)]
        batch = Batch(*rows, kinds=torch.zeros_like(rows[0], dtype=torch.uint8))
        if not trained_tokens(batch):
            raise UserError(f"{path}: step {number} has no trained token (one that has a token "
                            "before it in its row)")
        steps.append(batch)
    return steps


@torch.no_grad()
def set_adapters(model: Gemma, path: Path) -> None:
    """Sets every A and B from a safetensors file under peft's names. Raises UserError."""
    parts = {f"base_model.model.{checkpoint_name(name)}.{key}.weight": getattr(module, key)
             for name, module in adapted(model).items() for key in ("lora_A", "lora_B")}
    tensors = read_tensors(path, {name: list(p.shape) for name, p in parts.items()},
                           "are --rank and the model those that it was made for?")
    for name, parameter in parts.items():
        parameter.copy_(tensors[name])


@torch.no_grad()
def byte_sum(tensors: Iterable[Tensor]) -> int:
    """A sum over all bytes, on their device, that differs where any 16 bits of them differ.

    Two bytes at a time, each times an odd number of its own, modulo 2^64: a small piece at a time,
    so that nothing the size of a tensor is made.
    """
    piece, total = 2**18, 0
    for tensor in tensors:
        words = tensor.detach().view(-1).view(torch.int16)
        odd = torch.arange(1, 2 * min(piece, len(words)), 2, device=words.device)
        parts = words.split(piece)
        sums = odd.new_empty(len(parts))
        for number, part in enumerate(parts):
            sums[number] = (part * odd[:len(part)]).sum()
        for each in sums.tolist():
            total = (total * 3 + each) % 2**64
    return total


# --- decoding -------------------------------------------------------------------------------------

def bench_generate(source: str, device: torch.device, dtype: torch.dtype, batch: int, prompt: int,
                   new: int) -> dict:
    """Greedy decoding of random prompts [batch, prompt], `new` ids for each row whatever they are.

    Prefill is the time to the first new token; decoding is what the others take: on a GPU that
    includes recording a step, once. The bound is a matrix-vector product's: as fast as it reads its
    matrix here, all weights are read once a token (the cache, small beside them, is not counted).
    """
    for name, number, least in (("batch", batch, 1), ("prompt", prompt, 1), ("new", new, 2)):
        if number < least:
            raise UserError(f"--{name} is {number}; expected at least {least}")
    model = load_model(source, dtype, device)
    if prompt + new > (limit := model.config.max_position_embeddings):
        raise UserError(f"--prompt {prompt} and --new {new} are more than the {limit} tokens of "
                        "the model's context")
    torch.manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (batch, prompt), device=device)
    prompts = ids.tolist()

    def run(count: int) -> tuple[float, list[list[int]]]:
        start = now(device)
        replies = generate(model, prompts, GenerateConfig(max_new=count), stop_ids=())
        return now(device) - start, replies

    run(new)
    first = min(run(1)[0] for _ in range(3))
    whole, replies = min(run(new) for _ in range(3))
    steps = (new - 1) / (whole - first)  # a second, of the whole batch
    weights = sum(p.nbytes for p in model.parameters())
    speed = matrix_bandwidth(model.embed_tokens.weight, 10 if device.type == "cuda" else 1)
    return {
        "stack": "minilora", "dtype": dtype_name(dtype), "device": device_name(device),
        "static": True,  # the cache's memory is taken once
        "prefill_seconds": round(first, 4),
        "decode_tokens_per_second": round(batch * steps, 2),
        "matrix_bytes_per_second": round(speed), "weight_bytes": weights,
        "share_of_bound": round(steps * weights / speed, 3),
        **peaks(device), "ids": replies[0], "other_ids": replies[1:],
    }


@torch.no_grad()
def matrix_bandwidth(weight: Tensor, times: int) -> float:
    """Bytes a second that a product of a matrix [out, in] and a vector reads, the best of several.

    A matrix much larger than the processor's caches, such as an embedding table, is read from
    memory. Between two looks at the clock there are `times` products: to start a GPU and to wait
    for it takes a tenth as long as one of its products.
    """
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    seconds = []
    for multiply in (lambda: product(x, weight), lambda: weight @ x[0]):
        for _ in range(10):
            start = now(weight.device)
            for _ in range(times):
                multiply()
            seconds.append((now(weight.device) - start) / times)
    return weight.nbytes / min(seconds)


# --- files ----------------------------------------------------------------------------------------

def bench_load(source: str, device: torch.device, dtype: torch.dtype, rounds: int) -> dict:
    """Seconds of `load_model`, in turn with those of reading the files into fresh memory.

    Both read what the system has in its cache already, and both end on the device. The peak is that
    of the first load, and counts only in a process that did nothing large before.
    """
    files = weight_files(locate(source, FILES))
    for path in files:
        with open(path, "rb") as file:  # into the system's cache, 8 MiB at a time
            while file.read(8 * 2**20):
                pass
    held = peaks(device)
    weights = touch(load_model(source, dtype, device))
    peak = peaks(device)

    def load() -> None:
        touch(load_model(source, dtype, device))

    def read() -> None:
        for path in files:
            memory = torch.empty(path.stat().st_size, dtype=torch.uint8)
            with open(path, "rb", buffering=0) as file:
                at = 0
                while got := file.readinto(memory[at:].numpy()):
                    at += got
            memory.to(device)

    seconds = in_turn({"read": read, "load": load}, rounds, device)
    return {
        "stack": "minilora", "dtype": dtype_name(dtype), "device": device_name(device),
        **seconds, "ratio": ratio(seconds["load_seconds"], seconds["read_seconds"]),
        "file_bytes": sum(path.stat().st_size for path in files), "weight_bytes": weights,
        "host_before_gb": held["peak_host_gb"], **peak,
        "host_over_weights": round(
            (peak["peak_host_gb"] - held["peak_host_gb"]) * GB / weights, 3),
    }


def bench_merge(source: str, device: torch.device, dtype: torch.dtype, rounds: int,
                scratch: str | None = None) -> dict:
    """Seconds of `export_merged`, a random adapter folded in, in turn with copying the checkpoint.

    Both write to a folder in `scratch` (default: the system's for temporary files) and wait for the
    disk. `merge_seconds` are of `merge` alone, in memory.
    """
    folder = locate(source, MODEL_FILES)
    files = [path for path in folder.iterdir()
             if any(map(path.match, MODEL_FILES)) and path.is_file()]
    model, tokenizer = load_model(source, dtype, device), Tokenizer.load(source)
    attach(model, LoraConfig())
    with torch.no_grad():
        for module in adapted(model).values():
            module.lora_B.normal_(0.0, 0.01)
    with tempfile.TemporaryDirectory(prefix="minilora-bench-", dir=scratch) as name:
        out = Path(name)

        def clear() -> None:
            for path in out.iterdir():
                shutil.rmtree(path)

        def copy() -> None:
            (out / "copy").mkdir()
            for path in files:
                shutil.copyfile(path, out / "copy" / path.name)
                with open(out / "copy" / path.name, "rb") as file:
                    os.fsync(file.fileno())

        def export() -> None:
            export_merged(model, tokenizer, folder, out / "merged")

        seconds = in_turn({"copy": copy, "export": export}, rounds, device, before=clear)
        sizes = {"copy_bytes": sum(path.stat().st_size for path in files),
                 "export_bytes": sum(p.stat().st_size for p in (out / "merged").iterdir())}
    seconds |= in_turn({"merge": lambda: merge(model)}, 1, device)
    per_byte = {name: [each / sizes[f"{name}_bytes"] for each in seconds[f"{name}_seconds"]]
                for name in ("copy", "export")}
    return {"stack": "minilora", "dtype": dtype_name(dtype), "device": device_name(device),
            **seconds, **sizes, "ratio": ratio(per_byte["export"], per_byte["copy"]),
            **peaks(device)}


def weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: holds no model.safetensors or model-*.safetensors")
    return files


def touch(model: Gemma) -> int:
    """Looks at a number of every page of the weights, so that all are there; returns their bytes.

    Without it, a loader that maps a file and reads nothing would seem to take no time.
    """
    for parameter in model.parameters():
        parameter.detach().view(-1)[::1024].sum().item()
    return sum(parameter.nbytes for parameter in model.parameters())


def in_turn(jobs: dict[str, Callable[[], object]], rounds: int, device: torch.device,
            before: Callable[[], object] = lambda: None) -> dict[str, list[float]]:
    """The seconds of each job in every round, by `name_seconds`; `before` each job is not timed."""
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}; expected at least 1")
    seconds: dict[str, list[float]] = {f"{name}_seconds": [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            before()
            start = now(device)
            job()
            seconds[f"{name}_seconds"].append(round(now(device) - start, 4))
    return seconds


def ratio(seconds: list[float], other: list[float]) -> float:
    """How much longer one took than the other: the median over the rounds."""
    return round(statistics.median(a / b for a, b in zip(seconds, other, strict=True)), 3)


# --- the machine ----------------------------------------------------------------------------------

def now(device: torch.device) -> float:
    """Seconds on a clock, all work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peaks(device: torch.device) -> dict[str, float | None]:
    """The most memory held so far, in GiB: by this process, and by PyTorch on its GPU."""
    on_gpu = torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else None
    return {"peak_host_gb": round(host_peak() / GB, 3),
            "peak_device_gb": None if on_gpu is None else round(on_gpu, 3)}


def attention_name(model: Gemma, ids: Tensor) -> str:
    """The attention of a training step on ids [B, T], in transformers' words where it has one."""
    device = model.embed_tokens.weight.device
    if device.type == "cpu":
        return "blocks"
    if flex_fits(device, model.config.head_dim, ids.shape[1]):
        return "flex_attention"
    return "sdpa" if model.config.attn_logit_softcapping is None else "dense"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the command line -----------------------------------------------------------------------------

def add_bench_commands(parser: argparse.ArgumentParser) -> None:
    """Gives `parser` the commands train, generate, load and merge, each printing one JSON line."""
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    def add(name: str, bench: Callable[[argparse.Namespace], dict], help: str, description: str,
            ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=description)
        command.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id, or nano")
        command.set_defaults(run=lambda flags: print(json.dumps(bench(flags))))
        return command

    train = add("train", lambda flags: bench_train(
        from_flags(TrainConfig, flags), from_flags(LoraConfig, flags), flags.batches,
        flags.seed_lora),
        "LoRA steps on given batches", "Steps of training on the batches in a file. Prints losses, "
        "gradient norms, the median seconds of a step (the first two left out), tokens a second "
        "and peak memory.")
    train.add_argument("batches", metavar="BATCHES.safetensors", help="input_ids and labels, int64 "
                       "[steps, batch, seq], labels -100 where no loss is taken and not shifted; "
                       "may hold documents and positions of packed rows, too")
    train.add_argument("--lr", type=float, default=1e-4, help="rate of every step (default: 1e-4)")
    train.add_argument("--seed-lora", default="", metavar="FILE", help="safetensors file of A and "
                       "B under peft's names to start from")
    add_flags(train, LoraConfig, only=("rank", "alpha"))
    add_flags(train, TrainConfig, only=("recompute", "compile"))

    write = add("generate", lambda flags: bench_generate(
        flags.model, *_placement(flags), flags.batch, flags.prompt, flags.new),
        "greedy decoding of random prompts", "Decodes random prompts. Prints the seconds to the "
        "first token, tokens a second after it, and the share of what reading all weights once a "
        "token would allow.")
    for name, default, what in (("batch", 1, "prompts"), ("prompt", 128, "tokens of a prompt"),
                                ("new", 128, "tokens to write to each, no sooner stopped")):
        write.add_argument(f"--{name}", type=int, default=default, metavar="N",
                           help=f"{what} (default: {default})")

    load = add("load", lambda flags: bench_load(flags.model, *_placement(flags), flags.rounds),
               "loading, beside reading the files",
               "Loads the model, in turn with reading its files into memory.")
    fold = add("merge", lambda flags: bench_merge(
        flags.model, *_placement(flags), flags.rounds, flags.scratch),
        "merging and export, beside copying the files",
        "Exports the model with a random adapter folded in, in turn with copying its files.")
    fold.add_argument("--scratch", metavar="FOLDER", help="where copies are written and deleted "
                      "again (default: the system's folder for temporary files)")
    for command in (load, fold):
        command.add_argument("--rounds", type=int, default=5, metavar="N",
                             help="times in turn (default: 5)")
    for command in commands.choices.values():
        add_flags(command, TrainConfig, only=("dtype", "device"))


def _placement(flags: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    return placement(**{name: vars(flags)[name] for name in ("device", "dtype") if name in flags})
