"""Readers of files get damaged ones. Each is read as it is, or refused by a documented error.

The error is raised on purpose, by a line of this package, and has a message. The model is then
unchanged. No file lets a reader hang, or take a gibibyte of memory.
"""

from __future__ import annotations

import json
import linecache
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from counted import tries
from damaged_files import EDITS, damaged, read, write
from families import build
from hypothesis import given
from safetensors.torch import load_file, save_file
from test_save_load import trained
from torch import Tensor, nn

import compacter_kernels as ck

DOCUMENTED = (TypeError, ValueError, FileNotFoundError)
PACKAGE = str(Path(ck.__file__).parent)
BERT = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
T5 = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1}
OPTIONS = {"phm_dim": 2, "reduction_factor": 2}


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def adapted() -> nn.Module:
    return trained(host(), target_modules=["0", "1"], modules_to_save=[], train_layer_norms=False, **OPTIONS)


def bank() -> ck.AdapterBank:
    return ck.AdapterBank(8, ["a", "b"], reduction_factor=2, phm_dim=2)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


class Reader(NamedTuple):
    """make: the model that `load` may change. save: writes the good files."""

    make: Callable[[], nn.Module]
    save: Callable[[Path], object]
    load: Callable[[Any, Path], object]


def converts(form: str, changed: Callable[[Path], object] | None = None) -> Reader:
    """`convert` of a folder in that format, or of what `changed` makes of it."""

    def save(folder: Path) -> None:
        t5 = form in ("original", "t-few")
        model = trained(build("t5", **T5) if t5 else build("bert", **BERT), modules_to_save=[], **OPTIONS)
        ck.convert(model, form, folder / "model.safetensors" if t5 else folder, allow_loss=True)
        if changed is not None:
            changed(folder)

    def load(_: nn.Module, folder: Path) -> None:
        ck.convert(folder, "hypernets" if form == "peft" else "peft", allow_loss=True, allow_pickle=True)

    return Reader(nn.Identity, save, load)


def pickled(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    torch.save(load_file(path), folder / "pytorch_adapter.bin")
    path.unlink()


def in_shards(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    shards = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard)
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


READERS = {
    "load_adapter": Reader(adapted, lambda folder: ck.save_adapter(adapted(), folder), ck.load_adapter),
    "load_adapter into a new model": Reader(host, lambda folder: ck.save_adapter(adapted(), folder), ck.load_adapter),
    "load_adapter into a bank": Reader(
        bank,
        lambda folder: ck.save_adapter(bank(), folder, name="a"),
        lambda model, folder: ck.load_adapter(model, folder, name="b"),
    ),
    **{f"convert from {form}": converts(form) for form in ("peft", "adapters", "original", "t-few")},
    "convert from a pickle": converts("adapters", pickled),
    "convert from shards": converts("original", in_shards),
}


@contextmanager
def limits() -> Iterator[None]:
    """Within it a gibibyte more of memory is an error of torch, and a hang is an error."""

    def stop(*_: object) -> None:
        raise AssertionError("no answer within two minutes")

    limit = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limit[1]))
    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limit)


def assert_on_purpose(error: Exception) -> None:
    """The innermost line of the traceback is a `raise` of this package."""
    assert str(error).strip() and len(str(error)) < 2000
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    file = trace.tb_frame.f_code.co_filename
    assert file.startswith(PACKAGE) and linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise"), error


@pytest.mark.failure("a file is damaged or hostile")
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the size of the process is not known")
@pytest.mark.parametrize("reader", READERS)
def test_any_bytes(reader: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    make, save, load = READERS[reader]
    save(tmp_path)
    good, model = read(tmp_path), make()
    expected, tried, refused = state(model), 0, 0

    @tries(1250, 125_000)
    @given(edits=EDITS)
    def reads(edits: list[tuple[int, int, int, int]]) -> None:
        nonlocal model, tried, refused
        write(damaged(good, edits), tmp_path)
        tried += 1
        signal.alarm(120)
        try:
            load(model, tmp_path)
        except DOCUMENTED as error:
            assert_on_purpose(error)
            refused += 1
            now = model.state_dict()
            assert now.keys() == expected.keys()
            assert all(torch.equal(now[key], value) for key, value in expected.items())
        else:
            model = make()
            model.load_state_dict(expected)

    with limits():
        reads()
    assert refused > tried / 4
    record_property("inputs", tried)
