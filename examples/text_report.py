"""The results of training on texts as a table, as CSV and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_common

Row = dict[str, Any]


def row(title: str, metric: str, rate: float, results: Sequence[Row]) -> Row:
    """One line of the table: a method, with the mean over the results of its seeds."""
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


def _cells(line: Row) -> tuple[str, ...]:
    deviation = "" if line["std"] is None else f" ± {line['std']:.2f}"
    return (
        line["method"],
        f"{line['mean']:.2f}{deviation}",
        f"{line['loss']:.4f}",
        f"{line['trainable_parameters']:,}",
        f"{line['trainable_percent']:.3f}",
        f"{line['learning_rate']:g}",
        f"{line['seconds']:.1f}",
    )


def table(rows: Sequence[Row]) -> str:
    """The rows under their header."""
    header = ("method", f"{rows[0]['metric']} %", "loss", "trained", "% of all", "rate", "s/run")
    return train_common.table(header, map(_cells, rows), left=1)


def write(rows: Sequence[Row], document: Row, text: str, folder: Path) -> None:
    """Write train.csv, train.txt and train.json."""
    train_common.write_csv(rows, folder / "train.csv")
    (folder / "train.txt").write_text(text + "\n", encoding="utf-8")
    train_common.write_json(document, folder / "train.json")
