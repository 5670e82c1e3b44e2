"""The format of this package: what `save_adapter` writes (docs/checkpoints.md)."""

from __future__ import annotations

from pathlib import Path

from compacter_kernels.checkpoints.checkpoint import Checkpoint, Written
from compacter_kernels.checkpoints.files import CONFIG, FORMAT, about_model, of_model, read_config
from compacter_kernels.checkpoints.names import head_of
from compacter_kernels.checkpoints.source import Source
from compacter_kernels.targets.added import NAME, adapters_of

_OF_ADAPTER = ("down", "up", "scaling", "norm_before", "norm_after")


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
        tensors, model = source.tensors, about_model(source.config)
        config = read_config(source.config, Path(CONFIG))
    checkpoint = Checkpoint(options=config.to_dict(), model=model)
    for key, tensor in tensors.items():
        path, _, rest = f".{key}".rpartition(f".{NAME}.")
        path = path.removeprefix(".")
        if not path:
            checkpoint.shared[rest.removeprefix("shared.")] = tensor
        elif rest.partition(".")[0] in _OF_ADAPTER:
            checkpoint.adapters.setdefault(path, {})[rest] = tensor
        else:
            checkpoint.copies[f"{path}.{rest}"] = tensor
    return checkpoint


def write(checkpoint: Checkpoint, name: str | None) -> Written:
    """Return the tensors and the config that `load_adapter` reads; they do not contain a name."""
    tensors = {f"{NAME}.shared.{key}": tensor for key, tensor in checkpoint.shared.items()}
    for target, adapter in checkpoint.adapters.items():
        tensors |= {f"{target}.{NAME}.{key}": tensor for key, tensor in adapter.items()}
    for key, tensor in checkpoint.copies.items():
        module = head_of(key) or key.rpartition(".")[0]
        tensors[f"{module}.{NAME}.{key.removeprefix(f'{module}.')}"] = tensor
    return tensors, {**FORMAT, **about_model(checkpoint.model), **checkpoint.config.to_dict()}, {}
