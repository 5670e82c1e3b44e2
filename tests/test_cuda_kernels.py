"""The CUDA kernels, executed on the CPU (executed_cuda.py).

The tests run every instance that a launcher can dispatch, on devices with more and with less shared
memory, under several orders of threads.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from executed_cuda import DEVICE, VARIABLE, load, serve
from oracle import BF16, FP16, FP32, FP64, Case, assert_same_bits, problem, reference, run

from compacter_kernels.activations import FUSED as ACTIVATIONS
from compacter_kernels.impl import cuda, native

if not os.environ.get(VARIABLE):
    pytest.skip(f"no {VARIABLE}: `make cuda-on-cpu` builds it", allow_module_level=True)

KIB = 1024
AMPERE = cuda.Device(multiprocessors=3, shared_limit=163 * KIB, shared_per_multiprocessor=164 * KIB, capability=80)
BLACKWELL = cuda.Device(multiprocessors=1, shared_limit=99 * KIB, shared_per_multiprocessor=100 * KIB, capability=120)
WIDE = cuda.Device(multiprocessors=8, shared_limit=227 * KIB, shared_per_multiprocessor=228 * KIB, capability=100)
TOO_WIDE = {(80, 3072), (120, 3072), (120, 4096)}  # capability and width of the cases that do not fit
ORDERS = (0, 1, 2, 3)  # threads upwards, downwards, and in two random orders

# Chunks of 40 numbers move 16 bytes at a time, and chunks of 13 do not. 21 tokens leave a tile
# incomplete.
INSTANCES = [
    Case(operation, n * chunk, n * inner, n, rank, shape=(21,), dtype=dtype)
    for operation, n, rank, dtype in itertools.product(
        ("adapter", "linear"), cuda.PHM_DIMS, cuda.RANKS, (BF16, FP16, FP32)
    )
    for chunk, inner in ((40, 3), (13, 2))
]
STANDARD = [
    Case(width=k, bottleneck=d, n=n, shape=(19,), dtype=BF16)
    for k, d, n in (
        (768, 24, 4),
        (768, 48, 8),
        (768, 48, 12),
        (1024, 64, 8),
        (3072, 96, 12),
        (4096, 64, 4),
        (4096, 128, 8),
    )
]
# On one multiprocessor, a block adds as many tiles as one of 132 does for a million tokens. The
# last case has long rows instead. Each sum of a matrix instruction is truncated.
LONG_SUMS = [
    *(Case(operation, 24, 12, n, shape=(2**20 // 132,)) for operation in ("adapter", "linear") for n in (2, 4)),
    Case("linear", 4096, 32, shape=(16,)),
]
OPTIONS = [
    Case(shape=(37,), n=n, width=n * 48, bottleneck=n * 4, residual=residual, bias=bias, scale=-0.5, dtype=BF16)
    for n, residual, bias in itertools.product((4, 8, 12), ("none", "x", "other"), (True, False))
]
# The forward for pairs of chunks (forward.cu). 300 tokens turn the ring of every group.
PAIRS = [
    Case(width=n * chunk, bottleneck=d, n=n, shape=(300,), residual=residual, dtype=BF16)
    for n, chunk, d, residual in (
        (4, 16, 8, "x"),
        (4, 48, 24, "other"),
        (4, 112, 48, "none"),
        (4, 400, 8, "x"),  # warps share its 25 blocks of columns
        (8, 16, 8, "other"),
        (8, 80, 40, "x"),
        (12, 16, 24, "none"),
        (12, 16, 12, "x"),  # the general forward has this bottleneck
        (12, 48, 72, "x"),
        (12, 32, 48, "other"),
    )
]


# The shapes that have a backward of their own. The tokens turn every ring. Of 301, two blocks have
# different shares.
FOLDED = [
    dataclasses.replace(case, residual=residual, bias=bias, activation=name, scale=scale)
    for case in (
        Case(width=768, bottleneck=24, shape=(301,), dtype=BF16),
        Case(width=1024, bottleneck=64, n=8, shape=(301,), dtype=BF16),
        Case(width=768, bottleneck=48, n=12, shape=(300,), dtype=BF16),
        Case(width=4096, bottleneck=128, n=8, shape=(30,), dtype=BF16),
    )
    for residual, bias, name, scale in (
        ("x", True, "gelu_new", 1.0),
        ("other", True, "gelu", -0.5),
        ("none", False, "silu", 2.0),
        ("x", False, "relu2", 1.0),
    )
]


@pytest.fixture
def library() -> Iterator[ctypes.CDLL]:
    """The functions of the executed kernels. The order of threads is reset after the test."""
    (path,) = (p for p in [load(os.environ[VARIABLE]).__file__] if p)
    found = ctypes.CDLL(path)
    found.cuda_on_cpu_conflicts()
    yield found
    found.cuda_on_cpu_order(0)


def on(device: cuda.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on impl="cuda" runs on such a device. No plan of another device is kept."""
    serve(load(os.environ[VARIABLE]), monkeypatch, device)


@pytest.mark.parametrize("case", INSTANCES, ids=str)
def test_every_instance(case: Case) -> None:
    reference(case).accept(run(case, case.tensors(), "cuda"), "cuda")


@pytest.mark.parametrize("device", [AMPERE, DEVICE, WIDE, BLACKWELL], ids=lambda d: f"sm_{d.capability}")
@pytest.mark.parametrize("case", STANDARD + OPTIONS, ids=str)
def test_every_device(case: Case, device: cuda.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    on(device, monkeypatch)
    if reason := cuda.refuses(problem(case)):
        assert (device.capability, case.width) in TOO_WIDE
        pytest.skip(reason)
    reference(case).accept(run(case, case.tensors(), "cuda"), "cuda")


@pytest.mark.parametrize("device", [DEVICE, BLACKWELL], ids=lambda d: f"sm_{d.capability}")
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs_of_chunks(case: Case, device: cuda.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    on(device, monkeypatch)
    reference(case).accept(run(case, case.tensors(), "cuda"), "cuda")


@pytest.mark.parametrize("device", [AMPERE, DEVICE, BLACKWELL], ids=lambda d: f"sm_{d.capability}")
@pytest.mark.parametrize("case", FOLDED, ids=str)
def test_folded_backward(case: Case, device: cuda.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    on(device, monkeypatch)
    if reason := cuda.refuses(problem(case)):
        assert (device.capability, case.width) in TOO_WIDE
        pytest.skip(reason)
    reference(case).accept(run(case, case.tensors(), "cuda"), "cuda")


@pytest.mark.parametrize("without", ["x", "down.left", "up.bias"])
@pytest.mark.parametrize("case", FOLDED[::4], ids=str)
def test_folded_backward_without_a_gradient(case: Case, without: str) -> None:
    """What is not wanted is not written, and changes nothing else."""
    tensors = case.tensors()
    whole = run(case, tensors, "cuda")
    tensors[without].requires_grad_(False)
    rest = run(case, tensors, "cuda")
    del whole[without]
    assert_same_bits(rest, whole)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("case", FOLDED[::4], ids=str)
def test_folded_backward_with_any_activation(case: Case, activation: str) -> None:
    case = dataclasses.replace(case, shape=(37,), activation=activation)
    reference(case).accept(run(case, case.tensors(), "cuda"), "cuda")


@pytest.mark.parametrize("case", FOLDED[::4], ids=str)
def test_folded_backward_keeps_a_nan_in_its_token(case: Case) -> None:
    token = 6
    tensors = case.tensors()
    clean = run(case, tensors, "cuda")["x"]
    with torch.no_grad():
        tensors["x"][token, 13] = float("nan")
    spoiled = run(case, tensors, "cuda")["x"]
    assert spoiled[token].isnan().all()
    others = torch.arange(len(clean)) != token
    assert torch.equal(spoiled[others], clean[others])


@pytest.mark.parametrize("case", FOLDED[::4], ids=str)
def test_folded_backward_with_relu(case: Case) -> None:
    """Its slope jumps at 0, so that y must be as exact as elsewhere."""
    case = dataclasses.replace(case, shape=(200,), activation="relu")
    reference(case).accept(run(case, case.tensors(), "cuda"), "cuda")


@pytest.mark.parametrize("params", [FP64, FP16, BF16], ids=str)
@pytest.mark.parametrize("case", FOLDED[::4], ids=str)
def test_folded_backward_with_any_parameters(case: Case, params: torch.dtype) -> None:
    case = dataclasses.replace(case, params=params, shape=(37,))
    reference(case).accept(run(case, case.tensors(), "cuda"), "cuda")


@pytest.mark.parametrize("params", [FP64, FP16, BF16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_pairs_of_chunks_with_any_parameters(params: torch.dtype, bias: bool) -> None:
    case = Case(width=192, bottleneck=24, shape=(37,), dtype=BF16, params=params, bias=bias)
    reference(case).accept(run(case, case.tensors(), "cuda"), "cuda")


@pytest.mark.parametrize("case", [*PAIRS, STANDARD[-1]], ids=str)
def test_a_token_has_the_same_bits_among_few_and_many(case: Case) -> None:
    tensors = case.tensors()
    many = case.call(tensors, "cuda").detach()
    some = {name: t[:13] if name in ("x", "residual") else t for name, t in tensors.items()}
    assert torch.equal(case.call(some, "cuda").detach(), many[:13])


@pytest.mark.parametrize("case", FOLDED[::4], ids=str)
def test_the_gradient_of_a_token_has_the_same_bits_among_few_and_many(case: Case) -> None:
    """Wherever its tile begins."""
    tensors = case.tensors()
    grad, some = torch.randn_like(tensors["x"]), slice(11, 24)
    many = run(case, tensors, "cuda", grad)
    few = run(case, {**tensors, "x": tensors["x"][some].detach().requires_grad_()}, "cuda", grad[some])
    assert torch.equal(few["x"], many["x"][some])


@pytest.mark.parametrize("n", [4, 12])
def test_the_widest_case_that_is_not_refused(n: int) -> None:
    """What decides whether a case fits is the plan of its launch, with the rows of its bias."""
    widths = (Case(width=width, bottleneck=4 * n, n=n, dtype=FP32) for width in itertools.count(64 * n, 8 * n))
    *_, case = itertools.takewhile(lambda case: cuda.refuses(problem(case)) is None, widths)
    reference(case).accept(run(case, case.tensors(), "cuda"), "cuda")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operation", ["adapter", "linear"])
def test_the_second_stage_reads_what_was_written(
    operation: str, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage writes every number of the workspace, which starts as NaN."""
    case = Case(operation, 160, 16, shape=(37,), bias=bias, dtype=dtype)
    posed, tensors, empty, made = problem(case), case.tensors(), torch.empty, []

    def recorded(*size: Any, **options: Any) -> torch.Tensor:
        made.append(empty(*size, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", recorded)
    run(case, tensors, "cuda")
    floats = cuda._plan(posed.operation, native.plan_arguments(posed), DEVICE).workspace(37)
    (workspace,) = (t for t in made if t.shape == (floats,))
    assert not workspace.isnan().any()


@pytest.mark.parametrize("case", LONG_SUMS, ids=str)
def test_long_sums(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    on(DEVICE._replace(multiprocessors=1), monkeypatch)
    reference(case).accept(run(case, case.tensors(), "cuda"), "cuda")


@pytest.mark.parametrize("case", [*STANDARD, *PAIRS[1::3], *FOLDED[1::4], OPTIONS[4], INSTANCES[-1]], ids=str)
def test_the_same_bits_in_every_order(case: Case, library: ctypes.CDLL) -> None:
    found = []
    for order in ORDERS:
        library.cuda_on_cpu_order(order)
        found.append(run(case, case.tensors(), "cuda"))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("case", STANDARD + PAIRS, ids=str)
def test_no_bank_conflicts_of_ldmatrix(case: Case, library: ctypes.CDLL) -> None:
    run(case, case.tensors(), "cuda")
    assert library.cuda_on_cpu_conflicts() == 0


@pytest.mark.parametrize("moved", ["x", "residual", "grad", "down.rule", "up.right"])
@pytest.mark.parametrize("case", FOLDED[1::4], ids=str)
def test_unaligned_addresses(case: Case, moved: str) -> None:
    """A tensor whose address is no multiple of 16 bytes moves one number at a time.

    Its width allows wide accesses otherwise.
    """
    case = dataclasses.replace(case, shape=(6,))
    tensors = {**case.tensors(), "grad": case.grad_output()}
    there = tensors[moved].detach()
    shifted = there.new_empty(there.numel() + 1)[1:].view(there.shape).copy_(there)
    assert shifted.data_ptr() % 16
    tensors[moved] = shifted.requires_grad_(moved != "grad")
    grad = tensors.pop("grad")
    reference(case).accept(run(case, tensors, "cuda", grad), "cuda")
