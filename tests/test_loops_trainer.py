"""A model with adapters in the loops of Hugging Face's Trainer and of Accelerate."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import adamw, assert_only_adapters_trained, batch, make, rows, trained, trainer_arguments, values
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
]


def fit(model: nn.Module, kind: str, folder: Path, resume: bool = False, **options: Any) -> list[float]:
    """Train for six epochs of two batches, and return the logged losses."""
    from transformers import Trainer

    arguments = trainer_arguments(folder, **{"num_train_epochs": 6, **options})
    trainer = Trainer(model, arguments, train_dataset=rows(kind, 16))
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_trainer(kind: str, tmp_path: Path) -> None:
    """Without checkpointing and with both kinds, losses and adapters are the same."""
    results = {}
    for name, options in {
        "plain": {},
        "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    }.items():
        model, base = make(kind)
        model.config.use_cache = False  # checkpointing disables it, and a cache changes the strides of the keys
        start = values(model)
        losses = fit(model, kind, tmp_path / name, **options)
        assert len(losses) == 12
        assert sum(losses[-2:]) < sum(losses[:2]) - 0.05  # of the last and the first epoch
        assert_only_adapters_trained(model, base, start)
        results[name] = losses, values(model)
    losses, expected = results.pop("plain")
    for name, (others, got) in results.items():
        assert others == pytest.approx(losses, abs=1e-3)
        for key, value in expected.items():
            exact = name == "non-reentrant"  # a reentrant one adds up gradients in another order
            torch.testing.assert_close(got[key], value, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-4)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_trainer_in_bf16(kind: str, tmp_path: Path) -> None:
    model, base = make(kind)
    start = values(model)
    losses = fit(model, kind, tmp_path, bf16=True)
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.05  # of the last and the first epoch
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert_only_adapters_trained(model, base, start)


def test_trainer_saves_and_resumes(tmp_path: Path) -> None:
    """Its checkpoint of the whole model is loaded into a model with random adapters.

    The run then continues as if it had not been interrupted.
    """
    model, base = make("bert")
    whole = fit(model, "bert", tmp_path / "whole", save_strategy="steps", save_steps=6)
    again, _ = make("bert")
    with torch.no_grad():
        for p in trained(again).values():
            p.normal_()
    shutil.rmtree(tmp_path / "whole" / "checkpoint-12")  # the last one, so that step 6 is resumed
    assert fit(again, "bert", tmp_path / "whole", resume=True) == whole
    assert all(torch.equal(p, trained(model)[name]) for name, p in trained(again).items())
    assert all(torch.equal(again.state_dict()[name], value) for name, value in base.items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    """Two batches are accumulated in a step. A loop in plain PyTorch gives the same bits."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    model, base = make("t5")
    plain, start = copy.deepcopy(model), values(model)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    optimizer = adamw(model)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows("t5", 16), batch_size=4))
    losses = []
    for _ in range(6):
        for inputs in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**inputs).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    reference = adamw(plain)
    for turn in range(12):
        for quarter in range(2 * (turn % 2), 2 * (turn % 2) + 2):
            inputs = {name: value.chunk(4)[quarter] for name, value in batch("t5", 16).items()}
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = plain(**inputs).loss
            (loss / 2).backward()
        reference.step()
        reference.zero_grad()
    unwrapped = accelerator.unwrap_model(prepared)
    assert losses[-1] < losses[3]  # both are of the same batch
    assert_only_adapters_trained(unwrapped, base, start)
    assert all(torch.equal(unwrapped.get_parameter(name), p) for name, p in trained(plain).items())
