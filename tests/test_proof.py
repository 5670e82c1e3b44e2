"""On a GPU "auto" takes an impl only after a proof that its results are right there.

The tests prove the impl "cpu", as if on a new device.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from oracle import BF16, FP16, FP32, Case, problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import compacter_kernels as ck
from compacter_kernels import call_path, dispatch, modes, proof
from compacter_kernels.impl import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu: {cpu.unavailable()}")
CASES = [Case(), Case("linear"), Case(rank=2, n=3, bias=False, activation="relu")]


@pytest.fixture(autouse=True)
def on_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "required", lambda problem: True)
    monkeypatch.setattr(proof, "_failures", {})
    monkeypatch.setattr(call_path, "_plans", {})


def spoiled(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    """Make one number of one result of the kernel wrong (0: the output)."""
    prepare = cpu.prepare

    class Spoiled:
        differentiable = norms = False

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def forward(self, call: Any, out: Tensor | None = None) -> Tensor:
            result: Tensor = self.kernel.forward(call, out)
            return self.spoil(result) if which == 0 else result

        def backward(self, *args: Any) -> tuple[Tensor | None, ...]:
            grads = list(self.kernel.backward(*args))
            if which:
                grads[which - 1] = self.spoil(grads[which - 1])
            return tuple(grads)

        def spoil(self, result: Tensor) -> Tensor:
            result.view(-1)[-1] += result.abs().max()
            return result

    monkeypatch.setattr(cpu, "prepare", lambda problem: Spoiled(prepare(problem)))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_right_kernel_passes(case: Case, dtype: torch.dtype) -> None:
    case = Case(**{**vars(case), "dtype": dtype})
    found = dispatch.explain(problem(case))
    assert found.impl == "cpu"
    assert found.reason.endswith("and right on this device when tried")


def test_a_default_device_changes_nothing() -> None:
    wanted = problem(Case())
    with torch.device("meta"):
        assert dispatch.explain(wanted).impl == "cpu"


def test_the_first_call_may_be_in_a_checkpoint() -> None:
    adapter, linear = ck.CompacterAdapter(24, reduction_factor=2), torch.nn.Linear(24, 24)
    x = torch.randn(5, 24, requires_grad=True)
    checkpoint(lambda x: linear(adapter(linear(x))), x, use_reentrant=False).sum().backward()
    assert set(proof._failures.values()) == {""}


def test_the_first_call_may_be_in_inference_mode() -> None:
    with torch.inference_mode():
        ck.CompacterAdapter(24, reduction_factor=2)(torch.randn(5, 24))
    assert set(proof._failures.values()) == {""}


def test_without_memory_nothing_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(problem: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    wanted = problem(Case())
    with monkeypatch.context() as context:
        context.setattr(cpu, "prepare", fails)
        with pytest.raises(torch.OutOfMemoryError):
            dispatch.explain(wanted)
    assert dispatch.explain(wanted).impl == "cpu"


@pytest.mark.parametrize("which", [0, 1, 2, 5, 8])
def test_a_wrong_kernel_is_passed_over(
    which: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spoiled(monkeypatch, which)
    case = Case()
    for _ in range(2):
        found = dispatch.explain(problem(case))
        assert found.impl == "factored"
        assert "is off by" in found.others["cpu"] and "is off by" in found.reason
    tensors = case.tensors()
    assert torch.equal(case.call(tensors), case.call(tensors, "factored"))
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "impl 'cpu' is not taken for such calls on cpu" in warning.getMessage()
    assert not torch.equal(case.call(tensors, "cpu"), case.call(tensors)) or which  # an explicit choice is obeyed


def test_a_kernel_that_raises_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(problem: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(cpu, "prepare", fails)
    found = dispatch.explain(problem(Case()))
    assert found.impl == "factored"
    assert found.others["cpu"] == "RuntimeError: no kernel image is available"


def test_where_nothing_can_be_compared_the_proof_is_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is so while a CUDA graph is captured. A plan that is made then is not kept."""
    case, able = Case(), [False]
    monkeypatch.setattr(proof, "comparable", lambda: able[0])
    expected = case.call(case.tensors(), "factored")
    assert torch.equal(case.call(case.tensors()), expected)
    assert "nothing can be compared now" in dispatch.explain(problem(case)).reason
    able[0] = True
    case.call(case.tensors())
    able[0] = False
    assert dispatch.explain(problem(case)).impl == "cpu"
    assert torch.equal(case.call(case.tensors()), case.call(case.tensors(), "cpu"))


def test_under_a_compiler_the_proof_is_an_earlier_one() -> None:
    case = Case()

    def impl_of(tensors: dict[str, Tensor]) -> str:
        torch._dynamo.reset()
        seen: list[str] = []

        def backend(graph: Any, inputs: Any) -> Any:
            seen.append(str(graph.graph))
            return graph.forward

        torch.compile(lambda tensors: case.call(tensors), backend=backend, fullgraph=True)(tensors)
        return "cpu" if "compacter_kernels.adapter" in seen[0] else "factored"

    tensors = {name: t.detach() for name, t in case.tensors().items()}
    assert impl_of(tensors) == "factored"
    case.call(tensors)
    assert impl_of(tensors) == "cpu"


def test_a_mode_that_records_is_no_time_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proof.comparable()
    monkeypatch.setattr(modes, "dispatch_modes", lambda: 1)
    assert not proof.comparable()
