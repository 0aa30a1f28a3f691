"""Safetensors shards to model and back, strict both ways; hub download.

    model.safetensors                 one file, or
    model.safetensors.index.json      which shard holds which tensor
    model-00001-of-00002.safetensors  …

The model is made without memory and every parameter is read into its place a block at a time, in
the target dtype and on the target device, so the host never holds a second copy, nor a first one of
a model that goes to the GPU. All headers are checked before the first number is read.
"""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import errors as hub
from torch import Tensor, nn

from minilora.config import GemmaConfig, UserError, builtin, check_dtype, check_file, read_json
from minilora.files import BLOCK, FLOATS, Stored, current, read_headers, torn, unchanged
from minilora.model import Gemma

FILES = ("config.json", "generation_config.json", "model.safetensors",
         "model.safetensors.index.json", "model-*.safetensors")

AGAIN = "download it again"

logger = logging.getLogger(__name__)

# --- names ----------------------------------------------------------------------------------------

# A model name is a checkpoint name less its prefix. The image-text layouts of Gemma 3 (4b, 12b,
# 27b) are that of their first files on the hub and that of transformers 5.
PREFIX = "model."
_PREFIXES = ("language_model.model.", "model.language_model.", PREFIX)
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")  # the embedding again, in some files
_VISION = ("vision_tower.", "multi_modal_projector.",
           "model.vision_tower.", "model.multi_modal_projector.")


def model_name(name: str) -> str | None:
    """The model's name of a checkpoint's tensor; None for a name with no known prefix."""
    return next((name.removeprefix(prefix) for prefix in _PREFIXES
                 if name.startswith(prefix)), None)


def checkpoint_name(name: str) -> str:
    """The name under which a tensor of the model is written: transformers' text-only layout."""
    return PREFIX + name


# --- folders and files ----------------------------------------------------------------------------

def locate(source: str | Path, allow: Sequence[str]) -> Path:
    """The folder that `source` names: a local one, `nano`, or a snapshot of a hub repository.

    From the hub only files that match one of the patterns `allow` are fetched, and what the cache
    has is not fetched again. Raises UserError where there is no such folder or repository, where
    its licence has not been accepted, and where the hub cannot be reached.
    """
    folder, name = current(builtin(source)), str(source)
    if name and folder.is_dir():
        return folder
    parts = name.split("/")
    if folder.exists() or name[:1] in "./~" or len(parts) != 2 or not all(parts):
        raise UserError(f"{name}: not a folder, and not a hub id of the form org/name such as "
                        "google/gemma-2-2b-it")
    return snapshot(name, allow)


def snapshot(name: str, allow: Sequence[str], kind: str = "model") -> Path:
    """The folder with the files of a hub repository (a model's or a dataset's) of some patterns.

    What the cache has is not fetched again. Raises UserError as `locate` does.
    """
    dataset = kind == "dataset"
    page = f"https://huggingface.co/{'datasets/' if dataset else ''}{name}"
    thing, form = (("file or folder", "org/name") if dataset else
                   ("folder", "org/name such as google/gemma-2-2b-it"))
    where = {"repo_type": "dataset"} if dataset else {}
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(allow), **where))
    except hub.HFValidationError:
        raise UserError(f"{name}: not a {thing}, and not a hub id of the form {form}") from None
    except hub.GatedRepoError:
        raise UserError(f"{name}: needs its licence accepted: do so on {page}, then set HF_TOKEN "
                        "to a token of that account or run `hf auth login`") from None
    except hub.RepositoryNotFoundError:
        raise UserError(f"{name}: no such {thing}, and no such repository at {page}; check the "
                        "name, and if it is private set HF_TOKEN or run `hf auth login`") from None
    except Exception as error:  # also its transport's own errors, other ones in every release
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        instead = "the name of a file" if dataset else "a folder that holds the checkpoint"
        raise UserError(f"{name}: not a {thing} here, and the hub could not be read ({reason}); go "
                        f"online, or pass {instead}") from None


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files of a folder, each with the tensors that the index places there (None: any)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() and index.exists():
        raise UserError(f"{folder}: has both {single.name} and {index.name}; delete the one that "
                        "is not the model")
    if single.exists():
        return {_inside(folder, single.name, folder): None}
    if not index.exists():
        loose = sorted(path.name for path in folder.glob("model-*.safetensors"))
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        raise UserError(f"{folder}: " + (
            f"has {loose[0]} but no {index.name}; download that too" if loose else
            f"has only pickled weights ({pickled[0]}), which can run code when they are read; "
            "convert them to safetensors" if pickled else
            f"has neither {single.name} nor {index.name}; pass the folder of a checkpoint"))
    raw = read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: expected an object with a weight_map; download it again")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(_inside(folder, shard, index, name), set()).add(name)
    return shards


def _inside(folder: Path, shard: object, source: Path, name: str = "") -> Path:
    """The path of a weight file, which must be a file of this folder and nothing beyond it."""
    where = f"{source}: {name}" if name else str(source)
    if not isinstance(shard, str) or not shard.endswith(".safetensors") or "\\" in shard or (
            Path(shard).name != shard):
        raise UserError(f"{where}: {shard!r} is not the name of a safetensors file in the folder; "
                        "download the index again")
    path = folder / shard
    if not os.path.isfile(path):
        raise UserError(f"{where}: the file {shard} is missing; download it again")
    check_file(path)
    return path


# --- a checkpoint's tensors -----------------------------------------------------------------------

def read_config(folder: Path) -> GemmaConfig:
    """The shape of the model in `folder`, from its config.json."""
    path = Path(folder) / "config.json"
    return GemmaConfig.from_dict(read_json(path), str(path))


def load_model(source: str | Path, dtype: torch.dtype = torch.bfloat16,
               device: torch.device | str = "cpu") -> Gemma:
    """The model in a folder or a hub repository, in `dtype` on `device`, all of it frozen.

    Raises UserError, which names file and tensor, unless the files hold exactly the tensors that
    config.json asks for, each once, in its shape, as unquantised floats. Left out are an lm_head
    that repeats the embedding, and the vision part of an image-text Gemma 3 (said in one line).
    What the files hold may be float16; `dtype` may not, as Gemma's activations overflow it.
    """
    if dtype == torch.float16:
        check_dtype("float16")
    folder = locate(source, FILES)
    with unchanged(folder, FILES):
        config = read_config(folder)
        with torch.device("meta"):
            model = Gemma(config)
        stored = _match(folder, model)
        for name, tensor in sorted(stored.items(), key=lambda item: (item[1].path, item[1].start)):
            value = torch.empty(tensor.shape, dtype=dtype, device=device)
            _read(tensor, value)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    return model


def placement(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """The device and dtype that the settings of these names mean.

    `auto` is the GPU where there is one, in bfloat16, else the CPU, in float32. Raises UserError
    for a device that is not there, and for float16, in which Gemma's activations overflow.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.empty(0, device=device).device
        if place.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device {device!r} cannot be used ({reason}); try --device cpu") from None
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    check_dtype(dtype)
    return place, getattr(torch, dtype)


def _read(tensor: Stored, place: Tensor) -> None:
    """Reads a tensor's numbers into `place`; where that has another dtype or device, by blocks.

    Read rather than mapped: pages of a map that were read stay resident, which looks, and counts,
    like a second copy.
    """
    dtype = FLOATS[tensor.dtype]
    straight = place.dtype == dtype and place.device.type == "cpu"
    step = BLOCK // dtype.itemsize
    block = torch.empty(0 if straight else min(step, place.numel()), dtype=dtype,
                        pin_memory=place.is_cuda)
    with open(tensor.path, "rb") as file:
        file.seek(tensor.start)
        for part in place.view(-1).split(step):
            memory = part if straight else block[:len(part)]
            if file.readinto(memory.view(torch.uint8).numpy()) < memory.nbytes:
                raise torn(tensor.path, f"it ends within {tensor.key}", AGAIN)
            if not straight:
                part.copy_(memory)


def _match(folder: Path, model: Gemma) -> dict[str, Stored]:
    """Where each parameter of `model` is stored, from the headers of the files alone."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    stored: dict[str, Stored] = {}
    heads, skipped = [], []
    for path, listed in _shards(folder).items():
        headers = {tensor.key: tensor for tensor in read_headers(path, AGAIN)}
        for key, tensor in headers.items():
            name = model_name(key)
            if model.config.model_type == "gemma3_text" and key.startswith(_VISION):
                skipped.append(key)
            elif key in _HEADS:
                heads.append(tensor)
            elif name in stored:
                raise UserError(f"{path}: {key} is also in {stored[name].path.name}, as "
                                f"{stored[name].key}; a tensor may come once: download both again")
            elif name not in shapes:
                raise UserError(f"{path}: {key} is no tensor of the {model.config.model_type} that "
                                "config.json describes; take both from the same model")
            elif tensor.dtype not in FLOATS:
                raise UserError(f"{path}: {key} is {tensor.dtype}, expected one of "
                                f"{', '.join(FLOATS)}; take a checkpoint that is not quantised")
            elif tensor.shape != shapes[name]:
                raise UserError(f"{path}: {key} has shape {tensor.shape}, expected {shapes[name]} "
                                "by config.json; take both from the same model")
            else:
                stored[name] = tensor
        for key in sorted(headers.keys() ^ (headers.keys() if listed is None else listed)):
            what = f"holds {key}, which the index does not place there" if key in headers else (
                f"lacks {key}, which the index places there")
            raise UserError(f"{path}: {what}; download the shards and their index again")
    if missing := [name for name in shapes if name not in stored]:
        raise UserError(f"{folder}: lacks {len(missing)} of the {len(shapes)} tensors that "
                        f"config.json asks for, {checkpoint_name(missing[0])} to begin with; "
                        "download it again, or take both from the same model")
    for head in heads:
        _check_tied(head, stored["embed_tokens.weight"])
    if skipped:
        logger.warning("%s: left out %d tensors of the vision part, %s to begin with",
                       folder, len(skipped), skipped[0])
    return stored


def _check_tied(head: Stored, table: Stored) -> None:
    """Refuses an lm_head that is not the embedding, byte for byte: Gemma's is tied."""
    size = math.prod(table.shape) * FLOATS[table.dtype].itemsize
    with open(head.path, "rb") as first, open(table.path, "rb") as second:
        first.seek(head.start)
        second.seek(table.start)
        same = (head.dtype, head.shape) == (table.dtype, table.shape) and all(
            first.read(n) == second.read(n)
            for n in (min(BLOCK, size - at) for at in range(0, size, BLOCK)))
    if not same:
        raise UserError(f"{head.path}: {head.key} is not the same as {table.key}; Gemma's output "
                        "projection is its embedding: merge or save the model tied")
