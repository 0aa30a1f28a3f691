"""What `--data` may name, and the rows in it.

DATA is one or several of these, with commas between:

    calls.jsonl            a file: JSON (one array) or JSON Lines, also as .gz; or parquet
    folder                 every .json, .jsonl, .json.gz, .jsonl.gz and .parquet in it, sorted
    'parts/*.jsonl'        a glob, sorted
    owner/name             a dataset on the hub: its train split, or all of it where none is named
    owner/name:test        another split of it: the files with that word in their names
    owner/name:a/b.jsonl   a file of it
    calls.jsonl@0.5        any of them with a weight: how often an epoch sees each row (default 1)

What exists under a name is meant by it, whatever else the name could mean.
"""

import glob
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minilora.config import UserError, builtin
from minilora.jsontext import decode_json, load_json
from minilora.weights import snapshot

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
_ABOUT = ("dataset_infos.json", "dataset_info.json", "state.json")  # beside data, not data


class DataFile(NamedTuple):
    """A file of rows: where it lies, what people call it, and how often an epoch sees a row."""

    path: Path
    name: str
    weight: float = 1.0


Data = str | Path | DataFile | Sequence[str | Path | DataFile]


# --- DATA -> files --------------------------------------------------------------------------------

def split_data(data: str) -> list[tuple[str, float]]:
    """The parts of DATA, each with its weight. Raises UserError for a weight that is none."""
    parts = []
    for text in filter(None, (text.strip() for text in data.split(","))):
        name, weight = text, 1.0
        found = re.fullmatch(r"(.+)@([\d.eE+-]+)", text)
        if found and not builtin(text).exists():
            name = found[1]
            try:
                weight = float(found[2])
            except ValueError:
                weight = -1
            if not 0 <= weight < math.inf:
                raise UserError(f"{text}: the weight after @ is {found[2]!r}; expected a number "
                                "of at least 0, such as 0.5 or 2")
        parts.append((name, weight))
    return parts


def find_files(data: Data) -> list[DataFile]:
    """The files that DATA names, in order; a Path is a file or a folder and nothing else.

    What was found already is itself, so that who needs the files twice looks for them once.

    Raises UserError for what is not there, for a folder or a pattern that holds no data, and where
    the hub cannot be read.
    """
    if isinstance(data, DataFile):
        return [data]
    if isinstance(data, Path):
        return _local(data, str(data), 1.0)
    if isinstance(data, str):
        files = [file for name, weight in split_data(data) for file in _named(name, weight)]
        if not files:
            raise UserError("no data is named; expected files, folders or hub datasets")
        return files
    return [file for item in data for file in find_files(item)]


def _named(name: str, weight: float) -> list[DataFile]:
    path = builtin(name)
    on_hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::(.+))?", name)
    if not path.exists():
        if glob.has_magic(name):
            files = [DataFile(Path(found), found, weight)
                     for found in sorted(glob.glob(name, recursive=True)) if Path(found).is_file()]
            if not files:
                raise UserError(f"{name}: no file has a name of that pattern")
            return files
        if on_hub and not on_hub[1].endswith(SUFFIXES):
            return _hub(on_hub[1], on_hub[2] or "", weight)
    return _local(path, name, weight)


def _local(path: Path, name: str, weight: float) -> list[DataFile]:
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{name}: no such file")
        return [DataFile(path, name, weight)]
    files = [DataFile(found, str(Path(name) / found.name), weight) for found in _data_in(path, "*")]
    if not files:
        raise UserError(f"{name}: no data in this folder; expected {', '.join(SUFFIXES)}")
    return files


def _data_in(folder: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(folder.glob(pattern))
            if path.is_file() and path.name.endswith(SUFFIXES) and path.name not in _ABOUT]


def _hub(name: str, part: str, weight: float) -> list[DataFile]:
    if part.endswith(SUFFIXES):
        folder = snapshot(name, [part], "dataset")
        found = [folder / part] if (folder / part).is_file() else []
    else:
        word = part or "train"
        folder = snapshot(name, [f"*{word}*{suffix}" for suffix in SUFFIXES], "dataset")
        whole = re.compile(rf"(?<![a-zA-Z]){re.escape(word)}(?![a-zA-Z])")
        found = [path for path in _data_in(folder, "**/*")
                 if whole.search(str(path.relative_to(folder)))]
        if not found and not part:
            folder = snapshot(name, [f"*{suffix}" for suffix in SUFFIXES], "dataset")
            found = _data_in(folder, "**/*")
    if not found:
        raise UserError(f"{name}: no data{f' for {part!r}' if part else ''} in this dataset; look "
                        f"at its files: https://huggingface.co/datasets/{name}/tree/main")
    return [DataFile(path, f"{name}:{path.relative_to(folder)}", weight) for path in found]


# --- a file -> rows -------------------------------------------------------------------------------

class RawRow(NamedTuple):
    """A row of a file as it stands there, or what is wrong with it."""

    where: str  # file:line (row n)
    value: object = None
    problem: str = ""


def read_rows(file: DataFile) -> Iterator[RawRow]:
    """The rows of a file, good and bad, in order. JSON Lines and parquet are read bit by bit.

    Raises UserError where the file cannot be read.
    """
    path, name = file.path, file.name
    if name.endswith(".parquet"):
        yield from _parquet_rows(path, name)
        return
    opened = gzip.open if name.endswith(".gz") else open
    try:
        # JSON strings may hold other line separators than \n
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
            first = next((line for line in lines if line.strip()), "")
            lines.seek(0)
            yield from (_array_rows(lines.read(), name) if first.lstrip()[:1] == "["
                        else _line_rows(lines, name))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as UTF-8 text ({error})") from None


def _line_rows(lines: Iterable[str], name: str) -> Iterator[RawRow]:
    number = 0
    for line, row in enumerate(lines, 1):
        if row.strip():
            number += 1
            where = f"{name}:{line} (row {number})"
            try:
                yield RawRow(where, load_json(row))
            except ValueError as error:
                expected = "expected one JSON object a line, or one array"
                yield RawRow(where, problem=f"{error}; {expected}")
    if not number:
        yield RawRow(name, problem="no row in it; expected conversations, one a line or in one "
                                   "array")


def _array_rows(text: str, name: str) -> Iterator[RawRow]:
    token = re.compile(r"[ \t\r\n]*([\[\],]?)[ \t\r\n]*")
    at = token.match(text).end()
    line = 1 + text.count("\n", 0, at)
    number, closed = 0, text.startswith("]", at)
    if closed:
        yield RawRow(f"{name}:{line}", problem="no row in it; expected conversations in the array")
        at = token.match(text, at).end()
    while not closed:
        number += 1
        where = f"{name}:{line} (row {number})"
        try:
            row, end = decode_json(text, at)
        except ValueError as error:  # where the next row begins cannot be known
            expected = "expected a JSON object, and the rest is not read"
            yield RawRow(where, problem=f"{error}; {expected}")
            return
        yield RawRow(where, row)
        mark = token.match(text, end)
        if mark[1] not in (",", "]"):
            yield RawRow(where, problem="no comma and no ] after this row; the rest is not read")
            return
        line += text.count("\n", at, mark.end())
        at, closed = mark.end(), mark[1] == "]"
    if text[at:]:
        yield RawRow(f"{name}:{line}", problem="text after the end of the array; expected nothing")


def _parquet_rows(path: Path, name: str) -> Iterator[RawRow]:
    """The rows of a parquet file, less what is null.

    There a field that one row has all rows have, null where they lack it: what the other tools of a
    file take as arguments would else be null arguments of each. A null that is meant stays where
    arguments (or a whole row's tools) are JSON text.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{name}: parquet is read with pyarrow, which is missing; install it: "
                        "pip install pyarrow") from None
    number = 0
    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{name} (row {number})"
                    try:  # as strict as a row of JSON; a date is text
                        yield RawRow(where, load_json(json.dumps(_without_nulls(row), default=str)))
                    except ValueError as error:
                        yield RawRow(where, problem=str(error))
    except (OSError, ArrowException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: cannot be read as parquet ({reason})") from None
    if not number:
        yield RawRow(name, problem="no row in it; expected conversations")


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
