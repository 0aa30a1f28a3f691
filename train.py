#!/usr/bin/env python3
"""Teach a Gemma chat model to call functions, with LoRA.

    python train.py                                    # the built-in nano base, minutes on a CPU
    python train.py --model google/gemma-2-2b-it --data calls.jsonl --out runs/calls
    python train.py --resume runs/calls                # go on where a run was stopped

The run folder gets adapter/ (peft's layout), checkpoints/, metrics.jsonl, config.json, result.json,
curve.png and, with --merge, merged/ (the whole model in the hub's layout); --push uploads the
adapter to the hub. Ctrl-C saves and leaves.
"""

import argparse
import dataclasses
import json
import re
import signal
import threading
import time
from pathlib import Path

import torch

from minilora.bfcl import ask
from minilora.cache import Dataset, load_examples
from minilora.checkpoint import export_merged, save_adapter
from minilora.config import (
    NANO,
    LoraConfig,
    Parser,
    TrainConfig,
    UserError,
    add_flags,
    builtin,
    from_flags,
    read_settings,
)
from minilora.data import batches, column, count_tokens
from minilora.estimate import host_peak
from minilora.evaluate import Report, evaluate
from minilora.files import write_file, write_json
from minilora.hub import add_push_flags, check_push, model_card, push
from minilora.lora import attach, trainable
from minilora.readers import refuse, warn
from minilora.report import (
    append_metrics,
    count,
    draw_curve,
    duration,
    forget_metrics_after,
    progress,
    run_command,
    say,
    table,
)
from minilora.sources import split_data
from minilora.state import latest_state, load_state, save_state
from minilora.tokenizer import Tokenizer
from minilora.trainer import (
    add_dialect,
    held_out_loss,
    learning_rate,
    make_optimizer,
    plan_steps,
    prepare,
    stream_batches,
    train_step,
    weight_bytes,
)
from minilora.weights import load_model, placement

STARTED = time.perf_counter()


def main() -> None:
    flags = parse()
    lora, config, out = settings(flags)
    check_push(flags, config.model)
    torch.manual_seed(config.seed)

    # --- the base, its new tokens and its adapters
    device, dtype = placement(config.device, config.dtype)
    model = load_model(config.model, dtype, device)
    tokenizer = Tokenizer.load(config.model)
    base = sum(p.numel() for p in model.parameters())
    wrapped = attach(model, lora, config.seed)
    new_tokens = add_dialect(model, tokenizer, config.dialect, config.new_tokens)
    prepare(model, config)
    trained = sum(p.numel() for p in trainable(model).values())

    # --- the data: conversations to tokens, which are kept on disk, and tokens to batches
    examples = read(config.data, tokenizer, config)
    if config.eval_data:
        held_out = read(config.eval_data, tokenizer, config)
    else:
        examples, held_out = examples.split(config.eval_share, config.seed)
    if not column(examples, "weight").any():
        raise UserError(f"{config.data}: no conversation to train on is left")
    steps = plan_steps(examples, config)
    held_out_batches = batches(held_out, config.batch, config.length, pack=config.pack)
    asked = held_out.conversations(config.eval_calls)

    facts = count_tokens(examples)
    say(table([
        ("model", f"{config.model}: {model.config.model_type}, {count(base)} parameters, "
                  f"{dtype} on {device}".replace("torch.", "")),
        ("trains", f"{count(trained)} parameters ({trained / base:.2%}): rank {lora.rank} on "
                   f"{len(wrapped)} linears, {len(new_tokens)} new tokens"),
        ("data", f"{facts['used']} conversations, {count(facts['tokens'])} tokens, "
                 f"{count(facts['trained'])} trained ({facts['trained'] / facts['tokens']:.0%}); "
                 f"{facts['split']} split and {facts['cut']} cut to fit; "
                 f"{count_tokens(held_out)['used']} held out"),
        ("steps", f"{steps} of {config.batch} × {config.length} tokens"
                  + (f" × {config.accumulate}" if config.accumulate > 1 else "")),
        ("memory", f"{count(weight_bytes(model))}B for weights, adapters and optimizer; "
                   "activations come on top"),
        *([("layers", "compiled in the first step, which takes a minute or so")]
          if model.compiled else []),
        ("out", f"{out}"),
    ]))

    # --- from the start, or from where an earlier run was stopped
    metrics = out / "metrics.jsonl"
    optimizer = make_optimizer(model, config)
    if flags.resume:
        state = load_state(out / "checkpoints", model, optimizer)
        forget_metrics_after(metrics, state["step"])
        say(f"resumed at step {state['step']} of {steps}")
    else:
        chosen = {**dataclasses.asdict(lora), **dataclasses.asdict(config)}
        write_file(out / "config.json", (json.dumps(chosen, indent=2) + "\n").encode())
        state = {"step": 0, "before": None}
        if asked:
            report = answer(model, tokenizer, asked, config, "before")
            state |= {"before": report.calls.value, "no_tool_before": report.no_tool.value}

    # --- the loop
    stream = stream_batches(examples, config, skip=state["step"] * config.accumulate,
                            fill=model.compiled)
    look = config.eval_every or max(1, steps // 10)
    stop = leave_on_interrupt()
    start, tokens, told = state["step"], 0, False
    began = warm = time.perf_counter()
    with progress(steps, start) as bar:
        for step in range(start, steps):
            lr = learning_rate(step, steps, config)
            done = train_step(model, optimizer, [next(stream) for _ in range(config.accumulate)],
                              lr, config.clip)
            state["step"] = step + 1
            tokens += done.tokens
            now = time.perf_counter()
            record = {"step": step + 1, "loss": done.loss, "grad_norm": done.grad_norm, "lr": lr,
                      "tokens": done.tokens, "trained": done.trained,
                      "seconds": round(now - began, 3)}
            if held_out_batches and ((step + 1) % look == 0 or step + 1 == steps):
                record["held_out_loss"] = held_out_loss(model, held_out_batches)
                say(f"step {step + 1}: loss {done.loss:.4f}, held out "
                    f"{record['held_out_loss']:.4f}")
            append_metrics(metrics, record)
            bar.set_postfix_str(f"loss {done.loss:.3f}, {tokens / (now - began):.0f} tokens/s")
            bar.update()
            if step == start:
                warm = now  # the first step also warms up, so the estimate leaves it out
            elif not told and now - warm > 5:
                told = True
                left = (now - warm) / (step - start) * (steps - step - 1)
                say(f"about {duration(left)} to go; {count(peak_bytes(device))}B at most so far")
            if stop.is_set() or (config.save_every and (step + 1) % config.save_every == 0):
                save_state(out / "checkpoints", step + 1, model, optimizer, state)
            if stop.is_set():
                break
    seconds = time.perf_counter() - began
    signal.signal(signal.SIGINT, signal.default_int_handler)  # no step is left to finish

    # --- what is left behind
    if state["step"] == steps:  # first of all, so that nothing that fails below loses the run
        save_state(out / "checkpoints", steps, model, optimizer, state)
    save_adapter(model, tokenizer, out / "adapter", config.model, config.dialect)
    if not draw_curve(metrics, out / "curve.png"):
        say("note: curve.png is not drawn: matplotlib is missing (pip install matplotlib)")
    if state["step"] < steps:
        say(f"stopped after step {state['step']} of {steps}; go on with: "
            f"python train.py --resume {out}" + (f" --push {flags.push}" if flags.push else "")
            + (" --public" if flags.public else ""))
        return
    after = answer(model, tokenizer, asked, config, "after") if asked else Report(())
    if config.merge:
        export_merged(model, tokenizer, config.model, out / "merged", config.dialect)

    result = {"before": state["before"], "after": after.calls.value,
              "after_95": after.calls.interval, "after_of": after.calls.total,
              "no_tool_before": state.get("no_tool_before"), "no_tool_after": after.no_tool.value,
              "no_tool_after_95": after.no_tool.interval, "no_tool_after_of": after.no_tool.total,
              "steps": steps, "conversations": facts["used"],
              "seconds": round(time.perf_counter() - STARTED, 1),
              "train_seconds": round(seconds, 1),
              "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
              "peak_bytes": peak_bytes(device), "trained_parameters": trained, "out": str(out)}
    write_json(out / "result.json", result)
    table_rows = model.embed_tokens.num_embeddings if model.embed_tokens.appended else 0
    for kind, library in (("adapter", "peft"), ("merged", "transformers")):
        if (out / kind).is_dir():
            card = model_card(library, config.model, config.dialect, out, table_rows)
            write_file(out / kind / "README.md", card.encode())
    if flags.json:
        print(json.dumps(result), flush=True)
    else:
        rows = [("trained", f"{steps} steps in {duration(seconds)}, {tokens / seconds:.0f} "
                            f"tokens/s, {count(result['peak_bytes'])}B at most")]
        if after.cases:
            before = "none" if state["before"] is None else f"{state['before']:.3f}"
            rows += [("calls right", f"{before} before, {after.calls} after"),
                     ("no tool needed", f"{after.no_tool} answered without one, after")]
        rows += [("adapter", f"{out / 'adapter'}"),
                 ("next", f'python infer.py --adapter {out} "…"')]
        print(table(rows), flush=True)
    if flags.push:
        say(f"pushed to {push(out / 'adapter', flags.push, flags.public)}")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, TrainConfig, LoraConfig)
    parser.add_argument("--config", metavar="FILE", help="settings from a file, such as the "
                        "config.json of a run folder; flags come before them")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    add_push_flags(parser, "the adapter")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args()


def settings(flags: argparse.Namespace) -> tuple[LoraConfig, TrainConfig, Path]:
    """The run's settings and its folder: from flags, from a file, from the run to go on with."""
    given = vars(flags).keys() - {"config", "resume", "json", "push", "public"}
    path = flags.config
    if flags.resume:
        if given or path:
            names = [name.replace("_", "-") for name in sorted(given)] or ["config"]
            raise UserError("--resume takes its settings from the run; leave out "
                            + ", ".join(f"--{name}" for name in names))
        path = Path(flags.resume) / "config.json"
        if latest_state(Path(flags.resume) / "checkpoints") is None:
            raise UserError(f"{flags.resume}: no checkpoint to go on from")
    elif not path and not given & {"model", "data"}:
        path = NANO / "recipe.json"  # nothing asked for: the built-in job, with its own settings
    chosen = read_settings(path, LoraConfig, TrainConfig) if path else {}
    lora, config = (from_flags(cls, flags, chosen) for cls in (LoraConfig, TrainConfig))
    if flags.resume:
        return lora, config, Path(flags.resume)
    if config.out and (Path(config.out) / "config.json").exists():
        raise UserError(f"{config.out} holds a run already; name another --out, or go on with it: "
                        f"--resume {config.out}")
    return lora, config, Path(config.out) if config.out else new_folder(config.data)


def new_folder(data: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, runs/NAME-3 … that is free."""
    first = split_data(data)[0][0]
    name = "nano" if builtin(first).parent == NANO else Path(first).stem
    name = re.sub(r"[^\w.-]+", "-", name).strip("-") or "data"  # of 'parts/*.jsonl', org/set:test
    folder, number = Path("runs") / name, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def read(data: str, tokenizer, config: TrainConfig) -> Dataset:
    """The examples of some files; a bar counts the conversations that no earlier run has read."""
    def end(problem: str) -> None:
        refuse(f"{problem} (--skip leaves such rows out; python -m minilora validate {data} names "
               "all of them and can mend some)")

    with progress(None, unit="conversation") as bar:
        return load_examples(data, tokenizer, config.dialect, config.length, config.train_on,
                             warn if config.skip else end, on_row=bar.update)


def answer(model, tokenizer, asked: list, config: TrainConfig, when: str) -> Report:
    """Lets the model answer held-out conversations for real; keeps what it wrote."""
    with progress(len(asked), unit="question") as bar:
        bar.set_description(f"calls {when}")
        report = evaluate(model, tokenizer, ask(asked), config.dialect,
                          progress=lambda done, of: bar.update(done - bar.n))
    say(f"{when}: calls right {report.calls}; no tool needed {report.no_tool}")
    return report


def leave_on_interrupt() -> threading.Event:
    """Set by the first Ctrl-C: finish the step, save, leave. The second leaves at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("stopping after this step (Ctrl-C again: at once)")

    signal.signal(signal.SIGINT, handle)
    return stop


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far, on the GPU or, without one, by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return host_peak()


if __name__ == "__main__":
    raise SystemExit(run_command(main))
