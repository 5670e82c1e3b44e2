"""Words with labels such as B-PER, I-PER and O: files, batches, and the F1 of the names."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NO_LABEL = -100  # of pieces that are not the first of a word; cross_entropy leaves them out
Sentence = list[tuple[str, str]]  # the words, each with its label


class Batch(NamedTuple):
    """Sentences as hidden states (B, S, width), with a mask (B, S) and labels (B, S)."""

    hidden: Tensor
    mask: Tensor
    labels: Tensor


def read_sentences(path: Path, limit: int | None = None) -> list[Sentence]:
    """The sentences of a file, or `limit` of them, the same each time.

    A line is a word, a tab and a label. An empty line ends a sentence.

    Raises:
        FileNotFoundError, ValueError: no such file, or a line of another form.
    """
    sentences: list[Sentence] = [[]]
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line:
            sentences.append([])
            continue
        word, tab, label = line.partition("\t")
        if not tab or not (label == "O" or label[:2] in ("B-", "I-")):
            raise ValueError(f"{path}, line {number}: expected a word, a tab and O, B-NAME or I-NAME, got {line!r}")
        sentences[-1].append((word, label))
    return drawn([sentence for sentence in sentences if sentence], limit)


def drawn(sentences: list[Sentence], limit: int | None) -> list[Sentence]:
    """All sentences, or `limit` of them in a fixed random order."""
    if limit is None or limit >= len(sentences):
        return sentences
    return random.Random(0).sample(sentences, limit)


class Tagger(nn.Module):
    """An encoder in two parts, the lower of which no adapter changes, and a linear head."""

    def __init__(self, encoder: Any, top: int, classes: int) -> None:
        super().__init__()
        layers = encoder.encoder.layer
        self.upper = type(encoder.encoder)(encoder.config)
        self.upper.layer = nn.ModuleList(layers[-top:])
        encoder.encoder.layer = nn.ModuleList(layers[:-top])
        self.lower = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The outputs of the lower part (B, S, width) -> logits (B, S, classes)."""
        added = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        out: Tensor = self.head(self.upper(hidden, attention_mask=added[:, None, None]).last_hidden_state)
        return out


class Encoded:
    """Sentences as the outputs of the lower part, which are computed once.

    Args:
        labels: all labels; the class of a label is its number.
    """

    def __init__(self, tagger: Tagger, tokenizer: Any, sentences: Sequence[Sentence], labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        order = sorted(range(len(sentences)), key=lambda row: len(sentences[row]))  # little padding
        rows: dict[int, tuple[Tensor, Tensor]] = {}
        for start in range(0, len(order), 64):
            numbers = order[start : start + 64]
            words = [[word for word, _ in sentences[number]] for number in numbers]
            tokens = tokenizer(words, is_split_into_words=True, padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                hidden = tagger.lower(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
            for row, number in enumerate(numbers):
                of_words = [label for _, label in sentences[number]]
                classes = _classes(tokens.word_ids(row), of_words, labels)
                count = int(tokens["attention_mask"][row].sum())
                rows[number] = hidden[row, :count].clone(), torch.tensor(classes[:count])
        self.rows = [rows[number] for number in range(len(sentences))]  # (pieces, width), (pieces,)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        """All sentences, those of about equal length together; in random order with a seed."""
        order = list(range(len(self.rows)))
        shuffle = random.Random(seed)
        if seed is not None:
            shuffle.shuffle(order)
        pool = len(order) if seed is None else 8 * size  # sorted within a pool, so that a batch is not of one length
        order = [
            row
            for start in range(0, len(order), pool)
            for row in sorted(order[start : start + pool], key=lambda row: len(self.rows[row][0]))
        ]
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        if seed is not None:
            shuffle.shuffle(groups)
        for group in groups:
            hidden, classes = [self.rows[row][0] for row in group], [self.rows[row][1] for row in group]
            lengths = torch.tensor([len(row) for row in classes])
            yield Batch(
                nn.utils.rnn.pad_sequence(hidden, batch_first=True),
                torch.arange(int(lengths.max())) < lengths[:, None],
                nn.utils.rnn.pad_sequence(classes, batch_first=True, padding_value=NO_LABEL),
            )


def _classes(words: Sequence[int | None], of_words: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The class of each piece: the label of its word for the first piece, NO_LABEL for others."""
    found, before = [], None
    for word in words:
        first = word is not None and word != before
        found.append(labels.index(of_words[word]) if first else NO_LABEL)  # type: ignore[index]
        before = word
    return found


def names_in(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first word, word after the last, kind) of each name.

    I-KIND without a name of that kind before it begins a name.
    """
    found, start, kind = set(), 0, ""
    for position, label in enumerate([*labels, "O"]):
        if kind and (label[0] != "I" or label[2:] != kind):
            found.add((start, position, kind))
            kind = ""
        if label != "O" and not kind:
            start, kind = position, label[2:]
    return found


class Counts:
    """Names that were found and names that are there, over many sentences."""

    def __init__(self) -> None:
        self.right = self.found = self.there = 0

    def add(self, logits: Tensor, classes: Tensor, labels: Sequence[str]) -> None:
        """Count those of a batch. logits (B, S, classes), classes (B, S)."""
        for predicted, true in zip(logits.argmax(-1), classes, strict=True):
            kept = true != NO_LABEL
            one, other = (names_in([labels[number] for number in row[kept].tolist()]) for row in (predicted, true))
            self.right, self.found, self.there = (
                self.right + len(one & other),
                self.found + len(one),
                self.there + len(other),
            )

    @property
    def f1(self) -> float:
        """2 * right / (found + there), in percent."""
        return 200.0 * self.right / max(1, self.found + self.there)
