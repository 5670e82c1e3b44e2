"""The ways to adapt a transformers model: what trains, at what rate, and how it is saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compacter_kernels.checkpoints.files import read_tensors, require_safetensors
from compacter_kernels.config import CompacterConfig, CompacterPlusPlusConfig
from compacter_kernels.inject.api import inject
from compacter_kernels.inject.prepare import computes_like, width_of
from compacter_kernels.load import load_adapter
from compacter_kernels.save import save_adapter
from compacter_kernels.targets.find import HEADS, find_targets, is_layer_norm
from compacter_kernels.train.methods import BottleneckAdapter

TRAINED = "trained.safetensors"
CHILD = "bottleneck"


class Method(NamedTuple):
    """A way to adapt a model.

    name: on the command line. title: in a table. rate: the learning rate unless one is given. rates: those to choose
    from. prepare: takes the model and the options, and says what trains. compacter: whether there are such adapters.
    """

    name: str
    title: str
    rate: float
    rates: tuple[float, ...]
    prepare: Callable[[nn.Module, dict[str, Any]], None]
    compacter: bool = False

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained: an adapter folder, or the trained parameters by their names in the model."""
        if self.compacter:
            save_adapter(model, folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in trained(model).items()}
        require_safetensors().torch.save_file(tensors, folder / TRAINED, metadata={"format": "pt"})

    def load(self, model: nn.Module, folder: Path) -> None:
        """Read it back into a model that was prepared alike."""
        if self.compacter:
            load_adapter(model, folder)
            return
        restore(read_tensors(folder / TRAINED), trained(model), folder / TRAINED)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore(found: dict[str, Tensor], targets: dict[str, nn.Parameter], path: Path) -> None:
    """Copy tensors into the parameters of their names.

    Raises:
        ValueError: names or shapes that differ; nothing is changed.
    """
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in targets.items()}:
        raise ValueError(f"{path} does not fit the model: other tensors than those that train")
    for name, target in targets.items():
        target.copy_(found[name])


def _head(model: nn.Module) -> list[nn.Module]:
    """The classifier that starts untrained; a text-to-text model has none."""
    return [module for name, module in model.named_children() if name in HEADS]


def _probe(model: nn.Module, options: dict[str, Any]) -> None:
    heads = _head(model)
    if not heads:
        raise ValueError(f"--method probe trains a head, and a {type(model).__name__} has none of {', '.join(HEADS)}")
    model.requires_grad_(False)
    for module in heads:
        module.requires_grad_(True)


def _full(model: nn.Module, options: dict[str, Any]) -> None:
    model.requires_grad_(True)


def _bottleneck(model: nn.Module, options: dict[str, Any]) -> None:
    """Plain adapters where Compacter has its own, with the same bottleneck; layer norms and head train too."""
    config = CompacterConfig(**options)
    targets = find_targets(model, config)
    model.requires_grad_(False)
    for module in (*_head(model), *(module for module in model.modules() if is_layer_norm(module))):
        module.requires_grad_(True)
    for target in targets:
        write = model.get_submodule(target.write)
        size, like = width_of(model, write, target.write), computes_like(model, write)
        adapter = BottleneckAdapter(size, int(size // config.reduction_factor_of(target.layer)))
        setattr(write, CHILD, adapter.to(like))
        write.register_forward_hook(lambda module, inputs, output: getattr(module, CHILD)(output))


def _compacter(model: nn.Module, options: dict[str, Any], kind: type[CompacterConfig]) -> None:
    inject(model, kind(**options))


METHODS = {
    method.name: method
    for method in (
        Method("probe", "linear probe", 1e-2, (1e-2, 3e-3, 3e-2), _probe),
        Method("full", "full fine-tuning", 1e-4, (1e-4, 3e-4, 1e-3), _full),
        Method("adapter", "bottleneck adapter", 1e-3, (1e-3, 3e-3, 1e-2), _bottleneck),
        Method(
            "compacter",
            "Compacter",
            3e-3,  # the paper's
            (3e-3, 1e-2, 3e-2),
            partial(_compacter, kind=CompacterConfig),
            compacter=True,
        ),
        Method(
            "compacter++",
            "Compacter++",
            3e-3,
            (3e-3, 1e-2, 3e-2),
            partial(_compacter, kind=CompacterPlusPlusConfig),
            compacter=True,
        ),
    )
}
