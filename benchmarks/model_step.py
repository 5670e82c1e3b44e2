r"""A training step of a whole transformer: the time and memory that adapters add to it.

    python benchmarks/model_step.py OUT [--model bert-base|t5-base] [--device cuda] \
        [--dtype bfloat16] [--batch 32]

The model has its real size, random weights and random tokens. AdamW updates the parameters that
train. Each variant has its own process, since `ck.patch` changes the library for a whole process.
Each round takes one step of each variant, in rotating order. The time of a variant is the lower
quartile of its steps, since other load only makes a step longer.

The *share* of a variant is its time minus that of the bare model, with the 10 and 90 % quantiles
over 2000 bootstrap draws of the rounds. The bare model is frozen, and its gradient goes back as far
as the first adapter. Nothing is timed unless the logits and gradients of the patched model agree
with those of the model that `adapters` ships.

On the CPU page faults are removed, as in `compacter-kernels bench` (benchmarks/README.md), threads
are bound to cores, and a step is repeated if other load ran beside it. The peak memory is that of a
new process that keeps page faults.

Writes OUT/model_step_MODEL.json and .txt. Needs transformers 4.57 and adapters 1.3.0.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import adapters
import model_variants
import torch
import transformers
from disagreement import disagreement
from model_variants import LENGTH, MODELS, VARIANTS

from compacter_kernels import machine
from compacter_kernels.bench.cpu import environment

DRAWS = 2000
BOUND = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}  # otherwise both threads may share a core for a while
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}


class Variant:
    """A process with one variant of the model."""

    def __init__(self, variant: str, setting: tuple[str, ...]) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        name, *rest = setting
        self.process = multiprocessing.get_context("spawn").Process(
            target=model_variants.serve, args=(theirs, name, variant, *rest), daemon=True
        )
        self.process.start()
        theirs.close()
        self.answer()

    def answer(self) -> Any:
        """The next message of the process. Raises RuntimeError if the process has ended."""
        connection: Connection = self.connection
        try:
            return connection.recv()
        except EOFError:
            raise RuntimeError("the process of a variant ended; its message is above") from None

    def ask(self, method: str) -> Any:
        """The result of that method of the process's `Step`."""
        self.connection.send(method)
        return self.answer()


def finish(variants: dict[str, Variant]) -> None:
    """End the processes."""
    for variant in variants.values():
        variant.connection.send(None)
        variant.process.join()


def peak_memory(variant: str, setting: tuple[str, ...]) -> int:
    """The peak memory of a new process that takes three steps, in bytes."""
    name, *rest = setting
    done = subprocess.run(
        [sys.executable, model_variants.__file__, name, variant, *rest],
        env=environment("kept", None), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def quartile(seconds: list[float]) -> float:
    """The lower quartile."""
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def share(seconds: list[float], bare: list[float]) -> dict[str, float]:
    """The time that a variant adds to the bare step in ms, with its quantiles."""
    draw = random.Random(0)
    found = []
    for _ in range(DRAWS):
        rounds = draw.choices(range(len(bare)), k=len(bare))
        found.append(quartile([seconds[r] for r in rounds]) - quartile([bare[r] for r in rounds]))
    low, *_, high = statistics.quantiles(found, n=10)
    return {
        "step_ms": 1e3 * quartile(seconds),
        "share_ms": 1e3 * (quartile(seconds) - quartile(bare)),
        "share_ms_10": 1e3 * low,
        "share_ms_90": 1e3 * high,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole content of the JSON file."""
    setting = (args.model, args.device, args.dtype, str(args.batch))
    order = [name for name in VARIANTS if args.only is None or name in ("bare", *args.only)]
    variants = {name: Variant(name, setting) for name in order}
    error = None
    if {"adapters", "patched"} <= set(order):
        error = disagreement(*(variants[name].ask("outcome") for name in ("adapters", "patched")))
        if error > TOLERANCE[args.dtype]:
            finish(variants)
            raise SystemExit(f"patched and shipped differ by {error:.1e}: nothing was timed")
    rows = {name: {"what": VARIANTS[name][0], **variants[name].ask("facts")} for name in order}
    for variant in variants.values():
        variant.ask("once")
    seconds: dict[str, list[float]] = {name: [] for name in order}
    disturbed = 0
    for turn in range(args.rounds):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            taken, quiet = variants[name].ask("undisturbed")
            seconds[name].append(taken)
            disturbed += not quiet
        print(f"\rround {turn + 1} of {args.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    finish(variants)
    for name, row in rows.items():
        row |= share(seconds[name], seconds["bare"])
        row |= {"peak_bytes": peak_memory(name, setting), "seconds": seconds[name]}
    return {
        "model": args.model, "batch": args.batch, "length": LENGTH, "dtype": args.dtype, "device": args.device,
        "rounds": args.rounds, "disturbed_steps": disturbed, "disagreement": error, "rows": rows,
        "machine": machine.describe(),
        "versions": {"transformers": transformers.__version__, "adapters": adapters.__version__},
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The rows in columns."""
    rows = result["rows"]
    own = rows.get("adapters", {}).get("share_ms")
    beside = result["disturbed_steps"]
    size = f"batch {result['batch']} x {result['length']}, {result['dtype']}, {result['device']}"
    heads = ("step ms", "share ms", "10 %", "90 %", "of adapters", "saved MiB", "peak MiB", "trained")
    lines = [
        f"{result['model']}, {size}, lower quartiles of {result['rounds']} rounds, {beside} steps beside other load",
        f"{'':<42}" + "".join(f"{head:>12}" for head in heads),
    ]
    for row in rows.values():
        times = [f"{row[key]:.1f}" for key in ("step_ms", "share_ms", "share_ms_10", "share_ms_90")]
        memory = [f"{row[key] / 2**20:.0f}" for key in ("saved_bytes", "peak_bytes")]
        cells = [*times, f"{row['share_ms'] / own:.2f}" if own else "-", *memory, f"{row['trained']:,}"]
        lines.append(f"{row['what']:<42}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out")
    add("--model", choices=MODELS, default="bert-base")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=TOLERANCE, default="float32")
    add("--batch", type=int, default=8)
    add("--rounds", type=int, default=40)
    add("--only", nargs="+", choices=VARIANTS)
    args = parser.parse_args()
    os.environ |= environment("removed", torch.get_num_threads()) | BOUND  # for the processes of the variants
    result = measure(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"model_step_{args.model}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"model_step_{args.model}.txt").write_text(table(result) + "\n", encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
