"""The ways to adapt the pretrained model. Each trains a new head, and some parameters more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from compacter_kernels.functional import explain
from compacter_kernels.nn import CompacterAdapter
from digits_model import Block, VisionTransformer
from train_common import BottleneckAdapter

REDUCTION_FACTOR = 8
PHM_DIM = 4
PHM_INIT_RANGE = 1e-4


class Method(NamedTuple):
    """A way to adapt a model.

    name: on the command line. title: in the table. prepare: takes a frozen model with a new head,
    adds modules and chooses the parameters that train. recipe: methods with the same one train at
    the same learning rate. rates: those to choose from; the first where none is chosen.
    """

    name: str
    title: str
    recipe: str
    rates: tuple[float, ...]
    prepare: Callable[[VisionTransformer], None]


def _nothing_more(model: VisionTransformer) -> None:
    """Train the head alone."""


def _everything(model: VisionTransformer) -> None:
    model.requires_grad_(True)


def _gradient_to_the_input(model: VisionTransformer) -> None:
    """Train the head alone, but carry the gradient through the frozen base, as an adapter must."""
    model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def add_adapters(model: VisionTransformer, make: Callable[[], nn.Module], after_attention: bool) -> None:
    """Put adapters into the blocks and train them, together with the layer norms."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
        elif isinstance(module, Block):
            if after_attention:
                module.attention_adapter = make()
            module.feed_forward_adapter = make()


def _bottleneck(model: VisionTransformer) -> None:
    size = model.hidden_size
    add_adapters(model, lambda: BottleneckAdapter(size, size // REDUCTION_FACTOR), after_attention=True)


def _compacter(impl: str, after_attention: bool, model: VisionTransformer) -> None:
    rule = nn.Parameter(PHM_INIT_RANGE * torch.randn(PHM_DIM, PHM_DIM, PHM_DIM))  # one, shared by all adapters

    def make() -> nn.Module:
        return CompacterAdapter(
            model.hidden_size, reduction_factor=REDUCTION_FACTOR, phm_dim=PHM_DIM, phm_rule=rule, impl=impl
        )

    add_adapters(model, make, after_attention)


REFERENCE, FUSED = "compacter-dense", "compacter"  # the same function, which must give the same loss curve

# Three times the highest rate of full, adapter, compacter, compacter++ scores lower in validation.
METHODS = {
    method.name: method
    for method in (
        Method("probe", "linear probe", "probe", (1e-1, 3e-2, 3e-1), _nothing_more),
        Method("full", "full fine-tuning", "full", (1e-3, 3e-4), _everything),
        Method("adapter", "bottleneck adapter", "adapter", (1e-2, 3e-3), _bottleneck),
        Method(REFERENCE, "Compacter, dense", "compacter", (3e-2, 1e-2), partial(_compacter, "dense", True)),
        Method(FUSED, "Compacter, fused", "compacter", (3e-2, 1e-2), partial(_compacter, "auto", True)),
        Method("compacter++", "Compacter++, fused", "compacter++", (3e-2, 1e-2), partial(_compacter, "auto", False)),
    )
}

# Not a way to adapt: the time and memory that no adapter can go below.
FROZEN_BASE = Method("frozen", "frozen base", "frozen", (1e-3,), _gradient_to_the_input)


def build(method: Method, pretrained: VisionTransformer, classes: int, seed: int) -> VisionTransformer:
    """A copy of the pretrained model with a new head, prepared for this method by this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = copy.deepcopy(pretrained)
        model.head = nn.Linear(model.hidden_size, classes)
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        method.prepare(model)
    return model


def impl_of(model: nn.Module) -> str | None:
    """The impl that the model's Compacter adapters run through; None where it has none."""
    for module in model.modules():
        if isinstance(module, CompacterAdapter):
            x = module.up.W_right.new_zeros(1, module.hidden_size)
            down, up = module.down.weights(), module.up.weights()
            return explain(x, down, up, activation=module.activation, impl=module.impl).impl
    return None
