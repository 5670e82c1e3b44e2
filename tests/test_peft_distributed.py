"""Two processes train one model of peft by DDP, FSDP2 or ZeRO-3, as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import config, peft, randomise
from small_models import adamw, base_of, batch, trained
from torch import Tensor, distributed, nn
from two_processes import as_torchrun, free_port, run_two

pytestmark = pytest.mark.slow


def make() -> Any:
    return randomise(peft.get_peft_model(base_of("bert"), config(task_type="SEQ_CLS"))).train()


def train(model: nn.Module, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Two steps; each process takes its part of every batch. Returns the gradients of the last."""
    optimizer = adamw(model)
    for step in range(2):
        part = {name: value.chunk(world)[rank] for name, value in batch("bert", 8, seed=step).items()}
        optimizer.zero_grad()
        model(**part).loss.backward()
        if step == 0:
            optimizer.step()
    return {name: whole(p.grad) for name, p in trained(model).items() if p.grad is not None}


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def fully_sharded(model: Any) -> nn.Module:
    """Shard each layer, then the rest, which has the rule that all adapters share."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if type(module).__name__ == "BertLayer":
            fully_shard(module)
    return fully_shard(model)  # type: ignore[no-any-return]


def work(rank: int, wrap: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = make()
    wrapping = nn.parallel.DistributedDataParallel if wrap == "DDP" else fully_sharded
    gradients = train(wrapping(model), rank, world=2)
    shared = [p for name, p in model.named_parameters() if "compacter_shared_phm_rule" in name]
    assert len(shared) == 1 and hasattr(shared[0], "full_tensor") == (wrap == "FSDP2")
    state = {name: whole(value) for name, value in model.state_dict().items()}
    saved = peft.get_peft_model_state_dict(model, state_dict=state)
    torch.save({"gradients": gradients, "saved": saved}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["DDP", "FSDP2"])
def test_two_processes_train_as_one(wrap: str, tmp_path: Path) -> None:
    run_two(work, wrap, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    model = make()
    expected = train(model)
    saved = peft.get_peft_model_state_dict(model)
    assert first["saved"].keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(first["saved"][name], second["saved"][name]), name
        torch.testing.assert_close(first["saved"][name], value, rtol=1e-4, atol=1e-5)
    gradients = {name.removeprefix("module."): value for name, value in first["gradients"].items()}
    assert gradients.keys() == expected.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


IN_PIECES = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def train_in_pieces(rank: int, port: int) -> None:
    """Three steps of DeepSpeed give the gradients of a model beside it that sees all parts."""
    as_torchrun(rank, port)
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.init_distributed("gloo")
    model, plain = make(), make()
    optimizers = [torch.optim.SGD(trained(each).values(), 0.1) for each in (model, plain)]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizers[0], config=IN_PIECES)
    assert all(p.numel() == 0 for p in model.parameters())
    for step in range(3):
        parts = [{k: v.chunk(2)[other] for k, v in batch("bert", 8, seed=step).items()} for other in range(2)]
        engine.backward(engine(**parts[rank]).loss)
        (sum(plain(**part).loss for part in parts) / 2).backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(safe_get_full_grad(p), q.grad, rtol=1e-4, atol=1e-6, msg=name)
        engine.step()
        optimizers[1].step()
        optimizers[1].zero_grad()


@pytest.mark.filterwarnings("ignore")
def test_zero_3_gives_the_gradients_of_one_process() -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    run_two(train_in_pieces, free_port())
