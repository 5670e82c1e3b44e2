"""The layers of HyperNets: `a` (n, n, n), `s` (n, out/n, in/n) and `bias`.

They compute y = x H^T + bias with H = sum_i a_i (x) s_i. So A_i = a_i^T and W_i = s_i^T in our terms. It has layers,
not adapters: what is converted are `PHMLinear(factorized_phm_W=False)` by their names, and of adapters the projections.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compacter_kernels.checkpoints.convert.checkpoint import Checkpoint


def read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `PHMLinear` layers for one of HyperNets' layers.

    Raises:
        ValueError: no such layers, or shapes that do not fit together.
    """
    layers = sorted(key.removesuffix("a") for key in tensors if f".{key}".endswith(".a"))
    found: dict[str, Tensor] = {}
    for layer in layers:
        a, s, bias = tensors[f"{layer}a"], tensors.get(f"{layer}s"), tensors.get(f"{layer}bias")
        n = len(a) if a.dim() else 0
        if s is None or s.dim() != 3 or tuple(a.shape) != (n, n, n) or len(s) != n:
            raise ValueError(f"{layer}a and {layer}s must be (n, n, n) and (n, out/n, in/n), got {_shapes(a, s)}")
        if bias is not None and tuple(bias.shape) != (n * s.shape[1],):
            raise ValueError(f"{layer}bias must be ({n * s.shape[1]},), got {_shapes(bias)}")
        found |= {f"{layer}phm_rule": _transposed(a), f"{layer}W": _transposed(s)}
        if bias is not None:
            found[f"{layer}b"] = bias
    if not found:
        raise ValueError("there are no layers with a and s in it")
    return found


def write(source: Checkpoint | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """HyperNets' layers for the projections of adapters, or for a state dict of `PHMLinear` layers.

    What is factorised is multiplied out, what is shared repeated.

    Raises:
        ValueError: no PHM layers.
    """
    if isinstance(source, Checkpoint):
        tensors = {f"{place}.{key}": tensor for place, own in source.whole() for key, tensor in own.items()}
        source.losses.append("activation, residual and layer norms: HyperNets has layers, not adapters")
    else:
        tensors = dict(source)
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, name = f".{key}".rpartition(".")
        layer = f"{layer}.".removeprefix(".")
        if name in ("W", "W_left"):
            W = tensor if name == "W" else torch.bmm(tensor, _of(tensors, f"{layer}W_right"))
            factors = [
                _of(tensors, f"{layer}phm_rule_{side}")
                for side in ("left", "right")
                if f"{layer}phm_rule" not in tensors
            ]
            rule = torch.bmm(*factors) if factors else tensors[f"{layer}phm_rule"]
            found |= {f"{layer}a": _transposed(rule), f"{layer}s": _transposed(W)}
            if f"{layer}b" in tensors:
                found[f"{layer}bias"] = tensors[f"{layer}b"]
    if not found:
        raise ValueError("there are no PHM layers in it: tensors W_left and W_right, or W")
    return found


def _of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    return tensors[name]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous()


def _shapes(*tensors: Tensor | None) -> str:
    return " and ".join("none" if tensor is None else str(tuple(tensor.shape)) for tensor in tensors)
