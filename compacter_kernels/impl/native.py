"""What the targets of csrc/ share: the native module, the arguments of a plan, and all of a call but its launch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.impl import Gradients, contiguous, empty_gradients
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights

MODULE: Any = None  # compacter_kernels._C, or None and then why
MISSING = ""
try:
    MODULE = importlib.import_module("compacter_kernels._C")
except ImportError as error:
    note = Path(__file__).parents[1] / "_not_built.txt"  # setup.py leaves it where it built none
    MISSING = "not built: " + (note.read_text(encoding="utf-8").strip() if note.is_file() else str(error))

BUILD: dict[str, Any] = {} if MODULE is None else MODULE.build_info()

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # csrc/adapter.h


def plan_arguments(problem: Problem) -> tuple[Any, ...]:
    """What every target's plan is made from.

    dtype of x, the activation of an adapter, (n, rank, in, out, has bias) of each projection, all parameter dtypes.
    """
    activation = [] if problem.activation is None else [problem.activation.code]
    shapes = [
        # index: under torch.compile a size may be a symbol, of which this asks the number
        (*map(index, (p.phm_dim, p.rank or 0, p.in_features, p.out_features)), p.dtypes[3] is not None)
        for p in problem.projections
    ]
    dtypes = tuple(_DTYPES[d or torch.float32] for p in problem.projections for d in p.dtypes)
    return (_DTYPES[problem.dtype], *activation, *shapes, dtypes)


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where the tensors are; 0: no such tensor."""
    return [0 if t is None else t.data_ptr() for t in tensors]


_data_ptr, _is_contiguous = Tensor.data_ptr, Tensor.is_contiguous


class Kernel:
    """A plan of one target, which says how it is launched: with what between a call's arguments and its parameters.

    call: addresses and sizes. params: the addresses of the parameters, in backward of their gradients too; 0: none.
    """

    def __init__(self, problem: Problem, plan: Any) -> None:
        self.plan = plan
        self.width, self.out_features = problem.projections[0].in_features, problem.projections[-1].out_features
        self.has_all = all(None not in p.dtypes for p in problem.projections)

    def launch_forward(self, call: tuple[Any, ...], params: list[int]) -> None:
        raise NotImplementedError

    def launch_backward(self, call: tuple[Any, ...], tokens: int, params: list[int]) -> None:
        raise NotImplementedError

    def contiguous(self, params: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The parameters, each contiguous; the caller keeps them until the launch."""
        if self.has_all and all(map(_is_contiguous, params)):  # type: ignore[arg-type]
            return params
        return contiguous(params)

    def addresses(self, tensors: Sequence[Tensor | None]) -> list[int]:
        """Where the parameters are."""
        return list(map(_data_ptr, tensors)) if self.has_all else addresses(tensors)  # type: ignore[arg-type]


class Linear(Kernel):
    """phm_linear, a `LinearKernel` but for its launch."""

    def forward(self, x: Tensor, weights: PHMWeights, out: Tensor | None = None) -> Tensor:
        x, params = x.contiguous(), self.contiguous(weights)
        if out is None:
            out = x.new_empty((*x.shape[:-1], self.out_features))
        tokens = x.numel() // self.width
        self.launch_forward((x.data_ptr(), out.data_ptr(), tokens), self.addresses(params))
        return out

    def backward(self, x: Tensor, grad: Tensor, weights: PHMWeights, wanted: tuple[bool, ...]) -> Gradients:
        x, grad, params = x.contiguous(), grad.contiguous(), self.contiguous(weights)
        results = empty_gradients([x, *params], wanted)
        grad_x, *grads = addresses(results)
        tokens = x.numel() // self.width
        self.launch_backward((x.data_ptr(), grad.data_ptr(), grad_x, tokens), tokens, self.addresses(params) + grads)
        return tuple(results)


class Adapter(Kernel):
    """compacter_adapter, an `AdapterKernel` but for its launch."""

    adds_both = norms = False

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        scale: float,
        down: PHMWeights,
        up: PHMWeights,
        out: Tensor | None = None,
        also_x: bool = False,
    ) -> Tensor:
        same, x, params = residual is x, x.contiguous(), self.contiguous((*down, *up))
        if same:
            residual = x
        elif residual is not None:
            residual = residual.contiguous()
        if out is None:
            out = torch.empty_like(x)
        added = 0 if residual is None else residual.data_ptr()
        call = (x.data_ptr(), added, out.data_ptr(), x.numel() // self.width, scale)
        self.launch_forward((*call, also_x) if self.adds_both else call, self.addresses(params))
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
        x, grad, params = x.contiguous(), grad.contiguous(), self.contiguous((*down, *up))
        results = empty_gradients([x, *params], wanted)
        grad_x, *grads = addresses(results)
        tokens = x.numel() // self.width
        call = (x.data_ptr(), grad.data_ptr(), grad_x, residual_is_x, tokens, scale)
        self.launch_backward(call, tokens, self.addresses(params) + grads)
        return tuple(results)
