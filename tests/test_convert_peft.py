"""From `adapters` to peft: heads, what the hub leaves in its cache, and what cannot move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, output
from test_cli import run
from test_leaving_adapters import base_of, batch_of, theirs
from torch import nn

import compacter_kernels as ck

adapters = pytest.importorskip("adapters")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
ckp = pytest.importorskip("compacter_kernels.peft")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SEQ_BN = adapters.SeqBnConfig(reduction_factor=4)
PLUS_PLUS = adapters.CompacterPlusPlusConfig(reduction_factor=4)


@pytest.fixture(autouse=True)
def nondeterministic_operators() -> None:
    """Allow operators of the other library that would warn."""
    torch.use_deterministic_algorithms(False)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def save(model: nn.Module, folder: Path, safe: bool = True) -> Path:
    model.save_adapter(str(folder), "task", use_safetensors=safe)
    return folder


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    model: nn.Module = peft.PeftModel.from_pretrained(base, folder)
    return model.eval()


ONE: dict[str, Any] = {"layers": 1, "activation_function": None}
HEADS: dict[str, tuple[str, str, str, dict[str, Any]]] = {  # family, kind, class of transformers, options
    "bert": ("bert", "classification", "BertForSequenceClassification", {**ONE, "use_pooler": True}),
    "bert, tokens": ("bert", "tagging", "BertForTokenClassification", {}),
    "bert, answers": ("bert", "qa", "BertForQuestionAnswering", {}),
    "roberta": ("roberta", "classification", "RobertaForSequenceClassification", {}),
    "distilbert": (
        "distilbert",
        "classification",
        "DistilBertForSequenceClassification",
        {"activation_function": "relu"},
    ),
    "bart": ("bart", "classification", "BartForSequenceClassification", {}),
    "t5": ("t5", "classification", "T5ForSequenceClassification", {}),
    "gpt2": ("gpt2", "tagging", "GPT2ForTokenClassification", {}),
    "vit": ("vit", "image_classification", "ViTForImageClassification", ONE),
}


def with_flexible_head(family: str, kind: str, base: nn.Module, options: dict[str, Any]) -> nn.Module:
    """A model of `adapters` with the weights of this base, an adapter and a head of the library."""
    prefix = FAMILIES[family][0].removesuffix("Config")
    model = getattr(adapters, f"{prefix}AdapterModel")(base.config)
    model.base_model.load_state_dict(base.base_model.state_dict(), strict=False)
    model.add_adapter("task", config=SEQ_BN)
    getattr(model, f"add_{kind}_head")("task", num_labels=2, **options)
    model.set_active_adapters("task")
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if ".adapters.task." in key or key.startswith("heads."):
            nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


def base_with_head(family: str, class_name: str) -> nn.Module:
    options = {**FAMILIES[family][1], "num_labels": 2}
    options |= {"add_cross_attention": False} if family == "gpt2" else {}
    torch.manual_seed(0)
    config = getattr(transformers, FAMILIES[family][0])(**options)
    model: nn.Module = getattr(transformers, class_name)(config)
    return model.eval()


@pytest.mark.parametrize("case", HEADS)
def test_a_head_of_adapters_becomes_that_of_a_class(case: str, tmp_path: Path) -> None:
    family, kind, class_name, options = HEADS[case]
    base = base_with_head(family, class_name)
    model = with_flexible_head(family, kind, base, options)
    batch = batch_of("bart" if family == "t5" else family)
    expected = model(**batch)[0]
    for number, source in enumerate((model, save(model, tmp_path / "saved"))):
        converted = ck.convert(source, "peft", tmp_path / f"{number}")
        assert not converted.losses and any("AutoModelFor" in note for note in converted.notes)
        ours = in_peft(base_with_head(family, class_name), tmp_path / f"{number}")
        close(ours(**batch)[0], expected)


def test_a_head_of_another_adapter_stays(tmp_path: Path) -> None:
    base = base_with_head("bert", "BertForSequenceClassification")
    model = with_flexible_head("bert", "classification", base, {**ONE, "use_pooler": True})
    expected = model(**batch_of("bert"))[0]
    model.add_adapter("other", config=SEQ_BN)
    model.add_classification_head("other", num_labels=7)
    model.active_head = "task"
    ck.convert(model, "peft", tmp_path / "moved", name="task")
    close(in_peft(base, tmp_path / "moved")(**batch_of("bert"))[0], expected)
    model.add_classification_head("third", num_labels=7)
    with pytest.raises(ValueError, match=r"cannot hold prediction heads of `adapters` .*: third, class"):
        ck.convert(model, "peft", name="task")


def test_a_factor_above_the_hidden_size(tmp_path: Path) -> None:
    """There `adapters` makes a bottleneck of one number."""
    for factor in (100, {"0": 2, "default": 64.0}):
        model = theirs(base_of("bert"), adapters.SeqBnConfig(reduction_factor=factor))
        ck.convert(model, "peft", tmp_path / "moved")
        close(in_peft(base_of("bert"), tmp_path / "moved")(**batch_of("bert"))[0], model(**batch_of("bert"))[0])


def test_a_class_without_a_head_loads_what_one_with_a_head_trained(tmp_path: Path) -> None:
    model = theirs(base_of("bert"), SEQ_BN)
    ck.convert(model, "peft", tmp_path)
    bare = in_peft(base_of("bert").bert, tmp_path)
    batch = batch_of("bert")
    close(bare(**batch)[0], model.bert(**batch)[0])


def test_a_head_of_another_structure_is_a_loss(tmp_path: Path) -> None:
    base = base_with_head("bert", "BertForSequenceClassification")
    model = with_flexible_head("bert", "classification", base, {})
    message = (
        r"prediction heads of `adapters` itself, .*: task, classification with layers=2, activation_function='tanh'"
    )
    for source in (model, save(model, tmp_path / "saved")):
        with pytest.raises(ValueError, match=message):
            ck.convert(source, "peft", tmp_path / "moved")
        assert not (tmp_path / "moved").exists()
    ck.convert(model, "peft", tmp_path / "moved", allow_loss=True)
    moved = in_peft(base, tmp_path / "moved")
    batch = batch_of("bert")
    close(moved.get_base_model().bert(**batch)[0], model.bert(**batch)[0])


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = theirs(base_of("bert"), SEQ_BN)
    expected = model(**batch_of("bert"))[0]
    source, moved = str(save(model, tmp_path / "saved")), str(tmp_path / "moved")
    code, out, _ = run(capsys, "convert", source, "--json")
    report = json.loads(out)
    assert code == 0 and report["adapters"] == 2 and report["options"]["original_ln_before"]
    code, out, _ = run(capsys, "convert", source, "--to", "peft", "--out", moved, "--json")
    assert code == 0 and json.loads(out)["losses"] == []
    close(in_peft(base_of("bert"), Path(moved))(**batch_of("bert"))[0], expected)
    config = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
    assert config["peft_type"] == "BOTTLENECK" and config["modules_to_save"] == ["classifier"]
    code, out, _ = run(capsys, "convert", moved, "--json")
    assert code == 0 and json.loads(out)["source_format"] == "peft"


@pytest.mark.parametrize("config", [SEQ_BN, adapters.ParBnConfig(), PLUS_PLUS])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_what_peft_trained_goes_back_to_adapters(family: str, config: Any, tmp_path: Path) -> None:
    ck.convert(theirs(base_of(family), config), "peft", tmp_path / "moved")
    model = peft.PeftModel.from_pretrained(base_of(family), tmp_path / "moved", is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    model.save_pretrained(tmp_path / "trained")
    ck.convert(tmp_path / "trained", "adapters", tmp_path / "back", target_name="task")
    again = base_of(family)
    adapters.init(again)
    again.load_adapter(str(tmp_path / "back"), set_active=True, use_safetensors=True)
    again.classifier.load_state_dict(model.get_base_model().classifier.modules_to_save["default"].state_dict())
    close(again.eval()(**batch_of(family))[0], model.eval()(**batch_of(family))[0])


@pytest.fixture
def in_hub_cache(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """What a download of the hub leaves: a snapshot with pickles; and what the adapter computes."""
    model = theirs(base_of("bert"), SEQ_BN)
    folder = tmp_path / "models--AdapterHub--task"
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    save(model, snapshot, safe=False)
    assert (snapshot / "pytorch_adapter.bin").is_file() and (snapshot / "pytorch_model_head.bin").is_file()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    return folder, model(**batch_of("bert"))[0]


def test_the_cache_of_the_hub(
    capsys: pytest.CaptureFixture[str], in_hub_cache: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder, expected = in_hub_cache
    with pytest.raises(ValueError, match=r"is a pickle, which can run code.*allow_pickle=True or --allow-pickle"):
        ck.convert(folder, "peft", tmp_path / "moved")
    (folder / "snapshots" / "older").mkdir()
    arguments = ("convert", str(folder), "--to", "peft", "--out", str(tmp_path / "moved"), "--allow-pickle")
    assert run(capsys, *arguments)[0] == 0
    close(in_peft(base_of("bert"), tmp_path / "moved")(**batch_of("bert"))[0], expected)
    (folder / "refs" / "main").unlink()
    with pytest.raises(ValueError, match="has the snapshots 0123abcd, older; give the folder of one"):
        ck.convert(folder, "peft", allow_pickle=True)


class Harmful:
    """A pickle of this runs code when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("harmful",)


@pytest.mark.parametrize("content", [Harmful(), [torch.ones(1)], {1: torch.ones(1)}, {"a": {"b": torch.ones(1)}}])
def test_pickles_of_anything_else(
    content: Any, in_hub_cache: tuple[Path, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = in_hub_cache[0] / "snapshots" / "0123abcd"
    torch.save(content, folder / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match=r"holds more than tensors, or is damaged|is no state dict"):
        ck.convert(folder, "peft", allow_pickle=True)
    (folder / "pytorch_adapter.bin").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="holds more than tensors, or is damaged"):
        ck.convert(folder, "peft", allow_pickle=True)
    assert "harmful" not in capsys.readouterr().out


def test_names_and_options_of_early_versions(tmp_path: Path) -> None:
    """The first version named adapters by their type, and stated invertible ones without need."""
    model = theirs(base_of("bert"), adapters.SeqBnConfig(reduction_factor=4, mh_adapter=True))
    expected = model(**batch_of("bert"))[0]
    folder = save(model, tmp_path / "saved", safe=False)
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    for new, old in (("attention.output.", "attention_text_task_"), ("output.", "layer_text_task_")):
        tensors = {key.replace(f"{new}adapters", f"{new}{old}adapters"): value for key, value in tensors.items()}
    assert sum("_text_task_adapters.task.adapter_down.0" in key for key in tensors) == 8
    torch.save(tensors, folder / "pytorch_adapter.bin")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["config"] |= {"invertible_adapter": {"block_type": "nice", "reduction_factor": 2}, "inv_adapter": None}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"inv_adapter=.*nice.* cannot be converted"):
        ck.convert(folder, "peft", allow_pickle=True)
    path.write_text(json.dumps({**config, "type": "text_task"}))
    ck.convert(folder, "peft", tmp_path / "moved", allow_pickle=True)
    close(in_peft(base_of("bert"), tmp_path / "moved")(**batch_of("bert"))[0], expected)


CANNOT_MOVE: dict[str, tuple[Any, str]] = {
    "invertible": (adapters.SeqBnInvConfig(), "inv_adapter='nice' cannot be converted: no invertible adapter"),
    "gating": (
        adapters.SeqBnConfig(use_gating=True),
        "use_gating=True cannot be converted: no adapter here has a gate",
    ),
    "adapter plus": (adapters.AdapterPlusConfig(stochastic_depth=0.0), "original_ln_after=False cannot be converted"),
    "channel": (adapters.SeqBnConfig(scaling="channel"), "scaling='channel' cannot be converted"),
    "post add": (adapters.SeqBnConfig(residual_before_ln="post_add"), "residual_before_ln='post_add' cannot be"),
    "prefix tuning": (adapters.PrefixTuningConfig(flat=True), "architecture='prefix_tuning' is another method"),
    "lora": (adapters.LoRAConfig(), "architecture='lora' is another method"),
    "reft": (adapters.LoReftConfig(), "architecture='reft' is another method"),
    "union": (adapters.MAMConfig(), "architecture='union' is another method"),
}


@pytest.mark.parametrize("case", CANNOT_MOVE)
def test_what_cannot_move_is_named(case: str, tmp_path: Path) -> None:
    config, message = CANNOT_MOVE[case]
    model = theirs(base_of("bert"), config)
    for source in (model, save(model, tmp_path / "saved", safe=False)):
        with pytest.raises(ValueError, match=message):
            ck.convert(source, "peft", tmp_path / "moved", source_format="adapters", allow_pickle=True)
        assert not (tmp_path / "moved").exists()


def test_compositions_are_named(tmp_path: Path) -> None:
    model = theirs(base_of("bert"), SEQ_BN)
    model.add_adapter("other", config=SEQ_BN)
    expected = output("bert", model)
    model.active_adapters = adapters.Stack("task", "other")
    with pytest.raises(ValueError, match=r"cannot hold the composition Stack\[task, other\]"):
        ck.convert(model, "peft", tmp_path / "moved", name="task")
    model.add_adapter_fusion(["task", "other"])
    with pytest.raises(ValueError, match="cannot hold the AdapterFusion of task,other"):
        ck.convert(model, "peft", tmp_path / "moved", name="task")
    model.save_adapter_fusion(str(tmp_path / "fusion"), "task,other")
    with pytest.raises(ValueError, match=r"holds an AdapterFusion, .*; give the folders of its adapters"):
        ck.convert(tmp_path / "fusion", "peft")
    assert not (tmp_path / "moved").exists()
    ck.convert(model, "peft", tmp_path / "moved", name="task", allow_loss=True)
    close(output("bert", in_peft(build("bert"), tmp_path / "moved")), expected)


@pytest.mark.parametrize("target", ["compacter-kernels", "original", "opendelta", "t-few", "hypernets"])
def test_other_formats_hold_compacter_alone(target: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="phm_layer=False cannot be converted: these are plain bottleneck adapters"):
        ck.convert(theirs(build("t5"), SEQ_BN), target, tmp_path / "moved", allow_loss=True)
    if target != "compacter-kernels":
        with pytest.raises(ValueError, match="original_ln_before=True cannot be converted"):
            ck.convert(theirs(build("t5"), PLUS_PLUS), target, tmp_path / "moved", allow_loss=True)
    assert not (tmp_path / "moved").exists()


def test_load_adapter_reads_compacter_alone(tmp_path: Path) -> None:
    ck.convert(theirs(base_of("bert"), SEQ_BN), "peft", tmp_path)
    with pytest.raises(ValueError, match="has peft_type 'BOTTLENECK', not 'COMPACTER'"):
        ck.load_adapter(base_of("bert"), tmp_path)
