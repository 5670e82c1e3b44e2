"""Adapters are saved in a folder and loaded into another model.

The function stays the same for all options, model classes and dtypes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import build, output
from torch import nn

import compacter_kernels as ck
from compacter_kernels.checkpoints import files
from compacter_kernels.load import load_adapter
from compacter_kernels.save import save_adapter

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
SMALL = {"reduction_factor": 4, "phm_dim": 4}


def trained(model: nn.Module, name: str = "default", seed: int = 0, **options: Any) -> nn.Module:
    """The model with adapters, all of whose values differ from the initial ones."""
    ck.inject(model, ck.CompacterConfig(**{**SMALL, **options}), name=name)
    torch.manual_seed(seed)
    for _, parameter in ck.adapter_parameters(model, name):
        parameter.data.normal_(0.5, 0.2)
    return model


def keys(folder: Path) -> set[str]:
    return set(safetensors.load_file(folder / files.TENSORS))


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "factorised rule": {"factorized_phm_rule": True},
    "a rule each": {"shared_phm_rule": False},
    "shared W": {"shared_W_phm": True},
    "unfactorised W": {"factorized_phm_W": False, "shared_W_phm": True},
    "layer norms, learned scale": {"ln_before": True, "ln_after": True, "scaling": "learned"},
    "parallel, no bias": {"is_parallel": True, "phm_bias": False, "scaling": 2.0},
    "by layer": {"reduction_factor": {"0": 2, "default": 8}, "leave_out": [1]},
    "no norms, no rule": {"train_layer_norms": False, "learn_phm": False, "non_linearity": "relu"},
    "targets": {"target_modules": ["output.dense"], "dtype": "float64"},
    "head by name": {"modules_to_save": ["pooler.dense"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(build("bert"), **options)
    save_adapter(model, tmp_path / "adapter")
    expected = output("bert", model)
    fresh = build("bert")
    assert not torch.equal(output("bert", fresh), expected)
    assert load_adapter(fresh, tmp_path / "adapter") is fresh
    assert torch.equal(output("bert", fresh), expected)
    trains = {path: p.requires_grad for path, p in model.named_parameters()}
    assert {path: p.requires_grad for path, p in fresh.named_parameters()} == trains
    again = trained(build("bert"), seed=1, **options)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(output("bert", again), expected)


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama", "vit", "whisper", "wav2vec2"])
def test_families(family: str, tmp_path: Path) -> None:
    model = trained(build(family))
    save_adapter(model, tmp_path)
    assert torch.equal(output(family, load_adapter(build(family), tmp_path)), output(family, model))


def test_names_in_the_file(tmp_path: Path) -> None:
    """Names are those of peft and do not contain the name of the adapter.

    Each tensor is in the file once, and no other tensor is.
    """
    model = trained(build("bert"), name="mine")
    save_adapter(model, tmp_path)
    names = keys(tmp_path)
    assert {
        "base_model.model.bert.encoder.layer.0.output.dense.compacter_down_W_left",
        "base_model.model.bert.encoder.layer.1.attention.output.dense.compacter_up_b",
        "base_model.model.compacter_shared_phm_rule",
        "base_model.model.bert.encoder.layer.0.output.LayerNorm.weight",
        "base_model.model.bert.embeddings.LayerNorm.bias",
        "base_model.model.classifier.weight",
    } <= names
    assert len(names) == len(list(ck.adapter_parameters(model, "mine")))
    assert sum("phm_rule" in key for key in names) == 1
    config = json.loads((tmp_path / files.CONFIG).read_text())
    assert config["peft_type"] == "COMPACTER" and config["model_type"] == "bert" and config["hidden_size"] == 32
    assert ck.CompacterConfig(**SMALL).to_dict().items() <= config.items()


def test_the_same_adapters_give_the_same_bytes(tmp_path: Path) -> None:
    model = trained(build("bert"))
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name)
    for file in (files.CONFIG, files.TENSORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def _bert(kind: str, **options: Any) -> nn.Module:
    config = transformers.BertConfig(**build("bert").config.to_diff_dict(), **options)
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("kind", ["BertModel", "BertForTokenClassification", "BertForMaskedLM"])
def test_another_class_of_the_family(kind: str, tmp_path: Path) -> None:
    """Without heads, the adapters of one class fit the others, in both directions."""
    options = {"num_labels": 7} if kind == "BertForTokenClassification" else {}
    source, target = trained(build("bert")), _bert(kind, **options)
    save_adapter(source, tmp_path / "there")
    with pytest.raises(ValueError, match="heads=False"):
        load_adapter(target, tmp_path / "there")
    own = {key: p.clone() for key, p in target.named_parameters()}
    load_adapter(target, tmp_path / "there", heads=False)
    base = target.base_model
    theirs = dict(source.bert.named_parameters())
    for key, parameter in base.named_parameters():
        if ".compacter." in f".{key}" and not key.startswith("compacter"):
            assert torch.equal(parameter, theirs[key]), key
    for key, parameter in target.named_parameters():
        if key.startswith(("classifier.compacter", "cls.")) and parameter.requires_grad:
            assert torch.equal(parameter, own[key.replace(".compacter.default", "")]), key

    save_adapter(target, tmp_path / "back")
    again = trained(build("bert"), seed=5)
    head = again.classifier.compacter["default"].weight.clone()
    load_adapter(again, tmp_path / "back", heads=False)
    assert torch.equal(again.classifier.compacter["default"].weight, head)
    assert torch.equal(again.compacter.shared["default"].phm_rule, source.compacter.shared["default"].phm_rule)


@pytest.mark.parametrize(
    ("options", "copied"),
    [
        ({}, ["classifier"]),
        ({"modules_to_save": []}, []),
        ({"modules_to_save": ["pooler.dense"]}, ["bert.pooler.dense", "classifier"]),
        ({"modules_to_save": ["pooler.dense", "classifier"]}, ["bert.pooler.dense", "classifier"]),
    ],
    ids=["default", "none", "of the base", "of both"],
)
def test_a_head_of_another_size(options: dict[str, Any], copied: list[str], tmp_path: Path) -> None:
    """heads=False leaves out the head of the file alone, and trains that of the model if any."""
    source = trained(build("bert"), **options, train_layer_norms=False)
    save_adapter(source, tmp_path)
    target = load_adapter(build("bert", num_labels=7), tmp_path, heads=False)
    names = [name.removesuffix(".compacter") for name, _ in target.named_modules() if name.endswith("compacter")]
    assert [name for name in names if name.endswith(("pooler.dense", "classifier"))] == copied
    for key, value in target.bert.state_dict().items():
        assert torch.equal(value, source.bert.state_dict()[key]), key


def test_a_base_model_loads_what_its_class_without_head_saved(tmp_path: Path) -> None:
    source = trained(_bert("BertModel"))
    save_adapter(source, tmp_path)
    target = load_adapter(_bert("BertModel"), tmp_path)
    assert torch.equal(output("bert", target), output("bert", source))


def test_t5_encoder_and_decoder_names_need_no_prefix(tmp_path: Path) -> None:
    save_adapter(trained(build("t5")), tmp_path)
    load_adapter(transformers.T5Model(build("t5").config), tmp_path)


def test_dtypes(tmp_path: Path) -> None:
    """The file has the dtypes of the saved adapters.

    Loaded values get the dtypes of the adapters in the model.
    """
    model = trained(build("bert").to(torch.bfloat16))
    save_adapter(model, tmp_path)
    saved = safetensors.load_file(tmp_path / files.TENSORS)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    wide = load_adapter(build("bert"), tmp_path)
    assert {p.dtype for _, p in ck.adapter_parameters(wide)} == {torch.float32}
    rule = wide.compacter.shared["default"].phm_rule
    assert torch.equal(rule, model.compacter.shared["default"].phm_rule.float())


def test_several_adapters(tmp_path: Path) -> None:
    model = trained(trained(build("bert"), name="a"), name="b", seed=1, phm_dim=2, ln_before=True)
    by_name = {}
    for name in ("a", "b"):
        ck.set_adapter(model, name)
        by_name[name] = output("bert", model)
        save_adapter(model, tmp_path / name)
    save_adapter(model, tmp_path / "a again", name="a")
    fresh = load_adapter(build("bert"), tmp_path / "b", name="one")
    load_adapter(fresh, tmp_path / "a again", name="two")
    assert torch.equal(output("bert", fresh), by_name["a"])
    ck.set_adapter(fresh, "one")
    assert torch.equal(output("bert", fresh), by_name["b"])
    with pytest.raises(ValueError, match="phm_dim is 2 in the model, 4 in the file"):
        load_adapter(fresh, tmp_path / "a", name="one")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # in torch.compile
def test_wrapped_models(tmp_path: Path) -> None:
    """The names in the file are the same if the model or its layers are compiled."""
    model = trained(build("bert"))
    save_adapter(model, tmp_path / "plain")
    save_adapter(torch.compile(model), tmp_path / "compiled")
    compiled = torch.compile(build("bert"))
    assert load_adapter(compiled, tmp_path / "plain") is compiled
    assert torch.equal(output("bert", compiled._orig_mod), output("bert", model))
    layers = model.bert.encoder.layer
    layers[0] = torch.compile(layers[0])
    save_adapter(model, tmp_path / "layers")
    load_adapter(model, tmp_path / "plain")
    expected = (tmp_path / "plain" / files.TENSORS).read_bytes()
    assert all((tmp_path / name / files.TENSORS).read_bytes() == expected for name in ("compiled", "layers"))


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    save_adapter(trained(build("bert")), tmp_path)
    model = load_adapter(build("bert"), tmp_path)
    output("bert", model).square().sum().backward()
    assert all(p.grad is not None for _, p in ck.adapter_parameters(model))


def test_buffers_of_a_trained_module_are_saved(tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.body(x))

    config = ck.CompacterConfig(reduction_factor=2, target_modules=["body"], modules_to_save=["norm"])
    source, target = (ck.inject(Head(), config) for _ in range(2))
    source(torch.randn(9, 8) + 3)
    save_adapter(source, tmp_path)
    load_adapter(target, tmp_path)
    ours, theirs = (model.norm.compacter["default"] for model in (source, target))
    assert torch.equal(ours.running_mean, theirs.running_mean) and theirs.num_batches_tracked == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_files_have_the_permissions_of_other_new_files(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    save_adapter(trained(build("bert")), tmp_path / "it")
    assert {path.stat().st_mode for path in (tmp_path / "it").iterdir()} == {(tmp_path / "usual").stat().st_mode}


def test_a_config_that_is_changed_after_inject(tmp_path: Path) -> None:
    config = ck.CompacterConfig(**SMALL, leave_out=[])
    model = ck.inject(build("bert"), config)
    config.reduction_factor = 8
    save_adapter(model, tmp_path)
    assert torch.equal(output("bert", load_adapter(build("bert"), tmp_path)), output("bert", model))


def test_a_save_by_another_process_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = trained(build("bert")), trained(build("bert"), seed=1)
    save_adapter(before, tmp_path)
    check, saves = files.check_digest, iter([after])

    def check_late(path: Path, expected: object) -> None:
        for model in saves:
            save_adapter(model, tmp_path)
        check(path, expected)

    monkeypatch.setattr(files, "check_digest", check_late)
    assert torch.equal(output("bert", load_adapter(build("bert"), tmp_path)), output("bert", after))


def test_a_system_that_flushes_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows opens no folder, and flushes only a file that is open to write."""
    to_write: set[int] = set()

    def open_there(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        handle = os.open(path, flags, *rest, **options)
        (to_write.add if flags & os.O_RDWR else to_write.discard)(handle)
        return handle

    def flush_there(handle: int) -> None:
        if handle not in to_write:
            raise OSError(9, "Bad file descriptor")
        os.fsync(handle)

    model = trained(build("bert"))
    with monkeypatch.context() as there:
        there.setattr(files, "os", SimpleNamespace(**{**vars(os), "open": open_there, "fsync": flush_there}))
        for _ in range(2):  # a new folder, and one that is there
            save_adapter(model, tmp_path / "it")
    assert torch.equal(output("bert", load_adapter(build("bert"), tmp_path / "it")), output("bert", model))


def test_other_files_in_the_folder_survive(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    for seed in (0, 1):
        model = trained(build("bert"), seed=seed)
        save_adapter(model, tmp_path)
        assert torch.equal(output("bert", load_adapter(build("bert"), tmp_path)), output("bert", model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", files.CONFIG, files.TENSORS]
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.failure("the disk is full during a save")
def test_a_save_that_fails_leaves_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = trained(build("bert"))
    save_adapter(old, tmp_path / "adapter")
    monkeypatch.setattr(files, "_flush", lambda path: (_ for _ in ()).throw(OSError("no space left")))
    for folder in ("adapter", "new"):
        with pytest.raises(OSError, match="no space left"):
            save_adapter(trained(build("bert"), seed=1), tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert torch.equal(output("bert", load_adapter(build("bert"), tmp_path / "adapter")), output("bert", old))


@pytest.mark.failure("the process is killed (kill -9) during a save")
def test_a_save_cut_between_the_two_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(trained(build("bert")), tmp_path)
    replace = os.replace

    def only_tensors(source: Path, target: Path) -> None:
        if target.name == files.CONFIG:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", only_tensors)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(trained(build("bert"), seed=1), tmp_path)
    with pytest.raises(ValueError, match="a save was interrupted"):
        load_adapter(build("bert"), tmp_path)


def test_a_cache_of_the_hub(tmp_path: Path) -> None:
    """The folder snapshots/<revision>/ has links into blobs. An id loads it without a network."""
    pytest.importorskip("huggingface_hub")
    model = trained(build("bert"))
    save_adapter(model, tmp_path / "saved")
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--adapter"
    snapshot = repo / "snapshots" / revision
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    for file in (files.CONFIG, files.TENSORS):
        (tmp_path / "saved" / file).rename(repo / "blobs" / file)
        (snapshot / file).symlink_to(Path("../../blobs", file))
    for options in ({}, {"revision": revision}):
        loaded = load_adapter(
            build("bert"), "someone/adapter", cache_dir=tmp_path / "hub", local_files_only=True, **options
        )
        assert torch.equal(output("bert", loaded), output("bert", model))
    assert torch.equal(output("bert", load_adapter(build("bert"), snapshot)), output("bert", model))
    with pytest.raises(FileNotFoundError, match="the hub gave none"):
        load_adapter(build("bert"), "someone/else", cache_dir=tmp_path / "hub", local_files_only=True)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no Compacter adapters"):
        save_adapter(build("bert"), tmp_path / "x")
    model = trained(build("bert"))
    with pytest.raises(ValueError, match="no adapters of the name 'other'; it has default"):
        save_adapter(model, tmp_path / "x", name="other")
    with ck.disable_adapters(model), pytest.raises(ValueError, match="no adapters are active; give name=, of default"):
        save_adapter(model, tmp_path / "x")
    with pytest.raises(ValueError, match="on meta"):
        save_adapter(trained(build("bert")).to("meta"), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file; give a folder"):
        save_adapter(model, tmp_path / "file")


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(build("bert"))
    save_adapter(model, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_adapter(model, tmp_path / "b")
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_adapter(build("bert"), tmp_path / "a")
    assert not (tmp_path / "b").exists()
