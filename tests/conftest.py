"""What test files share: tiny models on shapes that tell bugs apart, a tokenizer, real data.

And what they measure: differences from other implementations, held to a bar and shown in a table.
"""

import importlib.metadata
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

# What is tested is small: threads would only wait for each other. Before torch is imported, and for
# the programs that tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from tiny_tokenizer import make_tokenizer_model

from minilora import trainer
from minilora.config import NANO, GemmaConfig
from minilora.data import make_parts
from minilora.dialects import DIALECTS
from minilora.model import Gemma
from minilora.tokenizer import Tokenizer

REAL = "MINILORA_REAL_INPUT"  # folder of real vocabularies and data that some tests can use
LAW = settings(max_examples=100, deadline=None, derandomize=True, database=None)

# What only a GPU runs. The names of such tests end in on_a_gpu, by which tests/bench/gpu.sh finds
# them.
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# The query scalar is not the head dim, √D is exact in no dtype, the window is shorter than the
# sequences of the tests, N / K ≠ 1, N·H ≠ D, and seven layers of Gemma 3 reach a global one.
_TINY = {
    "gemma": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                  num_attention_heads=4, num_key_value_heads=1),
    "gemma2": dict(hidden_size=72, intermediate_size=144, num_hidden_layers=4,
                   num_attention_heads=4, num_key_value_heads=2, query_pre_attn_scalar=18,
                   sliding_window=8),
    "gemma3_text": dict(hidden_size=72, intermediate_size=144, num_hidden_layers=7,
                        num_attention_heads=4, num_key_value_heads=2, query_pre_attn_scalar=18,
                        sliding_window=8, rope_scaling=dict(rope_type="linear", factor=8.0)),
}


def tiny_raw(model_type: str = "gemma2", **overrides) -> dict:
    """A config.json of a tiny Gemma, as a dict."""
    return {"model_type": model_type, "vocab_size": 512, "head_dim": 24,
            "max_position_embeddings": 512, "hidden_activation": "gelu_pytorch_tanh",
            **_TINY[model_type], **overrides}


def tiny_config(model_type: str = "gemma2", **overrides) -> GemmaConfig:
    return GemmaConfig.from_dict(tiny_raw(model_type, **overrides))


def tiny_model(model_type: str = "gemma2", seed: int = 0, dtype: torch.dtype = torch.float32,
               **overrides) -> Gemma:
    """A Gemma with weights wide enough that caps bite, and norms that are not at their start.

    The table is narrower: a tied table that dominates would predict each token's own id.
    """
    model = Gemma(tiny_config(model_type, **overrides))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            width = 0.17 if "norm" in name else 0.1 if "embed" in name else 0.35
            parameter.copy_(width * noise(parameter.shape, 1000 * seed + number))
    return model.to(dtype).requires_grad_(False)


def noise(shape: torch.Size, seed: int) -> torch.Tensor:
    """Numbers spread over (-1, 1) by a formula: the same with every version and machine."""
    at = torch.arange(math.prod(shape), dtype=torch.float64) + 7919.0 * seed
    return ((torch.sin(at * 12.9898) * 43758.5453) % 2.0 - 1.0).view(shape)


# A tool as OpenAI writes it.
TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}}}}


def load_tokenizer(model: Path, *dialects: str) -> Tokenizer:
    """The tokenizer of a tokenizer.model, with the tokens of some dialects (default: Hermes)."""
    tokenizer = Tokenizer.load(model.parent)
    for dialect in dialects or ("hermes",):
        tokenizer.add_tokens(DIALECTS[dialect].tokens)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(make_tokenizer_model(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def place(tmp_path):
    """A folder for thousands of cases: in memory where the machine has such a disk."""
    memory = Path("/dev/shm")
    folder = (memory if memory.is_dir() else tmp_path) / f"hostile-{os.getpid()}"
    folder.mkdir()
    yield folder / "case"
    shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """No test reads or fills the user's cache of tokenized data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def memory_goes_back() -> None:
    """Some tests measure what a load takes; a process that keeps what is freed shows nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "keep_memory", lambda: None)
        yield


@pytest.fixture(scope="session")
def nano_dir() -> Path:
    """The checkpoint that ships with minilora."""
    return NANO


@pytest.fixture(scope="session")
def gemma2_tokenizer_model() -> Path:
    return real_input("gemma2_tokenizer/tokenizer.model")


def real_input(name: str) -> Path:
    """A real file or folder; skips the test where nobody has said where it is."""
    folder = os.environ.get(REAL)
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"{REAL} is not a folder with {name}")
    return Path(folder) / name


# --- measured differences -------------------------------------------------------------------------

class Measurements:
    """Differences held to their bars; of each row of the table the worst is kept.

    Called as `measure(what, against, value, bar)`, it asserts a finite value <= bar.
    What is measured many times under the same `what`, `against` and `bar`, over shapes or seeds,
    is one row: name rows so coarsely that the README's table stays short.

        what      the quantity, its unit and its dtype: "logits, float32, Gemma 2"
        against   the other side: "transformers", "peft", "minilora, unmerged"
        value     grows with what is wrong: a difference as a share of the largest logit or norm
                  (`difference`), the number of ids that differ; 0 where it must be the same bits
        bar       what it may be at most; state it where it is used, as a plain number
    """

    def __init__(self) -> None:
        self.worst: dict[tuple[str, str, float], float] = {}

    def __call__(self, what: str, against: str, value: float, bar: float) -> None:
        row, value = (what, against, float(bar)), float(value)
        if value > self.worst.setdefault(row, value) or math.isnan(value):  # a NaN stays
            self.worst[row] = value
        assert math.isfinite(value) and value <= bar, (
            f"{what}, against {against}: {value:.3g}, more than {bar:g}")

    def table(self) -> str:
        """A Markdown table, its rows in the order in which they were first measured."""
        lines = ["| what | against | measured | bar |", "| --- | --- | --- | --- |"]
        lines += [f"| {what} | {against} | {value:.2g} | {bar:g} |"
                  for (what, against, bar), value in self.worst.items()]
        return "\n".join(lines)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number on the other side."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


_MEASURED = pytest.StashKey[Measurements]()
_TRIED = pytest.StashKey[Counter]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", action="store_true",
                     help="print what was measured as a Markdown table; the README's is that of "
                          "pytest tests/test_parity.py tests/test_checkpoint.py --table")
    parser.addoption("--thorough", action="store_true",
                     help="try as many cases as the README's table of reliability says, where the "
                          "suite tries fewer for the sake of time")


@pytest.fixture
def cases(pytestconfig) -> Callable[[int, int], int]:
    """`cases(few, many)`: how many to try, `many` with `--thorough`."""
    return lambda few, many: many if pytestconfig.getoption("thorough") else few


@pytest.fixture
def tried(pytestconfig) -> Callable[[str, int], None]:
    """`tried(what, count)` counts, for `--table`, the cases that a test tried and found good.

    Those of tests that say the same `what` are added up to one row.
    """
    counter = pytestconfig.stash.setdefault(_TRIED, Counter())
    return lambda what, count: counter.update({what: count})


@pytest.fixture
def measure(pytestconfig) -> Measurements:
    """`measure(what, against, value, bar)` asserts value <= bar and keeps it for `--table`."""
    return pytestconfig.stash.setdefault(_MEASURED, Measurements())


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("table"):
        return
    if _TRIED in config.stash:
        terminalreporter.section("tried")
        for line in ["| what | cases |", "| --- | --- |", *(
                f"| {what} | {count:,} |" for what, count in config.stash[_TRIED].items())]:
            terminalreporter.write_line(line)
    if _MEASURED not in config.stash:
        return
    terminalreporter.section("measured")
    terminalreporter.write_line(config.stash[_MEASURED].table())
    packages = ("torch", "transformers", "peft")
    installed = {dist.name for dist in importlib.metadata.distributions()}
    terminalreporter.write_line("\n" + ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in packages if name in installed))


def make_example(*arguments, **settings):
    """The first part of a conversation: all of it, where it fits."""
    return make_parts(*arguments, **settings)[0]
