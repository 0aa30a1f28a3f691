#!/usr/bin/env python3
"""Ask a model, and let it call your own Python functions.

    python infer.py --tools my_tools.py "What's the weather in Paris?"
    python infer.py --adapter runs/calls --tools my_tools.py          # a chat; Ctrl-D ends it

The model thinks, calls functions of the file, sees their results and answers. Every public function
with type hints is a tool; its docstring tells the model what it does. Its code runs on this machine
with your rights, so offer only what the model may do.
"""

import argparse
import dataclasses
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from minilora.chat import DIALECTS, Conversation, Message, dump_json, render
from minilora.checkpoint import adapter_base, knows_dialect, open_model
from minilora.config import GenerateConfig, TrainConfig, UserError, add_flags, from_flags
from minilora.generate import stream, stream_text
from minilora.model import Gemma
from minilora.report import run_command
from minilora.tokenizer import Tokenizer
from minilora.tools import ROUNDS, TIMEOUT, Event, converse, load_tools, tool_schema
from minilora.weights import placement


def main(argv: list[str] | None = None) -> None:
    flags = parse(argv)
    config = from_flags(GenerateConfig, flags)
    functions = load_tools(flags.tools) if flags.tools else {}
    tools = tuple(tool_schema(function) for function in functions.values())
    model, tokenizer, trained_on = load(flags)
    dialect = flags.dialect or trained_on
    if tools and not knows_dialect(tokenizer, dialect):
        raise UserError(f"this model has no tokens for {dialect} tool calls; train it with "
                        "train.py and give the run as --adapter")
    screen = Screen(flags.json, tuple(DIALECTS[dialect].tokens))

    def reply(messages: list[Message]) -> str:
        """One turn of the model, shown as it is written."""
        conversation = Conversation(tuple(messages), tools, "the conversation")
        prompt = render(conversation, tokenizer, dialect, generate=True).ids
        ids = stream(model, prompt, config, tokenizer.stop_ids)
        return screen.write(stream_text(ids, tokenizer))

    opening = [Message("system", flags.system)] if flags.system else []
    messages = list(opening)
    questions = [flags.prompt] if flags.prompt is not None else lines()
    try:
        for question in questions:
            messages.append(Message("user", question))
            try:
                for event in converse(messages, reply, functions, dialect, flags.rounds,
                                      flags.timeout or None):
                    screen.show(event)
            except UserError as error:
                if flags.prompt is not None:
                    raise
                messages = list(opening)  # most likely the chat has outgrown the model's context
                print(f"error: {error}; the chat starts anew", file=sys.stderr)
    except KeyboardInterrupt:
        if flags.prompt is not None:
            raise
    if flags.json:
        print(dump_json({"event": "end", "messages": [plain(each) for each in messages]}))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="a question (default: a chat, line by line)")
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the adapter's base)")
    parser.add_argument("--adapter", help="run folder or adapter folder, peft's included (default "
                        "without --model: the newest run of plain train.py in runs/)")
    parser.add_argument("--tools", metavar="FILE.py", help="functions that the model may call")
    parser.add_argument("--system", help="what the model is told before the first question")
    parser.add_argument("--dialect", choices=tuple(DIALECTS),
                        help="how calls are written (default: as the model was trained)")
    parser.add_argument("--rounds", type=int, default=ROUNDS,
                        help="replies in which to find an answer (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT,
                        help="seconds that a function may take, 0: any (default: %(default)g)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_flags(parser, GenerateConfig)
    add_flags(parser, TrainConfig, only=("dtype", "device"))
    flags = parser.parse_args(argv)
    if flags.prompt is not None and not flags.prompt.strip():
        raise UserError("the prompt is empty; write a question, or leave it out for a chat")
    if flags.rounds < 1:
        raise UserError(f"rounds is {flags.rounds}; expected at least 1")
    if not 0 <= flags.timeout <= threading.TIMEOUT_MAX:
        raise UserError(f"timeout is {flags.timeout:g}; expected seconds, or 0 for any")
    return flags


# --- the model ------------------------------------------------------------------------------------

def load(flags: argparse.Namespace) -> tuple[Gemma, Tokenizer, str]:
    """The model and adapter that the flags name, or else the newest run of plain `python train.py`
    (runs/nano, runs/nano-2 …), or else the nano base; and the dialect it speaks.
    """
    source, adapter = flags.model, flags.adapter
    if source is None and adapter is None:
        runs = [path.parent for name in ("nano", "nano-[0-9]*")
                for path in Path("runs").glob(f"{name}/adapter")]
        adapter = max(runs, key=lambda run: (run / "adapter").stat().st_mtime, default=None)
    if source is None:
        source = adapter_base(adapter) if adapter else "nano"
    settings = from_flags(TrainConfig, flags)
    print(f"model {source}" + (f" with the adapter {adapter}" if adapter else ""), file=sys.stderr)
    return open_model(source, adapter, *placement(settings.device, settings.dtype))


# --- the screen -----------------------------------------------------------------------------------

class Screen:
    """What is shown: thinking dimmed and text as they are written, then each call and its result.

    With `json` nothing but one object for each event.
    """

    def __init__(self, as_json: bool, tags: tuple[str, ...]) -> None:
        self.json, self.tags = as_json, tags
        self.color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def dim(self, text: str) -> str:
        return f"\033[2m{text}\033[0m" if self.color else text

    def write(self, pieces: Iterator[str]) -> str:
        """Shows the pieces of a reply as they come, less the calls in it; returns all of it."""
        whole, part, shown, gap = [], "text", False, ""
        for piece in pieces:
            whole.append(piece)
            if piece in self.tags:  # a tag is one token and so a piece of its own
                part = {"<think>": "thinking", "</think>": "text"}.get(piece, "call")
                if shown:
                    print()
                shown, gap = False, ""
            elif part != "call" and not self.json:
                piece = gap + piece if shown else piece.lstrip()
                body = piece.rstrip()  # the space after it is shown once something follows
                gap, shown = piece[len(body):], shown or bool(body)
                if body:
                    print(self.dim(body) if part == "thinking" else body, end="", flush=True)
        if shown:
            print()
        return "".join(whole)

    def show(self, event: Event) -> None:
        """Shows an event. Thinking and text are on the screen already."""
        if self.json:
            value = {"event": event.kind, "text": event.text}
            if event.call:
                value["call"] = {"name": event.call.name, "arguments": event.call.arguments}
            print(dump_json(value), flush=True)
        elif event.kind == "call":
            print(f"→ {event.text}", flush=True)
        elif event.kind == "result":
            print(self.dim(f"← {event.text}"), flush=True)
        elif event.kind == "malformed":
            print(f"✗ the call could not be read: {event.text}", flush=True)
        elif event.kind == "limit":
            print(f"({event.text}; --rounds allows more)", flush=True)
        elif event.kind == "answer" and not event.text:
            print("(the model ended its turn without a word)", flush=True)


def lines() -> Iterator[str]:
    """The lines of a chat, from a person or a pipe, until there are no more."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def plain(message: Message) -> dict:
    """A message as OpenAI's API writes it, which `train.py --data` reads."""
    value = {key: item for key, item in dataclasses.asdict(message).items() if item}
    value["content"] = message.content
    if message.tool_calls:
        value["tool_calls"] = [{"type": "function", "function": {
            "name": call.name, "arguments": call.arguments}} for call in message.tool_calls]
    return value


if __name__ == "__main__":
    raise SystemExit(run_command(main))
