"""What adapters in a whole model keep for the backward pass."""

from __future__ import annotations

import pytest
import torch
from families import build, inputs
from torch import Tensor, nn

import compacter_kernels as ck


def saved_bytes(family: str, model: nn.Module) -> int:
    """Bytes of the storages that a forward keeps, without parameters and inputs."""
    data = inputs(family)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *data.values())}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(**data)[0]
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del out
    return sum(size for address, size in found.items() if address not in known)


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
    assert saved_bytes(family, model) <= saved_bytes(family, bare) + len(adapters) * x
