"""Which impl is the fastest on a GPU, as far as it was measured: a new measurement changes the table, nothing else."""

from __future__ import annotations

from typing import NamedTuple

import torch

from compacter_kernels.impl import architecture
from compacter_kernels.problem import Problem


class Class(NamedTuple):
    """Calls that run alike: an operation of rank 1 with both projections of one of these phm_dims."""

    operation: str
    architecture: str
    dtype: torch.dtype
    phm_dims: tuple[int, ...]


class Measured(NamedTuple):
    """The impls that were timed, fastest first, and the file or folder that says so."""

    impls: tuple[str, ...]
    source: str


MEASURED = {
    Class("adapter", "sm_90", torch.bfloat16, (4, 8, 12)): Measured(("triton",), "benchmarks/results/h200"),
}
NOTHING = Measured((), "")


def measured(problem: Problem) -> Measured:
    """What was measured on calls like this one."""
    sizes = {(p.phm_dim, p.rank) for p in problem.projections}
    here = architecture(problem.device)
    for kind, found in MEASURED.items():
        if (problem.operation, here, problem.dtype) == kind[:3] and sizes <= {(n, 1) for n in kind.phm_dims}:
            return found
    return NOTHING
