"""Small models with LoKr of peft, as shipped and patched, and a step of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.accuracy import error, floor

peft: Any = pytest.importorskip("peft", reason="peft is not installed")

# in, out, the options of LoKrConfig. In the comment: w1 and w2, or their two factors
SETUPS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "low rank": (60, 96, {"r": 2}),  # 8x6, 12x2 2x10
    "whole w2": (60, 96, {"r": 6}),  # 8x6, 12x10
    "factorised w1": (60, 96, {"r": 3, "decompose_both": True}),  # 8x3 3x6, 12x3 3x10
    "factorised w1, whole w2": (64, 96, {"r": 3, "decompose_both": True, "decompose_factor": 16}),  # 16x3 3x16, 6x4
    "four chunks": (64, 96, {"r": 2, "decompose_factor": 4}),  # 4x4, 24x2 2x16
    "one chunk": (48, 32, {"r": 2, "decompose_factor": 1}),  # 1x1, 32x2 2x48
    "w2 of one number": (64, 64, {"r": 2, "decompose_factor": 64, "decompose_both": True}),  # 64x2 2x64, 1x1
    "prime widths": (31, 53, {"r": 2}),  # 1x1, 53x2 2x31
    "one width is prime": (31, 64, {"r": 2}),  # 8x1, 8x2 2x31
    "rank one, alpha": (60, 96, {"r": 1, "alpha": 5}),
}


def make(setup: str = "low rank", dtype: torch.dtype | None = None, count: int = 1, **options: Any) -> Any:
    """A peft model of a linear layer and `count` active adapters, whose weights are not zero.

    dtype: that of the adapters; the layer's stays float32. Without it, that of the layer.
    """
    width, out, chosen = SETUPS[setup]
    options = {"target_modules": ["0"], "init_weights": False, "alpha": 8, **chosen, **options}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(width, out)), peft.LoKrConfig(**options), "a")
    for name in "bcd"[: count - 1]:
        model.add_adapter(name, peft.LoKrConfig(**options))
    model.base_model.set_adapter(list("abcd"[:count]))
    for path, parameter in model.named_parameters():
        if "lokr_" in path and dtype is not None:
            parameter.data = parameter.data.to(dtype)
    return model


def layer(model: Any) -> Any:
    """The LoKr layer of the model."""
    return model.base_model.model[0]


def patched(model: Any) -> Any:
    """A patched copy."""
    model = copy.deepcopy(model)
    assert [name for name, _ in ck.patch(model).patched] == ["base_model.model.0"]
    return model


def batch(model: Any, dtype: torch.dtype = torch.float32, leading: tuple[int, ...] = (3, 5)) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output."""
    base = layer(model).get_base_layer()
    return tuple(torch.randn(*leading, n).to(dtype) for n in (base.in_features, base.out_features))  # type: ignore[return-value]


def step(model: Any, x: Tensor, grad: Tensor, autocast: torch.dtype | None = None, seed: int = 1) -> dict[str, Tensor]:
    """The output and all gradients by name, with the random numbers of the seed."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = model(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    named = {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters()}  # compiled or not
    return {"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in named.items() if p.grad is not None}}


def exact_step(model: Any, x: Tensor, grad: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """The same by peft in float64."""
    return step(copy.deepcopy(model).double(), x.double(), grad.double(), seed=seed)


def assert_within_contract(got: dict[str, Tensor], shipped: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Each error is at most twice that of peft in the same dtypes, or that of rounding alone."""
    assert got.keys() == shipped.keys() == exact.keys()
    for name, value in shipped.items():
        assert got[name].dtype == value.dtype, name
        working = torch.promote_types(value.dtype, torch.float32)
        limit = max(2 * error(value, exact[name]), floor(value.dtype, working))
        assert error(got[name], exact[name]) <= limit, name
