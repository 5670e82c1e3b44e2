"""Two processes train a bank by DDP or FSDP2 as one process does with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_loops_distributed import WRAPS
from torch import Tensor, distributed, nn
from two_processes import run_two

import compacter_kernels as ck

pytestmark = pytest.mark.slow
NAMES, STEPS = ["de", "sv", "nl"], 4


class Model(nn.Module):
    """A frozen layer and a bank behind it. The adapter "nl" occurs in no batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(16, 16).requires_grad_(False)
        options: dict[str, Any] = {"share_rule": True} if kind == "compacter" else {}
        self.bank = ck.AdapterBank(16, NAMES, kind=kind, reduction_factor=2, scale="learned", **options)
        with torch.no_grad():
            for parameter in self.bank.parameters():
                parameter.normal_(0, 0.5)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.bank(self.base(x), route=ids)


def _train(model: nn.Module, rank: int = 0, world: int = 1) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(STEPS):
        x = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        ids = torch.tensor([0, -1, 1, 0, 1, 1, -1, 0]).chunk(world)[rank]
        optimizer.zero_grad()
        model(x, ids).square().mean().backward()
        optimizer.step()


def _worker(rank: int, wrap: str, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Model(kind)
    _train(WRAPS[wrap](model), rank, world=2)
    state = {key: getattr(t, "full_tensor", lambda t=t: t)().detach() for key, t in model.state_dict().items()}
    torch.save(state, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["compacter", "bottleneck"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_two_processes_train_as_one(wrap: str, kind: str, tmp_path: Path) -> None:
    run_two(_worker, wrap, kind, str(tmp_path))
    model = Model(kind)
    before = model.bank["nl"].state_dict()
    _train(model)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert state.keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)
    for path, value in model.bank["nl"].state_dict().items():
        assert torch.equal(value, before[path]) or "phm_rule" in path
