"""from_dense refuses what does not fit before any work is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import FP32
from test_from_dense import FP64, Bottleneck, random_pair
from torch import nn

from compacter_kernels import from_dense

DOWN, UP = random_pair(24, 12)
NAN = nn.Linear(24, 12, dtype=FP64)
nn.init.constant_(NAN.weight, float("nan"))
ERRORS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((NAN, UP), {}, ValueError, "down.weight holds NaN or infinite values"),
    ((DOWN, (UP.weight, NAN.weight[:, 0].repeat(2))), {}, ValueError, "up.bias holds NaN"),
    ((DOWN, DOWN), {}, ValueError, r"up must lead back to down's input.*\(12, 24\)"),
    ((DOWN, 3), {}, TypeError, "up must be an nn.Linear, a weight .*got int"),
    ((DOWN,), {}, TypeError, "up is missing.*got Linear"),
    (([],), {}, ValueError, "down is an empty sequence"),
    (([(DOWN, UP), DOWN.weight],), {}, TypeError, r"adapter 1: must be a module or a pair \(down, up\), got Parameter"),
    (([(DOWN, UP), random_pair(24, 12, FP32)],), {}, ValueError, "adapter 1 is torch.float32 on cpu"),
    ((DOWN, UP.weight.float()), {}, ValueError, "up.weight is torch.float32 on cpu, down.weight torch.float64"),
    ((DOWN, UP.weight.long()), {}, TypeError, "up.weight must be a float32.*got torch.int64"),
    ((DOWN.weight[0], UP), {}, ValueError, r"down.weight must have shape \(out, in\), got \(24,\)"),
    ((DOWN, (UP.weight, DOWN.bias)), {}, ValueError, r"up.bias must have shape \(24,\), got \(12,\)"),
    ((nn.Linear(24, 12, device="meta"), UP), {}, ValueError, "down.weight is on the meta device"),
    (
        (DOWN, UP),
        {"phm_dim": 5},
        ValueError,
        "phm_dim=5 does not divide hidden_size=24; choose one of 1, 2, 3, 4, 6, 12",
    ),
    ((DOWN, UP), {"phm_dim": []}, ValueError, r"phm_dim must be an integer >= 1, several of them or None, got \[\]"),
    ((DOWN, UP), {"phm_rank": 0}, ValueError, "phm_rank must be an integer >= 1.*got 0"),
    ((DOWN, UP), {"phm_rank": 2, "factorized_phm_W": False}, ValueError, "phm_rank=2 has no meaning"),
    ((DOWN, UP), {"tolerance": -1}, ValueError, "tolerance must be a number >= 0 or None, got -1"),
    ((DOWN, UP), {"starts": 0}, ValueError, "starts must be an integer >= 1, got 0"),
    ((DOWN, UP), {"phm_rule": torch.zeros(4, 4, 4)}, TypeError, "phm_rule must be a torch.nn.Parameter.*got Tensor"),
    ((DOWN, UP), {"phm_rule": nn.Parameter(torch.zeros(4, 4))}, ValueError, r"phm_rule must have shape.*got \(4, 4\)"),
    ((DOWN, UP), {"phm_rule": nn.Parameter(torch.zeros(4, 4, 4)), "phm_dim": 2}, ValueError, "phm_dim=2 is not that"),
    ((DOWN, UP), {"phm_rule": nn.Parameter(torch.zeros(5, 5, 5))}, ValueError, "phm_dim=5 does not divide"),
    ((DOWN, UP), {"activation": "gelu9"}, ValueError, "activation='gelu9' is not known"),
    ((DOWN, UP), {"reduction_factor": 2}, TypeError, "from_dense takes no reduction_factor"),
    ((DOWN, UP), {"wrong": 2}, TypeError, "wrong"),
    ((nn.Linear(2, 1), nn.Linear(1, 2)), {}, ValueError, "no form searched has fewer parameters"),
    ((nn.Sequential(DOWN, nn.ReLU()),), {}, ValueError, "Sequential must have two nn.Linear.*has 0; pass down and up"),
    ((nn.Sequential(DOWN, nn.ReLU(), UP, nn.LayerNorm(24)),), {}, ValueError, "has 0, 2, 3.weight, 3.bias"),
    ((nn.Sequential(DOWN, nn.ReLU(), nn.ELU(), UP),), {}, ValueError, "activation is None, but the module"),
    (([Bottleneck(nn.ReLU()), Bottleneck(nn.SiLU())],), {}, ValueError, "adapter 1 has .*'silu'.*must agree"),
]


@pytest.mark.parametrize(("args", "options", "kind", "match"), ERRORS, ids=[entry[-1][:50] for entry in ERRORS])
def test_errors_before_any_work(
    args: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compacter_kernels.compress.fit", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(kind, match=match):
        from_dense(*args, **options)
