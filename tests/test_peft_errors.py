"""What cannot be done is refused, with a message that says why, before anything has changed."""

from __future__ import annotations

import enum
import importlib
import re
import sys
from typing import Any

import pytest
import torch
from families import build, output
from peft_models import add, ckp, config, peft, wrapped
from torch import nn

import compacter_kernels as ck
from compacter_kernels.peft import registration

WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a width": (ValueError, r"layer\.0\.attention\.output\.dense: phm_dim=3 does not divide", {"phm_dim": 3}),
    "one width of several": (
        ValueError,
        r"intermediate\.dense: phm_dim=16 does not divide bottleneck=8",
        {"target_modules": ["intermediate.dense"], "reduction_factor": 8, "phm_dim": 16},
    ),
    "no such module": (
        ValueError,
        r"target_modules=\['nowhere'\] .* leave no module .*likely ones: \[",
        {"target_modules": ["nowhere"]},
    ),
    "all excluded": (ValueError, "exclude_modules=.* leave no module", {"exclude_modules": ["dense"]}),
    "no layer": (ValueError, r"leave_out=\[0, 1\] leaves no layer", {"leave_out": [0, 1]}),
    "no block": (ValueError, "has no block of the kind asked for", {"mh_adapter": False, "output_adapter": False,
                                                                    "cross_adapter": True}),
    "not a block": (
        ValueError,
        "intermediate.dense takes 32 numbers and .* gives 64",
        {"target_modules": ["intermediate.dense"], "is_parallel": True},
    ),
}  # fmt: skip


def state(model: nn.Module) -> Any:
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


@pytest.mark.parametrize("wrong", WRONG)
def test_a_failing_config_leaves_the_model_as_it_was(wrong: str) -> None:
    kind, message, options = WRONG[wrong]
    base = build("bert")
    before, plain = state(base), output("bert", base)
    with pytest.raises(kind, match=message):
        peft.get_peft_model(base, config(**options))
    with pytest.raises(kind, match=message):
        peft.inject_adapter_in_model(config(**options), base)
    assert state(base) == before
    model = wrapped(base)
    before, adapted = state(model), output("bert", model)
    with pytest.raises(kind, match=message):
        model.add_adapter("second", config(**options))
    assert state(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output("bert", model), adapted)
    assert torch.equal(output("bert", model.unload()), plain)


def test_a_model_that_is_not_in_the_table() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"not in the table .*target_modules.*likely ones: \['0', '2'\]"):
        peft.get_peft_model(model, config())


def test_a_model_with_adapters_of_inject() -> None:
    with pytest.raises(ValueError, match=r"has adapters by compacter_kernels\.inject already"):
        peft.get_peft_model(ck.inject(build("bert"), ck.CompacterConfig(reduction_factor=4)), config())


@pytest.mark.parametrize("option", [{"scaling": "big"}, {"phm_dim": 0}, {"target_modules": [], "dropout": 0.1}])
def test_wrong_options_are_refused_by_the_config(option: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(option))):
        ckp.CompacterConfig(**option)


def test_merging_is_refused_and_says_what_to_do() -> None:
    model = add(wrapped(build("bert")), "second", 1)
    before, adapted = state(model), output("bert", model)
    for merge in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(NotImplementedError, match=r"cannot be merged .* keep it beside .* or call unload\(\)"):
            merge()
    with pytest.raises(NotImplementedError, match=r"no bottleneck adapter computes .*activate several"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    assert state(model) == before
    assert torch.equal(output("bert", model), adapted)


@pytest.mark.parametrize("methods", [("compacter",), ("compacter", "lora"), ("lora", "compacter")])
def test_mixed_models_of_peft_are_refused(methods: tuple[str, ...]) -> None:
    """Without a change of the model. Its tuner knows a closed list of methods."""
    base = build("bert")
    configs = {"compacter": config(), "lora": peft.LoraConfig(target_modules=["query"])}
    with pytest.raises(ValueError, match=r"not compatible|not supported|COMPACTER"):  # noqa: PT012
        model = peft.get_peft_model(base, configs[methods[0]], mixed=True)
        before = state(model)
        model.add_adapter("second", configs[methods[1]])
    if methods[0] == "lora":
        assert state(model) == before


def test_a_changed_enum_of_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(enum.Enum):  # No subclass of str any more.
        LORA = "LORA"

    monkeypatch.setattr(registration, "PeftType", Changed)
    message = f"cannot add its methods to peft {re.escape(peft.__version__)}; it is tested with peft 0.18 to 0.21"
    with pytest.raises(ImportError, match=message):
        registration.peft_type("COMPACTER")


def test_without_peft_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft" or "compacter_kernels.peft" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs the package peft: pip install 'compacter-kernels\[peft\]'"):
        importlib.import_module("compacter_kernels.peft")
