"""Our own format, docs/checkpoints.md: what `save_adapter` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from compacter_kernels.checkpoints.convert.checkpoint import Checkpoint, about_model
from compacter_kernels.checkpoints.convert.places import head_of
from compacter_kernels.checkpoints.convert.source import Source, is_whole_model
from compacter_kernels.checkpoints.files import CONFIG
from compacter_kernels.checkpoints.format import PEFT_TYPE, VERSION, describe, read_config
from compacter_kernels.targets.added import NAME, adapters_of

_OWN = ("down", "up", "scaling", "norm_before", "norm_after")


def read(source: Source, name: str | None) -> Checkpoint:
    """The checkpoint in a folder of ours, or in a model with adapters of ours.

    Raises:
        ValueError: a config that does not fit, tensors without one.
    """
    if source.model is not None:
        here = adapters_of(source.model)
        if here is None:
            raise ValueError(
                f"this {type(source.model).__name__} has no Compacter adapters; call compacter_kernels.inject first"
            )
        name = name or here.active or next(iter(here.configs))
        if name not in here.configs:
            raise ValueError(f"the model has no adapters {name!r}; it has {', '.join(here.configs)}")
        tensors = {key: t.detach() for key, t in here.tensors(source.model, name).items()}
        config, model = here.configs[name], describe(source.model)
    elif is_whole_model(source):
        raise ValueError(
            f"it holds a whole {source.config['model_type']} with adapters in it, whose options no file says. Make "
            "them anew: inject(model, config, name=...) with the same config, model.load_state_dict of these tensors, "
            "then save_adapter(model, folder), which can be converted"
        )
    elif not source.config:
        raise ValueError(f"tensors of our format need their {CONFIG}; give the folder that holds both")
    else:
        tensors, model = source.tensors, source.config
        config = read_config(source.config, Path(CONFIG))
    checkpoint = Checkpoint({}, options=config.to_dict(), model=about_model(model))
    for key, tensor in tensors.items():
        path, _, rest = f".{key}".rpartition(f".{NAME}.")
        path = path.removeprefix(".")
        if not path:
            checkpoint.shared[rest.removeprefix("shared.")] = tensor
        elif rest.partition(".")[0] in _OWN:
            checkpoint.adapters.setdefault(path, {})[rest] = tensor
        else:
            checkpoint.copies[f"{path}.{rest}"] = tensor
    return checkpoint


def write(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config that `load_adapter` takes."""
    tensors = {f"{NAME}.shared.{key}": tensor for key, tensor in checkpoint.shared.items()}
    for place, own in checkpoint.adapters.items():
        tensors |= {f"{place}.{NAME}.{key}": tensor for key, tensor in own.items()}
    for key, tensor in checkpoint.copies.items():
        module = head_of(key) or key.rpartition(".")[0]
        tensors[f"{module}.{NAME}.{key.removeprefix(f'{module}.')}"] = tensor
    about = {"peft_type": PEFT_TYPE, "format_version": VERSION, **about_model(checkpoint.model)}
    return tensors, {**about, **checkpoint.config.to_dict()}
