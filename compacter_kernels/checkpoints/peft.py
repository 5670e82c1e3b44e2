"""The form of both methods of `compacter_kernels.peft`, as the library peft reads and writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from compacter_kernels.checkpoints.checkpoint import Checkpoint, Written
from compacter_kernels.checkpoints.files import CONFIG, VERSION, about_model, read_config
from compacter_kernels.checkpoints.methods import METHODS
from compacter_kernels.checkpoints.names import head_of, names_in_base
from compacter_kernels.checkpoints.source import Source
from compacter_kernels.checkpoints.versions import adapted_modules, todays_names
from compacter_kernels.nn.flat_names import SHARED, dotted, flat
from compacter_kernels.targets.architectures import BASE_PREFIXES
from compacter_kernels.targets.wrappers import IN_FILE


def read(source: Source) -> Checkpoint:
    """Return the checkpoint in a folder that peft or `save_adapter` wrote."""
    method = source.config.get("peft_type")
    if method not in METHODS:
        raise ValueError(f"a source of this format is a folder whose {CONFIG} has peft_type {' or '.join(METHODS)}")
    tensors = todays_names(names_in_base(source.tensors), source.config)
    kind = METHODS[method]
    config = read_config(source.config, Path(CONFIG), lambda: adapted_modules(tensors, kind.prefix), kind.config)
    checkpoint = Checkpoint(method=method, options=config.to_dict(), model=about_model(source.config))
    sort(checkpoint, tensors)
    return checkpoint


def sort(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors, which have flat names in the model's base, where they belong."""
    prefix = METHODS[checkpoint.method].prefix
    for key, tensor in tensors.items():
        path, _, last = key.rpartition(".")
        if last.startswith(SHARED):
            checkpoint.shared[last.removeprefix(SHARED)] = tensor
        elif in_adapter := dotted(last, prefix):
            checkpoint.adapters.setdefault(path, {})[in_adapter] = tensor
        else:
            checkpoint.copies[key] = tensor


def write(checkpoint: Checkpoint, name: str | None) -> Written:
    """Return the tensors and the config that peft reads, without a name.

    The names of tensors are those in a class of transformers with a head, as far as the type of the
    model is known.
    """
    base = BASE_PREFIXES.get(checkpoint.model.get("model_type") or "", "")
    prefix = IN_FILE + (base and f"{base}.")
    flat_prefix = METHODS[checkpoint.method].prefix
    tensors = {IN_FILE + SHARED + key: tensor for key, tensor in checkpoint.shared.items()}
    for target, adapter in checkpoint.adapters.items():
        tensors |= {f"{prefix}{target}.{flat(key, flat_prefix)}": tensor for key, tensor in adapter.items()}
    for key, tensor in checkpoint.copies.items():
        tensors[(IN_FILE if head_of(key) else prefix) + key] = tensor
    about = {"peft_type": checkpoint.method, "format_version": VERSION, **about_model(checkpoint.model)}
    return tensors, {**about, **checkpoint.config.to_dict()}, {}
