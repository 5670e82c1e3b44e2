"""A model with adapters in a plain PyTorch loop.

The tests cover autocast, GradScaler, checkpointing, and a run that is resumed.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from small_models import (
    CONFIG,
    MODELS,
    adamw,
    assert_only_adapters_trained,
    base_of,
    batch,
    fit,
    gradients,
    make,
    trained,
    values,
)
from torch import Tensor

import compacter_kernels as ck

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_falls_and_only_the_adapters_move(kind: str) -> None:
    model, base = make(kind)
    gradients(model, batch(kind))
    start = values(model)
    losses = fit(model, kind, range(20), adamw(model))
    assert losses[-1] < losses[0] - 0.05
    assert_only_adapters_trained(model, base, start)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool) -> None:
    """Equal bit by bit, except that reentrant checkpointing adds up gradients in another order."""
    model, _ = make(kind)
    model.config.use_cache = False  # checkpointing disables it, and a cache changes the strides of the keys
    expected = gradients(model, batch(kind))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model, batch(kind))
    assert torch.equal(got["loss"], expected["loss"])
    for name, value in expected.items():
        apart = (got[name] - value).abs().max()
        assert apart <= 1e-6 * value.abs().max() if reentrant else apart == 0, name


def _errors(kind: str, impl: str, autocast: torch.dtype) -> Tensor:
    """The relative change of each gradient by autocast."""
    model, _ = make(kind, impl=impl)
    exact = gradients(model, batch(kind))
    got = gradients(model, batch(kind), autocast=autocast)
    assert {value.dtype for value in got.values()} == {torch.float32}
    norm = torch.linalg.vector_norm
    return torch.stack([norm(got[name] - value) / norm(value) for name, value in exact.items()])


@pytest.mark.parametrize("autocast", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_under_autocast_are_as_good_as_those_of_dense(kind: str, autocast: torch.dtype) -> None:
    """The adapters are in float32, and the model computes in 16 bits."""
    assert _errors(kind, "auto", autocast).norm() <= 2 * _errors(kind, "dense", autocast).norm() < 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_training_under_bf16_autocast(kind: str) -> None:
    model, base = make(kind)
    start = values(model)
    optimizer, losses = adamw(model), []
    for _ in range(20):
        with torch.autocast("cpu", BF16):
            loss = model(**batch(kind, 8)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert_only_adapters_trained(model, base, start)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_fp16_with_a_gradient_scaler(kind: str) -> None:
    """A scaled loss gives the same gradients. A step whose gradients overflow is skipped."""
    model, base = make(kind)
    expected = gradients(model, batch(kind), autocast=FP16)
    start = values(model)
    scaler, optimizer, losses = torch.amp.GradScaler("cpu", init_scale=2.0**40), adamw(model), []
    for _ in range(40):
        with torch.autocast("cpu", FP16):
            loss = model(**batch(kind)).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        finite = all(p.grad.isfinite().all() for p in trained(model).values())
        if finite and not losses:
            for name, p in trained(model).items():
                norm = torch.linalg.vector_norm(expected[name])
                assert torch.linalg.vector_norm(p.grad - expected[name]) <= 0.02 * norm, name
        scaler.step(optimizer)
        scaler.update()
        if finite:
            losses.append(loss.item())
        elif not losses:
            assert all(torch.equal(p, start[name]) for name, p in trained(model).items())
    assert 10 < len(losses) < 40  # some were skipped, but not most
    assert losses[-1] < losses[0] - 0.05
    assert_only_adapters_trained(model, base, start)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_base_in_16_bits(kind: str, dtype: torch.dtype) -> None:
    """The adapters have the dtype of the base by default, or float32 on request."""
    for own in (None, "float32"):
        torch.manual_seed(0)
        model = ck.inject(base_of(kind).to(dtype), ck.CompacterConfig(reduction_factor=4, dtype=own))
        adapters = {p.dtype for name, p in ck.adapter_parameters(model) if "down" in name or "up" in name}
        assert adapters == {torch.float32 if own else dtype}
        got = gradients(model, batch(kind))
        assert all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_taken_up_again_goes_on_as_the_unbroken_one(kind: str) -> None:
    """The state dicts of model and optimizer are loaded into a model with new adapters.

    The losses and weights are then the same, bit by bit.
    """
    model, _ = make(kind)
    optimizer = adamw(model)
    fit(model, kind, range(5), optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = fit(model, kind, range(5, 12), optimizer)

    again = base_of(kind)
    torch.manual_seed(1)
    ck.inject(again, CONFIG).train()
    second = adamw(again)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    again.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    assert fit(again, kind, range(5, 12), second) == expected
    assert all(torch.equal(p, trained(model)[name]) for name, p in trained(again).items())
