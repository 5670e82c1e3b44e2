r"""Adapt your own transformers model to your own texts, with Hugging Face's Trainer.

    python examples/train_text.py --model bert-base-uncased --data reviews.csv --out reviews
    torchrun --nproc-per-node 2 examples/train_text.py --model t5-base --data glue:mrpc \
        --text-column sentence1,sentence2 --method compacter++ --epochs 10 --out mrpc

`compacter-kernels train --model ... --data ...` is the same. The steps are: `load` reads the data
(text_data.py), `open_task` gives the task (text_task.py), a method adds adapters to the model
(text_methods.py), and `AdapterTrainer` trains them (adapter_trainer.py).

The folder --out gets train.csv, train.txt, train.json, and a folder for each seed with losses.csv,
result.json and the trained parameters: the adapter as `save_adapter` writes it, or
trained.safetensors, or the whole model. --resume goes on with an interrupted run from its last
checkpoint, and ends with the same bits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn

import text_report as report
import train_options
from adapter_trainer import SETTINGS, AdapterTrainer, Recipe, check_settings, latest
from compacter_kernels import options as lists
from compacter_kernels.machine import describe
from text_data import LABEL_COLUMN, TEXT_COLUMNS, digest, load
from text_methods import METHODS, Method, trained
from text_task import Classification, open_task, quiet
from train_common import prepare_out, write_json

RESULT = "result.json"


def build(source: str, task: Classification, method: Method, options: dict[str, Any], seed: int) -> nn.Module:
    """The pretrained model with the modules of the method. The same seed gives the same values."""
    torch.manual_seed(seed)
    model = task.load(source).float()  # steps of AdamW are smaller than what bfloat16 can tell apart
    method.prepare(model, options)
    return model


def train(
    args: argparse.Namespace,
    task: Classification,
    data: tuple[Dataset, Dataset],
    recipe: Recipe,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Train with one seed, from the start or the last checkpoint, and write the results.

    A seed that has a result is not trained again.
    """
    method, folder = METHODS[args.method], args.out / f"seed-{recipe.seed}"
    settings = {**settings, **asdict(recipe)}
    if (folder / RESULT).is_file():
        known: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        check_settings(known.get("settings"), settings, folder / RESULT)
        return known
    checkpoint = latest(folder)
    if checkpoint is not None:
        saved = json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8"))
        check_settings(saved, settings, checkpoint)
    examples, validation = data
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        model = build(args.model, task, method, settings["adapters"], recipe.seed)
        save_every = args.save_every or math.ceil(len(examples) / recipe.batch)  # once an epoch
        trainer = AdapterTrainer(model, task, method, examples, recipe, folder, save_every, settings)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        result = {
            "seed": recipe.seed,
            "step": trainer.state.global_step,
            "train_loss": trainer.losses[-1],
            **trainer.evaluation(validation),
            **sizes(model),
            "seconds": trainer.seconds,
            "settings": settings,
        }
    write(trainer, result, folder)
    return result


def write(trainer: AdapterTrainer, result: dict[str, Any], folder: Path) -> None:
    """Write the trained parameters, the losses, and last the result; remove the checkpoints."""
    if trainer.method.name != "full":
        trainer.save_model(str(folder / "adapter"))
    if trainer.is_world_process_zero():
        if trainer.method.name == "full":
            model: Any = trainer.model
            model.save_pretrained(folder / "model")
            trainer.task.tokenizer.save_pretrained(folder / "model")
        lines = "".join(f"{step},{loss!r}\n" for step, loss in enumerate(trainer.losses, 1))
        (folder / "losses.csv").write_text(f"step,loss\n{lines}", encoding="utf-8")
        write_json(result, folder / RESULT)
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
    PartialState().wait_for_everyone()


def sizes(model: Any) -> dict[str, int]:
    """How many numbers train, and how many the model has with all that the method added."""
    counts = {"trainable_parameters": sum(p.numel() for p in trained(model).values())}
    return {**counts, "parameters": sum(p.numel() for p in model.parameters())}


def run(args: argparse.Namespace) -> int:
    """Train with every seed, print the table and write the files. All processes call it."""
    if "WORLD_SIZE" not in os.environ:  # without torchrun one GPU; on several, Trainer would use nn.DataParallel
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if args.threads:
        torch.set_num_threads(args.threads)
    quiet()
    processes = PartialState(cpu=not torch.cuda.is_available())
    try:
        _run(args, processes)
        processes.wait_for_everyone()  # no process leaves while another one is still at work
    finally:
        processes.destroy_process_group()
    return 0


def _run(args: argparse.Namespace, processes: PartialState) -> None:
    args.method = args.method or "compacter"
    columns = lists.names(args.text_column) if args.text_column else TEXT_COLUMNS
    batch, accumulate, first = args.batch or train_options.BATCH, args.accumulate or 1, args.seed or 0
    if batch % (processes.num_processes * accumulate):
        raise ValueError(
            f"--batch {batch} must be a multiple of {processes.num_processes} processes times {accumulate} parts"
        )
    check_out(prepare_out(args.out), args.resume, processes)
    texts = load(args.data, args.validation, columns, args.label_column or LABEL_COLUMN)
    task = open_task(args.model, args.task, texts, args.max_length or train_options.MAX_LENGTH)
    data = task.encode(texts[0]), task.encode(texts[1])
    steps = args.steps or (args.epochs or train_options.EPOCHS) * math.ceil(len(data[0]) / batch)
    rate = args.learning_rate or METHODS[args.method].rate
    adapters = {name: getattr(args, name) for name in ("reduction_factor", "phm_dim", "phm_rank")}
    settings = {
        "model": args.model,
        "data": args.data,
        "data_sha256": [digest(part) for part in texts],
        "task": task.name,
        "method": args.method,
        "adapters": {name: value for name, value in adapters.items() if value is not None},
        "max_length": task.max_length,
    }
    recipes = [
        Recipe(steps, rate, batch, seed, accumulate, args.bf16) for seed in range(first, first + (args.seeds or 1))
    ]
    results = [train(args, task, data, recipe, settings) for recipe in recipes]
    if not processes.is_main_process:
        return
    rows = [report.row(METHODS[args.method].title, task.metric, rate, results)]
    document = {
        "machine": describe(),
        "settings": settings,
        "examples": {"train": len(data[0]), "validation": len(data[1])},
        "methods": rows,
        "results": [{name: value for name, value in result.items() if name != "settings"} for result in results],
    }
    text = f"{len(data[0])} examples, {steps} steps of {batch}; evaluated on {len(data[1])}\n\n{report.table(rows)}"
    report.write(rows, document, text, args.out)
    print(json.dumps(document, indent=2) if args.json else f"{text}\nwritten into {args.out}")


def check_out(out: Path, resume: bool, processes: PartialState) -> None:
    """Raise ValueError if a new run would overwrite the files of another one."""
    present = sorted(path.parent.name for path in out.glob("seed-*/*"))
    if present and not resume:
        raise ValueError(
            f"--out {out} has a run already ({present[0]}); --resume goes on with it, or give another --out"
        )
    if resume and not present and processes.is_main_process:
        print(f"nothing to resume in {out}: the run starts", file=sys.stderr)
    processes.wait_for_everyone()  # before the first process makes such a folder


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this script beside the common ones."""
    train_options.add_batches(parser)
    train_options.add_own_options(parser, required=True)


if __name__ == "__main__":
    sys.exit(train_options.run_script(__doc__, add_options, run))
