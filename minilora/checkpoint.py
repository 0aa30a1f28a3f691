"""Adapters in peft's layout, and merged models in the hub's; every write whole or not at all.

    adapter/                    adapter_config.json, adapter_model.safetensors    peft's two files
                                minilora.json       what has no place there: dialect, tokens, base
                                tokenizer.model …   the tokenizer that knows the new tokens
    merged/                     a plain model
"""

import hashlib
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.chat import DIALECTS, chat_template, get_dialect
from minilora.config import GemmaConfig, LoraConfig, UserError
from minilora.files import (
    FORMAT,
    current,
    read_object,
    read_own,
    read_tensors,
    replacing_folder,
    write_json,
    write_tensors,
)
from minilora.lora import LoRALinear, adapted, attach
from minilora.model import Gemma
from minilora.tokenizer import FILES as TOKENIZER_FILES
from minilora.tokenizer import Tokenizer
from minilora.weights import checkpoint_name, load_model, locate

SHARD_BYTES = 4 * 10**9  # most bytes of one file of a merged model

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "minilora.json", "README.md",
                  *TOKENIZER_FILES)
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors",
                "model.safetensors.index.json", "model-*-of-*.safetensors", *TOKENIZER_FILES)


# --- the base -------------------------------------------------------------------------------------

def _base_parameters(model: Gemma) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint of the plain model has."""
    return {name: parameter for name, parameter in model.named_parameters()
            if "lora_" not in name and name != "embed_tokens.rows"}


def fingerprint(model: Gemma) -> dict:
    """What tells one base from another: its shape, and a hash over the start of every tensor.

    Taken in bfloat16, so that it is the same whichever dtype the base is loaded in.
    """
    digest = hashlib.sha256()
    for name, parameter in _base_parameters(model).items():
        start = parameter.detach().flatten()[:1024].to("cpu", torch.bfloat16)
        digest.update(name.encode() + start.view(torch.uint8).numpy().tobytes())
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
         "target_modules", "trainable_token_indices", "init_lora_weights"}
_WITHOUT_EFFECT = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode",
                   "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying",
                   "runtime_config"}
# Ways to start that leave W as it is. The others (pissa, olora, …) take A and B out of W.
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
    tensors = {}
    for name, module in modules.items():
        for key in ("lora_A", "lora_B"):
            tensors[_peft_name(name, key)] = getattr(module, key)
    rows = None
    if embedding.rows is not None:
        tensors[_ROWS], rows = embedding.rows, {"embed_tokens": embedding.row_ids.tolist()}
    first = next(iter(modules.values()))  # `attach` gives all of them the same settings
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "inference_mode": True, "r": first.rank,
        # peft calls it an int, and some of its readers insist.
        "lora_alpha": int(first.alpha) if first.alpha == int(first.alpha) else first.alpha,
        "lora_dropout": first.dropout, "target_modules": _target_modules(model), "bias": "none",
        "use_rslora": first.rslora, "use_dora": False, "fan_in_fan_out": False,
        "modules_to_save": None, "trainable_token_indices": rows, "init_lora_weights": True}
    extra = {"format": FORMAT, "dialect": dialect, "base": str(base),
             "mode": "reserved" if embedding.reserved else "append",
             "tokens": tokenizer.new_tokens, "fingerprint": fingerprint(model)}
    with replacing_folder(Path(folder), _ADAPTER_FILES) as new:
        write_tensors(new / "adapter_model.safetensors", tensors)
        write_json(new / "adapter_config.json", config)
        write_json(new / "minilora.json", extra)
        tokenizer.save(new, chat_template(dialect))


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
    or misshapen, and for what LoRALinear does not compute (DoRA, modules_to_save, rank_pattern …).
    """
    folder = _adapter_folder(folder)
    if adapted(model) or model.embed_tokens.rows is not None:
        raise UserError(f"{folder}: the model has an adapter already; load the base anew")
    config_path, own_path = folder / "adapter_config.json", folder / "minilora.json"
    config = read_object(config_path)
    base = str(config.get("base_model_name_or_path") or "its base")
    own = {"dialect": "hermes", "tokens": {}, "mode": "append"}
    if own_path.exists():
        own = read_own(own_path, dialect=str, tokens=dict, mode=str, fingerprint=dict)
        check_base(own["fingerprint"], model, own_path, base)
    get_dialect(own["dialect"])
    lora = _read_lora(config, config_path, model)
    ids = _read_row_ids(config, config_path, model)

    shapes = {_ROWS: [len(ids), model.config.hidden_size]} if ids else {}
    for name in lora.targets:
        out_features, in_features = model.get_submodule(name).weight.shape
        shapes[_peft_name(name, "lora_A")] = [lora.rank, in_features]
        shapes[_peft_name(name, "lora_B")] = [out_features, lora.rank]
    tensors = read_tensors(folder / "adapter_model.safetensors", shapes,
                            f"is {base} the base that is loaded, and did peft save the adapter "
                            "with save_embedding_layers=False?")

    size, tokens = len(model.embed_tokens.weight), own["tokens"]
    got = tokenizer.add_tokens(tokens, own["mode"], size if own["mode"] == "append" else None)
    for i, (token, row) in zip(got, tokens.items(), strict=True):
        if i != row or i >= size + len(ids):
            raise UserError(f"{own_path}: token {token} is row {row} of the model, but has id {i} "
                            f"in this tokenizer; take the one of {base}")
    attach(model, lora)
    with torch.no_grad():
        for name, module in adapted(model).items():
            module.lora_A.copy_(tensors[_peft_name(name, "lora_A")])
            module.lora_B.copy_(tensors[_peft_name(name, "lora_B")])
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
    return DIALECTS[dialect].tokens.keys() <= tokenizer.new_tokens.keys()


def _peft_name(module: str, key: str) -> str:
    return f"{_PEFT}{checkpoint_name(module)}.{key}.weight"


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
        if type(config.get(key)) not in ((int,) if key == "r" else (int, float)):
            raise UserError(f"{path}: {key} is {config.get(key)!r}; expected a number")
    targets = config.get("target_modules")
    try:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)
                 and _is_target(targets, checkpoint_name(name))]
    except (TypeError, AttributeError, re.error):
        names = []
    if not names:
        raise UserError(f"{path}: target_modules {targets!r} chooses no linear of a "
                        f"{model.config.model_type}; is it the adapter of another model?")
    try:
        return LoraConfig(config["r"], float(config["lora_alpha"]), float(config["lora_dropout"]),
                          tuple(names), bool(config.get("use_rslora")))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _is_target(targets: str | list[str], name: str) -> bool:
    """Whether peft adapts a module: `tuners/tuners_utils.py`, check_target_module_exists."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


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
                  dialect: str = "hermes") -> None:
    """Writes the model, its adapter merged, as a plain one in the hub's layout to folder `out`.

    `base`: folder or hub id of the base model, for the other fields of its config.json and
    generation_config.json. The weights are written in the model's dtype, W + BA added in float32
    and rounded once, one file's tensors at a time; the model stays as it is. One that is merged
    already, or has no adapter, is written as it is. Of an image-text Gemma 3 the text part is
    written, as a text model. Raises UserError for NaN or Inf, for a base that is not the model's,
    and where the disk refuses.
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
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.stop_ids),
           "pad_token_id": tokenizer.pad}
    with replacing_folder(out, _MODEL_FILES) as new:
        _write_shards(new, model)
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


def _write_shards(folder: Path, model: Gemma) -> None:
    """Writes the plain model's tensors, a file at a time: one file, or several and an index."""
    parameters = _base_parameters(model)
    sizes = {name: parameter.nbytes for name, parameter in parameters.items()}
    table = model.embed_tokens.weight
    sizes["embed_tokens.weight"] += model.embed_tokens.appended * table[0].nbytes
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    for n, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else (
            f"model-{n:05}-of-{len(shards):05}.safetensors")
        tensors = {checkpoint_name(name): _merged(model, name) for name in names}
        for name, tensor in tensors.items():
            if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # NaN is passed on by both
                raise UserError(f"{name} holds NaN or Inf once merged; not exported. Go back to an "
                                "earlier checkpoint of the run, or load the base in bfloat16 or "
                                "float32")
        write_tensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


@torch.no_grad()
def _merged(model: Gemma, name: str) -> Tensor:
    """A parameter as the merged model has it, in the model's dtype; the model stays as it is."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, LoRALinear) and not module.merged:
        return module.merged_weight()
    if module is not model.embed_tokens or module.rows is None:
        return module.weight
    rows = module.rows.to(module.weight.dtype)  # [n, D]
    if module.appended:
        return torch.cat([module.weight, rows])  # [V + n, D]
    return module.weight.index_copy(0, module.row_ids, rows)  # [V, D]
