"""Two processes train a model in ck.route by DDP or FSDP2 as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import CONFIG, adamw, base_of, batch
from test_loops_distributed import WRAPS
from torch import distributed, nn
from two_processes import run_two

import compacter_kernels as ck

pytestmark = pytest.mark.slow
STEPS, NAMES = 4, ["de", "sv", None, "de", "sv", "de", None, "sv"]


def make() -> nn.Module:
    model = base_of("bert")
    for seed, name in enumerate(("de", "sv")):
        torch.manual_seed(seed)
        ck.inject(model, CONFIG, name=name)
    ck.set_adapter(model, ["de", "sv"])
    return model.train()


def _train(model: nn.Module, rank: int = 0, world: int = 1) -> list[float]:
    optimizer, losses, size = adamw(model), [], len(NAMES) // world
    for step in range(STEPS):
        part = {name: value.chunk(world)[rank] for name, value in batch("bert", len(NAMES), seed=step % 2).items()}
        with ck.route(model, NAMES[rank * size : (rank + 1) * size]):
            loss = model(**part).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _worker(rank: int, wrap: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = make()
    losses = _train(WRAPS[wrap](model), rank, world=2)
    state = {key: getattr(t, "full_tensor", lambda t=t: t)().detach() for key, t in model.state_dict().items()}
    torch.save({"losses": losses, "state": state}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPS)
def test_two_processes_train_as_one(wrap: str, tmp_path: Path) -> None:
    run_two(_worker, wrap, str(tmp_path))
    model = make()
    losses = _train(model)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [sum(pair) / 2 for pair in zip(*(one["losses"] for one in found), strict=True)] == pytest.approx(
        losses, rel=1e-5
    )
    for one in found:
        for key, value in model.state_dict().items():
            torch.testing.assert_close(one["state"][key], value, rtol=1e-4, atol=1e-5)
