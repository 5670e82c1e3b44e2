"""Results as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compacter_kernels.train.text.checkpoint import write_json

_HEADER = ("method", "{metric} %", "loss", "trained", "% of all", "rate", "s/run")


def row(title: str, metric: str, rate: float, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table: a method, over the results of its seeds."""
    values = [100 * result[metric] for result in results]
    first = results[0]
    return {
        "method": title,
        "metric": metric,
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "loss": statistics.mean(result["loss"] for result in results),
        "seeds": len(values),
        "trainable_parameters": first["trainable_parameters"],
        "trainable_percent": 100 * first["trainable_parameters"] / first["parameters"],
        "learning_rate": rate,
        "seconds": statistics.mean(result["seconds"] for result in results),
    }


def _cells(found: dict[str, Any]) -> tuple[str, ...]:
    deviation = "" if found["std"] is None else f" ± {found['std']:.2f}"
    return (
        found["method"],
        f"{found['mean']:.2f}{deviation}",
        f"{found['loss']:.4f}",
        f"{found['trainable_parameters']:,}",
        f"{found['trainable_percent']:.3f}",
        f"{found['learning_rate']:g}",
        f"{found['seconds']:.1f}",
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows under their header."""
    header = tuple(cell.format(metric=rows[0]["metric"]) for cell in _HEADER)
    lines = [header, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text)


def write(rows: Sequence[dict[str, Any]], document: dict[str, Any], text: str, folder: Path) -> None:
    """train.csv, train.txt and train.json."""
    with (folder / "train.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    (folder / "train.txt").write_text(text + "\n", encoding="utf-8")
    write_json(document, folder / "train.json")
