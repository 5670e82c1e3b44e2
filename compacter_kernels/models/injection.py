"""`inject`: adapters into a transformer, its own weights frozen."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from compacter_kernels.models.config import DTYPES, CompacterConfig
from compacter_kernels.models.copies import CopySlot, trained_copy
from compacter_kernels.models.fast_path import FastPath
from compacter_kernels.models.freeze import freeze
from compacter_kernels.models.lost import Watch
from compacter_kernels.models.obstacles import check_beside, check_name, check_nested, check_own_names
from compacter_kernels.models.offload import device_of
from compacter_kernels.models.shared import SharedWeights
from compacter_kernels.models.sites import Site, find_copied, find_sites, is_layer_norm
from compacter_kernels.models.slots import NAME, AdapterSlot, Added, Slot, slot_of
from compacter_kernels.nn import CompacterAdapter

logger = logging.getLogger("compacter_kernels")
Model = TypeVar("Model", bound=nn.Module)


class Injection(Added, nn.Module):
    """The child `compacter` of an injected model: its configs by name, and the weights that its adapters share."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shared = nn.ModuleDict()
        self.configs: dict[str, CompacterConfig] = {}
        self.active: str | None = None
        self.trained_before = {plain(name) for name, p in model.named_parameters() if p.requires_grad}
        self.placed: dict[str, Slot] = {}
        self.fast_path = FastPath(model)
        self.watch = Watch()
        self._checkpointed = tuple(m for m in model.modules() if hasattr(m, "gradient_checkpointing"))
        self._handles = [m.register_forward_hook(self._need_gradient) for m in _embeddings(model)]
        self._handles.append(model.register_forward_pre_hook(self._look))

    def slots(self) -> set[Slot]:
        """What stands beside modules of the model, those too that were exchanged since."""
        return set(self.placed.values())

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
    found = getattr(model, NAME, None)
    if not isinstance(found, Injection):
        raise ValueError(f"this {type(model).__name__} has no Compacter adapters; call compacter_kernels.inject first")
    return found


def plain(path: str) -> str:
    """The name of a module or parameter in a model itself, where torch.compile has wrapped it."""
    return path.replace("_orig_mod.", "")


def slots(model: nn.Module) -> Iterator[tuple[str, Slot]]:
    """The slots of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Slot))


def inject(model: Model, config: CompacterConfig | None = None, *, name: str = "default", impl: str = "auto") -> Model:
    """Put Compacter adapters into a transformers model and freeze the rest of it; they become its active ones.

    Args:
        model: any model of the table in `compacter_kernels.models.architectures`, or with `config.target_modules` any
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
    present = getattr(model, NAME, None)
    check_name(name, present.configs if isinstance(present, Injection) else ())
    place(model, name, config, prepare(model, config, impl))
    return model


class Prepared(NamedTuple):
    """All that adapters need, built apart from the model: it is unchanged until they are placed."""

    sites: list[Site]
    shared: SharedWeights | None
    adapters: dict[str, CompacterAdapter]
    copies: dict[str, nn.Module]


def prepare(model: nn.Module, config: CompacterConfig, impl: str, device: str | None = None) -> Prepared:
    """Build what the config asks for, the adapters on that device or by default on those of the layers they follow.

    Raises:
        TypeError, ValueError: as `inject`.
    """
    check_nested(model)
    sites = find_sites(model, config)
    copied = find_copied(model, config)
    adapted = [site.write for site in sites]
    check_own_names(model, (*adapted, *copied))
    check_beside(model, adapted, copied)
    for path, site in itertools.product(copied, sites):
        if f"{site.write}.".startswith(f"{path}."):
            raise ValueError(
                f"{path} holds {site.write}, which gets an adapter, and cannot be trained whole: see modules_to_save"
            )
    shared, adapters = _build(model, config, sites, impl, device)
    return Prepared(sites, shared, adapters, {path: _copy(model, path, config) for path in copied})


def _copy(model: nn.Module, path: str, config: CompacterConfig) -> nn.Module:
    try:
        return trained_copy(model.get_submodule(path), None if config.dtype is None else DTYPES[config.dtype])
    except ValueError as error:
        raise ValueError(f"modules_to_save: {path}: {error}") from error


def to_device_of(model: nn.Module, prepared: Prepared) -> None:
    """Give adapters that were built on meta memory beside the layers they follow, its values undefined."""
    for site in prepared.sites:
        device = computes_like(model, model.get_submodule(site.write)).device
        prepared.adapters[site.write].to_empty(device=device)
        if prepared.shared is not None and site is prepared.sites[0]:
            prepared.shared.to_empty(device=device)


def place(model: nn.Module, name: str, config: CompacterConfig, prepared: Prepared) -> None:
    """Put the prepared adapters and copies into the model and activate them."""
    present = getattr(model, NAME, None)
    if not isinstance(present, Injection):
        present = Injection(model)
        setattr(model, NAME, present)
        model.requires_grad_(False)
    for site in prepared.sites:
        write, read = model.get_submodule(site.write), model.get_submodule(site.read)
        slot: Any = slot_of(write) or AdapterSlot(write)
        slot.put_adapter(name, prepared.adapters[site.write].train(write.training), read, prepared.shared)
        present.placed[plain(site.write)] = slot
    for path, module in prepared.copies.items():
        base = model.get_submodule(path)
        slot = slot_of(base) or CopySlot(base)
        slot.put_copy(name, module, config.dtype is not None)
        present.placed[plain(path)] = slot
        if not is_layer_norm(base):
            present.watch.add(plain(path), model.get_submodule(path.rpartition(".")[0]), slot)
    present.fast_path.allow(True)
    present.fast_path = FastPath(model)
    if prepared.shared is not None:
        present.shared[name] = prepared.shared
    present.configs[name] = config
    activate(model, name)
    logger.info(
        "%d adapters and %d trained copies in %s", len(prepared.sites), len(prepared.copies), type(model).__name__
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


def _build(
    model: nn.Module, config: CompacterConfig, sites: list[Site], impl: str, device: str | None
) -> tuple[SharedWeights | None, dict[str, CompacterAdapter]]:
    """All adapters, and what they share, apart from the model."""
    shared: SharedWeights | None = None
    adapters: dict[str, CompacterAdapter] = {}
    for site in sites:
        module = model.get_submodule(site.write)
        adapter = _adapter(model, module, config, site, impl, device)
        if shared is None and (config.shared_phm_rule or config.shared_W_phm):
            shared = SharedWeights(adapter, config)
        if shared is not None:
            shared.lend(adapter)
        adapters[site.write] = adapter
    return shared, adapters


def _adapter(
    model: nn.Module, module: nn.Module, config: CompacterConfig, site: Site, impl: str, device: str | None
) -> CompacterAdapter:
    like, width = computes_like(model, module), width_of(model, module, site.write)
    if config.is_parallel:
        _check_parallel(model.get_submodule(site.read), site, width)
    try:
        return CompacterAdapter(
            width,
            reduction_factor=config.reduction_factor_of(site.layer),
            impl=impl,
            device=device or like.device,
            dtype=like.dtype if config.dtype is None else DTYPES[config.dtype],
            **config.of_each_adapter(),
        )
    except ValueError as error:
        raise ValueError(f"{site.write}: {error}") from error


def _check_parallel(read: nn.Module, site: Site, width: int) -> None:
    sizes = (getattr(read, "in_features", None), getattr(read, "nx", None))
    taken = next((size for size in sizes if isinstance(size, int)), width)
    if taken != width:
        raise ValueError(
            f"is_parallel: {site.read} takes {taken} numbers and {site.write} gives {width}, which is no block that a "
            "parallel adapter could stand beside. Name whole blocks in target_modules, leave it out for a model of the "
            "table, or set is_parallel=False"
        )


def width_of(model: nn.Module, module: nn.Module, path: str) -> int:
    """The width of what a module puts out.

    Raises:
        ValueError: it is not known.
    """
    sizes = (getattr(module, "out_features", None), getattr(module, "nf", None))  # of a Linear, of GPT-2's Conv1D
    own = getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(module, nn.MultiheadAttention):
        own = module.embed_dim
    width = next((size for size in (*sizes, own) if isinstance(size, int)), None)
    if width is None:
        raise ValueError(f"{path} is a {type(module).__name__} whose width is unknown; name linear layers instead")
    return width


def computes_like(model: nn.Module, module: nn.Module) -> Tensor:
    """An empty tensor on the device of a module, in the dtype that it computes in, quantised or not."""
    dtypes = [getattr(module, "compute_dtype", None), *(p.dtype for p in (*module.parameters(), *model.parameters()))]
    dtype = next((d for d in dtypes if isinstance(d, torch.dtype) and d.is_floating_point), torch.float32)
    return torch.empty(0, device=device_of(module), dtype=dtype)


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
