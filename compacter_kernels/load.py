"""`load_adapter` reads adapters from a folder into a model, after it has checked all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compacter_kernels.checkpoints import files
from compacter_kernels.checkpoints.bank import load_one
from compacter_kernels.checkpoints.files import CONFIG, TENSORS
from compacter_kernels.checkpoints.versions import adapted_modules, todays_names
from compacter_kernels.config import DTYPES, CompacterConfig
from compacter_kernels.inject.injection import add_adapters, injection_of
from compacter_kernels.inject.keys import base_prefix, is_head, names_of_file
from compacter_kernels.inject.prepare import Prepared, check_name, prepare
from compacter_kernels.nn.bank import AdapterBank
from compacter_kernels.nn.partitioned import full_shape, gathered
from compacter_kernels.targets.added import adapters_of
from compacter_kernels.targets.find import base_modules, find_modules_to_save
from compacter_kernels.targets.wrappers import check_fillable, check_gathered, check_injectable, unwrapped

Model = TypeVar("Model", bound=nn.Module)
INITIAL_OPTIONS = ("init", "phm_init_range", "phm_c_init", "dtype")  # They have no effect on loaded values.


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
    """Read adapters that `save_adapter` wrote, or peft with Compacter, and activate them.

    If the model has adapters of that name, they get the values of the file. Else they are injected.

    Args:
        model: a model of the same family and size as the saved one; head and dtype may differ.
            Values are cast to the dtype of the adapters in this model. Or an `AdapterBank`, which
            reads what `save_adapter` wrote of a bank.
        folder: a folder, or the id of a repository on the hub.
        revision, cache_dir, local_files_only: as `huggingface_hub.snapshot_download` takes them.
        name: the name of the adapters, as in `inject`. Existing adapters of this name must have the
            options that the file has.
        impl: of new adapters, see `compacter_kernels.compacter_adapter`.
        heads: False leaves out tensors outside of the model's base, such as a trained classifier.
            Those of the file are ignored, and those of the model keep their values.

    Returns:
        The model itself.

    Raises:
        TypeError, ValueError: the files are malformed or do not fit the model, which is unchanged.
        RuntimeError: adapters of a new name cannot come within a context of `route` or `mix`.
        FileNotFoundError, ImportError: there is no such folder or file; safetensors is not
            installed.
    """
    if isinstance(model, AdapterBank):
        load_one(model, folder, name)
        return model
    check_name(name)
    check_gathered(model)
    check_fillable(model)
    inner = unwrapped(model)
    path = files.find_folder(folder, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    content = files.read_json(path / CONFIG)
    tensors = files.read_tensors(path / TENSORS)
    named = names_of_file(inner, todays_names(tensors, content))
    config = files.read_config(content, path / CONFIG, lambda: adapted_modules(named), CompacterConfig)
    config = dataclasses.replace(config, modules_to_save=_modules_to_save(inner, config, content))
    for key, value in files.of_model(inner).items():
        saved = content.get(key)
        if key != "base_model_name_or_path" and saved is not None and value is not None and saved != value:
            ours = f"this {type(inner).__name__} has {value!r}"
            raise ValueError(f"{path / CONFIG} is of a model with {key} {saved!r}, {ours}")
    if not heads:
        config = dataclasses.replace(config, modules_to_save=_without_heads(inner, config, content))

    existing = adapters_of(inner)
    prepared: Prepared | None = None
    if existing is not None and name in existing.configs:
        _check_same(inner, config, existing.configs[name], name, heads)
        targets = existing.tensors(inner, name)
    else:
        check_injectable(model)
        try:  # They are built on meta, so that even huge sizes in a file take no memory.
            prepared = prepare(inner, config, impl, "meta")
        except (TypeError, RuntimeError, OverflowError) as error:  # Sizes that no tensor can have.
            raise ValueError(f"{path / CONFIG} asks for what cannot be built: {str(error).splitlines()[0]}") from error
        targets = prepared.tensors(inner)
    if not heads:
        named, targets = (
            {key: tensor for key, tensor in each.items() if not is_head(inner, key)} for each in (named, targets)
        )
    _check_tensors(named, targets, path / TENSORS)
    try:
        files.check_digest(path / TENSORS, content.get(files.DIGEST))
    except ValueError:
        if files.read_json(path / CONFIG) == content:
            raise
        return load_adapter(model, path, name=name, impl=impl, heads=heads)  # Another process saved meanwhile.
    if prepared is None:
        _fill(targets, named)
        injection_of(inner).activate(name)
    else:
        prepared.allocate(inner)
        _fill(prepared.tensors(inner), named)
        add_adapters(inner, name, config, prepared)
    return model


def _modules_to_save(model: nn.Module, config: CompacterConfig, content: Mapping[str, Any]) -> Sequence[str] | None:
    """The option modules_to_save, for this model where peft wrote it.

    peft takes every module whose name ends with one of these, in the middle of a word too, and also
    lists usual names of heads that the model does not have.
    """
    if config.modules_to_save is None or "peft_version" not in content:
        return config.modules_to_save
    return [name for name, _ in base_modules(model) if name.endswith(tuple(config.modules_to_save))]


def _without_heads(model: nn.Module, config: CompacterConfig, content: Mapping[str, Any]) -> Sequence[str] | None:
    """The option modules_to_save with the heads of this model in place of those of the file."""
    if content.get("modules_to_save") == []:
        return []
    prefix = base_prefix(model)
    in_base = [f".{name}" for name, _ in base_modules(model) if not is_head(model, name.removeprefix(prefix))]
    kept = [end for end in config.modules_to_save or () if any(name.endswith(f".{end}") for name in in_base)]
    heads = dataclasses.replace(config, modules_to_save=None, train_layer_norms=False)
    return [*kept, *find_modules_to_save(model, heads)] if kept else None


def _check_same(model: nn.Module, config: CompacterConfig, existing: CompacterConfig, name: str, heads: bool) -> None:
    ours, theirs = (
        {**each.to_dict(), "modules_to_save": sorted(find_modules_to_save(model, each))} for each in (existing, config)
    )
    ignored = INITIAL_OPTIONS if heads else (*INITIAL_OPTIONS, "modules_to_save")
    differ = [key for key in ours if key not in ignored and ours[key] != theirs[key]]
    if differ:
        listed = "; ".join(f"{key} is {ours[key]!r} in the model, {theirs[key]!r} in the file" for key in differ)
        raise ValueError(
            f"the adapters {name!r} have other options: {listed}. Load under another name=, or remove them"
        )


def _check_tensors(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless the tensors have the names, shapes and kinds of dtype of targets."""
    wrong = []
    for key in [key for key in targets if key in tensors]:
        shape, dtype, needed = tensors[key].shape, tensors[key].dtype, full_shape(targets[key])
        dtypes = DTYPES if targets[key].is_floating_point() else {str(targets[key].dtype): targets[key].dtype}
        if shape != needed:
            wrong.append(f"{key} has shape {tuple(shape)}, the model needs {tuple(needed)}")
        if dtype not in dtypes.values():
            wrong.append(f"{key} is {dtype}, not {' or '.join(dtypes)}")
    missing, unexpected = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
    for verb, keys in (("lacks", missing), ("has, and the model does not,", unexpected)):
        if keys:
            wrong.append(f"it {verb} {len(keys)} tensors: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}")
    if wrong:
        more = "" if len(wrong) <= 4 else f"; and {len(wrong) - 4} more"
        raise ValueError(
            f"{path} does not fit the model: {'; '.join(wrong[:4])}{more}. heads=False leaves out trained heads"
        )


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors into the targets of their names, which may be sharded."""
    targets = {key: targets[key] for key in tensors}
    on_meta = [key for key, target in targets.items() if target.is_meta]
    if on_meta:
        raise ValueError(f"{on_meta[0]} would be on meta; give the model its weights before its adapters")
    with gathered(targets.values(), change=True):
        for key, target in targets.items():
            value = tensors[key]
            if hasattr(target, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)  # type: ignore[attr-defined]
            target.copy_(value)
