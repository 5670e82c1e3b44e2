"""The tuner that puts adapters into a model for peft, whatever kind of adapter a method has."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn

from compacter_kernels.inject.prepare import check_residual
from compacter_kernels.nn.choice import check_no_choice, computes_on
from compacter_kernels.nn.flat_names import flat
from compacter_kernels.peft.block_input import BlockInput, BlockOutput
from compacter_kernels.peft.layer import CANNOT_MERGE, AdapterLayer
from compacter_kernels.peft.mixed_batch import BASE, ChoosesCopies, Names, given_names
from compacter_kernels.peft.plan import check_not_offloaded, expand_all_linear, plan_modules_to_save, plan_targets
from compacter_kernels.peft.shared import SharedParameters
from compacter_kernels.targets.fast_path import FastPath
from compacter_kernels.targets.find import Target
from compacter_kernels.targets.renamed import name_in
from compacter_kernels.targets.wrappers import IN_FILE


def _rename(begin: str, model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Give adapters the names that their modules have in this model, in place.

    A model calls it before it loads a state dict. begin: what the names of parameters begin with.
    prefix: what those of the model's modules begin with.
    """
    names = {name.removeprefix(IN_FILE) for name, _ in model.named_modules()}
    base = getattr(model, "base_model_prefix", "")
    for key in list(state_dict):
        path, found, kind = key.removeprefix(prefix).rpartition(f".{begin}")
        if found and path not in names:
            start = prefix if key.startswith(prefix) else ""
            state_dict[start + name_in(names, path, base) + found + kind] = state_dict.pop(key)


class AdapterTuner(ChoosesCopies, BaseTuner):
    """Adapters of one method in a model. A subclass says how they are built.

    Args:
        model: the model to adapt.
        config: a config of the method, or a dict of configs by the name of the adapter.
        adapter_name: the name of the adapters.

    Raises:
        TypeError, ValueError: the config does not fit the model, which is unchanged.
    """

    tuner_layer_cls = AdapterLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # `plan_targets` reads our own table.

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self._renaming = self.model.register_load_state_dict_pre_hook(functools.partial(_rename, self.prefix))

    def _build(self, model: nn.Module, config: Any, target: Target, device: str | None = None) -> Any:
        """The adapter of a target, on that device or its own; ValueError if it cannot be."""
        raise NotImplementedError

    def _borrow(self, adapter_name: str, adapter: Any, config: Any) -> Mapping[str, SharedParameters]:
        """Let an adapter borrow what those of its name share; return the dicts that own it."""
        return {}

    def _parallel_input(self, target: Target) -> str:
        """The name of the module whose input a parallel adapter takes."""
        return target.read

    def _read(self, config: Any, target: Target, layer: AdapterLayer) -> BlockInput | None:
        """What gives an adapter its input; None for the output of its target."""
        if config.is_parallel:
            return BlockInput(self.model.get_submodule(self._parallel_input(target)), layer)
        if not config.original_ln_before:
            return None
        check_residual(config, target)
        parent, _, name = target.norm.rpartition(".")
        norm = (self.model.get_submodule(parent), name) if name else None
        return BlockOutput(self.model.get_submodule(target.residual), layer, norm, config.residual_before_ln)

    def _is_fixed(self, parameter: str, config: Any) -> bool:
        """Whether a parameter of this name is never trained."""
        return False

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Find all targets and check that each can have an adapter, before the model changes."""
        check_no_choice(model)
        config = copy.copy(peft_config)
        expand_all_linear(model, config)
        config.modules_to_save = plan_modules_to_save(model, config)
        check_not_offloaded(model, config)
        self._targets = {target.write: target for target in plan_targets(model, config)}
        for target in self._targets.values():
            check_residual(config, target)
            self._build(model, config, target, "meta")
        peft_config.target_modules, peft_config.modules_to_save = config.target_modules, config.modules_to_save
        peft_config.describe(model)
        layers = (module for module in model.modules() if isinstance(module, AdapterLayer))
        self._fast_path = next((layer.fast_path for layer in layers), None) or FastPath(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put adapters into the model. A state dict says which modules get one, by its names."""
        if kwargs.get("state_dict"):  # The names of shared weights are no names of modules.
            tensors = kwargs["state_dict"].items()
            kwargs["state_dict"] = {key: value for key, value in tensors if f".{self.prefix}" in key}
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        if key in self._targets:
            return True
        config = copy.copy(peft_config)
        config.target_modules = [key] if config.target_modules is None else config.target_modules
        found = check_target_module_exists(config, key)
        return False if found else found  # What is not found may be peft's mark of an excluded module.

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        plan = self._targets.get(current_key, Target(current_key, current_key, 0))
        adapter = self._build(self.model, peft_config, plan)
        shared = self._borrow(adapter_name, adapter, peft_config)
        names = [*(flat(key, self.prefix) for key, _ in adapter.named_parameters()), *shared]
        layer = target if isinstance(target, AdapterLayer) else None
        if layer is None or layer.prefix != self.prefix:
            layer = AdapterLayer(target, self.prefix, self._fast_path)
        layer.add_adapter(
            adapter_name,
            adapter.train(target.training),
            shared=shared,
            fixed=[name for name in names if self._is_fixed(name, peft_config)],
            read=self._read(peft_config, plan, layer),
        )
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            setattr(parent, target_name, layer)
        elif adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast from a half precision to float32. peft alone would then train all that is cast."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give the adapter_names of this call of the model to the modules that use adapters."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        unknown = dict.fromkeys(name for name in names if name not in (BASE, *self.peft_config))
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; the model has "
                f"{', '.join(self.peft_config)}"
            )
        checkpointed = [m for m in self.model.modules() if vars(m).get("gradient_checkpointing") and m.training]
        if checkpointed and torch.is_grad_enabled():
            raise ValueError(
                "gradient checkpointing computes the model again after the call, without its adapter_names; call "
                "gradient_checkpointing_disable() first"
            )
        generation = kwargs.get("generation_config")
        sizes = ("num_beams", "num_return_sequences")
        repeats = max(kwargs.get(size) or getattr(generation, size, None) or 1 for size in sizes)
        with given_names(self, Names(names, repeats, computes_on(self))):
            yield

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a base layer back. peft's own function needs a weight, which attention has not."""
        setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> Any:
        """As peft 0.21 and later ask for it, before they look for the parameters of these names."""
        renamed = dict(state_dict)
        _rename(cls.prefix, model, renamed, IN_FILE)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)

    def unload(self) -> nn.Module:
        """The base model as it was. peft alone would leave in it what was trained whole."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.original_module)
        model: nn.Module = super().unload()
        self._renaming.remove()
        return model

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError: no adapter computes the sum of two adapters."""
        raise NotImplementedError(
            "no bottleneck adapter computes the weighted sum of others, as each has a nonlinear function inside; "
            "activate several at once instead, model.base_model.set_adapter([...]), which adds their outputs"
        )
