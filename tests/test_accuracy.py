"""The check of errors accepts right results, and detects a wrong number in every result.

The results are the output and each gradient.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.accuracy import Oracle, error, evaluate, floor
from compacter_kernels.cases import INITS, RESIDUALS, Case, Inputs, Shape, call

SHAPE = Shape(24, 12, 4)
AVAILABLE = [name for name, reason in ck.available_impls().items() if reason is None]
NAMES = ["out", *Case.of(SHAPE, 3, residual="other").inputs().tensors()]


@pytest.mark.parametrize("impl", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("init", INITS)
def test_every_impl_passes(impl: str, dtype: torch.dtype, init: str) -> None:
    oracle = Oracle(Case.of(SHAPE, 37, dtype=dtype, init=init, residual="other").inputs())
    assert [d for d in oracle.check(call(impl), impl=impl) if not d.holds] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_number_is_caught(name: str) -> None:
    oracle = Oracle(Case.of(SHAPE, 37, residual="other").inputs())
    results = evaluate(oracle.inputs, call("dense"))
    flat = results[name].view(-1)
    flat[flat.abs().argmax()] *= 1 + 1e-4
    assert [d.tensor for d in oracle.compare(results) if not d.holds] == [name]


def test_a_gradient_that_autograd_sees_wrong_is_caught() -> None:
    """The function has the right output, but its backward halves the gradient of the up rule."""

    def function(inputs: Inputs) -> Tensor:
        assert inputs.up is not None
        rule = inputs.up.rule
        return call("dense")(inputs._replace(up=inputs.up._replace(rule=rule.detach() + (rule - rule.detach()) / 2)))

    deviations = Oracle(Case.of(SHAPE, 5).inputs()).check(function)
    assert [d.tensor for d in deviations if not d.holds] == ["up.rule"]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_number_that_is_none_is_caught(wrong: float) -> None:
    oracle = Oracle(Case.of(SHAPE, 5).inputs())
    results = evaluate(oracle.inputs, call("dense"))
    results["x"][0, 0] = wrong
    assert [(d.tensor, d.error) for d in oracle.compare(results) if not d.holds] == [("x", math.inf)]


def test_error_is_relative_to_the_largest_number() -> None:
    exact = torch.tensor([8.0, 0.0], dtype=torch.float64)
    assert error(torch.tensor([8.0, 2.0]), exact) == 0.25
    assert error(torch.zeros(3), exact) == math.inf
    assert error(torch.ones(2), torch.zeros(2, dtype=torch.float64)) == 1.0
    assert error(torch.empty(0), torch.empty(0, dtype=torch.float64)) == 0.0


def test_floor_is_rounding() -> None:
    assert floor(torch.float32, torch.float32) == 2.0**-18
    assert floor(torch.bfloat16, torch.float32) == 2.0**-7
    assert floor(torch.float64, torch.float64) == 2.0**-47


@pytest.mark.parametrize("residual", RESIDUALS)
def test_cases_repeat_and_differ_by_seed(residual: str) -> None:
    first, again, other = (Case.of(SHAPE, 3, residual=residual, seed=seed).inputs() for seed in (1, 1, 2))
    names = list(first.tensors())
    assert ("residual" in names) == (residual == "other")
    assert (first.residual is first.x) == (residual == "x")
    for name in names:
        assert torch.equal(first.tensors()[name], again.tensors()[name])
        assert not torch.equal(first.tensors()[name], other.tensors()[name])


def test_paper_cases_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    case = Case.of(SHAPE, 3, init="paper").inputs()
    assert torch.equal(torch.get_rng_state(), state)
    assert case.up is not None and case.up.bias is not None
    assert not case.up.bias.any()
    assert case.down.rule.abs().max() < 1e-3


@pytest.mark.parametrize("case", [Case.of(SHAPE, 3, operation="linear", rank=None), Case.of(SHAPE, 3, rank=2)], ids=str)
def test_results_are_named_as_the_tensors(case: Case) -> None:
    inputs = case.inputs()
    results = evaluate(inputs, call("factored"))
    assert list(results) == ["out", *inputs.tensors()]
    assert all(results[name].shape == tensor.shape for name, tensor in inputs.tensors().items())
    assert list(evaluate(inputs, call("dense"), gradients=False)) == ["out"]
