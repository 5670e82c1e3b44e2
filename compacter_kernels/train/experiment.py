"""The whole experiment: pretrain, choose learning rates, adapt in every way, compare, measure the cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from compacter_kernels.train.cost import WARM_UP_ROUNDS, ratio, saved_bytes, step_times
from compacter_kernels.train.data import Split, Task
from compacter_kernels.train.loop import BATCH, evaluate, fit
from compacter_kernels.train.methods import FROZEN_BASE, FUSED, METHODS, REFERENCE, Method, build, impl_of
from compacter_kernels.train.model import VisionTransformer

AGREEMENT_STEPS = 100
AGREEMENT_LIMIT = 1e-4
PRETRAINING_RATE, PRETRAINING_BATCH = 1e-3, 64

Advance = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """What to run: how long, how often, which methods (names of `METHODS`)."""

    steps: int
    seeds: int
    methods: tuple[str, ...]
    pretraining_steps: int
    rounds: int
    search: bool = True  # without: the first of each method's learning rates

    def work(self) -> int:
        """How many times `advance` is called in all."""
        runs = len(self.methods) * self.seeds
        if self.search:
            recipes = {METHODS[name].recipe: METHODS[name].rates for name in self.methods}
            runs += sum(len(rates) - 1 for rates in recipes.values())
        return self.pretraining_steps + runs * self.steps + WARM_UP_ROUNDS + self.rounds


@dataclass
class Result:
    """One row: a method, what it reached on the test split and what it costs."""

    method: Method
    impl: str | None = None
    rate: float | None = None
    accuracies: list[float] = field(default_factory=list)  # percent, one per seed
    losses: list[list[float]] = field(default_factory=list)  # [seed][step]
    trainable: int = 0
    parameters: int = 0
    step_ms: float = 0.0
    step_ratio: float = 0.0  # to the frozen base
    saved_bytes: int = 0

    @property
    def mean(self) -> float | None:
        """The mean accuracy."""
        return statistics.mean(self.accuracies) if self.accuracies else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation of the accuracy; None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class Agreement:
    """How far apart the loss curves of Compacter through `dense` and through the fused impl are."""

    impl: str
    steps: int
    difference: float

    @property
    def holds(self) -> bool:
        """Whether they are the same curve."""
        return self.difference <= AGREEMENT_LIMIT  # False for NaN


@dataclass(frozen=True)
class Outcome:
    """All results; `agreement` is None unless both Compacter runs were asked for."""

    pretrained: float  # accuracy on held-out images of the digits it was pretrained on
    base: Result
    results: list[Result]
    agreement: Agreement | None


def differences(reference: Result, other: Result, steps: int = AGREEMENT_STEPS) -> torch.Tensor:
    """The absolute difference of two methods' losses, (seeds, at most `steps`)."""
    first, second = (torch.tensor(result.losses, dtype=torch.float64)[:, :steps] for result in (reference, other))
    return (first - second).abs()


def run(pretraining: Task, task: Task, settings: Settings, advance: Advance = lambda: None) -> Outcome:
    """Carry out the experiment; `advance` is called `settings.work()` times."""
    pretrained, accuracy = _pretrain(pretraining, settings.pretraining_steps, advance)
    rates: dict[str, float] = {}
    results = [_adapt(METHODS[name], pretrained, task, settings, rates, advance) for name in settings.methods]
    base = Result(FROZEN_BASE)
    _measure([base, *results], pretrained, task, settings.rounds, advance)
    return Outcome(accuracy, base, results, _agreement(results))


def _pretrain(task: Task, steps: int, advance: Advance) -> tuple[VisionTransformer, float]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(len(task.digits))
    fit(
        model,
        task.train,
        steps=steps,
        rate=PRETRAINING_RATE,
        seed=0,
        batch=PRETRAINING_BATCH,
        augment=True,
        advance=advance,
    )
    return model, evaluate(model, task.test)[0]


def _adapt(
    method: Method,
    pretrained: VisionTransformer,
    task: Task,
    settings: Settings,
    rates: dict[str, float],
    advance: Advance,
) -> Result:
    """Train with every seed; the first one also chooses the recipe's learning rate, by the validation split."""

    def trained(seed: int, rate: float) -> tuple[VisionTransformer, list[float]]:
        model = build(method, pretrained, len(task.digits), seed)
        losses = fit(model, task.train, steps=settings.steps, rate=rate, seed=seed, advance=advance)
        return model, losses

    if method.recipe in rates:
        candidates: tuple[float, ...] = (rates[method.recipe],)
    else:
        candidates = method.rates if settings.search else method.rates[:1]
    attempts = {rate: trained(0, rate) for rate in candidates}

    def merit(rate: float) -> tuple[float, float]:
        accuracy, loss = evaluate(attempts[rate][0], task.validation)
        return accuracy, -loss

    rate = rates[method.recipe] = max(attempts, key=merit)
    result = Result(method, rate=rate)
    for seed in range(settings.seeds):
        model, losses = attempts[rate] if seed == 0 else trained(seed, rate)
        result.accuracies.append(evaluate(model, task.test)[0])
        result.losses.append(losses)
    return result


def _measure(rows: list[Result], pretrained: VisionTransformer, task: Task, rounds: int, advance: Advance) -> None:
    """Fill in the sizes and costs of each row, from models built anew."""
    batch = Split(task.train.images[:BATCH], task.train.labels[:BATCH])
    models = {row.method.name: build(row.method, pretrained, len(task.digits), seed=0) for row in rows}
    for row in rows:
        model = models[row.method.name]
        row.impl = impl_of(model)
        row.parameters = sum(p.numel() for p in model.parameters())
        row.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row.saved_bytes = saved_bytes(model, batch)
    times = step_times(models, batch, rounds, advance)
    for row in rows:
        row.step_ms = statistics.median(times[row.method.name])
        row.step_ratio = ratio(times[row.method.name], times[FROZEN_BASE.name])


def _agreement(results: list[Result]) -> Agreement | None:
    by_name = {result.method.name: result for result in results}
    if REFERENCE not in by_name or FUSED not in by_name:
        return None
    apart = differences(by_name[REFERENCE], by_name[FUSED])
    return Agreement(by_name[FUSED].impl or "", apart.shape[1], apart.max().item())
