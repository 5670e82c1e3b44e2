"""Fused kernels for Compacter adapters (arXiv 2106.04647), which never build the matrix H."""

from typing import TYPE_CHECKING, Any

from compacter_kernels.choose import mix, route
from compacter_kernels.compress import Compression, from_dense
from compacter_kernels.config import CompacterConfig, CompacterPlusPlusConfig
from compacter_kernels.dispatch import available_impls
from compacter_kernels.ensemble import minimise_entropy
from compacter_kernels.functional import (
    bottleneck_adapter,
    compacter_adapter,
    compacter_adapter_bank,
    explain,
    kronecker_linear,
    phm_linear,
    phm_matrix,
)
from compacter_kernels.inject.api import (
    adapter_parameters,
    count_parameters,
    disable_adapters,
    inject,
    print_trainable_parameters,
    remove_adapters,
    set_adapter,
)
from compacter_kernels.input_statistics import InputStatistics
from compacter_kernels.load import load_adapter
from compacter_kernels.nn import AdapterBank, BottleneckAdapter, CompacterAdapter, PHMLinear
from compacter_kernels.patch.patch import patch, unpatch
from compacter_kernels.save import save_adapter
from compacter_kernels.weights import LinearWeights, NormWeights, PHMWeights

if TYPE_CHECKING:
    from compacter_kernels.checkpoints.convert import convert

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "BottleneckAdapter",
    "CompacterAdapter",
    "CompacterConfig",
    "CompacterPlusPlusConfig",
    "Compression",
    "InputStatistics",
    "LinearWeights",
    "NormWeights",
    "PHMLinear",
    "PHMWeights",
    "__version__",
    "adapter_parameters",
    "available_impls",
    "bottleneck_adapter",
    "compacter_adapter",
    "compacter_adapter_bank",
    "convert",
    "count_parameters",
    "disable_adapters",
    "explain",
    "from_dense",
    "inject",
    "kronecker_linear",
    "load_adapter",
    "minimise_entropy",
    "mix",
    "patch",
    "phm_linear",
    "phm_matrix",
    "print_trainable_parameters",
    "remove_adapters",
    "route",
    "save_adapter",
    "set_adapter",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """Import `convert` when it is first used: it knows many formats, and few programs convert."""
    if name != "convert":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from compacter_kernels.checkpoints.convert import convert

    return globals().setdefault(name, convert)
