"""examples/compress_layer.py on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import compress_layer
import train_topics
from compacter_kernels import InputStatistics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_the_error_is_that_of_the_outputs() -> None:
    x, dense, fitted = (torch.randn(shape, dtype=torch.float64) for shape in ((50, 8), (5, 8), (5, 8)))
    stats = InputStatistics()
    stats.update(x)
    expected = (x @ (dense - fitted).T).norm() / (x @ dense.T).norm()
    assert compress_layer.output_error(stats, dense, fitted) == pytest.approx(expected.item())


def test_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        train_topics.encoder_folder()
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(compress_layer, "EVERY", 40)
    monkeypatch.setattr(compress_layer, "FORMS", ((4, 1),))
    assert compress_layer.main(["--seeds", "2", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "layer.json").read_text(encoding="utf-8"))
    for ((to_matrix, to_outputs),) in document["errors"]:
        assert to_outputs < to_matrix - 0.02
