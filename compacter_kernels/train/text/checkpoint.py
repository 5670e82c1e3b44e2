"""Checkpoints of a run: folders that appear complete or not at all, of safetensors and JSON alone."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.checkpoints.files import read_json, read_tensors, require_safetensors
from compacter_kernels.train.text.loop import Training
from compacter_kernels.train.text.methods import Method, trained

PREFIX = "checkpoint-"
STATE, OPTIMIZER, WEIGHTS = "state.json", "optimizer.safetensors", "weights"
LOSSES = "losses"
KINDS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for a parameter


def latest(folder: Path) -> Path | None:
    """The checkpoint of the most steps, or None."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return max(found, key=lambda path: int(path.name.removeprefix(PREFIX)), default=None)


def save(training: Training, method: Method, folder: Path, settings: dict[str, Any]) -> None:
    """Write a checkpoint and then remove the one before it; all processes call it, the first writes."""
    before = latest(folder)
    if training.processes.first:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as made:
            new = Path(made, "checkpoint")
            new.mkdir()
            method.save(training.model, new / WEIGHTS)
            losses = torch.tensor(training.losses, dtype=torch.float64)
            require_safetensors().torch.save_file({**_moments(training), LOSSES: losses}, new / OPTIMIZER)
            write_json({"step": training.step, "settings": settings}, new / STATE)
            os.replace(new, folder / f"{PREFIX}{training.step:06d}")
        if before is not None:
            shutil.rmtree(before)
    training.processes.wait()


def load(training: Training, method: Method, checkpoint: Path, settings: dict[str, Any]) -> None:
    """Take up the run where the checkpoint has it.

    Raises:
        ValueError: the checkpoint belongs to a run with other settings, or is damaged.
    """
    state = read_json(checkpoint / STATE)
    check_settings(state.get("settings"), settings, checkpoint)
    moments = read_tensors(checkpoint / OPTIMIZER)
    names = list(trained(training.model))
    if set(moments) != {LOSSES, *(f"{name}.{kind}" for name in names for kind in KINDS)}:
        raise ValueError(f"{checkpoint / OPTIMIZER} does not fit the model: other tensors than those that train")
    method.load(training.model, checkpoint / WEIGHTS)
    of_optimizer = training.optimizer.state_dict()
    of_optimizer["state"] = {
        number: {kind: moments[f"{name}.{kind}"].clone() for kind in KINDS} for number, name in enumerate(names)
    }
    training.optimizer.load_state_dict(of_optimizer)
    training.step, training.losses = int(state["step"]), moments[LOSSES].tolist()


def check_settings(found: Any, settings: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless a file's settings are those of this run."""
    differ = [name for name in settings if not isinstance(found, dict) or found.get(name) != settings[name]]
    if differ:
        listed = ", ".join(f"{name} was {(found or {}).get(name)!r} and is {settings[name]!r}" for name in differ)
        raise ValueError(f"{path} is of a run with other settings: {listed}; repeat those, or give another --out")


def write_json(content: dict[str, Any], path: Path) -> None:
    """At once, or not at all."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _moments(training: Training) -> dict[str, Tensor]:
    state = training.optimizer.state
    named = trained(training.model).items()
    return {f"{name}.{kind}": state[p][kind].detach().cpu().contiguous() for name, p in named for kind in KINDS}
