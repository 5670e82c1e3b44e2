"""The ways to adapt a transformers model: which parameters train, and how they are saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import compacter_kernels as ck
from compacter_kernels.inject.prepare import computes_like, width_of
from compacter_kernels.targets.find import HEADS, find_targets, is_layer_norm
from train_common import BottleneckAdapter

TRAINED = "trained.safetensors"
CHILD = "bottleneck"


class Method(NamedTuple):
    """A way to adapt a model.

    name: on the command line. title: in a table. rate: the default learning rate. rates: those that
    a search tries.
    prepare: takes the model and the options of the adapters, adds modules and chooses the
    parameters that train.
    """

    name: str
    title: str
    rate: float
    rates: tuple[float, ...]
    prepare: Callable[[nn.Module, dict[str, Any]], object]

    @property
    def compacter(self) -> bool:
        """Whether the model gets Compacter adapters, which `save_adapter` writes."""
        return self.name.startswith("compacter")

    def save(self, model: Any, folder: Path) -> None:
        """Write the trained parameters: as an adapter folder, or by their names."""
        if self.compacter:
            ck.save_adapter(model, folder)
        else:
            from safetensors.torch import save_file

            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: p.detach().cpu().contiguous() for name, p in trained(model).items()}
            save_file(tensors, folder / TRAINED, metadata={"format": "pt"})

    def load(self, model: Any, folder: Path) -> None:
        """Read the files of `save` into a model that was prepared in the same way.

        Raises:
            ValueError: the file is damaged, or belongs to another model. The model is unchanged.
        """
        if self.compacter:
            ck.load_adapter(model, folder)
        else:
            _restore(model, folder / TRAINED)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _restore(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no sound safetensors file: {error}") from error
    targets = trained(model)
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in targets.items()}:
        raise ValueError(f"{path} does not fit the model: other tensors than those that train")
    for name, target in targets.items():
        target.copy_(tensors[name])


def _head(model: nn.Module) -> list[nn.Module]:
    """The classifier, which starts untrained. A text-to-text model has none."""
    return [module for name, module in model.named_children() if name in HEADS]


def _probe(model: nn.Module, options: dict[str, Any]) -> None:
    """Train the head alone."""
    heads = _head(model)
    if not heads:
        raise ValueError(f"--method probe trains a head, and a {type(model).__name__} has none of {', '.join(HEADS)}")
    model.requires_grad_(False)
    for module in heads:
        module.requires_grad_(True)


def _full(model: nn.Module, options: dict[str, Any]) -> None:
    """Train every parameter."""
    model.requires_grad_(True)


def _bottleneck(model: nn.Module, options: dict[str, Any]) -> None:
    """Put plain adapters behind the layers that Compacter adapts. Norms and the head train too."""
    config = ck.CompacterConfig(**options)
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


def _compacter(model: nn.Module, options: dict[str, Any], kind: type[ck.CompacterConfig]) -> None:
    ck.inject(model, kind(**options))


COMPACTER_RATES = (3e-3, 1e-2, 3e-2)  # the first is the paper's
METHODS = {
    method.name: method
    for method in (
        Method("probe", "linear probe", 1e-2, (1e-2, 3e-3, 3e-2), _probe),
        Method("full", "full fine-tuning", 1e-4, (1e-4, 3e-4, 1e-3), _full),
        Method("adapter", "bottleneck adapter", 1e-3, (1e-3, 3e-3, 1e-2), _bottleneck),
        Method("compacter", "Compacter", 3e-3, COMPACTER_RATES, partial(_compacter, kind=ck.CompacterConfig)),
        Method(
            "compacter++", "Compacter++", 3e-3, COMPACTER_RATES, partial(_compacter, kind=ck.CompacterPlusPlusConfig)
        ),
    )
}
