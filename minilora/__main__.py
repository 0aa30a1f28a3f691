"""The smaller commands: look at data, measure tool calls, merge.

    python -m minilora validate DATA              every bad row, counts, lengths, cost of a run
    python -m minilora validate DATA --fix OUT.jsonl        and a mended copy
    python -m minilora show DATA --row 3          one conversation, tokens coloured by kind
    python -m minilora show DATA --html page.html           the same, for a browser
    python -m minilora eval --adapter RUN --data DATA       tool-call accuracy, decoded for real
        --before             beside the base's, with a test of the difference
    python -m minilora merge --adapter RUN --out FOLDER     the whole model in the hub's layout
        --check DATA         read it again and compare its logits on conversations
        --extended-base      or the base with the new rows in place, and an adapter without them
    python -m minilora bench train MODEL BATCHES            what this machine gives; also generate,
                                                            load, merge
"""

import argparse
import bisect
import itertools
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from minilora.bench import add_bench_commands
from minilora.bfcl import Question, read_questions
from minilora.check import check_data
from minilora.checkpoint import (
    adapter_base,
    compare_logits,
    export_extended,
    export_merged,
    knows_dialect,
    open_model,
)
from minilora.config import (
    GenerateConfig,
    LoraConfig,
    Parser,
    TrainConfig,
    UserError,
    add_flags,
    from_flags,
)
from minilora.data import Example, make_examples
from minilora.dialects import DIALECTS
from minilora.estimate import expect
from minilora.evaluate import BATCH_TOKENS, Report, Share, changes, evaluate
from minilora.files import check_new, write_file
from minilora.hub import add_push_flags, check_push, model_card, push
from minilora.lora import adapted
from minilora.model import Gemma
from minilora.readers import Row, iterate_rows, read_conversations, refuse, warn
from minilora.report import colors, count, duration, progress, run_command, say, table, visible
from minilora.tokenizer import Tokenizer
from minilora.trainer import add_dialect, plan_steps
from minilora.view import MOST, color_legend, color_tokens, heading, html_page, list_tokens
from minilora.weights import locate, placement, read_config


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m minilora", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("validate", help="check data, mend it, say what a run on it needs")
    check.add_argument("--fix", metavar="OUT.jsonl", help="write a copy in OpenAI's layout of all "
                       "rows that can be used, after mending what can be mended without changing "
                       "what is meant; every row that is mended or left out is named")
    add_flags(check, TrainConfig, only=("batch", "accumulate", "steps", "epochs", "pack", "dtype",
                                        "device", "recompute", "eval_share", "seed"))
    add_flags(check, LoraConfig, only=("rank", "targets", "dora"))
    check.set_defaults(run=validate)
    look = commands.add_parser(
        "show", help="show the tokens of conversations by kind", description="Shows conversations "
        "exactly as the model reads them in training: every token, coloured by what it is part of "
        "(prompt, think, tool_call, tool_response, answer, end), and underlined where it carries "
        "loss, that is, where the model is trained to write it. In front of training, this is how "
        "to check that it will learn what it should.")
    look.add_argument("--row", metavar="ROWS", help="which conversations, counted from 1: 3, 1-20 "
                      "or all (default: 1; with --html 1-20)")
    look.add_argument("--tokens", action="store_true", help="one token a line, with its id, kind "
                      "and whether it carries loss")
    look.add_argument("--html", metavar="FILE.html", help="write a page for a browser: one file "
                      "that loads nothing, boxes to show and hide kinds, the pointer on a token "
                      "tells its id")
    look.set_defaults(run=show)
    for command in (check, look):
        command.add_argument("data", metavar="DATA", help="files, folders, globs or hub "
                             "datasets (owner/name:split), with commas between")
        add_flags(command, TrainConfig, only=("model", "dialect", "length", "train_on"))

    measure = commands.add_parser("eval", help="answer conversations and compare the tool calls")
    add_flags(measure, TrainConfig, only=("data",))
    add_flags(measure, GenerateConfig, only=("max_new", "constrained"))
    measure.add_argument("--answers", default="", metavar="FILE", help="accepted answers to the "
                         "leaderboard's questions, where they are not beside them")
    measure.add_argument("--turns", choices=("first", "all"), default="first", help="which "
                         "assistant turns of a conversation to ask for (default: first)")
    measure.add_argument("--before", action="store_true", help="also measure the base without the "
                         "adapter, and test the difference")
    measure.add_argument("--cases", metavar="FILE", help="write every case with what was expected "
                         "and what came, as JSON Lines")
    measure.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, metavar="N",
                         help=f"tokens in memory at once (default: {BATCH_TOKENS})")
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
    add_bench_commands(commands.add_parser("bench", help="time training, decoding, loading and "
                                           "merging; prints JSON"))
    flags = parser.parse_args(argv)
    flags.run(flags)


def validate(flags: argparse.Namespace) -> None:
    """Prints every bad row, what the others hold and what a run on them needs; --fix mends.

    Fails where a row cannot be used, with --fix where one cannot be mended.
    """
    config, lora = from_flags(TrainConfig, flags), from_flags(LoraConfig, flags)
    tokenizer = Tokenizer.load(config.model)
    known = knows_dialect(tokenizer, config.dialect)
    tokenizer.add_tokens(DIALECTS[config.dialect].tokens)
    facts, examples = check_data(flags.data, tokenizer, config, flags.fix,
                                 lambda line: None if flags.json else print(visible(line)))
    facts["run"] = plan = {}
    if not any(example.weight for example in examples):
        plan["unknown"] = "no conversation is left to train on"
    else:
        try:
            shape = read_config(locate(config.model, ["config.json"]))
        except UserError as error:
            plan["unknown"] = str(error)
        else:
            device, dtype = placement(config.device, config.dtype)
            new = 0 if known else len(DIALECTS[config.dialect].tokens)
            needs = expect(shape, lora, config, new, facts["trained"] / facts["tokens"], device,
                           dtype)
            steps = plan_steps(examples, config)
            plan |= {"steps": steps, "seconds": round(steps * needs.seconds_per_step, 1),
                     "device": str(device), **asdict(needs)}
    if flags.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print(table(described(facts, config)))
    if bad := len(facts["problems"]):
        raise UserError(f"{bad} rows cannot be used" + (f" and are not in {flags.fix}" if flags.fix
                        else "; mend them, or see what --fix OUT.jsonl can do"))


def described(facts: dict, config: TrainConfig) -> list[tuple[str, str]]:
    """The facts of `validate` as lines for a person."""
    lengths, bars, plan = facts["length"], facts["histogram"], facts["run"]
    most = max((number for _, number in bars), default=1)
    lines = [
        ("conversations", f"{facts['conversations']} read, {facts['unread']} not readable, "
                          f"{facts['refused']} not trainable"),
        ("turns", ", ".join(f"{number} {role}" for role, number in facts["turns"].items())),
        ("calls", f"{facts['calls']} in {facts['with_calls']} conversations; "
                  f"{facts['tools_called']} tools called, {facts['tools_offered']} offered"),
        *(("note", f"{file}: {number} rows: {note}") for file, notes in facts["notes"].items()
          for note, number in notes.items()),
        ("lengths", f"{lengths['min']} to {lengths['max']} tokens, half under "
                    f"{lengths['median']}, 95 % under {lengths['p95']}"),
        *((f"  to {edge}", f"{'█' * max(number > 0, round(40 * number / most))} {number}"
           + (" (some longer than --length)" if edge > config.length and number else ""))
          for edge, number in bars),
        ("to fit", f"{facts['split']} split and {facts['cut']} cut at --length {config.length}, "
                   f"{count(facts['cut_trained'])} trained tokens lost"),
        ("tokens", f"{count(facts['tokens'])}, {share(facts)} carry loss"),
        *((f"  {name}", f"{count(kind['tokens'])}, {share(kind)} carry loss")
          for name, kind in facts["kinds"].items() if kind["tokens"]),
    ]
    if "steps" in plan:
        body = plan["weight_bytes"], plan["activation_bytes"]
        lines += [
            ("steps", f"{plan['steps']} of {config.batch} × {config.length} tokens"
                      + (f" × {config.accumulate}" if config.accumulate > 1 else "")
                      + f", {config.eval_share:.0%} of the conversations held out"),
            ("memory", f"about {count(sum(body))}B: {count(body[0])}B for weights, adapters and "
                       f"optimizer, {count(body[1])}B for activations"
                       + ("" if config.recompute != "none" else " (less with --recompute)")),
            ("time", f"about {duration(plan['seconds'])} on {plan['device']}, from a short trial "
                     "of one layer of the model's shape; looks at held-out data not counted"),
        ]
    else:
        lines.append(("run", plan["unknown"]))
    if "fixed" in facts:
        lines.append(("fixed", f"{facts['used']} conversations are in {facts['fixed']}, "
                               f"{len(facts['mended'])} things were mended"))
        if facts["weights"] != [1]:
            one = f"name it {facts['fixed']}@{facts['weights'][0]:g}"
            lines.append(("weights", "none are in a copy: " + (
                one if len(facts["weights"]) == 1 else "mend files of different weights one by "
                "one, and name each copy with its own, as in copy.jsonl@0.5")))
    return [(name, visible(text)) for name, text in lines]


def share(tokens: dict) -> str:
    """How many of some tokens are trained."""
    return f"{tokens['trained'] / max(1, tokens['tokens']):.0%}"


def show(flags: argparse.Namespace) -> None:
    """Prints conversations as the model sees them, or writes them as a page."""
    config = from_flags(TrainConfig, flags)
    if flags.html and not flags.html.endswith(".html"):
        raise UserError(f"--html {flags.html}: a page's name ends in .html")
    rows = choose_rows(flags.data, flags.row or ("1-20" if flags.html else "1"))
    on_problem = warn if len(rows) > 1 else refuse
    for row in rows:
        if row.conversation is None:
            on_problem(f"{row.where}: {row.problem}")
        for note in row.notes:
            warn(f"{row.where} {note}")
    tokenizer = dialect_tokenizer(config)
    examples = make_examples(filter(None, (row.conversation for row in rows)), tokenizer,
                             config.dialect, config.length, config.train_on, on_problem)
    if not examples:
        raise UserError(f"{flags.data}: none of these rows can be shown")
    color = colors(sys.stdout)
    if flags.html:
        sizes = list(itertools.accumulate(map(len, examples)))
        most = max(1, bisect.bisect_right(sizes, MOST))
        if most < len(examples):
            warn(f"a page holds {MOST:,} tokens, so it ends before {examples[most].source}; "
                 "--row shows others")
        about = (f"As the model reads it in training: tokens of {config.model}, the "
                 f"{config.dialect} dialect, loss on {config.train_on} (--train-on).")
        page = html_page(examples[:most], tokenizer, flags.data, about)
        write_file(Path(flags.html), page.encode())
        say(f"rows {examples[0].source} to {examples[most - 1].source} are in {flags.html}; "
            "open it in a browser")
        return
    if not flags.json and not flags.tokens:
        print(color_legend(color))
    for example in examples:
        if flags.json:
            print(json.dumps({"source": example.source, "ids": example.ids.tolist(),
                              "kinds": example.kinds.tolist(), "labels": example.labels.tolist()}))
            continue
        print(f"\n{visible(heading(example))}")
        print(list_tokens(example, tokenizer) if flags.tokens else
              "\n" + color_tokens(example, tokenizer, color))


def choose_rows(data: str, chosen: str) -> list[Row]:
    """The rows that --row names: 3, 1-20 (or as many as there are) or all. Reads no others."""
    first, dash, last = ("1", "-", "9" * 18) if chosen == "all" else chosen.partition("-")
    last = last if dash else first
    if not (all(re.fullmatch(r"\d{1,18}", text, re.ASCII) for text in (first, last))
            and 1 <= int(first) <= int(last)):
        raise UserError(f"--row is {chosen[:80]}; give one row (3), some (1-20) or all")
    rows = list(itertools.islice(iterate_rows(data), int(first) - 1, int(last)))
    if not rows:
        raise UserError(f"--row is {chosen}; {data} has fewer rows")
    return rows


def measure_calls(flags: argparse.Namespace) -> None:
    """Prints tool-call accuracy by category; with --before, the base's beside it."""
    if flags.before and not flags.adapter:
        raise UserError("--before needs --adapter: it is the base without that adapter")
    if flags.batch_tokens < 1:
        raise UserError(f"--batch-tokens is {flags.batch_tokens}; expected at least 1")
    if flags.cases:
        check_new(flags.cases, "--cases")
    config = from_flags(TrainConfig, flags)
    questions = read_questions(config.data, flags.answers, flags.turns == "all")
    model, tokenizer, dialect, base = load(flags)
    if not knows_dialect(tokenizer, dialect):
        if flags.adapter:
            raise UserError(f"{flags.adapter} has no tokens for {dialect} tool calls; leave "
                            "--dialect out")
        warn(f"{base} has no tokens for {dialect} tool calls, so they get rows as training starts "
             "with")
        add_dialect(model, tokenizer, dialect, "append")
    after = answer(model, tokenizer, dialect, questions, flags)
    reports = {"after": after}
    if flags.before:
        del model  # one at a time in memory
        model, tokenizer, _ = open_model(base, None, *placement(config.device, config.dtype))
        add_dialect(model, tokenizer, dialect, "append")  # as training starts
        reports = {"before": answer(model, tokenizer, dialect, questions, flags), "after": after}
    rows = [{"when": when, **case.row()} if flags.before else case.row()
            for cases in zip(*(report.cases for report in reports.values()), strict=True)
            for when, case in zip(reports, cases, strict=True)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if flags.cases:
        write_file(Path(flags.cases), "".join(f"{line}\n" for line in lines).encode())
    changed = changes(reports["before"], after) if flags.before else {}
    if flags.json:
        sums = {when: report.summary() for when, report in reports.items()}
        sums["change"] = {name: {**asdict(change), "p": change.p}
                          for name, change in changed.items()}
        print("\n".join([*lines, json.dumps(sums if flags.before else sums["after"])]))
        return

    def line(name: str, shares: list[Share]) -> tuple[str, str]:
        first = f"{shares[0].value:.3f} → " if flags.before else ""
        change = f"; {changed[name]}" if flags.before else ""
        return name, f"{first}{shares[-1]}{change}"

    print(table([
        *(line(name, [report.categories[name] for report in reports.values()])
          for name in after.categories),
        line("all", [report.total for report in reports.values()]),
        ("mean", " → ".join("{:.3f} (95 % {:.3f} to {:.3f})".format(
            report.mean, *report.mean_interval) for report in reports.values())
         + " over the categories, each counting the same"),
        *((f"wrong {when}".removesuffix(" after"), ", ".join(
            f"{number} {kind}" for kind, number in report.problems.items()) or "none")
          for when, report in reports.items())]))


def answer(model: Gemma, tokenizer: Tokenizer, dialect: str, questions: list[Question],
           flags: argparse.Namespace) -> Report:
    """What the model answers, with a progress bar."""
    with progress(len(questions), unit="question") as bar:
        return evaluate(model, tokenizer, questions, dialect, from_flags(GenerateConfig, flags),
                        batch_tokens=flags.batch_tokens,
                        progress=lambda done, of: bar.update(done - bar.n))


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
        examples = make_examples(read_conversations(flags.check), tokenizer, dialect,
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
