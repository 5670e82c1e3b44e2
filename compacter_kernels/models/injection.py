"""`inject`: adapters into a transformer, its own weights frozen."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Container, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from compacter_kernels.models.config import DTYPES, CompacterConfig
from compacter_kernels.models.shared import SharedWeights
from compacter_kernels.models.sites import Site, find_copied, find_sites
from compacter_kernels.models.slots import NAME, AdapterSlot, CopySlot, Slot, trained_copy
from compacter_kernels.models.wrappers import base_layer, check_injectable, check_outside_peft, unwrapped
from compacter_kernels.nn import CompacterAdapter

logger = logging.getLogger("compacter_kernels")
Model = TypeVar("Model", bound=nn.Module)


class Injection(nn.Module):
    """The child `compacter` of an injected model: its configs by name, and the weights that its adapters share."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shared = nn.ModuleDict()
        self.configs: dict[str, CompacterConfig] = {}
        self.active: str | None = None
        self.trained_before = {name for name, p in model.named_parameters() if p.requires_grad}
        self._checkpointed = tuple(m for m in model.modules() if hasattr(m, "gradient_checkpointing"))
        self._handles = [m.register_forward_hook(self._need_gradient) for m in _embeddings(model)]

    def _need_gradient(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Under reentrant checkpointing a layer whose input needs no gradient would give its adapters none."""
        needs = torch.is_grad_enabled() and any([m.gradient_checkpointing and m.training for m in self._checkpointed])
        if needs and isinstance(output, Tensor) and not output.requires_grad:
            output.requires_grad_(True)

    def detach(self) -> None:
        """Take the hooks off the model."""
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
    check_injectable(model)
    inner = unwrapped(model)
    present = getattr(inner, NAME, None)
    check_name(name, present.configs if isinstance(present, Injection) else ())
    place(inner, name, config, prepare(inner, config, impl))
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
    sites = find_sites(model, config)
    copied = find_copied(model, config)
    check_outside_peft(model, [site.write for site in sites], copied)
    for path, site in itertools.product(copied, sites):
        if f"{site.write}.".startswith(f"{path}."):
            raise ValueError(
                f"{path} holds {site.write}, which gets an adapter, and cannot be trained whole: see modules_to_save"
            )
    shared, adapters = _build(model, config, sites, impl, device)
    return Prepared(sites, shared, adapters, {path: trained_copy(model.get_submodule(path)) for path in copied})


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
        home, _, child = site.write.rpartition(".")
        slot = getattr(base_layer(write), NAME, None) or AdapterSlot(write, read, model.get_submodule(home), child)
        slot[name] = prepared.adapters[site.write].train(write.training)
    for path, module in prepared.copies.items():
        base = model.get_submodule(path)
        slot = getattr(base, NAME, None) or CopySlot(base)
        slot[name] = module
    if prepared.shared is not None:
        present.shared[name] = prepared.shared
    present.configs[name] = config
    activate(model, name)
    logger.info(
        "%d adapters and %d trained copies in %s", len(prepared.sites), len(prepared.copies), type(model).__name__
    )


def use(model: nn.Module, name: str | None) -> None:
    """Compute with the adapters of that name; with None, as the base does."""
    injection(model).active = name
    for _, slot in slots(model):
        slot.active = name


def activate(model: nn.Module, name: str) -> None:
    """Use and train the adapters of that name, and no others."""
    use(model, name)
    here = injection(model)
    for key, weights in here.shared.items():
        _train(weights, here.configs[key], key == name)
    for _, slot in slots(model):
        for key, module in slot.items():
            _train(module, here.configs[key], key == name)


def _train(module: nn.Module, config: CompacterConfig, on: bool) -> None:
    for path, parameter in module.named_parameters():
        fixed = not config.learn_phm and path.rpartition(".")[2].startswith("phm_rule")
        parameter.requires_grad_(on and not fixed)


def check_name(name: str, present: Container[str] = ()) -> None:
    """Raise ValueError for what cannot name adapters, or names some already."""
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(f"name must be a plain name of an adapter, such as 'default', got {name!r}")
    if name in present:
        raise ValueError(f"the model has adapters of the name {name!r} already; give another name=, or remove them")


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
    like = computes_like(model, module)
    try:
        return CompacterAdapter(
            width_of(model, module, site.write),
            reduction_factor=config.reduction_factor_of(site.layer),
            impl=impl,
            device=device or like.device,
            dtype=like.dtype if config.dtype is None else DTYPES[config.dtype],
            **config.of_each_adapter(),
        )
    except ValueError as error:
        raise ValueError(f"{site.write}: {error}") from error


def width_of(model: nn.Module, module: nn.Module, path: str) -> int:
    """The width of what a module puts out.

    Raises:
        ValueError: it is not known.
    """
    sizes = (getattr(module, "out_features", None), getattr(module, "nf", None))  # of a Linear, of GPT-2's Conv1D
    own = getattr(getattr(model, "config", None), "hidden_size", None)
    width = next((size for size in (*sizes, own) if isinstance(size, int)), None)
    if width is None:
        raise ValueError(f"{path} is a {type(module).__name__} whose width is unknown; name linear layers instead")
    return width


def computes_like(model: nn.Module, module: nn.Module) -> Tensor:
    """An empty tensor on the device of a module, in the dtype that it computes in, quantised or not."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    dtypes = [getattr(module, "compute_dtype", None), *(p.dtype for p in (*module.parameters(), *model.parameters()))]
    dtype = next((d for d in dtypes if isinstance(d, torch.dtype) and d.is_floating_point), torch.float32)
    return torch.empty(0, device=device, dtype=dtype)


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
