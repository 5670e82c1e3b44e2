"""LoKr layers of peft under ck.patch: the same outputs and gradients, with every option of LoKr.

The oracle is peft itself in float64. peft and the patch draw the same random numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lokr_layers import SETUPS, assert_within_contract, batch, exact_step, layer, make, patched, peft, step
from oracle import BF16, FP16, FP32, FP64
from torch import nn

import compacter_kernels as ck

DROPOUTS: dict[str, dict[str, Any]] = {
    "rank": {"rank_dropout": 0.4},
    "scaled rank": {"rank_dropout": 0.4, "rank_dropout_scale": True},
    "module": {"module_dropout": 0.5},
    "both": {"rank_dropout": 0.4, "module_dropout": 0.5},
}


def _assert_same_step(model: Any, *args: Any, seed: int = 1, **options: Any) -> None:
    """The model and a patched copy of it agree."""
    exact, shipped = exact_step(model, *args, seed=seed), step(model, *args, seed=seed, **options)
    assert_within_contract(step(patched(model), *args, seed=seed, **options), shipped, exact)


def test_the_setups_have_the_shapes_that_they_name() -> None:
    """Whole or factorised w1 and w2 occur in all four combinations."""
    kinds = {(("a" in layer(make(s)).lokr_w1), ("a" in layer(make(s)).lokr_w2)) for s in SETUPS}
    assert len(kinds) == 4
    shapes = {name: tuple(p.shape) for name, p in make("factorised w1").named_parameters() if "lokr" in name}
    assert sorted(shapes.values()) == [(3, 6), (3, 10), (8, 3), (12, 3)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("setup", SETUPS)
def test_float32(setup: str, training: bool) -> None:
    model = make(setup).train(training)
    _assert_same_step(model, *batch(model))


@pytest.mark.parametrize("setup", SETUPS)
def test_float64(setup: str) -> None:
    model = make(setup).double()
    x, grad = batch(model, FP64)
    expected = step(model, x, grad)
    for name, value in step(patched(model), x, grad).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("setup", SETUPS)
def test_a_model_of_low_precision(setup: str, dtype: torch.dtype) -> None:
    model = make(setup).to(dtype)
    _assert_same_step(model, *batch(model, dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("setup", SETUPS)
def test_float32_adapters_of_a_model_of_low_precision(setup: str, dtype: torch.dtype) -> None:
    model = make(setup)
    layer(model).base_layer.to(dtype)
    _assert_same_step(model, *batch(model, dtype))


@pytest.mark.parametrize("setup", ["low rank", "whole w2"])
def test_adapters_of_lower_precision_than_the_model(setup: str) -> None:
    model = make(setup, dtype=BF16)
    _assert_same_step(model, *batch(model))


@pytest.mark.parametrize("weights", [FP32, BF16, FP64])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("setup", ["low rank", "whole w2", "factorised w1"])
def test_autocast(setup: str, dtype: torch.dtype, weights: torch.dtype) -> None:
    model = make(setup, dtype=weights)
    _assert_same_step(model, *batch(model), autocast=dtype)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("setup", ["low rank", "whole w2", "factorised w1"])
def test_dropout_in_training(setup: str, dropout: str, seed: int) -> None:
    model = make(setup, count=2, **DROPOUTS[dropout]).train()
    _assert_same_step(model, *batch(model), seed=seed)


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_dropout_drops(dropout: str) -> None:
    """Seeds differ in training, but not in evaluation; the next random number is that of peft."""
    model = make(**DROPOUTS[dropout])
    again, (x, grad) = patched(model), batch(model)
    outputs = [[step(again.train(mode), x, grad, seed=seed)["y"] for seed in range(8)] for mode in (True, False)]
    assert any(not torch.equal(y, outputs[0][0]) for y in outputs[0])
    assert all(torch.equal(y, outputs[1][0]) for y in outputs[1])
    drawn = []
    for one in (model.train(), again.train()):
        step(one, x, grad)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


def test_rank_dropout_of_low_precision() -> None:
    model = make(rank_dropout=0.4, rank_dropout_scale=True).to(BF16).train()
    _assert_same_step(model, *batch(model, BF16))


@pytest.mark.parametrize("active", [["a"], ["c"], ["a", "b", "c"], ["c", "a"]], ids="".join)
def test_several_adapters(active: list[str]) -> None:
    model = make(count=3)
    model.base_model.set_adapter(active)
    layer(model).scaling["b"] *= 3
    _assert_same_step(model, *batch(model))


def test_adapters_are_added_exchanged_and_deleted_behind_the_patch() -> None:
    model = make(count=2)
    again, (x, grad) = patched(model), batch(model)
    for one in (model, again):
        torch.manual_seed(3)
        one.add_adapter("new", peft.LoKrConfig(target_modules=["0"], r=6, init_weights=False))
        one.delete_adapter("b")
        one.set_adapter("new")
    assert_within_contract(step(again, x, grad), step(model, x, grad), exact_step(model, x, grad))
    with again.disable_adapter(), model.disable_adapter():
        assert torch.equal(again(x), model(x))
    weights = {name: value + 0.5 for name, value in model.state_dict().items() if "lokr_" in name}
    for one in (model, again):
        one.load_state_dict(weights, strict=False)
    assert_within_contract(step(again, x, grad), step(model, x, grad), exact_step(model, x, grad))


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("setup", SETUPS)
def test_merged_and_unmerged(setup: str, safe_merge: bool) -> None:
    """A merge is that of peft, so that the bits are the same."""
    model = make(setup, count=2).eval()
    again, (x, grad) = patched(model), batch(model)
    for one in (model, again):
        one.merge_adapter(["a"], safe_merge=safe_merge)
    assert torch.equal(again(x), model(x))
    for one in (model, again):
        one.unmerge_adapter()
    assert_within_contract(step(again, x, grad), step(model, x, grad), exact_step(model, x, grad))
    assert torch.equal(layer(again).get_delta_weight("b"), layer(model).get_delta_weight("b"))
    assert torch.equal(again.merge_and_unload(safe_merge=safe_merge)[0].weight, model.merge_and_unload()[0].weight)


def test_disabled_while_merged() -> None:
    """peft then unmerges in the next call."""
    model = make().eval()
    again, (x, _) = patched(model), batch(model)
    for one in (model, again):
        one.merge_adapter()
    with model.disable_adapter(), again.disable_adapter():
        assert torch.equal(again(x), model(x))
    assert not layer(again).merged
    assert torch.equal(layer(again).base_layer.weight, layer(model).base_layer.weight)


def test_strided_x_and_no_token() -> None:
    model = make()
    x, grad = batch(model, leading=(4, 6))
    _assert_same_step(model, x.transpose(0, 1)[1::2], grad.transpose(0, 1)[1::2])
    for leading in ((0,), (2, 0), ()):
        _assert_same_step(model, *batch(model, leading=leading))


def test_x_without_a_gradient_and_frozen_factors() -> None:
    model = make().double()
    again, (x, _) = patched(model), batch(model, FP64)
    for one in (model, again):
        layer(one).lokr_w2_a["a"].requires_grad_(False)
        one(x).square().sum().backward()
        assert layer(one).lokr_w2_a["a"].grad is None
    for name in ("lokr_w1", "lokr_w2_b"):
        torch.testing.assert_close(*(getattr(layer(one), name)["a"].grad for one in (again, model)))


def test_second_derivatives() -> None:
    model = make().double()
    x, _ = batch(model, FP64)
    found = []
    for one in (model, patched(model)):
        inputs = [x.clone().requires_grad_(), *(p for p in one.parameters() if p.requires_grad)]
        first = torch.autograd.grad(one(inputs[0]).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_layer_in_a_layer_of_another_method() -> None:
    """A mixed model of peft wraps the layer of LoRA, or is wrapped by it."""
    for methods in (("LoraConfig", "LoKrConfig"), ("LoKrConfig", "LoraConfig")):
        model = nn.Sequential(nn.Linear(60, 96))
        first, second = (getattr(peft, method)(target_modules=["0"], r=2) for method in methods)
        mixed = peft.get_peft_model(model, first, "one", mixed=True)
        mixed.add_adapter("two", second)
        mixed.set_adapter(["one", "two"])
        for name, parameter in mixed.named_parameters():
            if "lora_" in name or "lokr_" in name:
                parameter.data.normal_()
        x = torch.randn(4, 60)
        expected = mixed(x).detach()
        assert len(ck.patch(mixed).patched) == 1
        torch.testing.assert_close(mixed(x).detach(), expected, rtol=1e-4, atol=1e-4)
