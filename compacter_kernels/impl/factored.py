"""The same function by small matmuls without H, on any device, in any dtype, differentiable twice.

A PHM projection of rank r is a low-rank map in -> n^2 r -> out. Its factor on the wide side is
block-diagonal with equal blocks; the rule is folded into the factor on the narrow side. All sums
also run over the rank index. Maps of other shapes, and a whole second factor, which have large
rules or no narrow side, are a chain of small products (`chain`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compacter_kernels.calls import BankCall, LinearCall
from compacter_kernels.impl import Kernel
from compacter_kernels.impl.chain import chain
from compacter_kernels.impl.plain import Plain, adapters_exist, refuses as refuses, unavailable as unavailable, wide
from compacter_kernels.problem import Problem
from compacter_kernels.weights import LinearWeights, PHMWeights, Weights

_GATHERED = 4  # the largest memory for gathered weights, in numbers for each number of x


def _low_rank(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x H for x (T, in) and a PHM projection of rank r."""
    (terms, chunk, rank), (_, n_in, n_out) = left.shape, rule.shape
    tokens = x.shape[0]
    if n_in * chunk >= n_out * right.shape[2]:
        # Z[p,i] = sum_u x[p,u] s_i[u], y[q,v] = sum_pi Z[p,i] C[(p,i),(q,v)], C = A_i[p,q] t_i[v]
        z = x.reshape(tokens * n_in, chunk) @ left.transpose(0, 1).reshape(chunk, terms * rank)
        c = rule.transpose(0, 1)[:, :, None, :, None] * right[None, :, :, None, :]  # (p, i, r, q, v)
        return z.reshape(tokens, n_in * terms * rank) @ c.reshape(n_in * terms * rank, -1)
    # V[q,i] = sum_pu x[p,u] D[(p,u),(q,i)], D = A_i[p,q] s_i[u], y[q,v] = sum_i V[q,i] t_i[v]
    d = rule.permute(1, 2, 0)[:, None, :, :, None] * left.transpose(0, 1)[None, :, None, :, :]  # (p, u, q, i, r)
    v = x @ d.reshape(n_in * chunk, n_out * terms * rank)
    y = v.reshape(tokens * n_out, terms * rank) @ right.reshape(terms * rank, -1)
    return y.reshape(tokens, n_out * right.shape[2])


def _folds(weights: PHMWeights) -> bool:
    """Whether the rule is folded into a factor. With one chunk there is nothing to fold."""
    terms, n_in, n_out = weights.rule.shape
    return weights.right is not None and terms == n_in == n_out > 1


def _converted(weights: PHMWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The weights in this dtype. to() takes time even if the dtype is the same."""
    return tuple(w if w is None or w.dtype == dtype else w.to(dtype) for w in weights)  # type: ignore[return-value]


def _project(x: Tensor, weights: PHMWeights) -> Tensor:
    rule, left, right, bias = _converted(weights, x.dtype)
    if right is not None and _folds(weights):
        y = _low_rank(x, rule, left, right)
    else:
        y = chain(x, [rule], [left] if right is None else [left, right])
    return y if bias is None else y + bias


def _rows(x: Tensor) -> Tensor:
    return wide(x).reshape(x.numel() // x.shape[-1], x.shape[-1])


def _of_groups(x: Tensor, weights: Weights) -> Tensor:
    """x (groups, rows, in) through the weights of each group, a bank with one adapter for each."""
    if isinstance(weights, LinearWeights):
        y = x @ weights.weight.to(x.dtype)
    else:
        rule, left, right = (None if w is None else w.to(x.dtype) for w in weights[:3])
        assert rule is not None and left is not None
        chunks = x.unflatten(2, (rule.shape[-2], left.shape[-2]))
        rules = "gipq" if rule.ndim == 4 else "ipq"
        if right is None:
            y = torch.einsum(f"gspu,giuv,{rules}->gsqv", chunks, left, rule)
        else:
            v = torch.einsum(f"gspir,{rules}->gsqir", torch.einsum("gspu,giur->gspir", chunks, left), rule)
            y = torch.einsum("gsqir,girv->gsqv", v, right)
        y = y.flatten(2)
    return y if weights.bias is None else y + weights.bias.to(x.dtype)[:, None]


class _Factored(Plain):
    """Plain, with the weights of each group of a routed call gathered where they are few."""

    def linear(self, call: LinearCall) -> Tensor:
        """A chain adds the base in its last product, and keeps x as it is."""
        x, weights, base, scale = call
        if _folds(weights):
            return super().linear(call)
        rule, left, right, bias = _converted(weights, torch.float64 if x.dtype == torch.float64 else torch.float32)
        y = chain(x, [rule], [left] if right is None else [left, right], scale, base)
        return y if bias is None else y + (bias if scale == 1.0 else bias * scale)

    def routed(self, rows: Tensor, call: BankCall) -> Tensor:
        """The adapter of each row, (rows, k)."""
        assert call.route is not None and self.activation is not None
        of_one = sum(t.numel() // t.shape[0] for t in (*call.down, *call.up) if t is not None)
        groups = len(call.route)
        if not groups or groups * of_one > _GATHERED * rows.numel():
            return super().routed(rows, call)
        adapters = call.down.slots()[1].shape[0]
        adapters_exist(call.route, adapters)
        own = call.route.clamp(0, adapters - 1)
        h = self.activation(_of_groups(rows.unflatten(0, (groups, -1)), call.down.adapter(own)))
        y, of_group = _of_groups(h, call.up.adapter(own)), call.route[:, None, None]
        y = y.masked_fill(of_group == -1, 0.0).masked_fill((of_group < -1) | (of_group >= adapters), torch.nan)
        return y.flatten(0, 1)


def prepare(problem: Problem) -> Kernel:
    """The kernel for this problem."""
    return _Factored(problem, _rows, _project)
