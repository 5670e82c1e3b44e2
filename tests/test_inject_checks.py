"""Errors of `inject`, which are raised before the model changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import WIDTH, build, output
from torch import Tensor, nn

import compacter_kernels as ck

SMALL: dict[str, Any] = {"reduction_factor": 4, "phm_init_range": 1.0}


def assert_untouched(model: nn.Module, modules: list[str]) -> None:
    assert [name for name, _ in model.named_modules()] == modules
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["training", "active", "_modules", "_buffers", "register_hooks", "call_super_init"])
def test_names_that_modules_use_themselves(name: str) -> None:
    model = build("bert")
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"name must be a plain name.*{name}"):
        ck.inject(model, ck.CompacterConfig(**SMALL), name=name)
    assert_untouched(model, modules)


@pytest.mark.parametrize("name", ["base", "first", "shared", "compacter", "weight", "W_left"])
def test_names_that_are_free(name: str) -> None:
    model = ck.inject(build("bert"), ck.CompacterConfig(**SMALL), name=name)
    expected = output("bert", model)
    assert all(f".{name}." in key for key, _ in ck.adapter_parameters(model))
    ck.inject(model, ck.CompacterConfig(**SMALL), name="other")
    ck.set_adapter(model, name)
    assert torch.equal(output("bert", model), expected)


def test_leaving_out_all_layers() -> None:
    model = build("bert")
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"leave_out=\[0, 1\] leaves no layer an adapter; there are \[0, 1\]"):
        ck.inject(model, ck.CompacterConfig(**SMALL, leave_out=[0, 1]))
    assert_untouched(model, modules)


class Own(nn.Module):
    """A module with a child that has the same name as our child."""

    def __init__(self) -> None:
        super().__init__()
        self.compacter, self.out, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.out_features = WIDTH

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.out(self.compacter(x)))
        return out


@pytest.mark.parametrize(
    ("model", "options", "path"),
    [
        (Own, {"target_modules": ["out"]}, "compacter"),
        (lambda: nn.ModuleDict({"a": Own()}), {"target_modules": ["a"]}, "a.compacter"),
        (lambda: nn.ModuleDict({"a": Own()}), {"target_modules": ["out"], "modules_to_save": ["a"]}, "a.compacter"),
    ],
    ids=["of the model", "of a target", "of a head"],
)
def test_a_child_of_the_model_s_own_named_compacter(model: Any, options: dict[str, Any], path: str) -> None:
    made = model()
    modules = [name for name, _ in made.named_modules()]
    with pytest.raises(ValueError, match=rf"the model has a {path} of its own.*rename it"):
        ck.inject(made, ck.CompacterConfig(**SMALL, **options))
    assert_untouched(made, modules)


def test_a_child_of_that_name_elsewhere_is_of_the_base() -> None:
    model = nn.Sequential(Own())
    before = sum(p.numel() for p in model.parameters())
    ck.inject(model, ck.CompacterConfig(**SMALL, target_modules=["0.compacter", "0.out"]))
    assert ck.count_parameters(model).base == before
    model(torch.randn(2, WIDTH)).sum().backward()
    assert {name.partition(".compacter.default")[0] for name, _ in ck.adapter_parameters(model)} >= {
        "0.compacter",
        "0.out",
    }
    assert all(p.grad is not None for _, p in ck.adapter_parameters(model))


def test_a_part_that_has_adapters_of_its_own() -> None:
    model = build("bert")
    ck.inject(model.bert, ck.CompacterConfig(**SMALL))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"bert has adapters of its own.*inject\(model.bert, name=.*remove_adapters"):
        ck.inject(model, ck.CompacterConfig(**SMALL))
    with pytest.raises(ValueError, match="bert has adapters of its own"):
        ck.inject(model, ck.CompacterConfig(**SMALL), name="other")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())
    ck.remove_adapters(model.bert)
    ck.inject(model, ck.CompacterConfig(**SMALL))
    with pytest.raises(ValueError, match="has adapters already, of a model that this BertModel is part of"):
        ck.inject(model.bert, ck.CompacterConfig(**SMALL), name="other")


def test_a_module_with_an_adapter_is_not_trained_whole_under_another_name() -> None:
    model = ck.inject(build("bert"), ck.CompacterConfig(**SMALL), name="first")
    end = "bert.encoder.layer.0.output.dense"
    with pytest.raises(ValueError, match=rf"{end} has adapters already \(first\); it cannot have both"):
        ck.inject(model, ck.CompacterConfig(**SMALL, output_adapter=False, modules_to_save=[end]), name="second")


def test_a_target_of_a_whole_model_is_refused() -> None:
    options = {"target_modules": ["bert.encoder"], "train_layer_norms": False}
    model = ck.inject(build("bert"), ck.CompacterConfig(**SMALL, **options))
    expected = output("bert", model)
    with pytest.raises(ValueError, match="it has adapters already, of a model that this BertEncoder is part of"):
        ck.inject(model.bert.encoder, ck.CompacterConfig(**SMALL, target_modules=["output.dense"]))
    assert torch.equal(output("bert", model), expected)
