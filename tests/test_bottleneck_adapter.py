"""BottleneckAdapter: every option against a composition of torch functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import BF16, FP32, FP64, IMPLS
from phm_lookalikes import hooks_known
from torch import Tensor, nn
from torch.nn import functional as F

import compacter_kernels as ck

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "float reduction factor": {"reduction_factor": 1.5},
    "gelu_new": {"activation": "gelu_new"},
    "any callable": {"activation": F.softplus},
    "no residual": {"add_residual": False},
    "scale": {"scale": 0.25},
    "learned scale": {"scale": "learned"},
    "layer norm before": {"ln_before": True},
    "layer norm after": {"ln_after": True},
    "layer norm after, then the residual": {"ln_after": True, "residual_before_ln": False},
    "layer norms": {"ln_before": True, "ln_after": True, "scale": "learned"},
    "houlsby": {"init_weights": "houlsby"},
}


def make(name: str = "default", **more: Any) -> ck.BottleneckAdapter:
    adapter = ck.BottleneckAdapter(24, **{"reduction_factor": 2, **OPTIONS[name], **more})
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(0, 0.5)
    return adapter


def composed(adapter: ck.BottleneckAdapter, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The options, applied in their order."""
    activation = {"swish": F.silu, "gelu_new": lambda y: F.gelu(y, approximate="tanh")}
    if residual is None:
        residual = x if adapter.add_residual else torch.zeros_like(x)
    y = x if adapter.norm_before is None else adapter.norm_before(x)
    h = activation.get(adapter.activation, F.softplus)(F.linear(y, adapter.down.weight, adapter.down.bias))
    y = F.linear(h, adapter.up.weight, adapter.up.bias)
    y = y * (adapter.scale if adapter.scaling is None else adapter.scaling)
    if adapter.norm_after is None:
        return y + residual
    return adapter.norm_after(y + residual) if adapter.residual_before_ln else adapter.norm_after(y) + residual


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("given", [False, True], ids=["residual is x", "residual given"])
@pytest.mark.parametrize("name", OPTIONS)
def test_forward_and_gradients(name: str, given: bool, impl: str) -> None:
    fused = impl not in ("dense", "factored")
    if fused and "activation" in OPTIONS[name] and callable(OPTIONS[name]["activation"]):
        pytest.skip("no kernel computes any callable")
    dtype = FP32 if fused else FP64
    adapter = make(name, impl=impl, dtype=dtype)
    exact = make(name, dtype=FP64)
    exact.load_state_dict(adapter.state_dict())
    x = torch.randn(2, 5, 24, dtype=dtype)
    residual = torch.randn(2, 5, 24, dtype=dtype) if given else None
    results = []
    for function in (adapter, lambda x, residual: composed(exact, x.double(), residual)):
        leaf = x.clone().requires_grad_()
        out = function(leaf, residual)
        out.square().sum().backward()
        owner = adapter if function is adapter else exact
        results.append({"out": out.detach(), "x": leaf.grad, **{n: p.grad for n, p in owner.named_parameters()}})
    limit = 1e-4 if fused else 1e-10
    for key, value in results[1].items():
        assert (results[0][key].double() - value.double()).abs().max() <= limit * value.abs().max().clamp(min=1), key


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout(impl: str) -> None:
    """Dropout acts on the output before the residual, and only in training."""
    adapter = make(dropout=0.4, impl=impl)
    x = torch.randn(400, 24)
    delta = adapter.train()(x) - x
    dropped = delta.abs() < 1e-6
    assert 0.35 < dropped.float().mean() < 0.45
    evaluated = adapter.eval()(x)
    torch.testing.assert_close(delta[~dropped], ((evaluated - x) / 0.6)[~dropped], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(evaluated, composed(adapter, x), rtol=1e-3, atol=1e-3)


def test_parameters_are_those_of_linear_layers() -> None:
    adapter = make("layer norm after", scale="learned")
    expected = "down.weight down.bias up.weight up.bias scaling norm_after.weight norm_after.bias"
    assert sorted(adapter.state_dict()) == sorted(expected.split())
    assert adapter.down.weight.shape == (12, 24) and adapter.up.weight.shape == (24, 12)
    assert isinstance(adapter.down, nn.Linear)
    other = make("layer norm after", scale="learned")
    other.load_state_dict(adapter.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(adapter(x), other(x))


@hooks_known
@pytest.mark.parametrize("impl", IMPLS)
def test_one_call_computes_both_projections(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make(impl=impl)
    x = torch.randn(3, 24)
    expected = adapter(x)
    monkeypatch.setattr(F, "linear", None)
    assert torch.equal(adapter(x), expected)


def test_hooks_of_a_projection_run() -> None:
    adapter, x = make(), torch.randn(3, 24)
    adapter.down.register_forward_hook(lambda module, args, out: out.abs())
    h = F.silu(F.linear(x, adapter.down.weight, adapter.down.bias).abs())
    torch.testing.assert_close(adapter(x), F.linear(h, adapter.up.weight, adapter.up.bias) + x)


@pytest.mark.parametrize("impl", IMPLS)
def test_fp32_weights_in_a_bf16_model(impl: str) -> None:
    adapter, x = make(impl=impl), torch.randn(5, 24)
    out = adapter(x.to(BF16))
    assert out.dtype == BF16
    torch.testing.assert_close(out.float(), adapter(x.to(BF16).float()), rtol=2**-7, atol=2**-7)
    out.float().sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {FP32}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_residual_of_another_dtype(dropout: float) -> None:
    adapter = make(dropout=dropout).eval()
    x, residual = torch.randn(5, 24).to(BF16), torch.randn(5, 24)
    expected = adapter(x, torch.zeros_like(x)).float() + residual
    torch.testing.assert_close(adapter(x, residual), expected)


@hooks_known
def test_autocast_leaves_the_kernel_in_float32() -> None:
    adapter, x = make(), torch.randn(5, 24)
    with torch.autocast("cpu", BF16):
        out = adapter(x)
    assert out.dtype == FP32
    assert torch.equal(out, adapter(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    adapter, x = make("learned scale"), torch.randn(5, 24)
    compiled = torch.compile(adapter, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 9):
        x = torch.randn(tokens, 24)
        adapter.zero_grad()
        out = compiled(x)
        out.square().sum().backward()
        grads = [p.grad.clone() for p in adapter.parameters()]
        adapter.zero_grad()
        expected = adapter(x)
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected)
        for grad, p in zip(grads, adapter.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad)
