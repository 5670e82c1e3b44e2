"""Checkpoints between Compacter's implementations: one file for each format, a neutral description in between."""

from compacter_kernels.checkpoints.convert.conversion import FORMATS, Converted, convert

__all__ = ["FORMATS", "Converted", "convert"]
