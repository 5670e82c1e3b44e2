"""How the weights start: the authors' distributions, and those of the adapters library."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compacter_kernels as ck

IN, OUT, N = 1536, 768, 4


def _kurtosis(t: Tensor) -> float:
    """The kurtosis: 3 for a normal, 1.8 for a uniform distribution."""
    t = t.detach().double().flatten()
    return ((t - t.mean()) ** 4).mean().item() / t.var().item() ** 2


def _check(t: Tensor, std: float, kind: str) -> None:
    assert abs(t.mean().item()) < 5 * std / math.sqrt(t.numel())
    assert t.std().item() == pytest.approx(std, rel=8 / math.sqrt(t.numel()))
    assert _kurtosis(t) == pytest.approx({"normal": 3.0, "uniform": 1.8}[kind], abs=0.35)


STYLES: dict[str, tuple[float, str]] = {"paper": (math.sqrt(2), "uniform"), "adapters": (1.0, "normal")}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("factorized", [True, False], ids=["factorised", "unfactorised"])
def test_factors_are_xavier_slice_by_slice(factorized: bool, style: str) -> None:
    gain, kind = STYLES[style]
    layer = ck.PHMLinear(IN, OUT, phm_dim=N, phm_rank=3, factorized_phm_W=factorized, init=style)
    for factor in (layer.W_left, layer.W_right) if factorized else (layer.W,):
        _, fan_a, fan_b = factor.shape
        _check(factor, gain * math.sqrt(2 / (fan_a + fan_b)), kind)
        assert len({slice_[0, 0].item() for slice_ in factor}) == N


@pytest.mark.parametrize("style", STYLES)
def test_bias_is_zero(style: str) -> None:
    adapter = ck.CompacterAdapter(96, reduction_factor=2, init=style)
    assert not adapter.down.b.any()
    assert not adapter.up.b.any()


RULES: dict[str, tuple[dict[str, Any], float, str]] = {
    "shared": ({}, 1e-4, "normal"),
    "shared, other range": ({"phm_init_range": 0.02}, 0.02, "normal"),
    "shared, uniform": ({"phm_init_range": 0.02, "phm_c_init": "uniform"}, 0.02 / math.sqrt(3), "uniform"),
    "one each": ({"shared_phm_rule": False}, 0.01, "normal"),
    "one each, uniform": ({"shared_phm_rule": False, "phm_c_init": "uniform"}, 0.01 / math.sqrt(3), "uniform"),
    "fixed": ({"learn_phm": False}, 1e-4, "normal"),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    options, std, kind = RULES[name]
    adapter = ck.CompacterAdapter(24, reduction_factor=1, phm_dim=24, **options)
    _check(adapter.down.phm_rule, std, kind)
    _check(adapter.up.phm_rule, std, kind)


def test_rule_of_a_layer_by_itself() -> None:
    _check(ck.PHMLinear(24, 24, phm_dim=24).phm_rule, 0.01, "normal")


def test_factors_of_a_rule() -> None:
    layer = ck.PHMLinear(48, 48, phm_dim=48, factorized_phm_rule=True)
    for rule in layer.rule_parameters():
        _check(rule, 0.01, "normal")


def test_reset_draws_anew_except_a_rule_passed_in() -> None:
    rule = nn.Parameter(torch.randn(4, 4, 4))
    for given in (None, rule):
        adapter = ck.CompacterAdapter(24, reduction_factor=2, scale="learned", ln_after=True, phm_rule=given)
        before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
        with torch.no_grad():
            adapter.scaling.fill_(3)
            adapter.norm_after.weight.fill_(3)
        adapter.reset_parameters()
        same = {name for name, p in adapter.named_parameters() if torch.equal(p, before[name])}
        expected = {"scaling", "norm_after.weight", "norm_after.bias", "down.b", "up.b"}
        assert same == expected | ({"down.phm_rule"} if given is not None else set())


def test_paper_adapter_starts_as_the_identity() -> None:
    """With a rule of standard deviation 1e-4 the adapter adds almost nothing."""
    x = torch.randn(64, 96)
    torch.testing.assert_close(ck.CompacterAdapter(96, reduction_factor=4)(x), x, rtol=1e-4, atol=1e-4)


def test_seeds_repeat() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(ck.CompacterAdapter(24, reduction_factor=2).state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)
