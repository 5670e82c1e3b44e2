"""x times a sum of Kronecker products of any shape, by small products, without building the sum.

y = x H with H = sum_i A_i (x) W_i, that is y[q, v] = sum_i sum_pu x[p, u] A_i[p, q] W_i[u, v] for
each row x, cut into n_in chunks. A_i and W_i may each be given as two factors. A matrix of A_i acts
on the chunks and one of W_i within them, so the products may stand in any order that keeps the
order of the two factors. The order with the fewest multiplications is taken.

Between two products a row is (chunks, terms, numbers in a chunk) in memory. The last product adds
up the terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compacter_kernels.impl.plain import without_autocast
from compacter_kernels.modes import alone

RULE, FACTOR = 0, 1  # the sides of a Kronecker product
_WIDE = 16  # from as many numbers in a chunk, a product for each token is faster than to move them


def chain(
    x: Tensor, rules: Sequence[Tensor], factors: Sequence[Tensor], scale: float = 1.0, base: Tensor | None = None
) -> Tensor:
    """base + scale * x H, computed in the dtype of the weights.

    Args:
        x: (..., in), of any float dtype, with any strides.
        rules: the A_i, one tensor (terms, n_in, n_out), or two, (terms, n_in, s) and
            (terms, s, n_out), whose products they are.
        factors: the W_i, one tensor (terms, in/n_in, out/n_out), or two, (terms, in/n_in, r) and
            (terms, r, out/n_out).
        scale: a number.
        base: (..., out), of any float dtype, or None.

    Returns:
        (..., out), contiguous, in the dtype of the weights, which all have one. For backward it
        keeps x and the weights, and computes again what lies between the products. It is
        differentiable any number of times.
    """
    with without_autocast(x.device):
        weights = [multiplied(side, side[0].dtype) for side in (rules, factors)]
        order = _order(*(_sizes(side) for side in weights))
        steps, taken = list(_steps(order, rules[0].shape[0])), [iter(side) for side in weights]
        ordered = [next(taken[side]) for side in order]
        if torch.compiler.is_compiling() or not alone():  # they see the products as torch's own operations
            y = _result(steps, scale, x, base, ordered)
        else:
            y = _Chain.apply(steps, scale, x, base, *ordered)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class _Step(NamedTuple):
    """A product of rows (tokens, numbers) with a weight (terms, into, out).

    before, after: how many terms are apart in the rows, or 1 where they do not lie in them.
    """

    side: int
    before: int
    after: int

    def rows(self, z: Tensor, size: int, terms: int) -> Tensor:
        """The rows with an axis of this size, which the product takes or gives."""
        rest, apart = z.shape[1] // (size * terms), (terms,) if terms > 1 else ()
        return z.reshape(z.shape[0], *((size, *apart, rest) if self.side == RULE else (rest, *apart, size)))

    def letters(self) -> tuple[str, str, str]:
        """The axes of the rows before, of the weight and of the rows after, for einsum."""
        before, after = ("i" if terms > 1 else "" for terms in (self.before, self.after))
        terms = before or after
        if self.side == RULE:
            return f"ap{before}w", f"{terms}pq", f"aq{after}w"
        return f"ac{before}u", f"{terms}uv", f"ac{after}v"

    def times(self, z: Tensor, weight: Tensor, base: Tensor | None = None) -> Tensor:
        """The product, added to base, rows like the result."""
        terms, into, out = weight.shape
        tokens, width = z.shape[0], z.shape[1] // (into * self.before) * out * self.after
        rows = self.rows(z, into, self.before)
        added = None if base is None else self.rows(base, out, self.after)
        if terms == 1 and self.side == FACTOR:
            rows, added = rows.flatten(0, 1), None if added is None else added.flatten(0, 1)
            y = rows @ weight[0] if added is None else torch.addmm(added, rows, weight[0])
        elif terms == 1 and rows.shape[2] >= _WIDE:
            turned = weight.mT.expand(tokens, out, into)
            y = torch.bmm(turned, rows) if added is None else torch.baddbmm(added, turned, rows)
        else:
            before, of_weight, after = self.letters()
            y = torch.einsum(f"{before},{of_weight}->{after}", rows, weight if terms > 1 else weight[0])
            y = y if added is None else y + added
        return y.reshape(tokens, width)

    def reversed(self) -> _Step:
        """The step whose product with weight.mT gives the gradient of the rows before."""
        return _Step(self.side, self.after, self.before)

    def of_weight(self, z: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight, by the rows before and the gradient of those after."""
        terms, into, out = weight.shape
        rows, grads = self.rows(z, into, self.before), self.rows(grad, out, self.after)
        if terms == 1 and self.side == FACTOR:
            return (rows.flatten(0, 1).t() @ grads.flatten(0, 1)).reshape(weight.shape)
        if terms == 1 and rows.shape[2] >= max(_WIDE, out):  # so that rows has no fewer numbers
            return torch.bmm(rows, grads.mT).sum(0, keepdim=True)
        before, of_weight, after = self.letters()
        return torch.einsum(f"{before},{after}->{of_weight}", rows, grads).reshape(weight.shape)


def _steps(order: Sequence[int], terms: int) -> Iterator[_Step]:
    """The products in this order. Only between the first and the last are the terms apart."""
    for at, side in enumerate(order):
        yield _Step(side, terms if at else 1, terms if at < len(order) - 1 else 1)


def multiplied(matrices: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The factors, or their product in this dtype where it has no more numbers than they have."""
    if len(matrices) == 2:
        first, second = matrices
        if first.shape[1] * second.shape[2] <= first[0].numel() + second[0].numel():
            return [first.to(dtype) @ second.to(dtype)]
    return matrices


def _sizes(matrices: Sequence[Tensor]) -> list[int]:
    """The sizes of an axis before the first product and after each."""
    return [matrices[0].shape[1], *(matrix.shape[2] for matrix in matrices)]


def _order(*sizes: list[int]) -> tuple[int, ...]:
    """The side of each product: the order of least work."""
    rules, factors = (len(axis) - 1 for axis in sizes)
    candidates = [order for order in product((FACTOR, RULE), repeat=rules + factors) if order.count(RULE) == rules]

    def multiplications(order: tuple[int, ...]) -> int:
        done, total = [0, 0], 0
        for side in order:
            axis, other = sizes[side], sizes[1 - side][done[1 - side]]
            total += other * axis[done[side]] * axis[done[side] + 1]
            done[side] += 1
        return total

    best, *others = candidates
    for order in others:  # torch.compile has no rule for min with a key
        best = order if multiplications(order) < multiplications(best) else best
    return best


def _values(steps: Sequence[_Step], x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x as rows (tokens, in), and the result of each product but the last."""
    values = [x.reshape(x.numel() // x.shape[-1], x.shape[-1]).to(weights[0].dtype)]
    for step, weight in zip(steps[:-1], weights, strict=False):
        values.append(step.times(values[-1], weight))
    return values


def _result(steps: Sequence[_Step], scale: float, x: Tensor, base: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    """base + scale * x H as rows."""
    z, last = _values(steps, x, weights)[-1], weights[-1]
    added = None if base is None else base.reshape(z.shape[0], base.shape[-1]).to(z.dtype)
    return steps[-1].times(z, last if scale == 1.0 else last * scale, added)


class _Chain(torch.autograd.Function):
    """The products as one operation, which keeps nothing that lies between them."""

    @staticmethod
    def forward(ctx: Any, steps: list[_Step], scale: float, x: Tensor, base: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.steps, ctx.scale, ctx.base = steps, scale, None if base is None else (base.shape, base.dtype)
        ctx.save_for_backward(x, *weights)
        return _result(steps, scale, x, base, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """For z' = z w: dw = z^T dz' and dz = dz' w^T, from the last product to the first."""
        x, *weights = ctx.saved_tensors
        _, _, for_x, for_base, *wanted = ctx.needs_input_grad
        of_base = grad.reshape(ctx.base[0]).to(ctx.base[1]) if for_base else None
        grads: list[Tensor | None] = [None] * len(weights)
        with without_autocast(x.device):
            values, scale = _values(ctx.steps, x, weights), ctx.scale
            for at in reversed(range(len(weights))):
                step, weight = ctx.steps[at], weights[at]
                if wanted[at]:
                    found = step.of_weight(values[at], grad, weight)
                    grads[at] = found if scale == 1.0 else found * scale
                if at or for_x:
                    grad = step.reversed().times(grad, (weight if scale == 1.0 else weight * scale).mT)
                scale = 1.0  # the product with the last weight has put it into grad
        return None, None, grad.reshape(x.shape).to(x.dtype) if for_x else None, of_base, *grads
