"""Compacter as an adapter of axolotl, with its options in the YAML file.

plugins: [with_axolotl.CompacterPlugin]
adapter: compacter
compacter: {reduction_factor: 32, phm_dim: 4}
"""

from __future__ import annotations

from typing import Any

import peft
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from pydantic import BaseModel
from torch import nn

import compacter_kernels.peft as ckp


class CompacterArgs(BaseModel):
    """The key `compacter` of the YAML file: options of `CompacterConfig`."""

    compacter: dict[str, Any] = {}


class CompacterPlugin(BasePlugin):
    """Loads the adapter `compacter`, new or from the folder `lora_model_dir`."""

    def get_input_args(self) -> str:
        """The name of the class that holds the plugin's keys."""
        return f"{CompacterArgs.__module__}.CompacterArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The adapters that this plugin can load."""
        return [AdapterCapabilities(name="compacter")]

    def load_adapter(self, model: nn.Module, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """The model with adapters, and its config; None for another adapter."""
        if cfg.adapter != "compacter":
            return None
        config = ckp.CompacterConfig(task_type="CAUSAL_LM", inference_mode=inference, **(cfg.compacter or {}))
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            model = peft.PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return model, config
        return peft.get_peft_model(model, config), config
