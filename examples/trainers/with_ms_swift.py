"""Compacter as a tuner of ms-swift 4.

swift sft --external_plugins with_ms_swift.py --tuner_type compacter --model ... --dataset ...
"""

from __future__ import annotations

from typing import Any

import peft
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

import compacter_kernels.peft as ckp

CONFIG = ckp.CompacterConfig(task_type="CAUSAL_LM", reduction_factor=32, phm_dim=4)


class CompacterTuner(PeftTuner):
    """Puts Compacter into a model; PeftTuner saves and loads it, as every model of peft."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> nn.Module:
        """The model with adapters. args: those of the command line, `SftArguments`."""
        return peft.get_peft_model(model, CONFIG)


tuners_map["compacter"] = CompacterTuner
