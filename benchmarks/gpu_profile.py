"""One forward and one backward of each kernel and shape, for a profiler to watch.

    ncu --profile-from-start off ... python benchmarks/gpu_profile.py KERNEL... [--tokens 16384]

A KERNEL is an impl or the path of another build (gpu_kernels.py). What comes before, such as
compiling, is outside the region that the profiler sees.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
from gpu_first import inputs_of
from gpu_kernels import SHAPES, WANTED, call_of, kernel_of

from compacter_kernels import options


def main() -> int:
    """Run the calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+", metavar="KERNEL")
    parser.add_argument("--shapes", type=options.shapes, default=list(SHAPES[:2]), metavar="k/d/n,...")
    parser.add_argument("--tokens", type=options.positive, default=16384)
    args = parser.parse_args()
    for shape, name in itertools.product(args.shapes, args.kernels):
        inputs = inputs_of(shape, args.tokens, "cuda")
        kernel, call = kernel_of(name, inputs), call_of(inputs)
        for watched in (False, True):
            torch.cuda.synchronize()
            if watched:
                torch.cuda.profiler.start()
            kernel.forward(call)
            kernel.backward(call, inputs.grad, WANTED)
            torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(f"{name} {shape} T={args.tokens}: profiled", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
