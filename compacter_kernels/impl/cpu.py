"""Fused C++ kernels (csrc/cpu): one pass over x forward, one pass over x and the gradient backward."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.impl import Gradients, contiguous, empty_gradients, not_fused
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights

_C: Any
try:
    _C = importlib.import_module("compacter_kernels._C")
except ImportError as error:
    _C = None
    note = Path(__file__).parents[1] / "_not_built.txt"  # setup.py leaves it where it built none
    _MISSING = "not built: " + (note.read_text(encoding="utf-8").strip() if note.is_file() else str(error))

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # csrc/adapter.h
_get_num_threads = torch.get_num_threads


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    return _MISSING if _C is None else None


def refuses(problem: Problem) -> str | None:
    """Why the kernels cannot serve this problem, or None."""
    if problem.device.type != "cpu":
        return f"x is on {problem.device.type}, not on the CPU"
    return not_fused(problem)


def prepare(problem: Problem) -> Any:
    """The kernel for this problem: a `LinearKernel` or an `AdapterKernel`."""
    return _Linear(problem) if problem.operation == "linear" else _Adapter(problem)


def _sizes(problem: Problem) -> tuple[list[tuple[Any, ...]], tuple[int, ...]]:
    """The native plan's arguments: (n, rank, in, out, has bias) of each projection, and all parameter dtypes."""
    shapes = [(p.phm_dim, p.rank, p.in_features, p.out_features, p.dtypes[3] is not None) for p in problem.projections]
    return shapes, tuple(_DTYPES[d or torch.float32] for p in problem.projections for d in p.dtypes)


def _addresses(tensors: list[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


class _Linear:
    def __init__(self, problem: Problem) -> None:
        shapes, dtypes = _sizes(problem)
        self.native = _C.Linear(_DTYPES[problem.dtype], shapes[0], dtypes)
        self.in_features = problem.projections[0].in_features
        self.out_features = problem.projections[0].out_features

    def forward(self, x: Tensor, weights: PHMWeights, out: Tensor | None = None) -> Tensor:
        x, params = x.contiguous(), contiguous(weights)
        if out is None:
            out = x.new_empty((*x.shape[:-1], self.out_features))
        tokens = x.numel() // self.in_features
        self.native.forward(x.data_ptr(), out.data_ptr(), tokens, _get_num_threads(), *_addresses(params))
        return out

    def backward(self, x: Tensor, grad: Tensor, weights: PHMWeights, wanted: tuple[bool, ...]) -> Gradients:
        x, grad, params = x.contiguous(), grad.contiguous(), contiguous(weights)
        results = empty_gradients([x, *params], wanted)
        grad_x, *grads = _addresses(results)
        tokens = x.numel() // self.in_features
        self.native.backward(
            x.data_ptr(), grad.data_ptr(), grad_x, tokens, _get_num_threads(), *_addresses(params), *grads
        )
        return tuple(results)


class _Adapter:
    def __init__(self, problem: Problem) -> None:
        (down, up), dtypes = _sizes(problem)
        assert problem.activation is not None
        self.native = _C.Adapter(_DTYPES[problem.dtype], problem.activation.code, down, up, dtypes)
        self.width = problem.projections[0].in_features

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        scale: float,
        down: PHMWeights,
        up: PHMWeights,
        out: Tensor | None = None,
    ) -> Tensor:
        same, x, params = residual is x, x.contiguous(), contiguous((*down, *up))
        if same:
            residual = x
        elif residual is not None:
            residual = residual.contiguous()
        if out is None:
            out = torch.empty_like(x)
        self.native.forward(
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            x.numel() // self.width,
            scale,
            _get_num_threads(),
            *_addresses(params),
        )
        return out

    def backward(
        self,
        x: Tensor,
        grad: Tensor,
        residual_is_x: bool,
        scale: float,
        down: PHMWeights,
        up: PHMWeights,
        wanted: tuple[bool, ...],
    ) -> Gradients:
        x, grad, params = x.contiguous(), grad.contiguous(), contiguous((*down, *up))
        results = empty_gradients([x, *params], wanted)
        grad_x, *grads = _addresses(results)
        self.native.backward(
            x.data_ptr(),
            grad.data_ptr(),
            grad_x,
            residual_is_x,
            x.numel() // self.width,
            scale,
            _get_num_threads(),
            *_addresses(params),
            *grads,
        )
        return tuple(results)
