"""NaN and Inf come out where dense has them, and never in another token."""

from __future__ import annotations

import pytest
import torch
from oracle import BF16, FP32, NOT_DENSE, Case, Tensors, bits, copies, run

from compacter_kernels.activations import FUSED as ACTIVATIONS

NAN, INF = float("nan"), float("inf")
SHAPE = (21,)
LINEAR = Case("linear", shape=SHAPE, n=4, width=24, bottleneck=20)
TOKEN, COLUMN = 6, 13


def _spoiled(case: Case, name: str, value: float) -> Tensors:
    tensors = case.tensors()
    with torch.no_grad():
        t = tensors[name]
        t[(TOKEN if name in ("x", "residual") else t.shape[0] // 2, *[s // 2 for s in t.shape[1:]])] = value
    return tensors


def _masks(found: Tensors, finite: bool = False) -> dict[str, list[bool]]:
    return {name: (~t.isfinite() if finite else t.isnan()).flatten().tolist() for name, t in found.items()}


CASES = [
    LINEAR,
    Case(shape=SHAPE, residual="other"),
    Case(shape=SHAPE, n=12, bottleneck=12, residual="x", dtype=BF16),
    *(Case(shape=SHAPE, n=n, width=16 * n, bottleneck=2 * n, residual="other", dtype=BF16) for n in (4, 8, 12)),
    *(Case(shape=SHAPE, activation=name, residual="none") for name in ACTIVATIONS),
]


@pytest.mark.failure("an input holds NaN or infinity")
@pytest.mark.parametrize("impl", NOT_DENSE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_in_x(case: Case, impl: str) -> None:
    tensors = _spoiled(case, "x", NAN)
    got = run(case, tensors, impl)
    assert _masks(got) == _masks(run(case, tensors, "dense"))
    assert got["out"][TOKEN].isnan().all()


@pytest.mark.parametrize("impl", NOT_DENSE)
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_other_tokens_are_untouched(case: Case, impl: str) -> None:
    clean, spoiled = (run(case, tensors, impl) for tensors in (case.tensors(), _spoiled(case, "x", NAN)))
    others = torch.arange(SHAPE[0]) != TOKEN
    for name in ("out", "x"):
        assert torch.equal(bits(spoiled[name][others]), bits(clean[name][others]))


def assert_same_nans(got: Tensors, expected: Tensors, impl: str) -> None:
    """NaN is where dense has it.

    The kernels of a GPU may spread the NaN of a parameter or gradient, since they also multiply it
    by 0 (see docs/).
    """
    found, wanted = _masks(got), _masks(expected)
    if impl not in ("triton", "cuda"):
        assert found == wanted
    for name, mask in wanted.items():
        assert all(here for here, there in zip(found[name], mask, strict=True) if there), name


PARAMETERS = [(case, name) for case in (LINEAR, Case(shape=SHAPE, rank=2)) for name in case.tensors() if name != "x"]


@pytest.mark.parametrize("impl", NOT_DENSE)
@pytest.mark.parametrize(("case", "name"), PARAMETERS, ids=[f"{case.operation}-{name}" for case, name in PARAMETERS])
def test_nan_in_a_parameter(case: Case, name: str, impl: str) -> None:
    tensors = _spoiled(case, name, NAN)
    assert_same_nans(run(case, tensors, impl), run(case, tensors, "dense"), impl)


@pytest.mark.parametrize("impl", NOT_DENSE)
@pytest.mark.parametrize("case", [LINEAR, Case(shape=SHAPE), Case(shape=SHAPE, residual="other")], ids=str)
def test_nan_in_grad_output(case: Case, impl: str) -> None:
    tensors, grad = case.tensors(), case.grad_output()
    grad[TOKEN, COLUMN] = NAN
    got = run(case, tensors, impl, grad)
    assert_same_nans(got, run(case, copies(tensors), "dense", grad), impl)
    assert got["x"].isnan().any(1).nonzero().flatten().tolist() == [TOKEN]


@pytest.mark.parametrize("impl", NOT_DENSE)
@pytest.mark.parametrize("value", [INF, -INF], ids=["inf", "-inf"])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu_new", "silu"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_inf_in_x(dtype: torch.dtype, activation: str, value: float, impl: str) -> None:
    """Bounded activations are left out.

    The order of the sums decides whether they get Inf or Inf - Inf.
    """
    options = {"shape": SHAPE, "activation": activation, "dtype": dtype}
    wide = [Case(n=n, width=16 * n, bottleneck=2 * n, **options) for n in (4, 8, 12)]
    for case in (Case(**options), *wide):
        tensors = _spoiled(case, "x", value)
        out = case.call(tensors, impl)
        assert _masks({"out": out}, True) == _masks({"out": case.call(tensors, "dense")}, True)


@pytest.mark.parametrize("impl", NOT_DENSE)
def test_inf_in_x_of_a_projection(impl: str) -> None:
    tensors = _spoiled(LINEAR, "x", INF)
    out = LINEAR.call(tensors, impl)
    assert (~out.isfinite()).any(1).nonzero().flatten().tolist() == [TOKEN]
    assert not out[TOKEN].isfinite().any()


@pytest.mark.parametrize("impl", NOT_DENSE)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("case", [CASES[1], *CASES[3:6]], ids=str)
def test_nonfinite_residual_passes_as_it_is(case: Case, value: float, impl: str) -> None:
    tensors = _spoiled(case, "residual", value)
    out = case.call(tensors, impl)
    expected = (~tensors["residual"].isfinite()).flatten().tolist()
    assert (~out.isfinite()).flatten().tolist() == expected
