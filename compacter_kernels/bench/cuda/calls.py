"""The calls that are timed. What they return is what a fused call would write, so that a graph can keep it apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compacter_kernels.accuracy import Case
from compacter_kernels.bench.cost import FORWARD
from compacter_kernels.bench.providers import Provider

Results = Callable[[], tuple[Tensor, ...]]


def _copy(case: Case, direction: str) -> Results:
    """The bytes of the fused calls: x read, out written; then x and the gradient read, dx written. No autograd."""
    x, grad = case.x, case.grad
    if direction == FORWARD:
        return lambda: (x.clone(),)
    return lambda: (x.clone(), torch.add(x, grad))


def make_call(provider: Provider, case: Case, direction: str) -> Results:
    """Without grad for forward; else the output and the gradients of x and of all parameters."""
    if not provider.checked:
        return _copy(case, direction)
    if direction == FORWARD:
        run = provider.bind(case)

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (run(),)

        return forward
    case = case.map(lambda t: t.detach().requires_grad_())
    wanted, grad, run = list(case.tensors().values()), case.grad.detach(), provider.bind(case)

    def both() -> tuple[Tensor, ...]:
        out = run()
        return (out.detach(), *torch.autograd.grad(out, wanted, grad))

    return both
