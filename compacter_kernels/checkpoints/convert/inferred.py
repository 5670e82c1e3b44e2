"""Infer from the weights of adapters alone what they share and which options they have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.checkpoints.convert.checkpoint import SHARED, Checkpoint, borrowed, reduction_factor, sizes


def take_shared(adapters: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Remove from the adapters the weights that are equal in all of them, and return these once."""
    shared: dict[str, Tensor] = {}
    every = list(adapters.values())
    for weights in ("phm_rule", "W") if len(every) > 1 else ("phm_rule",):
        names = {name: SHARED[name] for name in SHARED if name.startswith(weights) and SHARED[name][0] in every[0]}
        if all(_equal(adapter.get(name) for adapter in every for name in borrowers) for borrowers in names.values()):
            shared |= {name: every[0][names[name][0]] for name in names}
    for adapter in every:
        for name in borrowed(shared):
            del adapter[name]
    return shared


def _equal(tensors: Iterable[Tensor | None]) -> bool:
    first, *others = tensors
    return first is not None and all(other is not None and torch.equal(first, other) for other in others)


def options_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the options that the weights show; raise ValueError for adapters of several sizes."""
    every = [adapter for _, adapter in checkpoint.whole()]
    first = every[0]
    all_sizes = {sizes(adapter) for adapter in every}
    if len(all_sizes) > 1:
        raise ValueError(f"adapters of more than one size (hidden, bottleneck): {sorted(all_sizes)}")
    factorised = "down.W_left" in first
    left = first["down.W_left" if factorised else "down.W"]
    return {
        "reduction_factor": reduction_factor(*sizes(first)),
        "phm_dim": left.shape[0],
        "phm_rank": left.shape[2] if factorised else 1,
        "phm_bias": "down.b" in first,
        "factorized_phm_W": factorised,
        "factorized_phm_rule": "down.phm_rule_left" in first,
        "shared_phm_rule": any(name.startswith("phm_rule") for name in checkpoint.shared),
        "shared_W_phm": any(name.startswith("W") for name in checkpoint.shared),
        "scaling": "learned" if "scaling" in first else 1.0,
        "ln_before": "norm_before.weight" in first,
        "ln_after": "norm_after.weight" in first,
    }
