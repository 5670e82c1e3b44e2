"""The format of this package: what `save_adapter` writes (docs/checkpoints.md)."""

from __future__ import annotations

from pathlib import Path

from compacter_kernels.checkpoints.checkpoint import Checkpoint, Written
from compacter_kernels.checkpoints.files import CONFIG, FORMAT, about_model, of_model, read_config
from compacter_kernels.checkpoints.names import head_of, names_in_base
from compacter_kernels.checkpoints.source import Source
from compacter_kernels.checkpoints.versions import adapted_modules, names_of_version_1
from compacter_kernels.nn.flat_names import SHARED, dotted, flat
from compacter_kernels.targets.added import adapters_of
from compacter_kernels.targets.architectures import BASE_PREFIXES
from compacter_kernels.targets.wrappers import IN_FILE


def read(source: Source) -> Checkpoint:
    """Return the checkpoint in an adapter folder or adapted model; ValueError if there is none."""
    if source.model is not None:
        adapters = adapters_of(source.model)
        if adapters is None:
            raise ValueError(
                f"this {type(source.model).__name__} has no Compacter adapters; call compacter_kernels.inject first"
            )
        name = source.choose(list(adapters.configs), default=adapters.active or next(iter(adapters.configs)))
        tensors = {key: tensor.detach() for key, tensor in adapters.tensors(source.model, name).items()}
        config, model = adapters.configs[name], of_model(source.model)
    elif source.is_whole_model():
        raise ValueError(
            f"it holds a whole {source.config['model_type']} with adapters in it, whose options no file says. Make "
            "them anew: inject(model, config, name=...) with the same config, model.load_state_dict of these tensors, "
            "then save_adapter(model, folder), which can be converted"
        )
    elif not source.config:
        raise ValueError(f"tensors of our format need their {CONFIG}; give the folder that holds both")
    else:
        model = about_model(source.config)
        tensors = names_in_base(source.tensors)
        if source.config.get("format_version") == 1:
            tensors = names_of_version_1(tensors)
        config = read_config(source.config, Path(CONFIG), lambda: adapted_modules(tensors))
    checkpoint = Checkpoint(options=config.to_dict(), model=model)
    for key, tensor in tensors.items():
        path, _, last = key.rpartition(".")
        if last.startswith(SHARED):
            checkpoint.shared[last.removeprefix(SHARED)] = tensor
        elif in_adapter := dotted(last):
            checkpoint.adapters.setdefault(path, {})[in_adapter] = tensor
        else:
            checkpoint.copies[key] = tensor
    return checkpoint


def write(checkpoint: Checkpoint, name: str | None) -> Written:
    """Return the tensors and the config that `load_adapter` and peft read, without a name.

    For peft the names of tensors are those in a class of transformers with a head, as far as the
    type of the model is known.
    """
    model_type = checkpoint.model.get("model_type") or ""
    prefix = IN_FILE + (BASE_PREFIXES.get(model_type, "") and f"{BASE_PREFIXES[model_type]}.")
    tensors = {IN_FILE + SHARED + key: tensor for key, tensor in checkpoint.shared.items()}
    for target, adapter in checkpoint.adapters.items():
        tensors |= {f"{prefix}{target}.{flat(key)}": tensor for key, tensor in adapter.items()}
    for key, tensor in checkpoint.copies.items():
        tensors[(IN_FILE if head_of(key) else prefix) + key] = tensor
    return tensors, {**FORMAT, **about_model(checkpoint.model), **checkpoint.config.to_dict()}, {}
