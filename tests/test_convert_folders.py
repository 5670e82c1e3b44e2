"""Folders as sources of `convert`: checkpoints in shards, and whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, output
from test_cli import run
from test_save_load import trained

import compacter_kernels as ck
from compacter_kernels.checkpoints.files import INDEX
from compacter_kernels.load import load_adapter
from compacter_kernels.save import save_adapter

safetensors = pytest.importorskip("safetensors.torch")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TENSORS = {
    f"layer.{i}.{name}": torch.randn(shape)
    for i in range(4)
    for name, shape in (("phm_rule", (2, 2, 2)), ("W", (2, 3, 4)), ("b", (8,)))
}


def write_index(folder: Path, shard_of: Any, **others: Any) -> Path:
    path = folder / f"model{INDEX}"
    path.write_text(json.dumps({"metadata": {}, "weight_map": shard_of, **others}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write four layers into two shards with an index, and return their folder."""
    shard_of = {key: SHARDS[key > "layer.2"] for key in TENSORS}
    for shard in SHARDS:
        safetensors.save_file({key: TENSORS[key] for key in TENSORS if shard_of[key] == shard}, tmp_path / shard)
    write_index(tmp_path, shard_of)
    return tmp_path


def weight_map(folder: Path) -> dict[str, Any]:
    shard_of: dict[str, Any] = json.loads((folder / f"model{INDEX}").read_text())["weight_map"]
    return shard_of


def test_shards_are_read_by_their_index(folder: Path) -> None:
    for source in (folder, folder / f"model{INDEX}"):
        assert ck.convert(source, "phm_linear").tensors.keys() == TENSORS.keys()
    converted = ck.convert(folder, "hypernets")
    assert all(torch.equal(converted.tensors[f"layer.{i}.s"], TENSORS[f"layer.{i}.W"].mT) for i in range(4))


def test_one_shard_is_not_the_checkpoint(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is one of several shards; give their folder, which must hold the \*\.safe"):
        ck.convert(folder / SHARDS[0], "phm_linear")
    (folder / f"model{INDEX}").unlink()
    with pytest.raises(FileNotFoundError, match=r"has shards .*00001-of-00002\.safetensors, and no \*\.safe"):
        ck.convert(folder, "phm_linear")


def _edited(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: write_index(folder, {k: v for k, v in {**weight_map(folder), **changes}.items() if v})


def _twice(folder: Path) -> None:
    path = folder / f"model{INDEX}"
    path.write_text(path.read_text().replace('"weight_map": {', '"weight_map": {"layer.0.W": "x.safetensors", '))


def _moved(folder: Path) -> None:
    """Write a tensor into the other shard as well."""
    tensors = safetensors.load_file(folder / SHARDS[0])
    safetensors.save_file({**tensors, "layer.3.W": TENSORS["layer.3.W"] + 1}, folder / SHARDS[0])


KEY = "layer.0.W"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard that is missing": (lambda f: (f / SHARDS[1]).unlink(), f"names {SHARDS[1]}, of 2 shards, and it is not"),
    "out of the folder": (_edited(**{KEY: "../x.safetensors"}), r"file of this folder, got '\.\./x\.safetensors'"),
    "an absolute path": (_edited(**{KEY: "/etc/x.safetensors"}), "of this folder, got '/etc/x.safetensors'"),
    "a folder below": (_edited(**{KEY: f"./{SHARDS[0]}"}), "file of this folder, got './model-00001"),
    "a pickle": (_edited(**{KEY: "model.bin"}), r"must be a \.safetensors file of this folder, got 'model\.bin'"),
    "a number": (_edited(**{KEY: 3}), "got 3"),
    "NUL": (_edited(**{KEY: "a\0.safetensors"}), "and it is not there"),
    "a tensor that no shard has": (_edited(more=SHARDS[0]), f"{SHARDS[0]} lacks 1 tensors: more"),
    "a tensor that the index lacks": (_edited(**{KEY: None}), f"{SHARDS[0]} has beside .* 1 tensors: {KEY}"),
    "a tensor of the other shard": (_edited(**{KEY: SHARDS[1]}), f"{SHARDS[0]} has beside those .* 1 tensors: {KEY}"),
    "a tensor in both": (_moved, f"{SHARDS[0]} has beside those of the index 1 tensors: layer.3.W"),
    "a tensor listed twice": (_twice, "it has a key twice"),
    "no map": (lambda f: write_index(f, None), "has no weight_map"),
    "a list": (lambda f: write_index(f, list(TENSORS)), "has no weight_map"),
    "an empty map": (lambda f: write_index(f, {}), "has no weight_map"),
    "no JSON": (lambda f: (f / f"model{INDEX}").write_text("{"), "is not a config"),
    "a shard that is cut": (lambda f: (f / SHARDS[1]).write_bytes(b"x"), f"{SHARDS[1]} is no sound safetensors file"),
    "another index": (lambda f: (f / f"other{INDEX}").write_text("{}"), "holds 2 checkpoints; give one of them"),
    "a whole file too": (
        lambda f: safetensors.save_file(TENSORS, f / "model.safetensors"),
        r"holds 2 checkpoints; give one of them: model\.safetensors\.index\.json, model\.safetensors",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_index_that_is_wrong(case: str, folder: Path) -> None:
    change, message = HOSTILE[case]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        ck.convert(folder, "phm_linear", folder / "out.safetensors")
    assert not (folder / "out.safetensors").exists() and len(str(error.value)) < 1000


def test_a_whole_model_with_our_adapters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its files have no options. The error names the steps that lead to an adapter folder."""
    model = trained(build("bert"), non_linearity="relu")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for name in ("whole", "shards"):
        code, _, err = run(capsys, "convert", str(tmp_path / name))
        assert code == 2 and "a whole bert with adapters in it, whose options no file says" in err
    again = ck.inject(build("bert"), ck.CompacterConfig(reduction_factor=4, non_linearity="relu"))
    again.load_state_dict(safetensors.load_file(tmp_path / "whole" / "model.safetensors"))
    save_adapter(again, tmp_path / "adapter")
    assert run(capsys, "convert", str(tmp_path / "adapter"))[0] == 0
    assert torch.equal(output("bert", load_adapter(build("bert"), tmp_path / "adapter")), output("bert", model))


def test_other_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path / "plain")
    lora = {"base_model.model.encoder.query.lora_A.weight": torch.ones(2, 3)}
    (tmp_path / "lora").mkdir()
    safetensors.save_file(lora, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for path, expected in (
        (tmp_path / "plain", "a whole model of the type 'bert', and no Compacter adapters"),
        (tmp_path / "lora", "adapters of another method than Compacter and Bottleneck, peft_type 'LORA'"),
        (tmp_path, "has no .safetensors file, but its folders lora, plain have; give one of them"),
    ):
        code, _, err = run(capsys, "convert", str(path))
        assert code == 2 and expected in err and err.count("\n") == 1


@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_of_adapters(tmp_path: Path) -> None:
    """Its config.json has the options. So it is converted like the model in memory."""
    adapters = pytest.importorskip("adapters")
    model = build("bert")
    adapters.init(model)
    config = adapters.AdapterConfig.load("compacter", reduction_factor=4, phm_dim=4)
    for name in ("one", "two"):
        model.add_adapter(name, config=config)
    model.save_pretrained(tmp_path / "model")
    expected = ck.convert(model, "compacter-kernels", name="two")
    converted = ck.convert(tmp_path / "model", "compacter-kernels", name="two")
    assert converted.config == {**expected.config, "num_hidden_layers": 2}
    assert converted.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(converted.tensors[key], tensor) for key, tensor in expected.tensors.items())

    with pytest.raises(ValueError, match="adapters of 2 names; give name=, one of one, two"):
        ck.convert(tmp_path / "model", "compacter-kernels")
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    configs = about["adapters"]["config_map"]
    for config in configs.values():
        del config["init_weights_seed"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="its 'gelu' was once gelu_new"):
        ck.convert(tmp_path / "model", "compacter-kernels", name="one")
    configs.clear()
    (tmp_path / "model" / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="does not say the options of 'one'"):
        ck.convert(tmp_path / "model", "compacter-kernels", name="one")


@pytest.mark.filterwarnings("ignore")
def test_a_wrapped_source_has_the_names_of_the_plain_one(tmp_path: Path) -> None:
    """The source is a wrapped model, or a state dict that was taken from one."""
    model = trained(build("t5"))
    expected = ck.convert(model, "t-few")
    converted = ck.convert(torch.nn.DataParallel(torch.compile(model)), "t-few")
    prefixed = {f"module._orig_mod.{key}": tensor for key, tensor in expected.tensors.items()}
    for tensors in (converted.tensors, ck.convert(prefixed, "t-few", source_format="t-few", model_type="t5").tensors):
        assert tensors.keys() == expected.tensors.keys()
