"""The scripts of `examples/trainers`, each with the trainer that it is for.

A trainer that is not installed is skipped; `make transformers` has TRL and Lightning. Of ms-swift
and axolotl, which bring much with them, small imitations stand for the classes that we derive from.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
from example_folders import first_on_path
from two_processes import as_torchrun, free_port, run_two

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainers warn about themselves.
FOLDER = Path(__file__).parent.parent / "examples" / "trainers"

_path = first_on_path(FOLDER)


@pytest.fixture(autouse=True)
def without_earlier_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate keeps the precision of a Trainer for every later one of the process."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


def script(name: str, *needs: str) -> Any:
    for package in needs:
        pytest.importorskip(package)
    return importlib.import_module(name)


def check(losses: dict[str, float]) -> None:
    """Training lowered the loss, and what was saved has the trained model's loss."""
    assert losses["after"] < losses["before"] - 0.02
    assert losses.get("loaded", losses["after"]) == pytest.approx(losses["after"], rel=1e-6)


def test_trainer(tmp_path: Path) -> None:
    check(script("with_trainer", "accelerate").main(str(tmp_path), steps=5))


def test_trl(tmp_path: Path) -> None:
    check(script("with_trl", "trl", "datasets").main(str(tmp_path), steps=8))


def test_lightning(tmp_path: Path) -> None:
    check(script("with_lightning", "lightning").main(str(tmp_path), steps=8))


@pytest.mark.parametrize("shard", ["none", "zero3"])
def test_accelerate(shard: str, tmp_path: Path) -> None:
    needs = ("accelerate", "deepspeed") if shard == "zero3" else ("accelerate",)
    check(script("with_accelerate", *needs).main(str(tmp_path), steps=8, shard=shard))


def _fsdp2(rank: int, port: int, out: str) -> None:
    as_torchrun(rank, port)
    sys.path.insert(0, str(FOLDER))
    losses = importlib.import_module("with_accelerate").main(out, steps=8, shard="fsdp2")
    if losses:
        Path(out, "losses.json").write_text(json.dumps(losses))


def test_accelerate_fsdp2(tmp_path: Path) -> None:
    run_two(_fsdp2, free_port(), str(tmp_path))
    check(json.loads((tmp_path / "losses.json").read_text()))


def imitate(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    """Put modules with these names in them where imports look. `__` in a name stands for a dot."""
    for name, content in modules.items():
        path = name.split("__")
        for end in range(1, len(path) + 1):
            module = types.ModuleType(".".join(path[:end]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(content)


class PeftTuner:
    """What ms-swift 4.6 has in swift/tuner_plugin/base.py."""

    @staticmethod
    def save_pretrained(model: Any, save_directory: str, state_dict: Any = None, **kwargs: Any) -> None:
        model.save_pretrained(save_directory, **kwargs)

    @staticmethod
    def from_pretrained(model: Any, model_id: str, **kwargs: Any) -> Any:
        return peft.PeftModel.from_pretrained(model, model_id, **kwargs)


def test_ms_swift(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuners: dict[str, Any] = {}
    imitate(monkeypatch, swift__tuner_plugin={"PeftTuner": PeftTuner, "tuners_map": tuners})
    module, task = script("with_ms_swift"), script("small_task")
    module.CONFIG.reduction_factor = 4
    model = tuners["compacter"].prepare_model(SimpleNamespace(), task.base_model())
    tuners["compacter"].save_pretrained(model, str(tmp_path))
    loaded = tuners["compacter"].from_pretrained(task.base_model(), str(tmp_path), is_trainable=True)
    assert task.loss_of(loaded) == task.loss_of(model)
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_axolotl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Called as axolotl 0.19 calls it in axolotl/loaders/adapter.py."""
    pytest.importorskip("pydantic")
    capabilities = type("AdapterCapabilities", (SimpleNamespace,), {})
    base = {"BasePlugin": type("BasePlugin", (), {}), "AdapterCapabilities": capabilities}
    imitate(monkeypatch, axolotl__integrations__base=base)
    module, task = script("with_axolotl"), script("small_task")
    plugin = module.CompacterPlugin()
    assert [capability.name for capability in plugin.get_adapter_capabilities()] == ["compacter"]
    arguments = importlib.import_module(plugin.get_input_args().rpartition(".")[0]).CompacterArgs
    cfg = SimpleNamespace(
        adapter="compacter", lora_model_dir=None, **arguments(compacter={"reduction_factor": 4}).dict()
    )
    model, config = plugin.load_adapter(task.base_model(), cfg)
    assert config.reduction_factor == 4
    model.save_pretrained(tmp_path)
    cfg.lora_model_dir = str(tmp_path)
    loaded, _ = plugin.load_adapter(task.base_model(), cfg)
    assert task.loss_of(loaded) == task.loss_of(model)
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    frozen, _ = plugin.load_adapter(task.base_model(), cfg, inference=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert plugin.load_adapter(None, cfg, config_only=True)[0] is None
    assert plugin.load_adapter(None, SimpleNamespace(adapter="lora")) is None
