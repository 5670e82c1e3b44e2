"""A patched model of `adapters` in training: the same loss curve, less memory, torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_models import (
    FAMILIES,
    PAST_KEY_VALUE,
    WIDTH,
    assert_same_step,
    compacter,
    inputs,
    make,
    residuals_of_calls,
    step,
)
from phm_lookalikes import hooks_known
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from compacter_kernels.patch.patch import patch, unpatch
from compacter_kernels.saved import saved_bytes

ac = pytest.importorskip("adapters.composition")
pytestmark = [
    pytest.mark.filterwarnings(PAST_KEY_VALUE),
    # torch.compile gives these warnings
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


def _losses(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    generator = torch.Generator().manual_seed(7)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(2, 20, (8, 6), generator=generator)
        loss = model(input_ids=tokens, labels=tokens.flip(1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"non_linearity": "relu", "scaling": "learned"}], ids=["gelu", "relu, scale"])
def test_a_hundred_steps_of_t5(options: dict[str, Any]) -> None:
    model = make("t5", a=compacter(**options))
    again = copy.deepcopy(model)
    patch(again)
    losses, patched = _losses(model, 100), _losses(again, 100)
    assert losses[-1] < 0.9 * losses[0]
    assert max(abs(a - b) for a, b in zip(losses, patched, strict=True)) <= 1e-4


def _saved_bytes(model: nn.Module) -> int:
    """The bytes that autograd keeps for the backward, without the parameters."""
    model.get_input_embeddings().weight.requires_grad_()  # so that the frozen model has a backward too
    return saved_bytes(lambda: model(**inputs(model, rows=16, length=32)).logits, model.parameters())


@hooks_known
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_bytes(family: str) -> None:
    """No more than those of the frozen model, and one tensor of the size of x for each adapter."""
    model = make(family)
    library = _saved_bytes(model)
    count = len(patch(model).patched)
    patched = _saved_bytes(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapters." not in name and parameter.requires_grad)
    model.set_active_adapters(None)
    frozen = _saved_bytes(model)
    assert patched <= frozen + count * 16 * 32 * WIDTH * 4 < library


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, {}) for family in FAMILIES), ("bert", {"shared_W_phm": True, "use_gating": True})],
    ids=[*FAMILIES, "bert, shared W, gate"],
)
def test_compiles(family: str, options: dict[str, Any]) -> None:
    """The patched model compiles into one graph, which the library's own model does not."""
    model = make(family, layers=1, a=compacter(**options))
    expected = step(model)
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(step(model, compiled), expected)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "backend"), [("bert", "inductor"), ("t5", "aot_eager")])
def test_compiles_for_all_batch_sizes(family: str, backend: str) -> None:
    """A new batch size or length needs at most one recompilation.

    BERT is compiled by the default compiler.
    """
    model = make(family, layers=1).eval()
    patch(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows, length in ((2, 6), (3, 7), (4, 8), (5, 9)):
        expected = model(**inputs(model, rows, length)).logits
        actual = compiled(**inputs(model, rows, length)).logits
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "setup",
    [
        ac.Stack("a", "b"),
        ac.Split("a", "b", splits=[2, 4]),
        ac.BatchSplit("a", "b", batch_sizes=[1, 3]),
        ac.Average("a", "b", weights=[0.5, 0.5]),
    ],
    ids=lambda setup: type(setup).__name__,
)
def test_compositions_compile(setup: Any) -> None:
    model = make(setup=setup, layers=1, a=compacter(), b=compacter(ln_before=True))
    expected = step(model)
    patch(model)
    torch._dynamo.reset()
    assert_same_step(step(model, torch.compile(model, backend="aot_eager")), expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_whole_library_compiles() -> None:
    model = make()
    expected = step(model)
    patch()
    try:
        torch._dynamo.reset()
        assert_same_step(step(model, torch.compile(model, fullgraph=True, backend="aot_eager")), expected)
    finally:
        unpatch()
        torch._dynamo.reset()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@hooks_known
@pytest.mark.usefixtures("process_group")
def test_fully_sharded_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks of each sharded adapter gather its weights. It still runs as one kernel."""
    model = make(a=compacter(shared_phm_rule=False))
    expected = step(model)
    patch(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in list(model.modules()):
        if hasattr(module, "adapter_up"):
            torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    residuals = residuals_of_calls(monkeypatch)
    actual = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in step(model).items()}
    assert len(residuals) == 4
    assert_same_step(actual, expected)
