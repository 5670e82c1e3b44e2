"""The options of `train` beside those of the digits demonstration, and which belong to which of its three uses."""

from __future__ import annotations

import argparse
import math

from compacter_kernels import options
from compacter_kernels.train.text.data import FRACTION, LABEL_COLUMN
from compacter_kernels.train.text.experiment import TASKS
from compacter_kernels.train.text.methods import METHODS

DIGITS, TOPICS, OWN = "the digits demonstration", "--demo topics", "--model"
BATCH, MAX_LENGTH, EPOCHS = 32, 128, 3
USES = {  # options that not every use has
    **dict.fromkeys(("pretraining_steps", "quick", "no_plot"), (DIGITS,)),
    "methods": (DIGITS, TOPICS),
    **dict.fromkeys(("batch", "max_length"), (TOPICS, OWN)),
    **dict.fromkeys(("data", "validation", "text_column", "label_column", "task", "method", "seed", "resume"), (OWN,)),
    **dict.fromkeys(("learning_rate", "accumulate", "bf16", "save_every", "reduction_factor", "phm_dim"), (OWN,)),
}


def rate(text: str) -> float:
    """A finite number > 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"a number > 0 is expected, got {text!r}")
    return number


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"an integer >= 0 is expected, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what belongs to `--model` and to `--demo topics`."""
    both = parser.add_argument_group("with --model, and with --demo topics")
    both.add_argument("--batch", type=options.positive, help=f"examples a step, over all processes, default {BATCH}")
    both.add_argument(
        "--max-length", type=options.positive, metavar="TOKENS", help=f"default {MAX_LENGTH}, of the topics 64"
    )
    add = parser.add_argument_group("with --model: your own model and data; also under torchrun").add_argument
    add("--model", metavar="FOLDER_OR_ID", help="a transformers model, in a folder or on the hub")
    add(
        "--data", metavar="FILE_OR_ID", help=".jsonl, .csv, .tsv, or an id of the package datasets, name or name:config"
    )
    add("--validation", metavar="FILE_OR_FRACTION", help=f"to evaluate on; default the data's own, or {FRACTION} of it")
    add("--text-column", metavar="NAMES", help="one, or several as a,b; default text")
    add("--label-column", metavar="NAME", help=f"the class, or the text to write; default {LABEL_COLUMN}")
    add("--task", choices=TASKS, help="default text-to-text of an encoder-decoder model, else classification")
    add("--method", choices=tuple(METHODS), help="default compacter")
    rates = ", ".join(f"{name} {method.rate:g}" for name, method in METHODS.items())
    add("--learning-rate", type=rate, metavar="RATE", help=f"default {rates}")
    add("--reduction-factor", type=rate, metavar="FACTOR", help="of the adapters, default 32")
    add("--phm-dim", type=options.positive, metavar="N", help="of the adapters, default 4")
    add("--seed", type=_seed, help="the first of --seeds, default 0")
    add("--accumulate", type=options.positive, metavar="PARTS", help="parts that a batch is computed in, default 1")
    add("--bf16", action="store_true", help="train under autocast to bfloat16")
    add("--save-every", type=options.positive, metavar="STEPS", help="a checkpoint, default once an epoch")
    add("--resume", action="store_true", help="go on with the run in --out, from its checkpoint")


def use(args: argparse.Namespace) -> str:
    """Which of the three uses the options ask for.

    Raises:
        ValueError: options of different uses together, or one that is missing.
    """
    if args.model is not None and args.demo is not None:
        raise ValueError("--demo brings its own model and data; give --demo or --model, not both")
    found = OWN if args.model is not None else TOPICS if args.demo == "topics" else DIGITS
    for name, uses in USES.items():
        if getattr(args, name) not in (None, False) and found not in uses:
            option = f"--{name.replace('_', '-')}"
            belongs = " and to ".join(uses)
            raise ValueError(f"{option} belongs to {belongs}, and this is {found}; see compacter-kernels train --help")
    if found == OWN and args.data is None:
        raise ValueError("--model needs --data: what to train on")
    return found
