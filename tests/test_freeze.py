"""Switching between adapters freezes those that are not in use.

A graph that was recorded before still gives them their gradients.
"""

from __future__ import annotations

import pytest
import torch
from families import build, output
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.inject.injection import freeze


def two() -> nn.Module:
    model = build("bert")
    for name in ("b", "a"):
        ck.inject(model, ck.CompacterConfig(reduction_factor=4, phm_init_range=1.0), name=name)
    return model


def loss(model: nn.Module) -> Tensor:
    return output("bert", model).square().sum()


def gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in ck.adapter_parameters(model, name) if p.grad is not None}


@pytest.mark.parametrize("switches", [1, 3])
def test_one_backward_through_the_losses_of_two_adapters(switches: int) -> None:
    model = two()
    expected = {}
    for name in ("a", "b"):
        ck.set_adapter(model, name)
        loss(model).backward()
        expected[name] = gradients(model, name)
    model.zero_grad()
    ck.set_adapter(model, "a")
    total = loss(model)
    for turn in range(switches):
        ck.set_adapter(model, "ba"[turn % 2])
    (total + loss(model)).backward()
    for name in ("a", "b"):
        got = gradients(model, name)
        assert got.keys() == expected[name].keys() == dict(ck.adapter_parameters(model, name)).keys()
        for key, gradient in got.items():
            torch.testing.assert_close(gradient, expected[name][key], rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for _, p in ck.adapter_parameters(model, "a"))


def test_what_is_out_of_use_gets_no_gradient() -> None:
    model = two()
    loss(model).backward()
    model.zero_grad()
    ck.set_adapter(model, "b")
    loss(model).backward()
    assert gradients(model, "a") == {} and gradients(model, "b") != {}


def test_a_parameter_taken_into_use_again_gets_its_gradient_once() -> None:
    p = nn.Parameter(torch.ones(3))
    y = (2 * p).sum()
    for _ in range(2):
        freeze(p)
        p.requires_grad_(True)
    y.backward(retain_graph=True)
    assert torch.equal(p.grad, torch.full((3,), 2.0))
    freeze(p)
    freeze(p)
    y.backward()
    assert torch.equal(p.grad, torch.full((3,), 4.0)) and not p.requires_grad


def test_switching_under_inference_mode() -> None:
    model = two()
    with torch.inference_mode():
        for name in ("a", "b"):
            ck.set_adapter(model, name)
            output("bert", model)
    loss(model).backward()
    assert gradients(model, "b") != {}
