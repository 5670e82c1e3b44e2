"""The gain of computing a frozen layer norm in the adapter's kernel, and not by torch's layer_norm.

    python benchmarks/norm_in_kernel.py OUT [--rounds 60]

Computes norm(adapter(x) + x + residual) and the gradients of x, the residual and all parameters,
with k/d/n = 768/24/4 in float32 and without page faults. The two ways take turns in each round, in
changing order. Writes OUT/norm_in_kernel.json and .txt: medians, and the median and quantiles of
the ratio of the two times of a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import compacter_kernels as ck
from compacter_kernels import machine
from compacter_kernels.bench.cpu import environment
from compacter_kernels.cases import Case, Shape

SHAPE = Shape(768, 24, 4)
TOKENS = (1024, 8192)


def ways(tokens: int) -> dict[str, Callable[[], object]]:
    """The two ways to compute the same output and gradients."""
    case = Case.of(SHAPE, tokens, residual="other").inputs().map(lambda t: t.detach().requires_grad_())
    x, down, up, residual, grad = case.x, case.down, case.up, case.residual, case.grad.detach()
    assert up is not None and residual is not None
    norm = ck.NormWeights(torch.rand(SHAPE.k), torch.randn(SHAPE.k))
    wanted = list(case.tensors().values())

    def in_kernel() -> Tensor:
        return ck.compacter_adapter(x, down, up, residual=(x, residual), norm=norm, impl="cpu")

    def apart() -> Tensor:
        y = ck.compacter_adapter(x, down, up, residual=(x, residual), impl="cpu")
        return F.layer_norm(y, (SHAPE.k,), norm.weight, norm.bias, norm.eps)

    torch.testing.assert_close(in_kernel(), apart(), rtol=1e-4, atol=1e-4)
    return {f.__name__: lambda f=f: torch.autograd.grad(f(), wanted, grad) for f in (in_kernel, apart)}


def seconds(call: Callable[[], object], count: int) -> float:
    """Seconds of one call, as the mean of several."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """A row of the results."""
    calls = ways(tokens)
    count = max(1, round(0.02 / min(seconds(call, 5) for call in calls.values())))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in sorted(calls, reverse=bool(turn % 2)):
            times[name].append(seconds(calls[name], count))
    ratios = [a / b for a, b in zip(times["in_kernel"], times["apart"], strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=5)
    medians = {f"{name}_ms": round(1e3 * statistics.median(taken), 3) for name, taken in times.items()}
    return {"tokens": tokens, "rounds": rounds, "calls_in_a_round": count, **medians} | {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_20": round(low, 3),
        "ratio_80": round(high, 3),
    }


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    settings = environment("removed", None)
    if settings != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], settings)
    rows = [measure(tokens, args.rounds) for tokens in TOKENS]
    report = {"machine": machine.describe(), "shape": SHAPE._asdict(), "rows": rows}
    lines = [
        f"{SHAPE}, float32, forward and backward, {torch.get_num_threads()} threads; the norm in the kernel over apart"
    ]
    for row in rows:
        times = f"{row['in_kernel_ms']:.3f} ms in the kernel, {row['apart_ms']:.3f} ms apart"
        lines.append(
            f"T = {row['tokens']}: {row['ratio']:.2f} ({row['ratio_20']:.2f} to {row['ratio_80']:.2f}); {times}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "norm_in_kernel.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "norm_in_kernel.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
