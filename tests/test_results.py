"""The numbers in the README are those of the committed results."""

from __future__ import annotations

import json
import re
import runpy
import statistics
from pathlib import Path

import pytest

import compress_layer
import text_report as report
from compacter_kernels.bench import first_call, report as bench_report

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


def test_the_report_pages_show_the_committed_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report_pages.py", "--check"])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / "report_pages.py"), run_name="__main__")
    assert stop.value.code == 0, f"run python benchmarks/report_pages.py: {capsys.readouterr().out}"


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_a_picture_with_measured_numbers_names_the_file_that_they_come_from(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    if any(re.fullmatch(r"[\d.,]+ ?(x|ms|us|s|%|GB/s|MiB)", each.strip()) for each in shown):
        source = re.search(r"<desc>From (\S+)</desc>", text)
        assert source is not None, f"{picture.name} does not say which committed file it shows"
        assert (ROOT / source[1]).is_file()


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


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/results").glob("*/first_call.json")), ids=lambda path: path.parent.name
)
def test_the_committed_first_calls_are_those_of_their_json(path: Path, tmp_path: Path) -> None:
    first_call.write(json.loads(path.read_text(encoding="utf-8")), tmp_path)
    for name in ("first_call.json", "first_call.txt"):
        assert (tmp_path / name).read_bytes() == (path.parent / name).read_bytes()


@pytest.mark.parametrize(
    "machine", ["epyc-2core", "epyc-2core/bf16", "xeon-2core", "xeon-480mib-2core", "xeon-avx512-2core"]
)
def test_the_committed_tables_are_those_of_their_json(machine: str, tmp_path: Path) -> None:
    folder = ROOT / "benchmarks" / "results" / machine
    bench_report.write(json.loads((folder / "bench.json").read_text(encoding="utf-8")), tmp_path)
    for name in ("bench.json", "bench.csv", "bench.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
