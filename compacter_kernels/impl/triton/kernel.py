"""The `Kernel` of each operation, which launches the Triton kernels on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.calls import Call, LinearCall
from compacter_kernels.impl import Gradients, architecture, empty_gradients
from compacter_kernels.impl.memory import Parameters, addresses, readable
from compacter_kernels.impl.triton import two_phase
from compacter_kernels.impl.triton.backward import backward
from compacter_kernels.impl.triton.config import generation
from compacter_kernels.impl.triton.forward import forward, forward_streamed
from compacter_kernels.impl.triton.launch import Launch, Tiled, pattern
from compacter_kernels.impl.triton.plan import Options, plan, served
from compacter_kernels.impl.triton.reduce import reduce_rows
from compacter_kernels.impl.triton.sizes import Sizes
from compacter_kernels.private import tf32_allowed
from compacter_kernels.problem import Problem

REDUCE, REDUCE_WARPS = {"BLOCK": 16, "BR": 512}, 8
Optionals = Sequence[Tensor | None]

_FUNCTIONS = (forward, forward_streamed, backward, two_phase.tokens, two_phase.columns, two_phase.sums)
KERNELS = {function.__name__: function for function in _FUNCTIONS}


def reduction(s: Sizes) -> dict[str, Any]:
    """The compile-time arguments of the second stage."""
    sizes, copies = zip(*s.gradients, strict=True)
    return {"SIZES": sizes, "COPIES": copies, "ROW": s.OFFSETS.ROW, **REDUCE}


class TritonKernel:
    """The `Kernel` of both operations."""

    differentiable = norms = False
    kernels = KERNELS

    def __init__(self, problem: Problem, turned: tuple[bool, ...] = (False, False)) -> None:
        self.parameters = Parameters(problem)
        self.device = problem.device.index or 0
        self.multiprocessors, name = 4, "interpreter"
        if problem.device.type == "cuda":
            self.multiprocessors = torch.cuda.get_device_properties(problem.device).multi_processor_count
            name = generation(architecture(problem.device))
        self.served = served(problem, name, turned)
        self.sizes = s = self.served["backward" if "backward" in self.served else "tokens"].sizes
        self.width, self.square = s.IN.N * s.IN.K, s.SQUARE
        self.float32 = problem.dtype == torch.float32 and name.startswith("sm_")  # few GPUs of AMD have tf32
        self.out_features = problem.projections[-1].out_features
        self.launches: dict[Any, Tiled] = {}
        self.reductions: dict[tuple[bool, ...], tuple[Launch, int]] = {}

    def forward(self, call: Call, out: Tensor | None = None) -> Tensor:
        if call.__class__ is LinearCall:
            x, weights, base, scale = call
            x, added = readable(x, "x"), None if base is None else readable(base, "base")
            (rule, left, right, bias), given = self.parameters.readable(weights)
            params: Optionals = (rule, left, None, None, None, None, right, bias)
            given = (*given[:2], 0, 0, 0, 0, *given[2:])
            if out is None:
                out = x.new_empty(*x.shape[:-1], self.out_features)  # in half the time of a tuple
        else:
            x, down, up, residual, add_x, scale, _ = call  # type: ignore[misc]
            x = readable(x, "x")
            params, given = self.parameters.readable((*down, *up))
            added = x if add_x else None
            if residual is not None:
                residual = readable(residual, "residual")
                added = residual + x if add_x else residual
            if out is None:
                out = torch.empty_like(x)
        if tokens := x.numel() // self.width:
            tensors = (x, added, out, *params)
            pointers = (x.data_ptr(), 0 if added is None else added.data_ptr(), out.data_ptr(), *given)
            if "forward" in self.served:
                launch = self._launch("forward", tensors, added is x and self.square, at=pointers)
            else:
                launch = self._launch("forward_streamed", tensors, at=pointers)
            launch(launch.programs(tokens), 1, tensors, pointers, scale, tokens)
        return out

    def backward(self, call: Call, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        x, grad = readable(call.x, "x"), readable(grad, "the gradient of the output")
        if isinstance(call, LinearCall):
            (params, _), scale, add_x = self.parameters.readable(call.weights), call.scale, False
            results = empty_gradients([x, *params], wanted)
            dx, rule1, left1, right2, bias2 = results
            grads: Optionals = (left1, right2, bias2, rule1, None, None, None, None)
            params = (params[0], params[1], None, None, None, None, params[2])
        else:
            (params, _), scale, add_x = self.parameters.readable((*call.down, *call.up)), call.scale, call.add_x
            results = empty_gradients([x, *params], wanted)
            dx, rule1, left1, right1, bias1, rule2, left2, right2, bias2 = results
            grads, params = (left1, right2, bias2, rule1, right1, bias1, rule2, left2), params[:7]
        tokens = x.numel() // self.width
        if not tokens:
            for gradient in grads:
                if gradient is not None:
                    gradient.zero_()
            return tuple(results)
        has_bias = bias2 is not None
        if "backward" in self.served:
            part = self._partials(x, "backward")
            tensors = (x, grad, dx, part, *params)
            launch = self._launch("backward", tensors, False, add_x, has_bias)
            wide_rows = rows = launch.programs(tokens)
            launch(rows, 1, tensors, addresses(tensors), scale, tokens)
        else:
            part, wide_rows, rows = self._two_phase(x, grad, dx, params, scale, add_x, has_bias, tokens)
        self._reduce(part, grads, wide_rows, rows)
        return tuple(results)

    def _reduce(self, part: Tensor, grads: Optionals, wide_rows: int, rows: int) -> None:
        """Add the rows of partials. grads are in the order of a row, unwanted ones None."""
        wanted = tuple([grad is not None for grad in grads])
        if True not in wanted:
            return
        if wanted not in self.reductions:
            constants = reduction(self.sizes)
            sizes = [size for size, want in zip(constants["SIZES"], wanted, strict=True) if want]
            blocks = sum(-(-size // REDUCE["BLOCK"]) for size in sizes)
            self.reductions[wanted] = Launch(reduce_rows, constants, REDUCE_WARPS, self.device), blocks
        launch, blocks = self.reductions[wanted]
        tensors = (part, *grads)
        launch(blocks, 1, tensors, addresses(tensors), wide_rows, rows)

    def _launch(self, name: str, tensors: Optionals, *options: bool, at: Sequence[int] | None = None) -> Tiled:
        """The kernel with the first configuration that fits, for these `Options` and this pattern.

        at: the addresses of the tensors, if they are known.
        """
        tf32 = self.float32 and tf32_allowed()
        key = name, tf32, options, pattern(tensors, addresses(tensors) if at is None else at)
        launch = self.launches.get(key)
        if launch is None:
            kernel = self.served[name]
            if tf32:
                kernel = kernel._replace(
                    precision=replace(kernel.precision, WIDE="tf32", MIDDLE="tf32", SUMS="tf32", BEYOND="tf32")
                )
            for config in kernel.configs:
                static = plan(kernel.sizes, config, kernel.precision, Options(*options))
                launch = Tiled(self.kernels[name], static, config, self.device, self.multiprocessors)
                if launch.fits(tensors):
                    break
            else:
                raise RuntimeError(f"no configuration of {name} fits the shared memory of this device")
            self.launches[key] = launch
        return launch

    def _two_phase(
        self, x: Tensor, g: Tensor, dx: Tensor | None, params: Optionals, scale: float, residual: bool, has_bias: bool,
        tokens: int,
    ) -> tuple[Tensor, int, int]:  # fmt: skip
        """The partials, and the number of rows for the wide gradients and for the others."""
        s = self.sizes
        part = self._partials(x, "columns", "sums")
        z, dv, dz, v2 = self._narrow(x, tokens)
        rule1, left1, right1, bias1, rule2, left2, _ = params
        tensors = (x, g, z, dv, dz, v2, *params, dx if s.DENSE else None)
        launch = self._launch("tokens", tensors, False, residual)
        launch(launch.programs(tokens), 1, tensors, addresses(tensors), scale, tokens)
        tensors = (z, dv, part, rule1, right1, bias1, rule2, left2)
        rows = 0
        for in_side in s.sums:
            launch = self._launch("sums", tensors, False, False, False, in_side, not in_side)
            rows = launch.programs(tokens)
            launch(s.blocks, rows, tensors, addresses(tensors), tokens)
        tensors = (x, g, None if s.DENSE else dx, dz, v2, part, left1)
        wide_rows = 0
        for in_side, out_side in [(True, True)] if self.square else [(True, False), (False, True)]:
            side = s.IN if in_side else s.OUT
            launch = self._launch("columns", tensors, False, residual, has_bias, in_side, out_side)
            if not wide_rows:
                blocks = self._blocks(launch, s.K)
                wide_rows = max(1, min(launch.programs(tokens * max(s.IN.N, s.OUT.N)), launch.most // blocks))
            launch(self._blocks(launch, side.K), wide_rows, tensors, addresses(tensors), scale, tokens)
        return part, wide_rows, rows or wide_rows

    def _blocks(self, launch: Tiled, width: int) -> int:
        """The programs of `columns` side by side, for chunks of this width."""
        return -(-width // launch.config.columns) * self.sizes.PARTS

    def _narrow(self, x: Tensor, tokens: int) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Memory for Z, dV2, dZ and V2; the first two are None where no sums need them."""
        s = self.sizes
        count = 2 if s.sums else 1
        *z, dz = x.new_empty((count, tokens * s.IN.N, s.IN.C), dtype=torch.float32)
        *dv, v2 = x.new_empty((count, tokens * s.OUT.N, s.OUT.C), dtype=torch.float32)
        return (z[0], dv[0], dz, v2) if s.sums else (None, None, dz, v2)

    def _partials(self, x: Tensor, *names: str) -> Tensor:
        """Memory with a row for each program of these kernels in any of their configurations."""
        used = [config.programs for name in names if name in self.served for config in self.served[name].configs]
        rows = self.multiprocessors * max(used)
        return x.new_empty(rows, self.sizes.OFFSETS.ROW, dtype=torch.float32)
