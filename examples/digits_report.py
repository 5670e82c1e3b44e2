"""The results of the digits demonstration: a table, CSV, JSON, and a picture of the loss curves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

import train_common
from digits_data import Task
from digits_methods import FROZEN_BASE, FUSED, METHODS, REFERENCE
from digits_training import BATCH

AGREEMENT_STEPS, AGREEMENT_LIMIT = 100, 1e-4
HEADER = ("method", "impl", "accuracy %", "trained", "% of all", "rate", "ms/step", "x base", "saved KiB")
NOTES = """\
frozen base: forward, and backward through the frozen network to its input, the head trained; no adapter costs less
x base: median over rounds that take one step of each method in turn
saved: kept from forward for backward, each storage once, parameters left out"""
SMOOTHING = 5  # steps
TITLES = {method.name: method.title for method in (FROZEN_BASE, *METHODS.values())}

Row = dict[str, Any]  # a method, its accuracy on the test split and its cost
Curves = dict[str, list[list[float]]]  # the losses of each method, [seed][step]


def differences(losses: Curves, steps: int | None = None) -> torch.Tensor:
    """The distance of the losses of both Compacter runs, (seeds, at most `steps`)."""
    reference, fused = (torch.tensor(losses[name], dtype=torch.float64)[:, :steps] for name in (REFERENCE, FUSED))
    return (reference - fused).abs()


def agreement(losses: Curves, impl: str | None) -> Row | None:
    """Whether both Compacter runs gave the same loss curve; None unless both were asked for."""
    if not {REFERENCE, FUSED} <= losses.keys():
        return None
    apart = differences(losses, AGREEMENT_STEPS)
    largest = apart.max()
    return {
        "impl": impl,
        "steps": apart.shape[1],
        "max_loss_difference": largest.item() if largest.isfinite() else None,
        "limit": AGREEMENT_LIMIT,
        "holds": bool(largest <= AGREEMENT_LIMIT),  # False for NaN
    }


def write(document: Row, losses: Curves, folder: Path) -> None:
    """Write train.csv (the table), losses.csv (the loss of every step) and train.json."""
    rows = [{name: value for name, value in row.items() if name != "accuracies"} for row in document["methods"]]
    train_common.write_csv(rows, folder / "train.csv")
    steps = [
        {"method": method, "seed": seed, "step": step, "loss": loss}
        for method, curves in losses.items()
        for seed, curve in enumerate(curves)
        for step, loss in enumerate(curve)
    ]
    train_common.write_csv(steps, folder / "losses.csv")
    train_common.write_json(document, folder / "train.json")


def _cells(row: Row) -> tuple[str, ...]:
    accuracy = "" if row["accuracy_mean"] is None else f"{row['accuracy_mean']:.2f}"
    if row["accuracy_std"] is not None:
        accuracy += f" ± {row['accuracy_std']:.2f}"
    return (
        TITLES[row["method"]],
        row["impl"] or "",
        accuracy,
        f"{row['trainable_parameters']:,}",
        f"{row['trainable_percent']:.2f}",
        "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
        f"{row['step_ms']:.2f}",
        f"{row['step_ratio']:.2f}",
        f"{row['saved_bytes'] / 1024:,.0f}",
    )


def text(document: Row, pretraining: Task, task: Task) -> str:
    """The data, the settings, the table, and whether the two Compacter runs agree."""
    settings, threads, validation = document["settings"], document["machine"]["threads"], len(task.validation.labels)
    chosen = f"chosen on {validation}" if settings["search"] else f"fixed, {validation} unused"
    seeds = "1 seed" if settings["seeds"] == 1 else f"{settings['seeds']} seeds (mean ± standard deviation)"
    heading = (
        f"pretrained on digits {_span(pretraining)}: {document['pretrained_accuracy']:.1f} % of "
        f"{len(pretraining.test.labels)} held-out images right\n"
        f"adapted to digits {_span(task)}: {settings['steps']} steps of {BATCH} out of {len(task.train.labels)} "
        f"images, learning rates {chosen}, accuracy on {len(task.test.labels)} others\n"
        f"{seeds}, {threads} {'thread' if threads == 1 else 'threads'}"
    )
    table = train_common.table(HEADER, map(_cells, document["methods"]), left=2)
    return f"{heading}\n\n{table}\n{_verdict(document['agreement'])}\n{NOTES}"


def _span(task: Task) -> str:
    return f"{task.digits[0]} to {task.digits[-1]}"


def _verdict(agreement: Row | None) -> str:
    if agreement is None:
        return "loss curves not compared: that takes the methods compacter-dense and compacter"
    difference = agreement["max_loss_difference"]
    return (
        f"Compacter through dense and through {agreement['impl']}, same seeds: the loss curves are "
        f"{'the same' if agreement['holds'] else 'NOT THE SAME'}, at most "
        f"{'nan' if difference is None else format(difference, '.1e')} apart in the first "
        f"{agreement['steps']} steps (limit {AGREEMENT_LIMIT:.0e})"
    )


def missing() -> str | None:
    """Why no picture can be drawn, and the remedy; None if one can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot will be drawn, since matplotlib is not installed: pip install matplotlib, or pass --no-plot"
    return None


def draw(document: Row, losses: Curves, path: Path) -> None:
    """Write a PNG: the loss of every method, and the distance of the two Compacter runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    impls = {row["method"]: row["impl"] for row in document["methods"]}
    for name, curves in losses.items():
        label = TITLES[name] if impls[name] in (None, "dense") else f"{TITLES[name]} ({impls[name]})"
        dashed = name == FUSED and REFERENCE in losses  # its curve covers the reference's
        left.plot(_smooth(curves).tolist(), "k--" if dashed else "-", linewidth=1.2 if dashed else 2, label=label)
    left.set(yscale="log", xlabel="step", ylabel=f"training loss, mean of seeds and {SMOOTHING} steps")
    left.set_title("digits 5 to 9 after pretraining on 0 to 4")
    left.legend(fontsize=8)
    if document["agreement"] is None:
        right.set_axis_off()
    else:
        limit = f"limit of the first {document['agreement']['steps']} steps"
        right.plot(differences(losses).amax(0).clamp(min=1e-9).tolist(), "k", linewidth=1)
        right.axhline(AGREEMENT_LIMIT, color="tab:red", linestyle=":", label=limit)
        right.set(yscale="log", xlabel="step", ylabel="largest difference of the loss")
        right.set_title(f"Compacter, dense against {document['agreement']['impl']}")
        right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _smooth(curves: list[list[float]]) -> torch.Tensor:
    """The mean loss over the seeds, each step averaged with those before it."""
    mean = torch.tensor(curves, dtype=torch.float64).mean(0)
    total = torch.cat([mean.new_zeros(1), mean.cumsum(0)])
    ends = torch.arange(1, len(mean) + 1)
    starts = (ends - SMOOTHING).clamp(min=0)
    return (total[ends] - total[starts]) / (ends - starts)
