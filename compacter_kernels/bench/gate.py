"""The correctness gate: whether a provider may be timed, and how far it is off."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compacter_kernels.accuracy import Deviation, Oracle, error, floor
from compacter_kernels.bench.cost import BOTH
from compacter_kernels.bench.providers import Formula, OwnWeights, Provider
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
    gradients, x = BOTH in provider.directions, oracle.inputs.x
    if provider.formula is not None:
        deviations = _of_own_weights(provider, provider.formula, oracle.inputs)
    else:
        deviations = oracle.check(lambda case: provider.bind(case)(), gradients=gradients, impl=provider.name)
    limit = LOOSE_UNITS * torch.finfo(x.dtype).eps if provider.loose else 0.0
    wrong = [str(deviation) for deviation in deviations if not (deviation.holds or deviation.error <= limit)]
    worst = max(deviation.error / deviation.limit for deviation in deviations)
    return Verdict("; ".join(wrong) or None, worst, x.shape[0])


def _of_own_weights(provider: Provider, formula: Formula, case: Inputs) -> list[Deviation]:
    """Return the errors of a module against its formula, by the rule of the contract."""
    call = provider.bind(case.map(lambda t: t.detach().requires_grad_()))
    assert isinstance(call, OwnWeights)
    grad, kinds = case.grad.detach(), [tensor.dtype for tensor in (call.x, *call.leaves)]

    def by_formula(dtype: torch.dtype) -> list[Tensor]:
        copies = [leaf.detach().to(dtype).requires_grad_() for leaf in call.leaves]
        out = formula(*copies)
        return [out, *torch.autograd.grad(out, copies, grad.to(dtype))]

    out = call()
    found = [out, *torch.autograd.grad(out, call.leaves, grad)]
    deviations = []
    for index, (got, exact, plain) in enumerate(
        zip(found, by_formula(torch.float64), by_formula(torch.float32), strict=True)
    ):
        limit = max(2 * error(plain, exact), floor(kinds[index], torch.float32))
        name = ("out", "x")[index] if index < 2 else f"weight {index - 2}"
        deviations.append(Deviation(name, error(got, exact), limit))
    return deviations
