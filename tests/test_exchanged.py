"""Heads and layers that are exchanged or resized after inject.

The library warns of them, and does not save an incomplete adapter.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from families import WIDTH, build, output
from torch import nn

import compacter_kernels as ck

pytest.importorskip("safetensors")
CONFIG = ck.CompacterConfig(reduction_factor=4)


def test_a_head_that_was_exchanged_is_missed(tmp_path: Path) -> None:
    model = ck.inject(build("bert"), CONFIG)
    head = model.classifier
    model.classifier = nn.Linear(WIDTH, 5)
    with pytest.warns(UserWarning, match="classifier was exchanged: its trained copy is used no more"):
        output("bert", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output("bert", model)  # it warns only once
    with pytest.raises(ValueError, match=r"exchanged for others since: classifier\. Put back what was there"):
        ck.save_adapter(model, tmp_path / "it")
    assert not (tmp_path / "it").exists()
    model.classifier = head
    ck.save_adapter(model, tmp_path / "it")
    ck.load_adapter(build("bert"), tmp_path / "it")


def test_a_head_that_got_a_second_copy_is_missed() -> None:
    model = ck.inject(build("bert"), CONFIG)
    ck.inject(model, ck.CompacterConfig(reduction_factor=4, modules_to_save=[]), name="without")
    ck.remove_adapters(model, "default")
    ck.inject(model, CONFIG)
    model.classifier = nn.Linear(WIDTH, 5)
    with pytest.warns(UserWarning, match="classifier was exchanged"):
        output("bert", model)


def test_layers_that_were_taken_out_are_not_missed(tmp_path: Path) -> None:
    model = ck.inject(build("bert"), CONFIG)
    model.bert.encoder.layer = model.bert.encoder.layer[1:]
    ck.save_adapter(model, tmp_path)
    fresh = build("bert")
    fresh.bert.encoder.layer = fresh.bert.encoder.layer[1:]
    assert torch.equal(output("bert", ck.load_adapter(fresh, tmp_path)), output("bert", model))


def test_what_stands_in_a_wrapper_is_not_missed(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = ck.inject(build("bert"), CONFIG)
    model.classifier = torch.compile(model.classifier, backend="eager")
    model.bert.encoder.layer[0] = checkpoint_wrapper(model.bert.encoder.layer[0])
    with torch.no_grad():
        output("bert", model)
    ck.save_adapter(model, tmp_path)


@pytest.mark.parametrize(("tied", "what"), [(False, "exchanged"), (True, "resized")])
def test_resized_token_embeddings(tied: bool, what: str) -> None:
    model = ck.inject(
        build("llama", tie_word_embeddings=tied), ck.CompacterConfig(reduction_factor=4, modules_to_save=["lm_head"])
    )
    output("llama", model)
    model.resize_token_embeddings(60)
    with pytest.warns(UserWarning, match=f"lm_head was {what}.*before inject"):
        output("llama", model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_are_missed(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(ck.inject(build("bert"), CONFIG), {nn.Linear})
    with pytest.raises(ValueError, match=r"exchanged for others since: bert.encoder.layer.0.attention.output.dense"):
        ck.save_adapter(model, tmp_path / "it")
