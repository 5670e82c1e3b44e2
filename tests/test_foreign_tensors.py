"""Tensors of every kind as every argument give the right result, or an error that names it."""

from __future__ import annotations

import pytest
import torch
from foreign_tensors import KINDS, adapter, linear, outcomes, plain, tensors, weights
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.impl.cpu import unavailable

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch.func.jvp scripts a function
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
built = pytest.mark.skipif(unavailable() is not None, reason=f"cpu: {unavailable()}")
PARAMETERS = {"down.W_left": "down.left", "up.W_right": "up.right", "down.phm_rule": "down.rule", "up.b": "up.bias"}


def test_a_sharded_model_whose_adapter_is_called_by_itself() -> None:
    found = outcomes("sharded")
    assert found.pop("gathered False") == found.pop("gathered True") == "right"
    for outcome in found.values():
        assert "down.rule is a DTensor" in outcome and "call the module that gathers them" in outcome


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument(kind: str) -> None:
    found = outcomes(kind)
    assert len(found) > 60
    for call, outcome in found.items():
        name = PARAMETERS.get(call) or call.split()[2]
        if name == "all":
            assert outcome != "wrong", call
        elif outcome == "right":
            assert kind == "two_tensor", call  # the only kind that torch combines with plain tensors
        elif not call.endswith("compiled"):  # where torch raises its own error first
            assert name in outcome, f"{call}: {outcome}"
    together = {outcome for call, outcome in found.items() if " all no grad" in call}
    if kind in ("two_tensor", "dtensor", "fake", "meta"):
        assert together == {"right"}


@pytest.mark.parametrize("name", ["x", "residual", "down.rule", "down.left", "up.right", "up.bias"])
def test_transforms_of_torch(name: str) -> None:
    """torch.func.grad, vmap and jvp with respect to each argument.

    An impl of plain torch computes the call.
    """
    given = tensors()
    value, direction = given[name].double(), torch.ones_like(given[name]).double()
    given = {n: t.double() for n, t in given.items()}

    def total(tensor: Tensor) -> Tensor:
        return adapter({**given, name: tensor}).square().sum()

    leaf = value.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(value), expected)
    _, tangent = torch.func.jvp(total, (value,), (direction,))
    torch.testing.assert_close(tangent, (expected * direction).sum())
    both = torch.stack((value, 2 * value))
    torch.testing.assert_close(torch.vmap(total)(both), torch.stack((total(value), total(2 * value))))


def test_transforms_of_a_learned_scale_and_of_the_matrix() -> None:
    """Both are computed by torch before a kernel is called."""
    given = tensors()
    scale = torch.tensor([0.7])
    leaf = scale.clone().requires_grad_()
    down, up = weights(given, "down"), weights(given, "up")

    def scaled(value: Tensor) -> Tensor:
        return ck.compacter_adapter(given["x"], down, up, scale=value).square().sum()

    (expected,) = torch.autograd.grad(scaled(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(scaled)(scale), expected, rtol=1e-4, atol=1e-4)
    found = torch.vmap(lambda rule: ck.phm_matrix(down._replace(rule=rule)))(torch.stack((down.rule,) * 2))
    torch.testing.assert_close(found[1], ck.phm_matrix(down))


@pytest.mark.parametrize("function", [linear, adapter])
def test_transforms_in_float32_take_plain_torch_and_say_so(function: object) -> None:
    given = tensors() | {f"weights.{n.partition('.')[2]}": t for n, t in tensors().items() if n.startswith("down.")}
    expected = function(given)  # type: ignore[operator]
    found = torch.vmap(lambda x: function({**given, "x": x, "residual": given["residual"]}))  # type: ignore[operator]
    torch.testing.assert_close(found(torch.stack((given["x"],) * 2))[1], expected, rtol=1e-4, atol=1e-5)


@built
def test_an_explicit_kernel_under_a_transform_is_an_error() -> None:
    given = tensors()
    with pytest.raises(RuntimeError, match=r"impl='cpu' cannot serve this adapter: a transform.*factored"):
        torch.func.grad(lambda x: adapter({**given, "x": x}, "cpu").sum())(given["x"])


def test_forward_mode_with_frozen_weights() -> None:
    given = tensors()
    weight = weights(given, "down")
    x, direction = given["x"], torch.randn(5, 24)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(ck.phm_linear(dual, weight)).tangent
    expected = ck.phm_linear(direction, weight._replace(bias=None))
    assert tangent is not None
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "factored"])
def test_many_gradients_at_once(impl: str) -> None:
    """is_grads_batched maps the backward over its incoming gradients.

    A kernel cannot read these.
    """
    given = tensors()
    x = given["x"].requires_grad_()
    out = adapter(given, impl)
    grads = torch.stack((torch.ones(5, 24), torch.zeros(5, 24)))
    if impl == "auto" and unavailable() is None:
        with pytest.raises(RuntimeError, match="the gradient of the output has no memory"):
            torch.autograd.grad(out, x, grads, is_grads_batched=True)
    else:
        (found,) = torch.autograd.grad(out, x, grads, is_grads_batched=True)
        torch.testing.assert_close(found[1], torch.zeros(5, 24))


def test_memory_that_is_freed_before_the_backward() -> None:
    given = tensors()
    given["up.left"].requires_grad_()
    out = adapter(given, "auto")
    given["down.left"].untyped_storage().resize_(0)
    if unavailable() is None:
        with pytest.raises(RuntimeError, match=r"down\.left has no memory"):
            out.sum().backward()


def test_a_negative_view() -> None:
    """It is contiguous, and torch negates it when it is read."""
    given = tensors()
    for name in ("x", "residual", "down.rule", "up.bias"):
        memory = torch.empty(10**6)[54321:][: given[name].numel()]  # where no earlier tensor was
        changed = {**given, name: torch._neg_view(memory.view_as(given[name]).copy_(given[name]))}
        expected = adapter({**given, name: -given[name]})
        assert torch.equal(adapter(changed), expected), name
        assert torch.equal(adapter(changed), expected), f"{name} in the second call"


@pytest.mark.parametrize("kind", ["two_tensor", "freed", "strided_and_freed"])
def test_a_patched_model(kind: str) -> None:
    """One weight of an adapter is of that kind.

    The layer norm behind the adapter is frozen, so that the kernel computes it.
    """
    pytest.importorskip("adapters")
    from adapters_models import inputs, make

    model = make("bert").eval().requires_grad_(False)
    ck.patch(model)
    expected = model(**inputs(model)).logits
    layer = next(m for m in model.modules() if hasattr(m, "W_left") and not hasattr(m, "W_down_left"))
    layer._parameters["W_left"] = torch.nn.Parameter(KINDS[kind](layer.W_left), requires_grad=False)
    if kind == "two_tensor":
        torch.testing.assert_close(plain(model(**inputs(model)).logits), expected, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(RuntimeError, match=r"(down|up)\.left has no memory"):
            model(**inputs(model))
