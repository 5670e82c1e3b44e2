"""All training scripts as one: the options choose the script that runs.

    python examples/train_any.py --help

`compacter-kernels train` is this script.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import train_options as options
from digits_methods import METHODS

DIGITS, TOPICS, OWN = "the digits demonstration", "--demo topics", "--model"
SCRIPTS = {DIGITS: "train_digits", TOPICS: "train_topics", OWN: "train_text"}
USES = {  # the uses of those options that not every use has
    **dict.fromkeys(("pretraining_steps", "quick", "no_plot"), (DIGITS,)),
    "methods": (DIGITS, TOPICS),
    **dict.fromkeys(("batch", "max_length"), (TOPICS, OWN)),
    **dict.fromkeys(("data", "validation", "text_column", "label_column", "task", "method", "seed", "resume"), (OWN,)),
    **dict.fromkeys(("reduction_factor", "phm_dim", "phm_rank"), (OWN,)),
    **dict.fromkeys(("learning_rate", "accumulate", "bf16", "save_every"), (OWN,)),
}
EPILOG = """examples:
  compacter-kernels train --quick
  compacter-kernels train --methods probe,compacter-dense,compacter --seeds 5 --out results
  compacter-kernels train --model bert-base-uncased --data reviews.csv --method compacter --out reviews
  torchrun --nproc-per-node 2 -m compacter_kernels train --model t5-base --data glue:mrpc \\
      --text-column sentence1,sentence2 --method compacter++ --epochs 10 --out mrpc

digits, the default:
{methods}

A vision transformer is pretrained on the digits 0 to 4 that come with scikit-learn, then adapted to 5 to 9. The
learning rate of each method is chosen on a validation split; the accuracy is that on a test split. Written into the
folder --out: train.csv, train.json, losses.csv and losses.png. Exits 0 when Compacter through dense and through the
fused impl gave the same loss curve, and 1 when they did not.

--demo topics: all-MiniLM-L6-v2, a pretrained encoder that the extra `text` installs, tells from which of eight topics
of Python's reference a sentence is; learning rates and accuracies as above.

--model: your own. Written into --out: train.csv, train.txt, train.json, and for each seed a folder with losses.csv and
what was trained: the adapter as save_adapter writes it, or trained.safetensors, or the whole model. A run that was
stopped goes on with --resume, to the same bits.

The scripts, to read and to copy: {folder}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of all scripts."""
    options.add_common_options(parser)
    add_other_options(parser)


def add_other_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that not every script has."""
    methods = "\n".join(f"  {name:<16} {method.title}" for name, method in METHODS.items())
    parser.epilog = EPILOG.format(methods=methods, folder=Path(__file__).resolve().parent)
    options.add_methods(parser)
    parser.add_argument("--demo", choices=("digits", "topics"), help="without --model; default digits")
    options.add_digits_options(parser)
    options.add_batches(parser)
    options.add_own_options(parser)


def use(args: argparse.Namespace) -> str:
    """Which of the three uses the options ask for; ValueError if some do not go together."""
    if args.model is not None and args.demo is not None:
        raise ValueError("--demo brings its own model and data; give --demo or --model, not both")
    chosen = OWN if args.model is not None else TOPICS if args.demo == "topics" else DIGITS
    for name, uses in USES.items():
        if getattr(args, name) not in (None, False) and chosen not in uses:
            option = f"--{name.replace('_', '-')}"
            belongs = " and to ".join(uses)
            raise ValueError(f"{option} belongs to {belongs}, and this is {chosen}; see compacter-kernels train --help")
    if chosen == OWN and args.data is None:
        raise ValueError("--model needs --data: what to train on")
    return chosen


def run(args: argparse.Namespace) -> int:
    """Run the script that the options ask for, after a check that they go together."""
    code: int = importlib.import_module(SCRIPTS[use(args)]).run(args)
    return code


if __name__ == "__main__":
    raise SystemExit(options.run_script("adapt a transformers model to your data", add_other_options, run))
