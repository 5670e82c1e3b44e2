"""Exactly defined tasks on rows of letters, and how the base and its adapters learn them.

The base learns to copy. Each adapter teaches the frozen base another task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from can_model import EncoderDecoder
from torch import Tensor, nn
from torch.nn import functional as F

import compacter_kernels as ck

LETTERS, LENGTH, BATCH = 16, 8, 64
TASKS: dict[str, Callable[[Tensor], Tensor]] = {  # of letters (batch, LENGTH), which are 1 to LETTERS
    "copy": lambda source: source,
    "next": lambda source: source % LETTERS + 1,
    "reverse": lambda source: source.flip(1),
    "rotate": lambda source: source.roll(1, 1),
}
BASE, ADAPTED = "copy", ("next", "reverse", "rotate")
BASE_RATE, ADAPTER_RATE = 3e-3, 1e-2

# `inject` does not know this model, so the config names what adapters follow: Wo of each decoder
# layer, and the end of the feed-forward of each encoder layer.
CONFIG = ck.CompacterConfig(target_modules=["output", "linear2"], reduction_factor=4, phm_init_range=0.1)


def letters(count: int, seed: int) -> Tensor:
    """Random rows of letters (count, LENGTH)."""
    return torch.randint(1, LETTERS + 1, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def base(seed: int, steps: int) -> EncoderDecoder:
    """A model that has learned to copy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EncoderDecoder(LETTERS + 1, LENGTH)
    fit(model, model.parameters(), BASE, BASE_RATE, steps, seed)
    return model


def add_adapter(model: EncoderDecoder, task: str, seed: int, steps: int) -> list[float]:
    """Teach the model a task by adapters of that name; the losses of the steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ck.inject(model, CONFIG, name=task)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return fit(model, trained, task, ADAPTER_RATE, steps, seed)


def loss_of(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy of each letter of the target (batch, LENGTH), given those before it."""
    before = F.pad(target, (1, 0))[:, :-1]
    return F.cross_entropy(model(source, before).flatten(0, 1), target.flatten())


def fit(
    model: nn.Module, parameters: Iterable[nn.Parameter], task: str, rate: float, steps: int, seed: int
) -> list[float]:
    """Train with Adam on new random rows in each step; the losses of the steps."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    sources, losses = letters(steps * BATCH, seed).split(BATCH), []
    model.train()
    for source in sources:
        loss = loss_of(model, source, TASKS[task](source))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def accuracy(model: EncoderDecoder, task: str, count: int = 1000) -> float:
    """The percentage of rows that the model gets wholly right."""
    source = letters(count, seed=1_000_000)
    tokens, _ = model.generate(source, LENGTH)
    return 100 * (tokens == TASKS[task](source)).all(1).double().mean().item()
