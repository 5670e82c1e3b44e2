"""In many training steps, memory stays flat and rounding errors do not build up."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from counted import budget
from oracle import BF16, FP16, FP32, IMPLS
from torch import Tensor, nn

import compacter_kernels as ck

STEPS = budget(300, 10_000)
STATM = Path("/proc/self/statm")
WIDTH = 256


def resident() -> int:
    """The bytes of memory that this process has."""
    gc.collect()
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


@pytest.mark.failure("memory leaks in training")
@pytest.mark.skipif(not STATM.is_file(), reason="the memory of the process is not known")
@pytest.mark.parametrize("impl", IMPLS)
def test_memory_stays_flat(impl: str, record_property: Callable[[str, object], None]) -> None:
    """After a tenth of the steps, the process grows by less than nine tensors of the size of x.

    So a step may not keep a thirtieth of x.
    """
    adapter = ck.CompacterAdapter(WIDTH, reduction_factor=8, impl=impl)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    x = torch.randn(1024, WIDTH)
    start = 0
    for step in range(STEPS):
        if step == STEPS // 10:
            start = resident()
        adapter(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert resident() - start < 9 * x.nbytes
    record_property("inputs", STEPS)


def trained(start: nn.Module, xs: list[Tensor], impl: str) -> dict[str, Tensor]:
    """The parameters after a step of SGD on each x, in float64."""
    adapter = ck.CompacterAdapter(24, reduction_factor=2, impl=impl, dtype=next(start.parameters()).dtype)
    adapter.load_state_dict(start.state_dict())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.02, momentum=0.5)
    for x in xs:
        (adapter(x) - x.flip(-1)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().double() for name, parameter in adapter.named_parameters()}


@pytest.mark.failure("rounding errors build up in training")
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "dense"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_a_hundred_steps_against_float64(
    dtype: torch.dtype, impl: str, record_property: Callable[[str, object], None]
) -> None:
    """All parameters together are as close to those of float64 as after steps of dense torch."""
    torch.manual_seed(1)
    start = ck.CompacterAdapter(24, reduction_factor=2)
    for parameter in start.parameters():
        nn.init.normal_(parameter, 0, 0.4)
    xs = [torch.randn(32, 24).to(dtype) for _ in range(100)]
    exact = trained(start.double(), [x.double() for x in xs], "dense")
    start.float()
    errors = {}
    for name in (impl, "dense"):
        found = trained(start, xs, name)
        errors[name] = float(sum((found[key] - value).square().sum() for key, value in exact.items())) ** 0.5
    moved = float(sum((value - start.state_dict()[key]).square().sum() for key, value in exact.items())) ** 0.5
    assert errors["dense"] < 0.1 * moved
    assert errors[impl] <= 2 * errors["dense"]
    record_property("inputs", len(xs))
