"""What to do with the adapters of a model: switch, count, train, remove them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from compacter_kernels.inject.fast_path import FastPath
from compacter_kernels.inject.injection import activate, injection, use
from compacter_kernels.nn.partitioned import full_shape
from compacter_kernels.targets.added import NAME, Added
from compacter_kernels.targets.wrappers import plain_path, unwrapped


class Count(NamedTuple):
    """How many numbers train, of how many that the base has."""

    trainable: int
    base: int

    def __str__(self) -> str:
        share = f" ({100 * self.trainable / self.base:.3f} %)" if self.base else ""
        return f"{self.trainable:,} trainable of {self.base:,}{share}"


def known(model: nn.Module, name: str) -> str:
    """The name, of adapters that the model has.

    Raises:
        ValueError: a model without adapters, or without these.
    """
    names = injection(model).configs
    if name not in names:
        raise ValueError(f"the model has no adapters of the name {name!r}; it has {', '.join(names)}")
    return name


def set_adapter(model: nn.Module, name: str) -> None:
    """Use and train the adapters of that name; the others stay where they are, unused and frozen.

    A loss that was computed before still gives its gradients to the adapters that it was computed with.

    Raises:
        ValueError: a model without adapters, or without these.
    """
    activate(model, known(model, name))


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within it the model computes what its base does, bit by bit.

    Raises:
        ValueError: a model without adapters.
    """
    before = injection(model).active
    use(model, None)
    try:
        yield
    finally:
        use(model, before)


def remove_adapters(model: nn.Module, name: str | None = None) -> None:
    """Take out the adapters of that name, or all; without any the model is as it was before `inject`.

    Raises:
        ValueError: a model without adapters, or without these.
    """
    model = unwrapped(model)
    here = injection(model)
    for key in list(here.configs) if name is None else [known(model, name)]:
        del here.configs[key]
        if key in here.shared:
            del here.shared[key]
        for slot in here.slots():
            if key in slot:
                del slot[key]
    here.fast_path.allow(True)
    for slot in here.slots():
        if not len(slot):
            slot.detach()
    here.placed = {path: slot for path, slot in here.placed.items() if len(slot)}
    here.fast_path = FastPath(model)
    if here.configs:
        activate(model, here.active if here.active in here.configs else next(iter(here.configs)))
        return
    here.detach()
    delattr(model, NAME)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(plain_path(model, path) in here.trained_before)


def adapter_parameters(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of all that belongs to the adapters of that name, by default the active ones, each once.

    Shared weights, trained layer norms and heads included.

    Raises:
        ValueError: a model without adapters, or without these.
    """
    here = injection(model)
    name = here.active if name is None else known(model, name)
    for path, module in here.parts(model, name) if name is not None else ():
        for key, parameter in module.named_parameters():
            yield f"{path}.{name}.{key}", parameter


def count_parameters(model: nn.Module) -> Count:
    """The numbers that train, and those of the base: the model without adapters. Sharded parameters count as a whole.

    Raises:
        ValueError: a model without adapters.
    """
    injection(model)
    added = {id(p) for module in model.modules() if isinstance(module, Added) for p in module.parameters()}
    sizes = [(p, full_shape(p).numel()) for p in model.parameters()]
    trainable = sum(size for p, size in sizes if p.requires_grad)
    return Count(trainable, sum(size for p, size in sizes if id(p) not in added))


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many numbers train, of how many, such as `161,728 trainable of 222,882,048 (0.073 %)`.

    Raises:
        ValueError: a model without adapters.
    """
    print(count_parameters(model))
