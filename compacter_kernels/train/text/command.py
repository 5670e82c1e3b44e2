"""`compacter-kernels train --model ... --data ...`: adapt your own model to your own data."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from compacter_kernels import options as lists
from compacter_kernels.checkpoints.files import require_safetensors
from compacter_kernels.machine import describe
from compacter_kernels.train.text import report
from compacter_kernels.train.text.data import LABEL_COLUMN, TEXT_COLUMNS, load
from compacter_kernels.train.text.experiment import Subject, encode, open_task, train
from compacter_kernels.train.text.loop import Recipe
from compacter_kernels.train.text.methods import METHODS
from compacter_kernels.train.text.options import BATCH, EPOCHS, MAX_LENGTH
from compacter_kernels.train.text.processes import Processes, processes


def run(args: argparse.Namespace) -> int:
    """Train with every seed, print the table and write the files."""
    require_safetensors()
    if args.threads:
        torch.set_num_threads(args.threads)
    with processes() as group:
        return _run(args, group)


def _run(args: argparse.Namespace, group: Processes) -> int:
    from tqdm import tqdm

    method = METHODS[args.method or "compacter"]
    columns = lists.names(args.text_column) if args.text_column else TEXT_COLUMNS
    out = prepare_out(args.out)
    batch, accumulate = args.batch or BATCH, args.accumulate or 1
    if batch % (group.size * accumulate):
        raise ValueError(f"--batch {batch} must be a multiple of {group.size} processes times {accumulate} parts")
    seeds = range(args.seed or 0, (args.seed or 0) + (args.seeds or 1))
    _check_out(out, args.resume, group)
    split = load(args.data, args.validation, columns, args.label_column or LABEL_COLUMN)
    task = open_task(args.model, args.task, split, args.max_length or MAX_LENGTH)
    subject = Subject(args.model, task, method, _of_adapters(args))
    data = encode(task, split.train), encode(task, split.validation)
    epoch = math.ceil(len(data[0]) / batch)
    steps = args.steps or (args.epochs or EPOCHS) * epoch
    rate = args.learning_rate or method.rate
    settings: dict[str, Any] = {
        "model": args.model,
        "data": args.data,
        "data_sha256": [split.train.digest(), split.validation.digest()],
        "task": task.name,
        "method": method.name,
        "adapters": subject.options,
        "max_length": task.max_length,
    }
    results = []
    with tqdm(total=steps * len(seeds), unit="step", disable=not (group.first and sys.stderr.isatty())) as bar:
        for seed in seeds:
            recipe = Recipe(steps, rate, batch, seed, accumulate, args.bf16)
            results.append(
                train(
                    subject,
                    data,
                    recipe,
                    group,
                    out / f"seed-{seed}",
                    settings,
                    save_every=args.save_every or epoch,
                    advance=bar.update,
                )
            )
    if group.first:
        rows = [report.row(method.title, task.metric, rate, results)]
        document = {
            "machine": describe(),
            "settings": settings,
            "examples": {"train": len(data[0]), "validation": len(data[1])},
            "methods": rows,
            "results": [{name: value for name, value in r.items() if name != "settings"} for r in results],
        }
        text = f"{len(data[0])} examples, {steps} steps of {batch}; evaluated on {len(data[1])}\n\n{report.table(rows)}"
        report.write(rows, document, text, out)
        print(json.dumps(document, indent=2) if args.json else f"{text}\nwritten into {out}")
    return 0


def prepare_out(out: Path) -> Path:
    """The folder, made.

    Raises:
        OSError: it cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"--out {out} cannot be written to")
    return out


def _check_out(out: Path, resume: bool, group: Processes) -> None:
    """Raise ValueError where a new run would meet an old one's files."""
    present = sorted(path.name for path in out.glob("seed-*"))
    if present and not resume:
        raise ValueError(
            f"--out {out} has a run already ({present[0]}); --resume goes on with it, or give another --out"
        )
    if resume and not present and group.first:
        print(f"nothing to resume in {out}: the run starts", file=sys.stderr)
    group.wait()  # before the first process makes such a folder


def _of_adapters(args: argparse.Namespace) -> dict[str, Any]:
    given = {"reduction_factor": args.reduction_factor, "phm_dim": args.phm_dim}
    return {name: value for name, value in given.items() if value is not None}
