"""How fast the nano base learns to call, by mask, rank and learning rate: a table and a picture.

    python -m minilora.nano.learning --out runs/learning

Each run is the recipe with one thing changed. It answers the held-out questions for real a few
times on its way; what it got right is drawn over the steps. The questions come from a seed of their
own, so that the shipped ones, by which the recipe is judged, choose nothing.
"""

import argparse
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch

from minilora.bfcl import ask
from minilora.cache import Dataset, load_examples
from minilora.config import NANO, LoraConfig, Parser, TrainConfig, from_flags, read_settings
from minilora.evaluate import Share, evaluate
from minilora.files import write_json
from minilora.lora import attach
from minilora.nano.make import write_data
from minilora.readers import read_conversations, refuse
from minilora.report import progress, run_command, say
from minilora.tokenizer import Tokenizer
from minilora.trainer import (
    add_dialect,
    learning_rate,
    make_optimizer,
    stream_batches,
    train_step,
)
from minilora.weights import load_model

SEED = 2  # of the questions
LOOKS = 6  # at accuracy, in a run


def runs(lora: LoraConfig, config: TrainConfig) -> dict[str, tuple[LoraConfig, TrainConfig]]:
    """What is compared: the recipe, and the recipe with one thing changed."""
    scale = lora.alpha / lora.rank
    return {
        f"recipe: rank {lora.rank}, lr {config.lr:g}, assistant": (lora, config),
        "loss on tool_call alone, no chat without": (lora, replace(config, train_on="tool_call")),
        "loss on think, tool_call, end": (lora, replace(config, train_on="think,tool_call,end")),
        **{f"rank {rank}": (replace(lora, rank=rank, alpha=scale * rank), config)
           for rank in (4, 16)},
        **{f"lr {rate:g}": (lora, replace(config, lr=rate))
           for rate in (config.lr / 4, config.lr * 2)},
    }


def learn(lora: LoraConfig, config: TrainConfig, questions: str) -> list[dict]:
    """Trains on the nano data, on one core; a point for each look on the way.

    A point: the step, and [right, of how many] of `calls` and of `no_tool` answers.
    """
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(config.model, torch.float32), Tokenizer.load(config.model)
    attach(model, lora, config.seed)
    add_dialect(model, tokenizer, config.dialect, config.new_tokens)
    examples = training_data(config, tokenizer)
    asked = ask(read_conversations(questions))
    optimizer, stream = make_optimizer(model, config), stream_batches(examples, config)
    looks = {round(config.steps * look / LOOKS) for look in range(1, LOOKS + 1)}
    points = []
    for step in range(config.steps):
        batches = [next(stream) for _ in range(config.accumulate)]
        train_step(model, optimizer, batches, learning_rate(step, config.steps, config),
                   config.clip)
        if step + 1 in looks:
            report = evaluate(model, tokenizer, asked, config.dialect)
            points.append({"step": step + 1, "calls": _counts(report.calls),
                           "no_tool": _counts(report.no_tool)})
    return points


def training_data(config: TrainConfig, tokenizer: Tokenizer) -> Dataset:
    """The examples of a run; chats of which its mask trains nothing are left out."""
    return load_examples(config.data, tokenizer, config.dialect, config.length, config.train_on,
                         on_problem=_leave_out)


def _leave_out(problem: str) -> None:
    """A mask of calls alone leaves nothing to train of a chat without one."""
    if "nothing to train" not in problem:
        refuse(problem)


def _counts(share: Share) -> list[int]:
    return [share.right, share.total]


def markdown(curves: dict[str, list[dict]]) -> str:
    """The runs as a table: calls right at each look, and at the end no-tool answers."""
    steps = [point["step"] for point in next(iter(curves.values()))]
    lines = ["| the recipe with | " + " | ".join(f"step {step}" for step in steps)
             + " | no tool needed |", "| --- |" + " --- |" * (len(steps) + 1)]
    for name, points in curves.items():
        shares = [point["calls"] for point in points] + [points[-1]["no_tool"]]
        lines.append(f"| {name} | " + " | ".join(f"{right / total:.2f}" if total else "none asked"
                                                 for right, total in shares) + " |")
    return "\n".join(lines)


def draw(curves: dict[str, list[dict]], picture: Path) -> bool:
    """Accuracy over steps, a line a run, as a PNG. False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        axes.plot([point["step"] for point in points],
                  [point["calls"][0] / max(1, point["calls"][1]) for point in points],
                  "o-", linewidth=3 if number == 0 else 1.5, markersize=4, label=name)
    figure.suptitle("Tool calls learned by the nano base, on names and values it never saw")
    axes.set(xlabel="optimizer step", ylabel="calls right (name and every argument)", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(picture, dpi=100)
    return True


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--steps", type=int, help="steps of a run (default: the recipe's)")
    parser.add_argument("--questions", type=int, default=240, help="held-out questions to answer")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    flags = parser.parse_args()
    settings = read_settings(NANO / "recipe.json", LoraConfig, TrainConfig)
    lora, config = (from_flags(cls, argparse.Namespace(), settings)
                    for cls in (LoraConfig, TrainConfig))
    config = replace(config, steps=flags.steps or config.steps)
    flags.out.mkdir(parents=True, exist_ok=True)
    compared = runs(lora, config)
    # Processes of one thread each do more in the same time than one of many threads.
    spawned = multiprocessing.get_context("spawn")
    with (tempfile.TemporaryDirectory() as folder, progress(len(compared), unit="run") as bar,
          ProcessPoolExecutor(flags.workers, spawned) as pool):
        write_data(Path(folder), SEED, 0, flags.questions)
        running = {pool.submit(learn, *pair, f"{folder}/held_out.jsonl"): name
                   for name, pair in compared.items()}
        curves = {}
        for done in as_completed(running):
            if done.exception():
                pool.shutdown(cancel_futures=True)
            curves[running[done]] = done.result()
            write_json(flags.out / "learning.json",
                       {"questions": flags.questions,
                        "curves": {name: curves[name] for name in compared if name in curves}})
            bar.update()
        curves = {name: curves[name] for name in compared}
    if not draw(curves, flags.out / "learning.png"):
        say("note: learning.png is not drawn: matplotlib is missing (pip install matplotlib)")
    print(markdown(curves))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
