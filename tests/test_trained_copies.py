"""Trained copies of norms and heads: dtypes, classes, hooks, forwards of other libraries."""

from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import pytest
import torch
from families import WIDTH, build, output
from torch import Tensor, nn

import compacter_kernels as ck


def config(**options: Any) -> ck.CompacterConfig:
    return ck.CompacterConfig(reduction_factor=4, phm_init_range=1.0, **options)


def model_with_a_norm(**options: Any) -> nn.Sequential:
    """A linear layer with an adapter, then a norm whose copy differs from it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    ck.inject(model, config(target_modules=["0"], **options))
    model[1].compacter["default"].weight.data.fill_(2.0)
    return model


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_copies_follow_dtype(family: str, low: torch.dtype) -> None:
    """So a gradient scaler works, which refuses float16 gradients."""
    heads = {"bert": None, "llama": ["lm_head", "embed_tokens"], "t5": ["lm_head", "wo"]}[family]
    model = build(family).to(low).requires_grad_(False)
    plain = output(family, model)
    options: dict[str, Any] = {"output_adapter": False} if family == "t5" else {}
    ck.inject(model, config(dtype="float32", modules_to_save=heads, **options))
    y = output(family, model)
    assert y.dtype == plain.dtype == low and y.isfinite().all()
    y.float().square().mean().backward()
    trained = dict(ck.adapter_parameters(model))
    assert {p.dtype for p in trained.values()} == {p.grad.dtype for p in trained.values()} == {torch.float32}
    with torch.autocast("cpu", low):
        output(family, model).float().square().mean().backward()
    with ck.disable_adapters(model):
        assert torch.equal(output(family, model), plain)


def test_a_copy_in_another_dtype_computes_in_it() -> None:
    norm = model_with_a_norm(dtype="float32").to(torch.bfloat16)[1]
    norm.compacter.float()
    x = torch.randn(3, WIDTH).bfloat16()
    expected = norm.compacter["default"](x.float()).bfloat16()
    assert torch.equal(norm(x), expected)


def test_the_module_stays_what_it_was() -> None:
    model = model_with_a_norm()
    norm, x = model[1], torch.randn(2, WIDTH)
    assert isinstance(norm, nn.LayerNorm) and type(norm).__name__ == "LayerNorm"
    assert [name for name, _ in norm.named_parameters()][:2] == ["weight", "bias"]
    expected = norm(x)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), pickle.loads(pickle.dumps(norm, protocol=1))):
        assert torch.equal(other(x), expected)
        other.compacter["default"].weight.data.zero_()
        assert torch.equal(norm(x), expected)
    ck.remove_adapters(model)
    assert type(norm) is nn.LayerNorm and "compacter" not in norm._modules


def test_a_forward_on_the_instance_is_the_base_s() -> None:
    """It may be set before or after inject, or be deleted.

    The copy computes the output, and the base keeps its forward.
    """
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    norm, x = model[1], torch.randn(2, WIDTH)

    def doubled(self: nn.LayerNorm, x: Tensor) -> Tensor:
        return 2 * nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias)

    norm.forward = types.MethodType(doubled, norm)
    twice = norm(x)
    ck.inject(model, config(target_modules=["0"]))
    assert torch.equal(norm(x), twice), "the copy has no such forward"
    norm.compacter["default"].weight.data.fill_(3.0)
    trained = norm(x)
    assert not torch.equal(trained, twice)
    norm.forward = lambda x: x
    assert torch.equal(norm(x), trained)
    with ck.disable_adapters(model):
        assert norm(x) is x
    del norm.forward
    assert torch.equal(norm(x), trained)
    with ck.disable_adapters(model):
        assert torch.equal(2 * norm(x), twice)
    norm.forward = types.MethodType(doubled, norm)
    ck.remove_adapters(model)
    assert torch.equal(norm(x), twice) and "forward" in vars(norm)


def test_hooks_of_the_module_run_once() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    model[1].register_forward_hook(lambda module, args, y: y + 1)
    x = torch.randn(2, WIDTH)
    expected = model[1](x)
    ck.inject(model, config(target_modules=["0"]))
    assert torch.equal(model[1](x), expected)


def test_a_subclass_that_another_library_makes_of_it_goes_on() -> None:
    """Parametrizations and FSDP2 also change the class of a module."""
    model = model_with_a_norm()
    norm, x = model[1], torch.randn(2, WIDTH)
    trained = norm(x)

    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    nn.utils.parametrize.register_parametrization(norm, "weight", Halved())
    assert torch.equal(norm(x), trained)
    with ck.disable_adapters(model):
        halved = norm(x)
    ck.remove_adapters(model)
    assert torch.equal(norm(x), halved)
    nn.utils.parametrize.remove_parametrizations(norm, "weight", leave_parametrized=False)
    assert torch.equal(norm(x), 2 * halved)
