"""A torch without the C exchange API of DLPack (before 2.10).

Python then determines the plans and the addresses.
"""

from __future__ import annotations

import pytest
import torch
from oracle import FUSED, Case, assert_same_bits, copies, run, skip_if_refused

from compacter_kernels import call_path
from compacter_kernels.impl import memory
from compacter_kernels.impl.module import TENSORS


@pytest.fixture(params=[True, False], ids=["with", "without"])
def dlpack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(call_path, "_plans", {})
    if not request.param:
        monkeypatch.setattr(call_path, "_described", None)
        monkeypatch.setattr(memory, "TENSORS", None)
    elif TENSORS is None:
        pytest.skip("this build, or this torch, has none")
    return bool(request.param)


CASES = [Case("linear"), Case(residual="both"), Case(bias=False, rank=2), Case(params=torch.bfloat16)]


@pytest.mark.usefixtures("dlpack")
@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits(case: Case, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    found = run(case, tensors, impl)
    monkeypatch.undo()
    assert_same_bits(found, run(case, tensors, impl))


@pytest.mark.usefixtures("dlpack")
@pytest.mark.parametrize("impl", ["auto", "factored"])
def test_what_changes_between_two_calls_is_seen(impl: str) -> None:
    """The same Parameter is changed in place: its dtype, shape, strides or storage."""
    case = Case(shape=(5,))
    tensors = {name: torch.nn.Parameter(t.detach()) for name, t in case.tensors().items()}
    expected = run(case, tensors, impl)["out"]
    weight = tensors["down.left"]
    before = weight.data
    weight.data = before.double()
    assert run(case, tensors, impl)["down.left"].dtype == torch.float64
    weight.data = before.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(run(case, tensors, impl)["out"], expected)
    weight.data = before.flatten()
    with pytest.raises(ValueError, match=r"down\.left must have 3 dimensions"):
        run(case, tensors, impl)
    weight.data = before
    for size in (0, before.nbytes // 2):
        whole = copies(tensors)
        whole["down.left"].untyped_storage().resize_(size)
        with pytest.raises(RuntimeError, match=rf"down\.left has no memory .* {size} of {before.nbytes} bytes"):
            run(case, whole, impl)
    assert torch.equal(run(case, tensors, impl)["out"], expected)


@pytest.mark.usefixtures("dlpack")
def test_parameters_are_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_REMEMBERED", 3)
    case = Case(shape=(5,))
    kept = [copies(case.tensors()) for _ in range(10)]
    results = [case.call(tensors) for tensors in kept]
    assert all(torch.equal(result, results[0]) for result in results)
