"""The training loop: mini-batches, AdamW with warm-up and linear decay, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compacter_kernels.train.data import Split, shifted

BATCH = 16
WARM_UP = 0.1  # part of the steps


class Trainer:
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
    """Batches without end: each pass over the split in a new order, without an incomplete last batch."""
    while True:
        order = torch.randperm(len(split.labels), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield Split(split.images[rows], split.labels[rows])


def schedule(step: int, steps: int) -> float:
    """The factor on the learning rate: up from 0 in the first tenth of the steps, then down to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


def fit(
    model: nn.Module,
    split: Split,
    *,
    steps: int,
    rate: float,
    seed: int,
    batch: int = BATCH,
    augment: bool = False,
    advance: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train the model in place and return the loss of every step.

    Args:
        seed: of the order of the images.
        augment: shift the images at random.
        advance: called after every step.
    """
    generator = torch.Generator().manual_seed(seed)
    trainer = Trainer(model, rate)
    losses = []
    for step, (images, labels) in zip(range(steps), batches(split, batch, generator), strict=False):
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps)
        losses.append(trainer.step(Split(shifted(images, generator) if augment else images, labels)))
        advance()
    numbers: list[float] = torch.stack(losses).tolist()
    return numbers


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Accuracy in percent and mean loss."""
    scores = model(split.images)
    correct = (scores.argmax(-1) == split.labels).double().mean().item()
    return 100 * correct, F.cross_entropy(scores, split.labels).item()
