"""A save is killed, or the disk is full: then the old adapter or the new one is there, whole."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from counted import budget
from torch import nn

import compacter_kernels as ck

pytest.importorskip("safetensors")
KILLS = budget(60, 5000)
CONFIG = {"phm_dim": 4, "reduction_factor": 2, "target_modules": ["0", "1"], "train_layer_norms": False}


def adapted(value: float) -> nn.Module:
    """A model all of whose adapters' parameters are this value."""
    model = ck.inject(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), ck.CompacterConfig(**CONFIG))
    for _, parameter in ck.adapter_parameters(model):
        nn.init.constant_(parameter, value)
    return model


def adapter_bank(value: float) -> ck.AdapterBank:
    bank = ck.AdapterBank(64, ["a"], reduction_factor=2)
    for parameter in bank.parameters():
        nn.init.constant_(parameter, value)
    return bank


def save(kind: str, model: nn.Module, folder: str) -> None:
    """Save by the function of that kind."""
    if kind == "save_adapter":
        ck.save_adapter(model, folder)
    elif kind == "save_adapter of a bank":
        value = float(next(p for _, p in ck.adapter_parameters(model)).flatten()[0].detach())
        ck.save_adapter(adapter_bank(value), folder, name="a")
    else:
        ck.convert(model, "peft", folder)


def loaded(kind: str, folder: Path) -> set[float]:
    """The values that a load finds; one value if the adapter is whole."""
    if kind == "save_adapter of a bank":
        bank = adapter_bank(-1)
        ck.load_adapter(bank, folder, name="a")
        return {float(value) for p in bank.parameters() for value in p.detach().unique()}
    model = ck.load_adapter(adapted(-1), folder)
    return {float(value) for _, p in ck.adapter_parameters(model) for value in p.detach().unique()}


def save_for_ever(kind: str, model: nn.Module, folder: str) -> None:
    for value in itertools.cycle(range(1, 1000)):
        for _, parameter in ck.adapter_parameters(model):
            nn.init.constant_(parameter, value)
        save(kind, model, folder)


@pytest.mark.failure("the process is killed (kill -9) during a save")
@pytest.mark.skipif(sys.platform != "linux", reason="kill -9 is of Unix")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", ["save_adapter", "save_adapter of a bank", "convert"])
def test_killed_during_a_save(kind: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Children save in a loop, and each is killed at a random moment.

    The folder then holds one whole adapter. If the kill came between the moves of the two files,
    the load says so. The next save works in any case.
    """
    folder, model = tmp_path / "adapter", adapted(0)
    moments, whole, told = random.Random(0), 0, 0
    save(kind, model, str(folder))
    for _ in range(KILLS):
        child = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(kind, model, str(folder)))
        child.start()
        time.sleep(moments.random() * 0.05)
        child.kill()
        child.join()
        try:
            assert len(loaded(kind, folder)) == 1
            whole += 1
        except ValueError as error:
            if "a save was interrupted" not in str(error):
                raise
            told += 1
            save(kind, model, str(folder))
            assert loaded(kind, folder) == {0.0}
    assert whole > told
    record_property("inputs", KILLS)


@pytest.mark.failure("the disk is full during a save")
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a file's size is of Unix")
@pytest.mark.parametrize("kind", ["save_adapter", "save_adapter of a bank", "convert"])
def test_a_full_disk(kind: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """A limit on the size of files has the effect of a full disk: a write fails midway."""
    folder, new = tmp_path / "adapter", tmp_path / "new"
    save(kind, adapted(1), str(folder))
    size = max(path.stat().st_size for path in folder.iterdir())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write gives an error
    sizes = [0, 1, 8, 100, size // 2, size - 1]
    for bytes_left in sizes:
        for target in (folder, new):
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, limit[1]))
            try:
                with pytest.raises(OSError, match="adapter_"):
                    save(kind, adapted(2), str(target))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert loaded(kind, folder) == {1.0}
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        assert len(list(folder.iterdir())) == 2
    signal.signal(signal.SIGXFSZ, before)
    save(kind, adapted(2), str(folder))
    assert loaded(kind, folder) == {2.0}
    record_property("inputs", 2 * len(sizes))


MEMORY = """
import resource, sys
from pathlib import Path
import torch
import compacter_kernels as ck

adapter = ck.CompacterAdapter(256, reduction_factor=2, impl=sys.argv[1])
few, many = torch.ones(4, 256), torch.ones(1, 256).expand(1 << 20, 256)
expected = adapter(few)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
failed = []
for grad in (True, False, True):
    try:
        adapter.requires_grad_(grad)(many)
    except (MemoryError, RuntimeError) as error:
        failed.append(str(error))
assert len(failed) == 3, failed
assert torch.equal(adapter(few), expected)
adapter(few).sum().backward()
assert all(p.grad is not None for p in adapter.parameters())
print(failed)
"""


@pytest.mark.failure("there is no memory for a call")
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is of Linux")
@pytest.mark.parametrize("impl", [name for name in ("cpu", "factored") if ck.available_impls()[name] is None])
def test_out_of_memory(impl: str, record_property: Callable[[str, object], None]) -> None:
    """The call raises the error of torch. The next, smaller call gives the right result."""
    done = subprocess.run([sys.executable, "-c", MEMORY, impl], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memory" in done.stdout
    record_property("inputs", 3)
