"""Adapters of peft are found and loaded where its other methods are."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, output
from peft_models import IN_PEFT, adapter_values, ckp, config, peft, randomise, wrapped
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
set_adapter = pytest.importorskip("peft.functional").set_adapter
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")


def in_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]


# transformers 5.24 asks for a peft that is not released yet.
through_transformers = pytest.mark.skipif(
    in_numbers(peft.__version__) < in_numbers(transformers.integrations.peft.MIN_PEFT_VERSION),
    reason=f"transformers needs peft {transformers.integrations.peft.MIN_PEFT_VERSION} for its own functions",
)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Tensor]:
    """A folder with a saved adapter of a saved model, and the output of that model."""
    base = build("bert")
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = wrapped(loaded, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", output("bert", model)


def test_the_file_has_plain_names(saved: tuple[Path, Tensor]) -> None:
    folder, _ = saved
    tensors = safetensors.load_file(folder / "adapter_model.safetensors")
    layer = f"{IN_PEFT}bert.encoder.layer.0.output"
    kinds = ("down_W_left", "down_W_right", "down_b", "up_W_left", "up_W_right", "up_b")
    assert {f"{layer}.dense.compacter_{kind}" for kind in kinds} <= tensors.keys()
    assert f"{layer}.LayerNorm.weight" in tensors and f"{IN_PEFT}classifier.weight" in tensors
    assert [key for key in tensors if "phm_rule" in key] == [f"{IN_PEFT}compacter_shared_phm_rule"]
    options = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert options["peft_type"] == "COMPACTER" and options["reduction_factor"] == 4
    assert peft.PeftConfig.from_pretrained(folder).phm_dim == 4


def test_auto_models(saved: tuple[Path, Tensor]) -> None:
    """By the task, and without one by the class of the base."""
    folder, expected = saved
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(model) is peft.PeftModelForSequenceClassification
    assert torch.equal(output("bert", model), expected)
    model.peft_config["default"].task_type = None
    model.save_pretrained(folder.parent / "other")
    assert torch.equal(output("bert", peft.AutoPeftModel.from_pretrained(folder.parent / "other").eval()), expected)


@pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning")  # A tokenizer, which may be missing.
def test_an_id_of_the_hub(saved: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read from the cache of huggingface_hub, without a connection."""
    from huggingface_hub import constants

    folder, expected = saved
    cache = folder.parent / "hub"
    repository = cache / "models--someone--compacter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    model = peft.PeftModel.from_pretrained(build("bert"), "someone/compacter")
    assert torch.equal(output("bert", model), expected)
    auto = peft.AutoPeftModelForSequenceClassification.from_pretrained("someone/compacter")
    assert torch.equal(output("bert", auto.eval()), expected)


@through_transformers
def test_transformers_itself(saved: tuple[Path, Tensor]) -> None:
    """load_adapter, add_adapter, set_adapter, disable_adapters and get_adapter_state_dict."""
    folder, expected = saved
    model: Any = build("bert")
    plain = output("bert", model)
    model.load_adapter(folder)
    assert torch.equal(output("bert", model), expected)
    model.add_adapter(config(), adapter_name="second")
    randomise(model, 1, "second")
    model.set_adapter("second")
    second = output("bert", model)
    assert not torch.equal(second, expected)
    assert model.active_adapters() == ["second"]
    model.set_adapter("default")
    assert torch.equal(output("bert", model), expected)
    model.disable_adapters()
    assert torch.equal(output("bert", model), plain)
    model.enable_adapters()
    for module in model.modules():
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            module.enable_adapters(True)  # transformers 4.57 forgets these.
    assert torch.equal(output("bert", model), expected)
    tensors = safetensors.load_file(folder / "adapter_model.safetensors")
    values = model.get_adapter_state_dict("default")
    assert {IN_PEFT + key for key in values} == tensors.keys()
    assert all(torch.equal(value, tensors[IN_PEFT + key]) for key, value in values.items())
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(output("bert", model), second)


@through_transformers
def test_transformers_saves_what_peft_loads(tmp_path: Path) -> None:
    model: Any = build("bert")
    model.add_adapter(config())
    expected = output("bert", randomise(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(output("bert", peft.PeftModel.from_pretrained(build("bert"), tmp_path)), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("options", [{}, {"shared_phm_rule": False}, {"is_parallel": True, "shared_W_phm": True}])
def test_inject_adapter_in_model(options: dict[str, Any], low_cpu_mem_usage: bool) -> None:
    """Also by the names in a state dict alone, and for two adapters in one model."""
    values = {seed: wrapped(build("bert"), seed=seed, **options) for seed in (0, 1)}
    model = build("bert")
    for seed, name in enumerate(("default", "second")):
        tensors = adapter_values(values[seed])
        low = {"low_cpu_mem_usage": low_cpu_mem_usage}
        peft.inject_adapter_in_model(config(**options), model, name, state_dict=tensors, **low)
        result = peft.set_peft_model_state_dict(model, dict(tensors), name, **low)
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if "compacter_" in key and key.endswith(f".{name}")]
        saved = peft.get_peft_model_state_dict(model, adapter_name=name)
        assert all(torch.equal(saved[key], value) for key, value in tensors.items())
    assert not any(p.is_meta for p in model.parameters())
    for seed, name in enumerate(("default", "second")):
        set_adapter(model, name)
        assert torch.equal(output("bert", model), output("bert", values[seed]))


def test_a_file_that_does_not_fit_is_named(saved: tuple[Path, Tensor]) -> None:
    folder, _ = saved
    tensors = safetensors.load_file(folder / "adapter_model.safetensors")
    del tensors[f"{IN_PEFT}compacter_shared_phm_rule"]
    safetensors.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"missing adapter keys .*compacter_shared_phm_rule"):
        peft.PeftModel.from_pretrained(build("bert"), folder)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*compacter_down_W_left"):
        peft.PeftModel.from_pretrained(build("bert", hidden_size=64), folder)


def test_configs_are_pickled_and_saved(tmp_path: Path) -> None:
    options = {"reduction_factor": {"0": 2, "default": 8}, "leave_out": [1], "modules_to_save": ["pooler"]}
    for kind in (ckp.CompacterConfig, ckp.CompacterPlusPlusConfig):
        made = kind(task_type="SEQ_CLS", target_modules={"b", "a"}, **options)
        assert made.target_modules == ["a", "b"]
        again = pickle.loads(pickle.dumps(made))
        assert again == made and again.peft_type is peft.PeftType.COMPACTER
        made.save_pretrained(tmp_path)
        loaded = peft.PeftConfig.from_pretrained(tmp_path)
        assert {**loaded.to_dict(), "inference_mode": False} == {**made.to_dict(), "inference_mode": False}


def test_a_model_inside_another_module() -> None:
    """The names have the path of the model, and the shared weights are at the top."""
    model = wrapped(nn.Sequential(build("roberta")), train_layer_norms=False)
    keys = adapter_values(model)
    assert "compacter_shared_phm_rule" in keys
    assert any(key.startswith("0.encoder.layer.0.") for key in keys)
