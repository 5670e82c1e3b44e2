"""Names in files are those of the plain model, also if the model or its layers are wrapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import build, output
from test_save_load import trained
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as checkpointing
from torch.optim.swa_utils import AveragedModel

import compacter_kernels as ck
from compacter_kernels.checkpoints.files import TENSORS
from compacter_kernels.load import load_adapter
from compacter_kernels.save import save_adapter
from compacter_kernels.targets.wrappers import plain_names, plain_path, unwrapped

pytest.importorskip("safetensors")
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": torch.compile,
    "checkpoint": checkpointing.checkpoint_wrapper,
    "offload": checkpointing.offload_wrapper,
    "DataParallel": nn.DataParallel,
    "average": AveragedModel,
    "several": lambda module: nn.DataParallel(checkpointing.checkpoint_wrapper(torch.compile(module))),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # in torch.compile
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_around_the_model_and_around_layers(wrapper: str, tmp_path: Path) -> None:
    wrap = WRAPPERS[wrapper]
    save_adapter(trained(build("bert")), tmp_path / "plain")
    expected = (tmp_path / "plain" / TENSORS).read_bytes()
    whole, layers = wrap(build("bert")), trained(build("bert"), seed=5)
    layers.bert.encoder.layer[0] = wrap(layers.bert.encoder.layer[0])
    layers.bert.encoder.layer[1].output = wrap(layers.bert.encoder.layer[1].output)
    before = build("bert")
    before.bert.encoder.layer[0] = wrap(before.bert.encoder.layer[0])
    before.bert.encoder.layer[1].output.LayerNorm = wrap(before.bert.encoder.layer[1].output.LayerNorm)
    for index, model in enumerate((whole, layers, before)):
        load_adapter(model, tmp_path / "plain")
        save_adapter(model, tmp_path / str(index))
        assert (tmp_path / str(index) / TENSORS).read_bytes() == expected, index
    assert torch.equal(output("bert", unwrapped(whole)), output("bert", trained(build("bert"))))


def test_a_child_that_has_the_name_of_a_wrapper_s() -> None:
    """It keeps its name, since a wrapper is recognised by its class."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.base_layer = nn.Linear(8, 8), nn.Linear(8, 8)

    net = nn.DataParallel(Net())
    assert unwrapped(net) is net.module
    for path in ("module.weight", "base_layer.weight"):
        assert plain_path(net, f"module.{path}") == plain_path(net.module, path) == path


def test_names_of_a_state_dict() -> None:
    names = ("encoder._fsdp_wrapped_module.a", "encoder.layer.0._orig_mod._checkpoint_wrapped_module.module.b")
    plain = {"encoder.a": 0, "encoder.layer.0.module.b": 1}
    for prefix in ("", "module.", "_orig_mod.module.", "base_model.model.", "module.base_model.model."):
        assert plain_names({f"{prefix}{name}": index for index, name in enumerate(names)}) == plain, prefix
    assert plain_names({"module.a": 0, "other": 1}) == {"module.a": 0, "other": 1}
    with pytest.raises(ValueError, match="two of the tensors have one name"):
        plain_names({"a._orig_mod.b": 0, "a.b": 1})


def test_inject_through_a_wrapper() -> None:
    plain = trained(build("bert"))
    model = build("bert")
    compiled = torch.compile(model, backend="eager")
    assert trained(compiled) is compiled
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert torch.equal(output("bert", model), output("bert", plain))
    assert ck.count_parameters(compiled) == ck.count_parameters(plain)


@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize("first", ["wrap", "inject"])
def test_layers_that_adapters_follow_are_wrapped(first: str, is_parallel: bool) -> None:
    """The adapters of all names are a child of the layer itself, until remove_adapters."""

    def wrapped(model: nn.Module) -> nn.Module:
        for layer in model.bert.encoder.layer:
            layer.attention.self.query = checkpointing.checkpoint_wrapper(layer.attention.self.query)
            layer.output.dense = checkpointing.checkpoint_wrapper(layer.output.dense)
        model.classifier = checkpointing.checkpoint_wrapper(model.classifier)
        return model

    expected = output("bert", trained(build("bert"), is_parallel=is_parallel))
    if first == "wrap":
        model = trained(wrapped(build("bert")), is_parallel=is_parallel)
    else:
        model = wrapped(trained(build("bert"), is_parallel=is_parallel))
    assert torch.equal(output("bert", model), expected)
    trained(model, seed=5, name="second", is_parallel=is_parallel)
    assert not torch.equal(output("bert", model), expected)
    ck.set_adapter(model, "default")
    assert torch.equal(output("bert", model), expected)
    ck.remove_adapters(model)
    assert torch.equal(output("bert", model), output("bert", build("bert")))
    assert not any(isinstance(module, ck.CompacterAdapter) for module in model.modules())
