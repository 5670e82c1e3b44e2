"""The forms that `from_dense` can choose from, and the choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from compacter_kernels.compress.dense_source import Dense
from compacter_kernels.kronecker_fit import least_error, relative_error
from compacter_kernels.problem import check_phm_dim
from compacter_kernels.weights import PHMWeights

PHM_DIMS = tuple(range(1, 17))  # tried if phm_dim is not given, as far as they divide the widths
PHM_RANKS = (1, 2, 3, 4, 6, 8, 12, 16)  # tried if phm_rank is not given
Numbers = int | Sequence[int] | None


class Candidate(NamedTuple):
    """A fitted form. phm_rank: None if W is unfactorised; error: the largest of any matrix."""

    phm_dim: int
    phm_rank: int | None
    parameters: int
    error: float


def list_forms(
    sources: Sequence[Dense], phm_dim: Numbers, phm_rank: Numbers, rule_dim: int | None, shared: bool, factorized: bool
) -> list[tuple[int, int | None, int]]:
    """phm_dim, phm_rank and parameter count of each form to try, the fewest parameters first.

    rule_dim: the phm_dim of a given rule. shared: whether all projections share one rule.
    """
    widths = sorted({width for dense in sources for width in (dense.hidden_size, dense.bottleneck)})
    dims = _listed(phm_dim, "phm_dim")
    ranks = _listed(phm_rank, "phm_rank")
    if not factorized and ranks is not None:
        raise ValueError(f"phm_rank={phm_rank!r} has no meaning with factorized_phm_W=False; leave it out")
    if rule_dim is not None:
        if dims not in (None, [rule_dim]):
            raise ValueError(f"phm_dim={phm_dim!r} is not that of phm_rule, {rule_dim}; leave it out")
        dims = [rule_dim]
    for n in dims or ():
        for dense in sources:
            check_phm_dim(n, 1, hidden_size=dense.hidden_size, bottleneck=dense.bottleneck)
    before = sum(dense.parameters for dense in sources)
    forms = []
    for n in dims or [n for n in PHM_DIMS if not any(width % n for width in widths)]:
        full = max(dense.bottleneck // n for dense in sources)
        for r in [None] if not factorized else ranks or [r for r in PHM_RANKS if r == 1 or r <= full]:
            count = n**3 * (1 if shared else 2 * len(sources))
            for dense in sources:
                k, d = dense.hidden_size, dense.bottleneck
                count += (k + d if dense.has_bias else 0) + 2 * (k * d // n if r is None else r * (k + d))
            if (dims and (ranks or not factorized)) or count < before:
                forms.append((n, r, count))
    if not forms:
        raise ValueError(
            f"no form searched has fewer parameters than the dense adapter, {before}; name phm_dim and phm_rank"
        )
    return sorted(forms, key=lambda form: (form[2], form[0]))


def _listed(value: Numbers, name: str) -> list[int] | None:
    if value is None:
        return None
    numbers: list[object] = list(value) if isinstance(value, Sequence) else [value]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise ValueError(f"{name} must be an integer >= 1, several of them or None, got {value!r}")
    return numbers  # type: ignore[return-value]


def search(
    forms: Sequence[tuple[int, int | None, int]],
    groups: Sequence[Sequence[Tensor]],
    fitted: Callable[[int, int | None], list[PHMWeights]],
    before: int,
    tolerance: float | None,
) -> tuple[Candidate, list[PHMWeights], list[Candidate]]:
    """The form that `from_dense` promises, its weights, and all fitted forms.

    The forms come with the fewest parameters first. No rank has an error below `least_error`, so a
    form that could not win even with that error is not fitted.
    """
    matrices = [h for group in groups for h in group]
    candidates: list[Candidate] = []
    best: tuple[float, Candidate, list[PHMWeights]] | None = None
    bounds: dict[int, float] = {}

    def score(error: float, parameters: int) -> float:
        return error if tolerance is not None else error**2 + parameters / before

    for n, r, parameters in forms:
        if n not in bounds:
            squares = sum(least_error(group, n) ** 2 * len(group) for group in groups)
            bounds[n] = math.sqrt(squares / len(matrices))
        if score(bounds[n], parameters) > (tolerance if tolerance is not None else best[0] if best else math.inf):
            continue
        weights = fitted(n, r)
        error = max(relative_error(h, w) for h, w in zip(matrices, weights, strict=True))
        candidates.append(Candidate(n, r, parameters, error))
        if best is None or score(error, parameters) < best[0]:
            best = score(error, parameters), candidates[-1], weights
        if tolerance is not None and error <= tolerance:
            return candidates[-1], weights, candidates
    if tolerance is None and best is not None:
        return best[1], best[2], candidates
    n, bound = min(bounds.items(), key=lambda item: item[1])
    least = f"the best found is {best[1]}" if best else f"the least that any rank leaves is {bound:.3g}, at phm_dim={n}"
    raise ValueError(f"no form has an error within tolerance={tolerance}: {least}; raise it, or allow more forms")
