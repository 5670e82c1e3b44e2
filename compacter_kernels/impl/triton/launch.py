"""The launch of a kernel on torch tensors, with as little host time as Python allows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from compacter_kernels.impl.triton.config import Config
from compacter_kernels.impl.triton.plan import Static
from compacter_kernels.impl.triton.tiles import INTERPRETED
from compacter_kernels.private import current_device, current_stream

TENSOR_MEMORY = 512  # the columns that sm_100 has
BUFFER = 2**31 - 1  # the bytes that AMD's short offsets reach
_interpreted, _runtime = INTERPRETED.value, knobs.runtime
_compiling = threading.Lock()  # Triton unloads a kernel that is forgotten, perhaps while it runs


def compile_options(warps: int) -> dict[str, Any]:
    """The options of the compiler, which override Triton's environment variables."""
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}  # num_stages: of a loop without its own


def fits(metadata: Any, shared: int) -> bool:
    """Whether a device with this shared memory can run a kernel. Triton checks only at launch."""
    return bool(metadata.shared <= shared and (getattr(metadata, "tmem_size", None) or 0) <= TENSOR_MEMORY)


def pattern(tensors: Sequence[Tensor | None], addresses: Sequence[int]) -> tuple[Any, ...]:
    """What of its tensors a kernel is compiled for, beside their dtypes.

    It knows which are absent and the addresses modulo 16 bytes, and on AMD which are large.
    Raises ValueError for a tensor without an address, as a ZeroTensor of torch.
    """
    found = tuple([a % 16 if a else None for a in addresses])
    if None in found and any(not a and t is not None and t.numel() for t, a in zip(tensors, addresses, strict=True)):
        raise ValueError("a tensor of this call has no memory: its address is 0")
    if torch.version.hip is None:
        return found
    return *found, *[t is not None and t.untyped_storage().nbytes() > BUFFER for t in tensors]


class Launch:
    """One kernel with its compile-time arguments on one device, compiled for each `pattern`."""

    def __init__(self, kernel: Any, constants: dict[str, Any], warps: int, device: int) -> None:
        self.kernel, self.constants, self.warps, self.device = kernel, constants, warps, device
        self.tail = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def key(self, tensors: Sequence[Tensor | None], addresses: Sequence[int]) -> tuple[Any, ...]:
        """The pattern of a call."""
        return pattern(tensors, addresses)

    def compile(self, tensors: Sequence[Tensor | None]) -> Any:
        """The compiled kernel for tensors of these dtypes and alignments; scale is a float."""
        names = self.kernel.arg_names[len(tensors) :]
        scalars = [1.0 if name == "scale" else 2 for name in names if name not in self.constants]
        return self.kernel.warmup(*tensors, *scalars, **self.constants, **compile_options(self.warps), grid=(1,))

    def __call__(
        self, columns: int, rows: int, tensors: Sequence[Tensor | None], addresses: Sequence[int], *scalars: float
    ) -> None:
        """Launch columns x rows programs on the current stream of the tensors' device.

        addresses: those of the tensors, 0 for an absent one. The compiled kernel does not read it.
        """
        if _interpreted:
            self.kernel[columns, rows](*tensors, *scalars, **self.constants)
            return
        if self.device != current_device():
            with torch.cuda.device(self.device):
                self(columns, rows, tensors, addresses, *scalars)
            return
        key = self.key(tensors, addresses)
        compiled = self.compiled.get(key)
        if compiled is None:
            with _compiling:
                kernel = self.compile(tensors)
                kernel._init_handles()
                made = kernel.run, kernel.function, kernel.packed_metadata, kernel
                compiled = self.compiled.setdefault(key, made)
        stream = current_stream(self.device)
        run, function, packed, kernel = compiled
        enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
        if enter.calls or leave.calls:  # a profiler
            arguments = (*addresses, *scalars, *self.tail)
            metadata = kernel.launch_metadata((columns, rows, 1), stream, *arguments)
            run(columns, rows, 1, stream, function, packed, metadata, enter, leave, *arguments)
        else:
            run(columns, rows, 1, stream, function, packed, None, None, None, *addresses, *scalars, *self.tail)


class Tiled(Launch):
    """A launch whose programs share the tiles of a configuration.

    It serves one pattern, since that decides whether the configuration fits.
    """

    def __init__(self, kernel: Any, static: Static, config: Config, device: int, multiprocessors: int) -> None:
        super().__init__(kernel, {"P": static}, config.warps, device)
        self.config, self.tokens, self.most = config, config.tokens, config.programs * multiprocessors

    def key(self, tensors: Sequence[Tensor | None], addresses: Sequence[int]) -> tuple[Any, ...]:
        return ()

    def programs(self, count: int) -> int:
        """The number of programs for `count` tokens or rows: one for each tile, up to `most`."""
        tiles = -(-count // self.tokens)
        return tiles if tiles < self.most else self.most

    def fits(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether the device has enough shared memory."""
        if _interpreted:
            return True
        with torch.cuda.device(self.device):
            limit = driver.active.utils.get_device_properties(self.device)["max_shared_mem"]
            return fits(self.compile(tensors).metadata, limit)
