"""The linear LoKr modules of the library `lycoris` (lycoris-lora 4.1), computed from their factors.

A LokrModule replaces the `forward` of a layer. Its own `forward` decides on module dropout, and
then calls `_rebuild_forward`, which builds the matrix of the weight's size, or `bypass_forward`,
which does not. Both are replaced here. Everything else, such as merging and saving, stays theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from compacter_kernels.impl.plain import autocasts
from compacter_kernels.patch.lokr import lokr_linear
from compacter_kernels.patch.methods import put, replaced_by_others

_METHODS = ("forward", "_rebuild_forward", "bypass_forward", "bypass_forward_diff", "get_weight")


def patch_module(module: nn.Module) -> tuple[bool, str] | None:
    """Whether the module is patched and how, or why not; None where there is nothing to report."""
    if not isinstance(module, LokrModule):
        return None
    kind = type(module)
    if module.module_type != "linear":
        return False, f"LoKr of a {module.module.__name__}: `lycoris` builds its matrix"
    if module.wd:
        return False, "LoKr with weight_decompose (DoRA), which needs the norms of the matrix that `lycoris` builds"
    if any(getattr(kind, name) is not getattr(LokrModule, name) for name in _METHODS):
        return False, f"{kind.__name__} has a forward of its own"
    if any(replaced_by_others(module, name) for name in _METHODS):
        return False, "its forward was replaced on the module, as by LokrModule.parametrize"
    put(module, "_rebuild_forward", rebuild_forward)
    put(module, "bypass_forward", bypass_forward)
    return True, "LoKr from its factors"


def rebuild_forward(lokr: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Instead of LokrModule._rebuild_forward, with the same random numbers in the same order."""
    result = lokr.org_forward(x, *args, **kwargs)
    if not lokr.training or not lokr.rank_dropout:
        return _added(lokr, x, result, lokr.multiplier)
    y = _difference(lokr, x, lokr.multiplier)
    kept = (torch.rand(y.shape[-1]) > lokr.rank_dropout).float().to(y.device)
    if lokr.rank_dropout_scale:
        kept /= kept.mean()
    return result + (y * kept).to(y.dtype)  # type: ignore[no-any-return]


def bypass_forward(lokr: Any, x: Tensor, scale: float = 1) -> Tensor:
    """Instead of LokrModule.bypass_forward."""
    result = lokr.org_forward(x)
    if lokr.training and lokr.dropout:
        return result + lokr.drop(_difference(lokr, x, scale))  # type: ignore[no-any-return]
    return _added(lokr, x, result, scale)


def _added(lokr: Any, x: Tensor, result: Tensor, multiplier: float) -> Tensor:
    """The result of the layer with LoKr added, in one pass where both have one dtype."""
    if result.dtype == x.dtype:
        return lokr_linear(x, *_matrices(lokr), result, _scale(lokr, x, multiplier))
    return result + _difference(lokr, x, multiplier)


def _difference(lokr: Any, x: Tensor, multiplier: float) -> Tensor:
    """What LoKr adds, in the dtype in which `lycoris` computes it."""
    y = lokr_linear(x, *_matrices(lokr), None, _scale(lokr, x, multiplier))
    return y.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x.device) and y.dtype != torch.float64 else y


def _matrices(lokr: Any) -> tuple[list[Tensor], list[Tensor]]:
    """w1 and w2, each whole or its two factors."""
    w1 = [lokr.lokr_w1] if lokr.use_w1 else [lokr.lokr_w1_a, lokr.lokr_w1_b]
    w2 = [lokr.lokr_w2] if lokr.use_w2 else [lokr.lokr_w2_a, lokr.lokr_w2_b]
    return w1, w2


def _scale(lokr: Any, x: Tensor, multiplier: float) -> float | Tensor:
    """The factor of the product. A scalar that does not train is 1, and `lycoris` keeps it so."""
    scale, scalar = float(lokr.scale * multiplier), lokr.scalar
    return scalar.to(x.device) * scale if isinstance(scalar, nn.Parameter) else scale
