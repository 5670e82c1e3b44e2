"""The tensors of a cell on the device: one set of weights, and enough copies of x and of the gradient to be cold."""

from __future__ import annotations

import torch

from compacter_kernels.accuracy import Case, random_case
from compacter_kernels.bench import cost
from compacter_kernels.bench.rows import Cell

L2_MULTIPLE = 3
MAX_COPIES = 256


def copies_needed(cell: Cell, dtype: torch.dtype, direction: str, l2: int) -> int:
    """How many copies of all buffers of a call are together L2_MULTIPLE times the L2; at least 2."""
    size = cost.traffic(cell.shape, cell.tokens, direction, dtype.itemsize)
    return max(2, -(-L2_MULTIPLE * l2 // size))


def make_cases(cell: Cell, dtype: torch.dtype, count: int) -> list[Case]:
    """Cases with the same weights, each with an x and a gradient of its own; the residual is x."""
    base = random_case(cell.shape, 1, dtype=dtype).map(lambda t: t.to("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(cell.tokens, cell.shape.k, generator=generator, device="cuda", dtype=dtype)

    found = []
    for _ in range(count):
        x = normal()
        found.append(base._replace(x=x, residual=x, grad=normal()))
    return found


def first_tokens(case: Case, tokens: int) -> Case:
    """The same call on the first tokens only."""
    if tokens >= case.x.shape[0]:
        return case
    x = case.x[:tokens]
    return case._replace(x=x, residual=x, grad=case.grad[:tokens])
