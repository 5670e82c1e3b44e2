"""Adapters together with LoRA of peft, in both orders.

Files have the names of the plain model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs, output
from test_save_load import trained
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import compacter_kernels as ck
from compacter_kernels.checkpoints.files import TENSORS
from compacter_kernels.load import load_adapter
from compacter_kernels.save import save_adapter

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("safetensors")


def lora(model: nn.Module, **options: Any) -> Any:
    """The model with LoRA, whose weights are not zero."""
    config = peft.LoraConfig(**{"target_modules": ["output.dense", "query"], **options})
    wrapped = peft.get_peft_model(model, config).eval()
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.3)
    return wrapped


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "undo", "options"),
    [
        ("the wrapper", "merge_and_unload", {}),
        ("the model", "merge_and_unload", {"is_parallel": True}),
        ("the wrapper", "unload", {}),
        ("the model", "merge_adapter", {}),
    ],
)
def test_adapters_behind_lora(given: str, undo: str, options: dict[str, Any], tmp_path: Path) -> None:
    """They take the output of LoRA, also after a merge, and load into the plain model."""
    wrapped = lora(build("bert"))
    plain_with_lora = output("bert", wrapped)
    trained(wrapped if given == "the wrapper" else wrapped.base_model.model, **options)
    both = output("bert", wrapped)
    assert not torch.allclose(both, plain_with_lora, rtol=1e-2)
    with ck.disable_adapters(wrapped):
        assert_close(output("bert", wrapped), plain_with_lora)
    ck.inject(wrapped, ck.CompacterConfig(reduction_factor=4, **options), name="second")
    ck.set_adapter(wrapped, "default")
    save_adapter(wrapped, tmp_path / "wrapped")
    undone = getattr(wrapped, undo)()
    model = wrapped.base_model.model
    save_adapter(model, tmp_path / "after")
    expected = (tmp_path / "wrapped" / TENSORS).read_bytes()
    assert (tmp_path / "after" / TENSORS).read_bytes() == expected
    fresh = load_adapter(build("bert"), tmp_path / "wrapped")
    save_adapter(fresh, tmp_path / "fresh")
    assert (tmp_path / "fresh" / TENSORS).read_bytes() == expected
    if undo == "unload":
        assert_close(output("bert", undone), output("bert", fresh))
    else:
        assert_close(output("bert", model), both)
    ck.remove_adapters(model)
    assert_close(output("bert", model), output("bert", build("bert")) if undo == "unload" else plain_with_lora)


def test_lora_behind_adapters_is_refused_before_anything_is_lost() -> None:
    """After merging, the adapters would read another output.

    The first call raises an error about this, and unload restores the model.
    """
    model = trained(build("bert"))
    expected = output("bert", model)
    wrapped = lora(model)
    with pytest.raises(RuntimeError, match=r"peft has wrapped dense, .*Call get_peft_model first and inject"):
        output("bert", wrapped)
    assert torch.equal(output("bert", wrapped.unload()), expected)


@pytest.mark.parametrize("options", [{}, {"is_parallel": True}], ids=["sequential", "parallel"])
def test_lora_on_other_layers(options: dict[str, Any], tmp_path: Path) -> None:
    """The order does not matter, and merging changes nothing."""
    save_adapter(trained(build("bert"), **options), tmp_path / "plain")
    models = trained(build("bert"), **options), build("bert")
    first, second = (lora(model, target_modules=["query"]) for model in models)
    load_adapter(second, tmp_path / "plain")
    for index, wrapped in enumerate((first, second)):
        save_adapter(wrapped, tmp_path / str(index))
        assert (tmp_path / str(index) / TENSORS).read_bytes() == (tmp_path / "plain" / TENSORS).read_bytes()
    assert torch.equal(output("bert", first), output("bert", second))
    expected = output("bert", first)
    assert_close(output("bert", first.merge_and_unload()), expected)


@pytest.mark.parametrize(
    ("options", "config", "named"),
    [
        ({"task_type": "SEQ_CLS"}, {}, "classifier belongs to what peft"),
        ({"modules_to_save": ["LayerNorm"]}, {}, r"LayerNorm\.original_module belongs to what peft"),
        ({}, {"target_modules": ["base_layer"]}, r"base_layer belongs to what peft"),
    ],
    ids=["head", "layer norms", "wrapped layers"],
)
def test_modules_that_peft_trains_are_refused(options: dict[str, Any], config: dict[str, Any], named: str) -> None:
    wrapped = lora(build("bert"), **options)
    names = [name for name, _ in wrapped.named_modules()]
    trains = [p.requires_grad for p in wrapped.parameters()]
    with pytest.raises(ValueError, match=named):
        ck.inject(wrapped, ck.CompacterConfig(reduction_factor=4, **config))
    assert [name for name, _ in wrapped.named_modules()] == names
    assert [p.requires_grad for p in wrapped.parameters()] == trains


def test_a_head_that_peft_copies_later(tmp_path: Path) -> None:
    """There are two trained heads then, and the one of the adapters cannot be determined."""
    wrapped = lora(trained(build("bert")), target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"classifier\..* lies in what peft trains itself"):
        save_adapter(wrapped, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    expected = wrapped(**inputs("bert"))[0]
    merged = wrapped.merge_and_unload()
    assert_close(output("bert", merged), expected)
    save_adapter(merged, tmp_path / "adapter")


def test_both_train() -> None:
    wrapped = lora(build("bert"))
    ck.inject(wrapped, ck.CompacterConfig(reduction_factor=4))
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "lora_" in name)
    output("bert", wrapped).square().sum().backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    assert all(p.grad is not None for _, p in ck.adapter_parameters(wrapped))


@pytest.mark.parametrize("first", ["wrap", "inject"])
def test_a_wrapper_around_lora(first: str) -> None:
    """With activation checkpointing of a layer with LoRA, adapters still take its output, once."""
    expected = output("bert", trained(lora(build("bert"))))
    wrapped = lora(build("bert"))
    if first == "inject":
        trained(wrapped)
    for layer in wrapped.base_model.model.bert.encoder.layer:
        layer.output.dense = checkpoint_wrapper(layer.output.dense)
    if first == "wrap":
        trained(wrapped)
    assert torch.equal(output("bert", wrapped), expected)
    ck.remove_adapters(wrapped)
    assert torch.equal(output("bert", wrapped), output("bert", lora(build("bert"))))


def test_a_parallel_adapter_beside_a_layer_with_lora() -> None:
    """Its input is that of the wrapper, and after merging that of the layer."""
    wrapped = lora(build("bert"))
    config = ck.CompacterConfig(
        reduction_factor=4, phm_init_range=1.0, is_parallel=True, target_modules=["attention.output.dense"]
    )
    ck.inject(wrapped, config)
    attention, x = wrapped.base_model.model.bert.encoder.layer[0].attention.output, torch.randn(2, 3, 32)
    both = attention.dense(x)
    with ck.disable_adapters(wrapped):
        plain = attention.dense(x)
    assert torch.equal(both, attention.dense.base_layer.compacter["default"](x, plain))
    wrapped.merge_and_unload()
    assert_close(attention.dense(x), both)


READS = ["query", "intermediate.dense"]  # the layers that take the input of a block


@pytest.mark.parametrize("method", ["IA3", "OFT"])
def test_methods_that_change_a_layer_s_input(method: str) -> None:
    """A parallel adapter takes the input of the block before peft changes it.

    It does so after merging too.
    """
    if method == "IA3":
        config = peft.IA3Config(target_modules=READS, feedforward_modules=READS)
    else:
        config = peft.OFTConfig(r=0, oft_block_size=8, target_modules=READS)
    wrapped = peft.get_peft_model(build("bert"), config).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3
    expected = output("bert", trained(wrapped, is_parallel=True))
    assert_close(output("bert", wrapped.merge_and_unload()), expected)

    wrapped = peft.get_peft_model(trained(build("bert"), is_parallel=True), config).eval()
    with pytest.raises(RuntimeError, match=r"peft has wrapped query, .*Call get_peft_model first and inject"):
        output("bert", wrapped)
    assert torch.equal(output("bert", wrapped.unload()), output("bert", trained(build("bert"), is_parallel=True)))


@pytest.mark.slow
def test_compiled() -> None:
    wrapped = trained(lora(build("bert")))
    expected = output("bert", wrapped)
    compiled = torch.compile(wrapped, fullgraph=True, backend="eager")
    assert_close(output("bert", compiled), expected)
