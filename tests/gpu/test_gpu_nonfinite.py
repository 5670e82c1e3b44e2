"""NaN and Inf come out on the device where dense has them, and never in another token."""

from __future__ import annotations

import pytest
import test_nonfinite as nonfinite
import torch
from on_device import DEVICE, SERVING, moved
from oracle import BF16, FP32, Case, Tensors, bits, run

NAN, INF = nonfinite.NAN, nonfinite.INF
TOKEN, COLUMN = nonfinite.TOKEN, nonfinite.COLUMN
WIDE = Case(shape=(100,), width=768, bottleneck=24, dtype=BF16)
CASES = [*nonfinite.CASES, WIDE, Case(shape=(100,), width=768, bottleneck=48, n=12)]


def _spoiled(case: Case, name: str, value: float) -> Tensors:
    return moved(nonfinite._spoiled(case, name, value))


def _grad(case: Case) -> torch.Tensor:
    return case.grad_output().to(DEVICE)


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_in_x(case: Case, impl: str) -> None:
    tensors, grad = _spoiled(case, "x", NAN), _grad(case)
    got = run(case, tensors, impl, grad)
    assert nonfinite._masks(got) == nonfinite._masks(run(case, tensors, "dense", grad))
    assert got["out"][TOKEN].isnan().all()


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", [*CASES[:3], WIDE], ids=str)
def test_other_tokens_are_untouched(case: Case, impl: str) -> None:
    clean, spoiled = (run(case, t, impl, _grad(case)) for t in (moved(case.tensors()), _spoiled(case, "x", NAN)))
    others = torch.arange(case.shape[0], device=DEVICE) != TOKEN
    for name in ("out", "x"):
        assert torch.equal(bits(spoiled[name][others]), bits(clean[name][others]))


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize(
    ("case", "name"), nonfinite.PARAMETERS, ids=[f"{case.operation}-{name}" for case, name in nonfinite.PARAMETERS]
)
def test_nan_in_a_parameter(case: Case, name: str, impl: str) -> None:
    tensors, grad = _spoiled(case, name, NAN), _grad(case)
    nonfinite.assert_same_nans(run(case, tensors, impl, grad), run(case, tensors, "dense", grad), impl)


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", [nonfinite.LINEAR, WIDE, Case(shape=(21,), residual="other")], ids=str)
def test_nan_in_grad_output(case: Case, impl: str) -> None:
    tensors, grad = moved(case.tensors()), _grad(case)
    grad[TOKEN, COLUMN] = NAN
    got = run(case, tensors, impl, grad)
    nonfinite.assert_same_nans(got, run(case, tensors, "dense", grad), impl)
    assert got["x"].isnan().any(1).nonzero().flatten().tolist() == [TOKEN]


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("value", [INF, -INF], ids=["inf", "-inf"])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu_new", "silu"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_inf_in_x(dtype: torch.dtype, activation: str, value: float, impl: str) -> None:
    """Bounded activations are left out.

    The order of the sums decides whether they get Inf or Inf - Inf.
    """
    case = Case(shape=(21,), activation=activation, dtype=dtype)
    tensors = _spoiled(case, "x", value)
    masks = [nonfinite._masks({"out": case.call(tensors, name)}, True) for name in (impl, "dense")]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])
def test_nonfinite_residual_passes_as_it_is(value: float, impl: str) -> None:
    case = Case(shape=(21,), residual="other")
    tensors = _spoiled(case, "residual", value)
    out = case.call(tensors, impl)
    assert torch.equal(~out.isfinite(), ~tensors["residual"].isfinite())
