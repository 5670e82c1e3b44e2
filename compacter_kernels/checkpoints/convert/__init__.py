"""Convert checkpoints between the libraries that have Compacter, each by way of a `Checkpoint`."""

from compacter_kernels.checkpoints.convert.conversion import FORMATS, Converted, convert

__all__ = ["FORMATS", "Converted", "convert"]
