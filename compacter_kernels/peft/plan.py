"""What a config of peft asks of a model: the modules that get adapters or are trained whole."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from compacter_kernels.inject.offload import HOOK
from compacter_kernels.targets.added import adapters_of
from compacter_kernels.targets.find import (
    Target,
    base_modules,
    check_called,
    find_modules_to_save,
    find_targets,
    likely_targets,
    numbered,
    without_layers,
)

HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # peft itself adds names of heads for these.


def plan_targets(model: nn.Module, config: Any) -> list[Target]:
    """The targets of the config in a model.

    ValueError: target_modules fits no name, the model is not in the table, or never calls a target.
    """
    if adapters_of(model) is not None:
        raise ValueError("the model has adapters by compacter_kernels.inject already; call remove_adapters first")
    if config.target_modules is None:
        targets = [t for t in find_targets(model, config) if not _excluded(config, t.write)]
    else:
        wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, wrappers))
        modules = (name for name, _ in base_modules(model) if name and not name.startswith(inside))
        targets = numbered([name for name in modules if check_target_module_exists(config, name)])
        check_called(model, [target.write for target in targets], "target_modules")
        targets = without_layers(targets, config.leave_out)
    if not targets:
        given = f"exclude_modules={config.exclude_modules}"
        if config.target_modules is not None:
            given = f"target_modules={config.target_modules} and {given}"
        raise ValueError(f"{given} leave no module that could get an adapter. {likely_targets(model)}")
    return targets


def expand_all_linear(model: nn.Module, config: Any) -> None:
    """Put the names of the linear layers in place of "all-linear", also of those with adapters.

    peft itself recognises layers with adapters only by names of classes, such as lora.Linear.
    """
    if str(config.target_modules).lower() == "all-linear":
        _maybe_include_all_linear_layers(config, model)
        layers = ((name, m.get_base_layer()) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
        linear = {name for name, m in layers if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
        config.target_modules = sorted(linear.union(config.target_modules or ()))


def _excluded(config: Any, name: str) -> bool:
    """Whether exclude_modules or modules_to_save take a target of the table away."""
    return not check_target_module_exists(dataclasses.replace(config, target_modules=[name]), name)


def plan_modules_to_save(model: nn.Module, config: Any) -> list[str]:
    """modules_to_save, and the heads and layer norms that the config asks for.

    The names are such that peft, which takes every module whose name ends with one, takes no other
    modules. As peft's own, they may be names that this model does not have.
    """
    given = config.modules_to_save or []
    of_peft = config.modules_to_save is None or config.task_type in HEAD_TASKS
    wanted = dataclasses.replace(config, modules_to_save=None if of_peft else [])
    found = dict.fromkeys(filter(None, (_outside_peft(model, name) for name in find_modules_to_save(model, wanted))))
    names = [name for name, _ in base_modules(model) if _outside_peft(model, name) == name]
    ends = []
    for name in found:
        end = name.rpartition(".")[2]
        ends.append(end if all(other in found for other in names if other.endswith(end)) else name)
    return list(dict.fromkeys([*given, *ends]))


def check_not_offloaded(model: nn.Module, config: Any) -> None:
    """Raise ValueError if accelerate has offloaded a module that is to be trained whole.

    peft would copy it without its values.
    """
    for name, module in base_modules(model):
        hooked = (part for part in module.modules() if HOOK in vars(part))
        if name.endswith(tuple(config.modules_to_save or ())) and any(
            p.is_meta for part in hooked for p in part.parameters(recurse=False)
        ):
            raise ValueError(
                f"modules_to_save: {name} is offloaded and cannot be trained whole; offload after get_peft_model, or "
                "set train_layer_norms=False and modules_to_save=[]"
            )


def _outside_peft(model: nn.Module, name: str) -> str:
    """The name of the wrapper that trains a module whole, or the module's own name.

    It is empty for a part of an adapter.
    """
    module, path = model, []
    for part in name.split("."):
        if isinstance(module, AuxiliaryTrainingWrapper):
            break
        if isinstance(module, BaseTunerLayer) and part != "base_layer":
            return ""
        module = module.get_submodule(part)
        path.append(part)
    return ".".join(path)
