"""Hostile files for tests: what mutates them, and a child process in which reading them is watched.

`survive` runs case after case in a forked child, which may not crash, nor take memory: 64 MiB over
what it had at the start, for all of its cases together, whose files are small. What a case does in
`attempt` may work for a second at most (or wait for twenty: the machine may be busy), and open
nothing but files in the folder given and those that Python itself is made of. Each case is made
from its own number, so a failure names all that is needed to repeat it.
"""

import contextlib
import copy
import gc
import json
import os
import shutil
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

from minilora.config import UserError

resource = pytest.importorskip("resource", reason="needs the limits that Unix sets a process")

BOUND = 64 * 2**20  # bytes of memory over what the child has at its start
WORK, WAIT = 1.0, 20.0  # most seconds of a case: of the processor, and by the clock


class Refused(str):
    """The line with which a case was refused."""


def attempt(call: Callable, *args, about: str = "", writes: Path | None = None) -> object:
    """What the call returns, or the one line that refuses it, which must hold the word `about`.

    `writes`: a folder beside that of the case, into which the call may write.
    """
    try:
        with reading(writes):
            return call(*args)
    except UserError as error:
        line = str(error)
        assert line and line.splitlines() == [line], f"not one line: {line!r}"
        assert about in line, f"does not name the file: {line!r}"
        assert len(line) < 3000, f"{len(line)} characters: {line[:200]!r}"
        return Refused(line)


def survive(name: str, folder: Path, count: int,
            case: Callable[[Random, Path], object]) -> int:
    """Runs `case(random, folder)` `count` times in a child and returns how many were accepted.

    The folder is empty at every start. Fails with the case's number and what became of it.
    """
    if sys.platform != "linux":
        pytest.skip("needs Linux's account of a process's memory")
    told, tell = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.close(told)
        with contextlib.suppress(BaseException):
            _child(name, folder, count, case, tell)
        os._exit(1)
    os.close(tell)
    report = b""
    while piece := os.read(told, 2**16):
        report = (report + piece)[-2**20:]  # of what it told the end is enough
    os.close(told)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    *_, last = report.decode(errors="replace").split("\0")
    if status:
        ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else "failed"
        raise AssertionError(f"{name}, case {last.partition('|')[0]}, {ended}: "
                             f"{last.partition('|')[2]}")
    return int(last)


def _child(name: str, folder: Path, count: int, case: Callable, tell: int) -> None:
    torch.set_num_threads(1)  # the threads that there were did not come along
    gc.freeze()  # what the parent has is not gone through again and again, in copies of its pages
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)  # ends the child, whatever it is in the middle of
    _watch_opens(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + BOUND
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    accepted = 0
    for number in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.write(tell, f"\0{number}|".encode())
        try:
            accepted += not isinstance(case(Random(f"{name} {number}"), folder), Refused)
        except BaseException:
            os.write(tell, traceback.format_exc().encode(errors="backslashreplace"))
            raise
    os.write(tell, f"\0{accepted}".encode())
    os._exit(0)


# --- while a file is read -------------------------------------------------------------------------

_watched, _out = False, None  # whether what is opened is watched now; where it may be written


@contextlib.contextmanager
def reading(writes: Path | None = None):
    """The time is short, nothing outside the folder of the case may be opened, nothing written."""
    global _watched, _out
    signal.setitimer(signal.ITIMER_PROF, WORK)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    _watched, _out = True, writes
    try:
        yield
    finally:
        _watched = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _watch_opens(folder: Path) -> None:
    python = [Path(place).resolve() for place in (
        sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), Path(__file__).parents[1])]
    home = folder.resolve()

    def hook(event: str, args: tuple) -> None:
        if not _watched:
            return
        if event == "open" and isinstance(args[0], str | bytes):
            path, writes = Path(os.fsdecode(args[0])), args[2] & (os.O_WRONLY | os.O_RDWR)
            real = Path(os.path.realpath(path))
            if _out and real.is_relative_to(_out):
                return
            if writes or not any(real.is_relative_to(place) for place in (home, *python)):
                raise RuntimeError(f"{'wrote' if writes else 'opened'} {path}")
        elif event.startswith(("socket.", "pickle.", "os.exec", "os.system")) or (
                not _out and event.startswith(("os.remove", "os.rename", "os.mkdir", "shutil."))):
            raise RuntimeError(f"{event} {args!r}"[:200])

    sys.addaudithook(hook)


# --- mutations ------------------------------------------------------------------------------------

STRANGE = [None, True, False, 0, 1, 2, 3, -1, 1.0, 0.5, -0.0, 1e308, 1e-320, 255, 10**6, 10**9,
           2**31, 2**32 - 1, 2**63, 2**64, -2**63, 10**30, 10**400, float("nan"), float("inf"),
           "", "x", "1", "1e9", "NaN", "nano", "\0", "\ud800", "a\nb", "\x1b[2J", "../x", "..",
           "/etc/passwd", "/dev/zero", "é" * 3, "y" * 5000, ".*", "(", "(?i:Q_PROJ)", "\\",
           [], [[]], {}, [1], ["x", None], [0] * 100, {"a": 1}, {"": {}}, {"x": [1, {"y": 2}]}]


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    return [path] + [place for key, item in inner for place in places(item, (*path, key))]


def mutate_value(random: Random, value: object) -> object:
    """A JSON value with something put, taken away, moved or exchanged in it."""
    value = json.loads(json.dumps(value))
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        path = random.choice(places(value))
        if not path:
            if random.random() < 0.1:
                value = copy.deepcopy(random.choice(STRANGE))
            continue
        *above, last = path
        at = value
        for key in above:
            at = at[key]
        how = random.choice(["put", "put", "put", "nudge", "drop", "rename", "swap", "nest"])
        if how == "put":
            at[last] = copy.deepcopy(random.choice(STRANGE))
        elif how == "nudge" and type(at[last]) in (int, float) and abs(at[last]) < 1e300:
            at[last] = random.choice([at[last] + 1, at[last] - 1, at[last] * 2, -at[last],
                                      at[last] * 1.0, at[last] * 10**random.randint(1, 12)])
        elif how == "drop":
            del at[last]
        elif how == "rename" and isinstance(at, dict):
            at[random.choice([f"{last}x", f"{last}\n", "", last.upper(), "x" * 3000, "\ud800",
                              "../x"])] = at.pop(last)
        elif how == "swap":
            other = random.choice(list(at) if isinstance(at, dict) else range(len(at)))
            at[last], at[other] = at[other], at[last]
        elif how == "nest":
            for _ in range(random.choice([1, 3, 60, 70, 150])):
                at[last] = [at[last]] if random.random() < 0.5 else {"a": at[last]}
    return value


def hostile_json(random: Random, value: object) -> bytes:
    """The bytes of a JSON file: mutated as a value, as text, or as bytes."""
    how = random.random()
    if how < 0.75:
        value = mutate_value(random, value)
    data = json.dumps(value, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
    return data if how < 0.7 else hostile_text(random, data)


def hostile_text(random: Random, data: bytes) -> bytes:
    """JSON text that is cut, doubled, deep, in another encoding, or with other bytes in it."""
    at = random.randrange(len(data) + 1)
    pairs = data[1:-1].split(b", ")
    return random.choice([
        lambda: data[:at],
        lambda: data[:at] + bytes(random.choices(range(256), k=random.randint(1, 4))) + data[at:],
        lambda: data[:at] + random.choice(
            [b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"\xff", b"\0", b'"', b"\\ud800", b"{",
             b"[" * 100_000, b'{"a":' * 50_000, b"\n", b",", b"//", b"'"]) + data[at:],
        lambda: data[:1] + random.choice(pairs) + b", " + data[1:],  # most often a key twice
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode(errors="replace").encode("utf-16"),
        lambda: data + data,
        lambda: b"[" * 1_000 + data + b"]" * 1_000,
        lambda: b"",
        lambda: bytes(len(data)),
        lambda: flipped(random, data)])()


def flipped(random: Random, data: bytes, start: int = 0, end: int | None = None) -> bytes:
    """The data with a few bytes changed, between `start` and `end`."""
    out, end = bytearray(data), len(data) if end is None else end
    for _ in range(random.choice([1, 1, 2, 4, 16])):
        if start < end:
            at = random.randrange(start, end)
            out[at] = random.choice([random.randrange(256), out[at] ^ 1 << random.randrange(8), 0,
                                     255])
    return bytes(out)


def hostile_file(random: Random, path: Path) -> None:
    """In the place of a file something else: a pipe, a device, a link, a folder, nothing."""
    content = path.read_bytes()
    path.unlink()
    outside = path.parent.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / path.name).write_bytes(content)
    (outside / path.name).chmod(0o666)
    random.choice([
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/null"),
        lambda: path.symlink_to("/proc/self/mem"),
        lambda: path.symlink_to(path.name),  # itself
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to(outside / path.name),
        lambda: path.symlink_to(Path("..") / "outside" / path.name),
        lambda: path.symlink_to("."),
        lambda: path.mkdir(),
        lambda: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
        lambda: path.write_bytes(b""),
        lambda: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40),  # a terabyte of holes
        lambda: None])()
