"""`compacter-kernels train`: a demonstration on handwritten digits, one on sentences, or your own model and data."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from compacter_kernels import options
from compacter_kernels.machine import describe
from compacter_kernels.train import experiment, plot, report
from compacter_kernels.train.data import load_tasks
from compacter_kernels.train.loop import BATCH
from compacter_kernels.train.methods import METHODS, build, impl_of
from compacter_kernels.train.model import VisionTransformer
from compacter_kernels.train.text import options as text_options

STEPS, QUICK_STEPS = 300, 100
SEEDS, QUICK_SEEDS = 3, 1
PRETRAINING_STEPS, QUICK_PRETRAINING_STEPS = 400, 200
ROUNDS, QUICK_ROUNDS = 40, 10
ONE_THREAD = "on layers this small, more gain little, and lose much where the machine has other work"

EPILOG = f"""examples:
  compacter-kernels train --quick
  compacter-kernels train --methods probe,compacter-dense,compacter --seeds 5 --out results
  compacter-kernels train --model bert-base-uncased --data reviews.csv --method compacter --out reviews
  torchrun --nproc-per-node 2 -m compacter_kernels train --model t5-base --data glue:mrpc \\
      --text-column sentence1,sentence2 --method compacter++ --epochs 10 --out mrpc

digits, the default:
{chr(10).join(f"  {name:<16} {method.title}" for name, method in METHODS.items())}

A vision transformer is pretrained on the digits 0 to 4 that come with scikit-learn, then adapted to 5 to 9. The
learning rate of each method is chosen on a validation split; the accuracy is that on a test split. Written into the
folder --out: train.csv, train.json, losses.csv and losses.png. Exits 0 when Compacter through dense and through the
fused impl gave the same loss curve, and 1 when they did not.

--demo topics: all-MiniLM-L6-v2, a pretrained encoder that the extra `text` installs, tells from which of eight topics
of Python's reference a sentence is; learning rates and accuracies as above.

--model: your own. Written into --out: train.csv, train.txt, train.json, and for each seed a folder with losses.csv and
what was trained: the adapter as save_adapter writes it, or trained.safetensors, or the whole model. A run that was
stopped goes on with --resume, to the same bits."""


def _methods(text: str) -> tuple[str, ...]:
    """Names of methods, in the table's order."""
    wanted = options.names(text)
    unknown = [name for name in wanted if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known; choose of {', '.join(METHODS)}")
    return tuple(name for name in METHODS if name in wanted)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `train`."""
    parser.epilog = EPILOG
    add = parser.add_argument
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=options.positive, help=f"of each run, default of the digits {STEPS}")
    epochs = f"the same, as passes over the training data, default of the others {text_options.EPOCHS}"
    length.add_argument("--epochs", type=options.positive, help=epochs)
    add("--seeds", type=options.positive, help=f"runs of each method, default of a demonstration {SEEDS}, else 1")
    add("--methods", type=_methods, metavar="NAMES", help="of a demonstration, see below; default all")
    add("--threads", type=options.positive, help=f"default torch's; of the digits 1: {ONE_THREAD}")
    add("--out", type=Path, default=Path("out/train"), metavar="FOLDER", help="default out/train")
    add("--json", action="store_true", help="print train.json instead of the table")
    add("--demo", choices=("digits", "topics"), help="without --model; default digits")
    add = parser.add_argument_group("of the digits demonstration").add_argument
    add("--pretraining-steps", type=options.positive, metavar="STEPS", help=f"default {PRETRAINING_STEPS}")
    add("--quick", action="store_true", help="under a minute: fewer steps, one seed, learning rates not searched")
    add("--no-plot", action="store_true", help="draw no losses.png")
    text_options.add_arguments(parser)


def _settings(args: argparse.Namespace, images: int) -> experiment.Settings:
    steps = args.epochs * (images // BATCH) if args.epochs else args.steps
    return experiment.Settings(
        steps=steps or (QUICK_STEPS if args.quick else STEPS),
        seeds=args.seeds or (QUICK_SEEDS if args.quick else SEEDS),
        methods=args.methods,
        pretraining_steps=args.pretraining_steps or (QUICK_PRETRAINING_STEPS if args.quick else PRETRAINING_STEPS),
        rounds=QUICK_ROUNDS if args.quick else ROUNDS,
        search=not args.quick,
    )


def _prepare(out: Path, methods: tuple[str, ...]) -> None:
    """Raise before anything is trained where the results could not be written, or the asked-for impl cannot serve."""
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"--out {out} cannot be written to")
    for name in methods:
        impl_of(build(METHODS[name], VisionTransformer(1, layers=1), classes=1, seed=0))


def run(args: argparse.Namespace) -> int:
    """What the options ask for, after a look whether they go together."""
    use = text_options.use(args)
    if use == text_options.OWN:
        from compacter_kernels.train.text import command

        return command.run(args)
    if use == text_options.TOPICS:
        from compacter_kernels.train.text import topics

        return topics.run(args)
    args.methods = args.methods or tuple(METHODS)
    return _digits(args)


def _digits(args: argparse.Namespace) -> int:
    """Train, print the table and write the files; 0 unless the two Compacter loss curves differ."""
    from tqdm import tqdm

    pretraining, task = load_tasks()
    settings = _settings(args, len(task.train.labels))
    _prepare(args.out, args.methods)
    no_plot = None if args.no_plot else plot.missing()
    if no_plot:
        print(no_plot, file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or 1)
    try:
        with tqdm(total=settings.work(), unit="step", disable=not sys.stderr.isatty()) as bar:
            outcome = experiment.run(pretraining, task, settings, bar.update)
        machine = describe()
    finally:
        torch.set_num_threads(threads)
    report.write(outcome, settings, machine, args.out)
    if not args.no_plot and not no_plot:
        plot.draw(outcome, args.out / "losses.png")
    if args.json:
        print(json.dumps(report.document(outcome, settings, machine), indent=2))
    else:
        print(
            report.heading(outcome, pretraining, task, settings, machine["threads"]), report.table(outcome), sep="\n\n"
        )
        print(report.verdict(outcome), report.NOTES, f"written into {args.out}", sep="\n")
    return 0 if outcome.agreement is None or outcome.agreement.holds else 1
