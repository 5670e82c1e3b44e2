"""ck.patch and ck.unpatch themselves: reversal, copies, the whole library, reports, errors."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from adapters_models import (
    adapters,
    assert_same_step,
    compacter,
    make,
    residuals_of_calls,
    step,
)
from phm_lookalikes import OpenDeltaHost, OriginalAdapter, TFewAdapter, hooks_known
from torch import nn

from compacter_kernels.patch import adapters_forward
from compacter_kernels.patch.patch import Entry, Report, patch, unpatch

modeling = pytest.importorskip("adapters.methods.modeling")
bottleneck = pytest.importorskip("adapters.methods.bottleneck")


def _attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def _bitwise(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_unpatch_restores_bitwise() -> None:
    model = make(a=compacter(shared_W_phm=True))
    attributes, expected, state = _attributes(model), step(model), list(model.state_dict())
    patch(model)
    assert not _bitwise(step(model), expected)  # the kernels round differently
    assert list(model.state_dict()) == state
    report = unpatch(model)
    assert len(report.restored) == 4 * 4  # an adapter, its two layers, and the layer that calls it
    assert _attributes(model) == attributes
    assert _bitwise(step(model), expected)


@pytest.mark.parametrize("kind", [OriginalAdapter, TFewAdapter, OpenDeltaHost])
def test_unpatch_restores_other_modules(kind: type[nn.Module]) -> None:
    model = kind()
    x = torch.randn(5, 32)
    expected = model(x)
    attributes = _attributes(model)
    patch(model)
    unpatch(model)
    assert _attributes(model) == attributes
    assert torch.equal(model(x), expected)


def test_patching_and_unpatching_twice() -> None:
    model = make()
    expected = step(model)
    reports = [patch(model), patch(model)]
    assert reports[0] == reports[1]
    assert_same_step(step(model), expected)
    assert unpatch(model).restored
    assert unpatch(model) == Report()
    assert _bitwise(step(model), expected)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("kind", [OriginalAdapter, TFewAdapter])
def test_copies(duplicate: Any, kind: Any) -> None:
    model = kind(f=torch.tanh)
    patch(model)
    again = duplicate(model)
    x = torch.randn(3, 32)
    assert torch.equal(again(x), model(x))
    assert vars(again)["forward"].args == (again,)
    assert len(unpatch(again).restored) == len(unpatch(model).restored) == 3


def test_a_copy_of_a_model_of_the_library() -> None:
    """It runs on its own weights. If it is unpatched, the first model stays patched."""
    model = make()
    patch(model)
    again = copy.deepcopy(model)
    expected = step(model)
    assert _bitwise(step(again), expected)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(0.01)
    assert _bitwise(step(model), expected)
    assert not _bitwise(step(again), expected)
    assert len(unpatch(again).restored) == 16
    assert len(unpatch(model).restored) == 16


def test_a_layer_of_the_library_is_pickled_with_its_patch() -> None:
    model = make(a=compacter(shared_phm_rule=False))
    patch(model)
    adapter = model.bert.encoder.layer[0].output.adapters["a"]
    again = _pickled(adapter)
    x = torch.randn(2, 3, 32)
    assert all(torch.equal(a, b) for a, b in zip(again(x, x), adapter(x, x), strict=True))
    assert again.forward.func is adapters_forward.bottleneck


@pytest.fixture
def whole_library() -> Any:
    report = patch()
    yield report
    unpatch()


def test_the_whole_library(whole_library: Report) -> None:
    """Models that are made before and after use the methods of their classes. No module changes."""
    assert [name.rpartition(".")[0] for name, _ in whole_library.patched] == [
        "adapters.methods.modeling.Adapter",
        "adapters.methods.modeling.ParallelAdapter",
        "adapters.methods.modeling.PHMLayer",
        *["adapters.methods.bottleneck.BottleneckLayer"] * 4,
        "adapters.composition",
        "adapters.methods.adapter_layer_base.AdapterLayerBase",
    ]
    patch()  # again
    model = make(a=compacter(), b=adapters.SeqBnConfig(reduction_factor=4), setup=adapters.composition.Stack("a", "b"))
    actual = step(model)
    assert not any(vars(module).keys() & {"forward", "compose_single"} for module in model.modules())
    unpatch()
    expected = step(model)
    assert not _bitwise(actual, expected)
    assert_same_step(actual, expected)
    assert unpatch() == Report()


@hooks_known
def test_the_kernel_serves_the_whole_library(whole_library: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    residuals = residuals_of_calls(monkeypatch)
    step(make())
    assert len(residuals) == 4


def test_unpatch_puts_the_methods_back() -> None:
    kinds = (modeling.Adapter, modeling.ParallelAdapter, modeling.PHMLayer, bottleneck.BottleneckLayer)
    before = [dict(vars(kind)) for kind in kinds]
    patch()
    assert all(dict(vars(kind)) != attributes for kind, attributes in zip(kinds, before, strict=True))
    unpatch()
    assert all(dict(vars(kind)) == attributes for kind, attributes in zip(kinds, before, strict=True))


def test_a_model_and_the_library_both_patched() -> None:
    model = make(a=compacter(use_gating=True))
    expected = step(model)
    patch(model)
    patch()
    assert_same_step(step(model), expected)
    unpatch(model)
    assert_same_step(step(model), expected)
    patch(model)
    unpatch()
    assert_same_step(step(model), expected)
    unpatch(model)
    assert _bitwise(step(model), expected)


class _Doubled(modeling.Adapter):
    def forward(self, *args: Any, **options: Any) -> Any:
        output, *rest = super().forward(*args, **options)
        return (output * 2, *rest)


class _Renamed(modeling.Adapter):
    """A subclass that computes the same."""


@pytest.mark.parametrize("library", [False, True])
def test_subclasses(library: bool, request: pytest.FixtureRequest) -> None:
    model = make()
    layers = model.bert.encoder.layer
    layers[0].output.adapters["a"].__class__ = _Doubled
    layers[1].output.adapters["a"].__class__ = _Renamed
    expected = step(model)
    if library:
        request.getfixturevalue("whole_library")
    else:
        report = patch(model)
        name = "bert.encoder.layer.0.output.adapters.a"
        assert report.skipped == ((name, "_Doubled has a forward of its own; its PHM layers run one by one"),)
        assert {entry.name for entry in report.patched} >= {f"{name}.adapter_up", f"{name}.adapter_down.0"}
        assert len(report.patched) == 3 + 2
    assert_same_step(step(model), expected)


def test_a_compose_single_of_its_own() -> None:
    model = make()
    layer = model.bert.encoder.layer[0].output
    layer.compose_single = functools.partial(type(layer).compose_single, layer)
    expected = step(model)
    report = patch(model)
    assert [name for name, _ in report.skipped] == ["bert.encoder.layer.0.output"]
    assert "compose_single of its own" in report.skipped[0].what
    assert_same_step(step(model), expected)


def test_a_forward_that_others_put_there() -> None:
    """The hooks of accelerate do this, before the patch or after it."""
    model = make()
    adapter = model.bert.encoder.layer[0].output.adapters["a"]
    expected = step(model)
    wrapped = adapter.forward
    adapter.forward = lambda *args, **options: wrapped(*args, **options)
    report = patch(model)
    assert [name for name, _ in report.skipped] == ["bert.encoder.layer.0.output.adapters.a"]
    assert_same_step(step(model), expected)
    unpatch(model)
    del adapter.forward
    patch(model)
    adapter._old_forward = adapter.forward
    adapter.forward = lambda *args, **options: adapter._old_forward(*args, **options)
    assert_same_step(step(model), expected)
    report = unpatch(model)
    assert report.skipped == (
        Entry(
            "bert.encoder.layer.0.output.adapters.a",
            "its forward was wrapped after it was patched; remove that hook first",
        ),
    )


def test_report_prints() -> None:
    model = nn.Sequential(OriginalAdapter(), OpenDeltaHost())
    lines = str(patch(model)).splitlines()
    assert lines == [
        "patched 1:",
        "  0: one kernel",
        "skipped 1:",
        "  1.compactor: it makes its layers in its first call; patch after that",
    ]
    assert str(unpatch(nn.Linear(2, 2))) == "nothing to do"
    assert "(the model): one kernel" in str(patch(OriginalAdapter()))


def test_a_model_without_adapters() -> None:
    model = make(a=compacter())
    model.delete_adapter("a")
    with pytest.raises(ValueError, match=r"has no PHM layer: no module with phm_dim.*Add the adapter first"):
        patch(model)


@pytest.mark.parametrize("call", [patch, unpatch])
def test_what_is_no_model(call: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        call("bert")


def test_a_version_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(adapters, "__version__", "2.0.0")
    for call in (lambda: patch(model), patch):
        with pytest.raises(RuntimeError, match=r"adapters 2\.0\.0 is not known to ck\.patch"):
            call()
    assert unpatch(model) == unpatch() == Report()
    assert patch(OriginalAdapter()).patched  # it does not depend on the library


def test_without_adapters() -> None:
    """Models of other libraries do not need the package. Without a model the error names it."""
    code = """
import sys
sys.modules["adapters"] = sys.modules["transformers"] = None
sys.path.insert(0, "tests")
from phm_lookalikes import OriginalAdapter
from compacter_kernels.patch.patch import patch
print(patch(OriginalAdapter()))
try:
    patch()
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "one kernel" in done.stdout
    assert "pip install adapters" in done.stdout
