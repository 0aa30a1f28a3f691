"""The smaller commands: look at data, measure tool calls, merge.

    python -m minilora validate DATA              every bad row, then counts and lengths
    python -m minilora show DATA --row 3          one conversation, tokens coloured by kind
    python -m minilora eval --adapter RUN --data DATA       tool-call accuracy, decoded for real
    python -m minilora merge --adapter RUN --out FOLDER     the whole model in the hub's layout
        --check DATA         read it again and compare its logits on conversations
        --extended-base      or the base with the new rows in place, and an adapter without them
"""

import argparse
import json
import sys
from pathlib import Path

from minilora.chat import DIALECTS
from minilora.checkpoint import (
    adapter_base,
    compare_logits,
    export_extended,
    export_merged,
    open_model,
)
from minilora.config import GenerateConfig, TrainConfig, UserError, add_flags, from_flags
from minilora.data import Example, make_example, make_examples, summary
from minilora.evaluate import evaluate
from minilora.files import write_file
from minilora.hub import add_push_flags, check_push, model_card, push
from minilora.lora import adapted
from minilora.model import Gemma
from minilora.readers import read_conversations, warn
from minilora.report import color_legend, color_tokens, count, progress, run_command, say, table
from minilora.tokenizer import Tokenizer
from minilora.weights import placement


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minilora", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("validate", help="check data and count its tokens")
    check.set_defaults(run=validate)
    look = commands.add_parser("show", help="show a conversation's tokens by kind")
    look.add_argument("--row", type=int, default=1, help="which conversation, from 1")
    look.set_defaults(run=show)
    for command in (check, look):
        command.add_argument("data", metavar="DATA", help="JSON or JSON Lines")
        add_flags(command, TrainConfig, only=("model", "dialect", "length", "train_on"))

    measure = commands.add_parser("eval", help="answer conversations and compare the tool calls")
    add_flags(measure, TrainConfig, only=("data",))
    add_flags(measure, GenerateConfig, only=("max_new",))
    measure.add_argument("--cases", action="store_true", help="print every case, not only the sums")
    measure.set_defaults(run=measure_calls)
    fold = commands.add_parser("merge", help="fold an adapter into its base and write the model")
    fold.add_argument("--out", required=True, help="folder to write")
    fold.add_argument("--extended-base", action="store_true", help="write base/ with the new rows "
                      "in place and adapter/ without them, for servers that take only linears "
                      "from an adapter")
    fold.add_argument("--check", metavar="DATA", help="load what was written and compare its "
                      "logits with the unmerged model's on these conversations (takes the memory "
                      "of both)")
    add_flags(fold, TrainConfig, only=("length",))
    add_push_flags(fold, "the model")
    fold.set_defaults(run=merge_adapter)
    for command in (measure, fold):
        command.add_argument("--adapter", help="run folder or adapter folder, peft's included",
                             required=command is fold)
        command.add_argument("--dialect", choices=tuple(DIALECTS), default=argparse.SUPPRESS,
                             help="how calls are written (default: as the model was trained)")
        add_flags(command, TrainConfig, only=("model", "dtype", "device"))

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="one JSON object a line")
    flags = parser.parse_args(argv)
    flags.run(flags)


def validate(flags: argparse.Namespace) -> None:
    """Prints every row that cannot be used, then what the others hold. Fails if there is one."""
    config = from_flags(TrainConfig, flags)
    problems: list[str] = []
    conversations = read_conversations(flags.data, problems.append)
    unread = len(problems)
    tokenizer = dialect_tokenizer(config)
    examples = make_examples(conversations, tokenizer, config.dialect, config.length,
                             config.train_on, problems.append)
    facts = {**summary(conversations, examples), "unread": unread, "problems": problems}
    if flags.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        for problem in problems:
            print(problem)
        lengths, kinds = facts["length"], facts["kinds"].items()
        print(table([
            ("conversations", f"{facts['conversations']} read, {unread} not readable, "
                              f"{facts['refused']} not trainable"),
            ("calls", f"{facts['calls']} in {facts['with_calls']} conversations; "
                      f"{facts['tools_called']} tools called, {facts['tools_offered']} offered"),
            ("lengths", f"{lengths['min']} to {lengths['max']} tokens, half under "
                        f"{lengths['median']}, 95 % under {lengths['p95']}"),
            ("tokens", f"{count(facts['tokens'])}, of which {count(facts['trained'])} carry loss"),
            *((f"  {name}", f"{kind['tokens']} tokens, {kind['trained']} carry loss")
              for name, kind in kinds),
            ("cut", f"{facts['cut']} to fit {config.length} tokens"),
        ]))
    if problems:
        raise UserError(f"{len(problems)} rows cannot be used; mend them or leave them out")


def show(flags: argparse.Namespace) -> None:
    """Prints one conversation as the model sees it."""
    config = from_flags(TrainConfig, flags)
    conversations = read_conversations(flags.data)
    if not 1 <= flags.row <= len(conversations):
        raise UserError(f"--row is {flags.row}; {flags.data} has rows 1 to {len(conversations)}")
    tokenizer = dialect_tokenizer(config)
    example = make_example(conversations[flags.row - 1], tokenizer, config.dialect, config.length,
                           config.train_on)
    if flags.json:
        print(json.dumps({"source": example.source, "ids": example.ids.tolist(),
                          "kinds": example.kinds.tolist(), "labels": example.labels.tolist()}))
        return
    color = sys.stdout.isatty()
    print(f"{example.source}: {len(example)} tokens\n{color_legend(color)}\n")
    print(color_tokens(example, tokenizer, color))


def measure_calls(flags: argparse.Namespace) -> None:
    """Prints tool-call accuracy on conversations, every case with --cases or --json."""
    config = from_flags(TrainConfig, flags)
    model, tokenizer, dialect, _ = load(flags)
    conversations = read_conversations(config.data.split(","))
    with progress(len(conversations), unit="question") as bar:
        report = evaluate(model, tokenizer, conversations, dialect,
                          from_flags(GenerateConfig, flags),
                          progress=lambda done, of: bar.update(done - bar.n))
    for case in report.cases if flags.cases or flags.json else ():
        expected = [{"name": call.name, "arguments": call.arguments} for call in case.expected]
        if flags.json:
            print(json.dumps({"source": case.source, "expected": expected, "got": case.text,
                              "ok": case.ok, "reason": case.reason}, ensure_ascii=False))
        else:
            print(f"{'right' if case.ok else 'WRONG'}  {case.source}  {case.reason}")
    if flags.json:
        print(json.dumps({"calls": report.calls.value, "calls_95": report.calls.interval,
                          "no_tool": report.no_tool.value,
                          "no_tool_95": report.no_tool.interval, "cases": len(report.cases)}))
    else:
        print(table([("calls right", f"{report.calls}"),
                     ("no tool needed", f"{report.no_tool} answered without one")]))


def merge_adapter(flags: argparse.Namespace) -> None:
    """Writes W + BA, and the rows of new tokens in place, as a model that transformers loads.

    Or, with --extended-base, that base and an adapter for it. Then compares and uploads, if asked.
    """
    if flags.push and flags.extended_base:
        raise UserError("--push takes one model, --extended-base writes two folders; push the "
                        "merged model instead")
    check_push(flags)
    out, config = Path(flags.out), from_flags(TrainConfig, flags)
    model, tokenizer, dialect, base = load(flags)
    if not adapted(model):
        raise UserError(f"{flags.adapter}: holds no LoRA adapter to merge")
    if flags.check:
        examples = make_examples(read_conversations(flags.check.split(",")), tokenizer, dialect,
                                 config.length, on_problem=warn)
        if not examples:
            raise UserError(f"{flags.check}: no conversation to compare on is left")
    if flags.extended_base:
        export_extended(model, tokenizer, base, out, dialect)
        say(f"{base} with the new rows of {flags.adapter} is in {out / 'base'}, its adapter in "
            f"{out / 'adapter'}")
    else:
        card = model_card("transformers", base, dialect, flags.adapter)
        export_merged(model, tokenizer, base, out, dialect)
        write_file(out / "README.md", card.encode())
        say(f"{base} with {flags.adapter} is merged in {out}")
    facts = {"out": flags.out, "base": base}
    if flags.check:
        written = (None, out / "adapter") if flags.extended_base else (out, None)
        facts["check"] = check = compare(model, written, examples, config)
        if not flags.json:
            within = {None: "", True: "; within 1e-5", False: "; NOT within 1e-5"}
            print(table([
                ("compared", f"{check['tokens']} tokens of {len(examples)} conversations, in "
                             f"{check['dtype']}"),
                ("likeliest token", f"the same for {check['argmax_agreement']:.4%}"),
                ("largest change", f"{check['largest_change']:.3g}, {check['largest_share']:.2g} "
                                   f"of the largest logit{within[check['within_1e-5']]}")]))
    if flags.json:
        print(json.dumps(facts), flush=True)
    if flags.push:
        say(f"pushed to {push(out, flags.push, flags.public)}")


def compare(model: Gemma, written: tuple[Path | None, Path | None],
            examples: list[Example], config: TrainConfig) -> dict:
    """How the model that was written differs from `model`; `written` as `open_model` takes it."""
    again, _, _ = open_model(*written, *placement(config.device, config.dtype))
    with progress(len(examples), unit="conversation") as bar:
        found = compare_logits(model, again, examples, bar.update)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    share = found["largest_change"] / found["largest_logit"]
    return {**found, "dtype": dtype, "largest_share": share,
            "within_1e-5": share <= 1e-5 if dtype == "float32" else None}


def load(flags: argparse.Namespace) -> tuple[Gemma, Tokenizer, str, str]:
    """The model and tokenizer that the flags name, their dialect and the base's name."""
    config = from_flags(TrainConfig, flags)
    given = "model" in flags or not flags.adapter
    base = config.model if given else adapter_base(flags.adapter)
    model, tokenizer, spoken = open_model(base, flags.adapter,
                                          *placement(config.device, config.dtype))
    return model, tokenizer, getattr(flags, "dialect", spoken), base


def dialect_tokenizer(config: TrainConfig) -> Tokenizer:
    """The model's tokenizer with the dialect's tokens, as training would add them."""
    tokenizer = Tokenizer.load(config.model)
    tokenizer.add_tokens(DIALECTS[config.dialect].tokens)
    return tokenizer


if __name__ == "__main__":
    raise SystemExit(run_command(main))
