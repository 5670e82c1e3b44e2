"""The command line: exit codes, one-line errors, JSON, and missing optional packages."""

from __future__ import annotations

import json
import runpy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels import accuracy, cli, dispatch
from compacter_kernels.cases import Inputs

SMALL = ["--shapes", "24/12/4", "--tokens", "5"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def wrong_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every impl that is checked, except dense, gives a wrong output."""
    right = accuracy.call

    def call(impl: str) -> accuracy.Function:
        def function(case: Inputs) -> Tensor:
            return right(impl)(case) * (1.0 if impl == "dense" else 1.001)

        return function

    monkeypatch.setattr("compacter_kernels.compare.call", call)
    monkeypatch.setattr("compacter_kernels.info.call", call)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"compacter-kernels {command}" in out.partition("examples:")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"compacter-kernels {ck.__version__}\n", "")


def test_module_is_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["compacter_kernels", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("compacter_kernels", run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, f"compacter-kernels {ck.__version__}\n")


def test_info_passes_its_self_test(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "info", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["impls"] == ck.available_impls()
    assert found["torch"] == torch.__version__
    tested = {row["impl"] for row in found["self_test"] if row["holds"]}
    assert tested == {name for name, reason in ck.available_impls().items() if reason is None}
    assert set(found["typical_call"]["others"]) == set(ck.available_impls()) - {found["typical_call"]["impl"]}


def test_info_text_names_every_impl_and_why_not(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("compacter_kernels.impl.cpu.unavailable", lambda: "not built: no compiler")
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert "cpu        not built: no compiler" in out
    assert "ok   dense" in out and "ok   cpu" not in out


@pytest.mark.parametrize(
    ("native", "line"),
    [
        ({"built": False, "reason": "no compiler"}, "not built: no native part"),
        ({"cuda_archs": [], "cuda_missing": "nvcc was not found"}, "not built: nvcc was not found"),
        ({"cuda_archs": ["sm_80", "sm_90"]}, "sm_80, sm_90"),
    ],
    ids=["pure", "without", "with"],
)
def test_info_says_what_the_cuda_part_was_built_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, native: dict[str, Any], line: str
) -> None:
    monkeypatch.setattr("compacter_kernels.info.self_test", list)
    monkeypatch.setattr("compacter_kernels.machine.native", lambda: {"built": True, "isa_in_use": "avx2", **native})
    _, out, _ = run(capsys, "info")
    assert f"CUDA part          {line}\n" in out


@pytest.mark.usefixtures("wrong_bias")
def test_info_fails_where_an_impl_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 1
    assert "FAIL factored" in out and "ok   dense" in out


def test_compare_prints_every_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "compare", *SMALL, "--residual", "other", "--rank", "2")
    assert (code, err) == (0, "")
    for name in ("out", "x", "residual", "down.rule", "down.left", "up.right", "up.bias"):
        assert f"  {name} " in out
    assert "every error is within its limit" in out


def test_an_environment_that_cannot_serve_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch.cpu, "unavailable", lambda: "not built: no compiler")
    monkeypatch.setenv("COMPACTER_KERNELS_IMPL", "cpu")
    code, out, err = run(capsys, "info")
    assert (code, out) == (2, "")
    assert "COMPACTER_KERNELS_IMPL='cpu'" in err and "not built: no compiler" in err
    assert err.count("\n") == 1


def test_compare_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "compare", *SMALL, "--json", "--dtype", "bf16", "--impl", "factored", "--init", "paper")
    found = json.loads(out)
    assert code == 0 and found["holds"]
    assert [case["operation"] for case in found["cases"]] == ["adapter", "linear"]
    assert all(case["dtype"] == "bfloat16" and list(case["impls"]) == ["factored"] for case in found["cases"])
    assert all(row["error"] <= row["limit"] for case in found["cases"] for row in case["impls"]["factored"])


def test_compare_says_who_cannot_serve(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("compacter_kernels.impl.cpu.unavailable", lambda: "not built: no compiler")
    code, out, _ = run(capsys, "compare", *SMALL)
    assert code == 0
    assert "without cpu: " in out and "not built: no compiler" in out


@pytest.mark.usefixtures("wrong_bias")
def test_compare_fails_where_an_impl_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "compare", *SMALL)
    assert code == 1
    assert "!" in out and "above their limits" in err


WRONG = [
    ([], "required: COMMAND"),
    (["frobnicate"], "'frobnicate'"),
    (["compare", "--shapes", "768/24/5"], "choose one of 1, 2, 3, 4, 6, 8, 12, 24"),
    (["compare", "--shapes", "768x24"], "a shape is k/d/n, such as 768/24/4"),
    (["compare", "--tokens", "0"], "an integer >= 1"),
    (["compare", "--tokens", ","], "got nothing"),
    (["compare", "--dtype", "int8"], "choose one of float32, bfloat16"),
    (["compare", "--activation", "swoosh"], "choose one of identity, relu"),
    (["compare", "--impl", "fast"], "choose of dense, factored"),
    (["bench", "--impl", "fast"], "choose of copy, dense"),
    (["bench", "--seconds", "-1"], "--seconds must be a number > 0"),
    (["bench", "--page-faults", "some"], "'some'"),
    (["bench", "--no-plot", "--out", __file__], "test_cli.py"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), WRONG, ids=lambda value: "-".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1 and err.startswith("compacter-kernels")


def test_an_impl_that_cannot_serve_is_an_error_when_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("compacter_kernels.impl.cpu.unavailable", lambda: "not built: no compiler")
    for command in ("compare", "bench"):
        code, _, err = run(capsys, command, *SMALL, "--impl", "cpu")
        assert code == 2
        assert "not built: no compiler" in err


def test_the_environment_variable_is_checked(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COMPACTER_KERNELS_IMPL", "fastest")
    code, _, err = run(capsys, "info")
    assert code == 2
    assert "COMPACTER_KERNELS_IMPL='fastest' is not known" in err


def test_a_plot_without_matplotlib_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, "bench", *SMALL)
    assert code == 2
    assert "pip install" in err and "--no-plot" in err


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def missing(_: object) -> int:
        raise ModuleNotFoundError("No module named 'sklearn.datasets'", name="sklearn.datasets")

    monkeypatch.setattr("compacter_kernels.info.run", missing)
    code, _, err = run(capsys, "info")
    assert code == 2
    assert "pip install scikit-learn" in err
