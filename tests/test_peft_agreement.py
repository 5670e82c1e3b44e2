"""A model of peft computes what `inject` makes of the same base with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CROSS_ATTENTION, FAMILIES, build, output
from peft_models import IN_PEFT, adapter_values, ckp, config, injected_like, name_in_file, peft, randomise, wrapped
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.peft.layer import AdapterLayer

OPTIONS: dict[str, dict[str, Any]] = {
    "rank 2": {"phm_rank": 2, "factorized_phm_rule": True},
    "a rule each": {"shared_phm_rule": False, "phm_bias": False},
    "all shared": {"shared_W_phm": True, "phm_c_init": "uniform"},
    "whole W": {"factorized_phm_W": False, "init": "adapters"},
    "norms and scale": {"ln_before": True, "ln_after": True, "scaling": "learned"},
    "norm of the sum": {"ln_after": True, "adapter_residual_before_ln": True, "scaling": 2.0},
    "parallel": {"is_parallel": True},
    "parallel with norms": {"is_parallel": True, "ln_before": True, "ln_after": True},
    "by layer": {"reduction_factor": {"0": 2, "default": 8}},
    "without layer 1": {"leave_out": [1]},
    "feed-forward only": {"mh_adapter": False},
    "fixed rule": {"learn_phm": False, "non_linearity": "relu"},
    "no norms": {"train_layer_norms": False},
    "no head": {"modules_to_save": []},
    "named targets": {"target_modules": ["attention.self", "output.dense"], "leave_out": [0]},
}


def gradients(model: nn.Module, family: str) -> dict[str, Tensor]:
    """The gradients of all trained parameters."""
    output(family, model).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_same(model: Any, made: nn.Module, family: str) -> None:
    """Both models have the same bits of outputs and gradients, and train the same parameters."""
    assert torch.equal(output(family, model), output(family, made))
    got, expected = gradients(model, family), gradients(made, family)
    trained = {name_in_file(key) for key, p in ck.adapter_parameters(made) if p.requires_grad}
    assert trained == {_plain(name) for name, p in model.named_parameters() if p.requires_grad}
    assert {_plain(name) for name in got} == {name_in_file(key) for key in expected}
    for name, gradient in got.items():
        twin = next(value for key, value in expected.items() if name_in_file(key) == _plain(name))
        assert torch.equal(gradient, twin), name


def _plain(name: str) -> str:
    """The name in a file of a parameter of a model of peft."""
    return name.removeprefix(IN_PEFT).removesuffix(".default").replace(".modules_to_save.default", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    options = {"cross_adapter": family in CROSS_ATTENTION}
    model = wrapped(build(family), **options)
    made = injected_like(model, build(family), **options)
    assert not torch.allclose(output(family, model), output(family, build(family)), atol=1e-2)
    assert_same(model, made, family)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any]) -> None:
    model = wrapped(build("bert"), **options)
    assert_same(model, injected_like(model, build("bert"), **options), "bert")


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
def test_parallel_adapters_of_other_families(family: str) -> None:
    model = wrapped(build(family), is_parallel=True)
    assert_same(model, injected_like(model, build(family), is_parallel=True), family)


def test_dropout() -> None:
    """In training mode, with the same random numbers."""
    model = wrapped(build("bert"), dropout=0.5).train()
    made = injected_like(model, build("bert"), dropout=0.5).train()
    outputs = []
    for each in (model, made):
        torch.manual_seed(1)
        outputs.append(output("bert", each))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], output("bert", model))


def test_compacter_plus_plus() -> None:
    model = randomise(peft.get_peft_model(build("t5"), config(ckp.CompacterPlusPlusConfig))).eval()
    assert model.peft_config["default"].peft_type.value == "COMPACTER"
    assert_same(model, injected_like(model, build("t5"), mh_adapter=False), "t5")


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (r".*layer\.\d\.output\.dense", ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]),
        ({"attention.output.dense", "encoder.layer.1.output.dense"}, None),
        ("all-linear", None),
    ],
)
def test_target_modules(given: Any, plain: list[str] | None) -> None:
    options = {"train_layer_norms": False, "phm_dim": 2}
    model = wrapped(build("roberta"), target_modules=given, **options)
    targets = [name.removeprefix(IN_PEFT) for name, m in model.named_modules() if isinstance(m, AdapterLayer)]
    linear = [name for name, m in build("roberta").named_modules() if isinstance(m, nn.Linear)]
    expected = plain or [name for name in linear if given == "all-linear" or name.endswith(tuple(given))]
    assert targets == expected
    assert_same(model, injected_like(model, build("roberta"), target_modules=targets, **options), "roberta")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("target_modules", [None, ["output.dense"]])
@pytest.mark.parametrize("excluded", [["attention.output.dense"], r".*attention\.output\.dense"])
def test_exclude_modules(target_modules: Any, excluded: Any) -> None:
    model = wrapped(build("bert"), target_modules=target_modules, exclude_modules=excluded)
    adapted = {key.partition(".compacter_")[0] for key in adapter_values(model) if ".compacter_" in key}
    assert adapted == {f"bert.encoder.layer.{layer}.output.dense" for layer in range(2)}


def test_all_linear_has_the_numbers_of_layers() -> None:
    model = wrapped(build("bert"), target_modules="all-linear", leave_out=[1], train_layer_norms=False)
    adapted = {key.partition(".compacter_")[0] for key in adapter_values(model) if ".compacter_" in key}
    assert adapted
    assert not any(".layer.1." in name for name in adapted)
