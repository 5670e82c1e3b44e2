"""Every fused impl on the device against the float64 dense oracle: the output and all gradients."""

from __future__ import annotations

import pytest
import test_agreement as agreement
import torch
from on_device import DEVICE, SERVING, check, inputs
from oracle import BF16, FP16, FP32, Case, oracle, run

import compacter_kernels as ck
from compacter_kernels.dispatch import PLAIN

ADAPTERS = agreement.SIZES + agreement.COUNTS + agreement.DTYPES + agreement.FUNCTIONS
ADAPTERS += agreement.OPTIONS + agreement.MIXED
LINEARS = agreement.LINEAR + agreement.LINEAR_OPTIONS

# the shapes of real models, with token counts that fill the device and end in an incomplete tile
MODELS = [(768, 24, 4), (768, 48, 8), (768, 48, 12), (1024, 64, 8), (4096, 128, 8), (3072, 96, 12)]
REAL = [
    Case(width=k, bottleneck=d, n=n, shape=(tokens,), dtype=dtype)
    for k, d, n in MODELS
    for tokens, dtype in ((1, BF16), (4099, BF16), (2053, FP16), (2053, FP32))
]


def test_a_fused_impl_serves_the_device() -> None:
    """Otherwise every other test of this folder would be skipped."""
    assert [name for name in ck.available_impls() if name in {param.values[0] for param in SERVING} - set(PLAIN)]


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_adapter(case: Case, impl: str) -> None:
    check(case, impl)


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", LINEARS, ids=str)
def test_linear(case: Case, impl: str) -> None:
    check(case, impl)


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_shapes_of_models(case: Case, impl: str) -> None:
    check(case, impl, must_serve=True)


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("wanted", [("x",), ("down.rule", "up.rule"), ("down.left", "up.bias"), ("residual",)], ids=str)
def test_only_some_gradients(wanted: tuple[str, ...], impl: str) -> None:
    """A frozen tensor changes no bit of the other gradients."""
    case = Case(width=768, bottleneck=24, shape=(300,), dtype=BF16, residual="other")
    tensors, grad = inputs(case)
    expected = run(case, tensors, impl, grad)
    got = run(case, {name: t.requires_grad_(name in wanted) for name, t in tensors.items()}, impl, grad)
    assert set(got) == {"out", *wanted}
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", SERVING)
def test_tokens_in_any_leading_shape(impl: str) -> None:
    case = Case(width=768, bottleneck=24, shape=(2, 3, 5), dtype=BF16)
    check(case, impl)
    tensors, _ = inputs(case)
    assert case.call(tensors, impl).device.type == torch.device(DEVICE).type


@pytest.mark.parametrize("impl", SERVING)
def test_out(impl: str) -> None:
    """The result is written into `out`, also if `out` overlaps the input."""
    case = Case(width=768, bottleneck=24, shape=(300,), dtype=BF16)
    tensors = {name: t.requires_grad_(False) for name, t in inputs(case)[0].items()}
    expected = case.call(tensors, impl)
    out = torch.empty_like(expected)
    assert case.call(tensors, impl, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(case.call(tensors, impl, out=tensors["x"]), expected)


@pytest.mark.parametrize("impl", SERVING)
def test_the_oracle_sees_a_wrong_result(impl: str) -> None:
    case = Case(width=768, bottleneck=24, shape=(64,))
    tensors, grad = inputs(case)
    got = run(case, tensors, impl, grad)
    reference = oracle(case, tensors, grad)
    for name in got:
        spoiled = {**got, name: got[name] * 1.001}
        assert [text.split(":")[0] for text in reference.violations(spoiled)] == [name]
