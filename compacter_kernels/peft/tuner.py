"""The tuner that puts adapters into a model for peft, whatever kind of adapter a method has."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from compacter_kernels.peft.layer import BASE, CANNOT_MERGE, AdapterLayer
from compacter_kernels.peft.plan import plan_modules_to_save, plan_targets
from compacter_kernels.peft.sources import BlockInput, BlockOutput
from compacter_kernels.targets.find import Target
from compacter_kernels.targets.renamed import name_in
from compacter_kernels.targets.wrappers import IN_FILE


def _rename(begin: str, model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Give adapters the names that their modules have in this model, in place.

    A model calls it before it loads a state dict. begin: what the names of parameters begin with.
    prefix: what those of the model's modules begin with.
    """
    names = {name.removeprefix(IN_FILE) for name, _ in model.named_modules()}
    for key in list(state_dict):
        path, found, kind = key.removeprefix(prefix).rpartition(f".{begin}")
        if found and path not in names:
            start = prefix if key.startswith(prefix) else ""
            state_dict[start + name_in(names, path) + found + kind] = state_dict.pop(key)


class AdapterTuner(BaseTuner):
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

    def _borrow(self, adapter_name: str, adapter: Any, config: Any) -> dict[str, nn.ParameterDict]:
        """Let an adapter borrow what those of its name share; return the dicts that own it."""
        return {}

    def _parallel_input(self, target: Target) -> str:
        """The name of the module whose input a parallel adapter takes."""
        return target.read

    def _source(self, config: Any, target: Target, layer: AdapterLayer) -> BlockInput | None:
        """The source of the adapter's input; None for the output of its target."""
        if config.is_parallel:
            return BlockInput(self.model.get_submodule(self._parallel_input(target)), layer)
        if not config.original_ln_before:
            return None
        parent, _, name = target.norm.rpartition(".")
        norm = (self.model.get_submodule(parent), name) if name else None
        return BlockOutput(self.model.get_submodule(target.residual), layer, norm, config.residual_before_ln)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Find all targets and check that each can have an adapter, before the model changes."""
        config = dataclasses.replace(peft_config, modules_to_save=plan_modules_to_save(model, peft_config))
        self._plan = plan_targets(model, config)
        for target in self._plan.targets.values():
            if config.original_ln_before and not target.residual:
                raise ValueError(
                    f"original_ln_before=True needs the residual of the block that {target.write} ends, which the "
                    "table of compacter_kernels does not say for it; leave target_modules out for a model of the table"
                )
            self._build(model, config, target, "meta")
        peft_config.modules_to_save = config.modules_to_save
        peft_config.describe(model)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        return self._plan.asks_for(key)

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
        plan = self._plan.targets.get(current_key, Target(current_key, current_key, 0))
        adapter = self._build(self.model, peft_config, plan)
        lent = self._borrow(adapter_name, adapter, peft_config)
        layer = target if isinstance(target, AdapterLayer) else AdapterLayer(target, self.prefix)
        source = self._source(peft_config, plan, layer)
        layer.add_adapter(adapter_name, adapter.train(target.training), lent, source)
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            setattr(parent, target_name, layer)
        elif adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give each layer the adapter_names of this call of the model."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        unknown = sorted(set(names) - {BASE, *self.peft_config})
        if unknown:
            raise ValueError(f"adapter_names has {', '.join(unknown)}; the model has {', '.join(self.peft_config)}")
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]

        def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "adapter_names": repeated}

        layers = [module for module in self.modules() if isinstance(module, AdapterLayer)]
        handles = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> Any:
        """As peft 0.21 and later ask for it, before they look for the parameters of these names."""
        renamed = dict(state_dict)
        _rename(cls.prefix, model, renamed, IN_FILE)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)

    def unload(self) -> nn.Module:
        """The base model without adapters."""
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
