"""Which gradients are computed, and derivatives beyond the first one."""

from __future__ import annotations

import pytest
import torch
from oracle import BF16, FUSED, IMPLS, Case, Tensors, copies, oracle, reference, run

from compacter_kernels.accuracy import error, floor

LINEAR = Case("linear", shape=(11,), rank=2)
ADAPTER = Case(shape=(11,), rank=2, residual="other")
SAME = Case(shape=(11,), dtype=BF16)

NEEDED = {
    LINEAR: [
        *("x", "down.rule", "down.left", "down.right", "down.bias", "x down.rule"),
        *("down.left down.right down.bias", "down.rule down.left down.right down.bias"),
    ],
    SAME: ["x", "down.left", "up.right up.bias", "x down.bias", "down.rule up.rule"],
    ADAPTER: [
        *("x", "residual", "down.rule", "down.left", "down.right", "down.bias"),
        *("up.rule", "up.left", "up.right", "up.bias", "x residual", "down.bias up.bias", "down.rule up.rule"),
        "down.left down.right down.bias up.left up.right up.bias",
        "x down.rule down.left down.right down.bias",
        "x up.rule up.left up.right up.bias",
    ],
}
COMBINATIONS = [(case, needed) for case, combinations in NEEDED.items() for needed in combinations]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("case", "needed"),
    COMBINATIONS,
    ids=[f"{case.operation}-{case.residual}-{needed}" for case, needed in COMBINATIONS],
)
def test_only_what_needs_a_gradient_gets_one(case: Case, needed: str, impl: str) -> None:
    names = needed.split()
    tensors = {name: t.requires_grad_(name in names) for name, t in case.tensors().items()}
    case.call(tensors, impl).backward(case.grad_output())
    got = {name: t.grad for name, t in tensors.items() if t.grad is not None}
    assert sorted(got) == sorted(names)
    assert not list(reference(case).violations(got, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_those_of_each_dtype(impl: str) -> None:
    """Every parameter has its own dtype."""
    case = Case("linear", shape=(11,))
    dtypes = {"x": BF16, "rule": torch.float64, "left": torch.float16, "right": torch.float32, "bias": BF16}
    tensors = {
        name: t.detach().to(dtypes[name.rpartition(".")[2]]).requires_grad_() for name, t in case.tensors().items()
    }
    grad = case.grad_output().to(BF16)
    oracle(Case("linear", shape=(11,), dtype=BF16), tensors, grad).accept(run(case, tensors, impl, grad), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_rule_for_both_projections_gets_the_sum(impl: str) -> None:
    case = Case(shape=(11,))
    tensors = case.tensors()
    tensors["up.rule"] = tensors["down.rule"]
    case.call(tensors, impl).backward(case.grad_output())
    apart = oracle(case, copies(tensors), case.grad_output())
    expected = apart.exact["down.rule"] + apart.exact["up.rule"]
    limit = 2 * max(apart.limits.values())
    assert (tensors["down.rule"].grad - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_accumulate(impl: str) -> None:
    tensors = ADAPTER.tensors()
    for _ in range(2):
        ADAPTER.call(tensors, impl).backward(ADAPTER.grad_output())
    once = run(ADAPTER, copies(tensors), impl)
    for name, t in tensors.items():
        torch.testing.assert_close(t.grad, 2 * once[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["one number", "a parameter of shape (1,)"])
def test_learned_scale(kind: str, impl: str) -> None:
    """A tensor as scale gets a gradient, and the parameters keep their dtypes."""
    case = Case(shape=(11,), dtype=BF16, params=BF16)
    tensors = case.tensors()
    scale = torch.tensor(0.7 if kind == "one number" else [0.7], requires_grad=True)
    case.call(tensors, impl, scale=scale).backward(case.grad_output())
    exact_scale = scale.detach().double().requires_grad_()
    exact = copies(tensors, torch.float64)
    case.call(exact, "dense", scale=exact_scale).backward(case.grad_output().double())
    for t, wide in ((scale, exact_scale), *zip(tensors.values(), exact.values(), strict=True)):
        assert t.grad.dtype == t.dtype
        assert error(t.grad, wide.grad) <= floor(t.dtype, torch.float32)


def _first_derivatives(case: Case, tensors: Tensors, impl: str) -> tuple[torch.Tensor, ...]:
    loss = case.call(tensors, impl).square().sum()
    return torch.autograd.grad(loss, list(tensors.values()), create_graph=True)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", [LINEAR, ADAPTER, SAME], ids=str)
def test_second_derivative_of_a_fused_impl_raises(case: Case, impl: str) -> None:
    tensors = case.tensors()
    for name, grad in zip(tensors, _first_derivatives(case, tensors, impl), strict=True):
        if name != "residual":  # its gradient is grad_output itself
            with pytest.raises(RuntimeError, match=r"no second derivative.*impl='factored'"):
                grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("impl", FUSED)
def test_second_derivative_through_the_operators_raises(impl: str) -> None:
    tensors = LINEAR.tensors()
    out = torch.ops.compacter_kernels.phm_linear(*tensors.values(), impl)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors["down.left"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='factored'"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", [LINEAR, ADAPTER], ids=str)
def test_first_derivative_with_create_graph(case: Case, impl: str) -> None:
    tensors = case.tensors()
    got = torch.autograd.grad(case.call(tensors, impl), list(tensors.values()), case.grad_output(), create_graph=True)
    assert not list(reference(case).violations(dict(zip(tensors, got, strict=True))))


@pytest.mark.parametrize("case", [LINEAR, ADAPTER], ids=str)
def test_second_derivative_of_factored(case: Case) -> None:
    """It agrees with dense in float64. test_gradcheck.py compares it with finite differences."""
    seconds = []
    for impl in ("factored", "dense"):
        tensors = case.tensors(torch.float64)
        penalty = sum(g.square().sum() for g in _first_derivatives(case, tensors, impl))
        seconds.append(torch.autograd.grad(penalty, list(tensors.values())))
    torch.testing.assert_close(*seconds, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", FUSED)
def test_changing_a_saved_tensor_is_noticed(impl: str) -> None:
    tensors = ADAPTER.tensors()
    out = ADAPTER.call(tensors, impl)
    with torch.no_grad():
        tensors["down.left"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("impl", FUSED)
def test_a_tensor_that_a_transform_left_behind(impl: str) -> None:
    """torch unwraps such a tensor in an autograd.Function.

    Our functions skip the search for such tensors, but still give the right result.
    """
    kept = []

    def square(x: torch.Tensor) -> torch.Tensor:
        kept.append(x * 1.0)
        return (x * x).sum()

    case = Case()
    tensors = case.tensors()
    torch.func.grad(square)(tensors["x"].detach())
    left = {**tensors, "x": kept[0]}
    assert torch.equal(case.call(left, impl), case.call(tensors, impl))
