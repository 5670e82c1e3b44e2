"""ck.route and ck.mix for adapters of peft, and adapter_names through the same bank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build, inputs
from peft_models import add, config, peft, wrapped
from phm_lookalikes import hooks_known
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.nn import stack

ckp = pytest.importorskip("compacter_kernels.peft")
NAMES: list[str | None] = ["default", None, "second", "default", "second"]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "parallel": {"is_parallel": True},
    "before the norm": {"original_ln_before": True},
    "adapters alone": {"train_layer_norms": False, "modules_to_save": []},
}


def make(**options: Any) -> Any:
    model = add(wrapped(build("bert"), **options), "second", 1, **options)
    return model.eval()


def bottlenecks(**options: Any) -> Any:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = peft.get_peft_model(build("bert", **quiet), ckp.BottleneckConfig(reduction_factor=4, **options))
    model.add_adapter("second", ckp.BottleneckConfig(reduction_factor=4, **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "bottleneck_adapter" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model.eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of adapters in each call of a bank."""
    counted: list[int] = []
    function = stack.compacter_adapter_bank

    def counting(x: Tensor, down: Any, up: Any, **options: Any) -> Tensor:
        counted.append(down.slots()[1].shape[0])
        return function(x, down, up, **options)

    monkeypatch.setattr(stack, "compacter_adapter_bank", counting)
    return counted


@hooks_known
@pytest.mark.parametrize("options", OPTIONS)
def test_route_is_adapter_names(options: str, calls: list[int]) -> None:
    model, batch = make(**OPTIONS[options]), inputs("bert", len(NAMES))
    expected = model(**batch, adapter_names=[name or "__base__" for name in NAMES])[0]
    assert calls == [2] * 4  # one call for each place of adapters
    with ck.route(model, NAMES):
        assert torch.equal(model(**batch)[0], expected)
    with ck.route(model, torch.tensor([1, -1, 0, 1, 0]), names=["second", "default"]):
        torch.testing.assert_close(model(**batch)[0], expected, rtol=1e-5, atol=1e-6)
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    with ck.mix(model, ["default", "second"], weights):
        torch.testing.assert_close(model(**batch)[0], expected, rtol=1e-4, atol=1e-5)
    for name in ("default", "second"):
        model.set_adapter(name)
        own = model(**batch)[0]
        for row, other in enumerate(NAMES):
            if other == name:
                torch.testing.assert_close(expected[row], own[row], rtol=1e-4, atol=1e-5)


@hooks_known
def test_bottleneck_adapters_run_in_a_bank(calls: list[int]) -> None:
    model, batch = bottlenecks(), inputs("bert", len(NAMES))
    model.set_requires_grad(["default", "second"])
    with ck.route(model, NAMES):
        mixed = model(**batch)[0]
    mixed.square().sum().backward()
    assert calls == [2] * 4
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for name in ("default", "second"):
        rows = [row for row, other in enumerate(NAMES) if other == name]
        model.set_adapter(name)
        own = model(**{key: value[rows] for key, value in batch.items()})[0]
        torch.testing.assert_close(mixed[rows], own, rtol=1e-4, atol=1e-5)
        own.square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    adapters = [name for name in expected if "bottleneck_adapter" in name]
    assert set(adapters) == {name for name in got if "bottleneck_adapter" in name}
    for name in adapters:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_outside_of_the_context() -> None:
    model, batch = bottlenecks().double().train(), inputs("bert", len(NAMES))

    def gradients() -> dict[str, Tensor]:
        with ck.route(model, NAMES):
            loss = model(**batch)[0].square().sum()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return grads

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-9)


def test_weights_for_each_layer() -> None:
    model, batch = bottlenecks(modules_to_save=[]), inputs("bert", 2)
    expected = model(**batch)[0]
    w = torch.zeros(2, 4, 2)
    w[..., 0] = 1.0
    with ck.mix(model, ["default", "second"], w):
        torch.testing.assert_close(model(**batch)[0], expected, rtol=1e-4, atol=1e-5)
    w[:, 3] = 0.0
    with ck.mix(model, ["default", "second"], w):
        assert (model(**batch)[0] - expected).abs().max() > 1e-3
    with (
        pytest.raises(ValueError, match="say nothing of layer norms and heads that are trained whole"),
        ck.mix(bottlenecks(), ["default", "second"], w),
    ):
        pass


def test_what_cannot_be_is_refused() -> None:
    model, batch = make(), inputs("bert", len(NAMES))
    with ck.route(model, NAMES), pytest.raises(RuntimeError, match="in a context of route or mix already"):
        model(**batch, adapter_names=["default"] * len(NAMES))
    with ck.route(model, NAMES), pytest.raises(RuntimeError, match="leave it before you add or remove adapters"):
        model.add_adapter("third", config())
    with (
        pytest.raises(ValueError, match="give route what get_peft_model returned"),
        ck.route(model.base_model.model, NAMES),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"the model has no adapters third; it has .*default"),
        ck.route(model, ["third"]),
    ):
        pass
    hooks = [m for m in model.modules() if m._forward_hooks and type(m).__name__ == "ModulesToSaveWrapper"]
    assert not hooks
    model(**batch, adapter_names=["default"] * len(NAMES))
