"""The choice of the impl: the order of "auto", explicit choices, the environment, the log line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import BF16, FP64, FUSED, IMPLS, Case, problem, weights
from torch import Tensor
from torch.nn import functional as F

import compacter_kernels as ck
from compacter_kernels import call_path, dispatch, proof
from compacter_kernels.dispatch import Class, Ranking

LINEAR, ADAPTER = Case("linear"), Case()


@pytest.fixture(autouse=True)
def nothing_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_path, "_plans", {})
    monkeypatch.setattr(dispatch, "_announced", set())


def _explain(case: Case, **options: Any) -> dispatch.Explanation:
    tensors = case.tensors()
    if case.operation == "linear":
        return ck.explain(tensors["x"], weights(tensors), **options)
    return ck.explain(tensors["x"], weights(tensors, "down."), weights(tensors, "up."), **options)


@pytest.mark.parametrize(
    ("installed", "reason"), [("3.5.1", "triton 3.5.1 is installed; 3.6 or later is needed"), ("3.10.0", None)]
)
def test_an_old_triton_is_not_tried(monkeypatch: pytest.MonkeyPatch, installed: str, reason: str | None) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed)
    assert dispatch.IMPLS["triton"]._too_old() == reason  # type: ignore[attr-defined]


def test_available_impls() -> None:
    impls = ck.available_impls()
    assert {"dense", "factored", "cpu"} <= set(impls)
    assert impls["dense"] is impls["factored"] is None
    assert impls["cpu"] is None or "not built" in impls["cpu"]


@pytest.mark.parametrize("case", [LINEAR, ADAPTER], ids=str)
def test_auto_takes_the_first_that_serves(case: Case) -> None:
    first = "factored" if ck.available_impls()["cpu"] else "cpu"
    explanation = _explain(case)
    assert explanation.impl == first
    assert set(explanation.others) == set(ck.available_impls()) - {first}
    assert all(explanation.others.values())
    assert str(explanation).startswith(f"{first}: ")
    assert "not dense: " in str(explanation)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake sm_90 that every impl except cpu serves, as far as the choice is concerned."""
    monkeypatch.setattr("compacter_kernels.dispatch.architecture", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    for name in ("triton", "cuda"):
        monkeypatch.setattr(dispatch.IMPLS[name], "unavailable", lambda: None)
        monkeypatch.setattr(dispatch.IMPLS[name], "refuses", lambda problem: None)
    monkeypatch.setattr(proof, "failure", lambda problem, name, impl: "")
    monkeypatch.setattr(proof, "earlier_failure", lambda problem, name: "")


def _chosen(case: Case) -> dispatch.Explanation:
    return dispatch.explain(problem(case, "cuda"))


@pytest.mark.usefixtures("gpu")
def test_auto_takes_what_was_measured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of compacter_kernels.dispatch has the impls of a class of calls, fastest first.

    Calls of other classes do not use it.
    """
    monkeypatch.setattr(dispatch, "EXPECTED", {})
    kind = Class("adapter", "sm_90", BF16, (4, 8))
    monkeypatch.setattr(dispatch, "MEASURED", {kind: Ranking(("triton", "factored"), "a file")})
    found = _chosen(Case(dtype=BF16))
    assert found.impl == "triton"
    assert found.reason.startswith(
        "the fastest measured on such calls of those that serve this one (a file), and right"
    )
    assert found.others["cuda"].startswith("can serve this call, but triton was the fastest measured")
    for other in (Case(), Case("linear", dtype=BF16), Case(dtype=BF16, n=12), Case(dtype=BF16, rank=2)):
        unmeasured = _chosen(other)
        assert unmeasured.impl == "cuda"
        assert "not measured on sm_90 in" in unmeasured.reason
    monkeypatch.setattr(dispatch.IMPLS["triton"], "refuses", lambda problem: "too large")
    assert _chosen(Case(dtype=BF16)).impl == "factored"
    assert _chosen(Case(dtype=BF16)).reason.endswith("; triton: too large")


@pytest.mark.usefixtures("gpu")
def test_what_was_not_measured_is_chosen_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured impl comes first, and the order without a table last. The reason says which."""
    case, kind = Case(dtype=BF16), Class("adapter", "sm_90", BF16, (4,))
    monkeypatch.setattr(dispatch, "MEASURED", {})
    monkeypatch.setattr(dispatch, "EXPECTED", {kind: Ranking(("triton", "factored"), "a page")})
    found = _chosen(case)
    assert found.impl == "triton"
    by_model = "the fastest that serves this call by a model, and not by a measurement (a page)"
    assert found.reason == f"{by_model}, and right on this device when tried"
    assert found.others["cuda"] == f"can serve this call, but triton was {found.reason}"
    assert _chosen(Case(dtype=BF16, n=12)).impl == "cuda"
    monkeypatch.setattr(dispatch.IMPLS["triton"], "refuses", lambda problem: "too large")
    assert _chosen(case).impl == "factored"
    assert _chosen(case).reason == f"{by_model}; triton: too large"
    monkeypatch.setattr(dispatch, "MEASURED", {kind: Ranking(("cuda",), "a file")})
    assert _chosen(case).impl == "cuda"
    assert _chosen(case).reason.startswith("the fastest measured on such calls")


@pytest.mark.usefixtures("gpu")
def test_a_model_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike a measured impl, one of the model must first be tried on this device."""
    case, kind = Case(dtype=BF16), Class("adapter", "sm_90", BF16, (4,))
    monkeypatch.setattr(proof, "earlier_failure", lambda problem, name: None)
    monkeypatch.setattr(proof, "comparable", lambda: False)
    for table, other, expected in (("MEASURED", "EXPECTED", "triton"), ("EXPECTED", "MEASURED", "factored")):
        monkeypatch.setattr(dispatch, table, {kind: Ranking(("triton",), "a page")})
        monkeypatch.setattr(dispatch, other, {})
        assert _chosen(case).impl == expected
    assert "triton: it has not proved itself on this device" in _chosen(case).reason
    monkeypatch.setattr(proof, "comparable", lambda: True)
    monkeypatch.setattr(proof, "failure", lambda problem, name, impl: "wrong" if name == "triton" else "")
    assert _chosen(case).impl == "cuda"
    assert "; triton: wrong" in _chosen(case).reason


@pytest.mark.usefixtures("gpu")
def test_where_no_table_has_a_line_cuda_comes_before_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MEASURED", {})
    monkeypatch.setattr(dispatch, "EXPECTED", {})
    for expected in ("cuda", "triton", "factored"):
        assert _chosen(ADAPTER).impl == expected
        if expected != "factored":
            monkeypatch.setattr(dispatch.IMPLS[expected], "refuses", lambda problem: "too large")


def test_the_tables_name_impls_and_files_that_are_there() -> None:
    for found in (*dispatch.MEASURED.values(), *dispatch.EXPECTED.values()):
        assert set(found.impls) <= set(dispatch.IMPLS)
        assert (Path(__file__).parents[1] / found.source).exists()


REFUSED = {
    "float64": (Case(dtype=FP64), {}, "float64"),
    "unfactorised": (Case(rank=None), {}, "not factorised"),
    "any callable": (ADAPTER, {"activation": F.softplus}, "softplus is not fused"),
}


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_fused_impl_refuses(name: str, impl: str) -> None:
    """ "auto" takes factored instead, and explains why.

    An explicit choice raises an error, which has the reason and names the impls that would serve.
    """
    case, options, why = REFUSED[name]
    explanation = _explain(case, **options)
    assert explanation.impl == "factored"
    assert why in explanation.others[impl]
    tensors = case.tensors()
    expected = case.call(tensors, "factored", **options)
    assert torch.equal(case.call(tensors, "auto", **options), expected)
    for call in (lambda: case.call(tensors, impl, **options), lambda: _explain(case, impl=impl, **options)):
        with pytest.raises(
            RuntimeError, match=rf"impl='{impl}' cannot serve this adapter: .*{why}.*Try factored, dense"
        ):
            call()


@pytest.mark.parametrize("impl", FUSED)
def test_another_device_is_refused(impl: str) -> None:
    x, rule, left, right = (torch.ones(s, device="meta") for s in ((3, 24), (4, 4, 4), (4, 6, 1), (4, 1, 3)))
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot serve this linear: x is on meta"):
        ck.phm_linear(x, ck.PHMWeights(rule, left, right), impl=impl)
    assert ck.phm_linear(x, ck.PHMWeights(rule, left, right)).shape == (3, 12)


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the impls that are prepared from now on."""
    seen: list[str] = []

    def record(module: Any, name: str) -> None:
        original = module.prepare
        monkeypatch.setattr(module, "prepare", lambda problem: [seen.append(name), original(problem)][1])

    for name, module in dispatch.IMPLS.items():
        record(module, name)
    return seen


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", [LINEAR, ADAPTER], ids=str)
def test_explicit_choice(case: Case, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _calls(monkeypatch)
    case.call(case.tensors(), impl)
    assert seen == [impl]
    assert _explain(case, impl=impl).impl == impl


@pytest.mark.parametrize("impl", IMPLS)
def test_environment_sets_auto(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _calls(monkeypatch)
    monkeypatch.setenv("COMPACTER_KERNELS_IMPL", impl)
    ADAPTER.call(ADAPTER.tensors())
    assert seen == [impl]
    assert "COMPACTER_KERNELS_IMPL" in _explain(ADAPTER).reason
    LINEAR.call(LINEAR.tensors(), "dense")
    assert seen == [impl, "dense"]


def test_environment_may_change_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _calls(monkeypatch)
    tensors = ADAPTER.tensors()
    for impl in ("dense", "factored", "dense"):
        monkeypatch.setenv("COMPACTER_KERNELS_IMPL", impl)
        ADAPTER.call(tensors)
    assert seen == ["dense", "factored"]  # a plan is made once


@pytest.mark.parametrize("value", ["", "auto"])
def test_environment_without_a_choice(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _explain(ADAPTER)
    monkeypatch.setenv("COMPACTER_KERNELS_IMPL", value)
    assert _explain(ADAPTER) == expected


@pytest.mark.parametrize("case", [LINEAR, ADAPTER], ids=str)
def test_environment_with_an_unknown_name_raises(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.call(case.tensors())
    monkeypatch.setenv("COMPACTER_KERNELS_IMPL", "gpu")
    with pytest.raises(ValueError, match="COMPACTER_KERNELS_IMPL='gpu' is not known; choose one of auto, dense"):
        case.call(case.tensors())
    case.call(case.tensors(), "dense")


@pytest.mark.parametrize("impl", FUSED)
def test_environment_that_cannot_serve_raises(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPACTER_KERNELS_IMPL", impl)
    case = Case(dtype=FP64)
    with pytest.raises(RuntimeError, match=f"COMPACTER_KERNELS_IMPL='{impl}' cannot serve this adapter: x is float64"):
        case.call(case.tensors())


def test_an_impl_that_is_not_built_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.IMPLS["cpu"], "unavailable", lambda: "not built: no compiler")
    assert ck.available_impls()["cpu"] == "not built: no compiler"
    assert _explain(ADAPTER).impl == "factored"
    with pytest.raises(
        RuntimeError, match=r"impl='cpu' cannot serve this linear: not built: no compiler\. Try factored"
    ):
        LINEAR.call(LINEAR.tensors(), "cpu")


def test_one_line_at_info_for_each_operation_and_impl(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="compacter_kernels")
    for _ in range(2):
        for case in (LINEAR, ADAPTER):
            for impl in ("factored", "dense"):
                for dtype in (torch.float32, BF16):
                    other = Case(**{**vars(case), "dtype": dtype})
                    other.call(other.tensors(), impl)
    lines = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert len(lines) == 4
    for line, (operation, impl) in zip(
        lines, [(o, i) for o in ("linear", "adapter") for i in ("factored", "dense")], strict=True
    ):
        assert line == (
            "compacter_kernels",
            "INFO",
            f"{operation} runs through impl {impl!r} (chosen by impl={impl!r})",
        )


def test_the_log_line_of_auto_gives_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="compacter_kernels")
    case = Case(dtype=FP64)
    out: Tensor = case.call(case.tensors())
    assert out.dtype == FP64
    (record,) = caplog.records
    assert "adapter runs through impl 'factored'" in record.getMessage()
    assert "cpu: " in record.getMessage()
