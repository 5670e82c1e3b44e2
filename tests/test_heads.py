"""Heads that start untrained are trained as copies, also in a model inside another module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build
from torch import nn

import compacter_kernels as ck

CONFIG = ck.CompacterConfig(reduction_factor=4)


class Holder(nn.Module):
    """A module that holds the model, as a training loop's own class does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss()

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Any] = {
    "compiled": compiled,
    "held": Holder,
    "in a list": lambda model: nn.Sequential(model),
    "compiled, held, compiled": lambda model: compiled(Holder(compiled(model))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_heads_are_found_through_wrappers(name: str) -> None:
    inner = build("bert")
    model = ck.inject(WRAPPERS[name](inner), CONFIG)
    trained = {key for key, p in inner.named_parameters() if p.requires_grad and key.startswith("classifier")}
    assert trained == {"classifier.compacter.default.weight", "classifier.compacter.default.bias"}
    ck.remove_adapters(model)
    assert all(p.requires_grad for p in inner.parameters())


def test_a_model_that_is_named_like_a_head_is_no_head() -> None:
    holder = nn.Module()
    holder.classifier = build("bert")
    ck.inject(holder, CONFIG)
    assert not holder.classifier.bert.embeddings.word_embeddings.weight.requires_grad
    assert holder.classifier.classifier.compacter["default"].weight.requires_grad


def test_adapters_of_a_compiled_model_are_those_of_the_model() -> None:
    inner = build("bert")
    ck.inject(compiled(inner), CONFIG)
    assert [name for name, _ in ck.adapter_parameters(inner) if "_orig_mod" in name] == []
    ck.remove_adapters(inner)
    assert all(p.requires_grad for p in inner.parameters())
