"""The copies of query, key and value in the attention of `adapters`: left out while anything is patched."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from adapters_models import FAMILIES, PAST_KEY_VALUE, adapters, compacter, make, step
from torch.utils._python_dispatch import TorchDispatchMode

from compacter_kernels.models import attention_copies
from compacter_kernels.models.patch import patch, unpatch

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
    return {name for name in names if vars(sys.modules[name]).get(attention_copies.NAME) is attention_copies.matched}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without the models that other tests have patched and left."""
    for user in list(attention_copies._users):
        attention_copies.put_back(user)
    yield
    for user in list(attention_copies._users):
        attention_copies.put_back(user)


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
    assert attention_copies.ENTRY not in unpatch(first).restored
    assert attention_copies.ENTRY not in unpatch(first).restored  # again
    assert attention_copies.ENTRY not in unpatch().restored
    assert _holders() == holders
    assert attention_copies.ENTRY in unpatch(second).restored
    assert not _holders()


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
