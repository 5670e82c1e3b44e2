"""The native module, where it was built, and its faster ways that every implementation uses."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

MODULE: Any = None  # compacter_kernels._C; None where it was not built, for the reason in MISSING
MISSING = ""
try:
    import compacter_kernels._C as MODULE
except ImportError as error:
    note = Path(__file__).parents[1] / "_not_built.txt"  # setup.py leaves it where it built none
    MISSING = "not built: " + (note.read_text(encoding="utf-8").strip() if note.is_file() else str(error))

BUILD: dict[str, Any] = {} if MODULE is None else MODULE.build_info()

# `_C.Tensors`, which asks torch through DLPack's C exchange API. It is None without the native
# module, and with torch before 2.10, which lacks that API.
TENSORS: Any = None
_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
if MODULE is not None and _api is not None:
    with suppress(ValueError):  # raised for a later major version of DLPack, with another table
        TENSORS = MODULE.Tensors(Tensor, _api)
