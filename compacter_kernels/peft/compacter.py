"""Compacter as a method of peft: adapters that share weights, which the model owns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compacter_kernels.inject.prepare import build_adapter
from compacter_kernels.peft import shared
from compacter_kernels.peft.tuner import AdapterTuner
from compacter_kernels.targets.find import Target


class CompacterModel(AdapterTuner):
    """Compacter (arXiv 2106.04647) in a model, as peft.get_peft_model makes it."""

    prefix = "compacter_"

    def _build(self, model: nn.Module, config: Any, target: Target, device: str | None = None) -> Any:
        return build_adapter(model, config, target, "auto", device)

    def _borrow(self, adapter_name: str, adapter: Any, config: Any) -> dict[str, nn.ParameterDict]:
        return shared.borrow(self.model, adapter_name, adapter, config)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        trained = [p for _, values in shared.shared_parameters(model) for p in values.values() if p.requires_grad]
        super()._mark_only_adapters_as_trainable(model)
        for parameter in trained:
            parameter.requires_grad_(True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            shared.cast_to_float32(self.model, adapter_name)

    def unload(self) -> nn.Module:
        """The base model without adapters and without what they share."""
        model: nn.Module = super().unload()
        shared.remove(model)
        return model

    # peft 0.21 and later ask the tuner for parameters that no layer holds. Earlier versions find
    # them by the prefix in their names.

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor], unwanted_adapter_names: Any
    ) -> Any:
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return {**own, **shared.entries(model, adapter_name, state_dict)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> Any:
        own = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return shared.by_names_in_model(model, adapter_name, own)
