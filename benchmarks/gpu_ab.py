"""Forward and backward of several kernels and of the copy, timed in turns on a GPU.

    python benchmarks/gpu_ab.py OUT.json KERNEL... [--shapes 768/24/4,...] [--tokens 16384,65536]

A KERNEL is an impl or the path of another build (gpu_kernels.py). The timer is that of
`bench --device cuda`: replays of CUDA graphs with cold caches, in interleaved rounds. Backward is
the kernel alone, with all gradients; its copy reads x and the gradient and writes dx. x is
bfloat16. OUT.json is written anew after each shape, token count and direction, and OUT.txt beside
it. Returns 1 if a kernel could not be timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import SHAPES, WANTED, call_of, kernel_of

from compacter_kernels import machine, options
from compacter_kernels.bench import cuda
from compacter_kernels.bench.cost import FORWARD
from compacter_kernels.bench.timer import Cell
from compacter_kernels.cases import Inputs

COPY = "copy"
DIRECTIONS = (FORWARD, "backward")
Timed = Callable[[], object]


def timed(name: str, direction: str, first: Inputs) -> Callable[[Inputs], Timed]:
    """The timed call, as a function of inputs like the first ones."""
    if name == COPY:
        return lambda i: i.x.clone if direction == FORWARD else partial(torch.add, i.x, i.grad)
    kernel = kernel_of(name, first)
    if direction == FORWARD:
        return lambda i: partial(kernel.forward, call_of(i))
    return lambda i: partial(kernel.backward, call_of(i), i.grad, WANTED)


def rows(timer: Any, names: list[str], direction: str, rounds: int | None, seconds: float) -> list[dict[str, Any]]:
    """A row for the copy and for each kernel; a kernel that fails has a row with its error."""
    failed = {}
    timer.timings = {}
    for name in (COPY, *names):
        try:
            timer.timings[name] = timer.capture(timed(name, direction, timer.case), FORWARD)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    timer.measure(rounds, seconds)
    found, copy = [], timer.timings[COPY].quantiles()[1]
    for name in (COPY, *names):
        row = {**timer.cell.shape._asdict(), "tokens": timer.cell.tokens, "direction": direction, "kernel": name}
        if name in failed:
            found.append({**row, "error": failed[name]})
            continue
        low, median, high = (1e6 * each for each in timer.timings[name].quantiles())
        row |= {"us": median, "us_q20": low, "us_q80": high, "of_copy": 1e6 * copy / median}
        found.append({**row, **timer.timings[name].columns()})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'shape':<12}{'T':>7}  {'direction':<9} {'us':>9} {'20 %':>9} {'80 %':>9} {'of copy':>8}  kernel"]
    for row in found:
        start = f"{row['k']}/{row['d']}/{row['n']}"
        start = f"{start:<12}{row['tokens']:>7}  {row['direction']:<9}"
        if "error" in row:
            lines.append(f"{start} {row['kernel']}: {row['error']}")
        else:
            times = "".join(f"{row[key]:>10.2f}" for key in ("us", "us_q20", "us_q80"))
            lines.append(f"{start}{times} {row['of_copy']:>7.1%}  {row['kernel']}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Time all kernels on all shapes, the smaller token count first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path)
    add("kernels", nargs="+", metavar="KERNEL")
    add("--shapes", type=options.shapes, default=list(SHAPES), metavar="k/d/n,...")
    add("--tokens", type=options.tokens, default=[16384, 65536], metavar="T,...")
    add("--rounds", type=options.positive, help="default as many as fit into the time")
    add("--limit", type=float, default=120.0, help="seconds for everything, default 120")
    args = parser.parse_args()
    start = time.monotonic()
    cells = [Cell(shape, tokens) for tokens in args.tokens for shape in args.shapes]
    found: dict[str, Any] = {"machine": machine.describe(), **cuda.Timer.describe(), "rows": []}
    for index, cell in enumerate(cells):
        if reason := cuda.Timer.too_large(cell, torch.bfloat16):
            print(f"{cell}: {reason}", flush=True)
            continue
        with torch.no_grad():
            timer = cuda.Timer(cell, torch.bfloat16)
            for direction in DIRECTIONS:
                left = args.limit - (time.monotonic() - start)
                share = left / (2 * (len(cells) - index))
                found["rows"] += (these := rows(timer, args.kernels, direction, args.rounds, share / 2))
                args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                args.out.with_suffix(".txt").write_text(table(found["rows"]), encoding="utf-8")
                print(table(these), end="", flush=True)
        del timer
    return 1 if any("error" in row for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
