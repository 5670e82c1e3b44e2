"""Texts with their targets, from a JSON-lines or CSV file or by the package `datasets`."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

FRACTION = 0.1  # of the data, for validation
SEPARATORS = {".csv": ",", ".tsv": "\t"}
FILES = (".jsonl", *SEPARATORS)
TEXT_COLUMNS, LABEL_COLUMN = ("text",), "label"
Row = dict[str, Any]


class Texts(NamedTuple):
    """Examples: the texts of each, one for each text column, and its target."""

    inputs: list[tuple[str, ...]]
    targets: list[str]

    def take(self, rows: Sequence[int]) -> Texts:
        """Some of the examples."""
        return Texts([self.inputs[row] for row in rows], [self.targets[row] for row in rows])

    def digest(self) -> str:
        """A SHA-256 of all of it, by which a run that is taken up again knows its data."""
        return hashlib.sha256(json.dumps(self, ensure_ascii=False).encode()).hexdigest()


class Split(NamedTuple):
    """What to train on and what to evaluate on."""

    train: Texts
    validation: Texts


def load(
    source: str,
    validation: str | None = None,
    text_columns: Sequence[str] = TEXT_COLUMNS,
    label_column: str = LABEL_COLUMN,
) -> Split:
    """The data of a file (.jsonl, .csv or .tsv) or of an id of `datasets`, `name` or `name:config`.

    Args:
        validation: another such file, or the fraction of the data to hold out, 0.1 unless it is from `datasets` and has
            a validation split of its own. What is held out is the same in every run.

    Raises:
        ValueError, OSError, ImportError: naming the file, the line and the column, and what would do.
    """
    fraction = _fraction(validation)
    own: list[Row] | None = None
    if _is_file(source):
        rows = _rows_of_file(Path(source))
    else:
        rows, own = _rows_of_hub(source, label_column)
    if validation is not None:
        own = None if fraction is not None else _rows_of_file(Path(validation))
    texts = _texts(rows, source, text_columns, label_column)
    if own is not None:
        return Split(texts, _texts(own, validation or source, text_columns, label_column))
    return _divide(texts, FRACTION if fraction is None else fraction)


def _fraction(text: str | None) -> float | None:
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


def _rows_of_file(path: Path) -> list[Row]:
    if path.suffix not in FILES:
        raise ValueError(f"{path} is neither of {', '.join(FILES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            if path.suffix in SEPARATORS:
                rows: list[Row] = list(csv.DictReader(file, delimiter=SEPARATORS[path.suffix], strict=True))
            else:
                rows = [_object(line, path, number) for number, line in enumerate(file, 1) if line.strip()]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no examples")
    return rows


def _object(line: str, path: Path, number: int) -> Row:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}, line {number}: an object is expected, got {type(found).__name__}")
    return found


def _rows_of_hub(source: str, label_column: str) -> tuple[list[Row], list[Row] | None]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{source} is no file; to get it by its id, pip install datasets (now: {error})", name="datasets"
        ) from error
    name, _, config = source.partition(":")
    found = load_dataset(name, config or None)
    if "train" not in found:
        raise ValueError(f"{source} has no split train, but {', '.join(found)}")

    def rows(split: Any) -> list[Row]:
        feature = split.features.get(label_column)
        names = getattr(feature, "names", None)  # of a ClassLabel, whose values are numbers
        return [{**row, label_column: names[row[label_column]]} if names else dict(row) for row in split]

    return rows(found["train"]), rows(found["validation"]) if "validation" in found else None


def _texts(rows: list[Row], source: str, text_columns: Sequence[str], label_column: str) -> Texts:
    found: list[tuple[str, ...]] = []
    targets: list[str] = []
    for number, row in enumerate(rows, 1):
        for option, column in (*(("--text-column", name) for name in text_columns), ("--label-column", label_column)):
            if column not in row:
                present = ", ".join(map(str, row))
                raise ValueError(
                    f"{source}, example {number}, has no column {column!r}; set {option} to one of {present}"
                )
            if not isinstance(row[column], str | int | float) or not str(row[column]).strip():
                raise ValueError(f"{source}, example {number}: {column} must be a text, got {row[column]!r}")
        found.append(tuple(str(row[column]) for column in text_columns))
        targets.append(str(row[label_column]))
    return Texts(found, targets)


def _divide(texts: Texts, fraction: float) -> Split:
    count = len(texts.targets)
    held = max(1, round(fraction * count))
    if held >= count:
        raise ValueError(f"{count} examples cannot be divided; give more, or a file for --validation")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return Split(texts.take(order[held:]), texts.take(order[:held]))
