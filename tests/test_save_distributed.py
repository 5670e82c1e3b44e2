"""Two processes save and load adapters of a sharded model.

The adapters are gathered, and one process writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, output
from test_save_load import trained
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from two_processes import run_two

from compacter_kernels import CompacterConfig, inject
from compacter_kernels.checkpoints.files import TENSORS
from compacter_kernels.load import load_adapter
from compacter_kernels.save import save_adapter

pytest.importorskip("safetensors")


def _sharded(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = _sharded(trained(build("bert")))
    assert any(hasattr(p, "full_tensor") for p in model.parameters())
    save_adapter(model, folder / "sharded")
    plain = trained(build("bert"), seed=rank)  # so that the file must come from rank 0
    save_adapter(torch.nn.parallel.DistributedDataParallel(plain), folder / "plain")
    distributed.barrier()
    again = _sharded(trained(build("bert"), seed=7))
    load_adapter(again, folder / "sharded")
    save_adapter(again, folder / "again")
    distributed.barrier()
    _of_fsdp1(folder)
    distributed.destroy_process_group()


def _of_fsdp1(folder: Path) -> None:
    """Its parameters are pieces of a flat one, and all their names have additional parts."""
    policy = ModuleWrapPolicy({type(build("bert").bert.encoder.layer[0])})
    model = FullyShardedDataParallel(
        trained(build("bert"), seed=7), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    for call in (lambda: save_adapter(model, folder / "no"), lambda: load_adapter(model, folder / "sharded")):
        with pytest.raises(ValueError, match=r"within `with FullyShardedDataParallel\.summon_full_params"):
            call()
    with FullyShardedDataParallel.summon_full_params(model):
        load_adapter(model, folder / "sharded")
    expected = output("bert", trained(build("bert")))
    torch.testing.assert_close(output("bert", model), expected, rtol=1e-5, atol=1e-5)
    with FullyShardedDataParallel.summon_full_params(model, rank0_only=True, writeback=False):
        save_adapter(model, folder / "summoned")
    for wrapped in (model, torch.nn.parallel.DistributedDataParallel(trained(build("bert"))), _sharded(build("bert"))):
        with pytest.raises(ValueError, match="put in adapters first, and distribute the model then"):
            inject(wrapped, CompacterConfig(reduction_factor=4), name="more")
    distributed.barrier()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_two_processes(tmp_path: Path) -> None:
    run_two(_work, tmp_path)
    save_adapter(trained(build("bert")), tmp_path / "expected")
    expected = (tmp_path / "expected" / TENSORS).read_bytes()
    assert not (tmp_path / "no").exists()
    for name in ("sharded", "plain", "again", "summoned"):
        assert (tmp_path / name / TENSORS).read_bytes() == expected, name
    loaded = load_adapter(build("bert"), tmp_path / "sharded")
    assert torch.equal(output("bert", loaded), output("bert", trained(build("bert"))))
