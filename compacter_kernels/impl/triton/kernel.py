"""The Triton kernels as a `LinearKernel` and an `AdapterKernel`: tensors in, tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compacter_kernels.impl import Gradients
from compacter_kernels.impl.triton import two_phase
from compacter_kernels.impl.triton.backward import backward
from compacter_kernels.impl.triton.config import Config, architecture_of, configurations
from compacter_kernels.impl.triton.forward import forward, forward_streamed
from compacter_kernels.impl.triton.launch import Launch, first_that_fits
from compacter_kernels.impl.triton.reduce import reduce_rows
from compacter_kernels.impl.triton.sizes import precision, sizes
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights

REDUCE, REDUCE_WARPS = {"BLOCK": 16, "BR": 512}, 8


def _dense(weights: PHMWeights) -> list[Tensor | None]:
    return [w if w is None or w.is_contiguous() else w.contiguous() for w in weights]


class _Kernel:
    """What both operations share: sizes, configurations, launches."""

    def __init__(self, problem: Problem) -> None:
        self.sizes = s = sizes(problem)
        self.device = problem.device.index or 0
        self.multiprocessors, architecture = 4, "interpreter"
        if problem.device.type == "cuda":
            properties = torch.cuda.get_device_properties(problem.device)
            self.multiprocessors, architecture = properties.multi_processor_count, architecture_of(properties)
        self.configs = configurations(s, problem.dtype.itemsize, architecture)
        self.precision = precision(s, problem.dtype, architecture)
        self.launches: dict[Any, tuple[Launch, Config]] = {}
        self.square = (s.N1, s.K1) == (s.N2, s.K2)

    def _programs(self, config: Config, tokens: int) -> int:
        return max(1, min(-(-tokens // config.tokens), config.programs * self.multiprocessors))

    def _launch(
        self, kernel: Any, configs: tuple[Config, ...], tensors: tuple[Tensor | None, ...], **options: Any
    ) -> tuple[Launch, Config]:
        """The kernel with the first configuration that fits the device, compiled; found once."""
        key = (kernel, *options.values())
        found = self.launches.get(key)
        if found is None:
            found = self.launches[key] = first_that_fits(
                kernel, self.sizes, configs, {**self.precision, **options}, self.device, tensors
            )
        return found

    def _forward(
        self, x: Tensor, residual: Tensor | None, out: Tensor, params: tuple[Tensor | None, ...], scale: float
    ) -> None:
        tokens = x.numel() // (self.sizes.N1 * self.sizes.K1)
        if tokens:
            tensors = (x, residual, out, *params)
            if self.configs.held:
                same = residual is x and self.square
                launch, config = self._launch(forward, self.configs.forward, tensors, SAME=same)
            else:
                launch, config = self._launch(forward_streamed, self.configs.forward, tensors)
            launch(self._programs(config, tokens), self.device, tensors, scale, tokens)

    def _backward(
        self, x: Tensor, g: Tensor, dx: Tensor | None, params: tuple[Tensor | None, ...], scale: float,
        residual: bool, grads: list[Tensor | None],
    ) -> None:  # fmt: skip
        """params as the kernel takes them; grads in the order of a row of partials."""
        tokens = x.numel() // (self.sizes.N1 * self.sizes.K1)
        has_bias = grads[2] is not None
        if self.configs.backward:
            part = x.new_empty(
                (self.multiprocessors * self.configs.backward[0].programs, self.sizes.offsets["ROW"]),
                dtype=torch.float32,
            )
            tensors = (x, g, dx, part, *params)
            options = {"SQUARE": self.square, "RESIDUAL": residual, "HAS_BIAS": has_bias}
            launch, config = self._launch(backward, self.configs.backward, tensors, **options)
            wide_rows = count = self._programs(config, tokens)
            launch(count, self.device, tensors, scale, tokens)
        else:
            part, wide_rows, count = self._two_phase(x, g, dx, params, scale, residual, has_bias, tokens)
        if any(grad is not None for grad in grads):
            self._reduce(part, grads, wide_rows, count)

    def _two_phase(
        self, x: Tensor, g: Tensor, dx: Tensor | None, params: tuple[Tensor | None, ...],
        scale: float, residual: bool, has_bias: bool, tokens: int,
    ) -> tuple[Tensor, int, int]:  # fmt: skip
        """The partials, and how many rows of them the wide gradients and the others have."""
        s, configs = self.sizes, self.configs
        most = self.multiprocessors * max(configs.tokens[0].programs, configs.columns[0].programs)
        part = x.new_empty((most, s.offsets["ROW"]), dtype=torch.float32)
        dz = x.new_empty((tokens * s.N1, s.N1 * s.R1), dtype=torch.float32)
        v2 = x.new_empty((tokens * s.N2, s.N2 * s.R2), dtype=torch.float32)
        tensors = (x, g, dz, v2, part, *params)
        launch, config = self._launch(two_phase.tokens, configs.tokens, tensors)
        count = self._programs(config, tokens)
        launch(count, self.device, tensors, scale, tokens)
        tensors = (x, g, dx, dz, v2, part, params[1])
        wide_rows = 0
        for in_side, out_side in [(True, True)] if self.square else [(True, False), (False, True)]:
            k, n = (s.K1, s.N1) if in_side else (s.K2, s.N2)
            options = {"RESIDUAL": residual, "HAS_BIAS": has_bias, "IN_SIDE": in_side, "OUT_SIDE": out_side}
            launch, config = self._launch(two_phase.columns, configs.columns, tensors, **options)
            blocks = -(-max(s.K1, s.K2) // config.columns)
            if not wide_rows:
                tiles = -(-tokens * max(s.N1, s.N2) // config.tokens)
                wide_rows = max(1, min(tiles, config.programs * self.multiprocessors // blocks))
            launch((-(-k // config.columns), wide_rows), self.device, tensors, scale, tokens * n)
        return part, wide_rows, count

    def _reduce(self, part: Tensor, grads: list[Tensor | None], wide_rows: int, rows: int) -> None:
        elements = tuple(e for e, _ in self.sizes.gradients)
        tensors = (part, *grads)
        key = ("reduce", *[g is None for g in grads])
        found = self.launches.get(key)
        if found is None:
            constants = {
                "SIZES": elements, "COPIES": tuple(c for _, c in self.sizes.gradients), "ROW": part.shape[1], **REDUCE
            }  # fmt: skip
            found = self.launches[key] = Launch(reduce_rows, constants, REDUCE_WARPS), self.configs.forward[0]
        blocks = sum(-(-e // REDUCE["BLOCK"]) for e, g in zip(elements, grads, strict=True) if g is not None)
        found[0](blocks, self.device, tensors, wide_rows, rows)


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
        self._backward(
            x, grad, dx, kernel_params, 1.0, False, [d_left, d_right, d_bias, d_rule, None, None, None, None]
        )
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
