"""The Triton kernels as a `LinearKernel` and an `AdapterKernel`: tensors in, tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compacter_kernels.impl import Gradients
from compacter_kernels.impl.triton import two_phase
from compacter_kernels.impl.triton.backward import backward
from compacter_kernels.impl.triton.config import Config, TwoPhase, backward_config, forward_config
from compacter_kernels.impl.triton.forward import forward, forward_streamed
from compacter_kernels.impl.triton.launch import Launch
from compacter_kernels.impl.triton.reduce import reduce_rows
from compacter_kernels.impl.triton.sizes import arguments, operand, sizes
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights

REDUCE = {"BLOCK": 16, "BR": 512}


def _dense(weights: PHMWeights) -> list[Tensor | None]:
    return [w if w is None or w.is_contiguous() else w.contiguous() for w in weights]


class _Kernel:
    """What both operations share: sizes, configurations, launches."""

    def __init__(self, problem: Problem) -> None:
        lp, split = operand(problem.dtype)
        self.sizes = s = sizes(problem)
        self.device = problem.device.index or 0
        self.multiprocessors = 4
        if problem.device.type == "cuda":
            self.multiprocessors = torch.cuda.get_device_properties(problem.device).multi_processor_count
        itemsize = problem.dtype.itemsize
        self.forward_config, self.backward_config = forward_config(s, itemsize), backward_config(s, itemsize)
        precision = "tf32x3" if problem.dtype == torch.float32 else "tf32"
        self.precision = {"LP": lp, "SPLIT": split, "PRECISION": precision, "MIDDLE_PRECISION": "tf32x3"}
        self.launches: dict[Any, Launch] = {}
        self.square = (s.N1, s.K1) == (s.N2, s.K2)

    def _programs(self, config: Config, tokens: int) -> int:
        return max(1, min(-(-tokens // config.tokens), config.programs * self.multiprocessors))

    def _launch(self, kernel: Any, config: Config, **options: Any) -> Launch:
        key = (kernel, *options.values())
        launch = self.launches.get(key)
        if launch is None:
            tiles = {"BT": config.tokens, "BK1": config.columns, "BK2": config.columns, "STAGES": config.stages}
            constants = {**arguments(self.sizes, tuple(kernel.arg_names)), **self.precision, **tiles, **options}
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            launch = self.launches[key] = Launch(kernel, constants, config.warps)
        return launch

    def _forward(self, x: Tensor, residual: Tensor | None, out: Tensor, params: tuple[Tensor | None, ...], scale: float) -> None:
        config, s = self.forward_config, self.sizes
        tokens = x.numel() // (s.N1 * s.K1)
        if tokens:
            if config.keep:
                launch = self._launch(forward, config, SAME=residual is x and self.square)
            else:
                launch = self._launch(forward_streamed, config)
            launch(self._programs(config, tokens), self.device, (x, residual, out, *params), scale, tokens)

    def _backward(
        self, x: Tensor, g: Tensor, dx: Tensor | None, params: tuple[Tensor | None, ...], scale: float,
        residual: bool, grads: list[Tensor | None],
    ) -> None:  # fmt: skip
        """params as the kernel takes them; grads in the order of a row of partials."""
        config, row = self.backward_config, self.sizes.offsets["ROW"]
        tokens = x.numel() // (self.sizes.N1 * self.sizes.K1)
        has_bias = grads[2] is not None
        if isinstance(config, TwoPhase):
            part, wide_rows, count = self._two_phase(config, x, g, dx, params, scale, residual, has_bias, tokens)
        else:
            wide_rows = count = self._programs(config, tokens)
            part = x.new_empty((count, row), dtype=torch.float32)
            launch = self._launch(backward, config, SQUARE=self.square, RESIDUAL=residual, HAS_BIAS=has_bias)
            launch(count, self.device, (x, g, dx, part, *params), scale, tokens)
        if any(grad is not None for grad in grads):
            self._reduce(part, grads, wide_rows, count, row)

    def _two_phase(
        self, config: TwoPhase, x: Tensor, g: Tensor, dx: Tensor | None, params: tuple[Tensor | None, ...],
        scale: float, residual: bool, has_bias: bool, tokens: int,
    ) -> tuple[Tensor, int, int]:  # fmt: skip
        """The partials, and how many rows of them the wide gradients and the others have."""
        s = self.sizes
        count = self._programs(config.tokens, tokens)
        blocks, limit = -(-max(s.K1, s.K2) // config.columns.columns), config.columns.programs * self.multiprocessors
        wide_rows = max(1, min(-(-tokens * max(s.N1, s.N2) // config.columns.tokens), limit // blocks))
        part = x.new_empty((max(count, wide_rows), s.offsets["ROW"]), dtype=torch.float32)
        dz = x.new_empty((tokens * s.N1, s.N1 * s.R1), dtype=torch.float32)
        v2 = x.new_empty((tokens * s.N2, s.N2 * s.R2), dtype=torch.float32)
        self._launch(two_phase.tokens, config.tokens)(count, self.device, (x, g, dz, v2, part, *params), scale, tokens)
        sides = [(True, True)] if self.square else [(True, False), (False, True)]
        for in_side, out_side in sides:
            k, n = (s.K1, s.N1) if in_side else (s.K2, s.N2)
            launch = self._launch(
                two_phase.columns, config.columns, RESIDUAL=residual, HAS_BIAS=has_bias, IN_SIDE=in_side,
                OUT_SIDE=out_side, BR=config.columns.tokens, BK=config.columns.columns,
            )  # fmt: skip
            grid = (-(-k // config.columns.columns), wide_rows)
            launch(grid, self.device, (x, g, dx, dz, v2, part, params[1]), scale, tokens * n)
        return part, wide_rows, count

    def _reduce(self, part: Tensor, grads: list[Tensor | None], wide_rows: int, rows: int, row: int) -> None:
        elements = tuple(e for e, _ in self.sizes.gradients)
        copies = tuple(c for _, c in self.sizes.gradients)
        key = ("reduce", *[g is None for g in grads])
        launch = self.launches.get(key)
        if launch is None:
            constants = {"SIZES": elements, "COPIES": copies, "ROW": row, **REDUCE}
            launch = self.launches[key] = Launch(reduce_rows, constants, 8)
        blocks = sum(-(-e // REDUCE["BLOCK"]) for e, g in zip(elements, grads, strict=True) if g is not None)
        launch(blocks, self.device, (part, *grads), wide_rows, rows)


def _gradients(tensors: list[Tensor | None], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if want and t is not None else None
        for t, want in zip(tensors, wanted, strict=True)
    ]


class Linear(_Kernel):
    """phm_linear."""

    def forward(self, x: Tensor, weights: PHMWeights, out: Tensor | None = None) -> Tensor:
        x = x.contiguous()
        rule, left, right, bias = _dense(weights)
        if out is None:
            out = x.new_empty((*x.shape[:-1], weights.out_features))
        self._forward(x, None, out, (rule, left, None, None, None, None, right, bias), 1.0)
        return out

    def backward(self, x: Tensor, grad: Tensor, weights: PHMWeights, wanted: tuple[bool, ...]) -> Gradients:
        x, grad, params = x.contiguous(), grad.contiguous(), _dense(weights)
        results = _gradients([x, *params], wanted)
        dx, d_rule, d_left, d_right, d_bias = results
        rule, left, right, _ = params
        kernel_params = (rule, left, None, None, None, None, right)
        self._backward(x, grad, dx, kernel_params, 1.0, False, [d_left, d_right, d_bias, d_rule, None, None, None, None])
        return tuple(results)


class Adapter(_Kernel):
    """compacter_adapter."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        scale: float,
        down: PHMWeights,
        up: PHMWeights,
        out: Tensor | None = None,
    ) -> Tensor:
        same, x = residual is x, x.contiguous()
        if same:
            residual = x
        elif residual is not None:
            residual = residual.contiguous()
        if out is None:
            out = torch.empty_like(x)
        self._forward(x, residual, out, (*_dense(down), *_dense(up)), scale)
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
        x, grad, params = x.contiguous(), grad.contiguous(), _dense(down) + _dense(up)
        results = _gradients([x, *params], wanted)
        dx, rule1, left1, right1, bias1, rule2, left2, right2, bias2 = results
        grads = [left1, right2, bias2, rule1, right1, bias1, rule2, left2]
        self._backward(x, grad, dx, tuple(params[:7]), scale, residual_is_x, grads)
        return tuple(results)
