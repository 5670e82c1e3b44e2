"""A patched model of `adapters` in composition, generation, checkpointing and after saving."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_models import (
    PAST_KEY_VALUE,
    ExactStep,
    adapters,
    assert_same_step,
    compacter,
    draw_anew,
    inputs,
    make,
    residuals_of_calls,
    step,
)
from phm_lookalikes import hooks_known
from torch import nn

from compacter_kernels.patch.patch import patch, unpatch

ac = pytest.importorskip("adapters.composition")
pytestmark = pytest.mark.filterwarnings(PAST_KEY_VALUE)

SETUPS: dict[str, Any] = {
    "Stack": ac.Stack("a", "b"),
    "Fuse": ac.Fuse("a", "b"),
    "Split": ac.Split("a", "b", splits=[2, 4]),
    "BatchSplit": ac.BatchSplit("a", "b", batch_sizes=[1, 3]),
    "Parallel": ac.Parallel("a", "b"),
    "Average": ac.Average("a", "b", weights=[0.25, 0.75]),
    "Stack of Fuse": ac.Stack("c", ac.Fuse("a", "b")),
    "Fuse of Stacks": ac.Fuse(ac.Stack("a", "c"), "b"),
    "Stack of Parallel": ac.Stack("c", ac.Parallel("a", "b")),
    "Stack of nothing but a Parallel": ac.Stack(ac.Parallel("a", "b")),
    "Average of Stacks": ac.Average(ac.Stack("a", "c"), "b", weights=[0.5, 0.5]),
    "BatchSplit with a plain adapter": ac.BatchSplit("a", "plain", "c", batch_sizes=[1, 2, 1]),
    "plain first": ac.BatchSplit("plain", "a", batch_sizes=[1, 3]),
    "Stack with a plain adapter": ac.Stack("plain", "a"),
}


def _several(family: str, name: str) -> nn.Module:
    """Adapters that differ in those options that all composition blocks allow to differ."""
    model = make(
        family,
        a=compacter(),
        b=compacter(scaling="learned", non_linearity="relu", phm_rank=2),
        c=compacter(shared_phm_rule=False),
        plain=adapters.DoubleSeqBnConfig(reduction_factor=4),
    )
    if "Fuse" in name:
        (fuse,) = (block for block in (SETUPS[name], *SETUPS[name]) if isinstance(block, ac.Fuse))
        model.add_adapter_fusion([child if isinstance(child, str) else child.last() for child in fuse])
    model.set_active_adapters(SETUPS[name])
    draw_anew(model)
    for path, parameter in model.named_parameters():  # train_adapter accepts no nested setups
        trained = any(part in path for part in ("adapters.", "shared_parameters.", "adapter_fusion_layer."))
        parameter.requires_grad_(trained and "key.bias" not in path)  # the softmax makes its gradient 0
    return model


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
@pytest.mark.parametrize("name", SETUPS)
def test_compositions(name: str, family: str) -> None:
    model = _several(family, name)
    exact = ExactStep(model)
    patch(model)
    exact.check(step(model))


def test_fusion_attentions() -> None:
    model = _several("bert", "Fuse").eval()
    expected = model(**inputs(model), output_adapter_fusion_attentions=True).adapter_fusion_attentions["a,b"]
    patch(model)
    actual = model(**inputs(model), output_adapter_fusion_attentions=True).adapter_fusion_attentions["a,b"]
    assert actual.keys() == expected.keys()
    for layer, locations in expected.items():
        for location, attentions in locations.items():
            torch.testing.assert_close(
                torch.tensor(actual[layer][location]), torch.tensor(attentions), rtol=1e-5, atol=1e-6
            )


def test_an_adapter_setup_for_one_call() -> None:
    model = _several("bert", "Stack")
    for setup in ("b", ac.Stack("b", "c")):
        with adapters.AdapterSetup(setup):
            expected = step(model)
            patch(model)
            assert_same_step(step(model), expected)
            unpatch(model)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_generation(family: str, use_cache: bool) -> None:
    model = make(family, a=compacter(shared_W_phm=True)).eval()
    tokens = inputs(model)["input_ids"]

    def generate() -> torch.Tensor:
        mask = torch.ones_like(tokens)
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
        return model.generate(tokens, attention_mask=mask, eos_token_id=None, **options)

    expected = generate()
    patch(model)
    assert torch.equal(generate(), expected)
    assert len(set(expected.flatten().tolist())) > 2


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "llama"])
@pytest.mark.parametrize("options", [{"shared_phm_rule": False}, {}], ids=["own rule", "shared rule"])
def test_gradient_checkpointing(family: str, options: dict[str, Any]) -> None:
    """It is not reentrant, since the library refuses the reentrant kind."""
    model = make(family, a=compacter(**options))
    expected = step(model)
    model.gradient_checkpointing_enable()
    patch(model)
    assert_same_step(step(model), expected)


def test_saved_adapters_are_what_they_were(tmp_path: Path) -> None:
    model = make(a=compacter())
    model.save_adapter(str(tmp_path / "before"), "a")
    patch(model)
    model.save_adapter(str(tmp_path / "after"), "a")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    tensors = [
        torch.load(tmp_path / folder / "pytorch_adapter.bin", weights_only=True) for folder in ("before", "after")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    expected = step(copy.deepcopy(model))
    draw_anew(model, seed=9)  # so that loading has to restore the weights
    model.load_adapter(str(tmp_path / "after"), load_as="a", set_active=True)
    draw_anew(model)
    patch(model)  # the loaded modules are new
    model.train_adapter("a")
    assert_same_step(step(model), expected)


def test_deleting_and_adding_after_a_patch() -> None:
    model = make()
    patch(model)
    model.delete_adapter("a")
    model.add_adapter("d", config=compacter())
    model.train_adapter("d")
    draw_anew(model)
    expected = step(model)  # the new model is not patched
    assert len(patch(model).patched) == 4
    assert_same_step(step(model), expected)


@hooks_known
@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_a_single_adapter_adds_the_residual_of_its_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel adds both residuals, and BERT's norm. For a stack of two it adds one."""
    residuals = residuals_of_calls(monkeypatch)
    model = make(family)
    patch(model)
    step(model)
    assert len(residuals) >= 4
    assert {type(residual) for residual in residuals} == {str if family == "bert" else tuple}
    residuals.clear()
    stacked = make(family, adapters.composition.Stack("a", "b"), a=compacter(), b=compacter())
    patch(stacked)
    step(stacked)
    assert residuals
    assert all(isinstance(residual, torch.Tensor) for residual in residuals)


@pytest.mark.parametrize("name", ["compose_single", "compose_stack", "pre_block"])
@pytest.mark.parametrize("whole_library", [False, True])
def test_a_layer_with_a_method_of_its_own_is_called_as_before(name: str, whole_library: bool) -> None:
    """The method decides which adapters run, so that nothing may bypass it."""
    model = make()
    layer = model.bert.encoder.layer[0].output
    own, calls = getattr(layer, name), []

    def method(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return own(*args, **options)

    setattr(layer, name, method)
    expected = step(model)
    calls.clear()
    patch(None if whole_library else model)
    try:
        assert_same_step(step(model), expected)
    finally:
        unpatch(None if whole_library else model)
    assert calls
