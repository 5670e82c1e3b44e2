"""Compression of dense weights into sums of Kronecker products."""

from compacter_kernels.compress.compression import Compression, from_dense
from compacter_kernels.compress.form_search import Candidate

__all__ = ["Candidate", "Compression", "from_dense"]
