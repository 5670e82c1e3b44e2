"""From torch tensors to a launched kernel, with as little host time as Python allows."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from compacter_kernels.impl.triton.config import Config
from compacter_kernels.impl.triton.sizes import Sizes
from compacter_kernels.impl.triton.tiles import INTERPRETED

_LP = {"bfloat16": tl.bfloat16, "float32": tl.float32}


class Launch:
    """One kernel with its compile-time arguments; compiled once for each pattern of 16-byte aligned pointers."""

    def __init__(self, kernel: Any, constants: dict[str, Any], warps: int) -> None:
        self.kernel, self.warps = kernel, warps
        self.constants = {k: _LP.get(v, v) if k == "LP" else v for k, v in constants.items()}
        self.tail = tuple(self.constants[name] for name in kernel.arg_names if name in self.constants)
        self.compiled: dict[Any, Any] = {}

    def compile(self, tensors: tuple[Tensor | None, ...]) -> Any:
        """The compiled kernel for tensors of these dtypes and alignments; its scalars are a float and integers."""
        names = self.kernel.arg_names[len(tensors) :]
        scalars = [1.0 if name == "scale" else 2 for name in names if name not in self.constants]
        return self.kernel.warmup(*tensors, *scalars, **self.constants, num_warps=self.warps, grid=(1,))

    def __call__(
        self, programs: int | tuple[int, int], device: int, tensors: tuple[Tensor | None, ...], *scalars: float
    ) -> None:
        """Launch on the current stream of the device."""
        grid = programs if isinstance(programs, tuple) else (programs, 1)
        if INTERPRETED.value:
            self.kernel[grid](*tensors, *scalars, **self.constants)
            return
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(grid, device, tensors, *scalars)
            return
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        key = tuple([a is None or a % 16 == 0 for a in addresses])
        compiled = self.compiled.get((device, key))
        if compiled is None:
            compiled = self.compiled[device, key] = self.compile(tensors)
            compiled._init_handles()
        compiled.run(
            *grid, 1, torch._C._cuda_getCurrentRawStream(device), compiled.function, compiled.packed_metadata, None,
            knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *addresses, *scalars, *self.tail,
        )  # fmt: skip


def constants_of(kernel: Any, s: Sizes, config: Config, options: dict[str, Any]) -> dict[str, Any]:
    """The compile-time arguments of a kernel: sizes, tiles and options, as far as it takes them."""
    tiles = {
        "BT": config.tokens,
        "BR": config.tokens,
        "BK": config.columns,
        "BK1": config.columns,
        "BK2": config.columns,
        "STAGES": config.stages,
    }
    values = {**s._asdict(), **s.offsets, **tiles, **options}
    return {name: value for name, value in values.items() if name in kernel.arg_names}


def first_that_fits(
    kernel: Any,
    s: Sizes,
    configs: tuple[Config, ...],
    options: dict[str, Any],
    device: int,
    tensors: tuple[Tensor | None, ...],
) -> tuple[Launch, Config]:
    """The first configuration whose shared memory the device has.

    Raises:
        RuntimeError: none has.
    """
    for config in configs:
        launch = Launch(kernel, constants_of(kernel, s, config, options), config.warps)
        if INTERPRETED.value:
            return launch, config
        with torch.cuda.device(device):
            shared = launch.compile(tensors).metadata.shared
            limit = driver.active.utils.get_device_properties(device)["max_shared_mem"]
        if shared <= limit:
            return launch, config
    raise RuntimeError(f"no configuration of {kernel.__name__} fits the {limit} bytes of shared memory of this device")
