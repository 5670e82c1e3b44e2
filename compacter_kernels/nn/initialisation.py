"""The initial weights, drawn as by the authors of Compacter or by the `adapters` library."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import init as torch_init

from compacter_kernels.nn.partitioned import gathered

STYLES = ("paper", "adapters")
RULE_DISTRIBUTIONS = ("normal", "uniform")
OWN_RULE_RANGE = 0.01  # the authors' spread of a rule that projections do not share


def check_options(init: str, phm_c_init: str, phm_init_range: float) -> None:
    """Raise ValueError for an unknown initialisation."""
    if init not in STYLES:
        raise ValueError(f"init={init!r} is not known; choose one of {', '.join(STYLES)}")
    if phm_c_init not in RULE_DISTRIBUTIONS:
        raise ValueError(f"phm_c_init={phm_c_init!r} is not known; choose one of {', '.join(RULE_DISTRIBUTIONS)}")
    if not (isinstance(phm_init_range, (float, int)) and phm_init_range >= 0):
        raise ValueError(f"phm_init_range must be a number >= 0, got {phm_init_range!r}")


@torch.no_grad()
def reset_factors(factors: Sequence[Tensor], init: str) -> None:
    """Draw W_left, W_right or W, slice by slice.

    paper: xavier uniform with gain sqrt 2, the "glorot-uniform" of the authors' Compacter runs.
    adapters: xavier normal with gain 1, which `adapters` draws whatever its option says.
    """
    with gathered(factors, change=True):
        for matrix in itertools.chain.from_iterable(factors):
            if init == "paper":
                torch_init.xavier_uniform_(matrix, gain=math.sqrt(2))
            else:
                torch_init.xavier_normal_(matrix)


@torch.no_grad()
def reset_rule(rules: Sequence[Tensor], spread: float, distribution: str) -> None:
    """Draw phm_rule or its factors: normal of deviation spread, or uniform in [-spread, spread]."""
    with gathered(rules, change=True):
        for rule in rules:
            if distribution == "normal":
                rule.normal_(0.0, spread)
            else:
                rule.uniform_(-spread, spread)
