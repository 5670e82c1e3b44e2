"""Wrappers that other libraries put around a model or a layer, and the names without them.

A wrapper is recognised by the name of its class, so that its library need not be imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

WRAPPED_CHILD = {  # The class of a wrapper, and the name of the child that it wraps.
    "OptimizedModule": "_orig_mod",  # torch.compile
    "ActivationWrapper": "_checkpoint_wrapped_module",  # torch's checkpoint_wrapper, offload_wrapper
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",  # FSDP1
    "DeepSpeedEngine": "module",
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",  # peft, for example its LoraModel
    "BaseTunerLayer": "base_layer",  # peft, for example a linear layer with LoRA
}
# The wrapper of peft's modules_to_save and trainable_token_indices.
TRAINED_BY_PEFT = "AuxiliaryTrainingWrapper"
# What the names in the state dict of a wrapped model begin with, and names within them.
IN_FILE = "base_model.model."  # peft's, also in its files
PREFIXES = ("module.", IN_FILE)
COMPONENTS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
Value = TypeVar("Value")


def is_a(module: object, *kinds: str) -> bool:
    """Whether the module's class, or a class that it derives from, has one of these names."""
    return any(base.__name__ in kinds for base in type(module).__mro__)


def wrapped_child(module: Any) -> tuple[str, nn.Module] | None:
    """The name and the module of the child that a wrapper wraps. None if it is no wrapper."""
    for base in type(module).__mro__:
        name = WRAPPED_CHILD.get(base.__name__, "")
        if name and module._modules.get(name) is not None:
            return name, module._modules[name]
    return None


def wrapper_chain(model: nn.Module) -> list[nn.Module]:
    """The wrappers around a model, from the outermost to the innermost, and then the model."""
    chain = [model]
    while (inside := wrapped_child(chain[-1])) is not None:
        chain.append(inside[1])
    return chain


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all wrappers: of torch.compile, DDP, FSDP, DeepSpeed, peft."""
    return wrapper_chain(model)[-1]


def _steps(model: nn.Module, path: str) -> Iterator[tuple[nn.Module | None, str]]:
    """Each part of a path, with the module that it is a child of or None."""
    module: nn.Module | None = model
    for name in path.split("."):
        yield module, name
        module = None if module is None else module._modules.get(name)


def plain_path(model: nn.Module, path: str) -> str:
    """The name in the model without wrappers, for a name in the model with them."""
    steps = ((wrapped_child(module), name) for module, name in _steps(model, path))
    return ".".join(name for inside, name in steps if inside is None or inside[0] != name)


def plain_names(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict with the names of the plain model; ValueError if two would have one name."""
    plain = {".".join(part for part in key.split(".") if part not in COMPONENTS): tensors[key] for key in tensors}
    if len(plain) < len(tensors):
        raise ValueError("two of the tensors have one name once the names of wrappers are taken out")
    while prefix := next((p for p in PREFIXES if plain and all(key.startswith(p) for key in plain)), None):
        plain = {key.removeprefix(prefix): value for key, value in plain.items()}
    return plain


def check_not_copied_by_peft(model: nn.Module, path: str) -> None:
    """Raise ValueError for a module inside one that peft trains as a copy: two have its name."""
    if any(is_a(module, TRAINED_BY_PEFT) for module, _ in _steps(model, path)):
        raise ValueError(
            f"{path} lies in what peft trains itself (its modules_to_save); save the adapters before "
            "get_peft_model, or after merge_and_unload"
        )


def check_outside_peft(model: nn.Module, followed: Sequence[str], copied: Sequence[str]) -> None:
    """Raise ValueError for modules inside a wrapper of peft, which may not call them as usual.

    followed: the names of modules whose output adapters take, which may themselves be wrapped.
    copied: the names of modules that are trained as copies, which may not.
    """
    for path in (*followed, *copied):
        modules = [module for module, _ in _steps(model, path)]
        if path in copied:
            modules.append(model.get_submodule(path))
        if any(is_a(module, "BaseTunerLayer", TRAINED_BY_PEFT) for module in modules):
            raise ValueError(
                f"{path} belongs to what peft has wrapped or trains itself; call merge_and_unload first, or leave it "
                "to peft: target_modules, modules_to_save and train_layer_norms of the config say what is taken here"
            )


def check_injectable(model: nn.Module) -> None:
    """Raise ValueError for a distributed model, in which each process would train its adapters."""
    for module in wrapper_chain(model):
        if is_a(module, "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "FSDPModule"):
            raise ValueError(
                f"the model is a {type(module).__name__}, which does not keep in step what is added to it now; put in "
                "adapters first, and distribute the model then"
            )


def check_gathered(model: nn.Module) -> None:
    """Raise ValueError for a model of FSDP1 whose parameters are sharded at the moment."""
    for module in model.modules():
        state = getattr(getattr(module, "training_state", None), "name", "")
        if is_a(module, "FullyShardedDataParallel") and state != "SUMMON_FULL_PARAMS":
            raise ValueError(
                "the model is sharded by FullyShardedDataParallel; call this on all processes within "
                "`with FullyShardedDataParallel.summon_full_params(model):`"
            )


def check_fillable(model: nn.Module) -> None:
    """Raise ValueError for a model whose DeepSpeed optimizer would overwrite loaded values."""
    for module in wrapper_chain(model):
        if is_a(module, "DeepSpeedEngine") and getattr(module, "optimizer", None) is not None:
            raise ValueError(
                "the model belongs to a DeepSpeedEngine, whose optimizer keeps copies of the parameters and writes "
                "them back at its next step; load the adapters before deepspeed.initialize"
            )
