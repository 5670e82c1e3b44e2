"""The `Kernel` of a mixed bank."""

from __future__ import annotations

import torch
from torch import Tensor

from compacter_kernels.calls import BankCall, Call
from compacter_kernels.impl import Gradients, empty_gradients
from compacter_kernels.impl.memory import readable
from compacter_kernels.impl.triton import mixed
from compacter_kernels.impl.triton.kernel import Optionals
from compacter_kernels.impl.triton.routed import RoutedKernel

NAMES = ("middle", "expand", "tokens", "sums", "columns")
MIXED_KERNELS = {name: getattr(mixed, f"mixed_{name}") for name in NAMES}


class MixedKernel(RoutedKernel):
    """The `Kernel` of a bank whose adapters all serve each row, with its weights (mixed.py)."""

    kernels = MIXED_KERNELS

    def forward(self, call: Call, out: Tensor | None = None) -> Tensor:
        assert isinstance(call, BankCall) and call.mix is not None
        x, mix = readable(call.x, "x"), readable(call.mix, "mix").float()  # its dtype is not of the problem
        params, _ = self.parameters.readable((*call.down, *call.up))
        added = x if call.add_x else None
        if call.residual is not None:
            residual = readable(call.residual, "residual")
            added = residual + x if call.add_x else residual
        out = torch.empty_like(x) if out is None else out
        if rows := x.numel() // self.width:
            s, per = self.sizes, rows // len(mix)
            v2 = x.new_empty(self.adapters, rows * s.OUT.N, s.OUT.C, dtype=torch.float32)
            tensors: Optionals = (x, v2, *params[:6], mix)
            launch = self._launch("middle", tensors)
            self._run(launch, launch.programs(rows), 1, tensors, rows, per)
            self._expand(v2, added, out, params[6], params[7], mix, call.scale, False)
        return out

    def backward(self, call: Call, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        assert isinstance(call, BankCall) and call.mix is not None
        x, grad = readable(call.x, "x"), readable(grad, "the gradient of the output")
        mix = readable(call.mix, "mix")
        params, _ = self.parameters.readable((*call.down, *call.up))
        results = empty_gradients([x, *params, mix], wanted)
        rows = x.numel() // self.width
        if not rows:
            return tuple([None if result is None else result.zero_() for result in results])
        mix = mix.float()
        s, per, each = self.sizes, rows // len(mix), self._of_each(results)
        dx, rule1, left1, right1, bias1, rule2, left2, right2, bias2, of_mix = each
        grads: Optionals = (left1, right2, bias2, rule1, right1, bias1, rule2, left2)
        train = any(t is not None for t in grads)
        dz = x.new_empty(self.adapters, rows * s.IN.N, s.IN.C, dtype=torch.float32)
        v2 = x.new_empty(self.adapters, rows * s.OUT.N, s.OUT.C, dtype=torch.float32) if train else None
        z, dv = (torch.empty_like(t) if train and s.sums and t is not None else None for t in (dz, v2))
        dw = None if of_mix is None else x.new_empty(rows, self.adapters, dtype=torch.float32)
        tensors: Optionals = (x, grad, z, dv, dz, v2, dw, *params, mix)
        launch = self._launch("tokens", tensors)
        self._run(launch, launch.programs(rows), 1, tensors, call.scale, rows, per)
        if dx is not None:
            self._expand(dz, grad if call.add_x else None, dx, params[1], None, mix, 1.0, True)
        if of_mix is not None and dw is not None:
            of_mix.copy_(dw.view(len(mix), per, self.adapters).sum(1))
        if train:
            self._sum(x, grad, z, dv, dz, v2, params, grads, mix, call.scale)
        self._add_shared(results, each)
        return tuple(results)

    def _expand(
        self, v: Tensor, added: Tensor | None, out: Tensor, w: Tensor | None, b: Tensor | None, mix: Tensor,
        scale: float, in_side: bool,
    ) -> None:  # fmt: skip
        rows = out.numel() // self.width
        tensors = (v, added, out, w, b, mix)
        launch = self._launch("expand", tensors, False, False, False, in_side, not in_side)
        self._run(launch, launch.programs(rows), 1, tensors, scale, rows, rows // len(mix))

    def _sum(
        self, x: Tensor, g: Tensor, z: Tensor | None, dv: Tensor | None, dz: Tensor, v2: Tensor | None,
        params: Optionals, grads: Optionals, mix: Tensor, scale: float,
    ) -> None:  # fmt: skip
        """The weight gradients: each adapter has equally many programs, and rows of partials."""
        s, rows, has_bias = self.sizes, x.numel() // self.width, grads[2] is not None
        part = self._partials(x, "columns", "sums")
        rule1, left1, right1, bias1, rule2, left2, _, _ = params
        tensors: Optionals = (z, dv, part, rule1, right1, bias1, rule2, left2)
        few = wide = 0
        for in_side in s.sums:
            launch = self._launch("sums", tensors, False, False, False, in_side, not in_side)
            few = max(1, launch.programs(rows) // self.adapters)
            self._run(launch, s.blocks, few * self.adapters, tensors, rows)
        tensors = (x, g, dz, v2, part, left1, mix)
        for in_side, out_side in [(True, True)] if self.square else [(True, False), (False, True)]:
            side = s.IN if in_side else s.OUT
            launch = self._launch("columns", tensors, False, False, has_bias, in_side, out_side)
            if not wide:
                programs = launch.programs(rows * max(s.IN.N, s.OUT.N))
                wide = max(1, min(programs, launch.most // (self._blocks(launch, s.K) * self.adapters)))
            columns = self._blocks(launch, side.K)
            self._run(launch, columns, wide * self.adapters, tensors, scale, rows, rows // len(mix))
        steps = torch.arange(-self.adapters - 1, self.adapters + 1, device=x.device, dtype=torch.int32)
        self._reduce_bank(part, grads, [steps * wide, steps * wide, steps * (few or wide)])
