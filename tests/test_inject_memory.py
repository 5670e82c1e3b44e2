"""The memory that adapters in a whole model keep for the backward pass."""

from __future__ import annotations

import pytest
from families import build, inputs
from torch import nn

import compacter_kernels as ck
from compacter_kernels.saved import saved_bytes


def kept(family: str, model: nn.Module) -> int:
    """The saved bytes, without parameters and inputs."""
    data = inputs(family)
    return saved_bytes(lambda: model(**data)[0], (*model.parameters(), *data.values()))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("family", "end"), [("bert", "attention.output.dense"), ("llama", "self_attn.o_proj")])
def test_each_adapter_keeps_one_tensor_of_its_input_s_size(family: str, end: str, parallel: bool) -> None:
    bare = build(family).train().requires_grad_(False)
    first = next(module for name, module in bare.named_modules() if name.endswith(end))
    first.register_forward_hook(
        lambda module, args, y: y.requires_grad_()
    )  # as far down as the first adapter's gradient

    config = ck.CompacterConfig(reduction_factor=4, train_layer_norms=False, modules_to_save=[], is_parallel=parallel)
    model = ck.inject(build(family).train(), config)
    adapters = [module for module in model.modules() if isinstance(module, ck.CompacterAdapter)]
    x = inputs(family)["input_ids"].numel() * adapters[0].hidden_size * 4
    assert kept(family, model) <= kept(family, bare) + len(adapters) * x
