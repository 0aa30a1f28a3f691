"""Adapters in peft's layout, and merged models in the hub's; every write whole or not at all.

    adapter/                    adapter_config.json, adapter_model.safetensors    peft's two files
                                minilora.json       what has no place there: dialect, tokens, base
                                tokenizer.model …   the tokenizer that knows the new tokens
    merged/                     a plain model
    base/ and adapter/          the base with the new rows in place, and what is left of the adapter
"""

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.chat import chat_template, stop_ids
from minilora.config import GemmaConfig, LoraConfig, UserError
from minilora.data import Example
from minilora.dialects import DIALECTS
from minilora.files import (
    FORMAT,
    check_replaceable,
    current,
    read_object,
    read_own,
    read_tensors,
    replacing_folder,
    unchanged,
    write_blocks,
    write_json,
    write_tensors,
)
from minilora.lora import LoRALinear, adapted, attach, is_finite, row_blocks, trainable
from minilora.loss import CHUNK
from minilora.model import Gemma
from minilora.patterns import chosen, numbers
from minilora.tokenizer import FILES as TOKENIZER_FILES
from minilora.tokenizer import Tokenizer
from minilora.weights import checkpoint_name, load_model, locate

SHARD_BYTES = 4 * 10**9  # most bytes of one file of a merged model

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "minilora.json", "README.md",
                 *TOKENIZER_FILES)
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors",
               "model.safetensors.index.json", "model-*-of-*.safetensors", "README.md",
               *TOKENIZER_FILES)


# --- the base -------------------------------------------------------------------------------------

def _base_parameters(model: Gemma) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint of the plain model has."""
    return {name: parameter for name, parameter in model.named_parameters()
            if "lora_" not in name and name != "embed_tokens.rows"}


def fingerprint(model: Gemma) -> dict:
    """What tells one base from another: its shape, and a hash over the first 1,024 numbers of every
    tensor, the first of each of its rows, so that one row of another kind is seen, and some 4,096
    from all over it.

    Taken in bfloat16, so that it is the same whichever dtype the base is loaded in.
    """
    digest = hashlib.sha256()
    for name, parameter in _base_parameters(model).items():
        rows = parameter.detach().view(len(parameter), -1)  # of a vector: its numbers
        numbers = rows.flatten()
        apart = len(numbers) // 4096 | 1  # odd, so that no even width has them all in a few columns
        for part in (numbers[:1024], rows[:, 0], numbers[::apart]):
            part = part.to("cpu", torch.bfloat16).contiguous()
            digest.update(name.encode() + part.view(torch.uint8).numpy().tobytes())
    config = model.config
    return {"model_type": config.model_type, "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers,
            "sha256": digest.hexdigest()}


def check_base(stored: dict, model: Gemma, path: Path, base: str) -> None:
    """Refuses a model that is not the one whose fingerprint was stored."""
    for key, value in fingerprint(model).items():
        if stored.get(key) != value:
            what = "other weights" if key == "sha256" else f"{key} {stored.get(key)}, not {value}"
            raise UserError(f"{path}: belongs to another base, {base} ({what}); load that one "
                            "with --model")


def check_unmerged(model: Gemma) -> None:
    if any(module.merged for module in adapted(model).values()):
        raise UserError("the model is merged: its base is no longer the one that the adapter "
                        "belongs to; save before merging, or unmerge")


def _check_tokens(model: Gemma, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer with new tokens for which the model has no row."""
    for token, i in tokenizer.new_tokens.items():
        if i >= model.embed_tokens.num_embeddings:
            raise UserError(f"{token} has id {i}, but the model has "
                            f"{model.embed_tokens.num_embeddings} rows; load the tokenizer and the "
                            "adapter that belong together")


# --- adapters -------------------------------------------------------------------------------------

_PEFT = "base_model.model."  # peft's names: this, and the checkpoint's name of the module
_ROWS = _PEFT + checkpoint_name("embed_tokens.token_adapter.trainable_tokens_delta")
# Keys of adapter_config.json that are read here, and keys that change no output. With any other
# that is set, the adapter computes something else than LoRALinear does.
_READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora",
         "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
         "layers_to_transform", "layers_pattern", "trainable_token_indices", "init_lora_weights"}
_WITHOUT_EFFECT = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode",
                   "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying",
                   "runtime_config"}
# Ways to start that leave W as it is. The others (pissa, olora, …) take A and B out of W, and peft
# writes them with this key unless it is told to convert them to plain LoRA.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def save_adapter(model: Gemma, tokenizer: Tokenizer, folder: str | Path, base: str,
                 dialect: str = "hermes") -> None:
    """Writes the model's adapter as a folder that peft reads, and that minilora reads strictly.

    `base`: folder or hub id of the base model. The rows of new tokens go in as peft's trainable
    tokens, whose user has to make room for appended ones with `resize_token_embeddings`. The names
    and keys are those of peft 0.21 (`utils/save_and_load.py`, `tuners/lora/config.py`); its
    "delta" of trainable tokens holds the rows themselves (`tuners/trainable_tokens/layer.py`).
    Raises UserError where there is no adapter, where it is merged, and where the disk refuses.
    """
    modules, embedding = adapted(model), model.embed_tokens
    if not modules:
        raise UserError("nothing to save: this model has no adapter attached")
    if Path(base).is_dir():  # so that the adapter finds it from any working directory
        base = Path(base).resolve()
    check_unmerged(model)
    _check_tokens(model, tokenizer)
    tensors = {_peft_name(name, key): tensor for name, module in modules.items()
               for key, tensor in _saved(module).items()}
    rows = None
    if embedding.rows is not None:
        tensors[_ROWS], rows = embedding.rows, {"embed_tokens": embedding.row_ids.tolist()}
    first = next(iter(modules.values()))  # `attach` gives all the same, but for rank and alpha
    ranks = {checkpoint_name(name): len(module.pair()[0]) for name, module in modules.items()}
    alphas = {checkpoint_name(name): _saved_alpha(module) for name, module in modules.items()}
    rank, alpha = (statistics.mode(numbers.values()) for numbers in (ranks, alphas))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "inference_mode": True, "r": rank, "lora_alpha": alpha,
        "rank_pattern": {name: number for name, number in ranks.items() if number != rank},
        "alpha_pattern": {name: number for name, number in alphas.items() if number != alpha},
        "lora_dropout": first.dropout, "target_modules": _target_modules(model), "bias": "none",
        "use_rslora": first.rslora, "use_dora": first.lora_magnitude is not None,
        "fan_in_fan_out": False, "modules_to_save": None, "trainable_token_indices": rows,
        "init_lora_weights": True}
    extra = {"format": FORMAT, "dialect": dialect, "base": str(base),
             "mode": "reserved" if embedding.reserved else "append",
             "tokens": tokenizer.new_tokens, "fingerprint": fingerprint(model)}
    with replacing_folder(Path(folder), ADAPTER_FILES) as new:
        write_tensors(new / "adapter_model.safetensors", tensors)
        write_json(new / "adapter_config.json", config)
        write_json(new / "minilora.json", extra)
        tokenizer.save(new, chat_template(dialect))


def _saved(module: LoRALinear) -> dict[str, Tensor]:
    """An adapter's tensors by the last part of peft's names, PiSSA's as plain LoRA of rank 2 r."""
    A, B = module.pair()
    saved = {"lora_A.weight": A, "lora_B.weight": B}
    if module.lora_magnitude is not None:
        saved["lora_magnitude_vector"] = module.lora_magnitude
    return saved


def _saved_alpha(module: LoRALinear) -> int | float:
    """The alpha with which the saved pair has the module's scaling."""
    wider = len(module.pair()[0]) / module.rank  # 2 with PiSSA, else 1
    alpha = module.alpha * (math.sqrt(wider) if module.rslora else wider)
    return int(alpha) if alpha == int(alpha) else alpha  # some of peft's readers insist on an int


def _target_modules(model: Gemma) -> list[str]:
    """The adapted modules as peft finds them: `q_proj` for all of that name, or whole names."""
    plain = {name.rpartition(".")[2] for name, module in model.named_modules()
             if isinstance(module, nn.Linear)}
    return list(dict.fromkeys(
        checkpoint_name(name) if (last := name.rpartition(".")[2]) in plain else last
        for name in adapted(model)))


def _adapter_folder(folder: str | Path) -> Path:
    """The adapter folder that a run folder holds or `folder` is."""
    given = Path(folder)
    inner = current(given / "adapter")
    folder = inner if inner.is_dir() else current(given)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{given}: no adapter there (no adapter_config.json); give a run folder of "
                        "train.py, or an adapter folder")
    return folder


def adapter_base(folder: str | Path) -> str:
    """The base model, a folder or hub id, of the adapter in a run folder or an adapter folder."""
    path = _adapter_folder(folder) / "adapter_config.json"
    base = read_object(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: does not name its base model; give it as --model")
    return base


def load_adapter(model: Gemma, tokenizer: Tokenizer, folder: str | Path) -> dict:
    """Puts the adapter of a run folder or an adapter folder, peft's included, on its base.

    Attaches the LoRALinears, adds the rows and gives the tokenizer the new tokens (peft's own
    adapters have no names for theirs). Returns {"dialect": …, "base": …}. Raises UserError, with
    the model unchanged, for an adapter of another base, for tensors that are missing, unexpected
    or misshapen, and for what LoRALinear does not compute (biases, modules_to_save, aLoRA …).
    """
    folder = _adapter_folder(folder)
    if adapted(model) or model.embed_tokens.rows is not None:
        raise UserError(f"{folder}: the model has an adapter already; load the base anew")
    config_path, own_path = folder / "adapter_config.json", folder / "minilora.json"
    with unchanged(folder, ADAPTER_FILES[:3]):  # which are what is read
        config = read_object(config_path)
        base = str(config.get("base_model_name_or_path") or "its base")
        own = {"dialect": "hermes", "tokens": {}, "mode": "append"}
        if own_path.exists():
            own = read_own(own_path, dialect=str, tokens=dict, mode=str, fingerprint=dict)
            check_base(own["fingerprint"], model, own_path, base)
            if own["dialect"] not in DIALECTS:
                raise UserError(f"{own_path}: dialect is {own['dialect']!r}; expected one of "
                                f"{', '.join(DIALECTS)}")
        lora = _read_lora(config, config_path, model)
        ids = _read_row_ids(config, config_path, model)

        shapes = {_ROWS: [len(ids), model.config.hidden_size]} if ids else {}
        ranks = dict(text.split("=") for text in lora.rank_pattern)
        for name in lora.targets:
            out_features, in_features = model.get_submodule(name).weight.shape
            rank = int(ranks.get(name, lora.rank))
            shapes[_peft_name(name, "lora_A.weight")] = [rank, in_features]
            shapes[_peft_name(name, "lora_B.weight")] = [out_features, rank]
            if lora.dora:
                shapes[_peft_name(name, "lora_magnitude_vector")] = [out_features]
        tensors = read_tensors(folder / "adapter_model.safetensors", shapes,
                               f"is {base} the base that is loaded, and did peft save the adapter "
                               "with save_embedding_layers=False?")

    size, tokens = len(model.embed_tokens.weight), own["tokens"]
    try:
        got = tokenizer.add_tokens(tokens, own["mode"], size if own["mode"] == "append" else None)
    except UserError as error:
        raise UserError(f"{own_path}: {error}") from None
    for i, (token, row) in zip(got, tokens.items(), strict=True):
        if i != row or i >= size + len(ids):
            raise UserError(f"{own_path}: token {token} is row {row} of the model, but has id {i} "
                            f"in this tokenizer; take the one of {base}")
    attach(model, lora)
    with torch.no_grad():
        for name, module in adapted(model).items():
            for key, tensor in _saved(module).items():
                tensor.copy_(tensors[_peft_name(name, key)])
    if ids:
        order = sorted(range(len(ids)), key=ids.__getitem__)
        model.embed_tokens.add_rows(sorted(ids), tensors[_ROWS][order])
    return {"dialect": own["dialect"], "base": base}


def open_model(source: str | None, adapter: str | Path | None, device: torch.device,
               dtype: torch.dtype) -> tuple[Gemma, Tokenizer, str]:
    """A base, with its adapter or without, or a merged model: model, tokenizer, dialect.

    Without a source the adapter's own base is taken. The dialect is the adapter's; a model without
    one has the dialect whose tokens its tokenizer knows, if any, else the first.
    """
    source = source or adapter_base(adapter)
    model, tokenizer = load_model(source, dtype, device), Tokenizer.load(source)
    if adapter:
        return model, tokenizer, load_adapter(model, tokenizer, adapter)["dialect"]
    spoken = [name for name in DIALECTS if knows_dialect(tokenizer, name)]
    return model, tokenizer, (spoken or list(DIALECTS))[0]


def knows_dialect(tokenizer: Tokenizer, dialect: str) -> bool:
    """Whether the tokenizer has all tokens of a dialect."""
    return all(map(tokenizer.knows, DIALECTS[dialect].tokens))


def _peft_name(module: str, key: str) -> str:
    return f"{_PEFT}{checkpoint_name(module)}.{key}"


def _read_lora(config: dict, path: Path, model: Gemma) -> LoraConfig:
    """What an adapter_config.json asks for, its targets the whole names of this model's linears."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}; minilora reads LORA")
    for key, value in config.items():
        foreign = key not in _READ | _WITHOUT_EFFECT and value and value != "none"
        if foreign or (key == "init_lora_weights" and value not in _PLAIN_STARTS):
            raise UserError(f"{path}: {key} is {value!r}, which minilora's LoRA does not have; "
                            "merge the adapter with peft and load the merged model")
    for key in ("r", "lora_alpha", "lora_dropout"):
        number = config.get(key)
        if type(number) not in ((int,) if key == "r" else (int, float)) or abs(number) >= 2**63:
            raise UserError(f"{path}: {key} is {number!r}; expected a number")
    for key in ("use_rslora", "use_dora"):
        if type(config.get(key, False)) is not bool:
            raise UserError(f"{path}: {key} is {config[key]!r}; expected true or false")
    linears = {checkpoint_name(name): name for name, module in model.named_modules()
               if isinstance(module, nn.Linear)}
    try:
        names = chosen(config, [*linears])
    except (TypeError, ValueError):
        names = []
    if not names:
        asked = ", ".join(f"{key} {config[key]!r}" for key in (
            "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
            if config.get(key))
        raise UserError(f"{path}: {asked or 'no target_modules'}: chooses no linear of a "
                        f"{model.config.model_type}; is it the adapter of another model?")
    patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        try:
            patterns[key] = tuple(f"{linears[name]}={number}" for name, number in
                                  numbers(config.get(key) or {}, names).items())
        except (TypeError, ValueError):
            raise UserError(f"{path}: {key} is {config[key]!r}; expected an object of regular "
                            "expressions and numbers") from None
    try:
        return LoraConfig(config["r"], float(config["lora_alpha"]), float(config["lora_dropout"]),
                          tuple(linears[name] for name in names), config.get("use_rslora", False),
                          config.get("use_dora", False), **patterns)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_row_ids(config: dict, path: Path, model: Gemma) -> list[int]:
    """The ids of the trained rows, in the file's order."""
    ids, size = config.get("trainable_token_indices") or [], len(model.embed_tokens.weight)
    if isinstance(ids, dict) and len(ids) == 1:
        (name, ids), = ids.items()
        ids = ids if name.rpartition(".")[2] == "embed_tokens" else None
    good = isinstance(ids, list) and all(type(i) is int for i in ids)
    if not good or sorted(ids) not in (list(range(size, size + len(ids))),
                                       sorted({i % size for i in ids})):
        raise UserError(f"{path}: trainable_token_indices is {config['trainable_token_indices']}; "
                        f"on a base of {size} rows minilora takes {size}, {size + 1}, … or ids "
                        "below, of embed_tokens alone")
    return ids


# --- merged models --------------------------------------------------------------------------------

def export_merged(model: Gemma, tokenizer: Tokenizer, base: str | Path, out: str | Path,
                  dialect: str = "hermes", lora: bool = True) -> None:
    """Writes the model, its adapter merged, as a plain one in the hub's layout to folder `out`.

    `base`: folder or hub id of the base model, for the other fields of its config.json and
    generation_config.json. The weights are written in the model's dtype, W + BA added in float32
    and rounded once, a few rows at a time; the model stays as it is, and no second one is made. One
    that is merged already, or has no adapter, is written as it is. Of an image-text Gemma 3 the
    text part is written, as a text model. `lora=False` leaves the adapters out and puts only the
    new rows in place. Raises UserError for NaN or Inf, for a base that is not the model's, and
    where the disk refuses.
    """
    base, out = locate(base, ("config.json", "generation_config.json")), Path(out)
    if out.resolve() == base.resolve():
        raise UserError(f"{out}: is the base itself; choose another folder for the merged model")
    raw = read_object(base / "config.json")
    if GemmaConfig.from_dict(raw, str(base / "config.json")) != model.config:
        raise UserError(f"{base / 'config.json'}: describes another model than the one to export; "
                        "give the folder of its base")
    _check_tokens(model, tokenizer)
    generation = base / "generation_config.json"
    ids = {"bos_token_id": tokenizer.bos, "pad_token_id": tokenizer.pad,
           "eos_token_id": list(stop_ids(tokenizer, dialect))}
    with replacing_folder(out, MODEL_FILES) as new:
        _write_shards(new, model, lora)
        write_json(new / "config.json", _text_config(raw, model) | ids)
        write_json(new / "generation_config.json",
                    (read_object(generation) if generation.exists() else {}) | ids)
        tokenizer.save(new, chat_template(dialect))


def _text_config(raw: dict, model: Gemma) -> dict:
    """The base's config.json as it is true of the merged model."""
    if raw["model_type"] == "gemma3":  # image-text: its text part alone is written
        raw = raw["text_config"]
    architecture = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM",
                    "gemma3_text": "Gemma3ForCausalLM"}[model.config.model_type]
    key = "dtype" if "dtype" in raw else "torch_dtype"  # transformers' name for it, since 4.56
    return {**raw, "model_type": model.config.model_type, "architectures": [architecture],
            "vocab_size": model.embed_tokens.num_embeddings, "tie_word_embeddings": True,
            key: str(model.embed_tokens.weight.dtype).removeprefix("torch.")}


def _write_shards(folder: Path, model: Gemma, lora: bool) -> None:
    """Writes the plain model's tensors, a file at a time: one file, or several and an index."""
    shapes = {name: list(parameter.shape) for name, parameter in _base_parameters(model).items()}
    shapes["embed_tokens.weight"][0] = model.embed_tokens.num_embeddings
    dtype = model.embed_tokens.weight.dtype
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    for n, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else (
            f"model-{n:05}-of-{len(shards):05}.safetensors")
        tensors = {checkpoint_name(name): shapes[name] for name in names}
        write_blocks(folder / file, dtype, tensors, (
            block for name in names for block in _merged(model, name, lora)))
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


@torch.no_grad()
def _merged(model: Gemma, name: str, lora: bool = True) -> Iterator[Tensor]:
    """A parameter as the merged model has it, in the model's dtype, some rows at a time, on the
    CPU; the model stays as it is. Raises UserError for NaN or Inf.
    """
    module = model.get_submodule(name.rpartition(".")[0])
    for rows in row_blocks(module.weight):
        if isinstance(module, LoRALinear) and lora and not module.merged:
            block = module.merged_weight(rows)  # [.., in]
        else:
            block = module.weight[rows]
        if module is model.embed_tokens and module.reserved:
            inside = (module.row_ids >= rows.start) & (module.row_ids < rows.stop)
            block = block.index_copy(0, module.row_ids[inside] - rows.start,
                                     module.rows[inside].to(block.dtype))  # [.., D]
        yield _finite(block, name)
    if module is model.embed_tokens and module.appended:
        yield _finite(module.rows.to(module.weight.dtype), name)  # [n, D]


def _finite(block: Tensor, name: str) -> Tensor:
    if not is_finite(block):
        raise UserError(f"{checkpoint_name(name)} holds NaN or Inf once merged; not exported. Go "
                        "back to an earlier checkpoint of the run, or load the base in bfloat16 or "
                        "float32")
    return block.cpu()


def export_extended(model: Gemma, tokenizer: Tokenizer, base: str | Path, out: str | Path,
                    dialect: str = "hermes") -> None:
    """Writes `out`/base, the base with the new rows in place, and `out`/adapter, which is then
    linear only: for servers that take LoRA, but no rows of the embedding (vLLM).

    Both load like any other base and adapter, no table resized; the model stays as it is. Arguments
    as for `export_merged`, which writes the first; raises what it and `save_adapter` raise, and
    UserError where the adapter has no rows, holds NaN or Inf, or `out` holds anything else than
    such a pair.
    """
    out = Path(out).resolve()
    check_unmerged(model)
    if model.embed_tokens.rows is None:
        raise UserError("the adapter has no rows of new tokens: its base needs no extending, and "
                        "servers take it as it is")
    for name, parameter in trainable(model).items():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{name} holds NaN or Inf; not exported. Go back to an earlier "
                            "checkpoint of the run")
    if (out / "adapter").exists() and adapter_base(out / "adapter") != str(out / "base"):
        raise UserError(f"{out / 'adapter'}: is the adapter of another base and would be lost; "
                        "choose another folder")
    if Path(base).resolve() == out / "base":
        raise UserError(f"{base}: is the base itself; choose another folder for the extended one")
    for part, files in (("base", MODEL_FILES), ("adapter", ADAPTER_FILES)):
        check_replaceable(out / part, files)
    with replacing_folder(out, ("base", "adapter")) as new:  # both at once, as they go together
        export_merged(model, tokenizer, base, new / "base", dialect, lora=False)
        table = torch.cat([*_merged(model, "embed_tokens.weight")])  # [V', D]
        with torch.device("meta"):  # what was just written, all but the table the model's own
            extended = Gemma(replace(model.config, vocab_size=len(table)))
        extended.embed_tokens.weight = nn.Parameter(table, requires_grad=False)
        extended.layers, extended.norm = model.layers, model.norm
        save_adapter(extended, tokenizer, new / "adapter", str(out / "base"), dialect)


@torch.no_grad()
def compare_logits(model: Gemma, written: Gemma, examples: Sequence[Example],
                   on_example: Callable[[], object] = lambda: None) -> dict[str, float]:
    """How far the logits of `written` are from the model's, over every token of the examples.

    Returns tokens, argmax_agreement (the share of tokens for which both find the same next token
    the likeliest), largest_change and largest_logit, both absolute. A conversation is run by
    itself, so nothing is padding, and meets the vocabulary CHUNK positions at a time. Raises
    UserError where a logit is NaN or Inf.
    """
    device = model.embed_tokens.weight.device
    models = (model.eval(), written.eval())  # no dropout
    tokens, same, change, largest = 0, 0, 0.0, 0.0
    for example in examples:
        hidden = [each.hidden_states(example.ids[None].to(device))[0] for each in models]  # [T, D]
        for start in range(0, len(example), CHUNK):
            ours, theirs = (each.logits(states[start:start + CHUNK])                    # [t, V']
                            for each, states in zip(models, hidden, strict=True))
            gap, top = (ours - theirs).abs().max().item(), ours.abs().max().item()
            if not math.isfinite(gap):
                raise UserError(f"{example.source}: its logits are NaN or Inf, in the model or in "
                                "what was written; go back to an earlier checkpoint of the run")
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            change, largest = max(change, gap), max(largest, top)
        tokens += len(example)
        on_example()
    return {"tokens": tokens, "argmax_agreement": same / tokens, "largest_change": change,
            "largest_logit": largest}
