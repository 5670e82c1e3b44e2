"""A patched model of `adapters` has the same logits and gradients, for every option and family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters.methods.modeling import Activation_Function_Class
from adapters_models import (
    FAMILIES,
    PAST_KEY_VALUE,
    WIDTH,
    assert_same_step,
    compacter,
    inputs,
    make,
    residuals_of_calls,
    step,
)
from oracle import BF16
from phm_lookalikes import hooks_known
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from compacter_kernels.patch.patch import patch, unpatch

pytestmark = pytest.mark.filterwarnings(PAST_KEY_VALUE)
WHOLE = "one kernel"
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({}, WHOLE),
    "output only": ({"mh_adapter": False}, WHOLE),
    "layer norm before": ({"ln_before": True}, "one kernel, but for: layer norm before"),
    "layer norm after": ({"ln_after": True}, "one kernel, but for: layer norm after"),
    "residual after layer norm": (
        {"ln_after": True, "adapter_residual_before_ln": False},
        "one kernel, but for: layer norm after",
    ),
    "dropout": ({"dropout": 0.3}, "one kernel, but for: dropout in training"),
    "gate": ({"use_gating": True}, "one kernel, but for: gate"),
    "scale": ({"scaling": 0.5}, WHOLE),
    "learned scale": ({"scaling": "learned"}, WHOLE),
    "channel scale": ({"scaling": "channel"}, "one kernel, but for: scaling of each channel"),
    "everything around": (
        {"ln_before": True, "ln_after": True, "dropout": 0.3, "use_gating": True, "scaling": "channel"},
        "one kernel, but for: layer norm before, scaling of each channel, dropout in training, gate, layer norm after",
    ),
    "parallel": ({"is_parallel": True, "scaling": 2.0}, WHOLE),
    "parallel with norm and gate": (
        {"is_parallel": True, "ln_after": True, "use_gating": True},
        "one kernel, but for: gate, layer norm after",
    ),
    "no bias": ({"phm_bias": False}, WHOLE),
    "rank": ({"phm_rank": 3}, WHOLE),
    "factorised rule": ({"factorized_phm_rule": True}, WHOLE),
    "own factorised rule": ({"factorized_phm_rule": True, "shared_phm_rule": False}, WHOLE),
    "unfactorised W": ({"factorized_phm_W": False}, WHOLE),
    "own rule": ({"shared_phm_rule": False}, WHOLE),
    "shared W": ({"shared_W_phm": True}, WHOLE),
    "shared W, own rule": ({"shared_W_phm": True, "shared_phm_rule": False}, WHOLE),
    "rule not learned": (
        {"learn_phm": False},
        "one kernel (learn_phm=False, but train_adapter trains the rule too)",
    ),
    "before the original norm": ({"original_ln_before": False}, WHOLE),
    "residual before the norm": ({"residual_before_ln": False}, WHOLE),
    "residual after adding": ({"residual_before_ln": "post_add", "original_ln_before": True}, WHOLE),
    **{name: ({"non_linearity": name}, WHOLE) for name in ("relu", "swish", "gelu_new", "leakyrelu", "mish", "linear")},
    "clipped gelu": ({"non_linearity": "gelu_10"}, "one kernel, but for: activation"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    options, how = OPTIONS[name]
    model = make(a=compacter(**options))
    if "gate, layer norm after" in how:
        model.double()  # the norm cancels the gate's scale: in float32 its gradient is only rounding
    expected = step(model)
    report = patch(model)
    assert {note for _, note in report.patched} == {how}
    assert not report.skipped
    assert_same_step(step(model), expected)
    model.eval()
    patched = step(model)
    unpatch(model)
    assert_same_step(patched, step(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = make(family)
    parameters = dict(model.named_parameters())
    expected = step(model)
    report = patch(model)
    assert_same_step(step(model), expected)
    assert len(report.patched) == sum(1 for name, _ in model.named_modules() if name.endswith("adapters.a"))
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())


class _DropPath(nn.Module):
    """Stochastic depth, which `adapters` imports from torchvision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1) < 0.5
        return x * keep / 0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("is_parallel", [False, True])
def test_stochastic_depth(training: bool, is_parallel: bool) -> None:
    model = make(a=compacter(is_parallel=is_parallel, scaling="learned"))
    for module in model.modules():
        if hasattr(module, "adapter_up"):
            module.DropPath = _DropPath()
    model.train(training)
    expected = step(model)
    patch(model)
    assert_same_step(step(model), expected)


def test_a_direct_call_returns_all_that_it_did() -> None:
    model = make(a=compacter(use_gating=True, shared_phm_rule=False))
    adapter = model.bert.encoder.layer[0].output.adapters["a"]
    x, residual = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)
    for arguments in ((x, residual), (x, residual, True)):
        expected = adapter(*arguments)
        patch(model)
        actual = adapter(*arguments)
        unpatch(model)
        assert len(actual) == len(expected) == len(arguments) + 1
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gating_scores() -> None:
    """Without a gate the library stores the last one of the outputs as the score."""
    for options in ({"use_gating": True}, {}):
        model = make(a=compacter(**options)).eval()
        expected = model(**inputs(model), output_adapter_gating_scores=True).adapter_gating_scores["a"]
        patch(model)
        actual = model(**inputs(model), output_adapter_gating_scores=True).adapter_gating_scores["a"]
        assert actual.keys() == expected.keys()
        for layer, scores in expected.items():
            for location, score in scores.items():
                value = torch.tensor(actual[layer][location])
                torch.testing.assert_close(value, torch.tensor(score), rtol=1e-5, atol=1e-6)


@hooks_known
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ln_before": True, "use_gating": True, "scaling": "channel"},
        {"ln_after": True, "adapter_residual_before_ln": False, "scaling": 0.5},
    ],
    ids=["plain", "norm before, gate, channels", "norm after"],
)
def test_float32_adapters_in_a_bfloat16_model(options: dict[str, Any]) -> None:
    """The library itself raises an error in the first forward."""
    model = make("llama", a=compacter(**options))
    expected = step(model)
    for name, parameter in model.named_parameters():
        if "adapters." not in name and "shared_parameters." not in name:
            parameter.data = parameter.data.bfloat16()
    patch(model)
    actual = step(model)
    assert actual.pop("logits").dtype == BF16
    trained = {name: grad for name, grad in actual.items() if "embed" not in name}
    assert {grad.dtype for grad in trained.values()} == {torch.float32}
    for name, grad in trained.items():
        assert (grad - expected[name]).norm() <= 0.1 * expected[name].norm(), name


@hooks_known  # the limit holds for one kernel, which does not round between its projections
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_autocast(family: str) -> None:
    model = make(family)
    exact = step(model)
    with torch.autocast("cpu", dtype=BF16):
        library = step(model)
        patch(model)
        actual = step(model)
    assert actual["logits"].dtype == library["logits"].dtype
    for name in exact:
        error, usual = ((value[name].float() - exact[name]).norm() for value in (actual, library))
        assert error <= 2 * usual, name


def test_a_hook_inside_the_adapter_is_run() -> None:
    model = make()
    adapter = model.bert.encoder.layer[0].output.adapters["a"]
    down, up = adapter.adapter_down, adapter.adapter_up
    for part in (up, down[0], adapter.non_linearity.f, down, adapter.dropout):
        handle = part.register_forward_hook(lambda module, args, output: output * 2)
        expected = step(model)
        patch(model)
        assert_same_step(step(model), expected)
        unpatch(model)
        handle.remove()


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}], ids=["layer's residual inside", "dropout outside"])
def test_an_activation_that_was_exchanged(options: dict[str, Any]) -> None:
    """The library runs the activation in adapter_down, and ignores non_linearity."""
    model = make(a=compacter(**options))
    for module in model.modules():
        if hasattr(module, "adapter_down"):
            module.adapter_down[1] = Activation_Function_Class("tanh")
    expected = step(model)
    patch(model)
    assert_same_step(step(model), expected)


def test_a_hook_on_all_modules_sees_the_adapters() -> None:
    model, seen = make(), []
    patch(model)
    with register_module_forward_hook(lambda module, args, output: seen.append(type(module).__name__)):
        step(model)
    assert seen.count("Adapter") == 4


def test_a_hook_on_the_adapter_sees_all_three_tensors() -> None:
    model = make()
    seen = []
    adapter = model.bert.encoder.layer[0].output.adapters["a"]
    adapter.register_forward_hook(lambda module, args, output: seen.append(output))
    patch(model)
    expected = step(model)
    unpatch(model)
    assert_same_step(step(model), expected)
    assert [[t.shape for t in output] for output in seen[:1]] == [[t.shape for t in output] for output in seen[1:]]


@hooks_known
def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    residuals = residuals_of_calls(monkeypatch)
    model = make()
    step(model)
    assert not residuals
    patch(model)
    step(model)
    assert len(residuals) == 4
    assert None not in residuals
