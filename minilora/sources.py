"""What `--data` may name, and the rows in it.

DATA is one or several of these, with commas between:

    calls.jsonl            a file: JSON (one array) or JSON Lines, also as .gz; or parquet
    folder                 every .json, .jsonl, .json.gz, .jsonl.gz and .parquet in it, sorted
    'parts/*.jsonl'        a glob, sorted
    owner/name             a dataset on the hub: its train split, or all of it where none is named
    owner/name:test        another split of it: the files with that word in their names
    owner/name:a/b.jsonl   a file of it
    calls.jsonl@0.5        any of them with a weight: how often an epoch sees each row (default 1)

What exists under a name is meant by it, whatever else the name could mean. What a folder or a glob
holds is read where it lies inside: a link there that leads out of it has to be named itself.
"""

import codecs
import fnmatch
import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from minilora.config import UserError, builtin, lies_in
from minilora.jsontext import decode_json, load_json, skip_space
from minilora.weights import snapshot

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
ROW = 2**20    # bytes of the longest row that is read: about a quarter of a million tokens
BLOCK = 2**17  # bytes of an array that are read at a time; its white space may be as long
FAR = 64       # times ROW: how far the end of a line is looked for that is too long to be read
WEIGHTS = 0.001, 1000  # of a file, beside 0: epochs that are neither empty nor endless
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
            if weight and not WEIGHTS[0] <= weight <= WEIGHTS[1]:
                raise UserError(f"{text}: the weight after @ is {found[2]!r}; expected 0, or a "
                                "number from {} to {}, such as 0.5 or 2".format(*WEIGHTS))
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
        if "\0" in data:
            raise UserError(f"{data[:80]!r}: no file has a zero byte in its name")
        try:
            files = [file for name, weight in split_data(data) for file in _named(name, weight)]
        except OSError as error:
            raise UserError(f"{data[:80]}: cannot be looked for ({error.strerror})") from None
        if not files:
            raise UserError("no data is named; expected files, folders or hub datasets")
        return files
    return [file for item in data for file in find_files(item)]


def _named(name: str, weight: float) -> list[DataFile]:
    path = builtin(name)
    on_hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::(.+))?", name)
    if not path.exists():
        if glob.has_magic(name):
            paths = [Path(found) for found in sorted(_matches(name)) if not Path(found).is_dir()]
            if not paths:
                raise UserError(f"{name}: no file has a name of that pattern")
            start = Path(re.split(r"[*?[]", name, maxsplit=1)[0] + "x").parent
            return [DataFile(_checked(path, str(path), start), str(path), weight)
                    for path in paths]
        if on_hub and not on_hub[1].endswith(SUFFIXES):
            return _hub(on_hub[1], on_hub[2] or "", weight)
    return _local(path, name, weight)


def _matches(pattern: str) -> set[str]:
    """What has a name of that pattern. ** goes down folders, and no links to folders, of which two
    that lead up again would make more paths than can be gone down."""
    deep = re.search(r"(?:^|(?<=/))\*\*(?:/|$)", pattern)
    if not deep:
        return set(glob.glob(pattern))
    found = set()
    for start in glob.glob(pattern[:deep.start()]) if deep.start() else [""]:
        folders = [start]
        for folder in folders:  # which grows meanwhile
            found |= _matches(glob.escape(folder) + (pattern[deep.end():] or "*"))
            with os.scandir(folder or ".") as inside:
                folders += [os.path.join(folder, entry.name, "") for entry in inside
                            if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."]
    return found


def _local(path: Path, name: str, weight: float) -> list[DataFile]:
    if not path.is_dir():
        return [DataFile(_checked(path, name), name, weight)]
    files = [DataFile(found, str(Path(name) / found.name), weight) for found in _data_in(path, "*")]
    if not files:
        raise UserError(f"{name}: no data in this folder; expected {', '.join(SUFFIXES)}")
    return files


def _data_in(folder: Path, pattern: str) -> list[Path]:
    return [_checked(path, str(path), folder) for path in sorted(folder.glob(pattern))
            if path.name.endswith(SUFFIXES) and path.name not in _ABOUT and not path.is_dir()]


def _checked(path: Path, name: str, start: Path | None = None) -> Path:
    """The path of a file that may be read; if it was found below `start`, it has to lie there."""
    if re.search("[\n\ud800-\udfff]", name):
        raise UserError(f"{name!r}: a name of two lines, or not of UTF-8; rename the file")
    if not path.is_file():
        raise UserError(f"{name}: " + (
            "not a file but a pipe or a device; write what it gives to a file" if path.exists() else
            "a link to a file that is not there" if path.is_symlink() else "no such file"))
    if start and not lies_in(path, start):
        raise UserError(f"{name}: a link that leads out of {start}, to {path.resolve()}; name that "
                        "file itself if it is meant")
    return path


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


def would_read(data: str, path: Path) -> bool:
    """Whether DATA, by a folder or a pattern, means a file of that path if it is there."""
    path = Path(os.path.abspath(path))
    for name, _ in split_data(data):
        whole = os.path.abspath(builtin(name))
        if os.path.isdir(whole):
            if os.path.realpath(path.parent) == os.path.realpath(whole):
                return True
        elif glob.has_magic(name) and not os.path.exists(whole) and (
                fnmatch.fnmatch(str(path), whole.replace("**/", "*")) if "**" in name else
                path.match(whole)):
            return True
    return False


# --- a file -> rows -------------------------------------------------------------------------------

class RawRow(NamedTuple):
    """A row of a file as it stands there, or what is wrong with it."""

    where: str  # file:line (row n)
    value: object = None
    problem: str = ""


def read_rows(file: DataFile) -> Iterator[RawRow]:
    """The rows of a file, good and bad, in order, read bit by bit.

    A row longer than `ROW` is a bad one (and the last, if it is of an array), so that what a small
    .gz unpacks to cannot fill the memory.
    Raises UserError where the file cannot be read, or not to its end.
    """
    path, name = file.path, file.name
    if name.endswith(".parquet"):
        yield from _parquet_rows(path, name)
        return
    where = name
    try:
        with (gzip.open if name.endswith(".gz") else open)(path, "rb") as data:
            for row in _text_rows(data, name):
                where = row.where
                yield row
    except (OSError, EOFError, zlib.error) as error:
        what = "" if where == name else "what follows "
        raise UserError(f"{where}: {what}cannot be read ({error})") from None


def _text_rows(data: BinaryIO, name: str) -> Iterator[RawRow]:
    """The rows of a text: of one array if it begins with [, or else one a line."""
    if data.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # UTF-32's begins with one
        raise UserError(f"{name}: cannot be read: it is UTF-16 or UTF-32; expected UTF-8: convert "
                        "it")
    if data.peek(3)[:3] == codecs.BOM_UTF8:
        data.read(3)
    lines = _lines(data)
    first = next(lines, None)
    if first is None:
        yield RawRow(name, problem="no row in it; expected conversations, one a line or in one "
                                   "array")
    elif first[1].lstrip().startswith(b"["):
        blocks = itertools.chain([first[1]], iter(partial(data.read, BLOCK), b""))
        yield from _array_rows(codecs.iterdecode(blocks, "utf-8", _KEEP), first[0], name)
    else:
        yield from _line_rows(itertools.chain([first], lines), name)


_KEEP = "surrogateescape"  # bytes that are no UTF-8 come as what `decode_json` refuses in a row


def _lines(data: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, by number; of one that is too long its start (`_is_cut`)."""
    lines = iter(partial(data.readline, ROW), b"")  # JSON may hold other line separators than \n
    for number, line in enumerate(lines, 1):
        if line.strip() or _is_cut(line):
            yield number, line
        if _is_cut(line) and all(map(_is_cut, itertools.islice(lines, FAR))) and data.peek(1):
            raise EOFError(f"the line has no end in {FAR * ROW >> 20} MiB")


def _is_cut(line: bytes) -> bool:
    return len(line) == ROW and not line.endswith(b"\n")


MOST = f"{ROW >> 20} MiB"
_AFTER = re.compile(r"[ \t\r\n]*([,\]])")  # what stands behind a row of an array


def _line_rows(lines: Iterable[tuple[int, bytes]], name: str) -> Iterator[RawRow]:
    for number, (line, row) in enumerate(lines, 1):
        where = f"{name}:{line} (row {number})"
        try:
            if _is_cut(row):
                raise ValueError(f"longer than {MOST}")
            yield RawRow(where, load_json(row.decode("utf-8", _KEEP)))
        except ValueError as error:
            yield RawRow(where, problem=f"{error}; expected one JSON object a line, or one array")


def _array_rows(pieces: Iterator[str], line: int, name: str) -> Iterator[RawRow]:
    """The rows of an array whose text comes in pieces."""
    text, at, number, mark = next(pieces), 0, 0, ","
    at = text.index("[") + 1
    while mark == ",":
        while len(text) - at <= ROW + BLOCK and (more := next(pieces, "")):
            text, at = text[at:] + more, 0  # all of the next row, or more of it than may be
        start = skip_space(text, at)
        where = f"{name}:{line + text.count(chr(10), at, start)}"
        if number == 0 and text.startswith("]", start):
            yield RawRow(where, problem="no row in it; expected conversations in the array")
            at = start + 1
            break
        where = f"{where} (row {number + 1})"
        try:
            row, end = decode_json(text, start)
            if end - start > ROW:
                raise ValueError("too long")
            yield RawRow(where, row)
            if not (after := _AFTER.match(text, end)):
                raise ValueError("no comma and no ] after this row")
        except ValueError as error:  # where the next row begins cannot be known
            yield RawRow(where, problem=f"{error}; expected JSON objects of at most {MOST} with "
                                        "commas between, and the rest of the file is not read")
            return
        number, mark = number + 1, after[1]
        line += text.count("\n", at, after.end())
        at = after.end()
    for piece in itertools.chain([text[at:]], pieces):
        start = skip_space(piece, 0)
        line += piece.count("\n", 0, start)
        if start < len(piece):
            yield RawRow(f"{name}:{line}", problem="text after the end of the array; expected "
                                                   "nothing")
            return


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
    number, where = 0, name
    try:
        with ParquetFile(path) as table:
            # Rows may be of any length, whatever the file's, so few at once.
            for batch in table.iter_batches(batch_size=8, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{name} (row {number})"
                    try:  # as strict as a row of JSON; a date is text
                        text = json.dumps(_without_nulls(row), default=str)
                        if len(text) > ROW:
                            raise ValueError(f"longer than {MOST}")
                        yield RawRow(where, load_json(text))
                    except ValueError as error:
                        yield RawRow(where, problem=str(error))
    except (OSError, ValueError, ArrowException) as error:  # a text that is not UTF-8
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "" if where == name else "what follows "
        raise UserError(f"{where}: {what}cannot be read as parquet ({reason})") from None
    if not number:
        yield RawRow(name, problem="no row in it; expected conversations")


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
