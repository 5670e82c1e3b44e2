"""What benchmarks of steps in one process share: calls, turns, and the files."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compacter_kernels import machine
from compacter_kernels.bench.cpu import Timing, environment, interleave

Function = Callable[[], Tensor]


def step(function: Function, leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """The forward and backward of a function."""

    def run() -> object:
        return torch.autograd.grad(function(), leaves, grad)

    return run


def forward(function: Function) -> Callable[[], object]:
    """The forward of a function, without a gradient."""

    def run() -> object:
        with torch.no_grad():
            return function()

    return run


def take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, Any]]:
    """The times of the calls in rotating order: medians and quantiles in ms, by name."""
    timings = {name: Timing(call) for name, call in calls.items()}
    threads = torch.get_num_threads()
    interleave(list(timings.values()), rounds, 0.0, threads, os.cpu_count() or threads)
    rows = {}
    for name, timing in timings.items():
        low, median, high = (1e3 * seconds for seconds in timing.quantiles())
        rows[name] = {"ms": median, "ms_q20": low, "ms_q80": high, **timing.columns()}
    return rows


def cells(rows: dict[str, dict[str, Any]], first: str) -> list[str]:
    """Each time in ms and as a multiple of that of the first; * where other load disturbed it."""
    unit = rows[first]["ms"]
    return [f"{row['ms']:.3f} ({row['ms'] / unit:.2f}){'' if row['quiet'] else '*'}" for row in rows.values()]


def main(name: str, about: str, measure: Callable[[int], dict[str, Any]], table: Callable[[Any], str]) -> int:
    """Measure, and write OUT/NAME.json and OUT/NAME.txt."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    settings = environment("removed", args.threads)
    if settings != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], settings)
    torch.set_num_threads(args.threads)
    result = {"rounds": args.rounds, "machine": machine.describe(), **measure(args.rounds)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / f"{name}.txt").write_text(table(result), encoding="utf-8")
    print(table(result))
    return 0
