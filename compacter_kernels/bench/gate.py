"""The correctness gate: whether a provider may be timed, and how far it is off."""

from __future__ import annotations

from typing import NamedTuple

import torch

from compacter_kernels.accuracy import Oracle
from compacter_kernels.bench.cost import BOTH
from compacter_kernels.bench.providers import Provider
from compacter_kernels.cases import Inputs

GATE_ELEMENTS = 2**25  # of x; only the first tokens of a larger x are checked
LOOSE_UNITS = 16  # in the last place of the dtype of x: the limit for a loose provider


class Verdict(NamedTuple):
    """wrong: why the provider must not be timed. worst: its largest error over the limit."""

    wrong: str | None = None
    worst: float | None = None
    tokens: int | None = None


def first_tokens(case: Inputs) -> Inputs:
    """Return the same call on the first tokens, which have at most GATE_ELEMENTS elements of x."""
    tokens = max(1, GATE_ELEMENTS // case.x.shape[1])
    x = case.x[:tokens]
    return case._replace(x=x, residual=x, grad=case.grad[:tokens])


def judge(provider: Provider, oracle: Oracle) -> Verdict:
    """Check the output of a provider, and its gradients where it has any."""
    if not provider.checked:
        return Verdict()
    gradients = BOTH in provider.directions
    deviations = oracle.check(lambda case: provider.bind(case)(), gradients=gradients, impl=provider.name)
    x = oracle.inputs.x
    limit = LOOSE_UNITS * torch.finfo(x.dtype).eps if provider.loose else 0.0
    wrong = [str(deviation) for deviation in deviations if not (deviation.holds or deviation.error <= limit)]
    worst = max(deviation.error / deviation.limit for deviation in deviations)
    return Verdict("; ".join(wrong) or None, worst, x.shape[0])
