"""Tile sizes for each kernel, device and shape class: chosen by table, never by timing at run time."""

from __future__ import annotations

from typing import NamedTuple

from compacter_kernels.impl.triton.sizes import Sizes, power_of_two


class Config(NamedTuple):
    """How one kernel is cut.

    tokens: in a tile (BT). columns: of a chunk of x or of the output that are worked on at once (BK).
    stages: tiles, or column blocks of a streamed row, on their way from memory; 0: one tile for each program.
    keep: whether the rows of x stay on chip between their two uses, or are streamed twice.
    programs: for each multiprocessor.
    """

    tokens: int
    columns: int
    warps: int
    stages: int
    keep: bool
    programs: int


class TwoPhase(NamedTuple):
    """A backward in two phases; for `columns`, Config.tokens are rows (token, p) and programs are for all blocks."""

    tokens: Config
    columns: Config


def forward_config(s: Sizes, itemsize: int) -> Config:
    """For the forward kernel."""
    columns = min(64, power_of_two(s.K1, 16))
    if s.K1 > 256:
        return Config(16, columns, 8, 3, False, 2)
    return Config(16, columns, 4, 3, True, 4)


def backward_config(s: Sizes, itemsize: int) -> Config | TwoPhase:
    """For the backward kernel."""
    columns = min(64, power_of_two(s.K1, 16))
    if s.K1 > 256 or not s.FOLD:
        return TwoPhase(Config(16, columns, 8, 2, False, 2), Config(128, columns, 4, 2, False, 8))
    return Config(16, columns, 8, 3, True, 1)
