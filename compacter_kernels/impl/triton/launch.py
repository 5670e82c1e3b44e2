"""From torch tensors to a launched kernel, with as little host time as Python allows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from compacter_kernels.impl.triton.tiles import INTERPRETED

_LP = {"bfloat16": tl.bfloat16, "float32": tl.float32}


class Launch:
    """One kernel with its compile-time arguments; compiled once for each pattern of 16-byte aligned pointers."""

    def __init__(self, kernel: Any, constants: dict[str, Any], warps: int) -> None:
        self.kernel, self.warps = kernel, warps
        self.constants = {k: _LP.get(v, v) if k == "LP" else v for k, v in constants.items()}
        self.tail = tuple(self.constants[name] for name in kernel.arg_names if name in self.constants)
        self.compiled: dict[Any, Any] = {}

    def __call__(self, programs: int | tuple[int, int], device: int, tensors: tuple[Tensor | None, ...], *scalars: float) -> None:
        """Launch on the current stream of the device, which must be the current device."""
        grid = programs if isinstance(programs, tuple) else (programs, 1)
        if INTERPRETED.value:
            self.kernel[grid](*tensors, *scalars, **self.constants)
            return
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        key = tuple([a is None or a % 16 == 0 for a in addresses])
        compiled = self.compiled.get((device, key))
        if compiled is None:
            compiled = self.kernel.warmup(
                *tensors, *scalars, **self.constants, num_warps=self.warps, grid=grid
            )
            compiled.function  # noqa: B018
            self.compiled[device, key] = compiled
        compiled.run(
            *grid, 1, torch._C._cuda_getCurrentRawStream(device), compiled.function, compiled.packed_metadata, None,
            knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *addresses, *scalars, *self.tail,
        )  # fmt: skip
