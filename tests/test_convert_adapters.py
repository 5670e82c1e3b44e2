"""Conversion from and into the `adapters` library: converted adapters compute the same there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs, output
from test_save_load import trained
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.checkpoints.checkpoint import MissingRuleError
from compacter_kernels.checkpoints.convert import convert
from compacter_kernels.load import load_adapter
from compacter_kernels.save import save_adapter

adapters = pytest.importorskip("adapters")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "t5", "bart", "mbart", "llama", "mistral", "vit", "whisper")


@pytest.fixture(autouse=True)
def nondeterministic_operators() -> None:
    """Allow operators of the other library that would warn."""
    torch.use_deterministic_algorithms(False)


def theirs(family: str, steps: int = 3, **options: Any) -> nn.Module:
    """A model of `adapters` whose Compacter was trained for a few steps."""
    model = build(family)
    adapters.init(model)
    model.add_adapter("task", config=adapters.CompacterConfig(**{"reduction_factor": 4, **options}))
    model.train_adapter("task")
    model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "phm_rule" in name or "W_" in name:
                parameter.normal_(0.0, 0.5)
    model.set_active_adapters("task")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        output(family, model).square().mean().backward()
        optimizer.step()
    return model


def save(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    model.save_adapter(str(folder), "task", use_safetensors=True)
    return folder


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_model(family: str, tmp_path: Path) -> None:
    model = theirs(family, cross_adapter=family != "gpt2")
    expected = output(family, model)
    convert(model, "compacter-kernels", tmp_path / "ours")
    plain = build(family)
    assert (output(family, plain) - expected).abs().max() > 1e-3
    close(output(family, load_adapter(plain, tmp_path / "ours")), expected)
    folder = save(model, tmp_path / "saved")
    if any("phm_rule" in key for key in safetensors.load_file(folder / "adapter.safetensors")):
        convert(folder, "compacter-kernels", tmp_path / "again")
        close(output(family, load_adapter(build(family), tmp_path / "again")), expected)
    else:
        assert family in ("roberta", "distilbert", "t5")


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str, tmp_path: Path) -> None:
    """Our folder is converted into that of `adapters`, which load_adapter of the library loads."""
    model = trained(build(family), cross_adapter=family != "gpt2", train_layer_norms=False, non_linearity="silu")
    save_adapter(model, tmp_path / "ours")
    convert(tmp_path / "ours", "adapters", tmp_path / "theirs", name="task")
    again = build(family)
    adapters.init(again)
    again.load_adapter(str(tmp_path / "theirs"), set_active=True, use_safetensors=True)
    close(output(family, again.eval()), output(family, model))


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "gelu_new, rank 2": {"non_linearity": "gelu_new", "phm_rank": 2, "phm_dim": 2},
    "factorised rule": {"factorized_phm_rule": True},
    "a rule each": {"shared_phm_rule": False},
    "shared W": {"shared_W_phm": True},
    "unfactorised W": {"factorized_phm_W": False},
    "no bias, learned scale": {"phm_bias": False, "scaling": "learned"},
    "scale": {"scaling": 0.5, "dropout": 0.1},
    "norm after": {"ln_after": True},
    "norms, residual before": {"ln_before": True, "ln_after": True, "adapter_residual_before_ln": True},
    "by layer": {"reduction_factor": {"0": 2, "default": 8}},
    "left out": {"leave_out": [1]},
    "feed-forward only": {"mh_adapter": False},
    "fixed rule": {"learn_phm": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_options(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The files of `adapters` are converted into ours and back again.

    The model is converted if its files are incomplete.
    """
    model = theirs(family, **options)
    expected = output(family, model)
    source: Any = model
    if family == "bert" and not options.get("ln_before"):  # `adapters` cannot save these as safetensors
        source = save(model, tmp_path / "saved")
    convert(source, "compacter-kernels", tmp_path / "ours")
    plain = load_adapter(build(family), tmp_path / "ours")
    close(output(family, plain), expected)
    config = plain.compacter.configs["default"]
    assert all(getattr(config, key) == value for key, value in options.items() if key not in ("leave_out", "scaling"))

    convert(tmp_path / "ours", "adapters", tmp_path / "theirs", target_name="again")
    back = build(family)
    adapters.init(back)
    back.load_adapter(str(tmp_path / "theirs"), set_active=True, use_safetensors=True)
    close(output(family, back.eval()), expected)


@pytest.mark.parametrize("family", ["bert", "distilbert", "bart"])
def test_parallel_of_a_model_with_norms_after(family: str, tmp_path: Path) -> None:
    model = build(family)
    adapters.init(model)
    config = adapters.ParBnConfig(
        phm_layer=True, reduction_factor=4, mh_adapter=True, init_weights="bert", ln_after=True
    )
    model.add_adapter("task", config=config)
    model.set_active_adapters("task")
    for name, parameter in model.named_parameters():
        if "adapters.task" in name or "phm_rule" in name:
            torch.nn.init.normal_(parameter, 0.1, 0.5)
    convert(model.eval(), "compacter-kernels", tmp_path / "ours")
    ours = load_adapter(build(family), tmp_path / "ours")
    close(output(family, ours), output(family, model))
    convert(ours, "adapters", tmp_path / "theirs", target_name="again")
    back = build(family)
    adapters.init(back)
    back.load_adapter(str(tmp_path / "theirs"), set_active=True, use_safetensors=True)
    close(output(family, back.eval()), output(family, model))


def test_layer_norms_are_a_loss(tmp_path: Path) -> None:
    model = trained(build("bert"))
    with pytest.raises(ValueError, match=r"cannot hold \d+ trained layer norm weights, .*allow_loss=True"):
        convert(model, "adapters", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    converted = convert(model, "adapters", tmp_path / "theirs", allow_loss=True)
    assert len(converted.losses) == 1 and "layer norm" in converted.losses[0]
    assert not any("LayerNorm" in key for key in converted.tensors)


@pytest.mark.parametrize("family", ["t5", "roberta"])
def test_a_file_without_its_rule_is_told_and_repaired(family: str, tmp_path: Path) -> None:
    """adapters 1.3.0 does not save the rule of a T5, nor of a model without a head."""
    model = theirs(family)
    expected = output(family, model)
    folder = save(model, tmp_path / "saved")
    assert not any("phm_rule" in key for key in safetensors.load_file(folder / "adapter.safetensors"))
    with pytest.raises(MissingRuleError, match="lacks phm_rule, which its adapters share"):
        convert(folder, "compacter-kernels", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    rule = model.base_model.shared_parameters["task"]["phm_rule"].detach()
    safetensors.save_file({"some.phm_rule": rule.clone()}, tmp_path / "rule.safetensors")
    for number, given in enumerate((rule, tmp_path / "rule.safetensors", {"phm_rule": rule})):
        convert(folder, "compacter-kernels", tmp_path / f"ours{number}", phm_rule=given)
        close(output(family, load_adapter(build(family), tmp_path / f"ours{number}")), expected)
    convert(folder, "adapters", tmp_path / "repaired", phm_rule=rule, name="task")
    again = build(family)
    adapters.init(again)
    again.load_adapter(str(tmp_path / "repaired"), set_active=True, use_safetensors=True)
    close(output(family, again.eval()), expected)
    with pytest.raises(ValueError, match=r"phm_rule of .* has shape \(2, 2, 2\)"):
        convert(folder, "adapters", phm_rule=torch.zeros(2, 2, 2))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gating": ({"use_gating": True}, "use_gating=True"),
    "stochastic depth": ({"stochastic_depth": 0.1}, "stochastic_depth=0.1"),
    "channel": ({"scaling": "channel"}, "scaling='channel'"),
    "invertible": ({"inv_adapter": "nice"}, "inv_adapter='nice'"),
    "no norm after": ({"original_ln_after": False}, "original_ln_after=False"),
    "residual": ({"residual_before_ln": "post_add"}, "residual_before_ln='post_add'"),
    "plain": ({"phm_layer": False}, r"down\.W_left of .* is one more than the options ask for"),
    "activation": ({"non_linearity": "gelu_10"}, "'gelu_10' is not known"),
    "lora": ({"architecture": "lora"}, "architecture='lora' is another method"),
    "factor": ({"reduction_factor": 8}, "reduction_factor=8 does not make 8 of 32"),
    "rank": ({"phm_rank": 3}, r"has shape \(4, 8, 1\), and must have \(4, 8, 3\)"),
    "bias": ({"phm_bias": False}, "down.b of .* is one more than the options ask for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_ours_cannot_compute_is_refused(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    folder = save(theirs("bert", steps=0), tmp_path / "saved")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["config"].update(options)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        convert(folder, "compacter-kernels", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_their_plus_plus(family: str, tmp_path: Path) -> None:
    """The library's adapter reads the block's output plus the residual, as the paper's do not."""
    model = theirs(family, mh_adapter=False, original_ln_before=True)
    expected = output(family, model)
    convert(model, "compacter-kernels", tmp_path / "ours")
    plain = load_adapter(build(family), tmp_path / "ours")
    close(output(family, plain), expected)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    (tmp_path / "ours" / "adapter_config.json").write_text(json.dumps({**config, "original_ln_before": False}))
    assert (output(family, load_adapter(build(family), tmp_path / "ours")) - expected).abs().max() > 1e-4


def test_targets_that_adapters_does_not_have(tmp_path: Path) -> None:
    model = trained(build("gpt2"), cross_adapter=True, train_layer_norms=False)
    with pytest.raises(ValueError, match=r"cannot put an adapter after h\.0\.crossattention\.c_proj"):
        convert(model, "adapters", tmp_path / "theirs")
    model = trained(build("bert"), target_modules=["layer.1.output.dense"], train_layer_norms=False)
    with pytest.raises(ValueError, match="no way to put adapters after these modules alone"):
        convert(model, "adapters", tmp_path / "theirs")


def test_parallel_of_a_model_with_norms_first(tmp_path: Path) -> None:
    model = trained(build("t5"), is_parallel=True, train_layer_norms=False)
    with pytest.raises(ValueError, match="is_parallel=True of a t5 cannot be converted"):
        convert(model, "adapters", tmp_path / "theirs")


def test_names(tmp_path: Path) -> None:
    model = theirs("bert")
    model.add_adapter("other", config=adapters.CompacterConfig(reduction_factor=8))
    with pytest.raises(ValueError, match="adapters of 2 names; give name=, one of task, other"):
        convert(model, "compacter-kernels")
    with pytest.raises(ValueError, match="no adapters of the name 'third'"):
        convert(model, "compacter-kernels", name="third")
    assert convert(model, "compacter-kernels", name="other").config["reduction_factor"] == 8
    expected = output("bert", model)
    convert(model, "compacter-kernels", tmp_path / "task", name="task")
    close(output("bert", load_adapter(build("bert"), tmp_path / "task")), expected)


def test_a_prediction_head_of_theirs_is_a_loss(tmp_path: Path) -> None:
    base = build("bert")
    model = adapters.BertAdapterModel(base.config)
    model.bert.load_state_dict(base.bert.state_dict(), strict=False)
    model.add_adapter("task", config=adapters.CompacterConfig(reduction_factor=4))
    model.add_classification_head("task", num_labels=2)
    model.set_active_adapters("task")
    for name, parameter in model.named_parameters():
        if ".adapters." in name or "phm_rule" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.5)
    for number, source in enumerate((model.eval(), save(model, tmp_path / "saved"))):
        with pytest.raises(ValueError, match="cannot hold prediction heads of `adapters` itself"):
            convert(source, "compacter-kernels")
        convert(source, "compacter-kernels", tmp_path / f"{number}", allow_loss=True)
        plain = load_adapter(build("bert"), tmp_path / f"{number}", heads=False).bert
        close(plain(**inputs("bert"))[0], model.bert(**inputs("bert"))[0])


def test_old_files_call_gelu_new_gelu(tmp_path: Path) -> None:
    folder = save(theirs("bert", steps=0), tmp_path / "saved")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert convert(folder, "compacter-kernels").config["non_linearity"] == "gelu"
    del config["version"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert convert(folder, "compacter-kernels").config["non_linearity"] == "gelu_new"


@pytest.mark.parametrize("stale", ["pytorch_adapter.bin", "model_head.safetensors"])
def test_a_stale_file_beside_the_target_is_refused(stale: str, tmp_path: Path) -> None:
    (tmp_path / stale).write_bytes(b"")
    model = trained(build("bert"), train_layer_norms=False, modules_to_save=())
    with pytest.raises(ValueError, match=f"{stale} is there, which `adapters` may read instead"):
        convert(model, "adapters", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [stale]


def test_the_model_is_as_it_was() -> None:
    model = theirs("bert")
    before = copy.deepcopy(model.state_dict())
    convert(model, "compacter-kernels")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert inputs("bert").keys() == {"input_ids"} and ck.available_impls()


WRONG_VALUES = (None, [], {}, "x", -1, 0, 1e308, True, [None], {"0": -1}, 2**70)


@pytest.mark.parametrize("where", ["outside", "options"])
def test_any_wrong_value_in_a_config(where: str, tmp_path: Path) -> None:
    """Each value is converted or refused by a ValueError, never by another error."""
    folder = save(theirs("bert", steps=0), tmp_path / "saved")
    original = (folder / "adapter_config.json").read_text()
    content = json.loads(original)
    refused = 0
    for option in content["config"] if where == "options" else content:
        for value in WRONG_VALUES:
            changed = json.loads(original)
            (changed["config"] if where == "options" else changed)[option] = value
            (folder / "adapter_config.json").write_text(json.dumps(changed))
            try:
                convert(folder, "compacter-kernels")
            except ValueError:
                refused += 1
    assert refused > 20
