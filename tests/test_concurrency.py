"""Several Python threads at once, and processes forked from one that has used every core."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from oracle import BF16, IMPLS, Case, Tensors, assert_same_bits, run
from torch.utils.data import DataLoader, Dataset

import compacter_kernels as ck

pytestmark = pytest.mark.usefixtures("two_threads")

CASES = [
    Case(shape=(400,), width=96, bottleneck=24, n=8),
    Case(shape=(300,), width=48, bottleneck=24, n=3, dtype=BF16, residual="other"),
    Case("linear", shape=(400,), width=96, bottleneck=48, n=12),
    Case("linear", shape=(7,), width=24, bottleneck=48, rank=3),
]


@pytest.fixture
def two_threads(threads: None) -> None:
    """Each call uses two threads of OpenMP, also if the environment says otherwise."""
    torch.set_num_threads(2)


@pytest.mark.failure("several threads call at once")
@pytest.mark.parametrize("impl", IMPLS)
def test_four_threads_at_once(impl: str) -> None:
    inputs = [case.tensors() for case in CASES]
    expected = [run(case, tensors, impl) for case, tensors in zip(CASES, inputs, strict=True)]
    start = threading.Barrier(len(CASES))
    failures: list[BaseException] = []

    def work(i: int) -> None:
        torch.set_num_threads(2)  # OpenMP keeps this number for each thread
        try:
            start.wait()
            for turn in range(3 * len(CASES)):
                k = (i + turn) % len(CASES)
                assert_same_bits(run(CASES[k], inputs[k], impl), expected[k])
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(CASES))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


class _Adapted(Dataset[Tensors]):
    """A data set whose items the worker computes by a forward and a backward."""

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self.inputs = CASES[0].tensors()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensors:
        return run(CASES[0], self.inputs, self.impl)


@pytest.mark.failure("the process forks after a call")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("impl", IMPLS)
def test_forked_data_loader_worker(impl: str) -> None:
    data = _Adapted(impl)
    expected = data[0]  # so that the parent has used its threads
    items = list(DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60))
    assert len(items) == len(data)
    for item in items:
        for name, tensor in item.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.failure("the process forks after a call")
@pytest.mark.skipif(ck.available_impls()["cpu"] is not None, reason="cpu is not built")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_without_setting_the_thread_count() -> None:
    """With several threads torch hangs here. The fused kernels must not hang."""
    case = Case(shape=(64,), width=96, bottleneck=24, n=8)
    tensors, grad = case.tensors(), case.grad_output()
    run(CASES[0], CASES[0].tensors(), "cpu")

    def child() -> None:
        torch.utils.deterministic.fill_uninitialized_memory = False
        run(case, tensors, "cpu", grad)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    hung = process.is_alive()
    process.kill()
    process.join()
    assert not hung
    assert process.exitcode == 0
