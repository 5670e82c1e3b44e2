"""The numbers in the README are those of the committed results."""

from __future__ import annotations

import json
import runpy
import statistics
from pathlib import Path

import pytest

import compress_layer
import text_report as report
from compacter_kernels.bench import report as bench_report

ROOT = Path(__file__).parents[1]


def test_the_table_of_topics_is_that_of_its_json() -> None:
    folder = ROOT / "benchmarks" / "results" / "topics"
    document = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    assert report.table(document["methods"]) in (folder / "train.txt").read_text(encoding="utf-8")
    for row, results in zip(document["methods"], document["test"].values(), strict=True):
        assert row["mean"] == statistics.mean(100 * result["accuracy"] for result in results)
        assert len(results) == document["settings"]["seeds"]


def test_the_readme_states_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["readme_table.py", "--check"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"), run_name="__main__")
    assert stop.value.code == 0, "run python benchmarks/readme_table.py"


def test_the_page_on_training_states_the_committed_results() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    document = json.loads((ROOT / "benchmarks" / "results" / "topics" / "train.json").read_text(encoding="utf-8"))
    for row in document["methods"]:
        cells = f"| {row['mean']:.2f} ± {row['std']:.2f} | {row['trainable_parameters']:,} |"
        assert f"| {row['method']} {cells}" in page


def test_the_page_on_compression_states_the_errors_of_the_layer() -> None:
    page = (ROOT / "docs" / "compress.md").read_text(encoding="utf-8")
    folder = ROOT / "benchmarks" / "results" / "compress_layer"
    table = compress_layer.table(json.loads((folder / "layer.json").read_text(encoding="utf-8"))["errors"])
    assert table in page
    assert table + "\n" == (folder / "layer.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("machine", ["epyc-2core", "epyc-2core/bf16", "xeon-2core"])
def test_the_committed_tables_are_those_of_their_json(machine: str, tmp_path: Path) -> None:
    folder = ROOT / "benchmarks" / "results" / machine
    bench_report.write(json.loads((folder / "bench.json").read_text(encoding="utf-8")), tmp_path)
    for name in ("bench.json", "bench.csv", "bench.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
