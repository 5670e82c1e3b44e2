"""from_dense compresses a trained dense bottleneck adapter into Compacter form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compacter_kernels.compress.dense_source import Dense, read_adapters, read_inputs
from compacter_kernels.input_statistics import InputStatistics
from compacter_kernels.kronecker_fit import fit, least_error, relative_error
from compacter_kernels.nn.adapter import CompacterAdapter, reduction_factor_of
from compacter_kernels.nn.dense import DenseProjection, load_weights, random_state_kept, rounded
from compacter_kernels.output_fit import refit
from compacter_kernels.problem import check_phm_dim
from compacter_kernels.weights import PHMWeights

Source = nn.Module | tuple[DenseProjection, DenseProjection]
PHM_DIMS = tuple(range(1, 17))  # tried if phm_dim is not given, as far as they divide the widths
PHM_RANKS = (1, 2, 3, 4, 6, 8, 12, 16)  # tried if phm_rank is not given
Numbers = int | Sequence[int] | None
Inputs = InputStatistics | tuple[InputStatistics | None, InputStatistics | None]


class Candidate(NamedTuple):
    """A fitted form. phm_rank: None if W is unfactorised; error: the largest of any matrix."""

    phm_dim: int
    phm_rank: int | None
    parameters: int
    error: float


class Compression(NamedTuple):
    """The result of `from_dense`.

    errors: |H - H'| / |H| in the Frobenius norm for down and up of each adapter, with the matrix H'
        of the stored weights, rounded to the dtype. |X (H - H')| / |X H| where `inputs` were given.
    parameters_before, parameters_after: the size of all weights, biases and rules.
    candidates: the forms that were fitted, in this order. Forms that cannot win are not fitted.
    """

    adapters: tuple[CompacterAdapter, ...]
    errors: tuple[tuple[float, float], ...]
    phm_dim: int
    phm_rank: int | None
    parameters_before: int
    parameters_after: int
    candidates: tuple[Candidate, ...]

    @property
    def error(self) -> float:
        """The largest of the errors."""
        return max(map(max, self.errors))

    @property
    def adapter(self) -> CompacterAdapter:
        """The only adapter; raises ValueError if there are several."""
        if len(self.adapters) > 1:
            raise ValueError(f"there are {len(self.adapters)} adapters; take one of .adapters")
        return self.adapters[0]


def from_dense(
    down: DenseProjection | nn.Module | Sequence[Source],
    up: DenseProjection | None = None,
    *,
    inputs: Inputs | Sequence[Inputs] | None = None,
    phm_dim: Numbers = None,
    phm_rank: Numbers = None,
    tolerance: float | None = None,
    shared_phm_rule: bool = True,
    phm_rule: nn.Parameter | None = None,
    factorized_phm_W: bool = True,
    activation: str | Callable[[Tensor], Tensor] | None = None,
    starts: int = 8,
    seed: int = 0,
    **options: Any,
) -> Compression:
    """Find the Compacter adapter nearest to a trained dense one, by alternating least squares.

    A trained dense matrix is in general not close to a sum of few Kronecker products. If the error
    is large, the result is a start for further training rather than a replacement. The fit can be
    exact only if the rearranged matrix (n * n, in/n * out/n), beside those of all projections that
    share the rule, has rank n or less. It then is exact from phm_rank = min(in/n, out/n) on, and
    with factorized_phm_W=False. With a smaller phm_rank the W_i must have this rank too, and the
    result is the best local optimum of `starts`, not always the global one.

    With `inputs` the errors of the outputs |X (H - H')| count in place of those of the matrices.
    The fit then goes on from that of the matrices, and every step reduces the sum of their squares.

    Args:
        down, up: the projections k -> d and d -> k, each an nn.Linear, a weight (out, in) or a pair
            (weight, bias). down alone may be a module with two nn.Linear, as `adapters` makes it,
            or a sequence of such modules and pairs (down, up): adapters that will share one rule.
        inputs: an InputStatistics of x, the input of down, or a pair of those of down and of up,
            each or None; for several adapters a sequence of these. Their C = X^T X may be singular:
            what the inputs leave open stays that of the fit to the matrix, as with None.
        phm_dim, phm_rank: a number, several to choose from, or None. None tries the phm_dims 1 to
            16 that divide all widths, and the ranks 1, 2, 3, 4, 6, 8, 12, 16 that reduce the
            number of parameters.
        tolerance: choose the form with the fewest parameters whose largest error of a matrix is at
            most this. None: choose the least error**2 + parameters_after / parameters_before, so
            that parameters are added only where they reduce the error by more than their share.
        shared_phm_rule: False fits one rule for each projection.
        phm_rule: a Parameter (n, n, n) that the adapters share and that is not changed.
        activation: None takes that of a module, or "gelu_new" for projections.
        starts, seed: see `compacter_kernels.kronecker_fit.fit`; one seed gives the same weights.
        options: other options of `CompacterAdapter`: scale, dropout, add_residual, learn_phm, ...

    Returns:
        A Compression. The adapters have the dtype, device and biases of the source; a projection
        without a bias gets zeros if the other has one. The source and the random state are kept.

    Raises:
        TypeError, ValueError: before any work, an argument does not fit or a weight is not finite.
        ValueError: no form is within the tolerance; the message says which error was reached.
    """
    sources = read_adapters(down, up)
    several = up is None and isinstance(down, (list, tuple, nn.ModuleList))
    covariances = read_inputs(inputs, sources, several)
    dtype, device = sources[0].down.dtype, sources[0].down.device
    _check(phm_rule, device, tolerance, starts)
    chosen = _options(sources, activation, options)
    chosen |= {"phm_rule": phm_rule, "shared_phm_rule": shared_phm_rule, "factorized_phm_W": factorized_phm_W}
    rule_dim = None if phm_rule is None else phm_rule.shape[0]
    shared = shared_phm_rule or phm_rule is not None
    forms = _forms(sources, phm_dim, phm_rank, rule_dim, shared, factorized_phm_W)
    for n, r, _ in forms:
        _adapters(sources, n, r, chosen, torch.device("meta"))  # raises for a wrong option
    matrices = [w.detach().to("cpu", torch.float64).T for dense in sources for w in (dense.down, dense.up)]
    groups = [matrices] if shared else [[h] for h in matrices]
    covariances_of_groups = [covariances] if shared else [[c] for c in covariances]
    rule = None if phm_rule is None else phm_rule.detach().to("cpu", torch.float64)

    def fitted(n: int, r: int | None) -> list[PHMWeights]:
        weights: list[PHMWeights] = []
        for group, of_inputs in zip(groups, covariances_of_groups, strict=True):
            nearest = fit(group, n, r, rule=rule, starts=starts, seed=seed)
            weights += refit(group, of_inputs, nearest, rule is not None)
        return [rounded(w, dtype, phm_rule is not None) for w in weights]

    def errors_of(weights: list[PHMWeights]) -> list[float]:
        return [relative_error(h, w, c) for h, w, c in zip(matrices, weights, covariances, strict=True)]

    def bound(n: int) -> float:
        """The least root mean square of the errors that any rank leaves, 0 where none is known."""
        if any(c is not None for c in covariances):
            return 0.0
        return math.sqrt(sum(least_error(group, n) ** 2 * len(group) for group in groups) / len(matrices))

    before = sum(dense.parameters for dense in sources)
    best, weights, candidates = _search(forms, bound, fitted, errors_of, before, tolerance)
    adapters = _adapters(sources, best.phm_dim, best.phm_rank, chosen, device)
    for adapter, dense, first, second in zip(adapters, sources, weights[::2], weights[1::2], strict=True):
        load_weights(adapter.down, first._replace(bias=dense.down_bias), phm_rule is None)
        load_weights(adapter.up, second._replace(bias=dense.up_bias), phm_rule is None)
    errors = errors_of(weights)
    by_adapter = tuple(zip(errors[::2], errors[1::2], strict=True))
    form = best.phm_dim, best.phm_rank
    return Compression(tuple(adapters), by_adapter, *form, before, best.parameters, tuple(candidates))


def _check(phm_rule: object, device: torch.device, tolerance: object, starts: object) -> None:
    if phm_rule is not None:
        if not isinstance(phm_rule, nn.Parameter):
            raise TypeError(
                f"phm_rule must be a torch.nn.Parameter, so that it is shared, got {type(phm_rule).__name__}"
            )
        if phm_rule.ndim != 3 or len(set(phm_rule.shape)) != 1:
            raise ValueError(f"phm_rule must have shape (phm_dim, phm_dim, phm_dim), got {tuple(phm_rule.shape)}")
        if phm_rule.device != device:
            raise ValueError(f"phm_rule is on {phm_rule.device}, the adapter on {device}; move one of them")
        if not phm_rule.isfinite().all():
            raise ValueError("phm_rule holds NaN or infinite values")
    if tolerance is not None and not (isinstance(tolerance, (float, int)) and tolerance >= 0):
        raise ValueError(f"tolerance must be a number >= 0 or None, got {tolerance!r}")
    if not isinstance(starts, int) or starts < 1:
        raise ValueError(f"starts must be an integer >= 1, got {starts!r}")


def _options(sources: Sequence[Dense], activation: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of CompacterAdapter besides its sizes, from the caller or else the modules."""
    read_from_source = {"hidden_size", "reduction_factor", "phm_bias", "factorized_phm_rule", "device", "dtype"}
    if unknown := read_from_source & options.keys():
        raise TypeError(f"from_dense takes no {', '.join(sorted(unknown))}: the dense adapter determines it")
    given = options if activation is None else {**options, "activation": activation}
    merged = [{**dense.options, **given} for dense in sources]
    for i, each in enumerate(merged):
        if each != merged[0]:
            raise ValueError(f"adapter {i} has {each}, the first {merged[0]}; they must agree, or be passed as options")
    if merged[0].get("activation", "") is None:
        raise ValueError("activation is None, but the module does not show which it is; name it or pass a callable")
    return merged[0]


def _forms(
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


def _search(
    forms: Sequence[tuple[int, int | None, int]],
    bound: Callable[[int], float],
    fitted: Callable[[int, int | None], list[PHMWeights]],
    errors_of: Callable[[list[PHMWeights]], list[float]],
    before: int,
    tolerance: float | None,
) -> tuple[Candidate, list[PHMWeights], list[Candidate]]:
    """The form that `from_dense` promises, its weights, and all fitted forms.

    The forms come with the fewest parameters first. No rank has an error below `bound`, so a form
    that could not win even with that error is not fitted.
    """
    candidates: list[Candidate] = []
    best: tuple[float, Candidate, list[PHMWeights]] | None = None
    bounds: dict[int, float] = {}

    def score(error: float, parameters: int) -> float:
        return error if tolerance is not None else error**2 + parameters / before

    for n, r, parameters in forms:
        if n not in bounds:
            bounds[n] = bound(n)
        if score(bounds[n], parameters) > (tolerance if tolerance is not None else best[0] if best else math.inf):
            continue
        weights = fitted(n, r)
        error = max(errors_of(weights))
        candidates.append(Candidate(n, r, parameters, error))
        if best is None or score(error, parameters) < best[0]:
            best = score(error, parameters), candidates[-1], weights
        if tolerance is not None and error <= tolerance:
            return candidates[-1], weights, candidates
    if tolerance is None and best is not None:
        return best[1], best[2], candidates
    n, left = min(bounds.items(), key=lambda item: item[1])
    least = f"the best found is {best[1]}" if best else f"the least that any rank leaves is {left:.3g}, at phm_dim={n}"
    raise ValueError(f"no form has an error within tolerance={tolerance}: {least}; raise it, or allow more forms")


def _adapters(
    sources: Sequence[Dense], n: int, r: int | None, options: dict[str, Any], device: torch.device
) -> list[CompacterAdapter]:
    """New adapters without their weights. If several share a rule, none of them draws it."""
    dtype = sources[0].down.dtype
    if options["phm_rule"] is None and options["shared_phm_rule"] and len(sources) > 1:
        rule = nn.Parameter(torch.empty(n, n, n, device=device, dtype=dtype), options.get("learn_phm", True))
        options = {**options, "phm_rule": rule}
    with random_state_kept(device):
        return [
            CompacterAdapter(
                dense.hidden_size,
                reduction_factor=reduction_factor_of(dense.hidden_size, dense.bottleneck),
                phm_dim=n,
                phm_rank=r or 1,
                phm_bias=dense.has_bias,
                device=device,
                dtype=dtype,
                **options,
            )
            for dense in sources
        ]
