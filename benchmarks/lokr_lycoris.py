r"""LoKr of lycoris and of peft, as shipped and under ck.patch, in one run on the CPU.

    python benchmarks/lokr_lycoris.py OUT [--rounds 15] [--starts 3]

A layer is a frozen linear one in float32 with LoKr, on 1024 tokens; all variants have the same
weights. Each round takes one sample of each variant, after one call that is not timed. A sample is
the CPU time of the process, which has one thread, so that other load disturbs it little. Page
faults are removed as in `compacter-kernels bench`. Nothing is timed unless output and gradients
agree with those of peft.

The first call is the first forward and backward of a layer in a new process, after all imports, in
seconds of the clock. The median of several processes is given.

The kernels of lycoris (Triton, TileLang) take tensors on a GPU alone. On a CPU it takes plain
torch, and torch.compile if LYCORIS_KERNEL_BACKEND=compile asks for it, which only the first call
measures. The script prints what it chose.

Writes OUT/lokr_lycoris.json and OUT/lokr_lycoris.txt. Needs peft and lycoris-lora 4.1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from disagreement import disagreement
from lycoris.kernels.select import choose
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels import machine
from compacter_kernels.bench.cpu import environment
from compacter_kernels.bench.timer import quantiles

WIDTH, TOKENS, TOLERANCE = 1024, 1024, 1e-4
SETUPS = {"w2 of rank 8": {"r": 8}, "whole w2": {"r": 4096}}  # so high a rank makes peft take w2 whole
VARIANTS = {
    "base": "without LoKr",
    "peft": "peft as shipped",
    "lycoris": "lycoris as shipped",
    "bypass": "lycoris, bypass_mode",
    "compiled": "lycoris, bypass_mode, its backend compile",
    "peft patched": "peft, patched",
    "lycoris patched": "lycoris, patched",
}
BACKEND = "LYCORIS_KERNEL_BACKEND"


class Layer:
    """A layer with LoKr whose weights are those of peft's start from the same seed."""

    def __init__(self, setup: str, variant: str) -> None:
        torch.manual_seed(0)
        linear, self.variant = nn.Linear(WIDTH, WIDTH).requires_grad_(False), variant
        config = peft.LoKrConfig(target_modules=["0"], init_weights=False, alpha=1, **SETUPS[setup])
        self.model: Any = peft.get_peft_model(nn.Sequential(linear), config)
        self.wanted = [p for p in self.model.parameters() if p.requires_grad]
        if variant == "base":
            self.model, self.wanted = linear, []
        elif variant.startswith(("lycoris", "bypass", "compiled")):
            self._as_lycoris(linear, bypass=variant in ("bypass", "compiled"))
        if variant.endswith("patched"):
            assert len(ck.patch(self.model).patched) == 1
        torch.manual_seed(1)
        self.x = torch.randn(TOKENS, WIDTH, requires_grad=True)
        self.grad = torch.randn(TOKENS, WIDTH)

    def _as_lycoris(self, linear: nn.Module, bypass: bool) -> None:
        layer = self.model.base_model.model[0]
        whole = "default" in layer.lokr_w2
        options = {"lora_dim": 8, "alpha": 1, "full_matrix": whole, "bypass_mode": bypass}
        self.lokr, self.model = LokrModule("lokr", linear, **options), linear
        self.lokr.scale = layer.scaling["default"]
        self.lokr.apply_to()
        for name, parameter in self.lokr.named_parameters():
            parameter.data.copy_(getattr(layer, name)["default"].data)
        self.wanted = list(self.lokr.parameters())

    def forward(self) -> Tensor:
        """The output, without a graph."""
        with torch.no_grad():
            y: Tensor = self.model(self.x)
        return y

    def outcome(self) -> list[Tensor]:
        """The output and the gradients of x and of what LoKr trains."""
        os.environ[BACKEND] = "compile" if self.variant == "compiled" else "auto"
        y = self.model(self.x)
        return [y.detach(), *torch.autograd.grad(y, [self.x, *self.wanted], self.grad)]


def measure(setup: str, rounds: int) -> dict[str, Any]:
    """The CPU times of the variants in turns, as milliseconds: the 20 %, 50 % and 80 % quantile."""
    layers = {variant: Layer(setup, variant) for variant in VARIANTS if variant != "compiled"}
    expected = layers["peft"].outcome()
    for variant, layer in layers.items():
        error = disagreement(expected, layer.outcome()) if variant != "base" else 0.0
        if error > TOLERANCE:
            raise SystemExit(f"{setup}: {variant} and peft differ by {error:.1e}: nothing was timed")
    rows: dict[str, Any] = {variant: {} for variant in layers}
    for what in ("forward", "outcome"):
        samples: dict[str, list[float]] = {variant: [] for variant in layers}
        for _ in range(rounds):
            for variant, layer in layers.items():
                call = getattr(layer, what)
                call()
                start = time.process_time()
                call()
                samples[variant].append(time.process_time() - start)
        for variant, seconds in samples.items():
            rows[variant][what] = [1e3 * quantile for quantile in quantiles(seconds)]
    return {"setup": setup, "rows": rows}


def first(variant: str) -> float:
    """The seconds of the first forward and backward in this process."""
    layer = Layer(next(iter(SETUPS)), variant)
    start = time.perf_counter()
    layer.outcome()
    return time.perf_counter() - start


def first_calls(starts: int) -> dict[str, list[float]]:
    """The seconds of the first step of the first layer in new processes, in turns."""
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS if variant != "base"}
    for _ in range(starts):
        for variant in found:
            with_cold_cache = {**environment("removed", 1), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
            command = [sys.executable, __file__, "--first", variant]
            done = subprocess.run(command, env=with_cold_cache, capture_output=True, text=True, check=True)
            found[variant].append(float(done.stdout.split()[-1]))
    return found


def table(result: dict[str, Any]) -> str:
    """The rows in columns."""
    about, versions = result["machine"], result["versions"]
    lines = [
        f"LoKr of lycoris-lora {versions['lycoris-lora']} and peft {versions['peft']}, torch {about['torch']}, float32",
        f"{about['cpu']}, {about['torch_cpu_capability']}, {about['threads']} thread",
        f"{WIDTH} x {WIDTH}, {TOKENS} tokens, base product included; CPU time in ms, median (20 % to 80 % quantile) of",
        f"{result['rounds']} rounds in turns; share: the time beyond that of the base, over that of the last line",
        f"on a CPU, lycoris chose {result['chosen']}; its own kernels take tensors on a GPU alone",
    ]
    for line in result["layers"]:
        rows = line["rows"]
        heads = ("forward", "share", "forward+backward", "share")
        lines += ["", f"{line['setup']:<44}" + "".join(f"{head:>25}" for head in heads)]
        for variant, row in rows.items():
            cells = []
            for what in ("forward", "outcome"):
                low, middle, high = row[what]
                base, ours = (rows[name][what][1] for name in ("base", list(rows)[-1]))
                cells.append(f"{middle:.1f} ({low:.1f} to {high:.1f})")
                cells.append(f"{(middle - base) / (ours - base):.1f}" if variant != "base" else "")
            lines.append(f"{VARIANTS[variant]:<44}" + "".join(f"{cell:>25}" for cell in cells))
    lines += ["", f"first forward and backward of a new process, {next(iter(SETUPS))}, by the clock,"]
    lines.append(f"beside other load; median of {result['starts']} processes (least to most), in ms")
    for variant, seconds in result["first"].items():
        middle, low, high = (1e3 * f(seconds) for f in (statistics.median, min, max))
        lines.append(f"{VARIANTS[variant]:<44}{middle:>8.0f} ({low:.0f} to {high:.0f})")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and write, or print the time of a first call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--first", choices=VARIANTS)
    args = parser.parse_args()
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if args.first:
        print(first(args.first))
        return 0
    settings = environment("removed", 1)
    if settings != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], settings)
    result = {
        "tokens": TOKENS, "rounds": args.rounds, "chosen": choose([torch.zeros(1)]), "first": first_calls(args.starts),
        "starts": args.starts,
        "layers": [measure(setup, args.rounds) for setup in SETUPS],
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("lycoris-lora", "peft")},
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "lokr_lycoris.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "lokr_lycoris.txt").write_text(table(result), encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
