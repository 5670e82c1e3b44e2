"""The life of adapters in a model of peft: make, save, load, switch, disable, delete, unload.

`make peft` runs this file with the oldest and the newest peft that are supported.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, output
from peft_models import adapter_values, add, ckp, config, peft, randomise, wrapped
from torch import Tensor, nn

from compacter_kernels.peft.layer import AdapterLayer
from compacter_kernels.peft.shared import SharedParameters

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "all shared": {"shared_W_phm": True},
    "a rule each": {"shared_phm_rule": False},
    "parallel": {"is_parallel": True, "learn_phm": False},
}


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_save_and_load(options: dict[str, Any], tmp_path: Path) -> None:
    """Under the same name and another one, with and without low_cpu_mem_usage."""
    model = wrapped(build("bert"), task_type="SEQ_CLS", **options)
    expected = output("bert", model)
    model.save_pretrained(tmp_path)
    for name, low in (("default", False), ("other", True)):
        torch.manual_seed(7)
        loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path, adapter_name=name, low_cpu_mem_usage=low)
        assert type(loaded) is type(model)
        assert torch.equal(output("bert", loaded), expected)
        assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
        assert adapter_values(loaded, name).keys() == adapter_values(model).keys()
        assert vars(loaded.peft_config[name]) | {"inference_mode": False} == vars(model.peft_config["default"])
    trainable = peft.PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True)
    assert trained(trainable) == trained(model)


def test_only_adapters_heads_and_norms_are_trained(capsys: pytest.CaptureFixture[str]) -> None:
    base = build("bert")
    model = peft.get_peft_model(base, config(task_type="SEQ_CLS"))
    parts = ("compacter_", "LayerNorm.modules_to_save.", "classifier.modules_to_save.")
    assert trained(model) == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    assert sum("compacter_shared_phm_rule" in name for name in trained(model)) == 1
    model.print_trainable_parameters()
    count, total = (f"{sum(p.numel() for p in ps):,d}" for ps in (
        [p for p in model.parameters() if p.requires_grad], list(model.parameters())))  # fmt: skip
    assert f"trainable params: {count} || all params: {total}" in capsys.readouterr().out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_switch_and_delete(options: dict[str, Any]) -> None:
    """Each of three adapters computes as if it were alone. Deleted ones leave no parameter."""
    seeds = {"default": 0, "second": 1, "third": 2}
    alone = {name: wrapped(build("bert"), seed=seed, **options) for name, seed in seeds.items()}
    expected = {name: output("bert", model) for name, model in alone.items()}
    model = wrapped(build("bert"), **options)
    for name in ("second", "third"):
        add(model, name, seeds[name], **options)
    assert torch.equal(output("bert", model), expected["default"])
    for name in seeds:
        model.set_adapter(name)
        assert torch.equal(output("bert", model), expected[name])
        assert {key.replace(f".{name}", ".default") for key in trained(model)} == trained(alone["default"])
    model.delete_adapter("second")  # Not active.
    assert model.active_adapters == ["third"]
    assert torch.equal(output("bert", model), expected["third"])
    with pytest.warns(UserWarning, match="Adapter third was active which is now deleted"):
        model.delete_adapter("third")
    assert model.active_adapters == ["default"]
    assert torch.equal(output("bert", model), expected["default"])
    assert trained(model) == trained(alone["default"])
    assert model.state_dict().keys() == alone["default"].state_dict().keys()
    with pytest.raises(ValueError, match="Adapter second does not exist"):
        model.delete_adapter("second")
    add(model, "second", 1, **options)
    model.set_adapter("second")
    assert torch.equal(output("bert", model), expected["second"])


def test_the_last_adapter_can_be_deleted() -> None:
    base, model = build("bert"), wrapped(build("bert"))
    model.base_model.delete_adapter("default")
    assert torch.equal(output("bert", model.base_model), output("bert", base))
    assert not any("compacter_" in name for name, _ in model.named_parameters())


def test_a_new_adapter_of_a_deleted_name_is_drawn_anew() -> None:
    model = add(wrapped(build("bert")), "second", 1)
    before = adapter_values(model, "second")["compacter_shared_phm_rule"].clone()
    model.delete_adapter("second")
    model.add_adapter("second", config())
    assert not torch.equal(adapter_values(model, "second")["compacter_shared_phm_rule"], before)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_disabled_adapters_and_unload_give_the_base_bit_by_bit(options: dict[str, Any]) -> None:
    base = build("bert")
    plain, keys, hooks = output("bert", base), list(base.state_dict()), _hooks(base)
    model = add(wrapped(base, **options), "second", 1, **options)
    model.set_adapter("second")
    before = output("bert", model)
    with model.disable_adapter():
        assert torch.equal(output("bert", model), plain)
        assert not [name for name in trained(model) if "original_module" not in name]
    assert torch.equal(output("bert", model), before)
    if hasattr(peft, "get_base_model_state_dict"):  # Since peft 0.20.
        assert list(peft.get_base_model_state_dict(model)) == keys
    unloaded = model.unload()
    assert unloaded is base
    assert list(base.state_dict()) == keys
    assert _hooks(base) == hooks
    assert not any(isinstance(module, AdapterLayer | SharedParameters) for module in base.modules())
    assert torch.equal(output("bert", base), plain)


def _hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_several_active_adapters_add_their_outputs() -> None:
    model = add(wrapped(build("bert"), train_layer_norms=False, modules_to_save=[]), "second", 1,
                train_layer_norms=False, modules_to_save=[])  # fmt: skip
    model.base_model.set_adapter(["default", "second"])
    layer = next(module for module in model.modules() if isinstance(module, AdapterLayer))
    x = torch.randn(3, layer.in_features)
    y = layer.base_layer(x)
    expected = y + sum((layer.adapters[name](y) - y for name in ("default", "second")), torch.zeros(()))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(output("bert", model), output("bert", wrapped(build("bert"))))


def test_a_fixed_rule_is_never_trained() -> None:
    """Nor by a switch, by set_requires_grad, or after a time with disabled adapters."""
    model = add(wrapped(build("bert"), learn_phm=False), "second", 1)
    for change in (
        lambda: model.set_adapter("second"),
        lambda: model.set_adapter("default"),
        lambda: model.set_requires_grad(["default", "second"]),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
    ):
        change()
        rules = {name: p.requires_grad for name, p in model.named_parameters() if "phm_rule" in name}
        assert not rules["base_model.model.compacter_shared_phm_rule.default"]
    model.set_requires_grad("second")
    assert "base_model.model.compacter_shared_phm_rule.second" in trained(model)


def test_status() -> None:
    model = add(wrapped(build("bert")), "second", 1)
    layers = [status for status in peft.get_layer_status(model) if status.module_type == "AdapterLayer"]
    assert len(layers) == 4
    for status in layers:
        assert status.available_adapters == ["default", "second"] and status.active_adapters == ["default"]
        assert status.requires_grad == {"default": True, "second": False} and status.enabled
        assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
    for name in ("second", "default"):
        model.set_adapter(name)
        status = peft.get_model_status(model)
        assert status.adapter_model_type == "CompacterModel"
        assert status.peft_types == {"default": "COMPACTER", "second": "COMPACTER"}
        assert status.active_adapters == [name] and status.enabled is True
        assert status.available_adapters == ["default", "second"]


def test_copies_and_pickles_are_independent(tmp_path: Path) -> None:
    model = add(wrapped(build("bert"), is_parallel=True), "second", 1)
    expected = output("bert", model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(output("bert", other), expected)
        other.set_adapter("second")
        other.delete_adapter("default")
        randomise(other, 5, "second")
        assert not torch.equal(output("bert", other), expected)
        assert torch.equal(output("bert", model), expected)
        assert model.active_adapters == ["default"]
    again = copy.deepcopy(model.peft_config["default"])
    assert again == model.peft_config["default"] and again.peft_type is model.peft_config["default"].peft_type


def test_inject_adapter_in_model_gives_the_same_bits_and_names() -> None:
    model = wrapped(build("bert"))
    expected, values = output("bert", model), adapter_values(model)
    plain = peft.inject_adapter_in_model(config(), build("bert"))
    assert not peft.set_peft_model_state_dict(plain, dict(values)).unexpected_keys
    assert torch.equal(output("bert", plain), expected)
    saved: dict[str, Tensor] = peft.get_peft_model_state_dict(plain)
    assert saved.keys() == values.keys()
    assert all(torch.equal(saved[key], value) for key, value in values.items())


def test_configs_are_told_by_their_type() -> None:
    assert ckp.CompacterConfig().peft_type is peft.PeftType.COMPACTER  # type: ignore[attr-defined]
    assert peft.get_peft_config({"peft_type": "COMPACTER", "phm_dim": 2}) == ckp.CompacterConfig(phm_dim=2)
