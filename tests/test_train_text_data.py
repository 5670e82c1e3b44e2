"""Texts from files and by id: reading, division and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_text import rows, save_rows

pytest.importorskip("datasets")

import datasets

import text_data
from text_data import classes_of, load

# datasets closes a CSV file only when it is garbage collected
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.tsv"])
def test_files(name: str, tmp_path: Path) -> None:
    examples = rows(40)
    path = tmp_path / name
    if name.endswith("tsv"):
        path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in examples))
    else:
        save_rows(path, examples)
    train, validation = load(str(path))
    together = sorted((*texts, target) for part in (train, validation) for texts, target in map(dict.values, part))
    assert together == sorted((row["text"], row["label"]) for row in examples)
    assert len(validation) == 4
    assert [part.to_list() for part in load(str(path))] == [train.to_list(), validation.to_list()]
    assert len(load(str(path), "0.5")[1]) == 20


def test_a_file_for_validation(tmp_path: Path) -> None:
    train, validation = save_rows(tmp_path / "a.jsonl", rows(10)), save_rows(tmp_path / "b.csv", rows(6, seed=1))
    parts = load(str(train), str(validation))
    assert [len(part) for part in parts] == [10, 6]
    assert parts[1]["texts"][:] == [[row["text"]] for row in rows(6, seed=1)]


def test_other_columns_numbers_and_quotes(tmp_path: Path) -> None:
    """Values that look like a number or a missing value stay as they are written."""
    row = {"first": 'say "a, b"', "second": "line\nbreak", "class": "007", "more": "NA"}
    path = save_rows(tmp_path / "a.csv", [row] * 4)
    train, _ = load(str(path), None, ["first", "second", "more"], "class")
    assert train["texts"][0] == ['say "a, b"', "line\nbreak", "NA"]
    assert train["target"][0] == "007"
    train, _ = load(str(save_rows(tmp_path / "a.jsonl", [{"text": "a", "label": 3}] * 4)))
    assert train["target"][0] == "3"


@pytest.mark.parametrize("own", [False, True])
def test_by_id_of_datasets(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes get their names. The validation split of the data is used if there is one."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cold", "warm"])}
    )

    def split(texts: list[str]) -> Any:
        columns = {"text": texts, "label": [number % 2 for number in range(len(texts))]}
        return datasets.Dataset.from_dict(columns, features=features)

    splits = datasets.DatasetDict(train=split([f"t{number}" for number in range(20)]))
    if own:
        splits["validation"] = split(["v"])
    asked = []
    monkeypatch.setattr(text_data, "load_dataset", lambda *arguments: asked.append(arguments) or splits)
    train, validation = load("glue:mrpc")
    assert asked == [("glue", "mrpc")]
    assert set(train["target"]) == {"cold", "warm"}
    assert (len(train), len(validation)) == ((20, 1) if own else (18, 2))


BROKEN = {
    "no file": ("none.csv", None, FileNotFoundError, "none.csv is not there"),
    "a folder": (".", None, IsADirectoryError, "is a folder; give a file"),
    "another kind": ("a.txt", "x", ValueError, "neither of .jsonl, .csv, .tsv"),
    "empty": ("a.csv", "", ValueError, "has no examples"),
    "a header alone": ("a.csv", "text,label\n", ValueError, "has no examples"),
    "no JSON": ("a.jsonl", '{"text": "a", "label": "b"}\n{"text"\n', ValueError, "line 2, is not JSON"),
    "no object": ("a.jsonl", "[1]\n", ValueError, "line 1: an object is expected, got list"),
    "no text": ("a.csv", "sentence,label\na,b\n", ValueError, "no column 'text'; set --text-column to one of sentence"),
    "no label": (
        "a.csv",
        "text,class\na,b\n",
        ValueError,
        "no column 'label'; set --label-column to one of text, class",
    ),
    "an empty text": ("a.csv", "text,label\na,b\n ,b\n", ValueError, "example 2: text must be a text, got ' '"),
    "a short row": ("a.csv", "text,label\na,b\na\n", ValueError, "example 2: label must be a text, got ''"),
    "a long row": ("a.csv", "text,label\na,b\na,b,c\n", ValueError, "cannot be read"),
    "a list": ("a.jsonl", '{"text": ["a"], "label": 1}\n', ValueError, "example 1: text must be a text"),
    "one example": ("a.csv", "text,label\na,b\n", ValueError, "1 examples cannot be divided"),
    "not UTF-8": ("a.csv", b"text,label\n\xff,b\n", ValueError, "cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    name, content, kind, match = BROKEN[case]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=match):
        load(str(tmp_path / name))


@pytest.mark.parametrize("fraction", ["0", "1", "1.5", "-1", "nan"])
def test_fractions_that_are_none(fraction: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--validation as a fraction must lie between 0 and 1"):
        load(str(save_rows(tmp_path / "a.csv", rows(8))), fraction)


def test_labels() -> None:
    def texts(*targets: str) -> Any:
        return datasets.Dataset.from_dict({"texts": [["x"]] * len(targets), "target": list(targets)})

    assert classes_of(texts("10", "9", "9"), texts("9")) == ["9", "10"]
    assert classes_of(texts("b", "a"), texts()) == ["a", "b"]
    with pytest.raises(ValueError, match="two labels or more; the data has 'a' alone"):
        classes_of(texts("a", "a"), texts("a"))
    with pytest.raises(ValueError, match="labels that the training data lacks: c"):
        classes_of(texts("a", "b"), texts("c"))
