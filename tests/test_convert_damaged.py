"""Damaged sources that `test_any_bytes.py` found: each is refused by a ValueError that says why."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from families import build
from safetensors.torch import load_file
from test_save_load import trained
from torch import Tensor

import compacter_kernels as ck

LEFT, RIGHT = "phm_rule_left", "phm_rule_right"


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float8_e4m3fn), (torch.float8_e4m3fn,) * 2], ids=str)
def test_a_dtype_without_equality(dtypes: tuple[torch.dtype, ...], tmp_path: Path) -> None:
    ck.convert(trained(build("t5")), "original", tmp_path / "model.safetensors", allow_loss=True)
    tensors = load_file(tmp_path / "model.safetensors")
    rules = [key for key in tensors if key.endswith("phm_rule") and "." in key]
    for key, dtype in zip(rules, dtypes, strict=False):
        tensors[key] = tensors[key].to(dtype)
    with pytest.raises(ValueError, match=r"is torch\.float8_e4m3fn, not float32 or"):
        ck.convert(tensors, "peft", source_format="original", model_type="t5")


@pytest.mark.parametrize(
    ("factors", "match"),
    [
        ((torch.ones(2, 2, 1), torch.ones(2, 1, 2, dtype=torch.float64)), "cannot be multiplied: .* in torch.float64"),
        ((torch.ones(2, 2, 1), torch.ones(2, 2, 2)), r"phm_rule_left and phm_rule_right cannot be multiplied: \(2, 2"),
        ((torch.ones(2), torch.ones(2)), "cannot be multiplied"),
    ],
)
def test_factors_that_do_not_fit(factors: tuple[Tensor, Tensor], match: str) -> None:
    layer = {LEFT: factors[0], RIGHT: factors[1], "W": torch.ones(2, 2, 2)}
    with pytest.raises(ValueError, match=match):
        ck.convert(layer, "hypernets", source_format="phm_linear")
    with pytest.raises(ValueError, match="must have three dimensions"):
        ck.convert({"phm_rule": torch.ones(2), "W": torch.ones(2, 2, 2)}, "hypernets", source_format="phm_linear")


def test_a_shard_that_is_an_object(tmp_path: Path) -> None:
    """The message does not repeat the whole object."""
    index = {"weight_map": {"a": {str(number): "x" * 100 for number in range(1000)}}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a shard must be a \.safetensors file") as error:
        ck.convert(tmp_path, "peft")
    assert len(str(error.value)) < 1000


def test_a_damaged_pickle(tmp_path: Path) -> None:
    """What its code does is an error of any class in torch, and here a ValueError."""
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file)
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(tmp_path / "pytorch_adapter.bin", "w") as damaged:
        for name in good.namelist():
            damaged.writestr(name, b"\x80\x02e." if name.endswith("data.pkl") else good.read(name))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds more than tensors, or is damaged"):
        ck.convert(tmp_path, "peft", allow_pickle=True)
