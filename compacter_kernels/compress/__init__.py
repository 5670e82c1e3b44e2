"""Compression of dense weights into sums of Kronecker products."""

from compacter_kernels.compress.compression import Candidate, Compression, from_dense

__all__ = ["Candidate", "Compression", "from_dense"]
