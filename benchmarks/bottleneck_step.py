r"""The plain bottleneck adapter: the fused kernel beside eager and compiled torch.

    python benchmarks/bottleneck_step.py OUT [--rounds 15] [--threads 1]

x + up(act(down(x))) with two nn.Linear in float32 and bfloat16, T tokens. `copy` reads x and writes
as much, and in a step it does so one and a half times. A step is forward and backward. All calls
take turns in one process without page faults (benchmarks/README.md). Writes OUT/bottleneck.json and
OUT/bottleneck.txt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from family_common import Function, cells, forward, main, step, take_turns
from torch import Tensor, nn
from torch.nn import functional as F

import compacter_kernels as ck

CELLS = [
    (width, bottleneck, tokens, dtype)
    for width, bottleneck in ((768, 48), (1024, 64))
    for tokens in (2048, 8192)
    for dtype in (torch.float32, torch.bfloat16)
]


def cell(width: int, bottleneck: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """The times of one cell, in both directions."""
    torch.manual_seed(0)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    down, up = nn.Linear(width, bottleneck, dtype=dtype), nn.Linear(bottleneck, width, dtype=dtype)
    sides = [ck.LinearWeights(linear.weight.t(), linear.bias) for linear in (down, up)]
    target, grad = torch.empty_like(x).detach(), torch.randn_like(x)

    def eager(x: Tensor) -> Tensor:
        y: Tensor = x + up(F.silu(down(x)))
        return y

    def copy() -> Tensor:
        return target.copy_(x.detach())

    def copy_step() -> object:
        copy()
        return target[: tokens // 2].copy_(grad[: tokens // 2])

    torch.compiler.reset()
    compiled = torch.compile(eager)
    functions: dict[str, Function] = {
        "fused": lambda: ck.bottleneck_adapter(x, *sides, residual=x, impl="cpu"),
        "eager": lambda: eager(x),
        "compiled": lambda: compiled(x),
    }
    off = (functions["fused"]() - functions["eager"]()).abs().max().item()
    if not off < (1e-4 if dtype == torch.float32 else 0.1):
        raise SystemExit(f"fused and eager differ by {off}: nothing was timed")
    leaves = [x, *down.parameters(), *up.parameters()]
    forwards: dict[str, Callable[[], object]] = {name: forward(function) for name, function in functions.items()}
    steps: dict[str, Callable[[], object]] = {n: step(function, leaves, grad) for n, function in functions.items()}
    return {
        "cell": f"{width}/{bottleneck}, T={tokens}, {str(dtype).removeprefix('torch.')}",
        "forward": take_turns({**forwards, "copy": copy}, rounds),
        "step": take_turns({**steps, "copy": copy_step}, rounds),
    }


def measure(rounds: int) -> dict[str, Any]:
    """The whole content of the JSON file."""
    found = []
    for sizes in CELLS:
        found.append(cell(*sizes, rounds))
        print(found[-1]["cell"], file=sys.stderr)
    return {"cells": found, "isa": ck.impl.module.MODULE.isa()}


def table(result: dict[str, Any]) -> str:
    """The rows in columns."""
    about = result["machine"]
    lines = [
        f"bottleneck adapter, torch {about['torch']} ({about['torch_cpu_capability']}), kernels {result['isa']}",
        f"{about['cpu']}, {about['threads']} thread",
        f"ms, medians of {result['rounds']} rounds in turns (multiples of fused); * beside other load",
    ]
    for row in result["cells"]:
        lines += ["", row["cell"]]
        for direction in ("forward", "step"):
            found = zip(row[direction], cells(row[direction], "fused"), strict=True)
            lines.append(f"  {direction:<8}" + "".join(f"{f'{name} {text}':<30}" for name, text in found).rstrip())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main("bottleneck", __doc__ or "", measure, table))
