"""A model of peft in the loops, precisions and compilers that people train with."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import adapter_values, add, config, peft, randomise, wrapped
from small_models import adamw, base_of, batch, fit, gradients, rows, trained, trainer_arguments, values
from torch import nn

from compacter_kernels.peft.block_input import _block_input

BATCH = batch("bert")


def make(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return peft.get_peft_model(base_of("bert"), config(task_type="SEQ_CLS", **options)).train()


def training(folder: Path, **options: Any) -> Any:
    return trainer_arguments(folder, **{"num_train_epochs": 3, **options})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_trainer_resumes_and_loads_the_best_model(tmp_path: Path) -> None:
    """Its checkpoints hold the adapters alone."""
    from transformers import Trainer

    pytest.importorskip("accelerate")
    model, data = make(), rows("bert", 16)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = values(model)
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = Trainer(model, training(tmp_path, **options, **best), train_dataset=data, eval_dataset=data)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert not [name for name, p in trained(model).items() if torch.equal(p, start[name])]
    folder = Path(trainer.state.best_model_checkpoint)
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(base_of("bert"), folder)
    assert all(torch.equal(value, adapter_values(model)[key]) for key, value in adapter_values(loaded).items())

    last = {key: value.clone() for key, value in adapter_values(model).items()}
    for checkpoint in ("checkpoint-6", "checkpoint-4"):
        shutil.rmtree(tmp_path / checkpoint, ignore_errors=checkpoint != folder.name)
    again = Trainer(make(seed=5), training(tmp_path, **options), train_dataset=data, eval_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(trainer)
    if folder.name == "checkpoint-6":
        assert all(torch.equal(value, last[key]) for key, value in adapter_values(again.model).items())


@pytest.mark.parametrize("options", [{}, {"is_parallel": True}], ids=["sequential", "parallel"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, options: dict[str, Any]) -> None:
    model = randomise(make(**options)).train()
    expected = gradients(model, BATCH)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.base_model.model.is_gradient_checkpointing
    for name, value in gradients(model, BATCH).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("options", [{}, {"shared_W_phm": True, "is_parallel": True, "learn_phm": False}])
def test_base_in_bf16(autocast_adapter_dtype: bool, options: dict[str, Any]) -> None:
    base = base_of("bert").bfloat16()
    model = peft.get_peft_model(base, config(**options), autocast_adapter_dtype=autocast_adapter_dtype)
    expected = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if "compacter_" in name} == {expected}
    model.add_adapter("second", config(**options), autocast_adapter_dtype=autocast_adapter_dtype)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".second")]
    assert not any(p.requires_grad for name, p in model.named_parameters() if "phm_rule" in name and options)
    assert next(p for name, p in model.named_parameters() if name.endswith("down_b.default")).requires_grad
    plain = randomise(peft.get_peft_model(base_of("bert").bfloat16().float(), config(**options)))
    got, wanted = gradients(randomise(model), BATCH), gradients(plain, BATCH)
    assert got.keys() == wanted.keys()
    torch.testing.assert_close(got["loss"].float(), wanted["loss"], rtol=0.05, atol=0.05)
    history = fit(model, "bert", range(6), adamw(model))
    assert history[-2] < history[0]


def test_autocast() -> None:
    """Parameters stay in float32; with autocast the loss is that without, within bfloat16."""
    model = randomise(make())
    exact, got = gradients(model, BATCH), gradients(model, BATCH, autocast=torch.bfloat16)
    assert {value.dtype for name, value in got.items() if name != "loss"} == {torch.float32}
    torch.testing.assert_close(got["loss"].float(), exact["loss"], rtol=0.05, atol=0.05)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_graph_breaks() -> None:
    """fullgraph=True raises at a graph break, error_on_recompile at another batch size."""
    model = wrapped(base_of("bert", num_hidden_layers=1), shared_W_phm=True)
    add(model, "second", 1, is_parallel=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for name, size in (("default", 4), ("default", 2), ("second", 3)):
        model.set_adapter(name)
        inputs = batch("bert", size)
        expected = gradients(model, inputs)
        with torch._dynamo.config.patch(error_on_recompile=size == 2):
            got = gradients(model, inputs, run=compiled)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("disabled", [False, True])
def test_no_activation_is_kept_after_a_call(disabled: bool) -> None:
    """Not by the input of a block, which a parallel adapter uses."""
    model = wrapped(nn.Sequential(nn.Linear(32, 32)), target_modules=["0"], is_parallel=True)
    model(torch.randn(2, 32))
    model = randomise(make(is_parallel=True)).eval()
    for each in (model, copy.deepcopy(model)):
        with each.disable_adapter() if disabled else nullcontext():
            each(**BATCH)
        assert _block_input.waiting is None
