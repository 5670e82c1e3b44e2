"""A few small calls through impl="cuda", forward and backward, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/gpu_sanitize.py

The calls cover every dtype, each kind of instance, incomplete tiles, and aligned and unaligned
rows. Only memory accesses and races are checked, not the results.
"""

from __future__ import annotations

import itertools
import sys

import torch

from compacter_kernels.accuracy import evaluate
from compacter_kernels.cases import Case, Shape, call

SHAPES = [Shape(768, 24, 4), Shape(768, 48, 8), Shape(768, 48, 12), Shape(60, 20, 2), Shape(52, 26, 1)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main() -> int:
    """Run the calls. Returns 1 if a result is not finite."""
    failed = 0
    for shape, dtype, operation in itertools.product(SHAPES, DTYPES, ("adapter", "linear")):
        case = Case.of(shape, 83, dtype=dtype, operation=operation).inputs().map(lambda t: t.to("cuda"))
        found = evaluate(case, call("cuda"))
        torch.cuda.synchronize()
        good = all(bool(t.isfinite().all()) for t in found.values())
        failed += not good
        print(f"{operation} {shape} {str(dtype).removeprefix('torch.')}: {'ok' if good else 'not finite'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
