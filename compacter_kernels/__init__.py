"""Fused kernels for Compacter adapters (arXiv 2106.04647): the Kronecker-structured projections, without building H."""

from compacter_kernels.dispatch import available_impls
from compacter_kernels.functional import compacter_adapter, explain, phm_linear, phm_matrix
from compacter_kernels.nn import CompacterAdapter, PHMLinear
from compacter_kernels.weights import PHMWeights

__version__ = "0.1.0"

__all__ = [
    "CompacterAdapter",
    "PHMLinear",
    "PHMWeights",
    "__version__",
    "available_impls",
    "compacter_adapter",
    "explain",
    "phm_linear",
    "phm_matrix",
]
