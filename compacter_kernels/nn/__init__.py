"""Drop-in modules over the functions."""

from compacter_kernels.nn.adapter import CompacterAdapter
from compacter_kernels.nn.compression import Compression, from_dense
from compacter_kernels.nn.form_search import Candidate
from compacter_kernels.nn.phm_linear import PHMLinear

__all__ = ["Candidate", "CompacterAdapter", "Compression", "PHMLinear", "from_dense"]
