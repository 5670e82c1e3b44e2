"""A few small calls through impl="cuda", forward and backward, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/gpu_sanitize.py

The calls cover every dtype, bfloat16 first, each kind of instance, a backward that holds one tile
at a time, incomplete tiles, and aligned and unaligned rows. The kernels are told of two
multiprocessors, so that each block has several tiles and loads the next one while it computes. Only
memory accesses and races are checked, not the results.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from unittest import mock

import torch

from compacter_kernels.accuracy import evaluate
from compacter_kernels.cases import Case, Shape, call
from compacter_kernels.impl import cuda

SHAPES = [Shape(768, 24, 4), Shape(768, 48, 8), Shape(768, 48, 12), Shape(60, 20, 2), Shape(52, 26, 1)]
SHAPES += [Shape(4096, 128, 8)]  # whose backward has one stage
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = 467  # no multiple of a tile, and several tiles for each of four blocks


def main() -> int:
    """Run the calls. Returns 1 if a result is not finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multiprocessors", type=int, default=2, help="that the kernels are told of, default 2")
    args = parser.parse_args()
    failed, device = 0, cuda._device
    few = mock.Mock(side_effect=lambda index: device(index)._replace(multiprocessors=args.multiprocessors))
    with mock.patch.object(cuda, "_device", few):
        for dtype, shape, operation in itertools.product(DTYPES, SHAPES, ("adapter", "linear")):
            case = Case.of(shape, TOKENS, dtype=dtype, operation=operation).inputs().map(lambda t: t.to("cuda"))
            found = evaluate(case, call("cuda"))
            torch.cuda.synchronize()
            good = all(bool(t.isfinite().all()) for t in found.values())
            failed += not good
            name = f"{operation} {shape} {str(dtype).removeprefix('torch.')}"
            print(f"{name}: {'ok' if good else 'not finite'}", flush=True)
    return 1 if failed or not few.called else 0


if __name__ == "__main__":
    sys.exit(main())
