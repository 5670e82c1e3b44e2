"""Two revisions of the cpu kernels under one instruction set, beside a copy and a matrix product.

    python benchmarks/instruction_set.py OUT BEFORE AFTER [--isa avx2] [--threads 2] [--rounds 30]

BEFORE and AFTER are checkouts with their native parts built. Each is imported by a process of its
own, in which torch and its libraries are limited to the same set (tests/instruction_sets.py). In
every round each process times each row once, and the two take turns. Page faults are removed
(benchmarks/README.md). A sample is the wall time of a call; with `--threads 1` it is the CPU time
of the process, which a busy neighbour disturbs less. The tables show lower quartiles, and the load
of the machine, which should be near the number of threads. With several threads the process that
starts second may be faster, so run BEFORE and AFTER in both orders.

Writes OUT/ISA.json and OUT/ISA.txt.
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

from turns import Server, serve

SHAPES = (  # hidden width, bottleneck, phm_dim, tokens, dtype of x
    (768, 24, 4, 2048, "float32"),
    (768, 24, 4, 8192, "float32"),
    (1024, 64, 8, 2048, "float32"),
    (4096, 128, 8, 2048, "float32"),
    (768, 48, 12, 2048, "float32"),
    (768, 24, 4, 8192, "bfloat16"),
)
LIMITS = {  # ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_CBWR; None: without a limit
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512bf16": None,
}
SIDE = 1024  # of the matrix product


def title(k: int, d: int, n: int, tokens: int, dtype: str) -> str:
    """The name of a shape."""
    return f"{k}/{d}/{n} T={tokens} {dtype}"


def rows_of(k: int, d: int, n: int, tokens: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """The calls of one shape."""
    import torch

    import compacter_kernels as ck

    torch.manual_seed(0)
    adapter = ck.CompacterAdapter(k, reduction_factor=k // d, phm_dim=n)
    down, up = adapter.down.weights(), adapter.up.weights()
    frozen = [w.map(torch.Tensor.detach) for w in (down, up)]
    x, grad = (torch.randn(tokens, k, dtype=getattr(torch, dtype)) for _ in range(2))
    leaf = x.clone().requires_grad_()
    wanted = [leaf, *(t for w in (down, up) for t in w if t is not None)]

    def both(impl: str) -> Any:
        return torch.autograd.grad(ck.compacter_adapter(leaf, down, up, residual=leaf, impl=impl), wanted, grad)

    return {
        "copy": x.clone,
        "forward": lambda: ck.compacter_adapter(x, *frozen, residual=x, impl="cpu"),
        "forward+backward": lambda: both("cpu"),
        "dense forward+backward": lambda: both("dense"),
    }


def answer(threads: int) -> None:
    """Serve the rows of all shapes."""
    import torch

    torch.set_num_threads(threads)
    a, b, c = (torch.randn(SIDE, SIDE) for _ in range(3))
    calls: dict[str, Callable[[], Any]] = {"sgemm": lambda: torch.mm(a, b, out=c)}
    for shape in SHAPES:
        calls |= {f"{title(*shape)} {name}": call for name, call in rows_of(*shape).items()}
    serve(calls, time.process_time if threads == 1 else time.perf_counter)


def limited(isa: str) -> dict[str, str]:
    """The environment in which torch, its libraries and the cpu kernels use that set."""
    names, limits = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"), LIMITS[isa]
    return {"COMPACTER_KERNELS_ISA": isa, **(dict(zip(names, limits, strict=True)) if limits else {})}


def measure(servers: list[Server], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """The samples (before, after) of each row."""
    kinds = ("copy", "forward", "forward+backward", "dense forward+backward")
    names = ["sgemm", *(f"{title(*shape)} {kind}" for shape in SHAPES for kind in kinds)]
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for turn in range(rounds):
        for number, name in enumerate(names):
            if name.startswith(tuple(title(*s) for s in SHAPES)) and "dense" in name and turn % 4:
                continue  # long, and the same in both revisions
            for side in (0, 1) if (turn + number) % 2 else (1, 0):
                samples[name][side].append(servers[side].ask(name))
        print(f"\rround {turn + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    return samples


def table(samples: dict[str, tuple[list[float], list[float]]]) -> list[dict[str, Any]]:
    """For each shape: microseconds, and what they are of a copy, of sgemm's rate and of dense."""

    def low(name: str, side: int | None = None) -> float:
        of = samples[name][0] + samples[name][1] if side is None else samples[name][side]
        return statistics.quantiles(of, n=4, method="inclusive")[0]

    rate = 2 * SIDE**3 / low("sgemm")
    result = []
    for shape in SHAPES:
        k, d, n, tokens, _ = shape
        name = title(*shape)
        copy, dense = low(f"{name} copy"), low(f"{name} dense forward+backward")
        row: dict[str, Any] = {"shape": name, "copy_us": copy, "dense_us": dense, "sgemm_gflops": rate / 1e3}
        for side, when in enumerate(("before", "after")):
            forward, both = low(f"{name} forward", side), low(f"{name} forward+backward", side)
            row[when] = {
                "forward_us": forward,
                "forward+backward_us": both,
                "forward, share of sgemm": (4 * k * n + 4 * d * n + 4 * n**3) * tokens / forward / rate,
                "forward / copy": forward / copy,
                "forward+backward / copy": both / copy,
                "dense / forward+backward": dense / both,
            }
        for kind in ("forward", "forward+backward"):
            pairs = zip(*samples[f"{name} {kind}"], strict=True)
            row[f"{kind}, after / before"] = statistics.median(after / before for before, after in pairs)
        result.append(row)
    return result


def text_of(rows: list[dict[str, Any]]) -> str:
    """The table as text, before and after in each cell."""
    heads = ("forward, share of sgemm", "forward / copy", "forward+backward / copy", "dense / forward+backward")
    lines = [f"{'k/d/phm_dim':<32}" + "".join(f"{head:>26}" for head in heads) + f"{'after / before':>16}"]
    for row in rows:
        cells = (f"{row['before'][head]:.2f} -> {row['after'][head]:.2f}" for head in heads)
        ratios = f"{row['forward, after / before']:.2f} {row['forward+backward, after / before']:.2f}"
        lines.append(f"{row['shape']:<32}" + "".join(f"{cell:>26}" for cell in cells) + f"{ratios:>16}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--isa", choices=LIMITS, default="avx2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    revisions = (args.before, args.after)
    servers = [Server(__file__, checkout.resolve(), args.threads, limited(args.isa)) for checkout in revisions]
    rows = table(measure(servers, args.rounds))
    from compacter_kernels import machine

    about = machine.describe()
    head = (
        f"{about['cpu']}, {args.isa}, torch {about['torch']}; page faults removed, {args.rounds} rounds in turns, "
        f"{args.threads} threads, sgemm {rows[0]['sgemm_gflops']:.0f} GFLOP/s; "
        f"{'CPU time' if args.threads == 1 else 'wall time'}, before -> after; "
        f"the last column is forward, forward+backward; load average {os.getloadavg()[0]:.1f}\n\n"
    )
    text = head + text_of(rows)
    document = {"machine": about, "isa": args.isa, "threads": args.threads, "rounds": args.rounds, "rows": rows}
    document["load_average"] = os.getloadavg()[0]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.isa}.txt").write_text(text, encoding="utf-8")
    (args.out / f"{args.isa}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    answer(int(sys.argv[2])) if sys.argv[1:2] == ["--serve"] else main()
