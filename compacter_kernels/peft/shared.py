"""The weights that the adapters of one name share, kept once, on the model itself.

They are ParameterDicts beside the parameters of the model, such as `compacter_shared_phm_rule`,
keyed by the name of the adapters. There every way of peft to put adapters into a model keeps them,
also `inject_adapter_in_model`, which returns the model alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from compacter_kernels.config import CompacterConfig
from compacter_kernels.inject.prepare import SharedWeights, shared_names
from compacter_kernels.nn import CompacterAdapter
from compacter_kernels.nn.flat_names import SHARED
from compacter_kernels.targets.wrappers import IN_FILE


class SharedParameters(nn.ParameterDict):
    """One shared weight of the adapters of a model, by their names."""


def borrow(
    model: nn.Module, name: str, adapter: CompacterAdapter, config: CompacterConfig
) -> dict[str, nn.ParameterDict]:
    """Let an adapter borrow what those of its name share; return the dicts that own it.

    The shared weights of the first adapter of a name become those of all.
    """
    shared = shared_names(adapter, config)
    keys = dict.fromkeys(SHARED + key for names in shared.values() for key in names.values())
    if any(name not in getattr(model, key, ()) for key in keys):
        for key, parameter in list(SharedWeights(adapter, config).named_parameters()):
            if not isinstance(getattr(model, SHARED + key, None), SharedParameters):
                setattr(model, SHARED + key, SharedParameters())
            getattr(model, SHARED + key)[name] = parameter
    for projection, names in shared.items():
        for own, key in names.items():
            getattr(adapter, projection).borrow(getattr(model, SHARED + key), **{own: name})
    return {key: getattr(model, key) for key in keys}


def shared_parameters(model: nn.Module) -> Iterator[tuple[str, SharedParameters]]:
    """The dicts of a model or of the models inside it, with their paths."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, SharedParameters))


def remove(model: nn.Module) -> None:
    """Take all dicts out of a model."""
    for path, _ in list(shared_parameters(model)):
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)


def cast_to_float32(model: nn.Module, name: str) -> None:
    """Cast what the adapters of that name share from a half precision to float32."""
    for _, values in shared_parameters(model):
        if name in values and values[name].dtype in (torch.float16, torch.bfloat16):
            values[name] = nn.Parameter(values[name].float(), values[name].requires_grad)


def entries(model: nn.Module, name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a state dict of the model has of the shared weights of that name."""
    keys = (f"{path}.{name}" for path, _ in shared_parameters(model))
    return {key: state_dict[key] for key in keys if key in state_dict}


def by_names_in_model(model: nn.Module, name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, with the name of the adapters in the names of shared weights."""
    paths = {path: f"{path}.{name}" for path, values in shared_parameters(model) if name in values}
    paths |= {IN_FILE + path: key for path, key in paths.items() if not path.startswith(IN_FILE)}
    return {paths.get(key, key): tensor for key, tensor in state_dict.items()}
