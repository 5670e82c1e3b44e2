"""`load_adapter`: adapters from a folder into a model, after all was checked and before anything is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compacter_kernels.checkpoints.files import (
    CONFIG,
    DIGEST,
    TENSORS,
    check_digest,
    find_folder,
    read_json,
    read_tensors,
)
from compacter_kernels.checkpoints.format import of_model, read_config
from compacter_kernels.config import DTYPES, CompacterConfig
from compacter_kernels.inject.checks import check_name
from compacter_kernels.inject.injection import Injection, activate, place
from compacter_kernels.inject.keys import is_head
from compacter_kernels.inject.prepare import Prepared, prepare, to_device_of
from compacter_kernels.nn.partitioned import full_shape, gathered
from compacter_kernels.targets.added import NAME
from compacter_kernels.targets.wrappers import check_fillable, check_gathered, check_injectable, unwrapped

Model = TypeVar("Model", bound=nn.Module)
OF_START = ("init", "phm_init_range", "phm_c_init", "dtype")  # of no meaning once there are values


def load_adapter(
    model: Model,
    folder: str | Path,
    *,
    name: str = "default",
    impl: str = "auto",
    heads: bool = True,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Model:
    """Read what `save_adapter` wrote: inject adapters of that name and activate them, or set those that are there.

    Args:
        model: of the same family and size as the one that was saved; head and dtype may differ. Values are cast to the
            dtype of the adapters here.
        folder: a folder, or the id of one on the hub.
        revision, cache_dir, local_files_only: for the hub, as `huggingface_hub.snapshot_download` has them.
        name: of the adapters, as in `inject`. Adapters of this name must have the options of the file.
        impl: see `compacter_kernels.compacter_adapter`; for new adapters.
        heads: False leaves out what lies outside the model's base, such as a trained classifier: that of the file is
            ignored, that of the model trains on from the values it has.

    Returns:
        The model itself.

    Raises:
        TypeError, ValueError: files that are malformed or do not fit the model; the model is unchanged.
        FileNotFoundError, ImportError: no such folder or files, safetensors is not installed.
    """
    check_name(name)
    check_gathered(model)
    check_fillable(model)
    base = unwrapped(model)
    path = find_folder(folder, revision=revision, cache_dir=cache_dir, offline=local_files_only)
    found = read_json(path / CONFIG)
    config = read_config(found, path / CONFIG)
    _check_model(found, base, path / CONFIG)
    if not heads:
        config = dataclasses.replace(config, modules_to_save=None)
    tensors = read_tensors(path / TENSORS)

    present = getattr(base, NAME, None)
    prepared: Prepared | None = None
    if isinstance(present, Injection) and name in present.configs:
        _check_same(config, present.configs[name], name, heads)
        targets = present.tensors(base, name)
    else:
        check_injectable(model)
        prepared = _prepare(base, config, impl, path / CONFIG)
        targets = prepared.tensors(base)
    if not heads:
        tensors = {key: tensor for key, tensor in tensors.items() if not is_head(base, key)}
        targets = {key: tensor for key, tensor in targets.items() if not is_head(base, key)}
    check_tensors(tensors, targets, path / TENSORS)
    check_digest(path / TENSORS, found.get(DIGEST))
    if prepared is None:
        _fill(targets, tensors)
        activate(base, name)
    else:
        to_device_of(base, prepared)
        targets = prepared.tensors(base)
        _fill({key: targets[key] for key in tensors}, tensors)
        place(base, name, config, prepared)
    return model


def _prepare(model: nn.Module, config: CompacterConfig, impl: str, path: Path) -> Prepared:
    """What inject would build, on meta: whatever sizes a file asks for, it costs nothing."""
    try:
        return prepare(model, config, impl, "meta")
    except (TypeError, RuntimeError, OverflowError) as error:  # sizes that no tensor has
        raise ValueError(f"{path} asks for what cannot be built: {str(error).splitlines()[0]}") from error


def _check_model(found: Mapping[str, Any], model: nn.Module, path: Path) -> None:
    for key, here in of_model(model).items():
        there = found.get(key)
        if there is not None and here is not None and there != here:
            raise ValueError(f"{path} is of a model with {key} {there!r}, this {type(model).__name__} has {here!r}")


def _check_same(config: CompacterConfig, present: CompacterConfig, name: str, heads: bool) -> None:
    ours, theirs = present.to_dict(), config.to_dict()
    left_out = OF_START if heads else (*OF_START, "modules_to_save")
    differ = [key for key in ours if key not in left_out and ours[key] != theirs[key]]
    if differ:
        listed = "; ".join(f"{key} is {ours[key]!r} in the model, {theirs[key]!r} in the file" for key in differ)
        raise ValueError(
            f"the adapters {name!r} have other options: {listed}. Load under another name=, or remove them"
        )


def check_tensors(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless the tensors are those that the targets ask for, by name, shape and kind of dtype."""
    missing, unexpected = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    wrong = [
        f"{key} has shape {tuple(tensors[key].shape)}, the model needs {tuple(full_shape(target))}"
        for key, target in targets.items()
        if key in tensors and tensors[key].shape != full_shape(target)
    ]
    for what, keys in (("lacks", missing), ("has, and the model does not,", unexpected)):
        if keys:
            wrong.append(f"it {what} {len(keys)} tensors: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}")
    for key in targets.keys() & tensors.keys():
        found, expected = tensors[key].dtype, targets[key].dtype
        fits = found in DTYPES.values() if expected.is_floating_point else found == expected
        if not fits:
            wrong.append(f"{key} is {found}, not {' or '.join(DTYPES) if expected.is_floating_point else expected}")
    if wrong:
        more = "" if len(wrong) <= 4 else f"; and {len(wrong) - 4} more"
        raise ValueError(
            f"{path} does not fit the model: {'; '.join(wrong[:4])}{more}. heads=False leaves out trained heads"
        )


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    elsewhere = [key for key, target in targets.items() if target.is_meta]
    if elsewhere:
        raise ValueError(f"{elsewhere[0]} would be on meta; give the model its weights before its adapters")
    with gathered(targets.values(), change=True):
        for key, target in targets.items():
            value = tensors[key]
            if hasattr(target, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)  # type: ignore[attr-defined]
            target.copy_(value)
