"""Parameters in pieces, as stage 3 of ZeRO in DeepSpeed has them.

They are copied, counted, saved, loaded and initialised as whole tensors. Without deepspeed, an
imitation of the functions that we use replaces it, and the training test is skipped.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, output
from test_save_load import trained
from torch import distributed, multiprocessing, nn

import compacter_kernels as ck
from compacter_kernels.checkpoints.files import TENSORS
from compacter_kernels.load import load_adapter
from compacter_kernels.save import save_adapter

pytest.importorskip("safetensors")


def take_apart(module: nn.Module) -> None:
    """Leave each parameter as zero.Init leaves it in a process that has no piece of it."""
    for parameter in module.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.ds_id, parameter.ds_shape = id(parameter), parameter.shape
            parameter.ds_tensor = parameter.detach().clone()
            parameter.data = torch.empty(0, dtype=parameter.dtype)


@contextmanager
def gathered_parameters(parameters: Iterable[Any], modifier_rank: int | None = None) -> Iterator[None]:
    parameters = list({id(p): p for p in parameters}.values())
    for p in parameters:
        assert p.numel() == 0
        p.data = p.ds_tensor.clone()
    yield
    for p in parameters:
        if modifier_rank is not None:
            p.ds_tensor = p.detach().clone()
        p.data = torch.empty(0, dtype=p.dtype)


@pytest.fixture
def imitation(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = types.ModuleType("deepspeed")
    deepspeed.__spec__ = ModuleSpec("deepspeed", None)
    deepspeed.zero = types.SimpleNamespace(GatheredParameters=gathered_parameters)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The saved adapters of a whole model, for comparison."""
    save_adapter(trained(build("bert")), tmp_path / "plain")
    return tmp_path


def in_pieces() -> nn.Module:
    model = build("bert")
    take_apart(model)
    return model


@pytest.mark.usefixtures("imitation")
def test_inject_count_save_and_load(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, plain = trained(in_pieces()), trained(build("bert"))
    norm = model.bert.embeddings.LayerNorm
    assert norm.weight.numel() == 0 and norm.compacter["default"].weight.shape == (32,)
    assert ck.count_parameters(model) == ck.count_parameters(plain)
    ck.print_trainable_parameters(model)
    assert "(" in capsys.readouterr().out
    take_apart(model)  # as deepspeed.initialize does
    assert ck.count_parameters(model) == ck.count_parameters(plain)
    save_adapter(model, saved / "pieces")
    expected = (saved / "plain" / TENSORS).read_bytes()
    assert (saved / "pieces" / TENSORS).read_bytes() == expected
    assert all(p.numel() == 0 for p in model.parameters())

    other = trained(in_pieces(), seed=5)
    take_apart(other)
    for target in (other, in_pieces()):
        load_adapter(target, saved / "plain")
        save_adapter(target, saved / "again")
        assert (saved / "again" / TENSORS).read_bytes() == expected


@pytest.mark.usefixtures("imitation")
def test_weights_are_drawn_whole() -> None:
    torch.manual_seed(0)
    plain = ck.CompacterAdapter(32, reduction_factor=4)
    torch.manual_seed(1)
    plain.reset_parameters()
    pieces = ck.CompacterAdapter(32, reduction_factor=4)
    take_apart(pieces)
    torch.manual_seed(1)
    pieces.reset_parameters()
    assert all(torch.equal(p.ds_tensor, q) for p, q in zip(pieces.parameters(), plain.parameters(), strict=True))
    again = ck.PHMLinear(32, 64, phm_rule=pieces.down.phm_rule)
    assert again.phm_rule is pieces.down.phm_rule
    with pytest.raises(ValueError, match=r"must have shape \(8, 8, 8\), got \(4, 4, 4\)"):
        ck.PHMLinear(32, 64, phm_dim=8, phm_rule=pieces.down.phm_rule)


def test_pieces_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with pytest.raises(RuntimeError, match="import deepspeed first"):
        trained(in_pieces())


CONFIG = {
    "train_batch_size": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "weight_decay": 0.0, "torch_adam": True}},
}


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    import deepspeed

    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo")
    model = build("bert")
    deepspeed.zero.Init(module=model, config_dict_or_path=CONFIG)
    assert model.bert.embeddings.LayerNorm.weight.numel() == 0
    load_adapter(model, folder / "plain")
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        drawn = ck.CompacterAdapter(32, reduction_factor=4)
    with deepspeed.zero.GatheredParameters(list(drawn.parameters())):
        assert drawn.down.phm_rule.shape == (4, 4, 4) and 0 < drawn.down.phm_rule.abs().max() < 1e-2
    weights = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=weights, config=CONFIG)
    save_adapter(engine, folder / "before")
    with pytest.raises(ValueError, match=r"load the adapters before deepspeed\.initialize"):
        load_adapter(engine, folder / "plain")
    with pytest.raises(ValueError, match="put in adapters first, and distribute the model then"):
        trained(engine, name="more")
    for _ in range(2):
        engine.backward(output("bert", engine).square().sum())
        engine.step()
    save_adapter(engine, folder / "after")
    distributed.barrier()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_of_deepspeed(saved: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    multiprocessing.spawn(_work, (saved,), nprocs=2)
    assert (saved / "before" / TENSORS).read_bytes() == (saved / "plain" / TENSORS).read_bytes()
    plain = load_adapter(build("bert"), saved / "plain")
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        output("bert", plain).square().sum().backward()
        optimizer.step()
    loaded = load_adapter(build("bert"), saved / "after")
    for (key, p), (_, q) in zip(ck.adapter_parameters(loaded), ck.adapter_parameters(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-3, msg=key)  # deepspeed rounds; two steps are 2e-2
