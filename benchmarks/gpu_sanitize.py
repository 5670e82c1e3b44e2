"""A few small calls through impl="cuda", forward and backward, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/gpu_sanitize.py

The calls cover every dtype, each kind of instance, incomplete tiles, and aligned and unaligned
rows. The kernels are told of two multiprocessors. So each block has several tiles, and the ring of
tiles in shared memory turns. Only memory accesses and races are checked, not the results.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from compacter_kernels.accuracy import evaluate
from compacter_kernels.cases import Case, Shape, call
from compacter_kernels.impl import cuda

SHAPES = [
    Shape(768, 24, 4),
    Shape(768, 48, 8),
    Shape(768, 48, 12),
    Shape(4096, 128, 8),
    Shape(60, 20, 2),
    Shape(52, 26, 1),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = 99
MULTIPROCESSORS = 2


def cases() -> Iterator[Case]:
    """The calls, both operations of each shape and dtype."""
    for dtype, shape, operation in itertools.product(DTYPES, SHAPES, ("adapter", "linear")):
        yield Case.of(shape, TOKENS, dtype=dtype, operation=operation)


@contextmanager
def few_multiprocessors() -> Iterator[None]:
    """The kernels are told of MULTIPROCESSORS, whatever the device has."""
    real = cuda._device
    with mock.patch.object(cuda, "_device", lambda index: real(index)._replace(multiprocessors=MULTIPROCESSORS)):
        yield


def main(device: str = "cuda") -> int:
    """Run the calls. Returns 1 if a result is not finite."""
    failed = 0
    with few_multiprocessors():
        for case in cases():
            found = evaluate(case.inputs().map(lambda t: t.to(device)), call("cuda"))
            good = all(bool(t.isfinite().all()) for t in found.values())  # it waits for the kernels
            failed += not good
            print(f"{case}: {'ok' if good else 'not finite'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
