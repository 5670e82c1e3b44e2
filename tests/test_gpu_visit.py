"""benchmarks/gpu_run.sh and its scripts, as far as they can run without a GPU.

A dry run shows a wrong name or option here, and not on a machine that is lent for some minutes.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compacter_kernels.bench import cuda as bench_cuda
from compacter_kernels.bench.settings import CUDA
from compacter_kernels.cases import Case, Shape
from compacter_kernels.dispatch import IMPLS
from compacter_kernels.impl import cpu
from compacter_kernels.impl.module import MODULE

OPTIONS = (
    "AB",
    "BENCH",
    "DEADLINE",
    "FAMILY",
    "IMPLS",
    "PYTEST",
    "STAGES",
    "VARIANTS",
)  # of gpu_run.sh, and of the Makefile
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPE = Shape(48, 24, 4)
INPUTS = Case.of(SHAPE, 20, dtype=torch.bfloat16).inputs()
needs_cpu = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu: {cpu.unavailable()}")


def visit(out: Path, **environment: str) -> tuple[int, dict[str, dict[str, int]], dict[str, str], str]:
    """The exit code of a dry run, the stages, the files of the archive, and what was printed."""
    given = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name not in OPTIONS
    }
    given |= {"DRY": "1", "PYTHON": sys.executable, "WORKERS": "2", **environment}
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_run.sh"), str(out)], capture_output=True, text=True, env=given, check=False
    )
    assert [path.name for path in out.iterdir()] == ["visit.tar.gz"], done.stdout + done.stderr
    with tarfile.open(out / "visit.tar.gz") as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        files = {Path(m.name).name: archive.extractfile(m).read().decode() for m in members}  # type: ignore[union-attr]
    return done.returncode, json.loads(files["stages.json"]), files, done.stdout + done.stderr


@pytest.mark.slow
def test_a_dry_run_reads_every_command_line(tmp_path: Path) -> None:
    code, stages, files, printed = visit(tmp_path)
    assert code == 0, printed
    expected = "build machine first_0 first_1 ab family_cuda family_triton ncu memcheck racecheck tests large bench"
    assert " ".join(name for name in stages if name != "model") == expected
    assert all(stage["exit_code"] == 0 for stage in stages.values())
    assert {f"{name}.log" for name in stages} <= set(files)
    assert json.loads(files["machine.json"])["torch"] == torch.__version__
    assert "tests collected" in files["tests.log"] and "test_gpu_agreement.py::test_adapter" in files["tests.log"]
    assert "test_more_than_2_to_the_31_elements" in files["large.log"]
    assert "test_more_than_2_to_the_31_elements" not in files["tests.log"]
    assert "'kernels': ['cuda', 'triton']" in files["ab.log"]
    assert "'providers': ['dense', " in files["bench.log"] and "'cuda', 'triton']" in files["bench.log"]


@pytest.mark.parametrize(
    ("environment", "code", "said"),
    [
        ({"STAGES": "ab", "AB": "--wrong"}, 2, "unrecognized arguments: --wrong"),
        ({"STAGES": "tests", "PYTEST": "tests/gpu/none.py"}, 4, "tests/gpu/none.py"),
        ({"STAGES": "memcheck", "DEADLINE": "3"}, 124, "no time was left"),
    ],
    ids=["wrong option", "wrong file", "no time"],
)
def test_a_stage_that_fails_is_recorded(environment: dict[str, str], code: int, said: str, tmp_path: Path) -> None:
    found, stages, files, _ = visit(tmp_path, **environment)
    assert found == 1
    name = environment["STAGES"]
    assert stages[name]["exit_code"] == code
    assert said in files[f"{name}.log"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("timeout") is None, reason="there is no timeout")
def test_tests_that_find_no_time_to_end_are_reported(tmp_path: Path) -> None:
    """A stop leaves the failures until then, and tests.xml."""
    (tmp_path / "test_slow.py").write_text(
        "import time\n\ndef test_fails():\n    assert False\n\ndef test_hangs():\n    time.sleep(60)\n",
        encoding="utf-8",
    )
    python = tmp_path / "python"  # it runs that file in place of tests/gpu
    python.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "xml = [a for a in sys.argv if a.startswith('--junitxml')] or sys.exit(1)  # no module is there\n"
        f"command = [sys.executable, '-m', 'pytest', '-ra', '-c', '/dev/null', *xml, {str(tmp_path)!r}]\n"
        "os.execv(command[0], command)\n",
        encoding="utf-8",
    )
    python.chmod(0o755)
    out = tmp_path / "out"
    code, stages, files, printed = visit(out, STAGES="tests", DEADLINE="12", PYTHON=str(python))
    assert (code, stages["tests"]["exit_code"]) == (1, 124), printed
    assert "FAILED" in printed and "test_fails" in files["tests.xml"]


def test_a_script_that_reads_no_arguments_fails_the_dry_run() -> None:
    """Otherwise a dry run would begin the work itself."""
    for script in sorted(BENCHMARKS.glob("gpu_*.py")):
        if script.name not in ("gpu_kernels.py", "gpu_dry.py"):
            assert "parse_args()" in script.read_text(encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "gpu_dry.py", "gpu_kernels.py"]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "read no arguments" in done.stderr


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts as modules, on one small shape."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("gpu_kernels", "gpu_first", "gpu_ab", "gpu_profile")
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    monkeypatch.setattr(modules.gpu_first, "SHAPES", (SHAPE,))
    monkeypatch.setattr(modules.gpu_first, "TOKENS", (1, 20))
    return modules


@needs_cpu
def test_the_first_look_tells_right_from_wrong(scripts: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_first.py", "cpu", "--device", "cpu"])
    assert scripts.gpu_first.main() == 0
    assert capsys.readouterr().out.count("ok  ") == 2
    right = scripts.gpu_first.adapter
    monkeypatch.setattr(scripts.gpu_first, "adapter", lambda name: lambda inputs: right(name)(inputs) * 1.5)
    assert scripts.gpu_first.main() == 1
    assert capsys.readouterr().out.count("FAIL") == 1  # the first failure is the last look


@needs_cpu
def test_the_timed_calls_are_the_adapter(scripts: Any) -> None:
    forward, backward = (scripts.gpu_ab.timed("cpu", d, INPUTS)(INPUTS) for d in scripts.gpu_ab.DIRECTIONS)
    leaves = INPUTS.map(lambda t: t.clone().requires_grad_())
    out = scripts.gpu_kernels.adapter("cpu")(leaves)
    assert torch.equal(forward(), out)
    expected = torch.autograd.grad(out, list(leaves.tensors().values()), INPUTS.grad)
    assert all(map(torch.equal, backward(), expected))
    copy, add = (scripts.gpu_ab.timed("copy", d, INPUTS)(INPUTS) for d in scripts.gpu_ab.DIRECTIONS)
    assert torch.equal(copy(), INPUTS.x) and torch.equal(add(), INPUTS.x + INPUTS.grad)


class Timer(bench_cuda.Timer):
    """The timer without a device. Each call runs once; the first takes 1 us, the second 2."""

    def __init__(self, cell: Any, dtype: torch.dtype) -> None:
        self.cell, self.case, self.timings = cell, INPUTS, {}

    @staticmethod
    def describe() -> dict[str, Any]:
        return {"device": None, "rates": {}}

    @staticmethod
    def too_large(cell: Any, dtype: torch.dtype) -> str | None:
        return "skipped: too large" if cell.tokens > 20 else None

    def capture(self, bind: Any, direction: str) -> Any:
        bind(self.case)()
        seconds = (1 + len(self.timings)) * 1e-6
        return SimpleNamespace(quantiles=lambda: (seconds,) * 3, columns=lambda: {"samples": 1})

    def measure(self, rounds: int | None, seconds: float) -> None:
        assert rounds == 3


@needs_cpu
def test_the_rows_of_a_comparison(scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_cuda, "Timer", Timer)
    out = tmp_path / "ab.json"
    options = ["--shapes", str(SHAPE), "--tokens", "20,40", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", ["gpu_ab.py", str(out), "cpu", "triton", *options])
    assert scripts.gpu_ab.main() == 1  # triton does not serve the CPU
    rows = json.loads(out.read_text())["rows"]
    assert [(row["kernel"], row["direction"]) for row in rows] == [
        (kernel, direction) for direction in scripts.gpu_ab.DIRECTIONS for kernel in ("copy", "cpu", "triton")
    ]
    assert [row.get("of_copy") for row in rows[:3]] == [1.0, 0.5, None]
    assert rows[1]["us"] == pytest.approx(2.0) and rows[1]["tokens"] == 20
    assert rows[2]["error"].startswith("RuntimeError: triton cannot serve: ")
    text = out.with_suffix(".txt").read_text()
    assert "50.0%  cpu" in text and "triton: RuntimeError" in text


@pytest.mark.skipif(MODULE is None, reason="the native part is not built")
def test_another_build_is_loaded_beside_this_one(scripts: Any, tmp_path: Path) -> None:
    other = scripts.gpu_kernels.native(shutil.copy(MODULE.__file__, tmp_path))
    assert other is not MODULE and other.build_info() == MODULE.build_info()
    with pytest.raises(ValueError, match="nothing is neither an impl nor a build of the native part"):
        scripts.gpu_kernels.kernel_of("nothing", INPUTS)


def test_the_kernels_of_a_visit_are_impls_and_its_shapes_those_of_the_sweep(scripts: Any) -> None:
    assert {"cuda", "triton"} <= set(IMPLS)
    assert set(scripts.gpu_kernels.SHAPES) <= set(CUDA.shapes)
