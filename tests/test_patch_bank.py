"""BatchSplit and Average of a patched model of `adapters` are one call of a bank where they can."""

from __future__ import annotations

from typing import Any

import adapters.composition as ac
import pytest
import torch
from adapters_models import PAST_KEY_VALUE, ExactStep, adapters, compacter, make, step
from phm_lookalikes import hooks_known
from torch import Tensor

from compacter_kernels.patch import adapters_bank
from compacter_kernels.patch.patch import patch, unpatch

pytestmark = pytest.mark.filterwarnings(PAST_KEY_VALUE)
CONFIGS: dict[str, Any] = {
    "compacter": compacter(),
    "own rules": compacter(shared_phm_rule=False, shared_W_phm=True, non_linearity="gelu_new"),
    "parallel": compacter(is_parallel=True, scaling=2.0),
    "learned scale": compacter(scaling="learned"),
    "seq_bn": adapters.SeqBnConfig(reduction_factor=4),
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": adapters.ParBnConfig(reduction_factor=4),
}
SETUPS = {
    "BatchSplit": ac.BatchSplit("a", "b", "c", batch_sizes=[1, 2, 1]),
    "BatchSplit in any order": ac.BatchSplit("c", "a", "c", batch_sizes=[2, 1, 1]),
    "Average": ac.Average("a", "b", "c", weights=[0.2, 0.5, 0.3]),
    "a part that is empty": ac.BatchSplit("a", "b", batch_sizes=[4, 0]),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of adapters in each call of a bank."""
    counted: list[int] = []
    function = adapters_bank.compacter_adapter_bank

    def counting(x: Tensor, down: Any, up: Any, **options: Any) -> Tensor:
        counted.append(down.slots()[1].shape[0])
        return function(x, down, up, **options)

    monkeypatch.setattr(adapters_bank, "compacter_adapter_bank", counting)
    return counted


def several(config: Any, setup: Any, family: str = "bert", **others: Any) -> Any:
    model = make(family, setup=ac.Stack("a"), **{"a": config, "b": config, "c": config, **others})
    model.set_active_adapters(setup)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapters." in name or "shared_parameters." in name)
    return model


@hooks_known
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("config", CONFIGS)
def test_one_call_for_each_layer(config: str, setup: str, calls: list[int]) -> None:
    model = several(CONFIGS[config], SETUPS[setup])
    exact = ExactStep(model)
    patch(model)
    actual = step(model)
    exact.check({name: actual[name] for name in exact.values})
    assert all(not actual[name].any() for name in actual.keys() - exact.values.keys())
    places = {"par_bn": 2, "seq_bn": 2}.get(config, 4)
    assert calls == [len(SETUPS[setup].children)] * places
    unpatch(model)
    calls.clear()
    step(model)
    assert not calls


OTHERS: dict[str, dict[str, Any]] = {
    "another size": {"b": compacter(reduction_factor=4)},
    "another activation": {"b": compacter(non_linearity="relu")},
    "a gate": {"b": compacter(use_gating=True)},
    "another kind": {"b": adapters.DoubleSeqBnConfig(reduction_factor=2)},
}


@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
def test_others_run_one_by_one(others: dict[str, Any], calls: list[int]) -> None:
    model = several(compacter(), SETUPS["BatchSplit"], **others)
    exact = ExactStep(model)
    patch(model)
    exact.check(step(model))
    assert not calls


@hooks_known
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_the_whole_library(family: str, calls: list[int]) -> None:
    model = several(compacter(), SETUPS["BatchSplit"], family)
    exact = ExactStep(model)
    patch()
    try:
        exact.check(step(model))
        assert calls and set(calls) == {3}
    finally:
        unpatch()
    assert "compose_batch_split" not in vars(adapters.methods.bottleneck.BottleneckLayer)
    calls.clear()
    exact.check(step(model))
    assert not calls


def test_a_wrong_batch_is_refused_as_before() -> None:
    model = several(compacter(), ac.BatchSplit("a", "b", batch_sizes=[1, 1]))
    patch(model)
    with pytest.raises(IndexError, match="not equal to the sum of batch_sizes"), torch.no_grad():
        step(model)
