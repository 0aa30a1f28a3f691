"""Examples on disk: made once, found again by what they were made from, read by mapping.

A second run on the same data starts without reading or tokenizing a conversation, and the memory of
a run is the same for a thousand conversations as for a million: what is not in use is on the disk.

`load_examples` keeps an entry for every combination of data, tokenizer, dialect, length, train-on
and code: a folder, named by a hash of all these, in $MINILORA_CACHE or ~/.cache/minilora. All of it
may be deleted at any time, and is in time: beyond `LIMIT` bytes the entries that were used longest
ago go first. In a folder, each file a plain array:

    ids, kinds, trained    of all examples end to end
    examples               a record each: where it starts, its length, weight, counts …
    conversations          a record each: its digest, and where its text starts
    texts                  of all conversations end to end: the source, then the whole as JSON
    told                   what was said of the data, a JSON line each, to be said again
    checksum               of the folder's name and of the others, written last
"""

import bisect
import contextlib
import copy
import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minilora.chat import Conversation, Kind, Message, ToolCall
from minilora.config import UserError
from minilora.data import IGNORED, Example, digest, make_parts, split, trained_kinds
from minilora.dialects import get_dialect
from minilora.readers import iterate_conversations, refuse, warn
from minilora.sources import DataFile, find_files
from minilora.tokenizer import Tokenizer

LIMIT = 20 * 2**30  # bytes of all entries together
WEEK = 7 * 86400    # seconds after which an entry that is still being made is a crash's

EXAMPLE = np.dtype([("start", "<i8"), ("length", "<i4"), ("conversation", "<i4"), ("part", "<i4"),
                    ("cut", "<i4"), ("weight", "<f8"), ("counts", "<i4", (2, len(Kind)))])
CONVERSATION = np.dtype([("digest", "<u8"),  # then where in the texts these begin, and the end
                         ("source", "<i8"), ("json", "<i8"), ("end", "<i8")])
ARRAYS = {"kinds": np.dtype("u1"), "trained": np.dtype("?"), "examples": EXAMPLE,
          "conversations": CONVERSATION, "texts": np.dtype("u1")}  # and ids, whose type varies


class Dataset(Sequence[Example]):
    """Examples on disk, each made when it is asked for, and the conversations they are of."""

    def __init__(self, folder: Path, ids: str) -> None:
        """Maps the files of an entry, ids of that dtype; they may then be renamed or deleted."""
        types = {"ids": np.dtype(ids), **ARRAYS}
        self._maps = {name: _map(folder / name) for name in types}
        self._arrays = {name: np.frombuffer(self._maps[name], types[name]) for name in types}
        self._chosen = np.arange(len(self._arrays["examples"]), dtype=np.int32)
        self._asked = np.arange(len(self._arrays["conversations"]), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Example:
        record = self._arrays["examples"][self._chosen[index]]
        here = slice(int(record["start"]), int(record["start"] + record["length"]))
        ids = torch.from_numpy(self._arrays["ids"][here].astype(np.int64))
        kinds = torch.from_numpy(self._arrays["kinds"][here].copy())
        trained = torch.from_numpy(self._arrays["trained"][here].copy())
        source = self._text(record["conversation"], "source", "json")
        self._give_back()
        return Example(ids, kinds, torch.where(trained, ids, IGNORED), source, int(record["cut"]),
                       int(record["part"]), float(record["weight"]))

    def column(self, name: str) -> np.ndarray:
        """One of length, weight, cut, part and counts, of every example.  [n, …]"""
        values = self._arrays["examples"][name][self._chosen]
        self._give_back()
        return values

    def conversations(self, limit: int) -> list[Conversation]:
        """The first conversations, at most `limit`, as they were read."""
        found = [_from_json(self._text(row, "json", "end")) for row in self._asked[:limit]]
        self._give_back()
        return found

    def split(self, share: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """(kept, held out), both in the given order, as `minilora.data.split` decides."""
        held = np.zeros(len(self._arrays["conversations"]), dtype=bool)
        held[self._asked] = split(self._arrays["conversations"]["digest"][self._asked], share, seed)
        return self._only(~held), self._only(held)

    def files(self) -> list[dict]:
        """What each file of the data gave, split or not: its name, how many conversations, and
        hashes of them in any order, of them in their order, and of the numbers of tokens by kind.
        """
        digests, examples = (self._arrays["conversations"]["digest"], self._arrays["examples"])

        def name(row: int) -> str:
            return re.sub(r"(:\d+)? \(row \d+\)$", "", self._text(row, "source", "json"))

        def short_hash(*arrays: np.ndarray) -> str:
            total = hashlib.blake2b(digest_size=16)
            for array in arrays:
                total.update(np.ascontiguousarray(array))
            return total.hexdigest()

        found, first = [], 0
        while first < len(digests):  # a file's conversations follow each other
            end = bisect.bisect(range(len(digests)), False, first,
                                key=lambda row, first=first: name(row) != name(first))
            a, b = np.searchsorted(examples["conversation"], [first, end])
            tokens = [examples[key][a:b] for key in ("length", "part", "cut", "weight", "counts")]
            found.append({"name": name(first), "rows": end - first,
                          "content": short_hash(np.sort(digests[first:end])),
                          "order": short_hash(digests[first:end]), "tokens": short_hash(*tokens)})
            first = end
        self._give_back()
        return found

    def _only(self, wanted: np.ndarray) -> "Dataset":
        """These conversations and their examples; the maps are shared.  wanted: [n] bool"""
        part = copy.copy(self)
        part._asked = self._asked[wanted[self._asked]]
        of = self._arrays["examples"]["conversation"][self._chosen]
        part._chosen = self._chosen[wanted[of]]
        return part

    def _text(self, row: int, start: str, end: str) -> str:
        record = self._arrays["conversations"][row]
        return self._arrays["texts"][record[start]:record[end]].tobytes().decode()

    def _give_back(self) -> None:
        """Unmaps the pages that were read (they stay in the system's cache).

        A process that has read a whole file by mapping seems to hold all of it in memory.
        """
        for each in self._maps.values():
            if each and hasattr(mmap, "MADV_DONTNEED"):
                each.madvise(mmap.MADV_DONTNEED)


def _map(path: Path) -> mmap.mmap | bytes:
    with open(path, "rb") as file:  # an empty file cannot be mapped
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _from_json(text: str) -> Conversation:
    """The conversation that `_append` has written."""
    value = json.loads(text)
    messages = tuple(
        Message(**{**message, "tool_calls": tuple(ToolCall(**call)
                                                  for call in message["tool_calls"])})
        for message in value["messages"])
    return Conversation(**{**value, "messages": messages, "tools": tuple(value["tools"])})


# --- making and finding an entry ------------------------------------------------------------------

def load_examples(data: str, tokenizer: Tokenizer, dialect: str = "hermes",
                  length: int | None = None, train_on: str = "assistant",
                  on_problem: Callable[[str], None] = refuse,
                  on_notice: Callable[[str], None] = warn,
                  on_row: Callable[[], object] = lambda: None) -> Dataset:
    """The examples that `make_parts` makes of the conversations in some files, in order.

    Problems and notices are as in `read_conversations` and `make_examples`; where the examples were
    made by an earlier run, all that was said then is said again. Conversations that are refused are
    not in the dataset. `on_row` is called for each conversation that is made into examples. Where
    the cache cannot be written the examples live in a temporary folder. Raises UserError where
    there is no room for that either.
    """
    trained_kinds(train_on)  # a wrong setting is one error, not one for each conversation
    get_dialect(dialect)
    files = find_files(data)
    entry = _root() / _key(files, tokenizer, dialect, length, train_on)
    ids = "<u2" if tokenizer.vocab_size <= 2**16 else "<i4"
    if found := _find(entry, ids):
        dataset, told = found
        for kind, text in told:
            (on_problem if kind == "problem" else on_notice)(text)
        return dataset
    make = partial(make_parts, tokenizer=tokenizer, dialect=dialect, length=length,
                   train_on=train_on)
    with _new_folder(entry.parent) as new:
        _write(new / entry.name, files, make, ids, on_problem, on_notice, on_row)
        dataset = Dataset(new / entry.name, ids)
        try:
            if not _whole(entry):  # which another run may just have made
                shutil.rmtree(entry, ignore_errors=True)
                os.rename(new / entry.name, entry)
        except OSError as error:
            on_notice(f"{entry.parent}: the tokenized data cannot be kept there ({error.strerror}),"
                      " so the next run makes it again; set MINILORA_CACHE to another folder")
    _tidy(entry)
    return dataset


def _write(folder: Path, data: list[DataFile], make: Callable[[Conversation], list[Example]],
           ids: str, on_problem: Callable[[str], None], on_notice: Callable[[str], None],
           on_row: Callable[[], object]) -> None:
    """Fills the folder of an entry, conversation by conversation; what is told, is also kept."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb"))
                 for name in ("ids", *ARRAYS, "told")}

        def tell(kind: str, hear: Callable[[str], None], text: str) -> None:
            files["told"].write(json.dumps([kind, text]).encode() + b"\n")
            hear(text)

        on_problem = partial(tell, "problem", on_problem)
        on_notice = partial(tell, "notice", on_notice)
        first, rows, lost, total = "", 0, 0, 0  # of those that are cut: rows, trained tokens
        for conversation in iterate_conversations(data, on_problem, on_notice):
            try:
                parts = make(conversation)
            except UserError as error:
                on_problem(str(error))
                continue
            if cut := parts[0].cut:
                trained = cut + sum(int((part.labels != IGNORED).sum()) for part in parts)
                first = first or (f"{conversation.source}: cut: {cut} of its {trained} trained "
                                  "tokens are in turns that do not fit --length with the question "
                                  "before them")
                rows, lost, total = rows + 1, lost + cut, total + trained
            _append(files, ids, conversation, parts)
            on_row()
        if rows:
            on_notice(first + (f" (and {rows - 1} more rows; {lost} of {total} trained tokens in "
                               "all)" if rows > 1 else ""))
    (folder / "checksum").write_bytes(_checksum(folder))


def _append(files: dict, ids: str, conversation: Conversation, parts: list[Example]) -> None:
    """Adds a conversation and its examples to the ends of an entry's files."""
    number = files["conversations"].tell() // CONVERSATION.itemsize
    for part in parts:
        record = (files["kinds"].tell(), part.length, number, part.part, part.cut, part.weight,
                  part.counts)
        files["examples"].write(np.array(record, EXAMPLE).tobytes())
        files["ids"].write(part.ids.numpy().astype(ids).tobytes())
        files["kinds"].write(part.kinds.numpy().tobytes())
        files["trained"].write((part.labels != IGNORED).numpy().tobytes())
    source = conversation.source.encode()
    text = json.dumps(conversation, default=vars, ensure_ascii=False).encode()
    at = files["texts"].tell()
    record = (digest(conversation), at, at + len(source), at + len(source) + len(text))
    files["conversations"].write(np.array(record, CONVERSATION).tobytes())
    files["texts"].write(source + text)


def _root() -> Path:
    return Path(os.environ.get("MINILORA_CACHE") or Path.home() / ".cache" / "minilora")


def _hash(paths: Iterable[Path]) -> bytes:
    """Of the contents of some files. Raises OSError where one cannot be read."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest().encode()


def _key(files: list[DataFile], tokenizer: Tokenizer, dialect: str, length: int | None,
         train_on: str) -> str:
    """A name for what examples are made from: the same name, the same examples and sources."""
    try:
        contents = _hash(file.path for file in files)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    code = _hash(sorted(Path(__file__).parent.glob("*.py")))  # whoever edits it sees what it does
    facts = [[(file.name, file.weight) for file in files], contents, tokenizer.fingerprint(),
             dialect, length, train_on, code]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _find(entry: Path, ids: str) -> tuple[Dataset, list[tuple[str, str]]] | None:
    """What is in an entry and what was told of it: (kind, text). None where it is not whole."""
    try:
        if not _whole(entry):
            return None
        with open(entry / "told", encoding="utf-8") as lines:
            found = Dataset(entry, ids), [*map(json.loads, lines)]
    except OSError:  # another run has just deleted it (`_tidy`)
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # for `_tidy`
    return found


def _whole(entry: Path) -> bool:
    """Whether an entry is there with every byte that was written."""
    try:
        return (entry / "checksum").read_bytes() == _checksum(entry)
    except OSError:
        return False


def _checksum(entry: Path) -> bytes:
    """Of an entry's name and of all that is in it: a folder under another name is no entry."""
    contents = _hash(entry / name for name in ("ids", *ARRAYS, "told"))
    return hashlib.sha256(entry.name.encode() + contents).hexdigest().encode()


@contextlib.contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder in `parent`, or in the system's where that cannot be written."""
    make = partial(tempfile.TemporaryDirectory, ignore_cleanup_errors=True)
    where = parent
    try:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = make(prefix=".minilora-", dir=parent)
        except OSError:
            where = tempfile.gettempdir()
            folder = make(prefix="minilora-")
        with folder as name:
            yield Path(name)
    except OSError as error:
        raise UserError(f"{where}: the tokenized data cannot be written ({error}); free the disk, "
                        "or set MINILORA_CACHE to a folder elsewhere") from None


def _tidy(newest: Path) -> None:
    """Deletes the entries used longest ago that are beyond `LIMIT`, and what crashes left."""
    with contextlib.suppress(OSError):
        entries = [path for path in newest.parent.iterdir() if path != newest and re.fullmatch(
            r"[0-9a-f]{64}|\.minilora-.*", path.name)]  # the folder may hold what is not ours
        total = 0
        for path in [newest, *sorted(entries, key=lambda path: -path.stat().st_mtime)]:
            total += sum(file.stat().st_size for file in path.iterdir() if file.is_file())
            old = path.name.startswith(".") and time.time() - path.stat().st_mtime > WEEK
            if path != newest and (total > LIMIT or old):
                shutil.rmtree(path, ignore_errors=True)
