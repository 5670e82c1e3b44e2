"""`inject`: adapters into a transformer, its own weights frozen."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compacter_kernels.config import CompacterConfig
from compacter_kernels.inject.checks import check_name
from compacter_kernels.inject.exchanged import HeadWatch
from compacter_kernels.inject.fast_path import FastPath
from compacter_kernels.inject.freeze import freeze
from compacter_kernels.inject.keys import named_tensors
from compacter_kernels.inject.prepare import Prepared, prepare
from compacter_kernels.inject.target_adapters import AddedModules, TargetAdapters, added_modules
from compacter_kernels.inject.trained_copies import TrainedCopies
from compacter_kernels.targets.added import NAME, Added
from compacter_kernels.targets.find import is_layer_norm
from compacter_kernels.targets.layer import Layer
from compacter_kernels.targets.wrappers import check_injectable, plain_path, unwrapped

logger = logging.getLogger("compacter_kernels")
Model = TypeVar("Model", bound=nn.Module)


class Injection(Added, nn.Module):
    """The child `compacter` of an injected model: its configs by name, and the weights that its adapters share."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shared = nn.ModuleDict()
        self.configs: dict[str, CompacterConfig] = {}
        self.active: str | None = None
        self.trained_before = {plain_path(model, name) for name, p in model.named_parameters() if p.requires_grad}
        self.placed: dict[str, AddedModules] = {}
        self.fast_path = FastPath(model)
        self.watch = HeadWatch()
        self._checkpointed = tuple(m for m in model.modules() if hasattr(m, "gradient_checkpointing"))
        self._handles = [m.register_forward_hook(self._need_gradient) for m in _embeddings(model)]

    def slots(self) -> set[AddedModules]:
        """What stands beside modules of the model, those too that were exchanged since."""
        return set(self.placed.values())

    def parts(self, model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        """What belongs to the adapters of that name in a model: the path of a slot, the module in it."""
        for path, slot in [(f"{NAME}.shared", self.shared), *slots(model)]:
            if name in slot:
                yield path, slot.get_submodule(name)

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The tensors of the adapters of that name, by their names in a file."""
        return named_tensors(model, self.parts(model, name))

    def watch_head(self, model: nn.Module, path: str, slot: TrainedCopies) -> None:
        """Say so in a later call if the module of that name was exchanged, and its trained copy with it."""
        if not len(self.watch):
            self._handles.append(model.register_forward_pre_hook(self._look))
        self.watch.add(plain_path(model, path), model.get_submodule(path.rpartition(".")[0]), slot)

    def _look(self, model: nn.Module, inputs: Any) -> None:
        if self.active is not None:
            self.watch.look(model, self.placed, self.active)

    def _need_gradient(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Under reentrant checkpointing a layer whose input needs no gradient would give its adapters none."""
        needs = torch.is_grad_enabled() and any([m.gradient_checkpointing and m.training for m in self._checkpointed])
        if needs and isinstance(output, Tensor) and not output.requires_grad:
            output.requires_grad_(True)

    def detach(self) -> None:
        """Take the hooks off the model."""
        self.fast_path.allow(True)
        for handle in self._handles:
            handle.remove()


def injection(model: nn.Module) -> Injection:
    """What `inject` left in a model.

    Raises:
        ValueError: the model has no adapters.
    """
    found = getattr(unwrapped(model), NAME, None)
    if not isinstance(found, Injection):
        raise ValueError(f"this {type(model).__name__} has no Compacter adapters; call compacter_kernels.inject first")
    return found


def slots(model: nn.Module) -> Iterator[tuple[str, AddedModules]]:
    """The slots of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AddedModules))


def inject(model: Model, config: CompacterConfig | None = None, *, name: str = "default", impl: str = "auto") -> Model:
    """Put Compacter adapters into a transformers model and freeze the rest of it; they become its active ones.

    Args:
        model: any model of the table in `compacter_kernels.targets.architectures`, or with `config.target_modules` any
            module. Its own parameters are frozen and keep their names and values.
        config: a `CompacterConfig` (the default) or `CompacterPlusPlusConfig`.
        name: of these adapters. Call again with another name for further ones, see `set_adapter`.
        impl: see `compacter_kernels.compacter_adapter`.

    Returns:
        The model itself. Each adapter has the device and the floating dtype of the layer that it follows.

    Raises:
        TypeError, ValueError: before anything is changed; the message says what would do.
    """
    config = CompacterConfig() if config is None else config
    if not isinstance(config, CompacterConfig):
        raise TypeError(f"config must be a CompacterConfig, got {type(config).__name__}")
    check_injectable(model)
    inner = unwrapped(model)
    present = getattr(inner, NAME, None)
    check_name(name, present.configs if isinstance(present, Injection) else ())
    place(inner, name, config, prepare(inner, config, impl))
    return model


def place(model: nn.Module, name: str, config: CompacterConfig, prepared: Prepared) -> None:
    """Put the prepared adapters and copies into the model and activate them."""
    present = getattr(model, NAME, None)
    if not isinstance(present, Injection):
        present = Injection(model)
        setattr(model, NAME, present)
        model.requires_grad_(False)
    for target in prepared.targets:
        write, read = Layer(model, target.write), Layer(model, target.read)
        slot: Any = added_modules(write.module) or TargetAdapters(write)
        adapter = prepared.adapters[target.write].train(write.module.training)
        slot.add_adapter(name, adapter, read, prepared.shared)
        present.placed[plain_path(model, target.write)] = slot
    for path, module in prepared.copies.items():
        base = unwrapped(model.get_submodule(path))
        slot = added_modules(base) or TrainedCopies(base)
        slot.add_copy(name, module, config.dtype is not None)
        present.placed[plain_path(model, path)] = slot
        if not is_layer_norm(base):
            present.watch_head(model, path, slot)
    present.fast_path.allow(True)
    present.fast_path = FastPath(model)
    if prepared.shared is not None:
        present.shared[name] = prepared.shared
    present.configs[name] = config
    activate(model, name)
    logger.info(
        "%d adapters and %d trained copies in %s", len(prepared.targets), len(prepared.copies), type(model).__name__
    )


def use(model: nn.Module, name: str | None) -> None:
    """Compute with the adapters of that name; with None, as the base does."""
    here = injection(model)
    here.active = name
    here.fast_path.allow(name is None)
    for slot in here.slots():
        slot.active = name


def activate(model: nn.Module, name: str) -> None:
    """Use and train the adapters of that name, and no others."""
    use(model, name)
    here = injection(model)
    for key, weights in here.shared.items():
        _train(weights, here.configs[key], key == name)
    for slot in here.slots():
        for key, module in slot.items():
            _train(module, here.configs[key], key == name)


def _train(module: nn.Module, config: CompacterConfig, on: bool) -> None:
    for path, parameter in module.named_parameters():
        fixed = not config.learn_phm and path.rpartition(".")[2].startswith("phm_rule")
        if on and not fixed:
            parameter.requires_grad_(True)
        else:
            freeze(parameter)


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules that turn inputs into hidden states, of the model and of those it is composed of."""
    found: list[nn.Module] = []
    for module in model.modules():
        try:
            embedding = module.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(embedding, nn.Module) and embedding not in found:
            found.append(embedding)
    return found
