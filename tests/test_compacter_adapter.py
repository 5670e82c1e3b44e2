"""CompacterAdapter: every option against a composition of torch functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import BF16, FP32, IMPLS
from torch import Tensor, nn
from torch.nn import functional as F

import compacter_kernels as ck

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "float reduction factor": {"reduction_factor": 1.5, "phm_dim": 2},
    "rank 2": {"phm_rank": 2, "phm_dim": 3},
    "relu": {"activation": "relu"},
    "any callable": {"activation": F.softplus},
    "no residual": {"add_residual": False},
    "scale": {"scale": 0.25},
    "learned scale": {"scale": "learned"},
    "layer norm before": {"ln_before": True},
    "layer norm after": {"ln_after": True},
    "layer norm after, then the residual": {"ln_after": True, "residual_before_ln": False},
    "layer norms": {"ln_before": True, "ln_after": True, "scale": "learned"},
    "no bias": {"phm_bias": False},
    "unfactorised W": {"factorized_phm_W": False},
    "factorised rule": {"factorized_phm_rule": True},
    "a rule each": {"shared_phm_rule": False},
    "fixed rule": {"learn_phm": False},
    "no residual, normed": {"add_residual": False, "ln_after": True, "residual_before_ln": False},
}


def _make(name: str, **more: Any) -> ck.CompacterAdapter:
    adapter = ck.CompacterAdapter(24, **{"reduction_factor": 2, **OPTIONS[name], **more})
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(0, 0.5)
    return adapter


def _composed(adapter: ck.CompacterAdapter, x: Tensor, residual: Tensor | None) -> Tensor:
    """The options, applied in their order."""

    def project(layer: ck.PHMLinear, x: Tensor) -> Tensor:
        y = x @ ck.phm_matrix(layer.weights())
        return y if layer.b is None else y + layer.b

    activation = {"gelu_new": lambda y: F.gelu(y, approximate="tanh"), "relu": F.relu}.get(
        adapter.activation, F.softplus
    )
    if residual is None:
        residual = x if adapter.add_residual else torch.zeros_like(x)
    y = x if adapter.norm_before is None else adapter.norm_before(x)
    y = project(adapter.up, activation(project(adapter.down, y)))
    y = y * (adapter.scale if adapter.scaling is None else adapter.scaling)
    if adapter.norm_after is None:
        return y + residual
    return adapter.norm_after(y + residual) if adapter.residual_before_ln else adapter.norm_after(y) + residual


@pytest.mark.parametrize("given", [False, True], ids=["residual is x", "residual given"])
@pytest.mark.parametrize("name", OPTIONS)
def test_forward_and_gradients(name: str, given: bool) -> None:
    adapter = _make(name)
    x = torch.randn(2, 5, 24)
    residual = torch.randn(2, 5, 24) if given else None
    results = []
    for function in (adapter, lambda x, residual: _composed(adapter, x, residual)):
        adapter.zero_grad()
        out = function(x, residual)
        out.square().sum().backward()
        results.append((out.detach(), {n: p.grad for n, p in adapter.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout(impl: str) -> None:
    """Dropout acts on the output before the residual, and only in training."""
    adapter = _make("default", dropout=0.4, impl=impl)
    x = torch.randn(400, 24)
    delta = adapter.train()(x) - x
    dropped = delta.abs() < 1e-6
    assert 0.35 < dropped.float().mean() < 0.45
    evaluated = adapter.eval()(x)
    torch.testing.assert_close(delta[~dropped], ((evaluated - x) / 0.6)[~dropped], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(evaluated, _composed(adapter, x, None), rtol=1e-3, atol=1e-3)


NAMES = {
    "default": "down.W_left down.W_right down.phm_rule down.b up.W_left up.W_right up.phm_rule up.b",
    "unfactorised W": "down.W down.phm_rule down.b up.W up.phm_rule up.b",
    "no bias": "down.W_left down.W_right down.phm_rule up.W_left up.W_right up.phm_rule",
    "learned scale": "scaling down.W_left down.W_right down.phm_rule down.b up.W_left up.W_right up.phm_rule up.b",
    "layer norm after": (
        "down.W_left down.W_right down.phm_rule down.b up.W_left up.W_right up.phm_rule up.b "
        "norm_after.weight norm_after.bias"
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_named_as_the_field_names_it(name: str) -> None:
    assert sorted(_make(name).state_dict()) == sorted(NAMES[name].split())


@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict_round_trip(name: str) -> None:
    first, second = _make(name), _make(name)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(first(x), second(x))


def test_down_and_up_share_one_rule() -> None:
    adapter = _make("default")
    assert adapter.down.phm_rule is adapter.up.phm_rule
    assert len(list(adapter.parameters())) == 7
    apart = _make("a rule each")
    assert apart.down.phm_rule is not apart.up.phm_rule


def test_a_rule_is_shared_between_adapters() -> None:
    rule = nn.Parameter(torch.randn(4, 4, 4))
    before = rule.detach().clone()
    stack = nn.Sequential(*(ck.CompacterAdapter(24, reduction_factor=2, phm_rule=rule) for _ in range(3)))
    assert torch.equal(rule, before)
    assert [p is rule for name, p in stack.named_parameters() if "rule" in name] == [True]
    x = torch.randn(5, 24)
    stack(x).square().sum().backward()
    together = rule.grad.clone()
    separate = [ck.CompacterAdapter(24, reduction_factor=2, phm_rule=nn.Parameter(before.clone())) for _ in range(3)]
    for one, other in zip(separate, stack, strict=True):
        one.load_state_dict(other.state_dict())
    nn.Sequential(*separate)(x).square().sum().backward()
    torch.testing.assert_close(together, sum(one.down.phm_rule.grad for one in separate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_fixed_rule_stays_fixed(impl: str) -> None:
    adapter = _make("fixed rule", impl=impl).requires_grad_(True)
    adapter(torch.randn(5, 24)).sum().backward()
    assert [name for name, p in adapter.named_parameters() if p.grad is None] == ["down.phm_rule"]


@pytest.mark.parametrize("impl", IMPLS)
def test_fp32_weights_in_a_bf16_model(impl: str) -> None:
    adapter = _make("default", impl=impl)
    x = torch.randn(5, 24)
    out = adapter(x.to(BF16))
    assert out.dtype == BF16
    torch.testing.assert_close(out.float(), adapter(x.to(BF16).float()), rtol=2**-7, atol=2**-7)
    out.float().sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {FP32}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_residual_of_another_dtype(dropout: float) -> None:
    adapter = _make("default", dropout=dropout).eval()
    x, residual = torch.randn(5, 24).to(BF16), torch.randn(5, 24)
    expected = adapter(x, torch.zeros_like(x)).float() + residual
    torch.testing.assert_close(adapter(x, residual), expected)
