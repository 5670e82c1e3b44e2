"""The same function by small matmuls without H, on any device, in any dtype, differentiable twice.

A projection of rank r is a low-rank map in -> n^2 r -> out. Its factor on the wide side is
block-diagonal with equal blocks; the rule is folded into the factor on the narrow side. All sums
also run over the rank index.
"""

from __future__ import annotations

from torch import Tensor

from compacter_kernels.impl import Kernel
from compacter_kernels.impl.plain import Plain, refuses as refuses, unavailable as unavailable, wide
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights


def _product(x: Tensor, rule: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """x H for x (T, in), without building H if the weights are factorised."""
    n, chunk, rank = left.shape
    tokens = x.shape[0]
    if right is None:
        # H[p,u,q,v] = sum_i A_i[p,q] W_i[u,v] as one matmul, since W has no low-rank form
        w = rule.reshape(n, n * n).t() @ left.reshape(n, chunk * rank)
        return x @ w.reshape(n, n, chunk, rank).transpose(1, 2).reshape(n * chunk, n * rank)
    if chunk >= right.shape[2]:
        # Z[p,i] = sum_u x[p,u] s_i[u], y[q,v] = sum_pi Z[p,i] C[(p,i),(q,v)], C = A_i[p,q] t_i[v]
        z = x.reshape(tokens * n, chunk) @ left.transpose(0, 1).reshape(chunk, n * rank)
        c = rule.transpose(0, 1)[:, :, None, :, None] * right[None, :, :, None, :]  # (p, i, r, q, v)
        return z.reshape(tokens, n * n * rank) @ c.reshape(n * n * rank, -1)
    # V[q,i] = sum_pu x[p,u] D[(p,u),(q,i)], D = A_i[p,q] s_i[u], y[q,v] = sum_i V[q,i] t_i[v]
    d = rule.permute(1, 2, 0)[:, None, :, :, None] * left.transpose(0, 1)[None, :, None, :, :]  # (p, u, q, i, r)
    v = x @ d.reshape(n * chunk, n * n * rank)
    return (v.reshape(tokens * n, n * rank) @ right.reshape(n * rank, -1)).reshape(tokens, n * right.shape[2])


def _project(x: Tensor, weights: PHMWeights) -> Tensor:
    # to() takes time even if the dtype is the same
    rule, left, right, bias = [w if w is None or w.dtype == x.dtype else w.to(x.dtype) for w in weights]
    assert rule is not None and left is not None
    y = _product(x, rule, left, right)
    return y if bias is None else y + bias


def _rows(x: Tensor) -> Tensor:
    return wide(x).reshape(x.numel() // x.shape[-1], x.shape[-1])


def prepare(problem: Problem) -> Kernel:
    """The kernel for this problem."""
    return Plain(problem, _rows, _project)
