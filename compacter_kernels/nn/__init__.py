"""Drop-in modules over the functions."""

from compacter_kernels.nn.adapter import CompacterAdapter
from compacter_kernels.nn.phm_linear import PHMLinear

__all__ = ["CompacterAdapter", "PHMLinear"]
