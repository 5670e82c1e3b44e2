"""Readers of command line options: lists of names, token counts, dtypes and shapes."""

from __future__ import annotations

import argparse

from compacter_kernels.cases import Shape
from compacter_kernels.config import DTYPES as DTYPES
from compacter_kernels.problem import divisors

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def names(text: str) -> list[str]:
    """Read names from `a,b,c`; an empty list is an error."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError("a list of names, such as cpu,factored, is expected, got nothing")
    return parts


def positive(text: str) -> int:
    """Read an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"an integer >= 1 is expected, got {text!r}")
    return int(text)


def tokens(text: str) -> list[int]:
    """Read token counts from `1,256,2048`."""
    return [positive(part) for part in names(text)]


def dtype(text: str) -> str:
    """Read the name of a dtype, also in its short form (bf16), and return its full name."""
    name = _SHORT.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not known; choose one of {', '.join(DTYPES)}")
    return name


def shapes(text: str) -> list[Shape]:
    """Read shapes from `k/d/n,...`: two widths, and a phm_dim that divides both."""
    result = []
    for part in names(text):
        sizes = part.split("/")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise argparse.ArgumentTypeError(f"a shape is k/d/n, such as 768/24/4, got {part!r}")
        shape = Shape(*map(int, sizes))
        if shape.k % shape.n or shape.d % shape.n:
            raise argparse.ArgumentTypeError(
                f"in {part} phm_dim n={shape.n} must divide k={shape.k} and d={shape.d}; "
                f"choose one of {divisors(shape.k, shape.d)}"
            )
        result.append(shape)
    return result
