"""Compacter and bottleneck adapters as methods of the library peft.

An import of this module registers the methods. Then `peft.get_peft_model` takes the configs below,
and `peft.PeftModel.from_pretrained` reads what was saved with them.
"""

from compacter_kernels.peft.registration import register  # First, as it says what to install without peft.

# isort: split
from compacter_kernels.peft.bottleneck import BottleneckModel
from compacter_kernels.peft.compacter import CompacterModel
from compacter_kernels.peft.config import BottleneckConfig, CompacterConfig, CompacterPlusPlusConfig

register("compacter", CompacterConfig, CompacterModel)
register("bottleneck", BottleneckConfig, BottleneckModel)

__all__ = ["BottleneckConfig", "BottleneckModel", "CompacterConfig", "CompacterModel", "CompacterPlusPlusConfig"]
