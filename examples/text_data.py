"""Texts with their targets, read by the package `datasets` from your file or by an id of the hub.

`load` gives two datasets, to train on and to evaluate on. Each has two columns: `texts`, the texts
of an example (one, or a pair), and `target`, the label or the text to write.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

FRACTION = 0.1  # the part of the data that is held out for validation
SEPARATORS = {".csv": ",", ".tsv": "\t"}
FILES = (".jsonl", *SEPARATORS)
TEXT_COLUMNS, LABEL_COLUMN = ("text",), "label"


def load(
    source: str,
    validation: str | None = None,
    text_columns: Sequence[str] = TEXT_COLUMNS,
    label_column: str = LABEL_COLUMN,
) -> tuple[Dataset, Dataset]:
    """The examples to train on and to evaluate on.

    Args:
        source: a file (.jsonl, .csv or .tsv), or an id of the hub, `name` or `name:config`.
        validation: another file to evaluate on, or the fraction of the data to hold out. Without
            it, the data's own split "validation" is used, or a tenth of the data. Every run holds
            out the same examples.

    Raises:
        ValueError, OSError: the message names the file, the line or example, and the column.
    """
    fraction = _fraction(validation)
    splits = {"train": read_file(Path(source))} if _is_file(source) else _read_hub(source, label_column)
    if "train" not in splits:
        raise ValueError(f"{source} has no split train, but {', '.join(splits)}")
    train = _texts(splits["train"], source, text_columns, label_column)
    if validation is not None and fraction is None:
        return train, _texts(read_file(Path(validation)), validation, text_columns, label_column)
    if validation is None and "validation" in splits:
        return train, _texts(splits["validation"], source, text_columns, label_column)
    return _divide(train, FRACTION if fraction is None else fraction)


def digest(texts: Dataset) -> str:
    """A SHA-256 of all examples. A resumed run compares it with that of its checkpoint."""
    return hashlib.sha256(json.dumps([*texts], ensure_ascii=False).encode()).hexdigest()


def read_file(path: Path) -> Dataset:
    """The rows of a file. Values of .csv and .tsv are strings, as they are written."""
    if path.suffix not in FILES:
        raise ValueError(f"{path} is neither of {', '.join(FILES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    header = _check_lines(path)
    kind, options = "json", {}
    if path.suffix in SEPARATORS:
        separator = SEPARATORS[path.suffix]
        strings = Features({name: Value("string") for name in next(csv.reader([header], delimiter=separator))})
        kind = "csv"
        options = {"sep": separator, "features": strings, "keep_default_na": False, "index_col": False}
    try:
        return load_dataset(kind, data_files=str(path), split="train", encoding="utf-8-sig", **options)
    except DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error


def _check_lines(path: Path) -> str:
    """The first line, after a check that there are examples, and objects alone in a .jsonl."""
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    lines = [*lines[:1], line]
                    if path.suffix == ".jsonl":
                        _check_object(line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(lines) <= (path.suffix in SEPARATORS):  # nothing, or a header alone
        raise ValueError(f"{path} has no examples")
    return lines[0]


def _check_object(line: str, where: str) -> None:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}, is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an object is expected, got {type(row).__name__}")


def _read_hub(source: str, label_column: str) -> dict[str, Dataset]:
    """The splits of that id; a label that is stored as a number is given by its name."""
    name, _, config = source.partition(":")
    splits: dict[str, Dataset] = dict(load_dataset(name, config or None))
    for key, split in splits.items():
        names = getattr(split.features.get(label_column), "names", None)
        if names:
            labels = [names[number] for number in split[label_column]]
            splits[key] = split.remove_columns(label_column).add_column(label_column, labels)
    return splits


def _texts(rows: Dataset, source: str, text_columns: Sequence[str], label_column: str) -> Dataset:
    """The examples with the two columns `texts` and `target`, after a check of every value."""
    for option, column in (*(("--text-column", name) for name in text_columns), ("--label-column", label_column)):
        if column not in rows.column_names:
            present = ", ".join(rows.column_names)
            raise ValueError(f"{source}, example 1, has no column {column!r}; set {option} to one of {present}")
    columns = (*text_columns, label_column)
    for number, row in enumerate(rows, 1):
        for column in columns:
            if not isinstance(row[column], str | int | float) or not str(row[column]).strip():
                raise ValueError(f"{source}, example {number}: {column} must be a text, got {row[column]!r}")
    texts = [[str(row[column]) for column in text_columns] for row in rows]
    return Dataset.from_dict({"texts": texts, "target": [str(value) for value in rows[label_column]]})


def _fraction(text: str | None) -> float | None:
    """The number that --validation gives; None if it gives a file or nothing."""
    try:
        number = None if text is None else float(text)
    except ValueError:
        return None
    if number is not None and not 0 < number < 1:
        raise ValueError(f"--validation as a fraction must lie between 0 and 1, got {text}")
    return number


def _is_file(source: str) -> bool:
    path = Path(source)
    if path.is_dir():
        raise IsADirectoryError(f"--data {source} is a folder; give a file ({', '.join(FILES)}) or an id of datasets")
    return path.exists() or path.suffix in FILES


def _divide(texts: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    held = max(1, round(fraction * len(texts)))
    if held >= len(texts):
        raise ValueError(f"{len(texts)} examples cannot be divided; give more, or a file for --validation")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return texts.select(order[held:]), texts.select(order[:held])


def classes_of(train: Dataset, validation: Dataset) -> list[str]:
    """The labels in order; those that are numbers stand in the order of the numbers.

    Raises:
        ValueError: the training data has fewer than two labels, or lacks one of the validation
            data.
    """

    def position(name: str) -> tuple[int, Any]:
        return (int(name), name) if name.isdecimal() else (-1, name)

    classes = sorted(set(train["target"]), key=position)
    if len(classes) < 2:
        raise ValueError(
            f"a classification takes two labels or more; the data has {', '.join(map(repr, classes))} alone"
        )
    unknown = sorted(set(validation["target"]) - set(classes))
    if unknown:
        raise ValueError(f"the validation data has labels that the training data lacks: {', '.join(unknown[:8])}")
    return classes
