"""A patched model of `adapters` with plain bottleneck adapters: the same logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters_models import (
    FAMILIES,
    PAST_KEY_VALUE,
    ExactStep,
    adapters,
    assert_same_step,
    compacter,
    inputs,
    make,
    residuals_of_calls,
    step,
)
from phm_lookalikes import hooks_known
from torch import nn
from torch.nn import functional as F

from compacter_kernels.patch.patch import patch, unpatch

pytestmark = pytest.mark.filterwarnings(PAST_KEY_VALUE)
WHOLE = "one kernel"
CONFIGS: dict[str, tuple[Any, str]] = {
    "seq_bn": (adapters.SeqBnConfig(reduction_factor=4), WHOLE),
    "double_seq_bn": (adapters.DoubleSeqBnConfig(reduction_factor=4), WHOLE),
    "par_bn": (adapters.ParBnConfig(reduction_factor=4), WHOLE),
    "scale": (adapters.SeqBnConfig(reduction_factor=4, scaling="learned"), WHOLE),
    "layer norm before": (adapters.SeqBnConfig(ln_before=True), "one kernel, but for: layer norm before"),
    "layer norm after": (adapters.DoubleSeqBnConfig(ln_after=True), "one kernel, but for: layer norm after"),
    "dropout": (adapters.SeqBnConfig(dropout=0.3), "one kernel, but for: dropout in training"),
    "gate": (adapters.SeqBnConfig(use_gating=True), "one kernel, but for: gate"),
    "channels": (adapters.SeqBnConfig(scaling="channel"), "one kernel, but for: scaling of each channel"),
    "gelu_new": (adapters.DoubleSeqBnConfig(non_linearity="gelu_new"), WHOLE),
    "clipped": (adapters.SeqBnConfig(non_linearity="gelu_10"), "one kernel, but for: activation"),
    "residual of the norm": (adapters.SeqBnConfig(residual_before_ln=False, original_ln_before=True), WHOLE),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_options(name: str) -> None:
    config, how = CONFIGS[name]
    model = make(a=config)
    exact = ExactStep(model)
    torch.manual_seed(3)
    expected = step(model)
    report = patch(model)
    assert {note for _, note in report.patched} == {how}
    assert not report.skipped
    torch.manual_seed(3)
    if "dropout" in name:
        assert_same_step(step(model), expected)
    else:
        exact.check(step(model))
    model.eval()
    patched = step(model)
    unpatch(model)
    assert_same_step(patched, step(model))


@pytest.mark.parametrize("config", ["seq_bn", "double_seq_bn", "par_bn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, config: str) -> None:
    model = make(family, a=CONFIGS[config][0])
    parameters = dict(model.named_parameters())
    exact = ExactStep(model)
    report = patch(model)
    exact.check(step(model))
    assert len(report.patched) == sum(1 for name, _ in model.named_modules() if name.endswith("adapters.a"))
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())


@hooks_known
def test_one_kernel_computes_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(a=CONFIGS["double_seq_bn"][0]).eval()
    patch(model)
    residuals, widths = residuals_of_calls(monkeypatch), []
    linear = F.linear

    def recording(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        widths.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", recording)
    step(model)
    assert len(residuals) == 4  # of two layers with two adapters
    assert not any(8 in shape for shape in widths)


def test_beside_compacter() -> None:
    setup = adapters.composition.Stack("a", "b")
    model = make(a=compacter(), b=CONFIGS["seq_bn"][0], setup=setup)
    exact = ExactStep(model)
    assert {note for _, note in patch(model).patched} == {WHOLE}
    exact.check(step(model))


def test_hooks_run() -> None:
    model = make(a=CONFIGS["seq_bn"][0])
    adapter = model.bert.encoder.layer[0].output.adapters["a"]
    adapter.adapter_down[0].register_forward_hook(lambda module, args, out: out * 2)
    expected = step(model)
    patch(model)
    assert_same_step(step(model), expected)


def test_a_wide_bottleneck_stays() -> None:
    model = make(a=adapters.SeqBnConfig(reduction_factor=0.1))
    note = "its bottleneck of 319 is wider than 256; its linear layers run one by one"
    report = patch(model)
    assert not report.patched and {why for _, why in report.skipped} == {note}


def test_compile_and_copies() -> None:
    model = make(a=CONFIGS["double_seq_bn"][0]).eval()
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch).logits
        patch(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=1e-5, atol=1e-6)


def test_linear_layers_alone_are_nothing_to_patch() -> None:
    with pytest.raises(ValueError, match="has no PHM layer"):
        patch(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4)))
