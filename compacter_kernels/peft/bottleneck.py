"""The plain bottleneck adapter as a method of peft."""

from __future__ import annotations

from typing import Any

from torch import nn

from compacter_kernels.config import DTYPES
from compacter_kernels.inject.prepare import computes_like, width_of
from compacter_kernels.nn.bottleneck import BottleneckAdapter
from compacter_kernels.nn.flat_names import BOTTLENECK
from compacter_kernels.peft.tuner import AdapterTuner
from compacter_kernels.targets.find import Target
from compacter_kernels.targets.wrappers import unwrapped


class BottleneckModel(AdapterTuner):
    """Bottleneck adapters (arXiv 1902.00751) in a model, as peft.get_peft_model makes them."""

    prefix = BOTTLENECK

    def _build(self, model: nn.Module, config: Any, target: Target, device: str | None = None) -> Any:
        module = unwrapped(model.get_submodule(target.write))
        like = computes_like(model, module)
        try:
            return BottleneckAdapter(
                width_of(model, module, target.write),
                reduction_factor=config.reduction_factor_of(target.layer),
                device=device or like.device,
                dtype=DTYPES.get(config.dtype or "", like.dtype),
                **config.of_each_adapter(),
            )
        except ValueError as error:
            raise ValueError(f"{target.write}: {error}") from error

    def _parallel_input(self, target: Target) -> str:
        return target.residual or target.read
