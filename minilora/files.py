"""Files and folders written whole or not at all, and read strictly.

A file is written aside, flushed to the disk and only then renamed. A folder is filled as
`.adapter.new` and renamed likewise; the one that it replaces is called `.adapter.old` between two
renames: whoever reads in that instant, or after a crash in it, reads that one. So no reader meets
what is half written. What a process that was killed has left aside, the next write of the same name
deletes; of two that live, a lock keeps the second out of a folder. Nothing is pickled.
"""

import contextlib
import fcntl
import fnmatch
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minilora.config import UserError, check_file, read_json
from minilora.jsontext import load_json

FORMAT = 2  # of minilora.json and state.json
BLOCK = 2**22  # bytes read, merged or written at a time: few enough to stay in the cache
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`, that takes its place when the block ends without error.

    So `path` is never half there: it is what it was, or whole and on the disk. Missing folders are
    made. Raises UserError where it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        make_folder(path.parent)
        yield aside
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    except OSError as error:
        raise _refusal(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            for other in path.parent.iterdir():  # also those of processes that were killed
                if (writer := _aside_of(other.name, path.name)) and not _runs(writer):
                    other.unlink()


def _aside_of(name: str, of: str) -> int | None:
    """The number of the process if `name` is the one under which `replacing` there writes `of`."""
    found = re.fullmatch(rf"\.{re.escape(of)}\.(\d+)", name)
    return int(found[1]) if found else None


def _runs(process: int) -> bool:
    """Whether a process other than this one runs under that number here."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)  # sends nothing
    except PermissionError:  # somebody else's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _refusal(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be written ({error}); free the disk or choose another folder")


def check_new(path: Path | str, flag: str) -> None:
    """Refuses a file that would be written over: the data that it is to be made from, say."""
    if Path(path).exists():
        raise UserError(f"{flag} {path}: is there already; choose another name")


def write_file(path: Path, data: bytes) -> None:
    """Writes a whole file or nothing (see `replacing`)."""
    with replacing(path) as aside:
        aside.write_bytes(data)


@contextlib.contextmanager
def replacing_folder(folder: Path, files: Sequence[str]) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` once all of it is on the disk.

    Whatever goes wrong before leaves `folder` as it was. Raises UserError where the disk refuses,
    and where `folder` holds something else than `files` (names or patterns), which would be lost.
    """
    folder = Path(folder).resolve()
    if not folder.name:
        raise UserError(f"{folder}: is the root of the file system; choose another folder")
    new, old, lock = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "old", "lock"))
    with alone(lock, folder):
        try:
            if not folder.exists() and old.exists():  # a write was cut off between its two renames
                os.rename(old, folder)
            check_replaceable(folder, files)
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
            new.mkdir()
            yield new
            for path in new.iterdir():
                if path.is_file():  # to which safetensors gives the owner alone a right
                    path.chmod(new.stat().st_mode & 0o666)
                _sync(path)
            _sync(new)
            if folder.exists():
                os.rename(folder, old)
            os.rename(new, folder)
            _sync(folder.parent)
        except (OSError, SafetensorError) as error:
            raise _refusal(folder, error) from None
        finally:
            with contextlib.suppress(OSError):
                if not folder.exists() and old.exists():
                    os.rename(old, folder)
            shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path, files: Sequence[str]) -> None:
    """Refuses a folder that holds something else than `files` (names or patterns)."""
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if not any(fnmatch.fnmatchcase(path.name, name) or path.name == f".{name}.lock"
                   or _aside_of(path.name, name) for name in files):
            raise UserError(f"{folder}: holds {path.name}, which would be lost; choose another "
                            "folder, or move it away")


def current(folder: Path) -> Path:
    """`folder`, or what it replaces where a write was cut off between its two renames: of it, or of
    a folder that it is in.
    """
    if folder.exists() or not folder.name:
        return folder
    old, inside = folder.with_name(f".{folder.name}.old"), current(folder.parent) / folder.name
    return next((path for path in (old, inside) if path.exists()), folder)


@contextlib.contextmanager
def unchanged(folder: Path, files: Sequence[str]) -> Iterator[None]:
    """Refuses what was read in the block if one of `files` (names or patterns) in `folder` was
    written meanwhile: it may be of two versions, or of numbers read where another file's header put
    them. Raises UserError.
    """
    before = _versions(folder, files)
    try:
        yield
    finally:
        if _versions(folder, files) != before:
            raise UserError(f"{folder}: was written to while it was read; read it again") from None


def _versions(folder: Path, files: Sequence[str]) -> dict[str, tuple]:
    """Of each of some files in a folder what is another if it is replaced."""
    with contextlib.suppress(OSError):
        about = {path.name: path.stat() for path in folder.iterdir()
                 if any(fnmatch.fnmatchcase(path.name, name) for name in files)}
        return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                for name, stat in about.items()}
    return {}  # it is being replaced


@contextlib.contextmanager
def alone(lock: Path, folder: Path) -> Iterator[None]:
    """Keeps other processes out of `folder`, by the file `lock`, until the block ends.

    The system lets go of the lock when the process ends, however it ends: a file that a dead one
    has left keeps nobody out. Nor does one on a file system without locks, as NFS can be. Raises
    UserError, with the other's number, where another process is in; and where the disk refuses.
    """
    while True:
        try:
            make_folder(lock.parent)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _refusal(folder, error) from None
        if not _lock(handle):
            who = os.read(handle, 1000).decode(errors="replace") or "another process"
            os.close(handle)
            raise UserError(f"{folder}: {who} is at work there; wait until it has ended, or choose "
                            "another folder")
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(lock)):
                break
        os.close(handle)  # who had it has just deleted it
    try:
        with contextlib.suppress(OSError):  # a full disk, say, of which others will tell
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        try:
            with contextlib.suppress(OSError):
                lock.unlink()
        finally:
            os.close(handle)


def _lock(handle: int) -> bool:
    """Locks an open file unless another process has: whether none has."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        pass
    return True


def make_folder(folder: Path) -> None:
    """Makes a folder, and before it those above it that are missing; all are on the disk then."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path,
              metadata={"format": "pt"})


def write_blocks(path: Path, dtype: torch.dtype, shapes: dict[str, Sequence[int]],
                 blocks: Iterable[Tensor]) -> None:
    """Writes a safetensors file of tensors in one dtype, whose numbers come a block at a time.

    So a file can be larger than memory; `save_file` wants all of its tensors at once. The format is
    described at https://huggingface.co/docs/safetensors.
    """
    names = {each: name for name, each in FLOATS.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": [*shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers after it are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            numbers = memoryview(block.contiguous().view(torch.uint8).view(-1).numpy())
            # Of larger writes Linux makes large pages, which it may first have to get from the
            # host of a virtual machine: that took nine times as long.
            for start in range(0, len(numbers), 2**16):
                file.write(numbers[start:start + 2**16])
        assert file.tell() == 8 + len(text) + end, f"{path}: other numbers than shapes"


def write_json(path: Path, value: object) -> None:
    write_file(path, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def read_object(path: Path) -> dict:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def read_own(path: Path, **kinds: type) -> dict:
    """The object in a JSON file that minilora wrote, with the types of what must be there."""
    value = read_object(path)
    if value.get("format") != FORMAT:
        raise UserError(f"{path}: format is {value.get('format')!r}, expected {FORMAT}; read it "
                        "with the minilora that wrote it")
    for key, kind in kinds.items():
        if not isinstance(value.get(key), kind):
            raise UserError(f"{path}: {key} is not a {kind.__name__}; the file is damaged")
    return value


class Stored(NamedTuple):
    """A tensor of a safetensors file: under which name, in which file, from which byte on."""
    key: str
    path: Path
    dtype: str
    shape: list[int]
    start: int


def read_headers(path: Path, hint: str) -> list[Stored]:
    """What a safetensors file holds, by name; nothing is allocated but for its header.

    The package checks that all of it is sound: that the sizes are those of the shapes, that the
    file ends where the last tensor does, that none overlaps another. Of two tensors of one name it
    takes the last; here they are refused. Raises UserError.
    """
    check_file(path)
    try:
        with safe_open(path, framework="pt"), open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = load_json(file.read(size).decode())
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise torn(path, error, hint) from None
    header.pop("__metadata__", None)
    return [Stored(key, path, part["dtype"], part["shape"], 8 + size + part["data_offsets"][0])
            for key, part in sorted(header.items())]


def torn(path: Path, reason: object, hint: str) -> UserError:
    return UserError(f"{path}: not a whole safetensors file ({reason}); {hint}")


def read_tensors(path: Path, shapes: dict[str, list[int]], hint: str,
                 others: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Exactly the tensors that `shapes` names, in those shapes, as floats or the dtype that
    `others` gives for the start of a name. Raises UserError, and then has read none.
    """
    headers = {tensor.key: tensor for tensor in read_headers(path, hint)}
    for name in sorted(shapes.keys() ^ headers.keys()):
        what = "lacks" if name in shapes else "has an unexpected"
        raise UserError(f"{path}: {what} {name}; {hint}")
    for name, (_, _, dtype, shape, _) in headers.items():
        if shape != shapes[name]:
            raise UserError(f"{path}: {name} has shape {shape}, expected {shapes[name]}; {hint}")
        known = next(([other] for start, other in (others or {}).items()
                      if name.startswith(start)), [*FLOATS])
        if dtype not in known:
            raise UserError(f"{path}: {name} is {dtype}, expected {' or '.join(known)}; {hint}")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise torn(path, error, hint) from None
