#!/usr/bin/env python3
"""Ask a model, and let it call your own Python functions.

    python infer.py --tools my_tools.py "What's the weather in Paris?"
    python infer.py --adapter runs/calls --tools my_tools.py          # a chat, see below
    python infer.py --tools my_tools.py --transcript chat.jsonl       # and keep it as data

The model thinks, calls functions of the file, sees their results and answers. Every public function
with type hints is a tool; its docstring tells the model what it does. Its code runs on this machine
with your rights, so offer only what the model may do. On the screen → is a call, ← its result.
In a chat Ctrl-C ends an answer that is being written, and at the prompt it ends the chat, as Ctrl-D
does.
"""

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from minilora.chat import (
    Conversation,
    MalformedCall,
    Message,
    decode_reply,
    render,
    split_reply,
    stop_ids,
)
from minilora.checkpoint import adapter_base, knows_dialect, open_model
from minilora.config import (
    GenerateConfig,
    Parser,
    TrainConfig,
    UserError,
    add_flags,
    from_flags,
)
from minilora.constrain import Constraint, Vocabulary
from minilora.dialects import DIALECTS
from minilora.files import check_new, current, write_file
from minilora.generate import Held, stream, stream_text
from minilora.jsontext import dump_json
from minilora.model import Gemma
from minilora.readers import openai_row
from minilora.report import colors, run_command, visible
from minilora.tokenizer import Tokenizer
from minilora.tools import (
    BUDGET,
    ROUNDS,
    TIMEOUT,
    Event,
    converse,
    latest,
    load_tools,
    shorten,
    tool_schema,
)
from minilora.weights import placement

SHOWN = 1000  # characters of a call or a result on the screen; --json has all of them
PRINTED = 10_000  # characters of what tools print for one question


def main(argv: list[str] | None = None) -> None:
    flags = parse(argv)
    config = from_flags(GenerateConfig, flags)
    aside, stdin, home = Aside(sys.stderr), sys.stdin, Path.cwd()
    with apart(aside):
        functions = load_tools(flags.tools) if flags.tools else {}
        tools = tuple(tool_schema(function) for function in functions.values())
    with contextlib.chdir(home):  # the file of tools may have left it
        model, tokenizer, trained_on = load(flags)
    dialect = flags.dialect or trained_on
    if tools and not knows_dialect(tokenizer, dialect):
        raise UserError(f"this model has no tokens for {dialect} tool calls; train it with "
                        "train.py and give the run as --adapter")
    if flags.think != "on" and THINK not in DIALECTS[dialect].tokens:
        raise UserError(f"--think {flags.think}: the {dialect} dialect has no token for thinking, "
                        "so it cannot be told from an answer")
    transcript = flags.transcript and home / flags.transcript
    screen = Screen(sys.stdout, flags.json, flags.think, tuple(DIALECTS[dialect].tokens))
    stops = stop_ids(tokenizer, dialect)
    barred = [tokenizer.token_id(THINK)] if flags.think == "off" and tokenizer.knows(THINK) else []
    context = model.config.max_position_embeddings
    room = min(config.max_new, context // 4)  # of it, for a reply
    barred += range(tokenizer.vocab_size, model.embed_tokens.num_embeddings)  # ids without a text
    messages = [Message("system", flags.system)] if flags.system else []
    since, outgrown = len(messages), False  # the first message after it that is still shown
    held = Held()
    vocabulary = Vocabulary(tokenizer) if config.constrained else None

    def prompt_of(messages: list[Message]) -> list[int]:
        conversation = Conversation(tuple(messages), tools, "the conversation")
        return render(conversation, tokenizer, dialect, generate=True).ids

    def fits(messages: list[Message], most: int = context) -> bool:
        return len(prompt_of(messages)) + room <= most

    def reply(messages: list[Message]) -> str:
        """One turn of the model, shown as it is written."""
        nonlocal since, outgrown
        shown, start = latest(messages, fits, since)
        if start > since:  # by a quarter more: else each turn cuts it, and all is read anew
            shown, start = latest(messages, lambda some: fits(some, context * 3 // 4), since)
        prompt, written = prompt_of(shown), []
        if start > since and len(prompt) < context:
            since = start
            if not outgrown:
                screen.show(Event("context", f"the chat has outgrown the model's {context} tokens "
                                  f"and goes on from its latest {len(shown)} messages; from now "
                                  "on the oldest are left out, and "
                                  + ("the system prompt and " if flags.system else "")
                                  + "the tools are kept"))
            outgrown = True
        constraint = vocabulary and Constraint(vocabulary, tools, dialect)
        ids = stream(model, prompt, config, stops, barred, constraint, held)
        screen.write(stream_text(noted(ids, written), tokenizer))
        text, most = decode_reply(written, tokenizer, dialect), context - len(prompt)
        if len(written) == min(config.max_new, most):
            reached = f"the reply has reached {len(written)} tokens and "
            more = ("--max-new allows more" if config.max_new < most else
                    f"the model's context of {context} has no room for more")
            if not has_calls(text, dialect):
                screen.show(Event("cut", f"{reached}may be cut; {more}"))
            elif constraint:  # which has seen to it that the call is whole
                screen.show(Event("cut", f"{reached}had to end its call there, which may hold less "
                                  f"than was meant; {more}"))
        return text

    def ask(question: str) -> None:
        """One question until it is answered; where that fails, it has never been asked."""
        nonlocal since
        before = len(messages), since
        messages.append(Message("user", question))
        try:
            for event in converse(messages, reply, functions, dialect, flags.rounds,
                                  flags.timeout or None, min(BUDGET, context)):
                screen.show(event)
        except (UserError, KeyboardInterrupt):
            del messages[before[0]:]
            since = before[1]
            raise
        finally:
            aside.left = PRINTED

    def row() -> dict:
        """The conversation so far, as data."""
        return openai_row(Conversation(tuple(messages), tools))

    with apart(aside):
        try:
            for question in lines(stdin, aside.out) if flags.prompt is None else [flags.prompt]:
                try:
                    ask(question)
                except UserError as error:
                    if flags.prompt is not None:
                        raise
                    print(f"error: {visible(str(error))} (the question is left out)",
                          file=aside.out)
                    continue
                except KeyboardInterrupt:
                    if flags.prompt is not None or not stdin.isatty():
                        raise
                    screen.show(Event("stopped", "stopped; the question and what came of it are "
                                      "left out"))
                    continue
                if transcript:
                    write_file(transcript, f"{dump_json(row())}\n".encode())
        except KeyboardInterrupt:
            if flags.prompt is not None:
                raise
        if flags.json:
            print(dump_json({"event": "end", **row()}), file=screen.out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="a question (default: a chat, line by line)")
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the adapter's base)")
    parser.add_argument("--adapter", help="run folder or adapter folder, peft's included (default "
                        "without --model: the newest run of plain train.py in runs/)")
    parser.add_argument("--tools", metavar="FILE.py", help="functions that the model may call")
    parser.add_argument("--system", help="what the model is told before the first question")
    parser.add_argument("--dialect", choices=tuple(DIALECTS),
                        help="how calls are written (default: as the model was trained)")
    parser.add_argument("--think", choices=("on", "off", "hidden"), default="on",
                        help="on: what the model thinks is shown, dimmed; hidden: it thinks, and "
                        "the answer alone is shown; off: it cannot think, which is quicker and "
                        "often less right (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS,
                        help="how often it may call and see results before it has to answer "
                        "(default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT,
                        help="seconds that a function may take, 0: any; one that takes longer is "
                        "told to end, and does so unless it sleeps or waits for something, which "
                        "it does to the end (default: %(default)g)")
    parser.add_argument("--transcript", metavar="FILE.jsonl", help="write the conversation there "
                        "after each answer, as a row that train.py --data, validate, show and "
                        "eval read")
    parser.add_argument("--json", action="store_true", help="one JSON object a line for what "
                        "happens; the last one has the whole conversation, as --transcript does")
    add_flags(parser, GenerateConfig)
    add_flags(parser, TrainConfig, only=("dtype", "device"))
    flags = parser.parse_args(argv)
    if flags.prompt is not None and not flags.prompt.strip():
        raise UserError("the prompt is empty; write a question, or leave it out for a chat")
    if flags.rounds < 1:
        raise UserError(f"rounds is {flags.rounds}; expected at least 1")
    if not 0 <= flags.timeout <= threading.TIMEOUT_MAX:
        raise UserError(f"timeout is {flags.timeout:g}; expected seconds, or 0 for any")
    if flags.transcript:
        check_new(flags.transcript, "--transcript")
    return flags


# --- the model ------------------------------------------------------------------------------------

def load(flags: argparse.Namespace) -> tuple[Gemma, Tokenizer, str]:
    """The model and adapter that the flags name, or else the newest run of plain `python train.py`
    (runs/nano, runs/nano-2 …), or else the nano base; and the dialect it speaks.
    """
    source, adapter = flags.model, flags.adapter
    if source is None and adapter is None:
        found = {run: current(run / "adapter") for name in ("nano", "nano-[0-9]*")
                 for run in Path("runs").glob(name) if current(run / "adapter").is_dir()}
        adapter = max(found, key=lambda run: found[run].stat().st_mtime, default=None)
    if source is None:
        source = adapter_base(adapter) if adapter else "nano"
    settings = from_flags(TrainConfig, flags)
    print(f"model {source}" + (f" with the adapter {adapter}" if adapter else ""), file=sys.stderr)
    return open_model(source, adapter, *placement(settings.device, settings.dtype))


# --- the screen -----------------------------------------------------------------------------------

THINK = "<think>"


class Screen:
    """What is shown: thinking dimmed and text as they are written, then each call and its result.

    With `json` nothing but one object for each event, and nothing in it is changed.
    """

    def __init__(self, out: TextIO, as_json: bool, think: str, tags: tuple[str, ...]) -> None:
        self.out, self.json, self.hidden, self.tags = out, as_json, think == "hidden", tags
        self.color = colors(out)

    def say(self, text: str, dim: bool = False, end: str = "\n") -> None:
        text = visible(text)
        text = f"\033[2m{text}\033[0m" if dim and self.color else text
        print(text, end=end, file=self.out, flush=True)

    def write(self, pieces: Iterable[str]) -> None:
        """Shows the pieces of a reply as they come, less the calls in it."""
        part, shown, gap = "text", False, ""
        try:
            for piece in pieces:
                if self.json:
                    continue
                if piece in self.tags:  # a tag is one token and so a piece of its own
                    part = {THINK: "thinking", "</think>": "text"}.get(piece, "call")
                    if shown:
                        self.say("")
                    if piece == THINK and self.hidden:
                        self.say("(thinking, not shown)", dim=True)
                    shown, gap = False, ""
                elif part == "text" or part == "thinking" and not self.hidden:
                    piece = gap + piece if shown else piece.lstrip()
                    body = piece.rstrip()  # the space after it is shown once something follows
                    gap, shown = piece[len(body):], shown or bool(body)
                    if body:
                        self.say(body, dim=part == "thinking", end="")
        finally:  # also where it is interrupted
            if shown:
                self.say("")

    def show(self, event: Event) -> None:
        """Shows an event. Thinking and text are on the screen already."""
        if self.json:
            value = {"event": event.kind, "text": event.text}
            if event.call:
                value["call"] = {"name": event.call.name, "arguments": event.call.arguments}
            if not (self.hidden and event.kind == "thinking"):
                print(dump_json(value), file=self.out, flush=True)
        elif event.kind == "call":
            self.say(f"→ {shorten(event.text, SHOWN)}")
        elif event.kind == "result":
            self.say(f"← {shorten(event.text, SHOWN)}", dim=True)
        elif event.kind == "malformed":
            self.say(f"✗ the call could not be read: {event.text}")
        elif event.kind == "answer" and not event.text:
            self.say("(the model ended its turn without a word)")
        elif event.kind in ("limit", "context", "cut", "stopped"):
            self.say(f"({event.text})", dim=event.kind != "limit")


class Aside:
    """Where tools print while the chat goes on: on `out`, whatever they do.

    They cannot close it, a terminal obeys nothing of it, and of what they print for one question,
    or when their file is imported, the first `PRINTED` characters are shown. Else it is as `out`
    is.
    """

    def __init__(self, out: TextIO) -> None:
        self.out, self.left = out, PRINTED

    def write(self, text: str) -> int:
        if self.left:
            self.out.write(visible(text[:self.left].replace("\r", "\n")))
            self.left = max(0, self.left - len(text))
            if not self.left:
                self.out.write("\n(tools print more than is shown)\n")
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> object:
        return getattr(self.out, name)


@contextlib.contextmanager
def apart(aside: Aside) -> Iterator[None]:
    """Where a tool's code may run: what it prints is not the model's and goes `aside`, and it finds
    nothing to read, for the lines of the chat are not its own.
    """
    stdin = sys.stdin
    with (open(os.devnull) as sys.stdin, contextlib.redirect_stdout(aside),
          contextlib.redirect_stderr(aside)):
        try:
            yield
        finally:
            sys.stdin, aside.left = stdin, PRINTED


def noted(ids: Iterable[int], written: list[int]) -> Iterator[int]:
    """`ids` as they come, each also put into `written`."""
    for new in ids:
        written.append(new)
        yield new


def has_calls(text: str, dialect: str) -> bool:
    """Whether a reply ends in calls that are whole."""
    try:
        return bool(split_reply(text, dialect).tool_calls)
    except MalformedCall:
        return False


def lines(stdin: TextIO, out: TextIO) -> Iterator[str]:
    """The lines of a chat, from a person, who is asked for each on `out`, or from a pipe, until
    there are no more, or Ctrl-C.
    """
    at_prompt = stdin.isatty()
    while True:
        try:
            if at_prompt:
                print("> ", end="", file=out, flush=True)
            line = stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line and at_prompt:
            print(file=out)
        if not line:
            return
        if line.strip():
            yield line.removesuffix("\n")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
