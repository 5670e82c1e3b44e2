r"""Time the Triton kernels over candidate tile configurations on this GPU.

    python benchmarks/tune_triton.py OUT [--shapes 768/24/4,...] [--tokens 16384] \
        [--dtype bfloat16] [--direction both]

The table in config.py is made from the results. A pool of processes compiles each candidate and
checks it against float64 `dense`. Each is then timed as a replayed CUDA graph over so many copies
of x that the L2 cache is cold. Writes one row for each candidate to OUT/tune.csv as it goes. The
printed table has the fastest candidate last. `copy` is a copy that moves as many bytes.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compacter_kernels.calls import AdapterCall
from compacter_kernels.cases import Case, Inputs, Shape
from compacter_kernels.impl.triton.config import Config
from compacter_kernels.options import DTYPES, shapes as parse_shapes, tokens as parse_tokens
from compacter_kernels.problem import adapter_problem

EACH = 2**20  # as many programs as tiles
LIMIT = 0.1  # relative to the largest number; a wrong tile is far above it, and rounding far below


class Candidate(NamedTuple):
    """A configuration of one of the kernels for a shape. The other kernels keep the table's."""

    kernel: str
    config: Config

    @property
    def direction(self) -> str:
        """The direction that is timed."""
        return "forward" if self.kernel.startswith("forward") else "backward"


def grid(kernel: str, *values: tuple[Any, ...]) -> list[Candidate]:
    """All combinations."""
    return [Candidate(kernel, Config(*choice)) for choice in itertools.product(*values)]


def candidates(shape: Shape, dtype: str, direction: str) -> list[Candidate]:
    """All combinations that are useful, for each kernel that serves this shape on this GPU."""
    chunk = min(64, 2 ** (shape.k // shape.n - 1).bit_length())
    half = min(32, chunk)
    wide = (half, chunk, 128) if shape.k // shape.n > 128 else (half, chunk)
    choices = {
        "forward": [
            *grid("forward", (16, 32), (chunk,), (4, 8), (2, 3, 4), (1, 2, 3, 4, 6)),
            *grid("forward", (8, 16), (chunk,), (1, 2), (1, 2), (8, 12)),
            *grid("forward", (16, 32), (chunk,), (4, 8), (0,), (EACH,)),
        ],
        "forward_streamed": grid("forward_streamed", (16, 32), wide, (4, 8), (1, 2, 3, 4), (1, 2, 4)),
        "backward": grid("backward", (16, 32), (chunk,), (4, 8), (1, 2, 3, 4), (1, 2)),
        "tokens": grid("tokens", (16, 32), wide, (4, 8), (1, 2, 3, 4), (1, 2, 4)),
        "columns": grid("columns", (32, 64, 128), wide, (4, 8), (1, 2, 3), (4, 8)),
        "sums": grid("sums", (16, 32), (0,), (4, 8), (1,), (1, 2)),
    }
    served = bound(on_device(shape, 1, dtype)).served
    return [c for kernel in served for c in choices[kernel] if c.direction == direction]


def bound(case: Inputs) -> Any:
    """The kernels of a case."""
    from compacter_kernels.impl.triton.kernel import TritonKernel

    assert case.up is not None
    return TritonKernel(adapter_problem(case.x, case.down, case.up, case.activation))


def bind(case: Inputs, candidate: Candidate) -> Callable[[Any, Any], Any]:
    """The timed call with that configuration, as a function of x and of the gradient."""
    kernel = bound(case)
    served = kernel.served[candidate.kernel]
    kernel.served[candidate.kernel] = served._replace(configs=(candidate.config,))

    def call(x: torch.Tensor) -> AdapterCall:
        assert case.up is not None
        return AdapterCall(x, case.down, case.up, residual=None, add_x=True, scale=1.0)

    if candidate.direction == "forward":
        return lambda x, g: kernel.forward(call(x))
    return lambda x, g: kernel.backward(call(x), g, (True,) * 9)


def on_device(shape: Shape, tokens: int, dtype: str) -> Inputs:
    """The case with all tensors on the GPU."""
    return Case.of(shape, tokens, dtype=DTYPES[dtype]).inputs().map(lambda t: t.cuda())


def compile_one(job: tuple[Shape, str, Candidate]) -> tuple[Any, ...]:
    """Compile the candidate and run it once on few tokens.

    Returns the error relative to the largest number, or None, and a message, which is empty if
    nothing is wrong.
    """
    shape, dtype, candidate = job
    try:
        case = on_device(shape, 100, dtype)
        got = bind(case, candidate)(case.x, case.grad)
        torch.cuda.synchronize()
    except Exception as error:
        return (None, f"{type(error).__name__}: {error}"[:200])
    try:
        expected = reference(case, candidate.direction)
        got = [got] if isinstance(got, torch.Tensor) else list(got)
        error = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True))
        return (error, "" if error <= LIMIT else "wrong")
    except Exception as problem:
        return (None, repr(problem)[:200])


def reference(case: Inputs, direction: str) -> list[torch.Tensor]:
    """The results that the kernel should give, in float64."""
    from compacter_kernels.accuracy import evaluate
    from compacter_kernels.cases import call

    found = evaluate(case.map(lambda t: t.double()), call("dense"), direction == "backward")
    if direction == "forward":
        return [found["out"]]
    return [
        found[name] for name in ("x", *(f"{s}.{f}" for s in ("down", "up") for f in ("rule", "left", "right", "bias")))
    ]


def graph_ms(call: Callable[[int], Any], copies: int, repeats: int = 5) -> float:
    """Milliseconds per call, replayed as one graph that goes through all copies.

    The result is the median of the replays.
    """
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / copies)
    del graph
    return statistics.median(times)


def main() -> int:
    """Compile, check and time every candidate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", type=parse_shapes, default=parse_shapes("768/24/4"))
    parser.add_argument("--tokens", type=parse_tokens, default=[16384])
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--direction", default="both", choices=("both", "forward", "backward"))
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for each shape and direction, to time what compiled"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    directions = ("forward", "backward") if args.direction == "both" else (args.direction,)
    jobs = [
        (shape, args.dtype, candidate)
        for shape in args.shapes
        for direction in directions
        for candidate in candidates(shape, args.dtype, direction)
    ]
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(15, os.cpu_count() or 1), maxtasksperchild=12) as pool:
        results = pool.map(compile_one, jobs, chunksize=1)
    print(f"{len(jobs)} candidates compiled and checked in {time.perf_counter() - start:.0f} s", flush=True)
    header = ["shape", "T", "dtype", "kernel", "config", "error", "note", "us", "copy_us", "of_copy"]
    with (args.out / "tune.csv").open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for shape, direction, tokens in itertools.product(args.shapes, directions, args.tokens):
            rows = time_all(
                shape,
                tokens,
                direction,
                args,
                [(j, r) for j, r in zip(jobs, results, strict=True) if (j[0], j[2].direction) == (shape, direction)],
            )
            writer.writerows(rows)
            file.flush()
            timed = sorted((row for row in rows if row[-3] is not None), key=lambda row: -row[-3])
            print(*(" ".join(map(str, row)) for row in timed[-12:]), sep="\n", flush=True)
            bad = [row for row in rows if row[6]]
            print(
                f"{len(bad)} not usable, e.g.",
                *(f"{row[3:5]} {row[6]}" for row in bad[:: max(1, len(bad) // 4)][:5]),
                sep="\n",
                flush=True,
            )
    return 0


def time_all(shape: Shape, tokens: int, direction: str, args: argparse.Namespace, jobs: list[Any]) -> list[list[Any]]:
    """A row for each candidate of one shape and direction."""
    case = on_device(shape, tokens, args.dtype)
    bytes_each = case.x.numel() * case.x.element_size()
    copies = max(2, -(-3 * torch.cuda.get_device_properties(0).L2_cache_size // bytes_each))
    xs, gs = [case.x.clone() for _ in range(copies)], [case.grad.clone() for _ in range(copies)]
    out = torch.empty_like(case.x)
    if direction == "forward":
        copy = graph_ms(lambda i: out.copy_(xs[i]), copies)
    else:
        copy = graph_ms(lambda i: torch.add(xs[i], gs[i], out=out), copies)
    rows, start = [], time.perf_counter()
    for (_, dtype, candidate), (error, note) in jobs:
        ms = None
        if not note and time.perf_counter() - start < args.seconds:
            try:
                run = bind(case, candidate)
                ms = graph_ms(lambda i, run=run: run(xs[i], gs[i]), copies, 3)
            except Exception as problem:
                note = repr(problem)[:100]
        us = None if ms is None else round(ms * 1e3, 2)
        of_copy = None if ms is None else round(copy / ms, 3)
        row = [shape, tokens, dtype, candidate.kernel, " ".join(map(str, candidate.config)), error, note]
        rows.append([*row, us, round(copy * 1e3, 2), of_copy])
    return rows


if __name__ == "__main__":
    sys.exit(main())
