"""Two processes train one model with adapters by DDP or FSDP2.

The result is that of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import adamw, assert_only_adapters_trained, batch, make, trained, values
from torch import Tensor, distributed, nn
from two_processes import run_two

pytestmark = pytest.mark.slow
STEPS, SIZE = 6, 8


def _train(model: nn.Module, kind: str, rank: int = 0, world: int = 1) -> list[float]:
    """Each process takes its part of every batch. Returns the losses of that part."""
    torch.manual_seed(rank)
    optimizer, losses = adamw(model), []
    for step in range(STEPS):
        part = {name: value.chunk(world)[rank] for name, value in batch(kind, SIZE, seed=step % 2).items()}
        loss = model(**part).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trained(model).values())
        optimizer.step()
        losses.append(loss.item())
    return losses


def _data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fully_sharded(model: nn.Module) -> nn.Module:
    """Shard each layer, then the rest, which includes the rule that all adapters share."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if type(module).__name__ in ("BertLayer", "T5Block"):
            fully_shard(module)
    return fully_shard(model)


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {"DDP": _data_parallel, "FSDP2": _fully_sharded}


def _worker(rank: int, wrap: str, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, _ = make(kind)
    losses = _train(WRAPS[wrap](model), kind, rank, world=2)
    state = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in _state(model).items()}
    torch.save({"losses": losses, "state": state, "count": len(list(model.parameters()))}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_two_processes_train_as_one(wrap: str, kind: str, tmp_path: Path) -> None:
    run_two(_worker, wrap, kind, str(tmp_path))
    first, second = (_load(tmp_path / f"{rank}.pt") for rank in range(2))
    model, base = make(kind)
    start = values(model)
    losses = _train(model, kind)
    assert losses[-1] < losses[1]  # both are of the same batch
    together = [(one + other) / 2 for one, other in zip(first["losses"], second["losses"], strict=True)]
    assert together == pytest.approx(losses, rel=1e-5)
    assert first["state"].keys() == model.state_dict().keys()
    assert first["count"] == len(list(model.parameters()))
    for name, value in model.state_dict().items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-5)
    model.load_state_dict(first["state"])
    assert_only_adapters_trained(model, base, start)


def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded
