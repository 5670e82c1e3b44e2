"""The sums of Kronecker products whose outputs are nearest to those of given matrices.

The inputs X (rows, in) count by their covariance C = X^T X alone:

    |X (H - H')|^2 = tr (H - H')^T C (H - H'),    H' = sum_i A_i (x) W_i,    W_i = s_i t_i

Alternating least squares as in `kronecker_fit`, which is the case C = I. Given the rule, with
C_pP the blocks of C and (C H)_pq those of C H, the normal equations of the W_i are

    sum_j M_ij W_j = B_i,    M_ij = sum_pP (A_i A_j^T)[p,P] C_pP,    B_i = sum_pq A_i[p,q] (C H)_pq

C does not only weigh the inputs, it also ties the n a entries of one column of the s_i together. So
the columns are solved for one after the other, each given the others, then all t_i, then the rule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from compacter_kernels.kronecker_fit import TINY, State, balanced, combined, descent, norm, proximal, split
from compacter_kernels.weights import PHMWeights

SWEEPS, GAIN = 300, 1e-6  # the most sweeps, and the least gain of a sweep that goes on


class Target(NamedTuple):
    """H (in, out), and C (in, in) scaled so that |X H| = 1. whole: the rank bounds no W_i."""

    matrix: Tensor
    covariance: Tensor
    image: Tensor  # C H
    whole: bool  # W_i is in place of s_i, and t_i is the identity


def refit(
    matrices: Sequence[Tensor],
    covariances: Sequence[Tensor | None],
    weights: Sequence[PHMWeights],
    keep_rule: bool = False,
) -> list[PHMWeights]:
    """Fit to the outputs, from a fit to the matrices: the sum of squared errors never rises.

    Args:
        matrices: each H (in, out), finite, float64, on the CPU.
        covariances: C = X^T X (in, in) of the inputs of each, float64; None is C = I. C may be
            singular. What it leaves open stays as it is in `weights`.
        weights: what `kronecker_fit.fit` gives for the matrices.
        keep_rule: whether the rule stays as it is.

    Returns:
        The PHMWeights of each matrix, as `kronecker_fit.fit` gives them; `weights` without a
        covariance.
    """
    if all(covariance is None for covariance in covariances):
        return list(weights)
    n = weights[0].rule.shape[0]
    targets, lefts, rights = [], [], []
    for h, given, (_, left, right, _) in zip(matrices, covariances, weights, strict=True):
        covariance = torch.eye(len(h), dtype=h.dtype) if given is None else given
        covariance = covariance / (norm(h, covariance) or 1.0) ** 2
        if right is not None and right.shape[1] >= min(left.shape[1], right.shape[2]):
            left, right = left @ right, None
        targets.append(Target(h, covariance, covariance @ h, whole=right is None))
        lefts.append(left)
        rights.append(torch.eye(left.shape[2], dtype=h.dtype).expand(n, -1, -1) if right is None else right)
    start = State(weights[0].rule.reshape(n, n * n).T, lefts, rights)
    steps = descent(partial(sweep, targets, keep_rule=keep_rule), start, SWEEPS, GAIN)
    state = deque(steps, maxlen=1).pop()[0]
    factors = []
    for left, right, old in zip(state.left, state.right, weights, strict=True):
        factors.append((left @ right,) if old.right is None else split(left @ right, old.right.shape[1]))
    return balanced(state.rule.T.reshape(n, n, n), factors, keep_rule)


def sweep(targets: Sequence[Target], state: State, keep_rule: bool = False) -> tuple[State, float]:
    """Solve for the left factors, the right factors and the rule in turn: state and loss."""
    n = state.rule.shape[1]
    rule, lefts, rights = state.rule.T.reshape(n, n, n), [], []
    overlaps = torch.einsum("ipq,jPq->ipjP", rule, rule)
    normal, products = rule.new_zeros(n * n, n * n), rule.new_zeros(n * n, n)
    for target, left, right in zip(targets, state.left, state.right, strict=True):
        a, c = left.shape[1], right.shape[2]
        blocks, image = target.covariance.reshape(n, a, n, a), target.image.reshape(n, a, n, c)
        system = torch.einsum("ipjP,puPU->iujU", overlaps, blocks)  # M
        wanted = torch.einsum("ipq,puqv->iuv", rule, image)  # B
        if target.whole:
            left = _solved(system, wanted, left)
        else:
            left, right = _orthonormal(left, right)
            left = _best_left(system, wanted, left, right)
            gram = torch.einsum("iur,iujU,jUs->irjs", left, system, left)
            right = _solved(gram, left.mT @ wanted, right)
        w = left @ right
        grams = torch.einsum("iuv,jUv->iujU", w, w)
        normal += torch.einsum("puPU,iujU->ipjP", blocks, grams).reshape(n * n, n * n)
        products += torch.einsum("iuv,puqv->ipq", w, image).flatten(0, 1)
        lefts.append(left)
        rights.append(right)
    if not keep_rule:
        rule = proximal(normal, products, rule.flatten(0, 1)).reshape(n, n, n)
        length = rule.norm(dim=(1, 2), keepdim=True).clamp_min(TINY)
        rule, lefts = rule / length, [left * length for left in lefts]
    sides = zip(targets, lefts, rights, strict=True)
    loss = sum(norm(t.matrix - combined(rule, left @ right), t.covariance) ** 2 for t, left, right in sides)
    return State(rule.reshape(n, n * n).T, lefts, rights), loss


def _orthonormal(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same products, and right (n, r, c) with orthonormal rows, or zeros if its rank is less.

    The columns of one left factor then have no part in one another's normal equations. The square
    root of t t^T, unlike a QR decomposition, changes a right factor that is orthonormal by nothing.
    """
    values, vectors = torch.linalg.eigh(right @ right.mT)
    root = values.clamp_min(0).sqrt()[:, None, :]
    inverse = torch.where(root > 1e-7 * root[..., -1:], 1 / root, 0.0)
    return left @ (vectors * root) @ vectors.mT, (vectors * inverse) @ vectors.mT @ right


def _best_left(system: Tensor, wanted: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The left factors (n, a, r), given M (n, a, n, a), B (n, a, c) and right: column by column."""
    left = left.clone()
    for column in range(left.shape[2]):
        row = right[:, column]  # (n, c)
        others = left.clone()
        others[..., column] = 0
        reached = torch.einsum("jUv,iv,iujU->iu", others @ right, row, system)
        products = torch.einsum("iuv,iv->iu", wanted, row) - reached
        normal = system * (row @ row.T)[:, None, :, None]
        left[..., column] = _solved(normal, products[..., None], left[..., column, None])[..., 0]
    return left


def _solved(normal: Tensor, products: Tensor, old: Tensor) -> Tensor:
    """The X (n, a, c) with normal (n, a, n, a) X = products that is nearest to `old`."""
    size = products.shape[0] * products.shape[1]
    solved = proximal(normal.reshape(size, size), products.flatten(0, 1), old.flatten(0, 1))
    return solved.reshape(old.shape)
