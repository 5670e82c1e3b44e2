"""tools/matrix.py and what CI asks of it, without an installation."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = "{}.{}".format(*sys.version_info)


@pytest.fixture
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "tools" / "matrix.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_python_is_an_error_before_any_work(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["matrix.py", "--python", "2.99"])
    monkeypatch.setattr(matrix, "cells", None)
    with pytest.raises(SystemExit, match=r"Python 2\.99 is not on the path"):
        matrix.main()


def test_the_wheel_of_each_python_is_found(matrix: ModuleType, tmp_path: Path) -> None:
    names = ("x-0.1.0-cp310-cp310-linux_x86_64.whl", "x-0.1.0-cp313-cp313-linux_x86_64.whl")
    wheels = [tmp_path / name for name in names]
    assert matrix.choose(wheels, "3.13") == wheels[1].resolve()
    assert matrix.choose([tmp_path / "x-0.1.0+pure-py3-none-any.whl"], "3.13").name.endswith("any.whl")
    with pytest.raises(SystemExit, match=r"one wheel for Python 3\.12, got \[\]"):
        matrix.choose(wheels, "3.12")


@pytest.mark.parametrize("passes", [True, False])
def test_a_failed_cell_is_shown_and_sets_the_exit_code(
    passes: bool, matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"python": HERE, "torch": "2.6.0", "triton": "none", "tests" if passes else "failure": "what pytest said"}
    monkeypatch.setattr("sys.argv", ["matrix.py", "--torch", "2.6.0"])
    monkeypatch.setattr(matrix, "cells", lambda *arguments: [row])
    assert matrix.main() == (0 if passes else 1)
    shown = capsys.readouterr().out
    assert "what pytest said" in shown
    assert ("FAILED" in shown) is not passes


def test_rows_of_other_versions_are_kept_and_sorted(matrix: ModuleType, tmp_path: Path) -> None:
    rows = [{"python": "3.13", "torch": torch, "triton": "none", "tests": torch} for torch in ("2.10.0+cpu", "2.9.1")]
    for row in rows:
        matrix.write([row], tmp_path)
    matrix.write([{**rows[0], "tests": "again"}], tmp_path)
    lines = (tmp_path / "matrix.md").read_text(encoding="utf-8").splitlines()[2:]
    assert [line.split(" | ")[-1] for line in lines] == ["2.9.1 |", "again |"]


def test_a_row_of_newest_that_failed_replaces_no_row_of_none(matrix: ModuleType, tmp_path: Path) -> None:
    rows = [{"python": "3.10", "torch": "2.6.0", "triton": triton} for triton in ("newest", "none", "3.6.0")]
    matrix.write(rows, tmp_path)
    lines = (tmp_path / "matrix.md").read_text(encoding="utf-8").splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == ["none", "3.6.0", "newest"]


def test_the_short_suite_is_there_and_needs_the_tests_alone() -> None:
    lines = (ROOT / "tests" / "short.txt").read_text(encoding="utf-8").splitlines()
    files = [ROOT / line for line in lines if line.startswith("tests/")]
    assert files and all(file.is_file() for file in files)
    assert not any(re.search(r"examples|benchmarks|ROOT\b", file.read_text(encoding="utf-8")) for file in files)


def test_wheels_are_built_for_every_python_that_the_project_names() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = {line.rpartition(" ")[2] for line in settings["project"]["classifiers"] if "Python :: 3." in line}
    built = settings["tool"]["cibuildwheel"]["build"]
    assert {f"cp{version.replace('.', '')}-*" for version in named} == set(built)
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8")
    assert f"python: {sorted(named)}".replace("'", '"') in workflow
