"""Trained copies of layer norms, heads and other modules, which compute instead of the originals.

The original module gets a subclass of its class, whose `forward` calls the copy in use. `forward`
is a property of that subclass: where another library, such as accelerate, sets or deletes the
`forward` of the instance, this changes only how the original computes.
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
from compacter_kernels.inject.offload import HOOK, OLD_FORWARD, onloaded
from compacter_kernels.nn.choice import Chosen, copied
from compacter_kernels.nn.partitioned import gathered
from compacter_kernels.targets.added import NAME, AddedModules, added_modules

INSTANCE_FORWARD = "_forward_of_the_instance"
ORIGINAL_CLASS = "_class_without_copies"


class TrainedCopies(AddedModules):
    """The trained copies of a module, by adapter name, like peft's ModulesToSaveWrapper."""

    holds_adapters = False

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # The tuple keeps the original from becoming a child.
        self._casts: dict[str, bool] = {}
        with_copies = type(original) if hasattr(original, ORIGINAL_CLASS) else class_with_copies(type(original))
        forward = vars(original).pop("forward", None)
        original.__class__ = with_copies
        if forward is not None:
            original.forward = forward
        setattr(original, NAME, self)

    @property
    def original_module(self) -> nn.Module:
        """The module that the copies are copies of."""
        return self._original[0]

    def add_copy(self, name: str, trained: nn.Module, casts: bool) -> None:
        """Add a copy. casts: its parameters may have another dtype than the original's."""
        self[name] = trained
        self._casts[name] = casts

    def call_copy(
        self, trained: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None
    ) -> Any:
        """Call the copy, of that name or the active one, in its own dtype.

        The output gets the original's dtype. So a float32 layer norm can work in a float16 model.
        Autocast chooses its own dtypes.
        """
        name = self.active if name is None else name
        if self._casts[name]:  # type: ignore[index]
            inner, outer = (next(module.parameters()) for module in (trained, self.original_module))
            if inner.dtype != outer.dtype and not torch.is_autocast_enabled(inner.device.type):
                args, kwargs = map_tensors(_cast(outer.dtype, inner.dtype), (args, kwargs))
                return map_tensors(_cast(inner.dtype, outer.dtype), trained(*args, **kwargs))
        return trained(*args, **kwargs)

    def call_chosen(
        self, chosen: Chosen, original_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the original, and the copy of each sample's adapter."""
        y = original_forward(*args, **kwargs)
        if not chosen.parts:
            return y
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor) or not isinstance(y, torch.Tensor):
            kind = type(self.original_module).__name__
            raise TypeError(f"route, mix: a {kind} that is trained whole must take a single tensor, by position")
        return copied(chosen, args[0], y, lambda name, x: self.call_copy(self[name], (x,), {}, name))

    def detach(self) -> None:
        """Restore the class and the `forward` of the original."""
        delattr(self.original_module, NAME)
        restore_class(self.original_module)


def restore_class(module: nn.Module) -> None:
    """Undo `class_with_copies` for an instance.

    A subclass that sharding or a parametrization has made stays: it computes the same.
    """
    if ORIGINAL_CLASS in vars(type(module)):
        module.__class__ = getattr(type(module), ORIGINAL_CLASS)
        if INSTANCE_FORWARD in vars(module):
            module.forward = vars(module).pop(INSTANCE_FORWARD)


def _cast(before: torch.dtype, after: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.to(after) if tensor.dtype == before else tensor


def _call(module: nn.Module, original_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a module with copies: call the copy in use, or else the original's forward."""
    copies = added_modules(module)
    if isinstance(copies, TrainedCopies) and copies.chosen_adapters is not None and copies.active is not None:
        return copies.call_chosen(copies.chosen_adapters, original_forward, args, kwargs)
    trained = copies.in_use() if isinstance(copies, TrainedCopies) else None
    if trained is None:
        return original_forward(*args, **kwargs)
    return copies.call_copy(trained, args, kwargs)  # type: ignore[union-attr, operator]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def class_with_copies(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the same name that calls the copy in use. pickle stores the original class."""
    if original in _classes:
        return _classes[original]

    def get_forward(self: Any) -> Callable[..., Any]:
        forward = self.__dict__.get(INSTANCE_FORWARD)
        return functools.partial(_call, self, super(made, self).forward if forward is None else forward)

    def set_forward(self: Any, forward: Callable[..., Any]) -> None:
        while isinstance(forward, functools.partial) and forward.func is _call:  # It was read from this property.
            forward = forward.args[1]
        self.__dict__[INSTANCE_FORWARD] = forward

    def delete_forward(self: Any) -> None:
        if self.__dict__.pop(INSTANCE_FORWARD, None) is None:
            raise AttributeError("forward")

    def reduce(self: Any, protocol: int) -> Any:
        reduced = super(made, self).__reduce_ex__(max(protocol, 2))
        if type(self) is made and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_new_instance, (original,), *reduced[2:])
        return reduced

    members = {
        ORIGINAL_CLASS: original,
        "forward": property(get_forward, set_forward, delete_forward),
        "__reduce_ex__": reduce,
        **{name: getattr(original, name) for name in ("__doc__", "__module__", "__qualname__")},
    }
    made: type[nn.Module] = types.new_class(original.__name__, (original,), exec_body=lambda body: body.update(members))
    return _classes.setdefault(original, made)


def _new_instance(original: type[nn.Module]) -> nn.Module:
    """An empty instance for pickle to fill."""
    made = class_with_copies(original)
    return made.__new__(made)


def trained_copy(original: nn.Module, path: str, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the module of that path, to be trained, in that dtype or in the module's.

    The copy has no hooks and no other copies. It has a `forward` that was set on the instance only
    if that is a method of the module. ValueError: the module has no parameters, or some that are
    not floating; it holds adapters or trained copies.
    """
    subject, copies = f"modules_to_save: {path}: a {type(original).__name__}", added_modules(original)
    floating = [p.is_floating_point() for name, p in original.named_parameters() if not name.startswith(f"{NAME}.")]
    if not floating or not all(floating):
        raise ValueError(f"{subject} of no or of quantised parameters cannot be trained; leave it out")
    if any(isinstance(part, AddedModules) and part is not copies for part in original.modules()):
        raise ValueError(f"{subject} that holds adapters or trained copies cannot be trained whole")
    left_out = object()
    parts = tuple(part for name, part in original.named_modules() if not f"{name}.".startswith(f"{NAME}."))
    memo = {id(vars(part)[name]): left_out for part in parts for name in _instance_attributes(part)}
    if copies is not None:
        memo[id(copies)] = left_out
    with onloaded(parts), gathered(original.parameters()):
        copied: nn.Module = copy.deepcopy(original, memo)
    copied._modules.pop(NAME, None)
    for part in copied.modules():
        for name in [name for name, value in vars(part).items() if value is left_out]:
            del vars(part)[name]
    restore_class(copied)
    # The hooks of the original run when it is called. Only those stay that compute weights.
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
        hooks = vars(copied)[name]
        for key in [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")]:
            del hooks[key]
    return copied.to(dtype).requires_grad_(True)


def _instance_attributes(module: nn.Module) -> list[str]:
    """The attributes by which a library changed this instance, and which a copy must not share."""
    names = [name for name in (HOOK, OLD_FORWARD, "forward", INSTANCE_FORWARD) if name in vars(module)]
    return [name for name in names if HOOK in names or getattr(vars(module)[name], "__self__", None) is not module]
