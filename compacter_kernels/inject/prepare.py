"""Builds what `inject` adds to a model, so that errors are raised before the model changes."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compacter_kernels.config import DTYPES, AdapterConfig, CompacterConfig
from compacter_kernels.inject.embedding_adapters import EmbeddingAdapters
from compacter_kernels.inject.keys import SHARED_PATH, named_tensors
from compacter_kernels.inject.offload import device_of
from compacter_kernels.inject.target_adapters import TargetAdapters
from compacter_kernels.inject.trained_copies import TrainedCopies, trained_copy
from compacter_kernels.nn import CompacterAdapter
from compacter_kernels.nn.initialisation import reset_rule
from compacter_kernels.targets.added import NAME, Added, AddedModules, adapters_of, added_modules
from compacter_kernels.targets.embeddings import embedding_targets
from compacter_kernels.targets.find import Target, find_modules_to_save, find_targets
from compacter_kernels.targets.wrappers import check_outside_peft, unwrapped


def shared_names(adapter: CompacterAdapter, config: CompacterConfig) -> dict[str, dict[str, str]]:
    """The names of shared weights, for each projection by its own name of them."""
    rule_names = adapter.down.rule_names() if config.shared_phm_rule else ()
    factor_names = adapter.down.factor_names() if config.shared_W_phm else ()
    return {
        projection: {name: name.replace("W", f"W_{projection}") for name in (*rule_names, *factor_names)}
        for projection in ("down", "up")
    }


class SharedWeights(nn.Module):
    """Owns the shared parameters, for example phm_rule, W_down_left and W_up_right.

    The adapters borrow them (`PHMLinear.borrow`) and hold none, so that each is saved, counted and
    sharded once. Names are those of `shared_parameters` in the `adapters` library.
    """

    def __init__(self, adapter: CompacterAdapter, config: CompacterConfig) -> None:
        """Take over the parameters of the first adapter."""
        super().__init__()
        self.names = shared_names(adapter, config)
        for projection, names in self.names.items():
            for name, shared_name in names.items():
                self.register_parameter(shared_name, getattr(getattr(adapter, projection), name))
        if config.shared_phm_rule:
            rules = [getattr(self, name) for name in adapter.down.rule_names()]
            reset_rule(rules, config.phm_init_range, config.phm_c_init)


class Prepared(NamedTuple):
    """Adapters and trained copies that are not yet in the model, by the path of their module."""

    targets: list[Target]
    shared: SharedWeights | None
    adapters: dict[str, CompacterAdapter]
    copies: dict[str, nn.Module]

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """All tensors, by their names in a file."""
        parts = [] if self.shared is None else [(SHARED_PATH, self.shared)]
        beside = (*self.adapters.items(), *self.copies.items())
        return named_tensors(model, (*parts, *((f"{path}.{NAME}", module) for path, module in beside)))

    def allocate(self, model: nn.Module) -> None:
        """Move adapters from meta to the devices of their targets. Their values are undefined."""
        devices = [device_of(model.get_submodule(target.write)) for target in self.targets]
        for target, device in zip(self.targets, devices, strict=True):
            self.adapters[target.write].to_empty(device=device)
        if self.shared is not None:
            self.shared.to_empty(device=devices[0])


def prepare(model: nn.Module, config: CompacterConfig, impl: str, device: str | None = None) -> Prepared:
    """Build what the config asks for, on that device or each target's own; raise as `inject`."""
    check_nested(model)
    targets = find_targets(model, config)
    if config.embedding_adapter:
        targets = [*embedding_targets(model, targets), *targets]
    copied = find_modules_to_save(model, config)
    adapted = [target.write for target in targets]
    check_outside_peft(model, adapted, copied)
    check_child_names(model, (*adapted, *copied))
    check_adapted_or_copied(model, adapted, copied)
    check_taken(model, targets)
    shared: SharedWeights | None = None
    adapters: dict[str, CompacterAdapter] = {}
    for target in targets:
        check_residual(config, target)
        adapter = build_adapter(model, config, target, impl, device)
        if shared is None and (config.shared_phm_rule or config.shared_W_phm):
            shared = SharedWeights(adapter, config)
        if shared is not None:
            for projection, names in shared.names.items():
                getattr(adapter, projection).borrow(shared, **names)
        adapters[target.write] = adapter
    dtype = DTYPES.get(config.dtype or "")
    copies = {path: trained_copy(unwrapped(model.get_submodule(path)), path, dtype) for path in copied}
    return Prepared(targets, shared, adapters, copies)


def check_residual(config: AdapterConfig, target: Target) -> None:
    """Raise ValueError for an adapter that needs the residual of its block, if it is not known."""
    if config.original_ln_before and not target.residual and not target.like:
        raise ValueError(
            f"original_ln_before=True needs the residual of the block that {target.write} ends, which the table of "
            "compacter_kernels does not say for it; leave target_modules out for a model of the table"
        )


def build_adapter(
    model: nn.Module, config: CompacterConfig, target: Target, impl: str, device: str | None
) -> CompacterAdapter:
    """The adapter of a target, on that device or the target's own; ValueError if it cannot be."""
    options, path = config.of_each_adapter(), target.like or target.write
    module = unwrapped(model.get_submodule(path))
    like, width = computes_like(model, module), width_of(model, module, path)
    if target.like:
        options |= {"add_residual": True, "ln_before": True}
    elif config.is_parallel:
        read = unwrapped(model.get_submodule(target.read))
        sizes = (getattr(read, "in_features", None), getattr(read, "nx", None))
        read_width = next((size for size in sizes if isinstance(size, int)), width)
        if read_width != width:
            raise ValueError(
                f"is_parallel: {target.read} takes {read_width} numbers and {target.write} gives {width}, which is no "
                "block that a parallel adapter could stand beside. Name whole blocks in target_modules, leave it out "
                "for a model of the table, or set is_parallel=False"
            )
    try:
        return CompacterAdapter(
            width,
            reduction_factor=config.reduction_factor_of(target.layer),
            impl=impl,
            device=device or like.device,
            dtype=DTYPES.get(config.dtype or "", like.dtype),
            **options,
        )
    except ValueError as error:
        raise ValueError(f"{target.write}: {error}") from error


def width_of(model: nn.Module, module: nn.Module, path: str) -> int:
    """The width of a module's output; ValueError if it is unknown."""
    sizes = (getattr(module, "out_features", None), getattr(module, "nf", None))  # Linear, GPT-2's Conv1D
    hidden_size = getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(module, nn.MultiheadAttention):
        hidden_size = module.embed_dim
    width = next((size for size in (*sizes, hidden_size) if isinstance(size, int)), None)
    if width is None:
        raise ValueError(f"{path} is a {type(module).__name__} whose width is unknown; name linear layers instead")
    return width


def computes_like(model: nn.Module, module: nn.Module) -> Tensor:
    """An empty tensor with the device and the floating dtype that a module computes with."""
    dtypes = [getattr(module, "compute_dtype", None), *(p.dtype for p in (*module.parameters(), *model.parameters()))]
    dtype = next((d for d in dtypes if isinstance(d, torch.dtype) and d.is_floating_point), torch.float32)
    return torch.empty(0, device=device_of(module), dtype=dtype)


def check_taken(model: nn.Module, targets: Iterable[Target]) -> None:
    """Check that no module has adapters of its input and, by another name, of its output."""
    for target in targets:
        existing = added_modules(unwrapped(model.get_submodule(target.write)))
        if existing is not None and isinstance(existing, EmbeddingAdapters) != bool(target.like):
            raise ValueError(
                f"{target.write} would have an adapter of its output and an embedding adapter of its input, of "
                f"another name ({', '.join(existing)}); remove one of them"
            )


def check_name(name: str, existing: Container[str] = ()) -> None:
    """Check that new adapters can have this name."""
    plain = isinstance(name, str) and name.isidentifier() and not name.startswith("_")
    if not plain or any(hasattr(kind, name) for kind in (TargetAdapters, TrainedCopies, nn.Module())):
        raise ValueError(
            f"name must be a plain name of an adapter, such as 'default', and none that modules of torch use "
            f"themselves; got {name!r}"
        )
    if name in existing:
        raise ValueError(f"the model has adapters of the name {name!r} already; give another name=, or remove them")


def check_child_names(model: nn.Module, paths: Iterable[str]) -> None:
    """Check that neither the model nor these modules have their own child named `compacter`."""
    for path in ("", *paths):
        if not isinstance(getattr(unwrapped(model.get_submodule(path)), NAME, None), Added | None):
            child = f"{path}.{NAME}" if path else NAME
            raise ValueError(f"the model has a {child} of its own, the name under which adapters go; rename it")


def check_nested(model: nn.Module) -> None:
    """Check that no part of the model, and no model that it is part of, has its own adapters."""
    existing = adapters_of(model)
    inside = [(name.rpartition(".")[0], part) for name, part in model.named_modules() if isinstance(part, Added)]
    for path, part in inside:
        if not isinstance(part, AddedModules) and part is not existing:
            raise ValueError(
                f"{path} has adapters of its own, as inject was called for it alone: go on with inject(model.{path}, "
                f"name=...), or call remove_adapters(model.{path}) first"
            )
    if existing is None and inside:
        raise ValueError(
            f"{inside[0][0] or 'it'} has adapters already, of a model that this {type(model).__name__} is part of: go "
            "on with that one, or call remove_adapters for it first"
        )


def check_adapted_or_copied(model: nn.Module, adapted: Sequence[str], copied: Sequence[str]) -> None:
    """Check that no module has both an adapter and a trained copy, of this name or of another."""
    for path, write in itertools.product(copied, adapted):
        if f"{write}.".startswith(f"{path}."):
            raise ValueError(
                f"{path} holds {write}, which gets an adapter, and cannot be trained whole: see modules_to_save"
            )
    for paths, kind, other in ((adapted, TargetAdapters, "trained copies"), (copied, TrainedCopies, "adapters")):
        for path in paths:
            modules = added_modules(unwrapped(model.get_submodule(path)))
            if modules is not None and not isinstance(modules, kind):
                raise ValueError(f"{path} has {other} already ({', '.join(modules)}); it cannot have both")
