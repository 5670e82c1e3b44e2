"""Adapters in a model whose decoder layers have one sublayer, and the speed of these layers.

    python examples/compressed_attention/run_can.py [--quick] [--out FOLDER]

With each seed the base learns to copy rows of letters, and adapters teach the frozen base three
other tasks (can_task.py). Then adapters are saved and loaded into a new base, a batch of all tasks
is routed, and decoding with cached keys and values is compared with decoding without. At the end
the decoder is timed beside a standard one (can_speed.py). Writes FOLDER/compressed_attention.json
and .txt.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import can_speed
import can_task
import torch
from can_model import EncoderDecoder
from can_report import table
from can_task import ADAPTED, BASE, LENGTH, accuracy, add_adapter, letters
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.machine import describe

FULL: dict[str, Any] = {"seeds": 3, "steps": 800, "rounds": 15, "batches": can_speed.BATCHES}
QUICK: dict[str, Any] = {"seeds": 1, "steps": 150, "rounds": 2, "batches": can_speed.BATCHES[:2]}


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors."""
    return (a - b).abs().max().item()


def loaded(model: EncoderDecoder, plain: EncoderDecoder, name: str) -> float:
    """The largest difference of scores after adapters were saved and loaded into a plain base."""
    source = letters(16, seed=2)
    ck.set_adapter(model, name)
    with tempfile.TemporaryDirectory() as folder:
        ck.save_adapter(model, folder)
        other = ck.load_adapter(copy.deepcopy(plain), folder)
    return difference(model.generate(source, LENGTH)[1], other.generate(source, LENGTH)[1])


def routed(model: EncoderDecoder) -> tuple[float, float]:
    """The largest differences of scores of a batch in which each row has its own adapter.

    Of the batch to separate batches of one adapter, and of cached to uncached decoding.
    """
    names = [None, *ADAPTED] * 4  # None is the base
    source = letters(len(names), seed=3)
    with ck.route(model, names):
        _, mixed = model.generate(source, LENGTH)
        _, uncached = model.generate(source, LENGTH, cached=False)
    separate = torch.empty_like(mixed)
    for name in (None, *ADAPTED):
        rows = [row for row, other in enumerate(names) if other == name]
        with ck.route(model, [name] * len(rows)):
            separate[rows] = model.generate(source[rows], LENGTH)[1]
    return difference(mixed, separate), difference(mixed, uncached)


def adapt(seed: int, steps: int) -> dict[str, Any]:
    """Train a base and its adapters with that seed; accuracies in percent, and differences."""
    model = can_task.base(seed, steps)
    plain = copy.deepcopy(model)
    tasks = {BASE: {"base": accuracy(plain, BASE)}}
    for task in ADAPTED:
        losses = add_adapter(model, task, seed, steps)
        scores = {"base": accuracy(plain, task), "adapted": accuracy(model, task)}
        tasks[task] = {**scores, "first_loss": losses[0], "last_loss": losses[-1]}
    trained, of_base = ck.count_parameters(model)
    mixed, uncached = routed(model)
    differences = {"loaded": loaded(model, plain, ADAPTED[0]), "separate": mixed, "uncached": uncached}
    return {"seed": seed, "tasks": tasks, "trained": trained, "base": of_base, "differences": differences}


def main() -> None:
    """Train, compare, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, no batch of 64")
    parser.add_argument("--out", type=Path, default=Path("out"), help="a folder for the results")
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    runs = [adapt(seed, settings["steps"]) for seed in range(settings["seeds"])]
    speed = can_speed.measure(settings["batches"], settings["rounds"], threads=1)
    document = {"machine": describe(), "settings": settings, "runs": runs, "speed": speed}
    for end, text in (("json", json.dumps(document, indent=1) + "\n"), ("txt", table(document))):
        (args.out / f"compressed_attention.{end}").write_text(text, encoding="utf-8")
    print(table(document))


if __name__ == "__main__":
    main()
