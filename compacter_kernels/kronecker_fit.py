"""The sums of Kronecker products nearest to given matrices in the Frobenius norm.

With a = in/n and c = out/n, H = sum_i A_i (x) W_i is the same as R = sum_i A_i[p, q] W_i[u, v] for
the rearranged R[(p, q), u, v] = H[p * a + u, q * c + v] (Van Loan and Pitsianis, 1993). If the rank
of the W_i is not bounded, the best fit is the truncated singular value decomposition of R as a
matrix (n * n, a * c). With W_i = s_i t_i of rank r the problem is linear in the rule, in the s_i
and in the t_i, each given the others: alternating least squares solves for them in turn. If several
matrices share a rule, their R stand side by side.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from compacter_kernels.weights import PHMWeights

EXACT = 1e-26  # the sum of squared relative errors that rounding in float64 leaves
EXPLORED, EXPLORED_GAIN = 300, 1e-6  # the most sweeps from each start, and the least gain of a sweep that goes on
REFINED, REFINED_GAIN = 1000, 1e-9  # the same for the best start
TINY = 1e-200  # replaces a zero divisor


class State(NamedTuple):
    """A fit: rule (n*n, n); left (m, n, a, r), right (m, n, r, c) of each group of m matrices."""

    rule: Tensor
    left: list[Tensor]
    right: list[Tensor]

    def beyond(self, previous: State, step: float) -> State:
        """The point `step` times their distance beyond this one, on the line from `previous`."""
        left, right = (
            [torch.lerp(old, new, 1 + step) for old, new in zip(*sides, strict=True)]
            for sides in ((previous.left, self.left), (previous.right, self.right))
        )
        return State(torch.lerp(previous.rule, self.rule, 1 + step), left, right)


def rearranged(matrix: Tensor, phm_dim: int) -> Tensor:
    """H (in, out) -> R (n*n, in/n, out/n), the blocks of H one after the other."""
    n = phm_dim
    a, c = matrix.shape[0] // n, matrix.shape[1] // n
    return matrix.reshape(n, a, n, c).transpose(1, 2).reshape(n * n, a, c)


def combined(rule: Tensor, w: Tensor) -> Tensor:
    """H (in, out) = sum_i A_i (x) W_i of a rule (n, n, n) and w (n, in/n, out/n)."""
    n, a, c = w.shape
    return torch.einsum("ipq,iuv->puqv", rule, w).reshape(n * a, n * c)


def norm(matrix: Tensor, covariance: Tensor | None = None) -> float:
    """|H| in the Frobenius norm, or |X H| given C = X^T X."""
    if covariance is None:
        return float(matrix.norm())
    return math.sqrt(max(float((matrix * (covariance @ matrix)).sum()), 0.0))  # rounding may leave less than 0


def relative_error(matrix: Tensor, weights: PHMWeights, covariance: Tensor | None = None) -> float:
    """|H - H'| / |H| for the matrix H' of the weights, by `norm`; |H'| if |H| is zero."""
    left = weights.left.double()
    w = left if weights.right is None else left @ weights.right.double()
    matrix = matrix.double()
    return norm(matrix - combined(weights.rule.double(), w), covariance) / (norm(matrix, covariance) or 1.0)


def least_error(matrices: Sequence[Tensor], phm_dim: int) -> float:
    """The least root mean square of the relative errors with one shared rule, over all ranks."""
    values = torch.linalg.svdvals(
        torch.cat([rearranged(h, phm_dim).flatten(1) / (float(h.norm()) or 1.0) for h in matrices], 1)
    )
    return math.sqrt(float(values[phm_dim:].square().sum()) / len(matrices))


def fit(
    matrices: Sequence[Tensor],
    phm_dim: int,
    phm_rank: int | None,
    *,
    rule: Tensor | None = None,
    starts: int = 8,
    seed: int = 0,
) -> list[PHMWeights]:
    """Fit one rule and the factors of each matrix: the sum of squared relative errors is small.

    Args:
        matrices: each H (in, out), finite, float64, on the CPU; phm_dim divides all widths.
        phm_rank: r, the rank of the W_i; None for unfactorised W_i.
        rule: a rule (n, n, n) to keep instead of fitting one.
        starts: the number of starting points of alternating least squares: the singular vectors,
            and rotations of them drawn from `seed`, without the global generator. With a given rule
            there is one.

    Returns:
        The PHMWeights of each matrix, float64, without bias, rule and factors of similar magnitude.
        The fit is optimal if r bounds no W_i, and otherwise the best local optimum of the starts.
    """
    n = phm_dim
    norms = torch.tensor([float(h.norm()) or 1.0 for h in matrices], dtype=torch.float64)
    shapes = list(dict.fromkeys(h.shape for h in matrices))
    groups = [[i for i, h in enumerate(matrices) if h.shape == shape] for shape in shapes]
    targets = [torch.stack([rearranged(matrices[i], n) / norms[i] for i in group]) for group in groups]
    basis = _principal_rule(targets, n) if rule is None else rule.double().reshape(n, n * n).T
    full_rank = max(min(target.shape[2:]) for target in targets)
    state = _start(targets, basis, phm_rank or full_rank)
    if phm_rank is not None and phm_rank < full_rank:
        points, generator = [state], torch.Generator().manual_seed(seed)
        for _ in range(starts - 1 if rule is None else 0):
            rotation = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
            points.append(_start(targets, basis @ rotation, phm_rank))
        state = _best_descent(targets, points, rule is not None)
    factors: dict[int, tuple[Tensor, ...]] = {}
    for group, left, right in zip(groups, state.left, state.right, strict=True):
        w = left @ right * norms[group, None, None, None]
        factors.update(zip(group, zip(*((w,) if phm_rank is None else split(w, phm_rank)), strict=True), strict=True))
    return balanced(state.rule.T.reshape(n, n, n), [factors[i] for i in range(len(matrices))], rule is not None)


def descent(
    sweep: Callable[[State], tuple[State, float]], state: State, sweeps: int, gain: float
) -> Iterator[tuple[State, float]]:
    """Yield the result of each sweep and its sum of squared errors, which never rises.

    A sweep starts beyond the last state, on the line through the last two. If that does not reduce
    the error, the sweep starts from the last state itself (Mitchell, Ye and De Sterck, 2020). The
    descent ends after `sweeps`, or when a sweep reduces the error by less than the share `gain`.
    """
    step, previous = 0.5, state
    state, loss = sweep(state)
    yield state, loss
    for _ in range(sweeps - 1):
        following, new_loss = sweep(state.beyond(previous, step))
        step = min(step * 1.2, 1.0)
        if not new_loss <= loss:
            step = max(step / 4, 0.1)
            following, new_loss = sweep(state)
        gained = loss - new_loss
        if gained > 0:
            previous, state, loss = state, following, new_loss
            yield state, loss
        if not gained > gain * loss or loss <= EXACT:
            return


def _best_descent(targets: Sequence[Tensor], points: Sequence[State], keep_rule: bool) -> State:
    best, least = points[0], math.inf
    step = partial(sweep, targets, keep_rule=keep_rule)
    for point in points:
        for state, loss in descent(step, point, EXPLORED, EXPLORED_GAIN):
            if loss < least:
                best, least = state, loss
        if least <= EXACT:
            return best
    return deque(descent(step, best, REFINED, REFINED_GAIN), maxlen=1).pop()[0]


def _principal_rule(targets: Sequence[Tensor], n: int) -> Tensor:
    """The first n left singular vectors (n*n, n) of all R side by side."""
    side_by_side = torch.cat([target.transpose(0, 1).flatten(1) for target in targets], 1)
    vectors: Tensor = torch.linalg.svd(side_by_side, full_matrices=False).U[:, :n]
    if vectors.shape[1] < n:  # R has fewer columns than n
        vectors = torch.linalg.qr(torch.cat([vectors, torch.eye(n * n, dtype=vectors.dtype)], 1)).Q[:, :n]
    return vectors


def _start(targets: Sequence[Tensor], rule: Tensor, rank: int) -> State:
    """The best W_i for this rule, truncated: optimal if it is orthonormal or the rank full."""
    inverse = torch.linalg.pinv(rule)
    pairs = [split((inverse @ target.flatten(2)).unflatten(2, target.shape[2:]), rank) for target in targets]
    return State(rule, *(list(side) for side in zip(*pairs, strict=True)))


def split(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """W (..., a, c) truncated to left (..., a, r), right (..., r, c) of one norm, zero-padded."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    root = s[..., :rank].sqrt()
    left, right = u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]
    missing = rank - root.shape[-1]
    return F.pad(left, (0, max(missing, 0))), F.pad(right, (0, 0, 0, max(missing, 0)))


def sweep(targets: Sequence[Tensor], state: State, keep_rule: bool = False) -> tuple[State, float]:
    """Solve for the left factors, the right factors and the rule in turn: state and loss."""
    rule, lefts, rights = state.rule, [], []
    gram = rule.T @ rule
    normal, products = torch.zeros_like(gram), torch.zeros_like(rule.T)
    for target, left, right in zip(targets, state.left, state.right, strict=True):
        projected = (rule.T @ target.flatten(2)).unflatten(2, target.shape[2:])  # (m, n, a, c)
        left = _best_left(gram, projected, left, right)
        right = _best_left(gram, projected.mT, right.mT, left.mT).mT
        w = (left @ right).flatten(2)
        normal += (w @ w.mT).sum(0)
        products += (w @ target.flatten(2).mT).sum(0)
        lefts.append(left)
        rights.append(right)
    if not keep_rule:
        rule = proximal(normal, products, rule.T).T
        length = rule.norm(dim=0).clamp_min(TINY)
        rule = rule / length
        for i, sides in enumerate(zip(lefts, rights, strict=True)):
            a, b = (side.norm(dim=(2, 3), keepdim=True).clamp_min(TINY) for side in sides)
            norm = (a * b * length[:, None, None]).sqrt()  # Both factors get this norm.
            lefts[i], rights[i] = lefts[i] / a * norm, rights[i] / b * norm
    errors = (t.flatten(2) - rule @ (a @ b).flatten(2) for t, a, b in zip(targets, lefts, rights, strict=True))
    return State(rule, lefts, rights), sum(float(error.square().sum()) for error in errors)


def _best_left(gram: Tensor, projected: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The best left (m, n, a, r), given right, gram = A^T A and projected = A^T R (m, n, a, c)."""
    n, r = right.shape[1:3]
    rows = right.flatten(1, 2)
    normal = rows @ rows.mT * gram.repeat_interleave(r, 0).repeat_interleave(r, 1)
    products = (right @ projected.mT).flatten(1, 2)
    return proximal(normal, products, left.mT.flatten(1, 2)).unflatten(1, (n, r)).mT  # type: ignore[no-any-return]


def proximal(normal: Tensor, products: Tensor, old: Tensor) -> Tensor:
    """The X with normal X = products that is nearest to `old`."""
    weight = 1e-13 * normal.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + TINY
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype)
    return torch.linalg.solve(normal + weight * eye, products + weight * old)  # type: ignore[no-any-return]


def balanced(rule: Tensor, factors: Sequence[tuple[Tensor, ...]], keep_rule: bool) -> list[PHMWeights]:
    """The weights, with A_i and its factors of similar magnitude, which half precision holds."""
    if not keep_rule:
        squares = torch.stack([side.square().mean((1, 2)) for sides in factors for side in sides]).mean(0)
        ratio = (squares / rule.square().mean((1, 2)).clamp_min(TINY)).sqrt()
        count = len(factors[0])  # the factors of one matrix share the inverse of the scale
        scale = torch.where(ratio > 0, ratio ** (count / (count + 1)), 1.0)[:, None, None]
        rule = rule * scale
        factors = [tuple(side / scale ** (1 / count) for side in sides) for sides in factors]
    return [PHMWeights(rule, sides[0], sides[1] if len(sides) > 1 else None) for sides in factors]
