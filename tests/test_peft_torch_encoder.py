"""torch's encoder reads weights in eval mode. Adapters of peft are not passed over for that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft_models import add, config, peft, randomise, wrapped
from test_torch_encoder import PADDED, WIDTH, encoder, outputs
from torch import nn

from compacter_kernels.peft.layer import AdapterLayer

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
CONFIGS: dict[str, dict[str, Any]] = {
    "linear2": {"target_modules": ["linear2"]},
    "a layer of norms alone": {"target_modules": ["linear2"], "leave_out": [1]},
    "no norms": {"target_modules": ["linear2"], "train_layer_norms": False},
    "attention": {"target_modules": ["self_attn"]},
    "attention, parallel": {"target_modules": ["self_attn"], "is_parallel": True},
}


def flags(model: nn.Module) -> list[Any]:
    names = ("use_nested_tensor", "activation_relu_or_gelu")
    return [vars(module).get(name) for module in (model, *model.layers) for name in names]  # type: ignore[misc]


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_eval_computes_what_training_does(name: str) -> None:
    base = encoder().eval()
    plain, before = outputs(base), flags(base)
    model = wrapped(base, **CONFIGS[name])
    expected = outputs(model.train())  # There is no dropout, but in training mode all modules are called.
    got = outputs(model.eval())
    assert not torch.allclose(got[0], plain[0], atol=1e-2)
    for y, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert all(map(torch.equal, outputs(model), plain)), "the base's own path, bit by bit"
        assert flags(base) == before
    assert all(map(torch.equal, outputs(model), got))
    assert all(map(torch.equal, outputs(copy.deepcopy(model)), got))
    assert model.unload() is base
    assert all(map(torch.equal, outputs(base), plain))
    assert flags(base) == before


@torch.no_grad()
def test_one_layer_that_is_disabled_alone() -> None:
    """The adapters of the other layers are still in use."""
    base = encoder().eval()
    plain = outputs(base)
    model = wrapped(base, target_modules=["linear2"], train_layer_norms=False)
    both = outputs(model)
    first, second = (module for module in model.modules() if isinstance(module, AdapterLayer))
    first.enable_adapters(False)
    alone = outputs(model)
    assert not torch.allclose(alone[0], both[0], atol=1e-2)
    assert not torch.allclose(alone[0], plain[0], atol=1e-2)
    second.enable_adapters(False)
    assert all(map(torch.equal, outputs(model), plain))
    first.enable_adapters(True)
    second.enable_adapters(True)
    assert all(map(torch.equal, outputs(model), both))


@torch.no_grad()
def test_a_second_adapter_in_another_layer() -> None:
    base = encoder().eval()
    plain = outputs(base)
    model = wrapped(base, target_modules=["layers.0.linear2"], train_layer_norms=False)
    first = outputs(model)
    add(model, "second", 1, target_modules=["layers.1.linear2"], train_layer_norms=False)
    assert all(map(torch.equal, outputs(model), first))
    model.set_adapter("second")
    second = outputs(model)
    torch.testing.assert_close(second[0], outputs(model.train())[0], rtol=1e-4, atol=1e-4)
    with model.eval().disable_adapter():
        assert all(map(torch.equal, outputs(model), plain))


def test_modules_that_attention_never_calls_are_refused() -> None:
    with pytest.raises(ValueError, match=r"self_attn.out_proj is never called, layers.0.self_attn reads .*'self_attn'"):
        peft.get_peft_model(encoder(), config(target_modules=["self_attn.out_proj"]))


@torch.no_grad()
def test_a_mixed_batch() -> None:
    model = randomise(peft.get_peft_model(encoder(), config(target_modules=["linear2"]))).eval()
    x = torch.randn(2, PADDED.shape[1], WIDTH)
    mixed, adapted = model(x, adapter_names=["__base__", "default"]), model(x)
    torch.testing.assert_close(mixed[1], adapted[1], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[0], model(x)[0], rtol=1e-4, atol=1e-4)
