"""Compacter as a method of peft: adapters that share weights, which the model owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from compacter_kernels.inject.prepare import build_adapter
from compacter_kernels.nn.flat_names import PREFIX
from compacter_kernels.peft import shared
from compacter_kernels.peft.shared import SharedParameters
from compacter_kernels.peft.tuner import AdapterTuner
from compacter_kernels.targets.find import Target


class CompacterModel(AdapterTuner):
    """Compacter (arXiv 2106.04647) in a model, as peft.get_peft_model makes it."""

    prefix = PREFIX

    def _build(self, model: nn.Module, config: Any, target: Target, device: str | None = None) -> Any:
        return build_adapter(model, config, target, "auto", device)

    def _borrow(self, adapter_name: str, adapter: Any, config: Any) -> Mapping[str, SharedParameters]:
        return shared.borrow(self.model, adapter_name, adapter, config)

    def _is_fixed(self, parameter: str, config: Any) -> bool:
        return not config.learn_phm and "phm_rule" in parameter

    def unload(self) -> nn.Module:
        """The base model as it was."""
        model = super().unload()
        shared.remove(model)
        return model
