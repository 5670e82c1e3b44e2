"""How often four estimators resolve the sources of simulated snapshots.

    python examples/direction_of_arrival/estimate_directions.py --out directions

It writes directions.json, and the table as directions.md. README.md says what is simulated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from estimators import alternating, beamformer, capon, music, peaks, steering
from torch import Tensor

SENSORS, BLOCKS = 32, 8
GRID = torch.arange(-30, 30.01, 0.25, dtype=torch.float64)
NEAR = 1.0  # degrees: half of the distance of the two sources that lie closest
METHODS = ("delay and sum", "Capon, RLS", "alternating, RLS", "MUSIC, number known")


class Case(NamedTuple):
    """Sources of equal power in directions in degrees. correlation: that of the first two."""

    directions: tuple[float, ...]
    snapshots: int
    decibels: float
    correlation: float = 0.0


CASES = (
    Case((-1, 1), 8, 5),
    Case((-1, 1), 16, 5),
    Case((-1, 1), 32, 5),
    Case((-1, 1), 16, 0),
    Case((-1, 1), 16, 5, 0.9),
    Case((-20, -1, 1, 12), 16, 5),
)


def simulated(case: Case, generator: torch.Generator) -> Tensor:
    """Snapshots (sensors, snapshots): the sources, and noise of the power 1 at each sensor."""

    def drawn(rows: int) -> Tensor:
        return torch.randn(rows, case.snapshots, generator=generator, dtype=torch.complex128)

    sources = drawn(len(case.directions))
    sources[1] = case.correlation * sources[0] + (1 - case.correlation**2) ** 0.5 * sources[1]
    a = steering(SENSORS, torch.tensor(case.directions))
    return 10 ** (case.decibels / 20) * a.T @ sources + drawn(SENSORS)


def spectra(x: Tensor, sources: int) -> tuple[Tensor, ...]:
    """P on the grid, by each of METHODS."""
    return beamformer(x, GRID), capon(x, GRID), alternating(x, GRID, BLOCKS), music(x, GRID, sources)


def resolved(case: Case, trials: int, seed: int) -> list[float]:
    """The percentage of trials in which every source has its peak within NEAR, for each method."""
    generator, true = torch.Generator().manual_seed(seed), torch.tensor(case.directions, dtype=torch.float64)
    counts = [0] * len(METHODS)
    for _ in range(trials):
        for method, power in enumerate(spectra(simulated(case, generator), len(true))):
            found = peaks(power, GRID, len(true))
            counts[method] += len(found) == len(true) and bool(((found - true).abs() <= NEAR).all())
    return [100 * count / trials for count in counts]


def table(results: Sequence[dict[str, list[list[float]]]]) -> str:
    """Markdown: for each case the mean over the seeds, and their standard deviation."""
    lines = ["| case | " + " | ".join(METHODS) + " |", "|" + "---|" * (len(METHODS) + 1)]
    for case, result in zip(CASES, results, strict=True):
        name = f"{len(case.directions)} sources, {case.snapshots} snapshots, {case.decibels:g} dB"
        name += f", correlation {case.correlation:g}" if case.correlation else ""
        columns = list(zip(*result["resolved"], strict=True))
        cells = [f"{statistics.mean(column):.1f} ± {statistics.stdev(column):.1f}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every case with several seeds; print the table and write directions.json beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="for each case and seed (100)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (3)")
    parser.add_argument("--quick", action="store_true", help="3 trials, 2 seeds")
    parser.add_argument("--out", type=Path, default=Path("directions"), help="the folder of the results (directions)")
    args = parser.parse_args(arguments)
    trials, seeds = (3, 2) if args.quick else (args.trials, args.seeds)
    results = [{"resolved": [resolved(case, trials, seed) for seed in range(seeds)]} for case in CASES]
    text = table(results)
    print(text)
    settings = {"sensors": SENSORS, "blocks": BLOCKS, "trials": trials, "seeds": seeds, "torch": torch.__version__}
    rows = [{**case._asdict(), **result} for case, result in zip(CASES, results, strict=True)]
    args.out.mkdir(parents=True, exist_ok=True)
    document = json.dumps({"settings": settings, "methods": METHODS, "cases": rows}, indent=2)
    (args.out / "directions.json").write_text(document + "\n", encoding="utf-8")
    (args.out / "directions.md").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
