"""Convert checkpoints between the libraries that have Compacter.

`formats` is the table of formats. Each is read into a `Checkpoint` and written from one.
"""

from compacter_kernels.checkpoints.convert.conversion import Converted, convert
from compacter_kernels.checkpoints.convert.formats import FORMATS

__all__ = ["FORMATS", "Converted", "convert"]
