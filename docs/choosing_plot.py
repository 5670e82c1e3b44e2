"""Draws docs/choosing.svg from the committed results of sizes_step.py and choose_sizes.py."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "benchmarks" / "results"
BASE = {"phm_dim": 4, "phm_rank": 1, "reduction_factor": 16}
QUANTITIES = ("parameters of one adapter", "time / time of a copy", "error on digits, %")


def rows() -> list[dict[str, Any]]:
    """The rows of both results together, each with the sizes of an adapter."""
    times, errors = (
        json.loads((RESULTS / folder / "sizes.json").read_text(encoding="utf-8"))["rows"]
        for folder in ("xeon-avx512-2core", "choose_sizes")
    )
    of_sizes = {tuple(row[name] for name in BASE): row for row in errors}
    return [{**row, **of_sizes[tuple(row[name] for name in BASE)]} for row in times]


def values(row: dict[str, Any]) -> list[float]:
    """The three quantities of a row."""
    return [row["parameters"], row["over_copy"], statistics.mean(row["errors"])]


def draw(found: list[dict[str, Any]]) -> Figure:
    """One column for each option that varies while the others keep the values of BASE."""
    figure = Figure(figsize=(9.6, 7.2), layout="constrained", facecolor="white")
    panels = figure.subplots(3, 3, sharex="col", sharey="row")
    plain = values(next(row for row in found if row["phm_dim"] is None))
    for column, option in enumerate(BASE):
        others = {name: value for name, value in BASE.items() if name != option}
        chosen = [row for row in found if all(row[name] == value for name, value in others.items())]
        chosen = sorted((row for row in chosen if row["phm_dim"] is not None), key=lambda row: row[option])
        ticks = [row[option] for row in chosen]
        for line, quantity in enumerate(QUANTITIES):
            panel, heights = panels[line][column], [values(row)[line] for row in chosen]
            spread = [statistics.stdev(row["errors"]) for row in chosen] if line == 2 else None
            panel.errorbar(ticks, heights, yerr=spread, marker="o", color="tab:blue", capsize=3, label="Compacter")
            panel.axhline(plain[line], color="tab:gray", linestyle="--", label="plain bottleneck, factor 16")
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, list(map(str, ticks)))
            panel.grid(alpha=0.3)
            if line == 0:
                panel.set_yscale("log")
            if column == 0:
                panel.set_ylabel(quantity)
        panels[2][column].set_xlabel(option)
    panels[0][0].legend(fontsize=8)
    return figure


def main() -> None:
    """Draw the picture; the same result gives the same bytes with the same matplotlib."""
    matplotlib.rcParams.update({"svg.hashsalt": "choosing", "svg.fonttype": "none", "font.family": "sans-serif"})
    about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    draw(rows()).savefig(FOLDER / "choosing.svg", metadata=about)


if __name__ == "__main__":
    main()
