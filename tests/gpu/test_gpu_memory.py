"""The memory that the kernels use on the device.

They write every element of a result, change no input, and need little memory besides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_device import DEVICE, SERVING, inputs
from oracle import BF16, Case, assert_same_bits, copies, run

CASES = [
    Case("linear", shape=(37,), width=30, bottleneck=42, n=6),
    Case(shape=(37,), width=30, bottleneck=18, n=6, rank=2, residual="other"),
    Case(shape=(1037,), width=768, bottleneck=24, dtype=BF16),
]
WIDE = Case(shape=(65536,), width=768, bottleneck=192, dtype=BF16)  # a bottleneck in bf16 is 25 MB
SMALL = 8 * 2**20  # the limit for the partial sums of the weight gradients
PER_TOKEN = 2 * WIDE.n**2 * 4  # the limit for the data that a backward in two phases passes on


def test_uninitialised_memory_is_poisoned() -> None:
    """The fixture of conftest.py works on the device too."""
    x = torch.zeros(8, device=DEVICE)
    for empty in (torch.empty(8, device=DEVICE), torch.empty_like(x), x.new_empty(8), x.new_empty(8, dtype=BF16)):
        assert empty.isnan().all()


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_are_bitwise_unchanged(case: Case, impl: str) -> None:
    tensors, grad = inputs(case)
    before, grad_before = copies(tensors), grad.clone()
    run(case, tensors, impl, grad)
    assert_same_bits({**tensors, "grad": grad}, {**before, "grad": grad_before})


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_beside_the_results_is_untouched(case: Case, impl: str) -> None:
    """Tensors that the allocator puts beside those of the calls keep their bits."""
    tensors, grad = inputs(case)
    canaries = [torch.full((1024,), 7.0, device=DEVICE) for _ in range(20)]
    del canaries[1::2]  # free gaps into which the results may go
    results = [run(case, tensors, impl, grad) for _ in range(3)]
    assert all((canary == 7.0).all() for canary in canaries)
    for found in results[1:]:
        assert_same_bits(found, results[0])


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_for_backward(case: Case, impl: str) -> None:
    """Only x and the parameters themselves are saved."""
    tensors, _ = inputs(case)
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        case.call(tensors, impl)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for name, t in tensors.items() if name != "residual"}


def _taken(call: Callable[[], Any]) -> tuple[int, Any]:
    """The peak of the memory that the call allocates, in bytes, and its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


@pytest.mark.parametrize("impl", SERVING)
def test_nothing_of_the_bottlenecks_size_is_allocated(impl: str) -> None:
    tensors, grad = inputs(WIDE)
    wanted = list(tensors.values())
    run(WIDE, tensors, impl, grad)
    forward, out = _taken(lambda: WIDE.call(tensors, impl))
    assert forward <= out.nbytes + SMALL
    backward, grads = _taken(lambda: torch.autograd.grad(out, wanted, grad))
    assert backward <= sum(t.nbytes for t in grads) + WIDE.shape[0] * PER_TOKEN + SMALL
    bottleneck = 2 * WIDE.shape[0] * WIDE.bottleneck
    assert WIDE.shape[0] * PER_TOKEN + SMALL < bottleneck  # otherwise the limits above would prove nothing


@pytest.mark.parametrize("impl", SERVING)
def test_memory_does_not_grow_with_the_calls(impl: str) -> None:
    case = CASES[2]
    tensors, grad = inputs(case)
    held = []
    for _ in range(6):
        run(case, tensors, impl, grad)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[1]
