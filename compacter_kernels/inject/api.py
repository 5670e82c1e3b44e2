"""The public functions: inject adapters into a model, then switch, count, list and remove them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from torch import nn

from compacter_kernels.config import CompacterConfig
from compacter_kernels.inject.injection import add_adapters, injection_of
from compacter_kernels.inject.prepare import check_name, prepare
from compacter_kernels.nn.partitioned import full_shape
from compacter_kernels.targets.added import Added, adapters_of
from compacter_kernels.targets.wrappers import check_injectable, unwrapped

Model = TypeVar("Model", bound=nn.Module)


class Count(NamedTuple):
    """The number of trained parameters, and the number of parameters of the base."""

    trainable: int
    base: int

    def __str__(self) -> str:
        share = f" ({100 * self.trainable / self.base:.3f} %)" if self.base else ""
        return f"{self.trainable:,} trainable of {self.base:,}{share}"


def inject(model: Model, config: CompacterConfig | None = None, *, name: str = "default", impl: str = "auto") -> Model:
    """Put Compacter adapters into a transformers model, activate them and freeze all other weights.

    Args:
        model: any model that the table in `compacter_kernels.targets.architectures` lists, or any
            module if `config.target_modules` is given. Its own parameters keep their names and
            values.
        config: a `CompacterConfig` (the default) or a `CompacterPlusPlusConfig`.
        name: the name of these adapters. Call again with another name to add others, see
            `set_adapter`.
        impl: see `compacter_kernels.compacter_adapter`.

    Returns:
        The model itself. Each adapter has the device and the floating dtype of the layer that it
        follows.

    Raises:
        TypeError, ValueError: the model is unchanged, and the message says what would be accepted.
        RuntimeError: the model is in a context of `route` or `mix`, and unchanged.
    """
    config = CompacterConfig() if config is None else config
    if not isinstance(config, CompacterConfig):
        raise TypeError(
            f"config must be a CompacterConfig, got {type(config).__name__}; "
            "None stands for CompacterConfig(), and a BottleneckConfig is for peft"
        )
    config = dataclasses.replace(config)  # What is changed in the given one later is not of these adapters.
    check_injectable(model)
    inner = unwrapped(model)
    existing = adapters_of(inner)
    check_name(name, existing.configs if existing is not None else ())
    add_adapters(inner, name, config, prepare(inner, config, impl))
    return model


def set_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Use and train the adapters of that name. The others stay in the model, unused and frozen.

    name: one, or several, of which the first is used and all are trained, as `route` and `mix` can.

    A loss that was computed before still gives gradients to the adapters that it was computed with,
    except under gradient checkpointing, which computes the forward again.
    Raises ValueError if the model has no adapters of that name.
    """
    injection = injection_of(model)
    names = [name] if isinstance(name, str) else list(name)
    if not names:
        raise ValueError("name is empty; give the name of the adapters to use, or several")
    injection.activate(*[injection.require(each) for each in names])


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which a model computes as its base, bit by bit; ValueError without adapters.

    Adapters that are activated within it stay active after it.
    """
    injection = injection_of(model)
    before = injection.active
    injection.use(None)
    try:
        yield
    finally:
        if injection.active is None:
            injection.resume(before)


def remove_adapters(model: nn.Module, name: str | None = None) -> None:
    """Take out the adapters of that name, or all. After the last, the model is as before `inject`.

    Raises ValueError if the model has no adapters of that name, or none at all, and RuntimeError
    within a context of `route` or `mix`.
    """
    injection = injection_of(model)
    injection.remove(unwrapped(model), list(injection.configs) if name is None else [injection.require(name)])


def adapter_parameters(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter of the adapters of that name, by default the active ones, with its name.

    These include shared weights and the trained copies of layer norms and heads. None comes twice.
    Raises ValueError if the model has no adapters of that name, or none at all.
    """
    injection = injection_of(model)
    name = injection.active if name is None else injection.require(name)
    for path, module in injection.parts(model, name) if name is not None else ():
        for key, parameter in module.named_parameters():
            yield f"{path}.{name}.{key}", parameter


def count_parameters(model: nn.Module) -> Count:
    """Count the trained parameters and those of the base, the model without adapters.

    A sharded parameter counts with its full size. Raises ValueError if the model has no adapters.
    """
    injection_of(model)
    added = {id(p) for module in model.modules() if isinstance(module, Added) for p in module.parameters()}
    sizes = [(p, full_shape(p).numel()) for p in model.parameters()]
    trainable = sum(size for p, size in sizes if p.requires_grad)
    return Count(trainable, sum(size for p, size in sizes if id(p) not in added))


def print_trainable_parameters(model: nn.Module) -> None:
    """Print both counts, such as `161,728 trainable of 222,882,048 (0.073 %)`; raise like them."""
    print(count_parameters(model))
