"""Runs that are killed, disks that refuse, two runs in one folder: nothing is lost or half there.

Run as a program this file is a parent that has trained once and forks a child for each run of
train.py, which then takes a fraction of a second. A child is killed from outside at a moment, or
by itself at a call that changes the disk, or by the system when a file grows past a size.
"""

import builtins
import contextlib
import errno
import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import TOOL
from safetensors import SafetensorError
from test_checkpoint import trainee, tuned, write_base
from test_sources import program
from tqdm import tqdm

from minilora import cache, checkpoint, files, report, weights
from minilora.cache import load_examples
from minilora.checkpoint import export_extended, export_merged, load_adapter, save_adapter
from minilora.config import UserError
from minilora.files import alone, current, write_file
from minilora.lora import trainable
from minilora.report import append_metrics, forget_metrics_after, read_metrics
from minilora.state import latest_state, load_state, save_state
from minilora.tokenizer import Tokenizer
from minilora.weights import load_model

FLAGS = ["--model", "base", "--data", "calls.jsonl", "--steps", "6", "--batch", "1",
         "--accumulate", "2", "--dropout", "0.2", "--length", "192", "--rank", "2",
         "--save-every", "2", "--eval-share", "0.2", "--eval-every", "3", "--merge"]
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"}  # and open, to write


# --- the parent that forks ------------------------------------------------------------------------

def serve() -> None:
    """Answers jobs on standard input, a JSON line each, with a JSON line each."""
    train, ends = program("train").__globals__, {}
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is one for all children: the killed would keep it
    sys.argv = ["train.py", *FLAGS, "--out", "first"]
    with contextlib.redirect_stdout(sys.stderr):
        train["main"]()
    for line in sys.stdin:
        job = json.loads(line)
        if "argv" in job:
            (end, at_end), (out, at_out) = os.pipe(), os.pipe()
            if not (pid := os.fork()):
                os.dup2(at_out, 1)
                os.dup2(at_out, 2)
                run(train, **job)
            os.close(at_end)
            os.close(at_out)
            ends[pid], answer = (end, out), pid
        else:
            pid, seconds = job["wait"], job["seconds"]
            end, out = ends[pid]
            if seconds is not None and not select.select([end], [], [], seconds)[0]:
                os.kill(pid, signal.SIGKILL)
            status, answer = os.waitpid(pid, os.WUNTRACED)[1], (None, "")
            if not os.WIFSTOPPED(status):
                with open(out) as said:  # no more than a pipe can hold
                    answer = os.waitstatus_to_exitcode(status), said.read()
                os.close(end)
        print(json.dumps(answer), flush=True)


def run(train: dict, argv: list[str], cache: str, where: str, nth: int, how: str,
        size: int) -> None:
    """In the child: train.py, with something done to it at a change of the disk.

    That is the nth with `where` in the path ("" for any), or where `where` is `answer` the moment
    at which the model answers for real. `how`: a signal by its name; or FULL, whereafter a file can
    grow to `size` bytes; or TORN, whereafter the process dies when one grows past it.
    """
    import resource

    os.environ["MINILORA_CACHE"], calls = cache, 0

    def change(path: str = "", *_: object) -> None:
        nonlocal calls
        if where in str(path):
            calls += 1
        if calls != nth + 1 or where not in str(path):
            return
        if how in ("FULL", "TORN"):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if how == "TORN" else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        else:
            os.kill(os.getpid(), signal.Signals[how])

    def hook(event: str, args: tuple) -> None:
        if event in CHANGES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
            change(*args)

    os.fsync = lambda handle: change()  # who is killed needs no disk that has been written
    if where == "answer":
        train["answer"] = lambda *_: change("answer")
    elif how:
        sys.addaudithook(hook)
    sys.argv = ["train.py", *argv]
    status = 70
    with contextlib.suppress(BaseException):
        status = report.run_command(train["main"])
    os.write(2, f"changes {calls}\n".encode())
    os._exit(status)


class Runs:
    """Runs of train.py in a folder, each a child of one parent."""

    def __init__(self, folder: Path) -> None:
        write_base(folder / "base", num_hidden_layers=2)
        write_calls(folder / "calls.jsonl", 12)
        self.folder = folder
        self.parent = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=(folder / "parent.log").open("w"),
            env={**os.environ, "OMP_NUM_THREADS": "1", "MINILORA_CACHE": str(folder / "cache"),
                 "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])})

    def ask(self, **job) -> int | list:
        print(json.dumps(job), file=self.parent.stdin, flush=True)
        answer = self.parent.stdout.readline()
        assert answer, (self.folder / "parent.log").read_text()
        return json.loads(answer)

    def start(self, *argv: str, cache: str = "cache", where: str = "", nth: int = -1, how: str = "",
              size: int = 0) -> int:
        """Starts train.py with these arguments; returns the child's number."""
        return self.ask(argv=argv, cache=str(self.folder / cache), where=where, nth=nth, how=how,
                        size=size)

    def wait(self, pid: int, seconds: float | None = None) -> tuple[int | None, str]:
        """How a child ended (None: it was stopped) and all that it said."""
        return tuple(self.ask(wait=pid, seconds=seconds))

    def __call__(self, *argv: str, seconds: float = 100, **what) -> tuple[int | None, str]:
        return self.wait(self.start(*argv, **what), seconds)

    def left(self, out: str) -> dict:
        """What a finished run leaves and what must be the same, killed or not."""
        out = self.folder / out
        state = latest_state(out / "checkpoints")
        told = json.loads((state / "state.json").read_text())
        del told["progress"]["seconds"]
        return {
            "names": sorted(path.name for path in out.iterdir()), "state": told,
            "tensors": (state / "state.safetensors").read_bytes(),
            "metrics": [{key: value for key, value in record.items() if key != "seconds"}
                        for record in read_metrics(out / "metrics.jsonl")],
            **{str(path.relative_to(out)): path.name == "README.md" or path.read_bytes()
               for folder in ("adapter", "merged") for path in (out / folder).iterdir()}}


def write_calls(path: Path, count: int, city: str = "C") -> None:
    path.write_text("".join(json.dumps({"tools": [TOOL], "messages": [
        {"role": "user", "content": f"Weather {n}?"},
        {"role": "assistant", "tool_calls": [{"function": {
            "name": "get_weather", "arguments": {"city": f"{city}{n}"}}}]}]}) + "\n"
        for n in range(count)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.parent.kill()
    runs.parent.wait()


@pytest.fixture(scope="module")
def whole(runs) -> dict:
    """What a run leaves that nobody disturbs."""
    status, log = runs(*FLAGS, "--out", "whole")
    assert status == 0, log
    return runs.left("whole")


def one_line(log: str, *told: str) -> None:
    """A run ended with one line, which tells these."""
    *_, last, _ = log.splitlines()  # the last one is the child's
    assert last.startswith("error: ") and "Traceback" not in log, log
    for text in told:
        assert text in last, last


# --- killed ---------------------------------------------------------------------------------------

def test_a_killed_run_goes_on_to_the_same_bits(runs, whole, cases, tried):
    """At random moments by the clock, at changes of the disk, in the middle of writing a file."""
    rng, wanted, killed = random.Random(6), cases(12, 50), 0
    began = time.perf_counter()
    _, log = runs(*FLAGS, "--out", "counted", how="SIGCONT")
    seconds, changes = time.perf_counter() - began, int(log.split()[-1])
    for number in range(3 * wanted):  # by the clock some end before their moment
        out, deaths, moments = f"killed-{number}", 0, rng.choice((1, 1, 2))
        cache = rng.choice(("cache", f"cache-{number}"))
        while True:
            going_on = (runs.folder / out / "config.json").exists()
            if deaths and not going_on:
                status, log = runs("--resume", out)
                assert status == 2
                one_line(log, f"{out}: no run to go on with")
            moment = [{"seconds": rng.uniform(0, seconds)},
                      {"nth": rng.randrange(changes), "how": "SIGKILL"},
                      {"nth": rng.randrange(changes), "how": "TORN",
                       "size": int(10 ** rng.uniform(1, 5))}][killed % 3]
            argv = ("--resume", out) if going_on else (*FLAGS, "--out", out)
            status, log = runs(*argv, cache=cache, **(moment if deaths < moments else {}))
            if status == 0:
                break
            assert status in (-signal.SIGKILL, -signal.SIGXFSZ), log
            deaths += 1
        assert runs.left(out) == whole, (out, deaths)
        shutil.rmtree(runs.folder / out)
        killed += deaths
        if killed >= wanted:
            break
    assert killed >= wanted
    tried("kill -9 at a moment, resumed to the same bits", killed)


def test_before_the_first_checkpoint_a_run_starts_again(runs, whole):
    assert runs(*FLAGS, "--out", "early", where="metrics.jsonl", nth=2, how="SIGKILL")[0] < 0
    assert latest_state(runs.folder / "early" / "checkpoints") is None
    status, log = runs(*FLAGS, "--out", "early")
    assert status == 2
    one_line(log, "early holds a run already", "--resume early")
    status, log = runs("--resume", "early")
    assert status == 0 and "no checkpoint yet" in log
    assert runs.left("early") == whole


@pytest.mark.parametrize("how, wanted", [("SIGINT", 130), ("SIGKILL", -9)])
def test_what_ends_in_the_first_evaluation_has_not_begun(runs, how, wanted):
    """No folder, or one that is as good as none: the same --out can be given again."""
    out, flags = f"unbegun-{how}", [*FLAGS, "--eval-calls", "1"]
    assert runs(*flags, "--out", out, where="answer", nth=0, how=how)[0] == wanted
    assert (runs.folder / out).exists() == (how == "SIGKILL")
    status, log = runs("--resume", out)
    assert status == 2
    one_line(log, f"{out}: no run to go on with", f"--out {out}")
    status, log = runs(*FLAGS, "--rank", "3", "--out", out)
    assert status == 0, log


def test_a_finished_run_is_not_written_anew(runs, whole):
    """Who resumes one, to push it say, rewrites no checkpoint: a crash could lose the only one."""
    state = latest_state(runs.folder / "whole" / "checkpoints")
    before = os.stat(state).st_ino
    assert runs("--resume", "whole")[0] == 0
    assert os.stat(state).st_ino == before and runs.left("whole") == whole


# --- a full disk ----------------------------------------------------------------------------------

@pytest.mark.parametrize("where, nth, size", [
    ("metrics.jsonl", 5, 500), ("state.json", 2, 3000), ("adapter", 0, 2000), ("curve.png", 0, 9),
    ("result.json", 0, 20)])
def test_a_disk_that_fills_while_training(runs, whole, where, nth, size):
    """One line; what was saved is there, and with room again the run goes on to the same bits."""
    out = f"full-{size}"
    status, log = runs(*FLAGS, "--out", out, where=where, nth=nth, how="FULL", size=size)
    assert status == 2
    one_line(log, f"{out}/", "File too large", "free the disk")
    assert latest_state(runs.folder / out / "checkpoints") is not None
    status, log = runs("--resume", out)
    assert status == 0, log
    assert runs.left(out) == whole


# --- a disk that refuses --------------------------------------------------------------------------

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)


class Killed(BaseException):
    """The process has died."""


@contextlib.contextmanager
def failing(at: int, lasting: bool, error: BaseException) -> Iterator[list[str]]:
    """Call `at` that changes the disk raises `error`, or all do from that on; yields their names.

    What is written is not flushed for real: that takes most of the time.
    """
    calls = []

    def wrap(name: str, real: Callable, error: BaseException) -> Callable:
        def call(*args, **kwargs):
            mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
            if name == "io.open" and not set("wax+") & set(mode):
                return real(*args, **kwargs)
            calls.append(name)
            if len(calls) == at + 1 or lasting and len(calls) > at + 1:
                raise error
            return real(*args, **kwargs)
        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: at + 10**8)  # a process of its own, soon dead
        for name in ("open", "mkdir", "unlink", "rmdir", "chmod", "rename", "replace"):
            patch.setattr(os, name, wrap(name, getattr(os, name), error))
        patch.setattr(os, "fsync", wrap("fsync", lambda handle: None, error))
        opener = wrap("io.open", io.open, error)
        patch.setattr(builtins, "open", opener)
        patch.setattr(io, "open", opener)
        torn = error if isinstance(error, Killed) else SafetensorError(f"I/O error: {error}")
        patch.setattr(files, "save_file", wrap("save_file", files.save_file, torn))
        yield calls


def untroubled() -> contextlib.AbstractContextManager[list[str]]:
    return failing(-1, False, Killed())


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in current(folder).iterdir()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "base", num_hidden_layers=1)


@pytest.fixture(params=["file", "metrics", "adapter", "merged", "extended", "checkpoint"])
def writer(request, base) -> tuple[Callable[[Path, int], object], Callable[[Path], object]]:
    """(write, read): writes the first or the second version of something to a folder; reads it."""
    tuned_twice = [tuned(base, seed=seed, rank=2) for seed in (1, 5)]
    in_training = [trainee(base, rank=2) for _ in range(2)]

    def write_states(folder: Path, version: int) -> None:
        for step in (4,) if version else (1, 2):
            save_state(folder, step, *in_training[version], {"step": step})

    def read_state(folder: Path) -> tuple:
        other = trainee(base, rank=2)
        step = load_state(folder, *other)["step"]
        assert {path.name for path in folder.glob("step-*")} >= (
            {"step-000002", "step-000004"} if step == 4 else {"step-000001", "step-000002"})
        return step, [*map(torch.Tensor.tolist, trainable(other[0]).values())]

    def metrics(folder: Path, version: int) -> None:
        if not version:
            for step in range(9):
                append_metrics(folder / "metrics.jsonl", {"step": step})
        forget_metrics_after(folder / "metrics.jsonl", 9 - 5 * version)

    return {
        "file": (lambda folder, version: write_file(folder / "a.json", b"[%d]" % version),
                 lambda folder: (folder / "a.json").read_bytes()),
        "metrics": (metrics, lambda folder: read_metrics(folder / "metrics.jsonl")),
        "adapter": (lambda folder, version: save_adapter(
                        *tuned_twice[version], folder / "adapter", str(base)),
                    lambda folder: read_folder(folder / "adapter")),
        "merged": (lambda folder, version: export_merged(
                       *tuned_twice[version], base, folder / "out"),
                   lambda folder: read_folder(folder / "out")),
        "extended": (lambda folder, version: export_extended(
                         *tuned_twice[version], base, folder / "out"),
                     lambda folder: {part: read_folder(folder / "out" / part)
                                     for part in ("base", "adapter")}),
        "checkpoint": (write_states, read_state),
    }[request.param]


def begin(writer, folder: Path) -> tuple[Path, Path, object]:
    """A folder with a first version, a copy of it, and what is read there."""
    write, read = writer
    here, before = folder / "here", folder / "before"
    here.mkdir()
    write(here, 0)
    shutil.copytree(here, before)
    return here, before, read(here)


def test_a_fault_at_every_call_of_a_write(writer, tmp_path, cases, tried):
    """Whether a call fails, or all from that on, or the process dies there: what was there or what
    was to be there is there, whole; and the next write finds nothing in its way.
    """
    write, read = writer
    here, before, old = begin(writer, tmp_path)
    with untroubled() as calls:
        write(here, 1)
    new, clean, modes = read(here), names(here), cases(1, 3)
    assert old != new and len(calls) > 5
    places = range(0, len(calls), cases(1 + len(calls) // 60, 1))
    for at in places:
        for mode in range(at % 3, at % 3 + modes):
            shutil.rmtree(here)
            shutil.copytree(before, here)
            number, error = ERRORS[at % len(ERRORS)], Killed() if mode % 3 == 2 else None
            lasting = mode % 3 > 0
            case = at, calls[at], lasting, error
            try:
                with failing(at, lasting, error or OSError(number, os.strerror(number))):
                    write(here, 1)
                assert read(here) == new, case
            except UserError as refusal:
                assert os.strerror(number) in str(refusal) and str(here) in str(refusal), case
                assert "\n" not in str(refusal)
            except Killed:
                pass
            assert read(here) in (old, new), case
            with untroubled():
                write(here, 1)
            assert read(here) == new and names(here) == clean, case
    tried("faults in a write, at each of its calls", modes * len(places))


def test_a_disk_that_fills_at_any_byte(writer, tmp_path, tried):
    resource = pytest.importorskip("resource")
    write, read = writer
    here, before, old = begin(writer, tmp_path)
    write(here, 1)
    new, largest = read(here), max(path.stat().st_size for path in here.rglob("*.*")
                                   if path.is_file())
    rng, soft = random.Random(1), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 1, largest - 1, *(int(largest ** rng.random()) for _ in range(5))):
        shutil.rmtree(here)
        shutil.copytree(before, here)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, soft[1]))
            with untroubled(), pytest.raises(UserError, match="File too large"):
                write(here, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        assert read(here) == old and names(here) == names(before)
        with untroubled():
            write(here, 1)
        assert read(here) == new
    tried("disks that fill in a write", 8)


def test_a_disk_that_is_full(writer, tmp_path, tried):
    """A real one, where one may be mounted."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", tmp_path],
                      capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    write, read = writer
    try:
        write(tmp_path, 0)
        old, before = read(tmp_path), names(tmp_path)
        with (open(tmp_path / "filler", "wb", buffering=0) as filler,
              contextlib.suppress(OSError)):
            while filler.write(bytes(2**16)):  # as much of it as there is room for
                pass
        with pytest.raises(UserError, match="No space left"):
            write(tmp_path, 1)
        (tmp_path / "filler").unlink()
        assert read(tmp_path) == old and names(tmp_path) == before
        write(tmp_path, 1)
        assert read(tmp_path) != old
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    tried("disks that fill in a write", 1)


def test_a_fault_at_every_call_of_the_cache(tokenizer, tmp_path, monkeypatch, tried):
    """Examples come from another folder or the run ends with one line; the next makes them."""
    write_calls(tmp_path / "calls.jsonl", 3)
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "no code" / "cache.py"))

    def read() -> list:
        found = load_examples(str(tmp_path / "calls.jsonl"), tokenizer, on_notice=lambda _: None)
        return [example.ids.tolist() for example in found]

    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "first"))
    with untroubled() as calls:
        wanted = read()
    for at in range(len(calls)):
        for lasting, error in ((False, None), (True, None), (True, Killed())):
            number = ERRORS[at % len(ERRORS)]
            monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / f"cache-{at}-{lasting}-{error}"))
            case = at, calls[at], lasting, error
            try:
                with failing(at, lasting, error or OSError(number, os.strerror(number))):
                    assert read() == wanted, case
            except UserError as refusal:
                assert "MINILORA_CACHE" in str(refusal), case
            except Killed:
                pass
            assert read() == wanted, case
    tried("faults in a write, at each of its calls", 3 * len(calls))


# --- two runs -------------------------------------------------------------------------------------

def test_two_runs_in_one_folder(runs, whole):
    """The second is told who is there; the first is unhurt. One that is killed is there no more."""
    for end in (signal.SIGCONT, signal.SIGKILL):
        out = f"shared-{end.name}"
        first = runs.start(*FLAGS, "--out", out, where="metrics.jsonl", nth=4, how="SIGSTOP")
        assert runs.wait(first)[0] is None
        for argv in ((*FLAGS, "--out", out), ("--resume", out)):
            status, log = runs(*argv)
            assert status == 2
            one_line(log, f"{out}: process {first} on ", "is at work there")
        os.kill(first, end)
        assert runs.wait(first)[0] == (0 if end == signal.SIGCONT else -signal.SIGKILL)
        assert runs("--resume", out)[0] == 0
        assert runs.left(out) == whole


def test_a_lock_that_another_has_just_deleted_is_none(tmp_path, monkeypatch):
    """Between opening the file and locking it: who locks what is deleted would not be alone."""
    lock, real, raced = tmp_path / "run" / ".lock", files._lock, []

    def late(handle: int) -> bool:
        if not raced:
            raced.append(lock.unlink())
        return real(handle)

    monkeypatch.setattr(files, "_lock", late)
    with (alone(lock, lock.parent), pytest.raises(UserError, match="at work"),
          alone(lock, lock.parent)):
        pass
    assert not lock.exists() and raced


def test_what_a_folder_replaces_is_read_in_its_place(tmp_path):
    """Of it, of a folder that it is in, and of one that has no name, as `--adapter .` has none."""
    (tmp_path / ".run.old" / "adapter").mkdir(parents=True)
    assert current(tmp_path / "run" / "adapter") == tmp_path / ".run.old" / "adapter"
    assert current(tmp_path / "no" / "adapter") == tmp_path / "no" / "adapter"
    assert current(Path(".")) == Path(".")


@pytest.mark.parametrize("what, reads", [("merged", (weights, "_read")),
                                         ("adapter", (checkpoint, "read_tensors"))])
def test_nothing_is_read_of_two_versions(base, tmp_path, monkeypatch, what, reads):
    """Another process writes anew what is being read: the first half is of what it was."""
    write = {"merged": export_merged, "adapter": save_adapter}[what]
    first, second = (tuned(base, seed=seed, rank=2) for seed in (1, 5))
    args = (base, tmp_path / what) if what == "merged" else (tmp_path / what, str(base))
    write(*first, *args)
    real = getattr(*reads)

    def slow(*given):
        (tmp_path / what / "notes.txt").write_text(str(written))  # is nobody's business
        if again and not written:
            (tmp_path / what / "notes.txt").unlink()
            written.append(write(*second, *args))
        return real(*given)

    def load() -> None:
        if what == "merged":
            load_model(tmp_path / what)
        else:
            load_adapter(load_model(base), Tokenizer.load(base), tmp_path / what)

    written, again = [], False
    monkeypatch.setattr(*reads, slow)
    load()
    again = True
    with pytest.raises(UserError, match=f"{what}: was written to while it was read; read it again"):
        load()
    assert written
    load()


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone(tmp_path / ".lock", tmp_path), alone(tmp_path / ".lock", tmp_path):
        pass
    assert not any(tmp_path.iterdir())


def test_two_runs_without_a_name_are_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new_folder = program("train").__globals__["new_folder"]
    assert [str(new_folder("a.jsonl")) for _ in range(3)] == ["runs/a", "runs/a-2", "runs/a-3"]


if __name__ == "__main__":
    serve()
