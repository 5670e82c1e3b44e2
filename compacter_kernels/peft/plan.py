"""What a config of peft asks of a model: the modules that get adapters or are trained whole."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from compacter_kernels.targets.added import adapters_of
from compacter_kernels.targets.find import (
    Target,
    base_modules,
    check_called,
    find_modules_to_save,
    find_targets,
    numbered,
    without_layers,
)

HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # peft itself adds names of heads for these.


def plan_targets(model: nn.Module, config: Any) -> list[Target]:
    """The targets of the config in a model; none if target_modules fits no name.

    ValueError: the model is not in the table, or never calls a target.
    """
    if adapters_of(model) is not None:
        raise ValueError("the model has adapters by compacter_kernels.inject already; call remove_adapters first")
    if config.target_modules is None:
        targets = [t for t in find_targets(model, config) if not _excluded(config, t.write)]
    else:
        modules = {name for name, _ in base_modules(model)}
        names = [name for name in modules if name and check_target_module_exists(config, name)]
        targets = numbered([name for name, _ in model.named_modules() if name in names])
        check_called(model, [target.write for target in targets], "target_modules")
        targets = without_layers(targets, config.leave_out)
    return targets


def _excluded(config: Any, name: str) -> bool:
    """Whether exclude_modules or modules_to_save take a target of the table away."""
    return not check_target_module_exists(dataclasses.replace(config, target_modules=[name]), name)


def plan_modules_to_save(model: nn.Module, config: Any) -> list[str] | None:
    """modules_to_save, and the heads and layer norms that the config asks for; None if none are.

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
    return list(dict.fromkeys([*given, *ends])) or None


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
