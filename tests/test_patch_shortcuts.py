"""The shortcuts through `adapters`: on request only, with equal results, until the last unpatch."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from adapters.composition import BatchSplit, Fuse, Parallel, Stack, parse_composition
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters_models import FAMILIES, PAST_KEY_VALUE, adapters, compacter, make, step
from phm_lookalikes import OriginalAdapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from compacter_kernels.patch import adapters_library
from compacter_kernels.patch.patch import patch, unpatch

pytestmark = pytest.mark.filterwarnings(PAST_KEY_VALUE)


class _Repeats(TorchDispatchMode):
    """How often a tensor of heads is repeated."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.repeat.default and args[0].dim() == 4
        return func(*args, **(kwargs or {}))


def _repeats(model: torch.nn.Module) -> int:
    with _Repeats() as repeats:
        step(model)
    return repeats.count


def _holders() -> set[str]:
    """The modules of the library that hold our function."""
    names = {name for name in sys.modules if name.startswith("adapters.")}
    return {name for name in names if adapters_library.matched in vars(sys.modules[name]).values()}


def _give_all_back() -> None:
    """Undo the shortcuts, also for models that were garbage collected."""
    adapters_library.take_shortcuts(adapters)
    for user in list(adapters_library._users):
        adapters_library.give_back_shortcuts(user)


@pytest.fixture(autouse=True)
def alone() -> Any:
    """The test runs without models that other tests have patched."""
    _give_all_back()
    yield
    _give_all_back()


SEARCH = AdapterLayerBase.get_active_setup


def _functions() -> dict[str, Any]:
    """Every attribute of the library's modules, and of the class whose method is replaced."""
    modules = {name: vars(module) for name, module in sys.modules.items() if name.partition(".")[0] == "adapters"}
    modules["AdapterLayerBase"] = vars(AdapterLayerBase)
    return {f"{name}.{key}": value for name, attributes in modules.items() for key, value in attributes.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_replaces_no_function_of_the_library(family: str) -> None:
    model = make(family)
    step(model)  # transformers and `adapters` import some modules in the first call
    before = _functions()
    report = patch(model)
    step(model)
    after = _functions()
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if after[name] is not value] == []
    assert not set(adapters_library.SHORTCUTS) & set(report.patched)


def test_the_report_names_the_shortcuts() -> None:
    model = make()
    report = patch(model, shortcuts=True)
    assert report.patched[-2:] == adapters_library.SHORTCUTS
    assert "get_active_setup: no search where a layer holds no adapters, for every model of this process" in str(report)
    before = _functions()
    assert set(adapters_library.SHORTCUTS).isdisjoint(patch(model).patched)  # a second patch does not undo them
    assert _functions() == before
    assert unpatch(model).restored[-2:] == adapters_library.SHORTCUTS


def test_shortcuts_of_a_model_without_the_library() -> None:
    model = nn.Sequential(OriginalAdapter())
    with pytest.raises(ValueError, match=r"shortcuts=True.*`adapters`, and Sequential has no adapters of that library"):
        patch(model, shortcuts=True)
    assert not unpatch(model).restored


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_makes_no_copies(family: str) -> None:
    model = make(family)
    patch(model)
    before = _repeats(model)
    assert before == {"bert": 2 * 3, "t5": 6 * 3, "gpt2": 0, "llama": 2 * 3}[family]  # GPT-2 has no such copies
    patch(model, shortcuts=True)
    assert _repeats(model) == 0
    unpatch(model)
    assert _repeats(model) == before


def test_every_user_must_be_gone() -> None:
    first, second = make(), make("t5")
    patch(first, shortcuts=True)
    patch(second, shortcuts=True)
    patch()
    holders = _holders()
    assert {"adapters.composition", "adapters.models.bert.modeling_bert", "adapters.models.t5.modeling_t5"} <= holders
    entries = set(adapters_library.SHORTCUTS)
    assert entries.isdisjoint(unpatch(first).restored)
    assert entries.isdisjoint(unpatch(first).restored)  # again
    assert entries.isdisjoint(unpatch().restored)
    assert _holders() == holders
    assert AdapterLayerBase.get_active_setup is adapters_library.active_setup
    assert entries <= set(unpatch(second).restored)
    assert not _holders()
    assert AdapterLayerBase.get_active_setup is SEARCH


def test_users_that_are_gone_leave_it_to_the_next() -> None:
    patch(make(), shortcuts=True)
    gc.collect()
    assert not adapters_library._users
    second = make()
    patch(second, shortcuts=True)
    unpatch(second)
    assert not _holders()
    assert AdapterLayerBase.get_active_setup is SEARCH


def test_batches_that_differ_are_repeated() -> None:
    """The library does the same."""
    query, key, value = torch.randn(4, 2, 3, 5), torch.randn(2, 2, 3, 5), torch.randn(1, 2, 3, 5)
    expected = adapters.composition.match_attn_matrices_for_parallel(query, key, value)
    model = make()
    patch(model, shortcuts=True)
    actual = adapters.composition.match_attn_matrices_for_parallel(query, key, value)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert adapters.composition.match_attn_matrices_for_parallel(query, query, value)[2].shape[0] == 4
    assert adapters.composition.match_attn_matrices_for_parallel(query, query, query)[2] is query


def test_the_same_bits() -> None:
    """The model has no Compacter, and runs in a process with a patched model."""
    plain, model = make(a=adapters.SeqBnConfig(reduction_factor=4)), make(a=compacter())
    expected = step(plain)
    patch(model, shortcuts=True)
    assert _repeats(plain) == 0
    actual = step(plain)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


SETUPS = {
    "none": None,
    "one": "a",
    "another method": "lora",
    "stack": Stack("prefix", "a"),
    "nested": Parallel(Stack("a", "inverse"), "b"),
    "fuse": Fuse("a", "b"),
    "split": BatchSplit("lora", "reft", batch_sizes=[2, 2]),
    "elsewhere": Stack("nowhere"),
}


@pytest.mark.parametrize("within", ["model", "context"])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_each_layer_has_the_setup_that_the_library_finds(setup: Any, within: str) -> None:
    """The layers belong to every method. Some of them have nothing of a given method."""
    configs = {
        "lora": adapters.LoRAConfig(r=2),
        "prefix": adapters.PrefixTuningConfig(prefix_length=2, bottleneck_size=4),
        "reft": adapters.LoReftConfig(layers=[0], r=1),
        "inverse": adapters.SeqBnInvConfig(leave_out=[1]),
    }
    model = make(a=compacter(), b=compacter(leave_out=[0]), **configs)
    layers = [module for module in model.modules() if isinstance(module, AdapterLayerBase)]
    assert len({type(layer).__name__ for layer in layers}) >= 5
    model.adapters_config.active_setup = None if within == "context" else parse_composition(setup)
    actual = []
    with adapters.AdapterSetup(setup) if within == "context" else nullcontext():
        for skipped in (None, [1], [0, 1]):
            model.adapters_config.skip_layers = skipped
            expected = [SEARCH(layer) for layer in layers]
            assert [adapters_library.active_setup(layer) for layer in layers] == expected
            actual += expected
    assert any(actual) == (setup is not None and setup != SETUPS["elsewhere"])


def test_layers_without_adapters_do_not_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make(), []
    patch(model, shortcuts=True)
    contexts = adapters.AdapterSetup.get_contexts
    monkeypatch.setattr(adapters.AdapterSetup, "get_contexts", lambda: (asked.append(1), contexts())[1])
    for layer in model.modules():
        if isinstance(layer, AdapterLayerBase):
            layer.get_active_setup()
    assert len(asked) == 4  # two layers with two adapters each
