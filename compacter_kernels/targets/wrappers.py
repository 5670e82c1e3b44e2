"""What others put around a model or around one of its layers, and the names that parameters have without it.

A kind of wrapper is known by its class's name, so that no package has to be imported to ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

WRAPPED_CHILD = {  # the class of a wrapper: its child that is wrapped
    "OptimizedModule": "_orig_mod",  # of torch.compile
    "ActivationWrapper": "_checkpoint_wrapped_module",  # of torch's checkpoint_wrapper and offload_wrapper
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",  # FSDP1
    "DeepSpeedEngine": "module",
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",  # of peft: a LoraModel, say
    "BaseTunerLayer": "base_layer",  # of peft: a linear layer with LoRA, say
}
TRAINED_BY_PEFT = "AuxiliaryTrainingWrapper"  # what its modules_to_save and trainable_token_indices put around a module
PREFIXES = ("module.", "base_model.model.")  # of the names in a state dict of a wrapped model
COMPONENTS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
Value = TypeVar("Value")


def is_a(module: nn.Module, *kinds: str) -> bool:
    """Whether the module is of a class of one of these names, or of a subclass."""
    return any(base.__name__ in kinds for base in type(module).__mro__)


def wrapped_child(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The name and the module of what a wrapper wraps; None for a module that is no wrapper."""
    for base in type(module).__mro__:
        inner = module._modules.get(WRAPPED_CHILD.get(base.__name__, ""))
        if inner is not None:
            return WRAPPED_CHILD[base.__name__], inner
    return None


def wrapper_chain(model: nn.Module) -> list[nn.Module]:
    """The wrappers of a model, from outside, and then the model itself."""
    found = [model]
    while (inside := wrapped_child(found[-1])) is not None:
        found.append(inside[1])
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what torch.compile, DistributedDataParallel, FSDP, DeepSpeed or peft put around it."""
    return wrapper_chain(model)[-1]


def _steps(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules that a path leads through, each with the name of the next step."""
    here: Any = model
    for name in path.split("."):
        yield here, name
        here = here._modules.get(name) if isinstance(here, nn.Module) else None


def plain_path(model: nn.Module, path: str) -> str:
    """The name, in the model without wrappers, of what has this name in the model."""
    kept = []
    for module, name in _steps(model, path):
        inside = wrapped_child(module) if isinstance(module, nn.Module) else None
        if inside is None or inside[0] != name:
            kept.append(name)
    return ".".join(kept)


def check_not_copied_by_peft(model: nn.Module, path: str) -> None:
    """Raise ValueError for what lies in a module that peft has copied to train: there are two of that name then."""
    for module, _ in _steps(model, path):
        if isinstance(module, nn.Module) and is_a(module, TRAINED_BY_PEFT):
            raise ValueError(
                f"{path} lies in what peft trains itself (its modules_to_save); save the adapters before "
                "get_peft_model, or after merge_and_unload"
            )


def plain_names(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict by the names of the plain model, of one that was taken from a wrapped model.

    Raises:
        ValueError: two tensors of one name.
    """
    found = {".".join(part for part in key.split(".") if part not in COMPONENTS): tensors[key] for key in tensors}
    if len(found) < len(tensors):
        raise ValueError("two of the tensors have one name once the names of wrappers are taken out")
    while prefix := next((p for p in PREFIXES if found and all(key.startswith(p) for key in found)), None):
        found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def check_outside_peft(model: nn.Module, followed: Iterable[str], copied: Iterable[str]) -> None:
    """Raise ValueError for modules inside of what peft has wrapped, which it may call in its own way or leave out.

    followed: the names of modules whose output adapters take; a whole wrapped layer is such a one. copied: of those
    that are trained in copies.
    """
    for path, inside in [*((path, True) for path in followed), *((path, False) for path in copied)]:
        modules = [module for module, _ in _steps(model, path)] + ([] if inside else [model.get_submodule(path)])
        if any(is_a(module, "BaseTunerLayer", TRAINED_BY_PEFT) for module in modules if isinstance(module, nn.Module)):
            raise ValueError(
                f"{path} belongs to what peft has wrapped or trains itself; call merge_and_unload first, or leave it "
                "to peft: target_modules, modules_to_save and train_layer_norms of the config say what is taken here"
            )


def check_injectable(model: nn.Module) -> None:
    """Raise ValueError for a model that is distributed already: what is added to it would not be.

    Each process would train adapters of its own.
    """
    for module in wrapper_chain(model):
        if is_a(module, "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "FSDPModule"):
            raise ValueError(
                f"the model is a {type(module).__name__}, which does not keep in step what is added to it now; put in "
                "adapters first, and distribute the model then"
            )


def check_gathered(model: nn.Module) -> None:
    """Raise ValueError for a model of FSDP1 whose parameters are not gathered: what is there are pieces."""
    for module in model.modules():
        if is_a(module, "FullyShardedDataParallel"):
            state = getattr(module, "training_state", None)
            if getattr(state, "name", "") != "SUMMON_FULL_PARAMS":
                raise ValueError(
                    "the model is sharded by FullyShardedDataParallel; call this on all processes within "
                    "`with FullyShardedDataParallel.summon_full_params(model):`"
                )


def check_fillable(model: nn.Module) -> None:
    """Raise ValueError for a model whose optimizer, one of DeepSpeed's, would write its own values over new ones."""
    for module in wrapper_chain(model):
        if is_a(module, "DeepSpeedEngine") and getattr(module, "optimizer", None) is not None:
            raise ValueError(
                "the model belongs to a DeepSpeedEngine, whose optimizer keeps copies of the parameters and writes "
                "them back at its next step; load the adapters before deepspeed.initialize"
            )
