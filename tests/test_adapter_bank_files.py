"""Adapters of a bank are saved to and loaded from folders, each alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import BF16, bits
from safetensors.torch import load_file, save_file
from test_adapter_bank import CASES, NAMES, make
from torch.nn import functional as F

import compacter_kernels as ck

SAVED = [case for case, options in CASES.items() if options.get("activation") is not F.softplus]


@pytest.mark.parametrize("case", SAVED)
def test_round_trip(case: str, tmp_path: Path) -> None:
    bank, other = make(case), make(case)
    if bank.share_rule:
        for path, rule in bank.named_parameters():
            if "phm_rule" in path:
                other.get_parameter(path).data.copy_(rule)
    before = {name: other[name].state_dict() for name in NAMES}
    for name in ("de", "nl"):
        ck.save_adapter(bank, tmp_path / name, name=name)
    assert ck.load_adapter(other, tmp_path / "de", name="da") is other
    ck.load_adapter(other, tmp_path / "nl", name="sv")
    assert other.names == ("de", "sv", "nl", "da")
    for name, expected in (("da", bank["de"].state_dict()), ("sv", bank["nl"].state_dict())):
        for path, value in other[name].state_dict().items():
            assert torch.equal(bits(value), bits(expected[path]))
    for name in ("de", "nl"):
        for path, value in other[name].state_dict().items():
            assert torch.equal(bits(value), bits(before[name][path]))


def test_values_are_cast(tmp_path: Path) -> None:
    bank, low = make(), make(dtype=BF16)
    ck.save_adapter(bank, tmp_path, name="de")
    ck.load_adapter(low, tmp_path, name="de")
    assert torch.equal(low.down.W_left[0], bank.down.W_left[0].to(BF16))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    bank = make()
    with pytest.raises(ValueError, match="name= must say which adapter of the bank, of de, sv, nl"):
        ck.save_adapter(bank, tmp_path)
    with pytest.raises(KeyError, match="no adapter 'da'"):
        ck.save_adapter(bank, tmp_path, name="da")
    with pytest.raises(ValueError, match="activation is a function"):
        ck.save_adapter(make("compacter: any callable"), tmp_path, name="de")
    assert not list(tmp_path.iterdir())
    ck.save_adapter(bank, tmp_path, name="de")
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=r"activation is 'relu' in the bank, and 'gelu_new' in .*adapter_config.json"):
        ck.load_adapter(make("compacter: relu"), tmp_path, name="de")
    with pytest.raises(ValueError, match="adapter_kind is 'bottleneck' in the bank, and 'compacter'"):
        ck.load_adapter(make("bottleneck: default"), tmp_path, name="de")
    with pytest.raises(ValueError, match=r"adapter_config.json has peft_type None"):
        ck.load_adapter(torch.nn.Linear(2, 2), tmp_path)
    for change, match in (
        ({"format_version": 9}, "format_version 9"),
        ({"adapter_kind": None}, "adapter_kind is 'com"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
        with pytest.raises(ValueError, match=match):
            ck.load_adapter(bank, tmp_path, name="de")
    del config["adapter_kind"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="is not of an adapter of a bank"):
        ck.load_adapter(bank, tmp_path, name="de")


def test_a_dtype_without_equality_is_refused(tmp_path: Path) -> None:
    bank = make()
    ck.save_adapter(bank, tmp_path, name="de")
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in load_file(path).items()}, path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    del config["adapter_model_sha256"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is torch\.float8_e4m3fn, not float32 or"):
        ck.load_adapter(bank, tmp_path, name="de")
