"""The weights that the adapters of one name share, kept once, on the model itself.

They are ParameterDicts beside the parameters of the model, such as `compacter_shared_phm_rule`,
keyed by the name of the adapters. There every way of peft to put adapters into a model keeps them,
also `inject_adapter_in_model`, which returns the model alone.
"""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from compacter_kernels.config import CompacterConfig
from compacter_kernels.inject.prepare import SharedWeights, shared_names
from compacter_kernels.nn import CompacterAdapter
from compacter_kernels.nn.flat_names import SHARED


class SharedParameters(nn.ParameterDict, BaseTunerLayer):
    """One shared weight of the adapters of a model, by their names.

    As a layer of peft it is saved, loaded, cast and told from the base like the other parameters of
    an adapter. The layers that borrow it switch it, train it and delete from it.
    """

    in_features = out_features = 0  # It maps nothing by itself.

    def get_base_layer(self) -> nn.Module:
        """An empty module, as this is no layer around a module of the base."""
        return nn.Module()


def borrow(
    model: nn.Module, name: str, adapter: CompacterAdapter, config: CompacterConfig
) -> dict[str, SharedParameters]:
    """Let an adapter borrow what those of its name share; return the dicts that own it.

    The shared weights of the first adapter of a name become those of all.
    """
    shared = shared_names(adapter, config)
    keys = dict.fromkeys(SHARED + key for names in shared.values() for key in names.values())
    if any(name not in getattr(model, key, ()) for key in keys):
        for key, parameter in list(SharedWeights(adapter, config).named_parameters()):
            if not hasattr(model, SHARED + key):
                setattr(model, SHARED + key, SharedParameters())
            getattr(model, SHARED + key)[name] = parameter
    for projection, names in shared.items():
        for own, key in names.items():
            getattr(adapter, projection).borrow(getattr(model, SHARED + key), **{own: name})
    return {key: getattr(model, key) for key in keys}


def remove(model: nn.Module) -> None:
    """Take all shared weights out of a model."""
    for key in [key for key, module in model.named_children() if isinstance(module, SharedParameters)]:
        delattr(model, key)
