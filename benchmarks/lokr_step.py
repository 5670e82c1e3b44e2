r"""A training step with LoKr of peft, as shipped and under ck.patch: a layer, and a transformer.

    python benchmarks/lokr_step.py OUT [--rounds 15]

The layers have 1024 and 2048 inputs and outputs. A step of a layer is its forward and backward in
float32 on 1024 tokens, with the product of the base. The transformer is `DiTTransformer2DModel` of
diffusers, of the size of DiT-S/2, with random weights. A step of it includes AdamW.

Each round takes one sample of each variant, in rotating order, in one process and on one thread.
Page faults are removed, and samples beside other load are repeated, as in `compacter-kernels bench`
(benchmarks/README.md). Nothing is timed unless output and gradients of the patched model agree with
those of peft. The peak memory is that of a new process, which keeps page faults.

Writes OUT/lokr.json and OUT/lokr.txt. Needs peft, and diffusers (0.36.0 for transformers 4.57).
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import diffusers
import lokr_models
import peft
from disagreement import disagreement
from family_common import main, take_turns
from lokr_models import BATCH, SETUPS, VARIANTS, LayerStep, TransformerStep, calls

from compacter_kernels.bench.cpu import environment

WIDTHS, TOKENS, TOLERANCE = (1024, 2048), 1024, 1e-4


def measure(what: str, steps: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A line of the result: the times of the variants in turns, and what they keep for backward."""
    error = disagreement(steps["shipped"].outcome(), steps["patched"].outcome())
    if error > TOLERANCE:
        raise SystemExit(f"{what}: patched and shipped differ by {error:.1e}: nothing was timed")
    times = take_turns(calls(steps), rounds)
    rows = {name: {"what": VARIANTS[name], **row, "saved_bytes": steps[name].saved()} for name, row in times.items()}
    base, shipped, patched = (rows[name]["ms"] for name in VARIANTS)
    return {
        "what": what, "disagreement": error, "rows": rows,
        "step_ratio": shipped / patched, "share_ratio": (shipped - base) / (patched - base),
    }  # fmt: skip


def peak_memory(variant: str) -> int:
    """The peak memory of a new process that takes three steps of the transformer, in bytes."""
    command = [sys.executable, lokr_models.__file__, variant]
    done = subprocess.run(command, env=environment("kept", 1), capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def report(rounds: int) -> dict[str, Any]:
    """The content of the JSON file, beside what `family_common.main` adds."""
    layers = []
    for width in WIDTHS:
        for setup in SETUPS:
            steps = {variant: LayerStep(width, TOKENS, setup, variant) for variant in VARIANTS}
            layers.append(measure(f"{width} x {width}, {setup}", steps, rounds))
            print(layers[-1]["what"], file=sys.stderr)
    steps = {variant: TransformerStep(variant) for variant in VARIANTS}
    transformer = measure(f"DiT-S/2, w2 of rank 8, {BATCH} pictures", steps, rounds)
    for variant, row in transformer["rows"].items():
        row["trained"] = sum(p.numel() for p in steps[variant].trained)
    del steps
    for variant, row in transformer["rows"].items():
        row["peak_bytes"] = peak_memory(variant)
    return {
        "tokens": TOKENS, "layers": layers, "transformer": transformer,
        "versions": {"peft": peft.__version__, "diffusers": diffusers.__version__},
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The rows in columns."""
    heads = ("base ms", "shipped ms", "patched ms", "shipped/patched", "of the share", "kept MiB", "patched MiB")
    about, versions = result["machine"], result["versions"]
    lines = [
        f"LoKr of peft {versions['peft']}, diffusers {versions['diffusers']}, torch {about['torch']}, float32",
        f"{about['cpu']}, {about['torch_cpu_capability']}, {about['threads']} thread",
        f"medians of {result['rounds']} rounds in turns; layers with {result['tokens']} tokens, base product included",
        "* beside other load: too few samples were undisturbed",
        "",
        f"{'':<42}" + "".join(f"{head:>17}" for head in heads),
    ]
    for line in (*result["layers"], result["transformer"]):
        rows = [line["rows"][name] for name in VARIANTS]
        times = [f"{row['ms']:.1f}" + ("" if row["quiet"] else "*") for row in rows]
        ratios = [f"{line[key]:.2f}" for key in ("step_ratio", "share_ratio")]
        kept = [f"{row['saved_bytes'] / 2**20:.1f}" for row in rows[1:]]
        lines.append(f"{line['what']:<42}" + "".join(f"{cell:>17}" for cell in (*times, *ratios, *kept)))
    lines += ["", "peak memory of a process that takes three steps of the transformer"]
    for row in result["transformer"]["rows"].values():
        lines.append(f"{row['what']:<42}{row['peak_bytes'] / 2**20:>13.0f} MiB, {row['trained']:,} trained")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main("lokr", __doc__ or "", report, table))
