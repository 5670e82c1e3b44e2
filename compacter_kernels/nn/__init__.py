"""Drop-in modules that call the functions."""

from compacter_kernels.nn.adapter import CompacterAdapter
from compacter_kernels.nn.bank import AdapterBank
from compacter_kernels.nn.bottleneck import BottleneckAdapter
from compacter_kernels.nn.phm_linear import PHMLinear

__all__ = ["AdapterBank", "BottleneckAdapter", "CompacterAdapter", "PHMLinear"]
