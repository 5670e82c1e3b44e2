"""What a config of peft asks of a model: the modules that get adapters or are trained whole."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

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


class Plan(NamedTuple):
    """The targets of a config in a model by their names, and the config that tells them by name."""

    targets: dict[str, Target]
    config: Any

    def asks_for(self, name: str) -> Any:
        """What peft's own question about this module gives: also whether it was excluded."""
        found = check_target_module_exists(self.config, name)
        return name in self.targets if found else found


def plan_targets(model: nn.Module, config: Any) -> Plan:
    """The targets of the config in a model; none if target_modules fits no name.

    ValueError: the model is not in the table, or never calls a target.
    """
    if adapters_of(model) is not None:
        raise ValueError("the model has adapters by compacter_kernels.inject already; call remove_adapters first")
    if config.target_modules is None:
        targets = find_targets(model, config)
        config = dataclasses.replace(config, target_modules=[target.write for target in targets])
        targets = [target for target in targets if check_target_module_exists(config, target.write)]
    else:
        named = [name for name, _ in base_modules(model) if name and check_target_module_exists(config, name)]
        check_called(model, named, "target_modules")
        targets = without_layers(numbered(named), config.leave_out)
    return Plan({target.write: target for target in targets}, config)


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
