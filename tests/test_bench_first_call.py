"""The first call: its programs run, it is split into phases, and it imports nothing late.

No test here depends on a measured time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compacter_kernels import cli
from compacter_kernels.bench import first_call
from compacter_kernels.bench.first_programs import OURS, PROGRAMS, source
from compacter_kernels.cases import Shape

SHAPE = Shape(24, 12, 4)


def test_a_process_gives_the_seconds_of_its_phases(tmp_path: Path) -> None:
    phases = first_call.once(source(PROGRAMS[OURS], SHAPE, 5), 1, str(tmp_path))
    assert len(phases) == len(first_call.PHASES) + 2 and min(phases) > 0
    assert list(tmp_path.rglob("compacter_kernels/__init__.*.pyc"))  # for the next process


def test_the_first_call_imports_no_module() -> None:
    """torch imports some of its own when they are first used, and that can take seconds."""
    code = """
import sys
import torch
import compacter_kernels as ck
adapter, x = ck.CompacterAdapter(24, reduction_factor=2), torch.randn(5, 24, requires_grad=True)
before = set(sys.modules)
adapter(x).sum().backward()
print(sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_python_without_places_left(name: str) -> None:
    text = source(PROGRAMS[name], SHAPE, 5)
    compile(text, name, "exec")
    assert not any(f"{{{place}}}" in text for place in ("k", "d", "n", "factor", "tokens", "kind"))


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no such layer"):
        first_call.once("raise ValueError('no such layer')", 1, str(tmp_path))


@pytest.mark.parametrize("options", [["--quick"], ["--dtype", "bf16"], ["--device", "cuda"]], ids=" ".join)
def test_an_option_without_effect_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--first-call", *options]) == 2
    assert "has no meaning with --" in capsys.readouterr().err


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def once(text: str, threads: int, bytecode: str) -> list[float]:
        if "import adapters" in text:
            raise RuntimeError("no adapters here")
        return [0.1, 1.0 if "compacter_kernels" in text else 2.0, 0.1, 0.1, 0.1, 0.5, 0.2]

    monkeypatch.setattr(first_call, "once", once)
    monkeypatch.setattr(first_call, "version", lambda package: "1.0")
    assert cli.main(["bench", "--first-call", "--threads", "1", "--rounds", "3", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "first_call.json").read_text())
    assert out == (tmp_path / "first_call.txt").read_text() + "\n"
    assert "absent: adapters: no adapters here" in out
    rows = {row["provider"]: row for row in found["rows"]}
    assert rows[OURS]["total_ms"] == pytest.approx(1300) and rows[OURS]["samples"] == 3
    assert rows["bottleneck"]["import_ms"] == pytest.approx(2000)
    assert set(rows) | {"adapters", "adapters-compiled"} == set(PROGRAMS)


def test_programs_are_chosen_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_call, "once", lambda text, threads, bytecode: [0.1] * (len(first_call.PHASES) + 2))
    chosen = ["bench", "--first-call", "--impl", "bottleneck", "--out", str(tmp_path)]
    assert cli.main(chosen) == 0
    found = json.loads((tmp_path / "first_call.json").read_text())
    assert [row["provider"] for row in found["rows"]] == ["bottleneck"]
    assert {row["reason"] for row in found["absent"]} == {"left out by --impl"}
    assert cli.main(["bench", "--first-call", "--impl", "fast"]) == 2


def test_ours_must_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(text: str, threads: int, bytecode: str) -> list[float]:
        raise RuntimeError("nothing runs")

    monkeypatch.setattr(first_call, "once", once)
    assert cli.main(["bench", "--first-call", "--out", str(tmp_path)]) == 1


def test_each_process_has_new_caches_of_the_compiler(tmp_path: Path) -> None:
    code = f"import os; print(*(float(os.path.exists(os.environ[name])) for name in {first_call.CACHES!r}), *[0] * 6)"
    assert first_call.once(code, 1, str(tmp_path)) == [0.0] * (len(first_call.PHASES) + 2)
