"""The study of the sizes of adapters runs, and the picture of its page has the committed rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import choose_sizes
import choosing_plot
from choose_sizes import Sizes

ROOT = Path(__file__).resolve().parents[1]


def test_it_writes_a_row_for_each_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_sizes, "PRETRAINING_STEPS", 1)
    monkeypatch.setattr(choose_sizes, "VARIED", (Sizes(phm_dim=8, phm_rank=2), Sizes(phm_dim=None)))
    assert choose_sizes.main(["--seeds", "2", "--steps", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "sizes.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["phm_dim"], row["phm_rank"], len(row["errors"])) for row in rows] == [(8, 2, 2), (None, 1, 2)]
    assert choose_sizes.text(rows) in (tmp_path / "sizes.txt").read_text(encoding="utf-8")


def test_the_committed_table_is_that_of_its_json() -> None:
    folder = ROOT / "benchmarks" / "results" / "choose_sizes"
    rows = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))["rows"]
    assert choose_sizes.text(rows) + "\n" == (folder / "sizes.txt").read_text(encoding="utf-8")


def test_the_picture_has_every_row() -> None:
    """Each option varies in one column of panels; the sizes that all share are in each of them."""
    rows = choosing_plot.rows()
    assert {Sizes(row["phm_dim"], row["phm_rank"], row["reduction_factor"]) for row in rows} == set(choose_sizes.VARIED)
    figure = choosing_plot.draw(rows)
    points = sum(len(line.get_xdata()) for panel in figure.axes[:3] for line in panel.lines[:1])
    assert points == len(choose_sizes.VARIED) - 1 + 2
