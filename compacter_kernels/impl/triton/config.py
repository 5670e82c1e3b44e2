"""Tile sizes for each kernel, device and class of shapes, from a table and not by timing.

The best configuration of a class comes first. On sm_90 it is the one that benchmarks/tune_triton.py
measured. The streamed kernels and those of two phases have changed since then, so in bfloat16 a
model of one multiprocessor chose theirs. Elsewhere the compiler's report chose. A kernel takes the
first one that fits into the shared memory of the device. No configuration in use may spill
registers, see benchmarks/aot_report.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from compacter_kernels.impl.triton.sizes import Sizes, power_of_two


class Config(NamedTuple):
    """How one kernel divides its work.

    tokens: the tokens of a tile; for the kernel `columns`, its rows (token, p).
    columns: the columns of a chunk of x or of the output that a program handles at once.
    stages: the tiles, or blocks of a streamed row, in flight.
    programs: the most programs for each multiprocessor.
    """

    tokens: int
    columns: int
    warps: int
    stages: int
    programs: int


Configurations = dict[str, tuple[Config, ...]]  # the kernels that serve a problem; best configuration first

HOPPER = "sm_90", "interpreter"  # the interpreter stands for sm_90
HELD_COLUMNS = 256  # the longest chunk of x that a program holds; a longer one is streamed
HELD_BYTES = 2048  # the longest row of x for a backward in one kernel
HELD_SUMS = 4096, 6144  # the most numbers of a folded matrix, and of the wide factors, in its sums


def generation(architecture: str) -> str:
    """The architecture of the tables for a GPU: sm_103 is like sm_100, and sm_89 like sm_80."""
    known = {"sm_8": "sm_80", "sm_9": "sm_90", "sm_10": "sm_100", "sm_11": "sm_100", "sm_12": "sm_120"}
    return known.get(architecture[:-1], architecture)


def configurations(s: Sizes, back: Sizes, dtype: torch.dtype, architecture: str) -> Configurations:
    """The kernels for this dtype and their configurations. s, back: sizes forward, backward."""
    bf16 = dtype == torch.bfloat16
    if s.MIXED:
        return _mixed(s, back, bf16, architecture)
    if s.DENSE:
        kernels = _dense(s, bf16, architecture)
        return _gathered(kernels, s, bf16, architecture) if s.ROUTED else kernels
    # Rows stay on chip if matrix instructions read shared memory; else they fill the registers.
    square = s.IN.TERMS == 0  # else a rule that is not (n, n, n)
    held = bf16 and square and architecture in ("sm_90", "sm_100", "interpreter")
    several = s.ADAPTERS > 1  # The addresses of the rows of a bank need registers.
    hold_row = held and s.FOLD and s.K <= HELD_COLUMNS and not (several and s.inner <= 16 and s.DP > 32)
    forward = {"forward": _held_forward(s)} if hold_row else _streamed_forward(s, bf16, architecture)
    row = max(back.IN.N * back.IN.K, back.OUT.N * back.OUT.K)
    held_backward = held and _held_sums(back) and row * dtype.itemsize <= HELD_BYTES
    if held_backward and not several:
        c = _columns(back, 64)
        kernels = {**forward, "backward": (Config(16, c, 8, 3, 1), Config(16, c, 8, 2, 1), Config(16, c, 8, 1, 1))}
    else:
        kernels = {**forward, **_two_phase(back, bf16, architecture)}
    return _gathered(kernels, s, bf16, architecture) if s.ROUTED else kernels


def _dense(s: Sizes, bf16: bool, architecture: str) -> Configurations:
    """The kernels of a bottleneck adapter. More rows in a tile read the weights less often."""
    w = _warps(architecture)
    if bf16:
        c, t = _columns(s, 64), 64 if s.DP <= 128 else 32
        sums = Config(64, _columns(s, 32) if architecture in ("sm_80", "sm_120") else c, w, 2, 2)
    elif s.DP <= 64:
        c, t = _columns(s, 32), 32 if architecture in ("sm_80", "sm_120") else 64
        sums = Config(32, c, w, 1, 2)
    else:
        few = Config(16, _columns(s, 64), w, 1, 2), Config(16, _columns(s, 32), 4, 1, 2)
        return {"forward_streamed": few, "tokens": few, "columns": (Config(32, _columns(s, 32), w, 1, 2),)}
    tiles = [Config(t, c, w, stages, 2) for stages in (3, 2, 1)]
    tokens = tiles[1:]
    if not bf16 and architecture in HOPPER and s.ADAPTERS <= 1 and not s.MIXED:  # fewer columns, but as many in flight
        tokens = [Config(t, _columns(s, 16), w, stages, 2) for stages in (4, 2)]
    elif bf16 and s.DP > 128 and architecture in ("sm_90", "sm_100"):
        tokens = tiles[2:]
    return {"forward_streamed": tuple(tiles), "tokens": tuple(tokens), "columns": (sums,)}


def _mixed(s: Sizes, back: Sizes, bf16: bool, architecture: str) -> Configurations:
    """The kernels of a mixed bank. `middle` and `expand` serve the forward, and `expand` dx too."""
    if s.DENSE:
        found = _dense(s, bf16, architecture)
    else:
        found = {**_streamed_forward(s, bf16, architecture), **_two_phase(back, bf16, architecture)}
    from_registers = architecture in ("sm_80", "sm_120")  # matrix instructions read no shared memory
    if bf16:
        stages = 1 if not s.DENSE and (architecture == "sm_100" or (from_registers and s.DP > 64)) else 2
    else:
        stages = 1 if not s.DENSE and not s.FOLD and architecture == "sm_80" else 2
    middle = tuple([config._replace(stages=min(config.stages, stages)) for config in found.pop("forward_streamed")])
    # The loop over adapters needs registers.
    most = 64 if s.DENSE or (bf16 and s.FOLD) else 32 if bf16 else 16
    tokens = [config._replace(stages=1, columns=min(config.columns, most)) for config in found["tokens"]]
    if not bf16 and not s.DENSE and architecture in HOPPER and back.IN.NP <= 4:
        tokens = [config._replace(warps=4) for config in tokens]
    found["tokens"] = tuple(tokens)
    c, t = _columns(s, 16 if s.DENSE and bf16 and from_registers else 32), 64 if s.DENSE else 16
    wide = t * min(s.IN.NP, s.OUT.NP) * c >= 2048  # 128 bits of bfloat16 for each of 256 threads
    expand = (Config(t, c, _warps(architecture) if wide else 4, 1, 2),)
    return {"middle": middle, "expand": expand, **found}


def _gathered(kernels: Configurations, s: Sizes, bf16: bool, architecture: str) -> Configurations:
    """With fewer registers for the kernels of a bank that stream rows."""
    found = dict(kernels)
    long, many = s.K > HELD_COLUMNS, s.IN.N > 4 or architecture in HOPPER
    fewer = {"tokens", *(["forward_streamed"] if long or (many and not bf16) else [])}
    for name in fewer & set(kernels):
        found[name] = tuple([config._replace(stages=max(1, config.stages - 1)) for config in kernels[name]])
    if bf16 and architecture == "sm_120" and long:
        found["forward_streamed"] = found["forward_streamed"][-1:]
    if not bf16 and not s.DENSE and architecture == "sm_120":
        found["tokens"] = found["tokens"][-1:]
    return found


def _columns(s: Sizes, most: int) -> int:
    return min(most, power_of_two(s.K, 16))


def _warps(architecture: str) -> int:
    """Warps of 32 threads with 255 registers, or on AMD's processors of 64 threads with 512."""
    return 4 if architecture.startswith("gfx") else 8


def _held_sums(s: Sizes) -> bool:
    """Whether one program can hold the sums of a backward."""
    wide = sum(side.K * max(2 * side.NI, 16) for side in (s.IN, s.OUT))
    inner = s.inner * s.DP
    narrow = s.inner <= (64 if s.IN.NP >= 8 else 16)  # with fewer rows, every warp would repeat them
    return s.FOLD and narrow and inner <= HELD_SUMS[0] and wide <= HELD_SUMS[1] and s.K <= HELD_COLUMNS


def _held_forward(s: Sizes) -> tuple[Config, ...]:
    c = _columns(s, 64)
    if s.inner <= 16 and s.DP <= 32:
        most = 2 if s.K > 64 else 3  # Two programs with longer chunks need all registers, or all of the bandwidth.
        return Config(16, c, 4, 3, most), Config(16, c, 4, 2, 4), Config(16, c, 4, 1, 4), Config(16, c, 8, 1, 2)
    if s.inner <= 16:
        return Config(16, c, 8, 3, 2), Config(16, c, 8, 2, 2), Config(16, c, 8, 1, 2)
    if s.inner <= 64:
        return Config(16, c, 8, 4, 1), Config(16, c, 8, 3, 2), Config(16, c, 8, 2, 2), Config(16, c, 8, 1, 2)
    return Config(16, c, 8, 3, 1), Config(16, c, 8, 2, 2), Config(16, c, 8, 1, 2), Config(16, c, 16, 1, 1)


def _two_programs(s: Sizes, bf16: bool, architecture: str) -> bool:
    """Whether a streamed kernel has 4 warps, so that sm_90 has the registers for two programs.

    One program then computes while the other waits for memory or at a barrier. A projection alone
    needs few registers, so that two programs of 8 warps fit as well.
    """
    return bf16 and architecture in HOPPER and s.ACTIVATION is not None and s.FOLD and s.inner <= 64


def _streamed_forward(s: Sizes, bf16: bool, architecture: str) -> Configurations:
    """Fewer columns at a time if the middle needs more registers."""
    if _two_programs(s, bf16, architecture):
        return {"forward_streamed": (Config(16, _columns(s, 32), 4, 4, 2),)}
    if bf16:
        c = _columns(s, 32 if s.inner > 64 and s.K > 64 else 64)
    elif not s.FOLD:
        c = _columns(s, 16)
    else:
        c = _columns(s, 32 if s.inner > 16 and (s.DP > 64 or s.ACTIVATION is None) else 64)
    half, w = max(16, c // 2), _warps(architecture)
    return {"forward_streamed": (Config(16, c, w, 3, 2), Config(16, half, w, 2, 2), Config(16, half, w, 1, 2))}


def _two_phase(s: Sizes, bf16: bool, architecture: str) -> Configurations:
    hopper = bf16 and architecture in HOPPER
    c = _columns(s, 64 if bf16 and (s.FOLD or (hopper and s.K <= 64)) else 32)
    if not bf16 and not s.FOLD and architecture in ("sm_90", "sm_100"):
        c = 16
    half, w = max(16, c // 2), _warps(architecture)
    if _two_programs(s, bf16, architecture):
        tokens: tuple[Config, ...] = (Config(16, _columns(s, 32), 4, 3, 2),)
    else:
        tokens = Config(16, c, w, 3 if bf16 else 2, 2), Config(16, half, w, 1, 2)
    rows = 128 if architecture in ("sm_90", "sm_100") else 64
    # A program writes a row of partials. Many blocks, or a shorter side, need more programs.
    most = 2 if hopper and s.SQUARE and s.K <= HELD_COLUMNS else 8
    # The sums of both sides of a rule that is not (n, n, n) need registers.
    small = Config(32, _columns(s, 32), w if s.IN.TERMS and not s.FOLD else 4, 1, most)
    return {
        "tokens": tokens,
        "columns": (Config(rows, _columns(s, 64), 4, 2, most) if bf16 else small, small),
        "sums": (Config(16, 0, w, 1, 1),),
    }
