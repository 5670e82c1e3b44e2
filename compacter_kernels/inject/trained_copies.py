"""Trained copies of modules, layer norms and heads, which stand in for them.

The module of the base becomes an instance of a subclass whose `forward` asks the copies first. As `forward` is a
property there, a forward that another library puts on the instance, or takes off it (accelerate), stays the base's.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compacter_kernels.inject.hidden_states import map_tensors
from compacter_kernels.inject.offload import ATTRIBUTES, in_place
from compacter_kernels.inject.target_adapters import AddedModules, added_modules
from compacter_kernels.nn.partitioned import gathered
from compacter_kernels.targets.added import NAME

OWN_FORWARD = "_forward_of_the_instance"
PLAIN = "_class_without_copies"


class TrainedCopies(AddedModules):
    """Trained copies of a module, which stand in for it; it keeps its own weights."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, so that it is no child
        self._casts: set[str] = set()
        own = vars(base).pop("forward", None)
        if not hasattr(type(base), PLAIN):
            base.__class__ = class_with_copies(type(base))
        if own is not None:
            base.forward = own
        setattr(base, NAME, self)

    @property
    def original_module(self) -> nn.Module:
        """The module that the copies stand in for."""
        return self._base[0]

    def add_copy(self, name: str, trained: nn.Module, casts: bool) -> None:
        """Take a copy in. casts: its parameters may have another dtype than the module's."""
        self[name] = trained
        if casts:
            self._casts.add(name)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._casts.discard(name)

    def call_copy(self, trained: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the copy makes of a call: in its own dtype, its output in the module's; autocast has dtypes of its own.

        So a float32 layer norm fits into a float16 model.
        """
        if self.active in self._casts:
            theirs, ours = next(trained.parameters()), next(self.original_module.parameters())
            if theirs.dtype != ours.dtype and not torch.is_autocast_enabled(theirs.device.type):
                args, kwargs = map_tensors(_cast(ours.dtype, theirs.dtype), (args, kwargs))
                return map_tensors(_cast(theirs.dtype, ours.dtype), trained(*args, **kwargs))
        return trained(*args, **kwargs)

    def detach(self) -> None:
        """Leave the base's module as it was."""
        base = self.original_module
        delattr(base, NAME)
        if PLAIN in vars(type(base)):  # else a subclass, made by sharding or a parametrization: it computes the same
            base.__class__ = getattr(type(base), PLAIN)
            if OWN_FORWARD in vars(base):
                base.forward = vars(base).pop(OWN_FORWARD)


def _cast(before: torch.dtype, after: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.to(after) if tensor.dtype == before else tensor


def _stand_in(module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module's forward: that of the copy in use, else the plain one."""
    slot = module._modules.get(NAME)
    trained = slot.in_use() if isinstance(slot, TrainedCopies) else None
    if trained is None:
        return plain(*args, **kwargs)
    return slot.call_copy(trained, args, kwargs)  # type: ignore[union-attr, operator]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def class_with_copies(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class, of the same name, that asks the copies first. It is pickled by its base."""
    if plain in _classes:
        return _classes[plain]

    def forward(self: Any) -> Callable[..., Any]:
        own = self.__dict__.get(OWN_FORWARD)
        return functools.partial(_stand_in, self, super(made, self).forward if own is None else own)

    def set_forward(self: Any, value: Callable[..., Any]) -> None:
        while isinstance(value, functools.partial) and value.func is _stand_in:  # it was read here before
            value = value.args[1]
        self.__dict__[OWN_FORWARD] = value

    def delete_forward(self: Any) -> None:
        if self.__dict__.pop(OWN_FORWARD, None) is None:
            raise AttributeError("forward")

    def reduce(self: Any, protocol: int) -> Any:
        reduced = super(made, self).__reduce_ex__(max(protocol, 2))
        if type(self) is made and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_blank, (plain,), *reduced[2:])
        return reduced

    members = {
        PLAIN: plain,
        "forward": property(forward, set_forward, delete_forward),
        "__reduce_ex__": reduce,
        **{name: getattr(plain, name) for name in ("__doc__", "__module__", "__qualname__")},
    }
    made: type[nn.Module] = types.new_class(plain.__name__, (plain,), exec_body=lambda names: names.update(members))
    return _classes.setdefault(plain, made)


def _blank(plain: type[nn.Module]) -> nn.Module:
    """An instance without content, for pickle to fill."""
    made = class_with_copies(plain)
    return made.__new__(made)


def trained_copy(base: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a module, in that dtype or its own, without what stands beside it, its parameters trained.

    A forward that was put on the instance goes with it where it is a method of the module, and else stays behind.

    Raises:
        ValueError: it has no floating parameters, or others as well; it holds adapters or copies.
    """
    floating = [p.is_floating_point() for name, p in base.named_parameters() if not name.startswith(f"{NAME}.")]
    if not floating or not all(floating):
        raise ValueError(f"a {type(base).__name__} of no or of quantised parameters cannot be trained; leave it out")
    slot = added_modules(base)
    if any(isinstance(part, AddedModules) and part is not slot for part in base.modules()):
        raise ValueError(f"a {type(base).__name__} that holds adapters or trained copies cannot be trained whole")
    stays = object()
    parts = tuple(part for name, part in base.named_modules() if not f"{name}.".startswith(f"{NAME}."))
    memo = {id(vars(part)[name]): stays for part in parts for name in _of_the_instance(part)}
    if slot is not None:
        memo[id(slot)] = stays
    with in_place(parts), gathered(base.parameters()):
        copied: nn.Module = copy.deepcopy(base, memo)
    copied._modules.pop(NAME, None)
    for part in copied.modules():
        for name in [name for name, value in vars(part).items() if value is stays]:
            del vars(part)[name]
    if PLAIN in vars(type(base)):
        copied.__class__ = getattr(type(base), PLAIN)
    if OWN_FORWARD in vars(copied):
        copied.forward = vars(copied).pop(OWN_FORWARD)
    _drop_hooks(copied)
    return copied.to(dtype).requires_grad_(True)


def _drop_hooks(copied: nn.Module) -> None:
    """The module's hooks run when it is called, and it hands over to the copy: only those that make weights stay."""
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
        hooks = vars(copied)[name]
        for key in [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")]:
            del hooks[key]


def _of_the_instance(module: nn.Module) -> list[str]:
    """The attributes by which a library changed what this one instance does, and which a copy would share with it."""
    found = [name for name in (*ATTRIBUTES, "forward", OWN_FORWARD) if name in vars(module)]
    hooked = ATTRIBUTES[0] in found
    return [name for name in found if hooked or getattr(vars(module)[name], "__self__", None) is not module]
