"""x times a sum of Kronecker products of any shape, by small products, without building the sum.

y = x H with H = sum_i A_i (x) W_i, that is y[q, v] = sum_i sum_pu x[p, u] A_i[p, q] W_i[u, v] for
each row x, cut into n_in chunks. A_i and W_i may each be given as two factors. A matrix of A_i acts
on the chunks and one of W_i within them, so the products may stand in any order that keeps the
order of the two factors. The order with the fewest multiplications is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compacter_kernels.impl.plain import without_autocast
from compacter_kernels.modes import alone

# The letters of the chunks, and of the numbers in a chunk, after 0, 1 and 2 products. einsum sums
# in the order of the alphabet, and copies a tensor that has another order in memory.
_AXES = ("bcd", "uvw")


class _Step(NamedTuple):
    """The letters of a product: input and weight give output. a: the tokens, i: the terms."""

    input: str
    weight: str
    output: str


def kronecker_map(x: Tensor, rules: Sequence[Tensor], factors: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """scale * x H, computed in the dtype of the weights.

    Args:
        x: (..., in), of any float dtype, with any strides.
        rules: the A_i, one tensor (terms, n_in, n_out), or two, (terms, n_in, s) and
            (terms, s, n_out), whose products they are.
        factors: the W_i, one tensor (terms, in/n_in, out/n_out), or two, (terms, in/n_in, r) and
            (terms, r, out/n_out).
        scale: a number.

    Returns:
        (..., out), contiguous, in the dtype of the weights, which all have one. For backward it
        keeps x and the weights, and computes again what lies between the products. It is
        differentiable any number of times.
    """
    with without_autocast(x.device):
        sides = _multiplied(rules), _multiplied(factors)
        order = _order(*(_sizes(side) for side in sides))
        steps, taken = list(_steps(order)), [iter(side) for side in sides]
        weights = [next(taken[side]) for side in order]
        if scale != 1.0:
            smallest, *_ = sorted(range(len(weights)), key=lambda index: weights[index].numel())
            weights[smallest] = weights[smallest] * scale
        chunks = rules[0].shape[1]
        if torch.compiler.is_compiling() or not alone():  # they see the products as torch's own operations
            y = _values(steps, chunks, x, weights)[-1]
        else:
            y = _Chain.apply(steps, chunks, x, *weights)
    return y.reshape(*x.shape[:-1], y.shape[1] * y.shape[2])


def _multiplied(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """The factors, or their product where it has no more numbers than they have."""
    if len(matrices) == 2:
        first, second = matrices
        if first.shape[1] * second.shape[2] <= first[0].numel() + second[0].numel():
            return [first @ second]
    return matrices


def _sizes(matrices: Sequence[Tensor]) -> list[int]:
    """The sizes of an axis before the first product and after each."""
    return [matrices[0].shape[1], *(matrix.shape[2] for matrix in matrices)]


def _order(*sizes: list[int]) -> tuple[int, ...]:
    """The side of each product, 0 for a rule and 1 for a factor: the order of least work."""
    rules, factors = (len(axis) - 1 for axis in sizes)
    candidates = [order for order in product((1, 0), repeat=rules + factors) if order.count(0) == rules]

    def multiplications(order: tuple[int, ...]) -> int:
        done, total = [0, 0], 0
        for side in order:
            axis, other = sizes[side], sizes[1 - side][done[1 - side]]
            total += other * axis[done[side]] * axis[done[side] + 1]
            done[side] += 1
        return total

    return sorted(candidates, key=multiplications)[0]  # torch.compile has no rule for min with a key


def _steps(order: tuple[int, ...]) -> Iterator[_Step]:
    """The letters of each product. Only between the first and the last are the terms apart."""
    done, letters = [0, 0], "abu"
    for index, side in enumerate(order):
        axis, before = _AXES[side], letters
        done[side] += 1
        chunk, number = _AXES[0][done[0]], _AXES[1][done[1]]
        letters = f"a{chunk}{number}" if index == len(order) - 1 else f"a{chunk}i{number}"
        yield _Step(before, f"i{axis[done[side] - 1]}{axis[done[side]]}", letters)


def _values(steps: Sequence[_Step], chunks: int, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Every value: x as (tokens, n_in, in/n_in), then the result of each product."""

    def following(z: Tensor, pair: tuple[_Step, Tensor]) -> Tensor:
        step, weight = pair
        return torch.einsum(f"{step.input},{step.weight}->{step.output}", z, weight)

    rows = x.reshape(-1, chunks, x.shape[-1] // chunks).to(weights[0].dtype)
    return list(accumulate(zip(steps, weights, strict=False), following, initial=rows))


class _Chain(torch.autograd.Function):
    """The products as one operation, which keeps nothing that lies between them."""

    @staticmethod
    def forward(ctx: Any, steps: list[_Step], chunks: int, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.steps, ctx.chunks = steps, chunks
        ctx.save_for_backward(x, *weights)
        return _values(steps, chunks, x, weights)[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """For z' = z w: dw = z^T dz' and dz = dz' w^T, from the last product to the first."""
        x, *weights = ctx.saved_tensors
        _, _, for_x, *wanted = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(weights)
        with without_autocast(x.device):
            inputs = _values(ctx.steps[:-1], ctx.chunks, x, weights)
            for index in reversed(range(len(weights))):
                step = ctx.steps[index]
                if wanted[index]:
                    z = inputs[index]
                    if z.numel() < grad.numel():  # the smaller one first: few rows and many columns are faster
                        grads[index] = torch.einsum(f"{step.input},{step.output}->{step.weight}", z, grad)
                    else:
                        grads[index] = torch.einsum(f"{step.output},{step.input}->{step.weight}", grad, z)
                if index or for_x:
                    grad = torch.einsum(f"{step.output},{step.weight}->{step.input}", grad, weights[index])
        return None, None, grad.reshape(x.shape).to(x.dtype) if for_x else None, *grads
