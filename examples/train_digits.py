"""The demonstration: a small vision transformer on real handwritten digits, adapted in six ways.

    python examples/train_digits.py --quick

`compacter-kernels train` is the same. The steps are: pretrain on the digits 0 to 4, choose a
learning rate for each method on a validation split, adapt to the digits 5 to 9 with every seed, and
measure the cost of a step of each method. Compacter runs twice, through the impl `dense` and
through the fused one; both must give the same loss curve.

The data are in digits_data.py, the model in digits_model.py, the methods in digits_methods.py, the
training loop in digits_training.py and the tables in digits_report.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

import digits_report as report
import train_options as options
from compacter_kernels.machine import describe
from digits_data import Split, Task, load_tasks
from digits_methods import FROZEN_BASE, FUSED, METHODS, Method, build, impl_of
from digits_model import VisionTransformer
from digits_report import Curves, Row
from digits_training import BATCH, WARM_UP_ROUNDS, Advance, evaluate, fit, ratio, saved_bytes, step_times
from train_common import prepare_out

ROUNDS, QUICK_ROUNDS = 40, 10  # of steps that are timed
PRETRAINING_RATE, PRETRAINING_BATCH = 1e-3, 64


class Settings(NamedTuple):
    """How long and how often to train, and by which methods (names of `METHODS`)."""

    steps: int
    seeds: int
    methods: tuple[str, ...]
    pretraining_steps: int
    rounds: int
    search: bool = True  # without: the first of each method's learning rates

    def work(self) -> int:
        """How many steps and rounds there are in all."""
        runs = len(self.methods) * self.seeds
        if self.search:
            recipes = {METHODS[name].recipe: METHODS[name].rates for name in self.methods}
            runs += sum(len(rates) - 1 for rates in recipes.values())
        return self.pretraining_steps + runs * self.steps + WARM_UP_ROUNDS + self.rounds


class Experiment:
    """The runs of the demonstration. `advance` is called after every step, for a progress bar."""

    def __init__(self, pretraining: Task, task: Task, settings: Settings, advance: Advance = lambda: None) -> None:
        self.pretraining, self.task, self.settings, self.advance = pretraining, task, settings, advance
        self.rates: dict[str, float] = {}  # the learning rate of each recipe
        self.losses: Curves = {}

    def run(self) -> Row:
        """All that train.json says, but for the machine; the losses are kept in `losses`."""
        self.pretrain()
        rows = [self.row(FROZEN_BASE), *(self.adapt(METHODS[name]) for name in self.settings.methods)]
        self.measure(rows)
        fused = next((row["impl"] for row in rows if row["method"] == FUSED), None)
        return {
            "settings": self.settings._asdict(),
            "pretrained_accuracy": evaluate(self.pretrained, self.pretraining.test)[0],
            "methods": rows,
            "agreement": report.agreement(self.losses, fused),
        }

    def pretrain(self) -> None:
        """Train the model that every method starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.pretrained = VisionTransformer(len(self.pretraining.digits))
        fit(
            self.pretrained,
            self.pretraining.train,
            steps=self.settings.pretraining_steps,
            rate=PRETRAINING_RATE,
            seed=0,
            batch=PRETRAINING_BATCH,
            augment=True,
            advance=self.advance,
        )

    def adapt(self, method: Method) -> Row:
        """Train with every seed. The first chooses the recipe's rate on the validation split."""
        rates = method.rates if self.settings.search else method.rates[:1]
        if method.recipe in self.rates:
            rates = (self.rates[method.recipe],)
        attempts = {rate: self.train(method, 0, rate) for rate in rates}

        def merit(rate: float) -> tuple[float, float]:
            accuracy, loss = evaluate(attempts[rate][0], self.task.validation)
            return accuracy, -loss

        best = self.rates[method.recipe] = max(attempts, key=merit)
        runs = [attempts[best], *(self.train(method, seed, best) for seed in range(1, self.settings.seeds))]
        self.losses[method.name] = [losses for _, losses in runs]
        return self.row(method, best, [evaluate(model, self.task.test)[0] for model, _ in runs])

    def train(self, method: Method, seed: int, rate: float) -> tuple[VisionTransformer, list[float]]:
        """One run: the model, and the loss of every step."""
        model = build(method, self.pretrained, len(self.task.digits), seed)
        losses = fit(model, self.task.train, steps=self.settings.steps, rate=rate, seed=seed, advance=self.advance)
        return model, losses

    def row(self, method: Method, rate: float | None = None, accuracies: Sequence[float] = ()) -> Row:
        """The row of a method, whose costs `measure` fills in."""
        model = build(method, self.pretrained, len(self.task.digits), seed=0)
        parameters = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {
            "method": method.name,
            "impl": impl_of(model),
            "accuracy_mean": statistics.mean(accuracies) if accuracies else None,
            "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "seeds": len(accuracies),
            "trainable_parameters": trainable,
            "trainable_percent": 100 * trainable / parameters,
            "learning_rate": rate,
            "step_ms": 0.0,
            "step_ratio": 0.0,
            "saved_bytes": 0,
            "accuracies": list(accuracies),
        }

    def measure(self, rows: list[Row]) -> None:
        """Fill in the cost of a step of each method, with models built anew."""
        batch = Split(self.task.train.images[:BATCH], self.task.train.labels[:BATCH])
        methods = {FROZEN_BASE.name: FROZEN_BASE, **METHODS}
        models = {
            row["method"]: build(methods[row["method"]], self.pretrained, len(self.task.digits), seed=0) for row in rows
        }
        for row in rows:
            row["saved_bytes"] = saved_bytes(models[row["method"]], batch)
        times = step_times(models, batch, self.settings.rounds, self.advance)
        for row in rows:
            row["step_ms"] = statistics.median(times[row["method"]])
            row["step_ratio"] = ratio(times[row["method"]], times[FROZEN_BASE.name])


def _settings(args: argparse.Namespace, images: int) -> Settings:
    steps = args.epochs * (images // BATCH) if args.epochs else args.steps
    quick = args.quick
    return Settings(
        steps=steps or (options.QUICK_STEPS if quick else options.STEPS),
        seeds=args.seeds or (options.QUICK_SEEDS if quick else options.SEEDS),
        methods=args.methods or tuple(METHODS),
        pretraining_steps=args.pretraining_steps
        or (options.QUICK_PRETRAINING_STEPS if quick else options.PRETRAINING_STEPS),
        rounds=QUICK_ROUNDS if quick else ROUNDS,
        search=not quick,
    )


def run(args: argparse.Namespace) -> int:
    """Train, print the table and write the files; 0 unless the two Compacter loss curves differ."""
    from tqdm import tqdm

    pretraining, task = load_tasks()
    settings = _settings(args, len(task.train.labels))
    prepare_out(args.out)
    for name in settings.methods:  # an impl that cannot serve is an error before anything is trained
        impl_of(build(METHODS[name], VisionTransformer(1, layers=1), classes=1, seed=0))
    no_plot = None if args.no_plot else report.missing()
    if no_plot:
        print(no_plot, file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or 1)
    try:
        with tqdm(total=settings.work(), unit="step", disable=not sys.stderr.isatty()) as bar:
            experiment = Experiment(pretraining, task, settings, bar.update)
            document = experiment.run()
        document = {"machine": describe(), **document}
    finally:
        torch.set_num_threads(threads)
    report.write(document, experiment.losses, args.out)
    if not args.no_plot and not no_plot:
        report.draw(document, experiment.losses, args.out / "losses.png")
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        print(report.text(document, pretraining, task), f"written into {args.out}", sep="\n")
    return 1 if document["agreement"] and not document["agreement"]["holds"] else 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this script beside the common ones."""
    options.add_methods(parser)
    options.add_digits_options(parser)


if __name__ == "__main__":
    sys.exit(options.run_script(__doc__, add_options, run))
