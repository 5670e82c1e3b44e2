"""Adapters of `adapters` move to peft: in this environment, and in one with transformers 5."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import leaving_adapters
import pytest
import torch
from families import FAMILIES, inputs
from torch import nn

import compacter_kernels as ck

adapters = pytest.importorskip("adapters")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
ckp = pytest.importorskip("compacter_kernels.peft")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

ROOT = Path(__file__).parents[1]
LATER = sorted((ROOT / "build").glob("transformers-5*"))  # `make transformers` installs it
CLASSES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "vit": "ViTForImageClassification",
}
METHODS: dict[str, Any] = {
    "compacter": adapters.CompacterConfig(reduction_factor=4),
    "compacter++": adapters.CompacterPlusPlusConfig(reduction_factor=4),
    "seq_bn": adapters.SeqBnConfig(reduction_factor=4),
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": adapters.ParBnConfig(reduction_factor=4),
    "scaled_par_bn": adapters.ParBnConfig(scaling="learned", mh_adapter=True),
}


@pytest.fixture(autouse=True)
def nondeterministic_operators() -> None:
    """Allow operators of the other library that would warn."""
    torch.use_deterministic_algorithms(False)


def base_of(family: str) -> nn.Module:
    config, options, _ = FAMILIES[family]
    options = {**options, "add_cross_attention": False} if family == "gpt2" else options
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, CLASSES[family])(getattr(transformers, config)(**options))
    return model.eval()


def batch_of(family: str) -> dict[str, torch.Tensor]:
    batch = {key: value for key, value in inputs(family).items() if key != "encoder_hidden_states"}
    if family == "bart":  # the head reads the last eos token
        batch = {"input_ids": torch.cat([batch["input_ids"], torch.full((2, 1), 2)], 1)}
    return batch


def theirs(model: nn.Module, config: Any, name: str = "task") -> nn.Module:
    """The model with adapters of that config, active and with random weights, and a random head."""
    adapters.init(model)
    model.add_adapter(name, config=config)
    model.set_active_adapters(name)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if f".adapters.{name}." in key or "phm_rule" in key or key.startswith(("classif", "score")):
            nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of families as leaving_adapters.py reads them, made with `adapters`."""
    folder: Path = tmp_path_factory.mktemp("moved")
    for family in CLASSES:
        batch = batch_of(family)
        outputs = {f"inputs.{key}": value.clone() for key, value in batch.items()}
        base_of(family).save_pretrained(folder / family / "base")
        for method, config in METHODS.items():
            model = theirs(base_of(family), config)
            with torch.no_grad():
                outputs[method] = model(**batch)[0].contiguous()
            ck.convert(model, "peft", folder / family / method)
        safetensors.save_file(outputs, folder / family / "outputs.safetensors")
    return folder


@pytest.mark.parametrize("family", CLASSES)
def test_in_this_environment(family: str, moved: Path) -> None:
    for method in METHODS:
        plain = base_of(family)
        assert leaving_adapters.error(moved / family, method, plain) > 1e-3
        model = peft.PeftModel.from_pretrained(plain, moved / family / method).eval()
        assert leaving_adapters.error(moved / family, method, model) <= leaving_adapters.LIMIT


@pytest.mark.skipif(not LATER, reason="make transformers has not installed transformers 5")
def test_with_transformers_5(moved: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "leaving_adapters.py"), *(str(moved / name) for name in CLASSES)]
    path = os.pathsep.join([str(LATER[-1]), str(ROOT)])
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0 and "transformers 5" in result.stdout, result.stdout + result.stderr
    assert result.stdout.count("\n") == 1 + len(CLASSES) * len(METHODS)
