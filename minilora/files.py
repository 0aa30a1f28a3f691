"""Files and folders written whole or not at all, and read strictly.

A file is written aside, flushed to the disk and only then renamed. A folder is filled as
`.adapter.new` and renamed likewise; the one that it replaces is called `.adapter.old` between two
renames: whoever reads in that instant, or after a crash in it, reads that one. So no reader meets
what is half written. Nothing is pickled.
"""

import contextlib
import fnmatch
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minilora.config import UserError, read_json

FORMAT = 1  # of minilora.json and state.json
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
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); free the disk or choose another "
                        "folder") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


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
    new, old = (folder.with_name(f".{folder.name}.{age}") for age in ("new", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists() and old.exists():  # a write was cut off between its two renames
            os.rename(old, folder)
        for path in sorted(folder.iterdir()) if folder.exists() else []:
            if not any(fnmatch.fnmatchcase(path.name, name) for name in files):
                raise UserError(f"{folder}: holds {path.name}, which would be lost; choose another "
                                "folder, or move it away")
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        yield new
        for path in new.iterdir():
            path.chmod(new.stat().st_mode & 0o666)  # safetensors gives the owner alone a right
            _sync(path)
        _sync(new)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); free the disk or choose another "
                        "folder") from None
    finally:
        if not folder.exists() and old.exists():
            os.rename(old, folder)
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def current(folder: Path) -> Path:
    """`folder`, or what it replaces where a write was cut off between its two renames."""
    old = folder.with_name(f".{folder.name}.old")
    return old if not folder.exists() and old.exists() else folder


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folder
        return
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


def read_tensors(path: Path, shapes: dict[str, list[int]], hint: str) -> dict[str, Tensor]:
    """Exactly the tensors that `shapes` names, in those shapes."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); {hint}") from None
    for name in sorted(shapes.keys() ^ tensors.keys()):
        what = "lacks" if name in shapes else "has an unexpected"
        raise UserError(f"{path}: {what} {name}; {hint}")
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape:
            raise UserError(f"{path}: {name} has shape {list(tensors[name].shape)}, expected "
                            f"{shape}; {hint}")
    return tensors
