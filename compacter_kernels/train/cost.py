"""What a training step costs: time, side by side with the other methods' steps, and memory kept for backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from torch import nn
from torch.nn import functional as F

from compacter_kernels import saved
from compacter_kernels.train.data import Split
from compacter_kernels.train.loop import Trainer

WARM_UP_ROUNDS = 3


def step_times(
    models: Mapping[str, nn.Module], batch: Split, rounds: int, advance: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Milliseconds of a whole training step of each model, round by round.

    Every round takes one step of each, beginning with another one each time, so that whatever else the machine does
    meets all of them alike. The models are trained in the course of it.
    """
    trainers = {name: Trainer(model, 1e-4) for name, model in models.items()}
    names, times = list(trainers), {name: [] for name in trainers}  # type: tuple[list[str], dict[str, list[float]]]
    for turn in range(WARM_UP_ROUNDS + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            trainers[name].step(batch)
            if turn >= WARM_UP_ROUNDS:
                times[name].append(1e3 * (time.perf_counter() - start))
        advance()
    return times


def ratio(times: list[float], base: list[float]) -> float:
    """The median over the rounds of one model's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def saved_bytes(model: nn.Module, batch: Split) -> int:
    """Bytes that one forward pass keeps for the backward pass, each storage counted once, parameters left out."""
    return saved.saved_bytes(lambda: F.cross_entropy(model(batch.images), batch.labels), model.parameters())
