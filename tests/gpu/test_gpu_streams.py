"""Streams, devices, CUDA graphs and threads.

A call runs on the device and in the stream that the caller has chosen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from on_device import DEVICE, SERVING, inputs
from oracle import BF16, Case, Tensors, assert_same_bits, copies, run
from torch import Tensor

CASES = [
    Case(shape=(600,), width=768, bottleneck=24, dtype=BF16),
    Case(shape=(600,), width=768, bottleneck=48, n=12, residual="other"),
    Case("linear", shape=(600,), width=768, bottleneck=48, n=8),
]
SLEEP = 400_000_000  # cycles, about 0.2 s, which is longer than the host needs


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_callers_stream(case: Case, impl: str) -> None:
    """x is written late, in the stream of the call.

    A kernel in another stream would read the NaN that was there before.
    """
    tensors, grad = inputs(case)
    expected = run(case, tensors, impl, grad)
    late = torch.full_like(tensors["x"].detach(), float("nan"))
    late_grad = torch.full_like(grad, float("nan"))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        late.copy_(tensors["x"].detach())
        late_grad.copy_(grad)
        assert not stream.query(), "the stream slept too short to prove anything"
        got = run(case, {**tensors, "x": late.requires_grad_()}, impl, late_grad)
    stream.synchronize()
    assert_same_bits(got, expected)


@pytest.mark.parametrize("impl", SERVING)
def test_the_call_does_not_wait_for_the_device(impl: str) -> None:
    case = CASES[0]
    tensors, grad = inputs(case)
    expected = run(case, tensors, impl, grad)
    run(case, tensors, impl, grad)  # its memory stays in the allocator, so that later calls need none of the device
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    done = torch.cuda.Event()
    done.record()
    got = run(case, tensors, impl, grad)
    assert not done.query(), "the call synchronised"
    assert_same_bits(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_another_device_than_the_current_one(case: Case, impl: str) -> None:
    tensors, grad = inputs(case)
    expected = run(case, tensors, impl, grad)
    there = {name: t.detach().to("cuda:1").requires_grad_() for name, t in tensors.items()}
    got = run(case, there, impl, grad.to("cuda:1"))
    assert all(t.device.index == 1 for t in got.values())
    assert torch.cuda.current_device() == 0
    assert_same_bits({name: t.to(DEVICE) for name, t in got.items()}, expected)


def _captured(call: Callable[[], Tensors]) -> tuple[torch.cuda.CUDAGraph, Tensors]:
    """A graph of the call. The call runs in a side stream first, as capture requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


def _change(tensors: Tensors, grad: Tensor) -> None:
    """Write other numbers into the same memory."""
    with torch.no_grad():
        for t in (*tensors.values(), grad):
            t.copy_(t.flip(0) * 0.75)


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_graph_replay(case: Case, backward: bool, impl: str) -> None:
    """A replay reads the present values of the inputs, and gives the bits of an eager call."""
    tensors, grad = inputs(case)

    def call() -> Tensors:
        if backward:
            return run(case, tensors, impl, grad)
        with torch.no_grad():
            return {"out": case.call(tensors, impl)}

    graph, static = _captured(call)
    for _ in range(3):
        _change(tensors, grad)
        for name, t in static.items():
            if name != "residual":  # its gradient is `grad` itself
                t.fill_(float("nan"))
        graph.replay()
        fresh = copies(tensors)
        expected = run(case, fresh, impl, grad.clone())
        assert_same_bits(static, {name: expected[name] for name in static})


@pytest.mark.parametrize("impl", SERVING)
def test_threads(impl: str) -> None:
    """Each thread has its own stream, and several shapes run at once."""
    given = [inputs(case) for case in CASES]
    expected = [run(case, pair[0], impl, pair[1]) for case, pair in zip(CASES, given, strict=True)]
    torch.cuda.synchronize()
    start = threading.Barrier(len(CASES))
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            start.wait()
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(5 * len(CASES)):
                    k = (i + turn) % len(CASES)
                    # leaves of its own, since torch warns of a leaf that two streams use
                    got = run(CASES[k], copies(given[k][0]), impl, given[k][1])
                    torch.cuda.current_stream().synchronize()
                    assert_same_bits(got, expected[k])
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(CASES))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("impl", SERVING)
def test_fifty_runs_are_bitwise_equal(impl: str) -> None:
    case = Case(shape=(16384,), width=768, bottleneck=24, dtype=BF16)
    tensors, grad = inputs(case)
    first = run(case, tensors, impl, grad)
    for _ in range(50):
        assert_same_bits(run(case, tensors, impl, grad), first)
