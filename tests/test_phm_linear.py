"""PHMLinear: its parameters and options against the formula, and its use as an nn.Module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import BF16, FP16, FP32, IMPLS
from torch import Tensor, nn

import compacter_kernels as ck


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "rank 3": {"phm_rank": 3, "phm_dim": 6},
    "no bias": {"bias": False},
    "unfactorised W": {"factorized_phm_W": False},
    "factorised rule": {"factorized_phm_rule": True},
    "nothing factorised but the rule": {"factorized_phm_W": False, "factorized_phm_rule": True, "phm_dim": 2},
    "fixed rule": {"learn_phm": False},
    "fixed factorised rule": {"learn_phm": False, "factorized_phm_rule": True},
    "shared rule": {"phm_rule": _parameter(4, 4, 4)},
    "shared factorised rule": {"phm_rule": (_parameter(4, 4, 1), _parameter(4, 1, 4)), "factorized_phm_rule": True},
    "adapters": {"init": "adapters", "phm_c_init": "uniform"},
}


def _randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5)
    return module


def _formula(layer: ck.PHMLinear, x: Tensor) -> Tensor:
    p = dict(layer.named_parameters())
    rule = p["phm_rule"] if "phm_rule" in p else torch.bmm(p["phm_rule_left"], p["phm_rule_right"])
    w = p["W"] if "W" in p else torch.bmm(p["W_left"], p["W_right"])
    h = sum(torch.kron(a, b) for a, b in zip(rule, w, strict=True))
    return x @ h + p.get("b", 0)


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_and_gradients(name: str) -> None:
    layer = _randomised(ck.PHMLinear(24, 36, **OPTIONS[name]))
    x = torch.randn(2, 5, 24)
    gradients = []
    for function in (layer, lambda x: _formula(layer, x)):
        layer.zero_grad()
        out = function(x)
        out.square().sum().backward()
        gradients.append({n: p.grad for n, p in layer.named_parameters() if layer.learn_phm or "rule" not in n})
    torch.testing.assert_close(layer(x), _formula(layer, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


NAMES = {
    "default": {"W_left": (4, 6, 1), "W_right": (4, 1, 9), "phm_rule": (4, 4, 4), "b": (36,)},
    "rank 3": {"W_left": (6, 4, 3), "W_right": (6, 3, 6), "phm_rule": (6, 6, 6), "b": (36,)},
    "no bias": {"W_left": (4, 6, 1), "W_right": (4, 1, 9), "phm_rule": (4, 4, 4)},
    "unfactorised W": {"W": (4, 6, 9), "phm_rule": (4, 4, 4), "b": (36,)},
    "factorised rule": {
        "W_left": (4, 6, 1),
        "W_right": (4, 1, 9),
        "phm_rule_left": (4, 4, 1),
        "phm_rule_right": (4, 1, 4),
        "b": (36,),
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_named_as_the_field_names_it(name: str) -> None:
    state = ck.PHMLinear(24, 36, **OPTIONS[name]).state_dict()
    assert {key: tuple(t.shape) for key, t in state.items()} == NAMES[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict_round_trip(name: str) -> None:
    options = {key: value for key, value in OPTIONS[name].items() if key != "phm_rule"}
    first, second = (_randomised(ck.PHMLinear(24, 36, **options)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_to_dtype(dtype: torch.dtype, impl: str) -> None:
    """Weights of one dtype work with inputs of every other dtype."""
    layer = ck.PHMLinear(24, 12, impl=impl).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    for kind in (FP32, BF16, FP16):
        layer.zero_grad()
        out = layer(torch.randn(3, 24, dtype=kind))
        assert out.dtype == kind
        out.float().sum().backward()
        assert {p.grad.dtype for p in layer.parameters()} == {dtype}


def test_device_and_dtype_at_construction() -> None:
    layer = ck.PHMLinear(24, 12, device="meta", dtype=BF16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", BF16)}


def test_shared_rule_is_one_parameter() -> None:
    rule = _parameter(4, 4, 4)
    before = rule.detach().clone()
    first, second = (ck.PHMLinear(24, 24, phm_rule=rule) for _ in range(2))
    assert first.phm_rule is second.phm_rule is rule
    first.reset_parameters()
    assert torch.equal(rule, before)
    x = torch.randn(5, 24)
    singles = []
    for layer in (first, second):
        layer(x).square().sum().backward()
        singles.append(rule.grad)
        rule.grad = None
    (first(x).square().sum() + second(x).square().sum()).backward()
    torch.testing.assert_close(rule.grad, sum(singles))


def test_rule_parameters_share_a_factorised_rule() -> None:
    first = ck.PHMLinear(24, 12, factorized_phm_rule=True)
    second = ck.PHMLinear(12, 24, factorized_phm_rule=True, phm_rule=first.rule_parameters())
    assert second.rule_parameters() == first.rule_parameters()
    assert second.phm_rule_left is first.phm_rule_left


@pytest.mark.parametrize("factorized", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_fixed_rule_stays_fixed(impl: str, factorized: bool) -> None:
    """It also does so if a training script makes every parameter trainable."""
    layer = ck.PHMLinear(24, 24, learn_phm=False, factorized_phm_rule=factorized, impl=impl)
    assert not any(rule.requires_grad for rule in layer.rule_parameters())
    before = [rule.detach().clone() for rule in layer.rule_parameters()]
    for p in layer.parameters():
        p.requires_grad = True
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(torch.randn(5, 24)).square().sum().backward()
    optimizer.step()
    assert all(rule.grad is None for rule in layer.rule_parameters())
    assert all(torch.equal(rule, old) for rule, old in zip(layer.rule_parameters(), before, strict=True))
    assert layer.W_left.grad.abs().sum() > 0
