"""The outcome as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compacter_kernels.train.data import Task
from compacter_kernels.train.experiment import AGREEMENT_LIMIT, Outcome, Result, Settings
from compacter_kernels.train.loop import BATCH

_HEADER = ("method", "impl", "accuracy %", "trained", "% of all", "rate", "ms/step", "x base", "saved KiB")


def record(row: Result) -> dict[str, Any]:
    """One row as CSV and JSON take it; the loss curves are left out."""
    return {
        "method": row.method.name,
        "impl": row.impl,
        "accuracy_mean": row.mean,
        "accuracy_std": row.deviation,
        "seeds": len(row.accuracies),
        "trainable_parameters": row.trainable,
        "trainable_percent": 100 * row.trainable / row.parameters,
        "learning_rate": row.rate,
        "step_ms": row.step_ms,
        "step_ratio": row.step_ratio,
        "saved_bytes": row.saved_bytes,
    }


def records(outcome: Outcome) -> list[dict[str, Any]]:
    """All rows, the frozen base first."""
    return [record(row) for row in (outcome.base, *outcome.results)]


def document(outcome: Outcome, settings: Settings, machine: dict[str, Any]) -> dict[str, Any]:
    """Everything but the loss curves, as JSON takes it."""
    agreement = None
    if outcome.agreement is not None:
        difference = outcome.agreement.difference
        agreement = {
            "impl": outcome.agreement.impl,
            "steps": outcome.agreement.steps,
            "max_loss_difference": difference if math.isfinite(difference) else None,
            "limit": AGREEMENT_LIMIT,
            "holds": outcome.agreement.holds,
        }
    return {
        "machine": machine,
        "settings": asdict(settings),
        "pretrained_accuracy": outcome.pretrained,
        "methods": [{**record(row), "accuracies": row.accuracies} for row in (outcome.base, *outcome.results)],
        "agreement": agreement,
    }


def _cells(row: Result) -> tuple[str, ...]:
    accuracy = "" if row.mean is None else f"{row.mean:.2f}"
    if row.deviation is not None:
        accuracy += f" ± {row.deviation:.2f}"
    return (
        row.method.title,
        row.impl or "",
        accuracy,
        f"{row.trainable:,}",
        f"{100 * row.trainable / row.parameters:.2f}",
        "" if row.rate is None else f"{row.rate:g}",
        f"{row.step_ms:.2f}",
        f"{row.step_ratio:.2f}",
        f"{row.saved_bytes / 1024:,.0f}",
    )


def table(outcome: Outcome) -> str:
    """The rows under their header, and what they mean."""
    lines = [_HEADER, *(_cells(row) for row in (outcome.base, *outcome.results))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        text.append("  ".join(left + right))
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text)


def heading(outcome: Outcome, pretraining: Task, task: Task, settings: Settings, threads: int) -> str:
    """What was trained on what."""
    validation = len(task.validation.labels)
    chosen = (
        f"learning rates chosen on {validation}" if settings.search else f"learning rates fixed, {validation} unused"
    )
    seeds = "1 seed" if settings.seeds == 1 else f"{settings.seeds} seeds (mean ± standard deviation)"
    return (
        f"pretrained on digits {_span(pretraining)}: {outcome.pretrained:.1f} % of {len(pretraining.test.labels)} "
        f"held-out images right\n"
        f"adapted to digits {_span(task)}: {settings.steps} steps of {BATCH} out of {len(task.train.labels)} images, "
        f"{chosen}, accuracy on {len(task.test.labels)} others\n"
        f"{seeds}, {threads} {'thread' if threads == 1 else 'threads'}"
    )


def _span(task: Task) -> str:
    return f"{task.digits[0]} to {task.digits[-1]}"


def verdict(outcome: Outcome) -> str:
    """Whether the two Compacter runs gave the same loss curve."""
    agreement = outcome.agreement
    if agreement is None:
        return "loss curves not compared: that takes the methods compacter-dense and compacter"
    return (
        f"Compacter through dense and through {agreement.impl}, same seeds: the loss curves are "
        f"{'the same' if agreement.holds else 'NOT THE SAME'}, at most {agreement.difference:.1e} apart in the first "
        f"{agreement.steps} steps (limit {AGREEMENT_LIMIT:.0e})"
    )


NOTES = """\
frozen base: forward, and backward through the frozen network to its input, the head trained; no adapter costs less
x base: median over rounds that take one step of each method in turn
saved: kept from forward for backward, each storage once, parameters left out"""


def write(outcome: Outcome, settings: Settings, machine: dict[str, Any], folder: Path) -> None:
    """Write train.csv (the table), losses.csv (every step's loss) and train.json into the folder."""
    rows = records(outcome)
    with (folder / "train.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    with (folder / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        losses = csv.writer(file)
        losses.writerow(("method", "seed", "step", "loss"))
        for row in outcome.results:
            for seed, curve in enumerate(row.losses):
                losses.writerows((row.method.name, seed, step, loss) for step, loss in enumerate(curve))
    text = json.dumps(document(outcome, settings, machine), indent=2)
    (folder / "train.json").write_text(text + "\n", encoding="utf-8")
