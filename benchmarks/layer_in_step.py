"""What `layer_forward` of the patch saves in a BERT-base step, timed where it runs.

    python benchmarks/layer_in_step.py OUT [--rounds 20]

A whole step varies by more than the adapters take. So the time of each region is taken: from the
output of the dense layer to the output of the layer norm behind it, in the forward, and back again
in the backward. One process and one model take turns in three ways: without adapters, patched with
`compose_single` alone, and patched with `layer_forward` too. The share of a way is the sum over the
24 regions of a step minus that of the model without adapters. Estimates are over the rounds (sums
of a step) and over all regions (of a forward and of a backward). Writes OUT/layer_in_step.txt.
Needs transformers 4.57 and adapters 1.3.0. Run it with the environment of `compacter-kernels bench`
(benchmarks/README.md), which removes page faults.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters.methods.bottleneck import BottleneckLayer

import compacter_kernels as ck
from compacter_kernels import machine

METHOD = "bottleneck_layer_forward"
WAYS = ("without adapters", "compose_single alone", "layer_forward")
BATCH, LENGTH, REDUCTION, DRAWS = 8, 128, 32, 2000


class Regions:
    """The patched model, and the times of its regions in the way that is set."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = model = transformers.BertForSequenceClassification(transformers.BertConfig())
        adapters.init(model)
        options = {"reduction_factor": REDUCTION, "non_linearity": "gelu_new"}
        model.add_adapter("task", config=adapters.CompacterConfig(**options))
        model.train_adapter("task")
        for path, parameter in model.named_parameters():
            if not path.startswith("bert"):
                parameter.requires_grad_(False)
        model.bert.embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        ck.patch(model)
        model.train()
        layers = (module for module in model.modules() if isinstance(module, BottleneckLayer))
        self.patched = {layer: vars(layer)[METHOD] for layer in layers if METHOD in vars(layer)}
        words = torch.randint(3, 30000, (BATCH, LENGTH))
        self.data = {"input_ids": words, "labels": torch.randint(0, 2, (BATCH,))}
        self.times: list[tuple[float, float]] = []

    def use(self, way: str) -> None:
        """Let the layers run in this way, timed."""
        for layer, fast in self.patched.items():
            vars(layer).pop(METHOD, None)
            library = types.MethodType(getattr(type(layer), METHOD), layer)
            vars(layer)[METHOD] = self._timed(fast if way == WAYS[2] else library)
        self.model.set_active_adapters(None if way == WAYS[0] else "task")

    def _timed(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(hidden_states: torch.Tensor, residual: Any, norm: Any) -> torch.Tensor:
            start = time.perf_counter()
            y = function(hidden_states, residual, norm)
            forward, begun = time.perf_counter() - start, [0.0]

            def begin(grad: Any) -> None:
                begun[0] = time.perf_counter()

            def end(grad: Any) -> None:
                self.times.append((1e3 * forward, 1e3 * (time.perf_counter() - begun[0])))

            y.register_hook(begin)
            hidden_states.register_hook(end)
            return y

        return call

    def step(self, way: str) -> list[tuple[float, float]]:
        """Forward and backward milliseconds of each region of one step."""
        self.use(way)
        self.times = []
        self.model(**self.data).loss.backward()
        assert len(self.times) == len(self.patched), way
        return self.times


def shares(steps: dict[str, list[list[tuple[float, float]]]], chosen: list[int]) -> tuple[float, ...]:
    """The share of `layer_forward` over that of `compose_single` alone, by the four estimates."""
    found = []
    for estimate in (lambda v: statistics.quantiles(v, n=4)[0], statistics.median):
        by_step = {way: estimate([sum(map(sum, steps[way][r])) for r in chosen]) for way in WAYS}
        by_region = {
            way: sum(estimate([region[side] for r in chosen for region in steps[way][r]]) for side in (0, 1))
            for way in WAYS
        }
        for times in (by_step, by_region):
            bare, composed, fast = (times[way] for way in WAYS)
            found.append((fast - bare) / (composed - bare))
    return tuple(found)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    regions = Regions()
    for way in WAYS:
        regions.step(way)
    steps: dict[str, list[list[tuple[float, float]]]] = {way: [] for way in WAYS}
    for turn in range(args.rounds):
        for way in WAYS[turn % 3 :] + WAYS[: turn % 3]:
            steps[way].append(regions.step(way))
    about = machine.describe()
    lines = [
        f"BERT-base, {BATCH} x {LENGTH} tokens, float32, {len(regions.patched)} regions, {args.rounds} rounds in turns",
        f"{about['cpu']}, {torch.get_num_threads()} threads, {about['torch_cpu_capability']}, torch {about['torch']}",
        "",
        f"{'way':<24}{'forward ms':>12}{'backward ms':>13}   of a region, lower quartiles",
    ]
    for way in WAYS:
        low = [
            statistics.quantiles([region[side] for step in steps[way] for region in step], n=4)[0] for side in (0, 1)
        ]
        lines.append(f"{way:<24}{low[0]:>12.3f}{low[1]:>13.3f}")
    draw = random.Random(0)
    rounds = range(args.rounds)
    draws = [shares(steps, draw.choices(rounds, k=args.rounds)) for _ in range(DRAWS)]
    lines += ["", "share of layer_forward / share of compose_single alone (10 and 90 % of bootstrap draws of rounds)"]
    names = ("steps, lower quartile", "regions, lower quartile", "steps, median", "regions, median")
    for name, ratio, drawn in zip(names, shares(steps, list(rounds)), zip(*draws, strict=True), strict=True):
        low, *_, high = statistics.quantiles(drawn, n=10)
        lines.append(f"{name:<24}{ratio:>8.2f}   ({low:.2f} to {high:.2f})")
    text = "\n".join(lines) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "layer_in_step.txt").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
