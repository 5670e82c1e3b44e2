"""The layers of HyperNets: `a` (n, n, n), `s` (n, out/n, in/n) and `bias` (out).

They compute y = x H^T + bias with H = sum_i a_i (x) s_i. So phm_rule_i = a_i^T and W_i = s_i^T.
HyperNets has layers and no adapters. So its layers are converted from and into the state dict of
`PHMLinear(factorized_phm_W=False)`, and of adapters only the projections are converted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from compacter_kernels.checkpoints.checkpoint import Checkpoint, Written


def to_phm_linear(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of `PHMLinear` layers, or raise ValueError for wrong or no layers."""
    layers = sorted(key.removesuffix("a") for key in tensors if f".{key}".endswith(".a"))
    if not layers:
        raise ValueError("there are no layers with a and s in it")
    phm_linear: dict[str, Tensor] = {}
    for layer in layers:
        a, s, bias = tensors[f"{layer}a"], tensors.get(f"{layer}s"), tensors.get(f"{layer}bias")
        n = len(a) if a.dim() else 0
        if s is None or s.dim() != 3 or tuple(a.shape) != (n, n, n) or len(s) != n:
            shapes = f"{tuple(a.shape)} and {'none' if s is None else tuple(s.shape)}"
            raise ValueError(f"{layer}a and {layer}s must be (n, n, n) and (n, out/n, in/n), got {shapes}")
        phm_linear |= {f"{layer}phm_rule": _transposed(a), f"{layer}W": _transposed(s)}
        if bias is not None:
            if tuple(bias.shape) != (n * s.shape[1],):
                raise ValueError(f"{layer}bias must be ({n * s.shape[1]},), got {tuple(bias.shape)}")
            phm_linear[f"{layer}b"] = bias
    return phm_linear


def from_phm_linear(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return layers of HyperNets, for which factors are multiplied, or raise ValueError."""
    layers: dict[str, Tensor] = {}
    for layer in [key.rpartition("W")[0] for key in tensors if re.fullmatch(r"(.*\.)?W(_left)?", key)]:
        layers[f"{layer}a"] = _transposed(_product(tensors, f"{layer}phm_rule"))
        layers[f"{layer}s"] = _transposed(_product(tensors, f"{layer}W"))
        if f"{layer}b" in tensors:
            layers[f"{layer}bias"] = tensors[f"{layer}b"]
    if not layers:
        raise ValueError("there are no PHM layers in it: tensors W_left and W_right, or W")
    return layers


def write(checkpoint: Checkpoint, name: str | None) -> Written:
    """Return the projections of adapters as layers of HyperNets; shared weights are repeated."""
    tensors = {f"{target}.{key}": t for target, adapter in checkpoint.whole().items() for key, t in adapter.items()}
    checkpoint.losses.append("activation, residual and layer norms: HyperNets has layers, not adapters")
    return from_phm_linear(tensors), None, {}


def _product(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    for factor in (f"{name}_left", f"{name}_right"):
        if factor not in tensors:
            raise ValueError(f"{factor} is missing")
    left, right = tensors[f"{name}_left"], tensors[f"{name}_right"]
    if left.dtype != right.dtype or left.dim() != 3 or right.dim() != 3 or left.shape[::2] != right.shape[:2]:
        of_each = [f"{tuple(factor.shape)} in {factor.dtype}" for factor in (left, right)]
        raise ValueError(f"{name}_left and {name}_right cannot be multiplied: {' and '.join(of_each)}")
    return torch.bmm(left, right)


def _transposed(tensor: Tensor) -> Tensor:
    if tensor.dim() != 3:
        raise ValueError(f"a tensor of a PHM layer must have three dimensions, got {tuple(tensor.shape)}")
    return tensor.transpose(1, 2).contiguous()
