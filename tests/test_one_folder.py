"""A folder of adapters is the same for `load_adapter` and for peft, and version 1 is still read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from families import FAMILIES, build, output
from torch import Tensor, nn

import compacter_kernels as ck
import compacter_kernels.peft as ckp
from compacter_kernels.checkpoints import files

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "without shared weights": {"shared_phm_rule": False},
    "all shared, rules in factors": {"shared_W_phm": True, "factorized_phm_rule": True, "phm_rank": 2},
    "W whole, no bias": {"factorized_phm_W": False, "phm_bias": False},
    "norms and scale": {"ln_before": True, "ln_after": True, "scaling": "learned"},
    "parallel": {"is_parallel": True},
    "some layers": {"leave_out": (0,), "reduction_factor": {"1": 2}},
    "no copies": {"train_layer_norms": False, "modules_to_save": ()},
}


def random_values(model: nn.Module) -> nn.Module:
    """Give what trains other values than those of a new model."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model.eval()


def by_inject(model: nn.Module, **options: Any) -> nn.Module:
    return random_values(ck.inject(model, ck.CompacterConfig(**{"reduction_factor": 4, **options})))


def by_peft(model: nn.Module, **options: Any) -> nn.Module:
    return random_values(peft.get_peft_model(model, ckp.CompacterConfig(**{"reduction_factor": 4, **options})))


def content(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / files.CONFIG).read_text()), safetensors.torch.load_file(folder / files.TENSORS)


def both_ways(kind: str, tmp_path: Path, **options: Any) -> None:
    """Each side reads what the other saved, and saves the same tensors and options again."""
    injected = by_inject(build(kind), **options)
    ck.save_adapter(injected, tmp_path / "a")
    wrapped = peft.PeftModel.from_pretrained(build(kind), tmp_path / "a").eval()
    assert torch.equal(output(kind, wrapped.get_base_model()), output(kind, injected))
    wrapped.save_pretrained(tmp_path / "b")
    again = ck.load_adapter(build(kind), tmp_path / "b")
    assert torch.equal(output(kind, again), output(kind, injected))
    (ours, tensors), (theirs, copies) = content(tmp_path / "a"), content(tmp_path / "b")
    assert tensors.keys() == copies.keys()
    assert all(torch.equal(tensor, copies[key]) for key, tensor in tensors.items())
    same = set(ck.CompacterConfig().to_dict()) - {"modules_to_save"}
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], tmp_path: Path) -> None:
    both_ways("bert", tmp_path, **options)


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"bert"}))
def test_families(kind: str, tmp_path: Path) -> None:
    both_ways(kind, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*layer\.1\..*output\.dense"},
        {"target_modules": ["output.dense"], "exclude_modules": ["attention.output.dense"]},
        {"exclude_modules": r".*attention.*"},
        {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]},
        {"modules_to_save": ["ooler", "no_such_module"], "train_layer_norms": False},
    ],
    ids=["regular expression", "excluded", "excluded from the table", "task", "part of a word"],
)
def test_what_only_peft_can_say(options: dict[str, Any], tmp_path: Path) -> None:
    """`load_adapter` and `convert` read what peft's own ways to name modules have chosen."""
    wrapped = by_peft(build("bert"), **options)
    expected = output("bert", wrapped.get_base_model())
    wrapped.save_pretrained(tmp_path / "a")
    loaded = ck.load_adapter(build("bert"), tmp_path / "a")
    assert torch.equal(output("bert", loaded), expected)
    ck.save_adapter(loaded, tmp_path / "b")
    assert torch.equal(output("bert", ck.load_adapter(build("bert"), tmp_path / "b")), expected)
    assert ck.convert(tmp_path / "a", "compacter-kernels").tensors.keys() == content(tmp_path / "a")[1].keys()


def test_another_class_of_the_family(tmp_path: Path) -> None:
    """What peft trained in a class with a head fits the base, and the other way round."""
    wrapped = by_peft(build("bert"), task_type="SEQ_CLS")
    wrapped.save_pretrained(tmp_path / "a")
    base = transformers.BertModel(build("bert").config).eval()
    base.load_state_dict(build("bert").bert.state_dict())
    ck.load_adapter(base, tmp_path / "a", heads=False)
    ids = torch.arange(12).view(2, 6)
    hidden = wrapped.get_base_model().bert(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, hidden)
    ck.save_adapter(base, tmp_path / "b")
    model = ck.load_adapter(build("bert"), tmp_path / "b", heads=False)
    assert torch.equal(model.bert(ids).last_hidden_state, hidden)


def test_convert_gives_what_both_read(tmp_path: Path) -> None:
    injected = by_inject(build("bert"))
    ck.convert(injected, "adapters", tmp_path / "a", allow_loss=True)
    ck.convert(tmp_path / "a", "compacter-kernels", tmp_path / "b")
    wrapped = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "b").eval()
    loaded = ck.load_adapter(build("bert"), tmp_path / "b")
    assert torch.equal(output("bert", wrapped.get_base_model()), output("bert", loaded))
    _, tensors = content(tmp_path / "b")
    assert "base_model.model.bert.encoder.layer.0.output.dense.compacter_down_W_left" in tensors


def test_several_in_one_model_from_both(tmp_path: Path) -> None:
    """Adapters of one name change nothing in those of another, whoever wrote them."""
    first, second = by_inject(build("bert")), by_peft(build("bert"), shared_phm_rule=False, mh_adapter=False)
    ck.save_adapter(first, tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    model = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "a", adapter_name="first").eval()
    model.load_adapter(tmp_path / "b", "second")
    for name, alone in (("second", second.get_base_model()), ("first", first)):
        model.set_adapter(name)
        assert torch.equal(output("bert", model.get_base_model()), output("bert", alone))


def as_version_1(folder: Path, rename: Callable[[str], str]) -> None:
    """Rewrite a folder as version 1 of the format had it."""
    config, tensors = content(folder)
    safetensors.torch.save_file({rename(key): t for key, t in tensors.items()}, folder / files.TENSORS)
    config = {key: value for key, value in config.items() if key != files.DIGEST}
    (folder / files.CONFIG).write_text(json.dumps({**config, "format_version": 1}))


def name_of_version_1(key: str) -> str:
    key = key.removeprefix("base_model.model.").removeprefix("bert.")
    module, _, last = key.rpartition(".")
    if last.startswith("compacter_shared_"):
        return last.replace("compacter_shared_", "compacter.shared.")
    if not last.startswith("compacter_"):
        return f"{module}.compacter.{last}"
    name = last.removeprefix("compacter_")
    for part in ("down", "up", "norm_before", "norm_after"):
        name = name.replace(f"{part}_", f"{part}.", 1) if name.startswith(f"{part}_") else name
    return f"{module}.compacter.{name}"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_version_1_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    model = by_inject(build("bert"), **options)
    ck.save_adapter(model, tmp_path / "a")
    tensors = content(tmp_path / "a")[1]
    as_version_1(tmp_path / "a", name_of_version_1)
    assert content(tmp_path / "a")[1].keys().isdisjoint(tensors)
    assert torch.equal(output("bert", ck.load_adapter(build("bert"), tmp_path / "a")), output("bert", model))
    with pytest.raises(ValueError, match="format_version 1, and peft reads version 2"):
        peft.PeftModel.from_pretrained(build("bert"), tmp_path / "a")
    ck.convert(tmp_path / "a", "compacter-kernels", tmp_path / "b")
    assert content(tmp_path / "b")[1].keys() == tensors.keys()
    wrapped = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "b").eval()
    assert torch.equal(output("bert", wrapped.get_base_model()), output("bert", model))


def test_tensors_of_other_adapters_are_left_out(tmp_path: Path) -> None:
    """peft before 0.20 writes them into the same file."""
    model = by_inject(build("bert"))
    ck.save_adapter(model, tmp_path / "a")
    config, tensors = content(tmp_path / "a")
    others = {f"{key}.other": t + 1 for key, t in tensors.items() if ".compacter_" in key}
    safetensors.torch.save_file({**tensors, **others}, tmp_path / "a" / files.TENSORS)
    (tmp_path / "a" / files.CONFIG).write_text(json.dumps({**config, files.DIGEST: None}))
    assert torch.equal(output("bert", ck.load_adapter(build("bert"), tmp_path / "a")), output("bert", model))
    assert ck.convert(tmp_path / "a", "peft").tensors.keys() == tensors.keys()


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    ck.save_adapter(by_inject(build("bert")), tmp_path)
    config = json.loads((tmp_path / files.CONFIG).read_text())
    (tmp_path / files.CONFIG).write_text(json.dumps({**config, "format_version": 3}))
    for load in (ck.load_adapter, peft.PeftModel.from_pretrained):
        with pytest.raises(ValueError, match="format_version 3"):
            load(build("bert"), tmp_path)
