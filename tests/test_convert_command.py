"""`compacter-kernels convert`: reports, conversions, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import build, output
from test_cli import run
from test_save_load import trained

from compacter_kernels.checkpoints.convert import FORMATS
from compacter_kernels.load import load_adapter
from compacter_kernels.save import save_adapter

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def saved(tmp_path: Path) -> str:
    save_adapter(trained(build("t5"), non_linearity="relu"), tmp_path / "ours")
    return str(tmp_path / "ours")


def test_report(capsys: pytest.CaptureFixture[str], saved: str) -> None:
    code, out, _ = run(capsys, "convert", saved, "--json")
    report = json.loads(out)
    assert code == 0 and report["complete"]
    assert (report["source_format"], report["adapters"], report["shared"]) == ("compacter-kernels", 8, ["phm_rule"])
    assert report["options"]["non_linearity"] == "relu" and report["model"]["model_type"] == "t5"
    code, out, _ = run(capsys, "convert", saved)
    assert code == 0 and "source_format   compacter-kernels\n" in out and "phm_dim 4\n" in out


def test_convert_there_and_back(capsys: pytest.CaptureFixture[str], saved: str, tmp_path: Path) -> None:
    there, back = str(tmp_path / "t-few.safetensors"), str(tmp_path / "back")
    code, out, _ = run(capsys, "convert", saved, "--to", "t-few", "--out", there, "--json")
    report = json.loads(out)
    assert code == 0 and report["written"] == there and report["losses"] == []
    assert any("phm_rule is repeated" in note for note in report["notes"])
    code, out, _ = run(capsys, "convert", there, "--to", "compacter-kernels", "--out", back, "--model-type", "t5")
    assert code == 0 and "'relu' is taken, the default of t-few" in out
    again = load_adapter(build("t5"), back)
    torch.testing.assert_close(output("t5", again), output("t5", load_adapter(build("t5"), saved)))


def test_an_incomplete_file_is_1_and_repaired(capsys: pytest.CaptureFixture[str], saved: str, tmp_path: Path) -> None:
    out_folder, rule = str(tmp_path / "theirs"), str(tmp_path / "rule.safetensors")
    code, _, err = run(capsys, "convert", saved, "--to", "adapters", "--out", out_folder)
    assert code == 2 and "trained layer norm" in err and not Path(out_folder).exists()
    assert run(capsys, "convert", saved, "--to", "adapters", "--out", out_folder, "--allow-loss")[0] == 0
    tensors = safetensors.load_file(f"{out_folder}/adapter.safetensors")
    safetensors.save_file({"phm_rule": tensors.pop("shared_parameters.default.phm_rule")}, rule)
    safetensors.save_file(tensors, f"{out_folder}/adapter.safetensors")

    code, out, _ = run(capsys, "convert", out_folder)
    assert code == 1 and "the file lacks phm_rule" in out
    repair = ("convert", out_folder, "--to", "compacter-kernels", "--out", str(tmp_path / "repaired"), "--json")
    code, out, _ = run(capsys, *repair)
    assert code == 1 and not json.loads(out)["complete"] and not (tmp_path / "repaired").exists()
    assert run(capsys, *repair, "--phm-rule", rule)[0] == 0
    assert run(capsys, "convert", out_folder, "--phm-rule", rule)[0] == 0
    load_adapter(build("t5"), tmp_path / "repaired")


def test_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    layer = str(tmp_path / "layer.safetensors")
    safetensors.save_file({"a": torch.ones(2, 2, 2), "s": torch.ones(2, 3, 4)}, layer)
    code, out, _ = run(capsys, "convert", layer, "--json")
    assert code == 0 and json.loads(out)["source_format"] == "hypernets"
    assert run(capsys, "convert", layer, "--to", "phm_linear", "--out", str(tmp_path / "ours.safetensors"))[0] == 0


def test_wrong(capsys: pytest.CaptureFixture[str], saved: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    for arguments, expected in (
        ((saved, "--to", "adapters"), "--to and --out belong together"),
        ((saved, "--to", "lora", "--out", "x"), "invalid choice: 'lora'"),
        ((str(tmp_path / "nothing"),), "nothing is not there"),
        ((str(tmp_path / "pytorch_model.bin"),), "is a pickle, which can run code"),
        ((saved, "--to", "original", "--out", str(tmp_path / "x")), "give a name in .safetensors"),
    ):
        code, out, err = run(capsys, "convert", *arguments)
        assert (code, out) == (2, "") and expected in err and err.count("\n") == 1, arguments


def test_the_formats_are_named_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "convert", "--help")
    assert all(kind in out for kind in FORMATS)
