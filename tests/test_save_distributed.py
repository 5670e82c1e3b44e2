"""Two processes: sharded adapters are gathered and saved by one of them, and loaded into sharded ones."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, output
from test_save_load import trained
from torch import distributed, multiprocessing

from compacter_kernels.models.files import TENSORS
from compacter_kernels.models.load import load_adapter
from compacter_kernels.models.save import save_adapter

pytest.importorskip("safetensors")


def _sharded(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def _work(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = _sharded(trained(build("bert")))
    assert any(hasattr(p, "full_tensor") for p in model.parameters())
    save_adapter(model, folder / "sharded")
    plain = trained(build("bert"), seed=rank)  # rank 0 writes its own
    save_adapter(plain, folder / "plain")
    distributed.barrier()
    again = _sharded(trained(build("bert"), seed=7))
    load_adapter(again, folder / "sharded")
    save_adapter(again, folder / "again")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_work, (port, tmp_path), nprocs=2)
    save_adapter(trained(build("bert")), tmp_path / "expected")
    expected = (tmp_path / "expected" / TENSORS).read_bytes()
    for name in ("sharded", "plain", "again"):
        assert (tmp_path / name / TENSORS).read_bytes() == expected, name
    loaded = load_adapter(build("bert"), tmp_path / "sharded")
    assert torch.equal(output("bert", loaded), output("bert", trained(build("bert"))))
