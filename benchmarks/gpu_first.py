"""The first look at kernels on a GPU: are their numbers right, and does a graph replay them?

    python benchmarks/gpu_first.py KERNEL [--device cuda]

KERNEL is an impl or the path of another build (gpu_kernels.py). Its output and gradients in
bfloat16 are compared with the contract on few tokens of the shapes that are measured later. Then
one forward and backward is captured as a CUDA graph and replayed on other numbers. Stops at the
first failure and returns 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
from gpu_kernels import SHAPES, WANTED, adapter, call_of, kernel_of

from compacter_kernels.accuracy import Oracle
from compacter_kernels.cases import Case, Inputs, Shape
from compacter_kernels.dispatch import IMPLS

TOKENS = (1, 333, 4099)  # less than a tile, several tiles, and more tiles than programs


def inputs_of(shape: Shape, tokens: int, device: str) -> Inputs:
    """The tensors of a case in bfloat16 on the device."""
    return Case.of(shape, tokens, dtype=torch.bfloat16).inputs().map(lambda t: t.to(device))


def agrees(name: str, shape: Shape, tokens: int, device: str) -> bool:
    """Whether the output and all gradients are within the limits of the contract."""
    oracle = Oracle(inputs_of(shape, tokens, device))
    found = oracle.check(adapter(name), impl=name if name in IMPLS else "cuda")
    worst = max(found, key=lambda each: each.error / each.limit)
    holds = all(each.holds for each in found)
    print(f"{'ok  ' if holds else 'FAIL'} {shape} T={tokens}: {worst}", flush=True)
    return holds


def replays(name: str, shape: Shape, tokens: int) -> bool:
    """Whether a graph of a forward and backward gives the bits of an eager one, for a new x."""
    inputs = inputs_of(shape, tokens, "cuda")
    kernel, call = kernel_of(name, inputs), call_of(inputs)

    def both() -> list[torch.Tensor | None]:
        return [kernel.forward(call), *kernel.backward(call, inputs.grad, WANTED)]

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = both()
    inputs.x.copy_(inputs.x.flip(0))
    graph.replay()
    same = all(torch.equal(a, b) for a, b in zip(kept, both(), strict=True) if a is not None and b is not None)
    print(f"{'ok  ' if same else 'FAIL'} {shape} T={tokens}: a graph, replayed", flush=True)
    return same


def main() -> int:
    """Check one kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="cpu: without the graph")
    args = parser.parse_args()
    if not all(agrees(args.kernel, shape, tokens, args.device) for tokens, shape in itertools.product(TOKENS, SHAPES)):
        return 1
    return 0 if args.device == "cpu" or replays(args.kernel, SHAPES[0], TOKENS[-1]) else 1


if __name__ == "__main__":
    sys.exit(main())
