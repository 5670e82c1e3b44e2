"""The options of the training scripts on the command line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from compacter_kernels import options
from digits_methods import METHODS as DIGITS_METHODS
from text_methods import METHODS

STEPS, QUICK_STEPS = 300, 100
SEEDS, QUICK_SEEDS = 3, 1
PRETRAINING_STEPS, QUICK_PRETRAINING_STEPS = 400, 200
BATCH, MAX_LENGTH, EPOCHS = 32, 128, 3
ONE_THREAD = "on layers this small, more gain little, and lose much where the machine has other work"
TASKS = ("classification", "text-to-text")


def run_script(description: str, add: Callable[[argparse.ArgumentParser], None], run: Callable[..., int]) -> int:
    """Read the options of one script and run it. An error is one line, with exit code 2."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    add_common_options(parser)
    add(parser)
    try:
        return run(parser.parse_args())
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of every script."""
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=options.positive, help=f"of each run, default of the digits {STEPS}")
    epochs = f"the same, as passes over the training data, default of the others {EPOCHS}"
    length.add_argument("--epochs", type=options.positive, help=epochs)
    add = parser.add_argument
    add("--seeds", type=options.positive, help=f"runs of each method, default of a demonstration {SEEDS}, else 1")
    add("--threads", type=options.positive, help=f"default torch's; of the digits 1: {ONE_THREAD}")
    add("--out", type=Path, default=Path("out/train"), metavar="FOLDER", help="default out/train")
    add("--json", action="store_true", help="print train.json instead of the table")


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Declare the options of both demonstrations."""
    parser.add_argument("--methods", type=_methods, metavar="NAMES", help="of a demonstration, see below; default all")


def add_digits_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demonstration on handwritten digits."""
    add = parser.add_argument_group("of the digits demonstration").add_argument
    add("--pretraining-steps", type=options.positive, metavar="STEPS", help=f"default {PRETRAINING_STEPS}")
    add("--quick", action="store_true", help="under a minute: fewer steps, one seed, learning rates not searched")
    add("--no-plot", action="store_true", help="draw no losses.png")


def add_batches(parser: argparse.ArgumentParser) -> None:
    """Declare the options of all training on texts."""
    add = parser.add_argument_group("with --model, and with --demo topics").add_argument
    add("--batch", type=options.positive, help=f"examples a step, over all processes, default {BATCH}")
    add("--max-length", type=options.positive, metavar="TOKENS", help=f"default {MAX_LENGTH}, of the topics 64")


def add_own_options(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Declare the options of training your own model on your own data."""
    add = parser.add_argument_group("with --model: your own model and data; also under torchrun").add_argument
    add("--model", metavar="FOLDER_OR_ID", required=required, help="a transformers model, in a folder or on the hub")
    files = ".jsonl, .csv, .tsv, or an id of the package datasets, name or name:config"
    add("--data", metavar="FILE_OR_ID", required=required, help=files)
    add("--validation", metavar="FILE_OR_FRACTION", help="to evaluate on; default the data's own, or 0.1 of it")
    add("--text-column", metavar="NAMES", help="one, or several as a,b; default text")
    add("--label-column", metavar="NAME", help="the class, or the text to write; default label")
    add("--task", choices=TASKS, help="default text-to-text of an encoder-decoder model, else classification")
    add("--method", choices=tuple(METHODS), help="default compacter")
    rates = ", ".join(f"{name} {method.rate:g}" for name, method in METHODS.items())
    add("--learning-rate", type=_rate, metavar="RATE", help=f"default {rates}")
    add("--reduction-factor", type=_rate, metavar="FACTOR", help="of the adapters, default 32")
    add("--phm-dim", type=options.positive, metavar="N", help="of the adapters, default 4")
    add("--phm-rank", type=options.positive, metavar="R", help="of the adapters, default 1")
    add("--seed", type=_seed, help="the first of --seeds, default 0")
    add("--accumulate", type=options.positive, metavar="PARTS", help="parts that a batch is computed in, default 1")
    add("--bf16", action="store_true", help="train under autocast to bfloat16")
    add("--save-every", type=options.positive, metavar="STEPS", help="a checkpoint, default once an epoch")
    add("--resume", action="store_true", help="go on with the run in --out, from its checkpoint")


def _methods(text: str) -> tuple[str, ...]:
    """Names of methods, in the order of the table."""
    wanted = options.names(text)
    unknown = [name for name in wanted if name not in DIGITS_METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known; choose of {', '.join(DIGITS_METHODS)}")
    return tuple(name for name in DIGITS_METHODS if name in wanted)


def _rate(text: str) -> float:
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
