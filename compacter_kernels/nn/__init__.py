"""Drop-in modules that call the functions."""

from compacter_kernels.nn.adapter import CompacterAdapter
from compacter_kernels.nn.phm_linear import PHMLinear

__all__ = ["CompacterAdapter", "PHMLinear"]
