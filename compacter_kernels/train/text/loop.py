"""The training loop: AdamW, warm-up and linear decay, accumulated batches, autocast, several processes.

All that is random in a step, the order of the examples and dropout, follows from the seed, the step and the rank. So a
run is resumed with nothing to restore but the weights and the optimizer's moments, and gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from compacter_kernels.train.loop import schedule
from compacter_kernels.train.text.methods import trained
from compacter_kernels.train.text.processes import Processes
from compacter_kernels.train.text.task import Example, Task, length, weight

CLIP = 1.0  # the largest norm of all gradients, as in the trainer that the paper used


@dataclass(frozen=True)
class Recipe:
    """How to train: `batch` examples a step over all processes, in `accumulate` parts each."""

    steps: int
    rate: float
    batch: int
    seed: int
    accumulate: int = 1
    bf16: bool = False


class Training:
    """A model in training, after `step` steps; `losses` has the mean loss of each."""

    def __init__(
        self, model: nn.Module, task: Task, examples: Sequence[Example], recipe: Recipe, processes: Processes
    ) -> None:
        self.model, self.task, self.examples, self.recipe, self.processes = model, task, examples, recipe, processes
        self.optimizer = torch.optim.AdamW(trained(model).values(), lr=recipe.rate, weight_decay=0.0)
        self.step = 0
        self.losses: list[float] = []
        self.seconds = 0.0  # of the steps made here
        self._wrapped = processes.wrap(model)

    def advance(self) -> None:
        """One step."""
        start = time.perf_counter()
        recipe, processes = self.recipe, self.processes
        batch = [self.examples[row] for row in order(len(self.examples), recipe, self.step)]
        parts = [part for part in _parts(batch[processes.rank :: processes.size], recipe.accumulate) if part]
        labels = weight(batch)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate * schedule(self.step, recipe.steps)
        self.optimizer.zero_grad()
        self._wrapped.train()
        total = torch.zeros((), dtype=torch.float64)
        with torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []):
            torch.manual_seed((recipe.seed * 1_000_003 + self.step) * 4099 + processes.rank)
            for number, part in enumerate(parts, 1):
                alone = processes.size == 1 or number == len(parts)
                with nullcontext() if alone else self._wrapped.no_sync():  # type: ignore[operator]
                    with torch.autocast(processes.device.type, torch.bfloat16, enabled=recipe.bf16):
                        loss = self.task.loss(self._wrapped, part, processes.device)
                    torch.autograd.backward(loss * (processes.size / labels))  # gradients are averaged
                total += loss.detach().double().cpu()
        nn.utils.clip_grad_norm_(trained(self.model).values(), CLIP)
        self.optimizer.step()
        self.step += 1
        self.losses.append(processes.total(total).item() / labels)
        self.seconds += time.perf_counter() - start


def order(count: int, recipe: Recipe, step: int) -> list[int]:
    """The examples of a step, of a stream of passes over all `count`, each in an order of its own."""
    rows: list[int] = []
    position = step * recipe.batch
    while len(rows) < recipe.batch:
        turn, start = divmod(position + len(rows), count)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + turn)
        rows += torch.randperm(count, generator=generator)[start : start + recipe.batch - len(rows)].tolist()
    return rows


def _parts(examples: Sequence[Example], count: int) -> Iterator[Sequence[Example]]:
    """Parts of similar length, so that little is padding; the sum of their losses is that of the whole."""
    examples = sorted(examples, key=length)
    size = -(-len(examples) // count)
    return (examples[start : start + size] for start in range(0, len(examples), size))
