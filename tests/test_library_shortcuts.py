"""What `adapters` does in every layer for nothing is left out while anything is patched, and nothing else changes."""

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
from torch.utils._python_dispatch import TorchDispatchMode

from compacter_kernels.patch import library_shortcuts
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
    """The modules of the library in which our function stands."""
    names = {name for name in sys.modules if name.startswith("adapters.")}
    return {name for name in names if library_shortcuts.matched in vars(sys.modules[name]).values()}


def _nobody_uses_them() -> None:
    """Take back what models had that were collected, too."""
    library_shortcuts.take(adapters)
    for user in list(library_shortcuts._users):
        library_shortcuts.give_back(user)


@pytest.fixture(autouse=True)
def alone() -> Any:
    """Without the models that other tests have patched and left."""
    _nobody_uses_them()
    yield
    _nobody_uses_them()


SEARCH = AdapterLayerBase.get_active_setup


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_leaves_them_out(family: str) -> None:
    model = make(family)
    before = _repeats(model)
    assert before == {"bert": 2 * 3, "t5": 6 * 3, "gpt2": 0, "llama": 2 * 3}[family]  # GPT-2 has no such copies
    patch(model)
    assert _repeats(model) == 0
    unpatch(model)
    assert _repeats(model) == before


def test_every_user_must_be_gone() -> None:
    first, second = make(), make("t5")
    patch(first)
    patch(second)
    patch()
    holders = _holders()
    assert {"adapters.composition", "adapters.models.bert.modeling_bert", "adapters.models.t5.modeling_t5"} <= holders
    entries = set(library_shortcuts.ENTRIES)
    assert entries.isdisjoint(unpatch(first).restored)
    assert entries.isdisjoint(unpatch(first).restored)  # again
    assert entries.isdisjoint(unpatch().restored)
    assert _holders() == holders
    assert AdapterLayerBase.get_active_setup is library_shortcuts.active_setup
    assert entries <= set(unpatch(second).restored)
    assert not _holders()
    assert AdapterLayerBase.get_active_setup is SEARCH


def test_users_that_are_gone_leave_it_to_the_next() -> None:
    patch(make())
    gc.collect()
    assert not library_shortcuts._users
    second = make()
    patch(second)
    unpatch(second)
    assert not _holders()
    assert AdapterLayerBase.get_active_setup is SEARCH


def test_batches_that_differ_are_repeated() -> None:
    """As the library does it."""
    query, key, value = torch.randn(4, 2, 3, 5), torch.randn(2, 2, 3, 5), torch.randn(1, 2, 3, 5)
    expected = adapters.composition.match_attn_matrices_for_parallel(query, key, value)
    patch(make())
    found = adapters.composition.match_attn_matrices_for_parallel(query, key, value)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert adapters.composition.match_attn_matrices_for_parallel(query, query, value)[2].shape[0] == 4
    assert adapters.composition.match_attn_matrices_for_parallel(query, query, query)[2] is query


def test_the_same_bits() -> None:
    """Of a model that has no Compacter, beside one that is patched."""
    plain, model = make(a=adapters.SeqBnConfig(reduction_factor=4)), make(a=compacter())
    expected = step(plain)
    patch(model)
    assert _repeats(plain) == 0
    found = step(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


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
    """Layers of every method, some of which hold nothing of a given one."""
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
    found = []
    with adapters.AdapterSetup(setup) if within == "context" else nullcontext():
        for skipped in (None, [1], [0, 1]):
            model.adapters_config.skip_layers = skipped
            expected = [SEARCH(layer) for layer in layers]
            assert [library_shortcuts.active_setup(layer) for layer in layers] == expected
            found += expected
    assert any(found) == (setup is not None and setup != SETUPS["elsewhere"])


def test_layers_without_adapters_do_not_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make(), []
    patch(model)
    contexts = adapters.AdapterSetup.get_contexts
    monkeypatch.setattr(adapters.AdapterSetup, "get_contexts", lambda: (asked.append(1), contexts())[1])
    for layer in model.modules():
        if isinstance(layer, AdapterLayerBase):
            layer.get_active_setup()
    assert len(asked) == 4  # two layers with two adapters each
