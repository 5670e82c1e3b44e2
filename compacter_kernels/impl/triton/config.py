"""Tile sizes for each kernel, device and shape class: chosen by table, never by timing at run time.

For each class the configurations stand best first (measured on sm_90 by benchmarks/tune_triton.py, elsewhere by what
the compiler reports); the first whose shared memory the device has is taken. benchmarks/aot_report.py shows what the
compiler makes of each: none that is in use may spill registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
HELD_SUMS = 4096  # of the gradient of a folded matrix, likewise


def architecture_of(properties: Any) -> str:
    """The name of a torch device's architecture: "sm_90", "gfx942"."""
    name = getattr(properties, "gcnArchName", "")
    return name.split(":")[0] if name else f"sm_{properties.major}{properties.minor}"


def configurations(s: Sizes, back: Sizes, dtype: torch.dtype, architecture: str) -> Configurations:
    """The kernels that serve x of this dtype, with their configurations; s and back: sizes of forward and backward."""
    # rows stay on chip where matrix instructions read them from shared memory: elsewhere they would fill the registers
    held = dtype == torch.bfloat16 and architecture in ("sm_90", "sm_100", "interpreter")
    return {**_forward(s, dtype, held), **_backward(back, dtype, held)}


def _forward(s: Sizes, dtype: torch.dtype, held: bool) -> Configurations:
    c = min(64, power_of_two(max(s.IN.K, s.OUT.K), 16))
    if not (held and s.FOLD and max(s.IN.K, s.OUT.K) <= HELD_COLUMNS):
        return {"forward_streamed": (Config(16, c, 8, 3, 2), Config(16, c, 8, 2, 2), Config(16, min(32, c), 8, 1, 2))}
    if s.inner <= 16 and s.DP <= 32:
        return {
            "forward": (Config(16, c, 4, 3, 3), Config(16, c, 4, 2, 4), Config(16, c, 4, 1, 4), Config(16, c, 8, 1, 2))
        }
    if s.inner <= 64:
        return {
            "forward": (Config(16, c, 8, 4, 1), Config(16, c, 8, 3, 2), Config(16, c, 8, 2, 2), Config(16, c, 8, 1, 2))
        }
    return {
        "forward": (Config(16, c, 8, 3, 1), Config(16, c, 8, 2, 2), Config(16, c, 8, 1, 2), Config(16, c, 16, 1, 1))
    }


def _backward(s: Sizes, dtype: torch.dtype, held: bool) -> Configurations:
    c = min(64, power_of_two(max(s.IN.K, s.OUT.K), 16))
    row = max(s.IN.N * s.IN.K, s.OUT.N * s.OUT.K) * dtype.itemsize
    held = held and s.FOLD and max(s.IN.K, s.OUT.K) <= HELD_COLUMNS and row <= HELD_BYTES
    if held and s.inner <= 64 and s.inner * s.DP <= HELD_SUMS:
        return {"backward": (Config(16, c, 8, 3, 1), Config(16, c, 8, 2, 1), Config(16, c, 8, 1, 1))}
    return {
        "tokens": (Config(16, c, 8, 3, 2), Config(16, c, 8, 2, 2), Config(16, min(32, c), 8, 1, 2)),
        "columns": (Config(64, c, 4, 2, 4), Config(32, min(32, c), 4, 1, 8)),
        "sums": (Config(16, 0, 8, 1, 1),),
    }
