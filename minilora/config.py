"""Every setting in one place: what a Gemma is, what LoRA adds, how a run trains and how it writes.

The dataclass fields below are the only home of a default. `add_flags` turns them into command-line
flags (the field's help is the flag's help), `from_flags` turns the flags back into the dataclass.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from minilora.jsontext import MAX_DEPTH, STRICT, TOO_DEEP, check_value

MOST_BYTES = 2**26  # of a file that is read at once; Gemma 3's tokenizer.json has 2**25
MOST_AT_ONCE = 2**16  # rows of a batch, batches of a step, or a rank: more than a machine can hold
MOST_LENGTH = 2**24   # tokens of a row, likewise
NANO = Path(__file__).parent / "nano"  # the built-in base; `nano` wherever a model is asked for

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = ("auto", "float32", "bfloat16")  # of a base


class UserError(ValueError):
    """A user's mistake, told in one line: what is wrong, where, and what to do about it.

    What it quotes may come from any file: line breaks are told as \\n, and of a very long line the
    middle is left out.
    """

    def __init__(self, message: str) -> None:
        line = r"\n".join(message.splitlines())
        super().__init__(line if len(line) < 2000 else f"{line[:1200]} … {line[-600:]}")


def builtin(source: str | Path) -> Path:
    """The path that `source` names: `nano` and `nano/FILE` mean the base that ships inside."""
    path = Path(source)
    if path.parts[:1] == ("nano",) and not path.exists():
        return NANO.joinpath(*path.parts[1:])
    return path


def lies_in(file: Path, folder: Path) -> bool:
    """Whether a file itself, where links to it lead, is in a folder or below it.

    The hub's cache, whose snapshots/ID/ hold links to blobs/, is one folder.
    """
    file, home = (Path(os.path.realpath(each)) for each in (file, folder))
    blobs = (above.parent / "blobs" for above in home.parents if above.name == "snapshots")
    return any(map(file.is_relative_to, [home, *blobs]))


def check_file(path: str | Path, linked: bool = False) -> None:
    """Refuses what is no plain file, such as a pipe, which could be read for ever; and a link out
    of its folder, by which a folder that somebody else made could name any file of the machine.

    `linked`: the user named this very file, which may be a link to anywhere. Raises UserError.
    """
    try:
        plain = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not plain:
        raise UserError(f"{path}: cannot be read: it is no plain file; put the file itself there")
    if not linked and not lies_in(Path(path), Path(path).parent):
        raise UserError(f"{path}: is a link that leaves the folder, to {os.path.realpath(path)}; "
                        "put the file itself there")


def read_file(path: str | Path, linked: bool = False) -> bytes:
    """The bytes of a plain file (see `check_file`). Raises UserError past MOST_BYTES of them."""
    check_file(path, linked)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_BYTES:
                raise UserError(f"{path}: has {size} bytes, which is no such file; download it "
                                "again")
            return file.read(size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: str | Path, linked: bool = False) -> object:
    """The JSON value in a plain file (see `check_file`), as strict as `jsontext.load_json`.

    Raises UserError with file, line and what is wrong there.
    """
    try:
        value = STRICT.decode(read_file(path, linked).decode("utf-8"))
        check_value(value)
        return value
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{path}: {TOO_DEEP.format(MAX_DEPTH)}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


# --- Gemma ----------------------------------------------------------------------------------------

FAMILIES = ("gemma", "gemma2", "gemma3_text")
# What a config.json may ask for, several times what any Gemma has: so that a size multiplied by two
# others is still one that a tensor can have, and a model can be laid out without memory in an
# instant. Whether its tensors are there is seen before any of them gets memory.
MOST_ROWS, MOST_LAYERS = 10**6, 256

# What a published config.json may leave out, because the family's own default says it: transformers
# `configuration_gemma.py`, `configuration_gemma2.py` and `configuration_gemma3.py`.
_FAMILY_DEFAULTS = {
    "gemma": dict(vocab_size=256000, num_attention_heads=16, num_key_value_heads=16, head_dim=256,
                  max_position_embeddings=8192, rms_norm_eps=1e-6),
    "gemma2": dict(vocab_size=256000, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
                   max_position_embeddings=8192, rms_norm_eps=1e-6, query_pre_attn_scalar=256,
                   sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3_text": dict(vocab_size=262208, num_attention_heads=8, num_key_value_heads=4,
                        head_dim=256, max_position_embeddings=131072, rms_norm_eps=1e-6,
                        query_pre_attn_scalar=256, sliding_window=4096),
}


@dataclass(frozen=True)
class GemmaConfig:
    """The shape of a Gemma 1, 2 or 3 text model: all that `model.py` needs to build it."""

    model_type: str                         # gemma | gemma2 | gemma3_text
    vocab_size: int                         # V: rows of the embedding table
    hidden_size: int                        # D
    intermediate_size: int                  # F: width of the feed-forward
    num_hidden_layers: int
    num_attention_heads: int                # N: query heads
    num_key_value_heads: int                # K: each serves N / K query heads
    head_dim: int                           # H; N·H need not be D (gemma-7b)
    query_pre_attn_scalar: float            # scores are divided by its root; 144 ≠ H on gemma-2-27b
    rms_norm_eps: float
    max_position_embeddings: int            # the longest context it was made for, in tokens
    rope_theta: float                       # base of the rotation on global layers
    rope_local_theta: float                 # base on window layers (Gemma 3 has two)
    rope_factor: float                      # positions are divided by it on global layers (Gemma 3)
    layer_types: tuple[str, ...]            # per layer: sliding_attention | full_attention
    sliding_window: int | None              # a window layer admits q - k < window
    attn_logit_softcapping: float | None    # c·tanh(x / c) on scores; None: off
    final_logit_softcapping: float | None   # the same on logits; None: off

    @property
    def qk_norm(self) -> bool:
        """Gemma 3 normalises queries and keys per head instead of capping their scores."""
        return self.model_type == "gemma3_text"

    @property
    def sandwich_norms(self) -> bool:
        """Gemma 2 and 3 also normalise what attention and MLP return: four norms a layer."""
        return self.model_type != "gemma"

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config.json") -> "GemmaConfig":
        """Reads a published config, old keys (`rope_theta`) and new (`rope_parameters`) alike.

        An image-text Gemma 3 gives its `text_config`. Raises UserError that names the key.
        """
        if not isinstance(raw, dict):
            raise UserError(f"{source}: expected a JSON object with a model_type")
        if raw.get("model_type") == "gemma3":  # the image-text layout of 4b, 12b and 27b
            inner = raw.get("text_config")
            if not isinstance(inner, dict):
                raise UserError(f"{source}: model_type gemma3 without a text_config object")
            raw = {"model_type": "gemma3_text", **inner}
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"{source}: model_type is {family!r}; minilora reads "
                            f"{', '.join(FAMILIES)} and gemma3: choose a Gemma checkpoint")
        given = {key: value for key, value in raw.items() if value is not None}
        # A cap is the one setting whose null means something: off.
        caps = {key: raw[key] for key in ("attn_logit_softcapping", "final_logit_softcapping")
                if key in raw and family != "gemma"}
        merged = {**_FAMILY_DEFAULTS[family], **given, **caps}

        def number(key: str, kind: type = int, low: float = 1, high: float = MOST_ROWS) -> float:
            return _number(merged.get(key), key, source, kind, low, high)

        if family == "gemma":
            merged.setdefault("query_pre_attn_scalar", merged["head_dim"])
        # Gemma 1 says `gelu` in hidden_act and means the tanh form (transformers PR 29402);
        # hidden_activation, where it is there, decides.
        activation = merged.get("hidden_activation", "gelu_pytorch_tanh")
        if activation != "gelu_pytorch_tanh":
            raise UserError(f"{source}: hidden_activation is {activation!r}; "
                            "every published Gemma has 'gelu_pytorch_tanh'")
        for key in ("attention_bias", "use_bidirectional_attention"):
            if merged.get(key):
                raise UserError(f"{source}: {key} is set; no published Gemma chat model has it")
        if merged.get("tie_word_embeddings", True) is not True:
            raise UserError(f"{source}: tie_word_embeddings is off; Gemma's embedding is tied")
        layers = number("num_hidden_layers", high=MOST_LAYERS)
        layer_types = _layer_types(merged, family, layers, source)
        windowed = "sliding_attention" in layer_types
        config = cls(
            model_type=family,
            vocab_size=number("vocab_size"),
            hidden_size=number("hidden_size"),
            intermediate_size=number("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=number("num_attention_heads"),
            num_key_value_heads=number("num_key_value_heads"),
            head_dim=number("head_dim"),
            query_pre_attn_scalar=number("query_pre_attn_scalar", float, 1e-9),
            rms_norm_eps=number("rms_norm_eps", float, 0),
            max_position_embeddings=number("max_position_embeddings", high=2**31),
            **_rope(merged, family, source),
            layer_types=layer_types,
            sliding_window=number("sliding_window", high=2**31) if windowed else None,
            attn_logit_softcapping=(None if merged.get("attn_logit_softcapping") is None
                                    else number("attn_logit_softcapping", float, 1e-9)),
            final_logit_softcapping=(None if merged.get("final_logit_softcapping") is None
                                     else number("final_logit_softcapping", float, 1e-9)),
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(f"{source}: num_attention_heads {config.num_attention_heads} is not a "
                            f"multiple of num_key_value_heads {config.num_key_value_heads}")
        if config.head_dim % 2:
            raise UserError(f"{source}: head_dim is {config.head_dim}; rotation needs an even one")
        return config


def _number(value: object, key: str, source: str, kind: type = float, low: float = 1e-9,
            high: float = 1e9) -> float:
    """A number of a config.json. Raises UserError that names it."""
    good = type(value) is int or (kind is float and type(value) is float)
    if not good or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{source}: {key} is {value!r}; expected {what} of at least {low} and at "
                        f"most {high:g}")
    return kind(value)


def _layer_types(raw: dict, family: str, layers: int, source: str) -> tuple[str, ...]:
    """Which layers look through a window. Gemma 2: every other one; Gemma 3: five to one."""
    types = raw.get("layer_types")
    if types is None:
        # Older configs leave the pattern to the code: transformers `configuration_gemma2.py` and
        # `configuration_gemma3.py`, where layer i is global if (i + 1) is a multiple of the period.
        period = {"gemma": 1, "gemma2": 2, "gemma3_text": _number(
            raw.get("sliding_window_pattern", 6), "sliding_window_pattern", source, int, 1)}
        types = ["full_attention" if (i + 1) % period[family] == 0 else "sliding_attention"
                 for i in range(layers)]
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layers or any(
            each not in known for each in types):
        raise UserError(f"{source}: layer_types must list sliding_attention or full_attention for "
                        f"each of the {layers} layers")
    return tuple(types)


def _rope(raw: dict, family: str, source: str) -> dict[str, float]:
    """Rotation bases from `rope_parameters` (transformers 5) or the older flat keys."""
    def part(raw: dict, key: str, default: dict | None = None) -> dict:
        value = raw.get(key) or default or {}
        if not isinstance(value, dict):
            raise UserError(f"{source}: {key} must be an object")
        return value

    flat = {"rope_theta": raw.get("rope_theta", 1_000_000.0 if family == "gemma3_text" else 1e4),
            "rope_type": "default", **part(raw, "rope_scaling")}
    new = part(raw, "rope_parameters")
    whole = {**flat, **part(new, "full_attention", None if "sliding_attention" in new else new)}
    local = part(new, "sliding_attention")
    theta = whole["rope_theta"]
    local_theta = local.get("rope_theta", raw.get("rope_local_base_freq",
                                                  1e4 if family == "gemma3_text" else theta))
    kind = whole.get("rope_type") or whole.get("type")
    local_kind = local.get("rope_type", "default")
    # Only Gemma 3 stretches its positions, and only on global layers.
    known = ("default", "linear") if family == "gemma3_text" else ("default",)
    if kind not in known or local_kind != "default":
        odd = kind if local_kind == "default" else local_kind
        raise UserError(f"{source}: rope_type is {odd!r}; published Gemmas use default, and Gemma "
                        "3 linear on its global layers")
    factor = whole.get("factor", 1.0) if kind == "linear" else 1.0
    return dict(rope_theta=_number(theta, "rope_theta", source),
                rope_local_theta=_number(local_theta, "rope_local_base_freq", source),
                rope_factor=_number(factor, "rope factor", source))


# --- a run ----------------------------------------------------------------------------------------

def setting(default: object, help: str, choices: tuple[str, ...] | None = None):
    """A dataclass field that is also a flag: its default, the flag's help, and what it may be."""
    return field(default=default, metadata={"help": help, "choices": choices})


def check_dtype(dtype: str) -> None:
    """Refuses what is not one of DTYPES. Raises UserError."""
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)} (float16 ends at "
                        "65504, which Gemma's activations exceed: use bfloat16)")


@dataclass(frozen=True)
class LoraConfig:
    """What LoRA adds (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

    rank: int = setting(16, "r: rows of A and columns of B; more can learn more and costs more")
    alpha: float = setting(32.0, "α: the update is scaled by α / r")
    dropout: float = setting(0.0, "share of A's inputs that are dropped while training")
    targets: tuple[str, ...] = setting(
        LINEARS, "linears to adapt, by name or pattern: q_proj,v_proj or 'layers.1?.mlp.*'")
    rslora: bool = setting(False, "scale by α / √r instead (arXiv:2312.03732)")
    dora: bool = setting(False, "also learn each output's magnitude (DoRA, arXiv:2402.09353)")
    init: str = setting("kaiming", "how A and B start: kaiming, or from W's largest singular "
                        "vectors (PiSSA, arXiv:2404.02948), exactly or by 16 quick rounds",
                        ("kaiming", "pissa", "pissa_niter_16"))
    rank_pattern: tuple[str, ...] = setting((), "other ranks for some linears: o_proj=8,'*.mlp.*=4'"
                                            " (the first that matches counts)")
    alpha_pattern: tuple[str, ...] = setting((), "other alphas for some linears, likewise")
    layers: tuple[str, ...] = setting((), "layers to adapt: 8-15,20 (default: all)")

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_AT_ONCE:
            raise UserError(f"rank is {self.rank}; expected 1 to {MOST_AT_ONCE} (try --rank 16)")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; expected at least 0 and less than 1")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise UserError(f"alpha is {self.alpha}; expected a positive number (try --alpha 32)")
        if not self.targets:
            raise UserError(f"targets is empty; name some of {', '.join(LINEARS)}")
        for key, kind, most in (("rank_pattern", int, MOST_AT_ONCE),
                                ("alpha_pattern", float, 1e30)):
            for text in getattr(self, key):
                pattern, _, value = text.rpartition("=")
                try:
                    good = pattern and 0 < kind(value) <= most
                except ValueError:
                    good = False
                if not good:
                    raise UserError(f"{key}: {text!r} is not PATTERN=NUMBER, such as down_proj=8")
        for text in self.layers:
            if not re.fullmatch(r"\d+(-\d+)?", text):
                raise UserError(f"layers: {text!r} is neither a number nor a range such as 8-15")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: what it reads, how it learns, what it writes."""

    model: str = setting("nano", "checkpoint folder or hub id; nano is the built-in base")
    data: str = setting("nano/train.jsonl", "files (JSON, JSON Lines, parquet), folders, "
                      "globs or hub datasets (owner/name:split), commas between; @0.5 after one "
                      "is its weight: how often an epoch sees each row")
    skip: bool = setting(False, "leave out rows that cannot be used, naming each, where otherwise "
                         "the first ends the run")
    eval_data: str = setting("", "held-out conversations (default: --eval-share of the data)")
    out: str = setting("", "run folder (default: runs/ and the data's name)")
    steps: int = setting(0, "optimizer steps (0: as --epochs says)")
    epochs: float = setting(1.0, "passes over the data")
    batch: int = setting(4, "rows of --length tokens in one forward pass")
    accumulate: int = setting(1, "forward passes in one optimizer step")
    length: int = setting(1024, "tokens in a row; conversations are packed into rows")
    pack: bool = setting(True, "several conversations in a row; --no-pack: one")
    lr: float = setting(2e-4, "peak learning rate")
    lr_ratio: float = setting(1.0, "λ: B learns this many times faster than A (LoRA+, "
                              "arXiv:2402.12354, which takes 16 and a lower --lr)")
    schedule: str = setting("cosine", "how the rate falls", ("cosine", "linear", "constant"))
    warmup: float = setting(0.03, "share of the steps in which the rate rises to its peak")
    weight_decay: float = setting(0.0, "AdamW's decay of A and B")
    clip: float = setting(1.0, "largest gradient norm (0: no clipping)")
    seed: int = setting(0, "of A, data order and dropout")
    dtype: str = setting("auto", "of the base: float32 or bfloat16; auto is bfloat16 on a GPU, "
                         "float32 on a CPU; float16 would overflow")
    device: str = setting("auto", "auto is the GPU where there is one; else cpu, cuda, cuda:1 …")
    compile: str = setting("auto", "compile the layers: auto does on a GPU, where the first step "
                           "then takes a minute and the others less", ("auto", "on", "off"))
    recompute: str = setting("none", "what backward makes again rather than keep, for less memory "
                             "and more time: cheap (norms and GELU), all (a layer at a time), or "
                             "offload (all, and what is kept waits in the host's memory)",
                             ("none", "cheap", "all", "offload"))
    train_on: str = setting("assistant", "what carries loss: assistant (all that the model writes),"
                            " tool_call, or kinds such as think,tool_call,end")
    dialect: str = setting("hermes", "how tools and calls are written",
                           ("hermes", "mistral", "functiongemma"))
    new_tokens: str = setting("append", "where new tokens' rows go: after the vocabulary, or in "
                              "reserved <unusedN> slots", ("append", "reserved"))
    eval_every: int = setting(0, "steps between looks at the held-out loss (0: ten in a run)")
    eval_share: float = setting(0.05, "share of the data held out where --eval-data is not given")
    eval_calls: int = setting(0, "held-out conversations answered for real before and after, to "
                              "compare their tool calls (0: none)")
    save_every: int = setting(0, "steps between checkpoints (0: only at the end and on Ctrl-C)")
    merge: bool = setting(False, "also write the merged model, in the hub's layout")

    def __post_init__(self) -> None:
        def within(low: int, high: int, *names: str) -> None:
            for name in names:
                value = getattr(self, name)
                if not low <= value <= high:
                    raise UserError(f"{name} is {value}; expected {low} to {high}")

        check_dtype(self.dtype)
        within(1, MOST_AT_ONCE, "batch", "accumulate")
        within(8, MOST_LENGTH, "length")
        within(0, 2**63 - 1, "steps", "epochs", "lr", "lr_ratio", "warmup", "weight_decay", "clip",
                 "eval_every", "eval_share", "eval_calls", "save_every", "seed")
        for name in ("warmup", "eval_share"):
            if getattr(self, name) >= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is a share, less than 1")
        if not self.steps and not self.epochs:
            raise UserError("steps and epochs are both 0; there is nothing to train")


@dataclass(frozen=True)
class GenerateConfig:
    """How text is drawn from the model."""

    max_new: int = setting(256, "most tokens to write in one turn")
    temperature: float = setting(0.0, "0 takes the likeliest token; 1 draws as the model says")
    top_k: int = setting(0, "draw only from the k likeliest tokens (0: all)")
    top_p: float = setting(1.0, "draw only from the likeliest tokens that sum to this share")
    seed: int = setting(0, "of the draws")
    constrained: bool = setting(False, "only calls that can be read and fit the tools' schemas "
                                "(but for patterns, lengths and ranges of floats)")

    def __post_init__(self) -> None:
        if self.max_new < 1:
            raise UserError(f"max_new is {self.max_new}; expected at least 1")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; expected 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected more than 0 and at most 1")


# --- flags ----------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, as everything here does, and not after its usage.

    `run_command` prints the UserError.
    """

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help lists what there "
                        "is")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def add_flags(parser: argparse.ArgumentParser, *classes: type, only: tuple[str, ...] = ()) -> None:
    """Gives `parser` a flag for every field of the dataclasses (or only for those named)."""
    for cls in classes:
        for item in dataclasses.fields(cls):
            if only and item.name not in only:
                continue
            flag, default = "--" + item.name.replace("_", "-"), item.default
            text = item.metadata["help"].replace("%", "%%")
            if isinstance(default, bool):
                parser.add_argument(flag, help=text, default=argparse.SUPPRESS,
                                    action=argparse.BooleanOptionalAction)
                continue
            shown = ",".join(default) if isinstance(default, tuple) else default
            if shown not in ("", 0) and "default:" not in text:
                text += f" (default: {shown})"
            parser.add_argument(
                flag, help=text, default=argparse.SUPPRESS, choices=item.metadata["choices"],
                type=_words if isinstance(default, tuple) else type(default),
                metavar=None if item.metadata["choices"] else item.name.split("_")[-1].upper())


def from_flags(cls: type, flags: argparse.Namespace, settings: dict | None = None):
    """The dataclass that the flags ask for, over `settings` (of a file), over its own defaults."""
    names = {item.name for item in dataclasses.fields(cls)}
    chosen = {**(settings or {}), **vars(flags)}
    return cls(**{name: value for name, value in chosen.items() if name in names})


def read_settings(path: str | Path, *classes: type) -> dict:
    """Settings from a JSON file, as `config.json` of a run folder holds them, checked by type.

    Raises UserError naming the file and the key that no dataclass has, whose type is wrong, or
    whose value the dataclass refuses.
    """
    raw = read_json(path, linked=True)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object of settings")
    fields = {item.name: item for cls in classes for item in dataclasses.fields(cls)}
    settings = {}
    for key, value in raw.items():
        if key not in fields:
            raise UserError(f"{path}: unknown setting {key!r}; known: {', '.join(fields)}")
        default, choices = fields[key].default, fields[key].metadata["choices"]
        if key == "recompute" and isinstance(value, bool):  # as runs wrote it before it had steps
            value = "all" if value else "none"
        if isinstance(default, tuple) and isinstance(value, list) and all(
                isinstance(word, str) for word in value):
            value = tuple(value)
        if type(default) is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if type(value) is not type(default) or (choices and value not in choices):
            wanted = " or ".join(choices) if choices else type(default).__name__
            raise UserError(f"{path}: {key} is {value!r}; expected {wanted}")
        settings[key] = value
    try:
        for cls in classes:
            from_flags(cls, argparse.Namespace(), settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return settings
