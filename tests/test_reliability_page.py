"""docs/reliability.md has every test of a failure, with the committed counts."""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "reliability_page.py"


def marked() -> dict[str, str]:
    """The tests with the marker `failure`, and what it says."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if ast.unparse(decorator).startswith("pytest.mark.failure("):
                    found[f"tests/{path.name}::{node.name}"] = ast.literal_eval(decorator.args[0])
    return found


@pytest.fixture(autouse=True)
def beside_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script imports another one of its folder."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def test_the_page_has_the_committed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["reliability_page.py", "--check"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 0, "run python benchmarks/reliability_page.py"


def test_the_counts_are_of_the_tests_that_are_there() -> None:
    counts = json.loads((ROOT / "benchmarks/results/reliability/counts.json").read_text(encoding="utf-8"))
    assert {row["test"]: row["failure"] for row in counts["tests"]} == marked(), f"run python {SCRIPT.name} --run"
    assert all(row["inputs"] > 0 for row in counts["tests"])


def test_counts_of_a_report(tmp_path: Path) -> None:
    """Inputs that a test reports, and its parameters, are added. A skipped test does not count."""
    report = tmp_path / "report.xml"
    kept = '<properties><property name="failure" value="f"/>{}</properties>'
    inputs = '<property name="inputs" value="40"/>'
    cases = [
        f'<testcase classname="tests.test_a" name="test_x[1]">{kept.format(inputs)}</testcase>',
        f'<testcase classname="tests.test_a" name="test_x[2]">{kept.format("")}</testcase>',
        f'<testcase classname="tests.test_a" name="test_x[3]">{kept.format(inputs)}<skipped/></testcase>',
        '<testcase classname="tests.test_a" name="test_y"/>',
    ]
    report.write_text(f"<testsuite>{''.join(cases)}</testsuite>", encoding="utf-8")
    count = runpy.run_path(str(SCRIPT))["count"]
    assert count(report) == [{"failure": "f", "test": "tests/test_a.py::test_x", "inputs": 41}]
