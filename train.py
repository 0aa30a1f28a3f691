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
import contextlib
import dataclasses
import itertools
import json
import math
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
from minilora.estimate import advise_on_memory, peak_bytes
from minilora.evaluate import Report, evaluate
from minilora.files import alone, write_file, write_json
from minilora.hub import add_push_flags, check_push, model_card, push
from minilora.lora import attach, trainable
from minilora.readers import refuse, warn
from minilora.report import (
    append_metrics,
    count,
    draw_curve,
    duration,
    forget_metrics_after,
    is_out_of_memory,
    progress,
    run_command,
    say,
    table,
    visible,
)
from minilora.sources import split_data, would_read
from minilora.state import FREE, latest_state, load_state, made_from, save_state
from minilora.tokenizer import Tokenizer
from minilora.trainer import (
    IN_A_ROW,
    IN_ALL,
    add_dialect,
    find_fault,
    held_out_loss,
    learning_rate,
    make_optimizer,
    not_finite,
    plan_steps,
    prepare,
    some_of,
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
    for data in filter(None, () if flags.resume or not out else (config.data, config.eval_data)):
        if any(would_read(data, out / name) for name in ("metrics.jsonl", "config.json")):
            raise UserError(f"--out {out}: what the run writes there would be read as data, which "
                            f"is {data}; name another folder")
    made = out is None or not out.exists()
    out = out or new_folder(config.data)
    try:
        with alone(out / ".lock", out):
            if (out / "config.json").exists() and not flags.resume:
                raise UserError(f"{out} holds a run already; name another --out, or go on with it: "
                                f"--resume {out}")
            return train(flags, lora, config, out)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error)  # the error itself goes, and with it what its frames hold in memory
    finally:
        with contextlib.suppress(OSError):
            if made:
                out.rmdir()  # nothing is in it, so nothing has come of the run
    raise UserError(advise_on_memory(reason, lora, config, resumed=bool(flags.resume)))


def train(flags: argparse.Namespace, lora: LoraConfig, config: TrainConfig, out: Path) -> None:
    """The run, from the base and the data to what is left behind in `out`."""
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
    files = examples.files()
    if config.eval_data:
        held_out = read(config.eval_data, tokenizer, config)
        files += held_out.files()
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
    state = {"step": 0, "steps": steps, "tokens": 0, "seconds": 0.0,  # of training so far
             "left_out": 0, "in_a_row": 0,  # steps that were not applied: in all, and of late
             "best_step": None, "best_held_out_loss": None, "before": None, "no_tool_before": None,
             "made_from": made_from(lora, config, dtype, tokenizer, files)}
    if flags.resume and latest_state(out / "checkpoints"):
        state |= load_state(out / "checkpoints", model, optimizer, state)
        if steps < state["step"]:
            raise UserError(f"{out} has done {state['step']} steps already; ask for more of them "
                            f"than {steps}, or leave --steps and --epochs out")
        say(f"resumed at step {state['step']} of {steps}" + (
            "" if steps == state["steps"] else
            f", where it was {state['steps']}: the rate of those to come is that of {steps}"))
    else:
        if flags.resume:
            say("no checkpoint yet: the run starts again at step 0")
        if asked:
            report = answer(model, tokenizer, asked, config, "before")
            state |= {"before": report.calls.value, "no_tool_before": report.no_tool.value}
    # Only now is it a run that can be resumed: what ends before this leaves --out free.
    chosen = {**dataclasses.asdict(lora), **dataclasses.asdict(config)}
    write_file(out / "config.json", (json.dumps(chosen, indent=2) + "\n").encode())
    forget_metrics_after(metrics, state["step"])
    state["steps"] = steps

    # --- the loop
    stream = stream_batches(examples, config, skip=state["step"] * config.accumulate,
                            fill=model.compiled)
    look = config.eval_every or max(1, steps // 10)
    stop = leave_on_interrupt()
    start, told = state["step"], False
    warm = time.perf_counter()
    began = warm - state["seconds"]
    with progress(steps, start) as bar:
        for step in range(start, steps):
            lr = learning_rate(step, steps, config)
            done = train_step(model, optimizer, [next(stream) for _ in range(config.accumulate)],
                              lr, config.clip)
            now = time.perf_counter()
            state |= {"step": step + 1, "seconds": now - began,
                      "tokens": state["tokens"] + done.tokens,
                      "in_a_row": 0 if done.applied else state["in_a_row"] + 1,
                      "left_out": state["left_out"] + (not done.applied)}
            record = {"step": step + 1, "loss": done.loss, "grad_norm": done.grad_norm, "lr": lr,
                      "tokens": done.tokens, "trained": done.trained,
                      "seconds": round(now - began, 3)}
            if not done.applied:
                del record["loss"], record["grad_norm"]  # JSON has no word for them
                fault = find_fault(model, examples, config, step)
                numbers = f"loss {done.loss:g}, gradient norm {done.grad_norm:g}"
                record |= {"not_applied": numbers, **dataclasses.asdict(fault)}
                say(visible(f"step {step + 1} is not applied: {numbers}; {fault}"))
            if held_out_batches and ((step + 1) % look == 0 or step + 1 == steps):
                held = held_out_loss(model, held_out_batches)
                say(f"step {step + 1}: loss {done.loss:.4f}, held out {held:.4f}")
                if math.isfinite(held):
                    record["held_out_loss"] = held
                    if (best := state["best_held_out_loss"]) is None or held < best:
                        state |= {"best_step": step + 1, "best_held_out_loss": held}
                else:
                    with torch.no_grad():
                        record["held_out_rows"] = rows = not_finite(model, held_out, config)
                    say(visible(f"note: the held-out loss is not finite: {some_of(rows)}"))
            append_metrics(metrics, record)
            bar.set_postfix_str(f"loss {done.loss:.3f}, "
                                f"{state['tokens'] / state['seconds']:.0f} tokens/s")
            bar.update()
            if step == start:
                warm = now  # the first step also warms up, so the estimate leaves it out
            elif not told and now - warm > 5:
                told = True
                left = (now - warm) / (step - start) * (steps - step - 1)
                say(f"about {duration(left)} to go; {count(peak_bytes(device))}B at most so far")
            if not done.applied and (state["in_a_row"] % IN_A_ROW == 0
                                     or state["left_out"] % IN_ALL == 0
                                     or state["left_out"] == steps):
                saved = save_state(out / "checkpoints", step + 1, model, optimizer, state)
                raise UserError(too_many_left_out(state, saved, out))
            if stop.is_set() or step + 1 == steps or (
                    config.save_every and (step + 1) % config.save_every == 0):
                save_state(out / "checkpoints", step + 1, model, optimizer, state)
            if stop.is_set():
                break
    seconds = time.perf_counter() - began
    signal.signal(signal.SIGINT, signal.default_int_handler)  # no step is left to finish
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # --- what is left behind
    save_adapter(model, tokenizer, out / "adapter", config.model, config.dialect)
    draw_curve(metrics, out / "curve.png")
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
              "no_tool_before": state["no_tool_before"], "no_tool_after": after.no_tool.value,
              "no_tool_after_95": after.no_tool.interval, "no_tool_after_of": after.no_tool.total,
              "steps": steps, "left_out_steps": state["left_out"],
              "best_held_out_loss": state["best_held_out_loss"],
              "best_step": state["best_step"], "conversations": facts["used"],
              "seconds": round(time.perf_counter() - STARTED, 1),
              "train_seconds": round(seconds, 1),
              "tokens_per_second": round(state["tokens"] / seconds, 1) if seconds else None,
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
        rows = [("trained", f"{steps} steps in {duration(seconds)}, "
                            f"{state['tokens'] / seconds:.0f} tokens/s, "
                            f"{count(result['peak_bytes'])}B at most")]
        if state["left_out"]:
            rows += [("left out", f"{state['left_out']} of the steps, whose numbers were not "
                                  f"finite; {metrics} names their rows")]
        if state["best_held_out_loss"] is not None:
            rows += [("held out", f"loss {state['best_held_out_loss']:.4f} at best, after step "
                                  f"{state['best_step']}")]
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
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with "
                        "its settings, data and base, which are checked; of settings only these "
                        "may come with it: " + ", ".join(
                            f"--{name.replace('_', '-')}" for name in sorted(FREE - {"out"})))
    add_push_flags(parser, "the adapter")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args()


def settings(flags: argparse.Namespace) -> tuple[LoraConfig, TrainConfig, Path | None]:
    """The run's settings and its folder, if it is named: from flags, from a file, from the run to
    go on with.
    """
    given = vars(flags).keys() - {"config", "resume", "json", "push", "public"}
    path = flags.config
    if flags.resume:
        fixed = given - (FREE - {"out"})
        if fixed or path:
            names = [name.replace("_", "-") for name in sorted(fixed)] or ["config"]
            raise UserError("--resume takes its settings from the run; leave out "
                            + ", ".join(f"--{name}" for name in names))
        path = Path(flags.resume) / "config.json"
        if not path.exists():
            raise UserError(f"{flags.resume}: no run to go on with (no config.json); start one: "
                            f"--out {flags.resume}")
    elif not path and not given & {"model", "data"}:
        path = NANO / "recipe.json"  # nothing asked for: the built-in job, with its own settings
    chosen = read_settings(path, LoraConfig, TrainConfig) if path else {}
    lora, config = (from_flags(cls, flags, chosen) for cls in (LoraConfig, TrainConfig))
    if flags.resume:
        return lora, config, Path(flags.resume)
    return lora, config, Path(config.out) if config.out else None


def new_folder(data: str) -> Path:
    """Makes runs/NAME, or the first of runs/NAME-2, runs/NAME-3 … that is not there."""
    first = split_data(data)[0][0]
    name = "nano" if builtin(first).parent == NANO else Path(first).stem
    name = re.sub(r"[^\w.-]+", "-", name).strip("-") or "data"  # of 'parts/*.jsonl', org/set:test
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):  # another run may look for one at this moment
            folder.mkdir(parents=True)
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


def too_many_left_out(state: dict, saved: Path, out: Path) -> str:
    """Why the run stops, where its last good weights are, and how to go on."""
    row, good = state["in_a_row"], state["step"] - state["in_a_row"]
    many = f"{row} steps in a row" if row % IN_A_ROW == 0 else f"{state['left_out']} steps in all"
    return (f"{many} had numbers that are not finite and were not applied; {out / 'metrics.jsonl'} "
            f"names their rows. The last good checkpoint is {saved}, with the weights of step "
            f"{good}: --resume {out} goes on after these steps, with the same settings; a new run "
            "may do better with a lower --lr, --dtype float32, or without those rows")


def leave_on_interrupt() -> threading.Event:
    """Set by the first Ctrl-C, or by SIGTERM, with which systems end their jobs: finish the step,
    save, leave. The second leaves at once.
    """
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("stopping after this step (Ctrl-C again: at once)")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


if __name__ == "__main__":
    raise SystemExit(run_command(main))
