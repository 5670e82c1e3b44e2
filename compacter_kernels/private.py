"""Every private name of torch and Python that a call uses, with its reason and the way without it.

A torch that lacks one of the names takes the way without it, which is right and slower. So does a
process that has COMPACTER_KERNELS_PUBLIC=1 in its environment: the tests of calls run that way too.
benchmarks/results/epyc-2core/private_names.txt has what each shortcut saves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

F = TypeVar("F", bound=Callable[..., Any])
PUBLIC = os.environ.get("COMPACTER_KERNELS_PUBLIC") == "1"


def _name(owner: Any, name: str, without: Any) -> Any:
    """owner.name, or `without` where torch has no such name."""
    return without if PUBLIC else getattr(owner, name, without)


# Who takes part in a call (`modes`). torch has no public name for the first three questions.
# Without one of these names every call runs as if a dispatch mode were active: as an operator,
# which torch's own machinery treats in the right way or refuses.
_all_known = (not PUBLIC and hasattr(forward_ad, "_current_level")) and all(
    hasattr(torch._C, name) for name in ("_len_torch_dispatch_stack", "_are_functorch_transforms_active")
)
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack if _all_known else lambda: 1
transforms: Callable[[], bool] = _name(torch._C, "_are_functorch_transforms_active", lambda: False)
FORWARD_AD: Any = forward_ad if _all_known else SimpleNamespace(_current_level=-1)

# The memory of a saved tensor may be written over in its backward only where nobody can ask for it
# again (`autograd`). Without these names it never is.
saved_tensors_hooks: Callable[[bool], Any] = _name(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_trace: True
)
graph_is_kept: Callable[[], bool] = _name(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

# The public functions check first that CUDA is initialised, which a tensor on the device shows.
current_device: Callable[[], int] = _name(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream: Callable[[int], int] = _name(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)

# os.environ raises and catches two exceptions for a variable that is not set, its raw dict none.
ENVIRON: Any = _name(os.environ, "_data", os.environ)


def environment_key(name: str) -> Any:
    """The key under which ENVIRON holds the variable of this name."""
    return name if ENVIRON is os.environ else os.environ.encodekey(name)


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without the treatment of transforms, which end before (`call_path`)."""
    return function.apply if PUBLIC else super(torch.autograd.Function, function).apply  # type: ignore[misc]


_fp32_precision = _name(torch._C, "_get_fp32_precision_getter", None)  # torch < 2.9 has none


def tf32_allowed() -> bool:
    """Whether the user lets float32 products on CUDA be tf32: `torch.backends.cuda.matmul`."""
    if _fp32_precision is None:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return bool(_fp32_precision("cuda", "matmul") == "tf32")


def evaluated_when_compiled(function: F) -> F:
    """Make torch.compile evaluate it, as assume_constant_result does, which imports dynamo."""
    if PUBLIC:
        return torch.compiler.assume_constant_result(function)  # type: ignore[no-any-return]
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_any_global_hook: Callable[[], bool] = _name(nn_module, "_has_any_global_hook", lambda: True)


def hooked(*modules: nn.Module) -> bool:
    """Whether a call of one of these modules runs a hook, of its own or of all modules.

    torch has no public way to ask. Without the private one a module counts as hooked: it is called,
    and no kernel stands in for it.
    """
    for module in modules:
        if module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
    return _any_global_hook()


def runs(forward: Callable[..., Any], *modules: nn.Module) -> bool:
    """Whether a call of each module runs `forward`, a function of its class, and nothing else.

    accelerate may leave the forward of the class on a module itself, which changes nothing.
    """
    for module in modules:
        if (
            (type(module).forward is not forward or module._forward_pre_hooks or module._forward_hooks)
            or (module._backward_hooks or module._backward_pre_hooks)
            or ("forward" in module.__dict__ and module.__dict__["forward"] != MethodType(forward, module))
        ):
            return False
    return not _any_global_hook()


def hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...] | None:
    """The tables of the hooks of this module alone; None without the private names."""
    if PUBLIC:
        return None
    return module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks


def _parameter(module: nn.Module, name: str) -> Any:
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _children(module: nn.Module) -> dict[str, Any]:
    return module._modules


# nn.Module.__getattr__ searches three dictionaries after Python's own search has failed.
parameter: Callable[[nn.Module, str], Any] = getattr if PUBLIC else _parameter
children: Callable[[nn.Module], dict[str, Any]] = (lambda m: dict(m.named_children())) if PUBLIC else _children
