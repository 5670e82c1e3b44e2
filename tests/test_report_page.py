"""The report page: what it shows of the results, and that it holds everything itself."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from compacter_kernels import cli
from compacter_kernels.bench import report
from compacter_kernels.bench.report_page import page, svg
from compacter_kernels.bench.report_page.look import look
from compacter_kernels.bench.report_page.results import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EPYC = RESULTS / "epyc-2core"
PAGES = sorted(RESULTS.glob("*/report.html"))


@pytest.fixture(scope="module")
def html() -> str:
    return page.html(load(EPYC))


def section(html: str, identifier: str) -> str:
    return html.split(f'<section id="{identifier}">')[1].split("</section>")[0]


def marks(html: str) -> list[str]:
    return re.findall(r'<\w+ role="img" aria-label="([^"]*)" data-mark=""', html)


def test_every_time_is_a_mark_with_its_quantiles(html: str) -> None:
    (table, _) = json.loads((EPYC / "bench.json").read_text(encoding="utf-8"))["tables"]
    found = marks(section(html, "time0"))
    assert len(found) == len(table["rows"])
    row = next(row for row in table["rows"] if row["provider"] == "cpu" and row["tokens"] == 8192)
    times = [report.duration(row[key]) for key in ("ms", "ms_q20", "ms_q80")]
    words = "cpu, 8192 tokens: {} (20 % {}, 80 % {}), {:.2f} times the copy"
    assert words.format(*times, row["over_equal_copy"]) in found


def test_speed_ups_are_ratios_to_ours(html: str) -> None:
    row = {(r["provider"], r["direction"]): r["ms"] for r in cell("epyc-2core", (768, 24, 4), 8192)}
    ratio = row["dense", "forward"] / row["cpu", "forward"]
    assert any(
        mark.startswith(f"dense, forward: {ratio:.2f} times our time") for mark in marks(section(html, "peers0"))
    )


def cell(machine: str, shape: tuple[int, ...], tokens: int) -> list[dict[str, Any]]:
    (sweep, *_) = load(RESULTS / machine).sweeps
    return sweep.select(**dict(zip("kdn", shape, strict=True)), tokens=tokens)


def test_roofs_are_the_rates_of_the_run(html: str) -> None:
    roofline = section(html, "roofline0")
    assert "copy, 45 GB/s" in roofline and "sgemm, 222 GFLOP/s" in roofline


def test_rows_beside_other_load_are_said() -> None:
    (sweep,) = load(RESULTS / "xeon-avx512-2core").sweeps
    assert not any(row["quiet"] for row in sweep.rows)
    shown = page.html(load(RESULTS / "xeon-avx512-2core"))
    assert f"Other load disturbed {len(sweep.rows)} of {len(sweep.rows)} rows" in shown


def test_every_chart_has_words_and_numbers(html: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    assert len(figures) == html.count("<svg ") > 20
    for figure in figures:
        assert re.search(r"<figcaption>.+?</figcaption>", figure)
        assert 'tabindex="0"' in figure and 'aria-label="' in figure
        assert figure.count("<tr>") > 1 and marks(figure)


@pytest.mark.parametrize("path", [*PAGES, RESULTS / "index.html"], ids=lambda path: path.parent.name)
def test_a_page_is_small_and_loads_nothing(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 2 * 2**20
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|@import|url\(|<link|<img|<script src", text)
    for target in re.findall(r'href="([^"#]+)"', text):
        assert (path.parent / target).is_file(), f"{path} points to {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_links_within_a_page_work(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r'href="#([^"]+)"', text)
    assert targets and set(targets) == set(re.findall(r'<section id="([^"]+)"', text))


def test_a_first_call_is_shown_by_its_phases(tmp_path: Path) -> None:
    times = {f"{phase}_ms": 100.0 for phase in ("total", "cpu", "python", "import", "construct", "first", "second")}
    row = {"provider": "adapters", "what": "", **times, "total_ms_q20": 90.0, "total_ms_q80": 110.0, "samples": 5}
    absent = [{"provider": "lora", "reason": "peft is not installed"}]
    machine = {"time": "2026-12-01", "cpu": "a processor", "revision": "abc"}
    first = {"tokens": 9, "rows": [row], "absent": absent, "machine": machine}
    (tmp_path / "first_call.json").write_text(json.dumps(first), encoding="utf-8")
    shown = section(page.html(load(tmp_path)), "first")
    phases = [f"adapters, {phase}: 100 ms" for phase in ("python", "import", "construct", "first")]
    assert marks(shown) == [*phases, "adapters: 0.10 s of the processor"]
    assert "Absent: lora: peft is not installed" in shown


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], html: str) -> None:
    assert cli.main(["report", str(EPYC), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html


@pytest.mark.parametrize(("folder", "words"), [("missing", "is not a folder"), (".", "has no bench.json")])
def test_a_folder_without_results_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str, words: str
) -> None:
    assert cli.main(["report", str(tmp_path / folder)]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_scales() -> None:
    assert svg.Log(1, 100, 0, 50)(10) == pytest.approx(25)
    assert svg.Log(0.5, 20, 0, 1).ticks() == [0.5, 1, 2, 5, 10, 20]
    assert svg.Log(1, 1e4, 0, 1).ticks() == [1, 10, 100, 1000, 10000]
    assert svg.Linear(22, 0, 44)(11) == 22
    assert svg.Linear(23, 0, 1).ticks() == [0, 10, 20]
    assert (svg.number(0.1234), svg.number(1234), svg.number(56789)) == ("0.123", "1,234", "57k")
    assert (svg.count(1), svg.count(2048), svg.count(1500)) == ("1", "2k", "1,500")


def test_labels_are_moved_apart() -> None:
    moved = svg.spread([50, 49, 10, 98], 10, 0, 100)
    assert moved[2] == 10 and moved[3] == pytest.approx(98)
    ordered = sorted(moved)
    assert all(after - before >= 10 for before, after in itertools.pairwise(ordered))
    assert moved[1] < moved[0]


def test_text_of_results_cannot_become_markup() -> None:
    assert svg.tag("g", aria_label='a"<b>') == '<g aria-label="a&quot;&lt;b&gt;"></g>'
    assert svg.label("<b>", 0, 0) == '<text x="0" y="0">&lt;b&gt;</text>'


def test_looks_belong_to_families() -> None:
    assert [look(name) for name in ("cpu", "module", "factored-compiled", "lokr", "unknown")] == [
        "ours",
        "ours variant",
        "factored variant",
        "lokr",
        "other variant",
    ]


def index() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import report_index
    finally:
        sys.path.pop(0)
    return report_index


def revision(scale: float, dense: float = 1.0) -> Any:
    """A revision whose fused kernel takes `scale` ms, beside a copy of 1 ms."""
    times = {"copy": 1.0, "dense": 10.0 * dense, "cpu": scale}
    shape = {"k": 768, "d": 24, "n": 4, "tokens": 8192, "direction": "forward"}
    rows = [{**shape, "provider": p, "ms": t, "ms_q20": 0.98 * t, "ms_q80": 1.02 * t} for p, t in times.items()]
    machine = {"revision": f"r{scale}", "time": f"{scale}"}
    module = index()
    return module.Revision(module.Sweep("", {"dtype": "float32"}, {"rows": rows, "machine": machine}))


@pytest.mark.parametrize(
    ("after", "slower"),
    [(revision(1.5), True), (revision(1.1), False), (revision(0.9), False), (revision(1.5, dense=1.5), False)],
    ids=["slower", "within the ranges", "faster", "dense is slower too"],
)
def test_a_regression_is_beyond_both_ranges(after: Any, slower: bool) -> None:
    assert bool(index().regressions([revision(1.0), after])) is slower
