"""The loss curves as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from compacter_kernels.train.experiment import AGREEMENT_LIMIT, Outcome, Result, differences
from compacter_kernels.train.methods import FUSED, REFERENCE

SMOOTHING = 5  # steps


def missing() -> str | None:
    """Why no picture can be drawn, and what to do about it; None where it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot will be drawn, since matplotlib is not installed: pip install matplotlib, or pass --no-plot"
    return None


def _smooth(result: Result) -> torch.Tensor:
    """The mean loss over the seeds, each step averaged with those before it."""
    mean = torch.tensor(result.losses, dtype=torch.float64).mean(0)
    total = torch.cat([mean.new_zeros(1), mean.cumsum(0)])
    ends = torch.arange(1, len(mean) + 1)
    starts = (ends - SMOOTHING).clamp(min=0)
    return (total[ends] - total[starts]) / (ends - starts)


def draw(outcome: Outcome, path: Path) -> None:
    """Write a PNG: the loss of every method, and the difference between Compacter through dense and fused."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    by_name = {result.method.name: result for result in outcome.results}
    for name, result in by_name.items():
        label = result.method.title if result.impl in (None, "dense") else f"{result.method.title} ({result.impl})"
        dashed = name == FUSED and REFERENCE in by_name  # it lies on the reference
        left.plot(_smooth(result).tolist(), "k--" if dashed else "-", linewidth=1.2 if dashed else 2, label=label)
    left.set(yscale="log", xlabel="step", ylabel=f"training loss, mean of seeds and {SMOOTHING} steps")
    left.set_title("digits 5 to 9 after pretraining on 0 to 4")
    left.legend(fontsize=8)
    if outcome.agreement is not None:
        apart = differences(by_name[REFERENCE], by_name[FUSED], steps=len(by_name[FUSED].losses[0])).amax(0)
        right.plot(apart.clamp(min=1e-9).tolist(), "k", linewidth=1)
        right.axhline(
            AGREEMENT_LIMIT, color="tab:red", linestyle=":", label=f"limit of the first {outcome.agreement.steps} steps"
        )
        right.set(yscale="log", xlabel="step", ylabel="largest difference of the loss")
        right.set_title(f"Compacter, dense against {outcome.agreement.impl}")
        right.legend(fontsize=8)
    else:
        right.set_axis_off()
    figure.savefig(path, dpi=120)
