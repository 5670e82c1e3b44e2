"""Tile sizes for each kernel, device and shape class: chosen by table, never by timing at run time.

For each class the configurations stand best first (measured on sm_90 by benchmarks/tune_triton.py, elsewhere by what
the compiler reports); the first whose shared memory the device has is taken. benchmarks/aot_report.py shows what the
compiler makes of each: none that is in use may spill registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from compacter_kernels.impl.triton.sizes import Sizes, power_of_two


class Config(NamedTuple):
    """How one kernel is cut.

    tokens: in a tile; rows (token, p) in `columns`.
    columns: of a chunk of x or of the output that are worked on at once.
    stages: tiles, or column blocks of a streamed row, on their way from memory; 0: one tile for each program.
    programs: at most, for each multiprocessor.
    """

    tokens: int
    columns: int
    warps: int
    stages: int
    programs: int


Configurations = dict[str, tuple[Config, ...]]  # of each kernel that serves a problem, best first

HELD_COLUMNS = 256  # of a chunk of x; a longer one is streamed
HELD_BYTES = 2048  # of a row of x, for a backward in one kernel
HELD_SUMS = 4096, 6144  # numbers of a folded matrix's gradient, and of the wide factors' gradients, likewise


def configurations(s: Sizes, back: Sizes, dtype: torch.dtype, architecture: str) -> Configurations:
    """The kernels that serve x of this dtype, with their configurations; s and back: sizes of forward and backward."""
    bf16 = dtype == torch.bfloat16
    # rows stay on chip where matrix instructions read them from shared memory: elsewhere they would fill the registers
    held = bf16 and architecture in ("sm_90", "sm_100", "interpreter")
    forward = (
        {"forward": _held_forward(s)}
        if held and s.FOLD and s.K <= HELD_COLUMNS
        else _streamed_forward(s, bf16, architecture)
    )
    if held and _held_sums(back) and back.row * dtype.itemsize <= HELD_BYTES:
        c = _columns(back, 64)
        return {**forward, "backward": (Config(16, c, 8, 3, 1), Config(16, c, 8, 2, 1), Config(16, c, 8, 1, 1))}
    return {**forward, **_two_phase(back, bf16, architecture)}


def _columns(s: Sizes, most: int) -> int:
    return min(most, power_of_two(s.K, 16))


def _warps(architecture: str) -> int:
    """Of 32 threads with 255 registers, or on AMD's processors of 64 with 512."""
    return 4 if architecture.startswith("gfx") else 8


def _held_sums(s: Sizes) -> bool:
    """Whether one program can hold the sums of a backward."""
    wide = sum(side.K * max(2 * side.NI, 16) for side in (s.IN, s.OUT))
    inner = s.inner * s.DP
    narrow = s.inner <= (64 if s.IN.NP >= 8 else 16)  # fewer rows than columns would be repeated by every warp
    return s.FOLD and narrow and inner <= HELD_SUMS[0] and wide <= HELD_SUMS[1] and s.K <= HELD_COLUMNS


def _held_forward(s: Sizes) -> tuple[Config, ...]:
    c = _columns(s, 64)
    if s.inner <= 16 and s.DP <= 32:
        return Config(16, c, 4, 3, 3), Config(16, c, 4, 2, 4), Config(16, c, 4, 1, 4), Config(16, c, 8, 1, 2)
    if s.inner <= 16:
        return Config(16, c, 8, 3, 2), Config(16, c, 8, 2, 2), Config(16, c, 8, 1, 2)
    if s.inner <= 64:
        return Config(16, c, 8, 4, 1), Config(16, c, 8, 3, 2), Config(16, c, 8, 2, 2), Config(16, c, 8, 1, 2)
    return Config(16, c, 8, 3, 1), Config(16, c, 8, 2, 2), Config(16, c, 8, 1, 2), Config(16, c, 16, 1, 1)


def _streamed_forward(s: Sizes, bf16: bool, architecture: str) -> Configurations:
    """Fewer columns at a time where the middle takes more registers."""
    if bf16:
        c = _columns(s, 32 if s.inner > 64 and s.K > 64 else 64)
    elif not s.FOLD:
        c = _columns(s, 16)
    else:
        c = _columns(s, 32 if s.inner > 16 and (s.DP > 64 or s.ACTIVATION is None) else 64)
    half, w = max(16, c // 2), _warps(architecture)
    return {"forward_streamed": (Config(16, c, w, 3, 2), Config(16, half, w, 2, 2), Config(16, half, w, 1, 2))}


def _two_phase(s: Sizes, bf16: bool, architecture: str) -> Configurations:
    c = _columns(s, 32 if not (bf16 and s.FOLD) else 64)
    if not bf16 and not s.FOLD and architecture in ("sm_90", "sm_100"):
        c = 16
    half, w = max(16, c // 2), _warps(architecture)
    if bf16:
        rows = 128 if architecture in ("sm_90", "sm_100") else 64
        columns = Config(rows, _columns(s, 64), 4, 2, 8)
    else:
        columns = Config(32, _columns(s, 32), 4, 1, 8)
    return {
        "tokens": (Config(16, c, w, 3 if bf16 else 2, 2), Config(16, half, w, 1, 2)),
        "columns": (columns, Config(32, _columns(s, 32), 4, 1, 8)),
        "sums": (Config(16, 0, w, 1, 1),),
    }
