"""Calls that fill the device's memory.

Run them alone, and not beside other processes on the same device.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from on_device import DEVICE, SERVING, inputs
from oracle import BF16, FP32, Case, assert_same_bits, copies, run

from compacter_kernels.accuracy import error, floor

TOKENS, WIDTH = 2_900_000, 768  # 2.2e9 elements, beyond 2^31
NEED = 26 * 2**30  # x, the output and their gradients, each 4.5 GB
BLOCK = 1024  # parts begin at multiples of it, so that a token has the same index within a tile
PARTS = [slice(0, 2 * BLOCK), slice(2730 * BLOCK, 2732 * BLOCK), slice(2830 * BLOCK, TOKENS)]  # the second spans 2^31
CHUNKS = 10


@pytest.fixture(autouse=True)
def all_memory() -> Iterator[None]:
    """The test starts and ends without cached memory and without a limit."""
    torch.cuda.empty_cache()
    yield
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def _require(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} GiB are free")


@pytest.mark.parametrize("impl", SERVING)
def test_more_than_2_to_the_31_elements(impl: str) -> None:
    _require(NEED)
    case = Case(shape=(1,), width=WIDTH, bottleneck=24, dtype=BF16)
    tensors, _ = inputs(case)
    rng = torch.Generator(DEVICE).manual_seed(1)
    x, grad = (torch.randn(TOKENS, WIDTH, device=DEVICE, dtype=BF16, generator=rng) for _ in range(2))
    whole = run(case, {**tensors, "x": x.requires_grad_()}, impl, grad)
    for part in PARTS:
        alone = run(case, {**tensors, "x": x.detach()[part].clone().requires_grad_()}, impl, grad[part].clone())
        for name in ("out", "x"):
            torch.testing.assert_close(alone[name], whole[name][part], rtol=0, atol=0)
    names = [name for name in whole if name not in ("out", "x")]
    sums = {name: torch.zeros_like(whole[name], dtype=torch.float64) for name in names}
    step = TOKENS // CHUNKS
    for start in range(0, TOKENS, step):
        chunk = x.detach()[start : start + step].requires_grad_()
        found = run(case, {**tensors, "x": chunk}, impl, grad[start : start + step])
        for name in names:
            sums[name] += found[name]
    assert {name: off for name in names if not (off := error(whole[name], sums[name])) < floor(BF16, FP32)} == {}


def _limit_memory(spare: int) -> None:
    """Allow no more than `spare` bytes beyond the memory that is reserved now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)


@pytest.mark.parametrize("impl", SERVING)
def test_out_of_memory_leaves_no_damage(impl: str) -> None:
    """Forward and backward raise torch's error and change no input.

    They work when there is enough memory again.
    """
    _require(8 * 2**30)
    case = Case(shape=(262144,), width=WIDTH, bottleneck=24, dtype=BF16)  # x takes 400 MB
    tensors, grad = inputs(case)
    before, grad_before = copies(tensors), grad.clone()
    expected = run(case, tensors, impl, grad)
    _limit_memory(100 * 2**20)
    with pytest.raises(torch.OutOfMemoryError):
        case.call(tensors, impl)
    torch.cuda.set_per_process_memory_fraction(1.0)
    out = case.call(tensors, impl)
    _limit_memory(100 * 2**20)
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(out, list(tensors.values()), grad, retain_graph=True)
    torch.cuda.set_per_process_memory_fraction(1.0)
    grads = torch.autograd.grad(out, list(tensors.values()), grad)
    got = {"out": out.detach(), **dict(zip(tensors, grads, strict=True))}
    assert_same_bits(got, expected)
    assert_same_bits(run(case, tensors, impl, grad), expected)
    assert_same_bits({**tensors, "grad": grad}, {**before, "grad": grad_before})
