"""The training loop of the digits demonstration in plain PyTorch, and the cost of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compacter_kernels import saved
from digits_data import Split, shifted
from train_common import schedule

BATCH = 16
WARM_UP_ROUNDS = 3
Advance = Callable[[], object]


class Stepper:
    """A model and the optimizer of those parameters that train."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model = model
        self.optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)

    def step(self, batch: Split) -> Tensor:
        """One step on the batch; returns the loss before it, a tensor of one number."""
        loss = F.cross_entropy(self.model(batch.images), batch.labels)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.detach()


def batches(split: Split, size: int, generator: torch.Generator) -> Iterator[Split]:
    """Batches without end: each pass in a new order, without an incomplete last batch."""
    while True:
        order = torch.randperm(len(split.labels), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield Split(split.images[rows], split.labels[rows])


def fit(
    model: nn.Module,
    split: Split,
    *,
    steps: int,
    rate: float,
    seed: int,
    batch: int = BATCH,
    augment: bool = False,
    advance: Advance = lambda: None,
) -> list[float]:
    """Train the model in place and return the loss of every step.

    Args:
        seed: of the order of the images.
        augment: shift the images at random.
        advance: called after every step.
    """
    generator = torch.Generator().manual_seed(seed)
    stepper = Stepper(model, rate)
    losses = []
    for step, (images, labels) in zip(range(steps), batches(split, batch, generator), strict=False):
        for group in stepper.optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps)
        losses.append(stepper.step(Split(shifted(images, generator) if augment else images, labels)))
        advance()
    numbers: list[float] = torch.stack(losses).tolist()
    return numbers


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Accuracy in percent and mean loss."""
    scores = model(split.images)
    correct = (scores.argmax(-1) == split.labels).double().mean().item()
    return 100 * correct, F.cross_entropy(scores, split.labels).item()


def step_times(models: Mapping[str, nn.Module], batch: Split, rounds: int, advance: Advance) -> dict[str, list[float]]:
    """Milliseconds of a training step of each model, round by round. The steps train them.

    Every round takes one step of each model and begins with another one, so that whatever else the
    machine does slows all of them alike.
    """
    steppers = {name: Stepper(model, 1e-4) for name, model in models.items()}
    names, times = list(steppers), {name: [] for name in steppers}  # type: tuple[list[str], dict[str, list[float]]]
    for turn in range(WARM_UP_ROUNDS + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            steppers[name].step(batch)
            if turn >= WARM_UP_ROUNDS:
                times[name].append(1e3 * (time.perf_counter() - start))
        advance()
    return times


def ratio(times: list[float], base: list[float]) -> float:
    """The median over the rounds of one model's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def saved_bytes(model: nn.Module, batch: Split) -> int:
    """Bytes that a forward pass keeps for backward, each storage once, parameters left out."""
    return saved.saved_bytes(lambda: F.cross_entropy(model(batch.images), batch.labels), model.parameters())
