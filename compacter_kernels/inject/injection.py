"""The child `compacter` of an adapted model, which knows all adapters in the model."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from compacter_kernels.config import CompacterConfig
from compacter_kernels.inject.embedding_adapters import EmbeddingAdapters
from compacter_kernels.inject.keys import SHARED_PATH, named_tensors
from compacter_kernels.inject.prepare import Prepared
from compacter_kernels.inject.target_adapters import AdapterFastPath, Layer, TargetAdapters
from compacter_kernels.inject.trained_copies import TrainedCopies
from compacter_kernels.nn.choice import check_no_choice
from compacter_kernels.targets.added import NAME, Adapters, AddedModules, added_modules
from compacter_kernels.targets.find import is_layer_norm
from compacter_kernels.targets.wrappers import plain_path, unwrapped

logger = logging.getLogger("compacter_kernels")
SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim")
FREEZE = "compacter_kernels.freeze"


class Injection(Adapters, nn.Module):
    """All adapters of a model. shared: the weights that the adapters of one name share."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shared = nn.ModuleDict()
        self.configs = {}
        self.active = None
        self._trained_before = {plain_path(model, name): p.requires_grad for name, p in model.named_parameters()}
        self._added: dict[str, TargetAdapters | TrainedCopies] = {}  # By the path of their module, also if exchanged.
        self._fast_path = AdapterFastPath(model)
        # The copied heads by path, without wrappers: the parent of the head, and its copies.
        self._heads: dict[str, tuple[nn.Module, TrainedCopies]] = {}
        self._checkpointed = tuple(m for m in model.modules() if hasattr(m, "gradient_checkpointing"))
        self._handles = [m.register_forward_hook(self._require_gradient) for m in _embeddings(model)]

    def add(self, model: nn.Module, name: str, config: CompacterConfig, prepared: Prepared) -> None:
        """Put prepared adapters and copies into the model and activate them."""
        self.configs[name] = config
        for target in prepared.targets:
            write, read, norm = Layer(model, target.write), None, None
            kind = EmbeddingAdapters if target.like else TargetAdapters
            if target.like:
                pass  # It takes the input of the layer.
            elif config.is_parallel:
                read = Layer(model, target.read)
            elif config.original_ln_before:
                read = Layer(model, target.residual)
                norm = Layer(model, target.norm) if target.norm else None
            adapters: Any = added_modules(write.module) or kind(write)
            self._added[plain_path(model, target.write)] = adapters
            adapter = prepared.adapters[target.write].train(write.module.training)
            before_norm = config.residual_before_ln
            adapters.add_adapter(name, adapter, prepared.shared, read=read, norm=norm, before_norm=before_norm)
        for path, trained in prepared.copies.items():
            original = unwrapped(model.get_submodule(path))
            copies: Any = added_modules(original) or TrainedCopies(original)
            self._added[plain_path(model, path)] = copies
            copies.add_copy(name, trained, config.dtype is not None)
            if not is_layer_norm(original):
                if not self._heads:
                    self._handles.append(model.register_forward_pre_hook(self._check_heads))
                parent = model.get_submodule(path.rpartition(".")[0])
                self._heads[plain_path(model, path)] = parent, copies
        self._fast_path.allow(True)
        self._fast_path = AdapterFastPath(model)
        if prepared.shared is not None:
            self.shared[name] = prepared.shared
        self.activate(name)
        counts = len(prepared.targets), len(prepared.copies)
        logger.info("%d adapters and %d trained copies in %s", *counts, type(model).__name__)

    def remove(self, model: nn.Module, names: Iterable[str]) -> None:
        """Take out the adapters of these names. After the last, the model is as before `inject`."""
        check_no_choice(model)
        all_added = set(self._added.values())
        for name in names:
            del self.configs[name]
            for modules in (self.shared, *all_added):
                if name in modules:
                    del modules[name]
        self._fast_path.allow(True)
        for modules in all_added:
            if not len(modules):
                modules.detach()
        self._added = {path: modules for path, modules in self._added.items() if len(modules)}
        self._fast_path = AdapterFastPath(model)
        if self.configs:
            self.resume(self.active)
            return
        for handle in self._handles:
            handle.remove()
        delattr(model, NAME)
        for path, parameter in model.named_parameters():  # Those that came later stay as they are.
            parameter.requires_grad_(self._trained_before.get(plain_path(model, path), parameter.requires_grad))

    def use(self, name: str | None) -> None:
        """Compute with the adapters of that name. With None the model computes as its base."""
        self.active = name
        self._fast_path.allow(name is None)
        for modules in self._added.values():
            modules.active = name

    def resume(self, name: str | None) -> None:
        """Go on with the adapters of that name; if they were removed, activate others."""
        if name is None or name in self.configs:
            self.use(name)
        elif self.configs:
            self.activate(next(iter(self.configs)))

    def activate(self, name: str, *others: str) -> None:
        """Compute with the adapters of that name; train them and the others, and no more."""
        self.use(name)
        for modules in (self.shared, *self._added.values()):
            for key, module in modules.items():
                for path, parameter in module.named_parameters():
                    fixed = not self.configs[key].learn_phm and path.rpartition(".")[2].startswith("phm_rule")
                    if key in (name, *others) and not fixed:
                        parameter.requires_grad_(True)
                    else:
                        freeze(parameter)

    def require(self, name: str) -> str:
        """Return the name, or raise ValueError if the model has no adapters of that name."""
        if name not in self.configs:
            raise ValueError(f"the model has no adapters of the name {name!r}; it has {', '.join(self.configs)}")
        return name

    def parts(self, model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the adapters of that name, with the paths of their parents."""
        beside = ((path, module) for path, module in model.named_modules() if isinstance(module, AddedModules))
        for path, modules in ((SHARED_PATH, self.shared), *beside):
            if name in modules:
                yield path, modules.get_submodule(name)

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The tensors of the adapters of that name, by their names in a file."""
        return named_tensors(model, self.parts(model, name))

    def exchanged(self, model: nn.Module, name: str) -> list[str]:
        """The paths where a module had an adapter or copy of that name, and another module is now.

        A path that the model no longer has is left out.
        """
        present, exchanged = {id(module) for module in model.modules()}, []
        for path, modules in self._added.items():
            if name in modules and id(modules) not in present:
                with suppress(AttributeError):  # The layer was taken out.
                    current = added_modules(unwrapped(model.get_submodule(path)))
                    if current is None or name not in current:
                        exchanged.append(path)
        return exchanged

    def _check_heads(self, model: nn.Module, inputs: Any) -> None:
        """Warn once of each head with a copy in use that was exchanged or resized since then."""
        if self.active is None or torch.compiler.is_compiling():
            return
        for path, (parent, copies) in list(self._heads.items()):
            trained, original = copies._modules.get(self.active), copies.original_module
            current = parent._modules.get(path.rpartition(".")[2])
            if trained is None:
                continue
            if current is None or unwrapped(current) is not original:
                exchanged = path in self.exchanged(model, self.active)  # Else something wraps and calls it.
                change = "exchanged: its trained copy is used no more" if exchanged else ""
            elif any(vars(original).get(size) != vars(trained).get(size) for size in SIZES):
                change = "resized, and its trained copy, which is used in its place, was not"
            else:
                continue
            del self._heads[path]
            if change:
                advice = "Call resize_token_embeddings, or exchange a head, before inject"
                warnings.warn(f"{path} was {change}. {advice}", stacklevel=1)

    def _require_gradient(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Reentrant checkpointing gives gradients only to layers whose input requires one."""
        needs = torch.is_grad_enabled() and any([m.gradient_checkpointing and m.training for m in self._checkpointed])
        if needs and isinstance(output, Tensor) and not output.requires_grad:
            output.requires_grad_(True)


def add_adapters(model: nn.Module, name: str, config: CompacterConfig, prepared: Prepared) -> None:
    """Put prepared adapters into a model and activate them. The first ones freeze the model.

    After an error, such as of memory, the model is as before.
    """
    check_no_choice(model)
    if not isinstance(getattr(model, NAME, None), Injection):
        setattr(model, NAME, Injection(model))
        model.requires_grad_(False)
    injection = injection_of(model)
    try:
        injection.add(model, name, config, prepared)
    except BaseException:
        injection.remove(model, [name])
        raise


def injection_of(model: nn.Module) -> Injection:
    """The child `compacter` of the model inside all wrappers; ValueError if it has no adapters."""
    child = getattr(unwrapped(model), NAME, None)
    if not isinstance(child, Injection):
        raise ValueError(
            f"this {type(model).__name__} has no Compacter adapters; call compacter_kernels.inject first, "
            "or for adapters of peft the methods of the model itself"
        )
    return child


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules that turn inputs into hidden states, of the model and of the models inside it."""
    embeddings: dict[nn.Module, None] = {}
    for module in model.modules():
        with suppress(AttributeError, NotImplementedError):
            embedding = module.get_input_embeddings()  # type: ignore[operator]
            if isinstance(embedding, nn.Module):
                embeddings[embedding] = None
    return list(embeddings)


def freeze(parameter: nn.Parameter) -> None:
    """Exclude the parameter from new graphs; a graph that holds it still gives it a gradient.

    autograd drops the gradient of a leaf that does not require one when it arrives. So a hook of
    the graph's node for the parameter adds the gradient to `grad` before that. The node, and with
    it the hook, lives as long as a graph holds it.
    """
    if not parameter.requires_grad:
        return
    with torch.inference_mode(False):
        node = get_gradient_edge(parameter).node
        metadata: dict[str, bool] = node.metadata  # type: ignore[assignment]  # The stubs say that it is a method.
        if FREEZE not in metadata:
            metadata[FREEZE] = True
            node.register_prehook(functools.partial(_accumulate, parameter))
    parameter.requires_grad_(False)


def _accumulate(parameter: nn.Parameter, gradients: tuple[Tensor | None, ...]) -> None:
    gradient = gradients[0]
    if gradient is not None and not parameter.requires_grad:
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
