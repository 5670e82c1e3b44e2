"""Models of peft whose weights are offloaded, on meta, quantised or in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, output
from peft_models import IN_PEFT, adapter_values, config, peft, randomise, wrapped
from test_zero import gathered_parameters, imitation, take_apart
from torch import Tensor, nn
from torch.nn import functional as F

accelerate = pytest.importorskip("accelerate")
__all__ = ["imitation"]
CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "parallel": {"is_parallel": True},
    "all shared": {"shared_W_phm": True, "scaling": "learned", "ln_after": True},
    "unshared": {"shared_phm_rule": False, "phm_bias": False},
}


def offload(model: nn.Module, where: str, folder: Path) -> None:
    if where == "cpu":
        accelerate.cpu_offload(model, CPU)
    else:
        accelerate.disk_offload(model, str(folder), CPU)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("first", ["adapters", "offload"])
def test_offloaded_models_compute_the_same(first: str, where: str, options: dict[str, Any], tmp_path: Path) -> None:
    if first == "offload":
        options = {**options, "train_layer_norms": False, "modules_to_save": []}
    plain = output("bert", build("bert"))
    expected_model = wrapped(build("bert"), **options)
    expected, values = output("bert", expected_model), adapter_values(expected_model)
    if first == "adapters":
        model = wrapped(build("bert"), **options)
        offload(model, where, tmp_path)
        assert all(p.is_meta for p in model.parameters())
    else:
        base = build("bert")
        offload(base, where, tmp_path)
        model = wrapped(base, **options)
        peft.set_peft_model_state_dict(model, {IN_PEFT + key: value for key, value in values.items()})
        assert any(p.is_meta for p in model.parameters())
    torch.testing.assert_close(output("bert", model), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(output("bert", model), plain)
    for module in model.modules():
        if "_hf_hook" in vars(module):  # peft's wrapper of trained modules shows the hook of what it wraps.
            accelerate.hooks.remove_hook_from_module(module)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(output("bert", model), expected)
    assert torch.equal(output("bert", model.unload()), plain)


def test_a_copy_of_an_offloaded_module_is_refused() -> None:
    base = build("bert")
    accelerate.cpu_offload(base, CPU)
    with pytest.raises(ValueError, match=r"modules_to_save: bert\.embeddings\.LayerNorm is offloaded .*offload after"):
        peft.get_peft_model(base, config())


class Packed(nn.Linear):
    """A linear layer of four-bit weights, by its attributes, as bitsandbytes has them."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.compute_dtype, self.scale = compute_dtype, linear.weight.detach().abs().max() / 7
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(self.compute_dtype) * self.scale
        return F.linear(x.to(self.compute_dtype), weight, self.bias).to(x.dtype)


def quantised(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "classifier" not in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Packed(module))
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_quantised_base(options: dict[str, Any]) -> None:
    """Adapters have the dtype that the layers compute with, and train. The base keeps its bits."""
    base = quantised(build("bert"))
    plain = output("bert", base)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = peft.get_peft_model(base, config(**options))
    assert {p.dtype for name, p in model.named_parameters() if "compacter_" in name} == {torch.float32}
    assert torch.equal(output("bert", randomise(model).unload()), plain)
    model = randomise(peft.get_peft_model(base, config(**options))).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    output("bert", model).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()
    with model.disable_adapter():
        assert torch.equal(output("bert", model.eval()), plain)
    assert all(torch.equal(p, before[name]) for name, p in model.unload().named_parameters())


@pytest.mark.filterwarnings("ignore")  # Of torch, which will remove it.
def test_a_base_of_quantize_dynamic() -> None:
    torch.backends.quantized.engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")
    base = torch.ao.quantization.quantize_dynamic(build("bert"), {nn.Linear}, torch.qint8)
    plain = output("bert", base)
    model = wrapped(base, target_modules=["output.dense"], modules_to_save=[])
    assert not torch.allclose(output("bert", model), plain, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(output("bert", model), plain)


@pytest.mark.usefixtures("imitation")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parameters_in_pieces(options: dict[str, Any]) -> None:
    """As stage 3 of ZeRO leaves them: adapters are put in, drawn whole and saved."""
    base = build("bert")
    take_apart(base)
    model = peft.get_peft_model(base, config(train_layer_norms=False, modules_to_save=[], **options))
    randomise(model)
    take_apart(model)
    whole = wrapped(build("bert"), train_layer_norms=False, modules_to_save=[], **options)
    with gathered_parameters(list(model.parameters())):
        values = {key: value.clone() for key, value in adapter_values(model).items()}
        assert torch.equal(output("bert", model.eval()), output("bert", whole))
    assert all(torch.equal(value, values[key]) for key, value in adapter_values(whole).items())
