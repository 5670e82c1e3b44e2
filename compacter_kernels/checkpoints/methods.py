"""The kinds of adapters in a checkpoint, by the peft_type of their config."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from compacter_kernels.checkpoints.files import PEFT_TYPES
from compacter_kernels.config import AdapterConfig
from compacter_kernels.nn import CompacterAdapter
from compacter_kernels.nn.bottleneck import BottleneckAdapter
from compacter_kernels.nn.flat_names import BOTTLENECK as BOTTLENECK_PREFIX, PREFIX

COMPACTER, BOTTLENECK = PEFT_TYPES


class Method(NamedTuple):
    """The options and the module of adapters, and what the names of their parameters begin with."""

    config: type[AdapterConfig]
    adapter: Callable[..., nn.Module]
    prefix: str


METHODS = {
    COMPACTER: Method(PEFT_TYPES[COMPACTER], CompacterAdapter, PREFIX),
    BOTTLENECK: Method(PEFT_TYPES[BOTTLENECK], BottleneckAdapter, BOTTLENECK_PREFIX),
}
