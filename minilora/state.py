"""All that a run needs to go on where it stopped, bit for bit.

    checkpoints/step-000120/    state.safetensors, state.json
"""

import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from minilora.checkpoint import check_base, check_unmerged, fingerprint
from minilora.config import UserError
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

_STATE_FILES = ("state.safetensors", "state.json")
_STEP = re.compile(r"step-(\d+)")
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
            "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "progress": progress})
    states = _states(folder)
    kept = {step, max((other for other in states if other < step), default=step)}
    for other in states.keys() - kept:  # renamed first, so that none is ever half there
        os.replace(states[other], folder / f".{states[other].name}.old")
    for trash in folder.glob(".step-*"):
        shutil.rmtree(trash, ignore_errors=True)
    return path


def latest_state(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's checkpoints folder, if there is one."""
    return next(reversed(_states(Path(folder)).values()), None)


def load_state(folder: str | Path, model: Gemma, optimizer: torch.optim.Optimizer) -> dict:
    """Goes back to the newest complete checkpoint of a run's checkpoints folder: its `progress`.

    `model` and `optimizer` are made as when it was saved: same base, same adapters and rows, same
    groups. Raises UserError, with both unchanged, where they are not, and where there is none.
    """
    path = latest_state(folder)
    if path is None:
        raise UserError(f"{folder}: no checkpoint to go on from; start without --resume")
    weights, path = path / "state.safetensors", path / "state.json"
    hint = f"delete {path.parent} to go on from the one before"
    state = read_own(path, fingerprint=dict, groups=list, shapes=dict, progress=dict)
    check_base(state["fingerprint"], model, path, "that of the run")
    parameters = trainable(model)
    names = {parameter: name for name, parameter in parameters.items()}
    groups = [[names[parameter] for parameter in group["params"]]
              for group in optimizer.param_groups]
    shapes = state["shapes"]
    wanted = {f"model.{name}": parameter for name, parameter in parameters.items()}
    wanted |= {f"start.{name}": start for name, start in _starts(model).items()}
    if groups != [group["names"] for group in state["groups"]] or any(
            shapes.get(name) != list(tensor.shape) for name, tensor in wanted.items()):
        raise UserError(f"{path}: what it trained is not what is to be trained now; go on with the "
                        "rank, targets and tokens of the run")
    tensors = read_tensors(weights, shapes, hint)

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
    torch.set_rng_state(tensors["rng.cpu"])
    for i in range(torch.cuda.device_count()):
        if f"rng.cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda{i}"], i)
    return state["progress"]


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
    for path in folder.glob("step-*"):
        name = _STEP.fullmatch(path.name)
        if name and all((path / file).is_file() for file in _STATE_FILES):
            found[int(name[1])] = path
    return dict(sorted(found.items()))
