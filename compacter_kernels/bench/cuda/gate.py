"""Whether a provider may be timed, and how far it is off."""

from __future__ import annotations

from typing import NamedTuple

from compacter_kernels.accuracy import Oracle
from compacter_kernels.bench.cost import BOTH
from compacter_kernels.bench.providers import Provider
from compacter_kernels.bench.rivals import loose_limit

GATE_ELEMENTS = 2**25  # of x: above, as many tokens are checked as have these


class Verdict(NamedTuple):
    """wrong: what forbids timing, or None. worst: the largest error of a tensor over its limit in the contract."""

    wrong: str | None
    worst: float | None
    tokens: int | None


def judge(provider: Provider, oracle: Oracle) -> Verdict:
    """The provider on the oracle's case."""
    if not provider.checked:
        return Verdict(None, None, None)
    found = oracle.check(lambda case: provider.bind(case)(), gradients=BOTH in provider.directions, impl=provider.name)
    limit = loose_limit(oracle.case.x.dtype) if provider.loose else 0.0
    wrong = [str(deviation) for deviation in found if not (deviation.holds or deviation.error <= limit)]
    worst = max(deviation.error / deviation.limit for deviation in found)
    return Verdict("; ".join(wrong) or None, worst, oracle.case.x.shape[0])
