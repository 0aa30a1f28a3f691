"""All that a run needs to go on where it stopped, bit for bit.

    checkpoints/step-000120/    state.safetensors, state.json
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from minilora.checkpoint import check_base, check_unmerged, fingerprint
from minilora.config import LoraConfig, TrainConfig, UserError
from minilora.files import (
    FORMAT,
    read_own,
    read_tensors,
    replacing_folder,
    write_json,
    write_tensors,
)
from minilora.lora import trainable
from minilora.model import Gemma
from minilora.tokenizer import Tokenizer

# Settings that a run may go on with changed: where things are (base and data are known by what is
# in them), how far it goes, what it computes with and what else it writes. All others decide what
# it learns.
FREE = frozenset({"model", "data", "eval_data", "skip", "out", "steps", "epochs", "device",
                  "compile", "recompute", "eval_every", "eval_calls", "save_every", "merge"})

_STATE_FILES = ("state.safetensors", "state.json")
_STEP = re.compile(r"step-(\d+)|\.step-(\d+)\.old")  # the latter as in files.py: being replaced
_SETTINGS = ("lr", "betas", "eps", "weight_decay")  # of a parameter group, kept with its moments


def save_state(folder: str | Path, step: int, model: Gemma, optimizer: torch.optim.Optimizer,
               progress: dict) -> Path:
    """Writes what a run needs to go on, bit for bit, as `folder`/step-000120; returns that path.

    That is what is trained (float32), the optimizer's moments, torch's random states, and
    `progress`, any JSON object. Then deletes other checkpoints but the one before: older ones, and
    those of later steps, which a run that went back to this one has abandoned.
    """
    check_unmerged(model)
    names = {parameter: name for name, parameter in trainable(model).items()}
    tensors = {f"model.{name}": parameter for parameter, name in names.items()}
    tensors |= {f"start.{name}": start for name, start in _starts(model).items()}
    tensors |= {f"optimizer.{names[parameter]}.{key}": value
                for parameter, state in optimizer.state.items() for key, value in state.items()}
    tensors |= {f"rng.{device}": state for device, state in _random_states().items()}
    groups = [{key: group[key] for key in _SETTINGS}
              | {"names": [names[parameter] for parameter in group["params"]]}
              for group in optimizer.param_groups]
    folder = Path(folder)
    path = folder / f"step-{step:06}"
    with replacing_folder(path, _STATE_FILES) as new:
        write_tensors(new / "state.safetensors", tensors)
        write_json(new / "state.json", {
            "format": FORMAT, "step": step, "fingerprint": fingerprint(model), "groups": groups,
            "sha256": _sha256(new / "state.safetensors"),
            "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "progress": progress})
    states = _states(folder)
    kept = {step, max((other for other in states if other < step), default=step)}
    # What cannot be deleted now is tried again after the next save.
    for trash in {*folder.glob(".step-*")} - {*states.values()}:  # of processes that were killed
        with contextlib.suppress(OSError):
            shutil.rmtree(trash) if trash.is_dir() else trash.unlink()
    for other in states.keys() - kept:  # renamed first, so that none is ever half there
        with contextlib.suppress(OSError):
            shutil.rmtree(states[other].rename(folder / f".step-{other:06}.new"))
    return path


def latest_state(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's checkpoints folder, if there is one."""
    return next(reversed(_states(Path(folder)).values()), None)


def made_from(lora: LoraConfig, config: TrainConfig, dtype: torch.dtype, tokenizer: Tokenizer,
              files: list[dict]) -> dict:
    """What decides, beside the base, what a run learns, as JSON: kept to see whether it changes.

    `dtype` is what the base is loaded in, `files` what `Dataset.files` says of the data.
    """
    settings = dataclasses.asdict(lora) | dataclasses.asdict(config) | {
        "dtype": str(dtype).removeprefix("torch.")}
    return json.loads(json.dumps({
        "settings": {key: value for key, value in settings.items() if key not in FREE},
        "tokenizer": tokenizer.fingerprint(), "files": files}))


def check_made_from(was: dict, now: dict, run: str | Path) -> None:
    """Refuses a run made from other things than `was`, both as `made_from` says it, and names them.
    """
    before, after = was["settings"], now["settings"]
    changed = [f"{key} is {after[key]} and was {value}" for key, value in before.items()
               if after.get(key, value) != value]
    if changed:
        change = f"{Path(run) / 'config.json'}: {', '.join(changed)}"
    elif was["tokenizer"] != now["tokenizer"]:
        change = "the base's tokenizer is not the one that it was"
    else:
        change = _changed_file(was["files"], now["files"])
    if change:
        raise UserError(f"{change}; to go on with {run}, put that back, and for a run of its own: "
                        f"train.py --config {Path(run) / 'config.json'} --out NEW")


def _changed_file(was: list[dict], now: list[dict]) -> str:
    """What is no longer as it was in the first file of data that has changed, if one has."""
    before, after = ([file["name"] for file in files] for files in (was, now))
    for this, those, what in ((after, before, "new"), (before, after, "gone")):
        if len(this) > len(those):
            name = next((name for name in this if name not in those), this[-1])
            return f"{name} is {what} among the data"
    for old, new in zip(was, now, strict=True):
        if old["rows"] != new["rows"]:
            how = "more" if new["rows"] > old["rows"] else "fewer"
            return (f"{new['name']} has {how} conversations than it had, {new['rows']} instead of "
                    f"{old['rows']}")
        if old["content"] != new["content"]:
            return f"{new['name']} has conversations that were edited since, or exchanged"
        if old["order"] != new["order"]:
            return f"{new['name']} has its conversations in another order than it had"
        if old["tokens"] != new["tokens"]:
            return (f"the conversations of {new['name']} are the same, but their weights are not, "
                    "or which messages carry loss, or how this minilora writes them")
    return ""


def load_state(folder: str | Path, model: Gemma, optimizer: torch.optim.Optimizer,
               start: dict | None = None) -> dict:
    """Goes back to the newest complete checkpoint of a run's checkpoints folder: its `progress`.

    `model` and `optimizer` are made as when it was saved: same base, same adapters and rows, same
    groups. `start` is the `progress` of a run that begins now: what is stored has the same kinds of
    values (where None stands there, a number may), and the same "made_from". Raises UserError, with
    all unchanged, where they are not, and where there is no checkpoint.
    """
    path = latest_state(folder)
    if path is None:
        raise UserError(f"{folder}: no checkpoint to go on from; start without --resume")
    weights, path = path / "state.safetensors", path / "state.json"
    hint = f"delete {path.parent} to go on from the one before"
    state = read_own(path, fingerprint=dict, groups=list, shapes=dict, progress=dict, step=int,
                     sha256=str)
    progress, start = state["progress"], start or {}
    try:
        if start:
            check_made_from(progress["made_from"], start["made_from"], Path(folder).parent)
        sound = progress.get("step", state["step"]) == state["step"] and all(
            type(progress[key]) is type(value) or value is None and type(progress[key]) in (
                int, float) for key, value in start.items())
    except (LookupError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path}: does not go with itself; {hint}")
    check_base(state["fingerprint"], model, path, "that of the run")
    parameters = trainable(model)
    names = {parameter: name for name, parameter in parameters.items()}
    groups = [[names[parameter] for parameter in group["params"]]
              for group in optimizer.param_groups]
    shapes = state["shapes"]
    wanted = {f"model.{name}": list(parameter.shape) for name, parameter in parameters.items()}
    wanted |= {f"start.{name}": list(start.shape) for name, start in _starts(model).items()}
    if groups != [isinstance(group, dict) and group.get("names") for group in state["groups"]] or (
            any(shapes.get(name) != shape for name, shape in wanted.items())):
        raise UserError(f"{path}: what it trained is not what is to be trained now; go on with the "
                        "rank, targets and tokens of the run")
    for name, parameter in parameters.items():  # AdamW's, all or, before the first step, none
        moved = {f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"}
        if moved & shapes.keys():
            wanted |= dict.fromkeys(moved, list(parameter.shape)) | {f"optimizer.{name}.step": []}
    if {name: shape for name, shape in shapes.items() if not name.startswith("rng.")} != wanted or (
            not all(map(_is_sound, state["groups"]))):
        raise UserError(f"{path}: does not go with itself; {hint}")
    tensors = read_tensors(weights, shapes, hint, {"rng.": "U8"})
    if _sha256(weights) != state["sha256"]:
        raise UserError(f"{weights}: has other bytes than were written there; {hint}")
    try:
        torch.set_rng_state(tensors["rng.cpu"])
        for i in range(torch.cuda.device_count()):
            if f"rng.cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng.cuda{i}"], i)
    except (KeyError, RuntimeError):
        raise UserError(f"{weights}: its random state is none; {hint}") from None

    moments: dict[int, dict[str, Tensor]] = {}
    for i, name in enumerate(sum(groups, [])):  # torch numbers parameters through all groups
        prefix = f"optimizer.{name}."
        if found := {key.removeprefix(prefix): value for key, value in tensors.items()
                     if key.startswith(prefix)}:
            moments[i] = found
    settings = optimizer.state_dict()["param_groups"]
    for group, saved in zip(settings, state["groups"], strict=True):
        group.update({key: saved[key] for key in _SETTINGS} | {"betas": tuple(saved["betas"])})
    optimizer.load_state_dict({"state": moments, "param_groups": settings})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
        for name, start in _starts(model).items():
            start.copy_(tensors[f"start.{name}"])
    return state["progress"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_sound(group: dict) -> bool:
    """Whether the settings of a parameter group are numbers that AdamW can go on with."""
    betas = group.get("betas")
    numbers = [group.get(key) for key in _SETTINGS if key != "betas"]
    return isinstance(betas, list) and len(betas) == 2 and all(
        type(number) in (int, float) and 0 <= number < 1e9 for number in numbers + betas) and (
        max(betas) < 1)


def _starts(model: Gemma) -> dict[str, Tensor]:
    """PiSSA's A₀ and B₀: another machine's decomposition may differ in its last bits."""
    return {name: buffer for name, buffer in model.named_buffers() if "lora_start" in name}


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _states(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in `folder` by their step, in that order."""
    found = {}
    for path in sorted(folder.glob("*step-*")):  # those that begin with a dot first
        name = _STEP.fullmatch(path.name)
        if name and all((path / file).is_file() for file in _STATE_FILES):
            found[int(name[1] or name[2])] = path
    return dict(sorted(found.items()))
