"""from_dense: a trained dense bottleneck adapter compressed into Compacter form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compacter_kernels.compress.dense_source import Dense, read
from compacter_kernels.compress.form_search import Candidate, list_forms, search
from compacter_kernels.kronecker_fit import fit, relative_error
from compacter_kernels.nn.adapter import CompacterAdapter
from compacter_kernels.nn.dense import DenseProjection, random_state_kept, rounded
from compacter_kernels.weights import PHMWeights

Source = nn.Module | tuple[DenseProjection, DenseProjection]


class Compression(NamedTuple):
    """What `from_dense` found.

    errors: for each adapter |H - H'| / |H| in the Frobenius norm, of down and of up, for the weights as they are stored
    (rounded to the dtype). parameters: numbers in weights, biases and rules, before and after. candidates: what was
    fitted, in that order; a form that could not have been chosen was not.
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
        """The adapter, where there is one; raises ValueError where there are several."""
        if len(self.adapters) > 1:
            raise ValueError(f"there are {len(self.adapters)} adapters; take one of .adapters")
        return self.adapters[0]


def from_dense(
    down: DenseProjection | nn.Module | Sequence[Source],
    up: DenseProjection | None = None,
    *,
    phm_dim: int | Sequence[int] | None = None,
    phm_rank: int | Sequence[int] | None = None,
    tolerance: float | None = None,
    shared_phm_rule: bool = True,
    phm_rule: nn.Parameter | None = None,
    factorized_phm_W: bool = True,
    activation: str | Callable[[Tensor], Tensor] | None = None,
    starts: int = 8,
    seed: int = 0,
    **options: Any,
) -> Compression:
    """The Compacter adapter nearest to a trained dense one, by alternating least squares on the rearranged weights.

    A trained dense matrix is in general not close to a sum of few Kronecker products, and the error says how far off
    it is: a start for further training rather than a replacement where it is large. The fit can be exact only if the
    rearranged matrix (n * n, in/n * out/n), with those of all that share the rule beside it, has rank n or less;
    from phm_rank = min(in/n, out/n) on, or with factorized_phm_W=False, it then is exact. Below that the W_i must have
    that rank as well, and the fit is a local optimum: the best of `starts`, which need not be the best there is.

    Args:
        down, up: the projections k -> d and d -> k, each an nn.Linear, a weight (out, in) or a pair (weight, bias). Or,
            as down alone, a module with two nn.Linear such as `adapters` makes; or a sequence of such modules and of
            pairs (down, up), all adapters of a model, which then share one rule.
        phm_dim, phm_rank: a number, several to choose from, or None: 1 to 16 as far as they divide all widths, and
            1, 2, 3, 4, 6, 8, 12, 16 as far as the parameters become fewer.
        tolerance: of several forms the one of fewest parameters whose error, that of the worst matrix, is within it.
            None: the one of least error**2 + parameters_after / parameters_before, so that a parameter is spent where
            it explains more than its share.
        shared_phm_rule: False fits a rule to each projection by itself.
        phm_rule: (n, n, n), a Parameter that the adapters share with others and that is left as it is.
        activation: None takes a module's own, and "gelu_new" where projections are passed.
        starts, seed: see `compacter_kernels.kronecker_fit.fit`; the same seed gives the same weights.
        options: what else `CompacterAdapter` takes (scale, dropout, add_residual, learn_phm, impl, ...).

    Returns:
        A Compression. The adapters have the source's dtype and device and its biases; if only one projection has a
        bias, the other's is zero. The source is not changed, and no global random state.

    Raises:
        TypeError, ValueError: before any work, an argument that does not fit, or weights that are not finite.
        ValueError: no form meets the tolerance; the message says what was reached.
    """
    sources = read(down, up)
    dtype, device = sources[0].down.dtype, sources[0].down.device
    _check(phm_rule, device, tolerance, starts)
    chosen = _options(sources, activation, options)
    chosen |= {"shared_phm_rule": shared_phm_rule, "factorized_phm_W": factorized_phm_W}
    forms = list_forms(sources, phm_dim, phm_rank, phm_rule, shared_phm_rule, factorized_phm_W)
    for n, r, _ in forms:
        _adapters(sources, n, r, phm_rule, chosen, torch.device("meta"))  # raises for what does not fit
    matrices = [h for dense in sources for h in dense.matrices()]
    groups = [matrices] if shared_phm_rule or phm_rule is not None else [[h] for h in matrices]
    rule = None if phm_rule is None else phm_rule.detach().to("cpu", torch.float64)

    def fitted(n: int, r: int | None) -> list[PHMWeights]:
        found = [w for group in groups for w in fit(group, n, r, rule=rule, starts=starts, seed=seed)]
        return [rounded(w, dtype, phm_rule is not None) for w in found]

    before = sum(dense.parameters for dense in sources)
    best, weights, candidates = search(forms, groups, fitted, before, tolerance)
    adapters = _adapters(sources, best.phm_dim, best.phm_rank, phm_rule, chosen, device)
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    for adapter, dense, (first, second) in zip(adapters, sources, pairs, strict=True):
        adapter.down.load_weights(first._replace(bias=dense.down_bias), phm_rule is None)
        adapter.up.load_weights(second._replace(bias=dense.up_bias), phm_rule is None)
    errors = [relative_error(h, w) for h, w in zip(matrices, weights, strict=True)]
    by_adapter = tuple(zip(errors[::2], errors[1::2], strict=True))
    return Compression(
        tuple(adapters), by_adapter, best.phm_dim, best.phm_rank, before, best.parameters, tuple(candidates)
    )


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
    """What CompacterAdapter is given beside its sizes: what the modules say, unless the caller says it."""
    taken = {"hidden_size", "reduction_factor", "phm_bias", "factorized_phm_rule", "device", "dtype"}
    if unknown := taken & options.keys():
        raise TypeError(f"from_dense takes no {', '.join(sorted(unknown))}: the dense adapter says it")
    given = options if activation is None else {**options, "activation": activation}
    merged = [{**dense.options, **given} for dense in sources]
    for i, one in enumerate(merged):
        if one != merged[0]:
            raise ValueError(f"adapter {i} has {one}, the first {merged[0]}; they must agree, or be passed as options")
    if merged[0].get("activation", "") is None:
        raise ValueError("activation is None, but the module does not show which it is; name it or pass a callable")
    return merged[0]


def _adapters(
    sources: Sequence[Dense],
    n: int,
    r: int | None,
    phm_rule: nn.Parameter | None,
    options: dict[str, Any],
    device: torch.device,
) -> list[CompacterAdapter]:
    """The adapters with weights still to be loaded; several share a rule that none of them owns."""
    dtype = sources[0].down.dtype
    if phm_rule is None and options["shared_phm_rule"] and len(sources) > 1:
        phm_rule = nn.Parameter(torch.empty(n, n, n, device=device, dtype=dtype), options.get("learn_phm", True))
    with random_state_kept(device):
        return [
            CompacterAdapter(
                dense.hidden_size,
                reduction_factor=_reduction_factor(dense.hidden_size, dense.bottleneck),
                phm_dim=n,
                phm_rank=r or 1,
                phm_rule=phm_rule,
                phm_bias=dense.has_bias,
                device=device,
                dtype=dtype,
                **options,
            )
            for dense in sources
        ]


def _reduction_factor(hidden_size: int, bottleneck: int) -> float:
    """A factor for which hidden_size // factor is the bottleneck, an int where there is one."""
    if hidden_size % bottleneck == 0:
        return hidden_size // bottleneck
    factor = hidden_size / bottleneck
    while hidden_size // factor < bottleneck:  # rounded up
        factor = math.nextafter(factor, 0.0)
    return factor
