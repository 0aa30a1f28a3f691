"""What `python -m minilora validate` finds: every bad row, what the others hold, a mended copy.

One row at a time: of each only numbers are kept, so a file may be larger than the memory.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from minilora.chat import Conversation
from minilora.config import TrainConfig, UserError
from minilora.data import Example, count_tokens, digest, make_parts, split
from minilora.files import replacing
from minilora.jsontext import dump_json
from minilora.readers import iterate_rows, openai_row, read_row
from minilora.sources import DataFile, find_files
from minilora.tokenizer import Tokenizer


class Counted(NamedTuple):
    """What is kept of an example: numbers. The rest of the code counts and packs by these alone."""

    length: int
    weight: float
    cut: int
    part: int
    counts: np.ndarray  # [2, kinds]


class Checked(NamedTuple):
    """What was found: numbers for people or JSON, and the examples that training would see."""

    facts: dict
    examples: list[Counted]


def check_data(data: str, tokenizer: Tokenizer, config: TrainConfig, fix: str | None = None,
               tell: Callable[[str], None] = lambda line: None) -> Checked:
    """Reads every row as training would; with `fix`, mends rows and writes the good ones there.

    `tell` hears at once of each bad row, "FILE:LINE (row N): what is wrong at which field; expected
    …", and of each that was mended; the facts have them as lists. The copy is JSON Lines in
    OpenAI's layout and reads as the same conversations. Its rows all can be trained on. It has no
    weights (`@0.5`): those of its sources are among the facts.

    Raises UserError where a file cannot be read or the copy not be written.
    """
    problems: list[str] = []
    mended: list[str] = []
    notes: defaultdict[str, Counter] = defaultdict(Counter)  # file -> what is unusual -> rows
    roles: Counter = Counter()
    offered: set[str] = set()
    called: set[str] = set()
    files = find_files(data)
    counts = Counter(conversations=0, calls=0, with_calls=0, untrained=0)
    lengths: list[int] = []       # of whole conversations
    digests: list[int] = []       # of those that training can use
    examples: list[Counted] = []
    owners: list[int] = []        # of each example, the number of its conversation

    def hear(line: str, lines: list[str]) -> None:
        lines.append(line)
        tell(line)

    with _copy(fix, files) as out:
        for row in iterate_rows(files, mend=out is not None):
            said = row.conversation
            if said is None:
                hear(f"{row.where}: {row.problem}", problems)
                continue
            counts["conversations"] += 1
            notes[row.file].update(row.notes)
            roles.update(message.role for message in said.messages)
            calls = [call.name for message in said.messages for call in message.tool_calls]
            counts.update(calls=len(calls), with_calls=bool(calls))
            called.update(calls)
            offered.update(tool["function"]["name"] for tool in said.tools)
            try:
                parts = make_parts(said, tokenizer, config.dialect, None, config.train_on)
                lengths.append(len(parts[0]))
                if lengths[-1] > config.length:
                    parts = make_parts(said, tokenizer, config.dialect, config.length,
                                       config.train_on)
            except UserError as error:
                hear(str(error), problems)
                counts["untrained"] += 1
                continue
            owners += [len(digests)] * len(parts)
            digests.append(digest(said))
            examples += (_counted(part) for part in parts)
            if out:
                for note in _write(said, row.notes, out):
                    hear(f"{row.where} {note}", mended)
    held = split(digests, config.eval_share, config.seed)
    facts = {
        "conversations": counts["conversations"], "unread": len(problems) - counts["untrained"],
        "turns": dict(roles), "messages": roles.total(), "calls": counts["calls"],
        "with_calls": counts["with_calls"], "tools_offered": len(offered),
        "tools_called": len(called), **count_tokens(examples), "refused": counts["untrained"],
        "length": _spread(lengths), "histogram": histogram(lengths),
        "notes": {file: dict(found) for file, found in notes.items() if found},
        "problems": problems}
    if fix:
        facts |= {"fixed": fix, "mended": mended, "weights": sorted({f.weight for f in files})}
    return Checked(facts, [example for example, owner in zip(examples, owners, strict=True)
                           if not held[owner]])


def _counted(example: Example) -> Counted:
    return Counted(example.length, example.weight, example.cut, example.part, example.counts)


@contextlib.contextmanager
def _copy(fix: str | None, files: list[DataFile]) -> Iterator[TextIO | None]:
    """The file of the mended copy, to write to; it is there when all of it is."""
    if not fix:
        yield None
        return
    path = Path(fix)
    if path.suffix != ".jsonl":
        raise UserError(f"--fix {fix}: the copy is JSON Lines; give it a name that ends in .jsonl")
    if any(file.path.resolve() == path.resolve() for file in files):
        raise UserError(f"--fix {fix}: is what is read; give the copy another name")
    with replacing(path) as aside, open(aside, "w", encoding="utf-8", newline="\n") as out:
        yield out


def _write(conversation: Conversation, notes: tuple[str, ...], out: TextIO) -> list[str]:
    """Writes a conversation as a row; which of the notes on the old row are not true of the new."""
    row = openai_row(conversation)
    out.write(dump_json(row) + "\n")
    left: set[str] = set()
    read_row(row, left.add)
    return [note for note in notes if note not in left]


def _spread(lengths: list[int]) -> dict:
    found = np.sort(lengths) if lengths else np.zeros(1)
    return {"min": int(found[0]), "median": int(np.median(found)),
            "p95": int(found[-(-95 * len(found) // 100) - 1]), "max": int(found[-1])}


def histogram(lengths: list[int]) -> list[tuple[int, int]]:
    """(most tokens, how many conversations): each step twice the one before, none left out."""
    steps = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int) if lengths else np.zeros(0, int)
    return [(2 ** step, int((steps == step).sum()))
            for step in range(steps.min(), steps.max() + 1)] if lengths else []
