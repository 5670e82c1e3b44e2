"""Tile sizes for each kernel, device and shape class: chosen by table, never by timing at run time.

For each class the configurations stand in the order of their speed (measured on sm_90 by benchmarks/tune_triton.py);
the first whose shared memory the device has is taken. benchmarks/aot_report.py shows what the compiler makes of each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from compacter_kernels.impl.triton.sizes import Sizes, power_of_two


class Config(NamedTuple):
    """How one kernel is cut.

    tokens: in a tile; rows (token, p) in the second phase of a backward.
    columns: of a chunk of x or of the output that are worked on at once.
    stages: tiles, or column blocks of a streamed row, on their way from memory; 0: one tile for each program.
    programs: at most, for each multiprocessor.
    bottleneck: columns of the bottleneck that are worked on at once; 0: all.
    keep: what stands between the projections stays in registers for all tiles, and is not read again for each.
    """

    tokens: int
    columns: int
    warps: int
    stages: int
    programs: int
    bottleneck: int = 0
    keep: bool = True


class Configurations(NamedTuple):
    """All of one problem, best first. held: a row of x stays on chip. backward is empty where it has two phases."""

    held: bool
    forward: tuple[Config, ...]
    backward: tuple[Config, ...]
    tokens: tuple[Config, ...]
    columns: tuple[Config, ...]


HELD_COLUMNS = 256  # of a chunk of x; a longer one is streamed
HELD_BYTES = 2048  # of a row of x, for a backward in one kernel
HELD_SUMS = 4096  # of the gradient of a folded matrix, likewise


def architecture_of(properties: Any) -> str:
    """The name of a torch device's architecture: "sm_90", "gfx942"."""
    name = getattr(properties, "gcnArchName", "")
    return name.split(":")[0] if name else f"sm_{properties.major}{properties.minor}"


def configurations(s: Sizes, itemsize: int, architecture: str) -> Configurations:
    """The configurations of a problem, x having itemsize bytes a number."""
    c = min(64, power_of_two(max(s.IN.K, s.OUT.K), 16))
    wide = min(128, power_of_two(max(s.IN.K, s.OUT.K), 16))
    inner = s.inner
    narrow = itemsize == 2
    held = narrow and s.FOLD and max(s.IN.K, s.OUT.K) <= HELD_COLUMNS
    forward: tuple[Config, ...]
    if not held:
        forward = (Config(16, c, 8, 3, 2), Config(16, c, 8, 2, 2), Config(16, min(32, c), 8, 1, 2))
        if narrow and s.FOLD and inner <= 64:
            forward = (Config(16, c, 4, 4, 2), *forward)
    elif inner <= 16 and s.DP <= 32:
        forward = (Config(16, c, 4, 3, 3), Config(16, c, 4, 2, 4), Config(16, c, 4, 1, 4), Config(16, c, 8, 1, 2))
    elif inner <= 64:
        forward = (Config(16, c, 8, 4, 1), Config(16, c, 8, 3, 2), Config(16, c, 8, 2, 2), Config(16, c, 8, 1, 2))
    else:
        forward = (Config(16, c, 8, 3, 1), Config(16, c, 8, 2, 2), Config(16, c, 8, 1, 2), Config(16, c, 16, 1, 1))
    backward: tuple[Config, ...] = ()
    row = max(s.IN.N * s.IN.K, s.OUT.N * s.OUT.K) * itemsize
    if held and inner <= 64 and inner * s.DP <= HELD_SUMS and row <= HELD_BYTES:
        backward = (Config(16, c, 8, 3, 1), Config(16, c, 8, 2, 1), Config(16, c, 8, 1, 1))
    tokens: tuple[Config, ...] = (Config(16, wide, 8, 3, 1), Config(16, c, 8, 2, 1), Config(16, min(32, c), 8, 1, 1))
    columns: tuple[Config, ...] = (Config(128, wide, 4, 2, 8) if wide > 64 else Config(64, c, 4, 2, 4),)
    if not narrow:
        tokens = (Config(16, min(32, c), 8, 3, 1), Config(16, min(32, c), 16, 1, 1))
        columns = (Config(32, c, 4, 2, 8),)
    elif not s.FOLD:
        tokens = (Config(16, min(32, c), 16, 1, 1),)
    small = (Config(64, c, 4, 2, 8), Config(32, min(32, c), 4, 1, 8))
    return Configurations(held, forward, backward, (*tokens, Config(16, 16, 16, 1, 1)), (*columns, *small))
