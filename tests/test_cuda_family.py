"""Banks, plain bottlenecks and rules of any shape through impl="cuda", executed on the CPU.

The results are compared with `dense` in float64, by the limits of the accuracy contract.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
from collections.abc import Iterator

import pytest
import torch
from executed_cuda import DEVICE, VARIABLE, load, serve
from family_calls import Family
from oracle import BF16, FP16, FP32, FP64, assert_same_bits

from compacter_kernels.impl import cuda

if not os.environ.get(VARIABLE):
    pytest.skip(f"no {VARIABLE}: `make cuda-on-cpu` builds it", allow_module_level=True)

KIB = 1024
AMPERE = cuda.Device(multiprocessors=3, shared_limit=163 * KIB, shared_per_multiprocessor=164 * KIB, capability=80)
BLACKWELL = cuda.Device(multiprocessors=1, shared_limit=99 * KIB, shared_per_multiprocessor=100 * KIB, capability=120)

DTYPES = (BF16, FP16, FP32)
ROUTE = (2, 0, -1, 2, 1, 1, -1, 0)
BANKS = [
    Family(n * chunk, n * inner, n, rank, 3, ROUTE, dtype=dtype, residual=residual, bias=bias, shared=shared)
    for (n, rank), (chunk, inner, residual, bias, shared), dtype in itertools.product(
        ((1, 1), (2, 2), (4, 1), (8, 1), (12, 1), (16, 4)),
        ((40, 2, "x", True, False), (13, 3, "other", False, True)),
        DTYPES,
    )
]
MANY = (8, 0, 3, 3, 8, 1, -1, 2, 5, 5, 5, 0)
BANKS += [Family(n=n, adapters=9, route=MANY, tokens=360, shared=bool(n)) for n in (0, 4)]
MIXED = [
    Family(n * chunk, n * 2, n, rank, 3, mix=groups, dtype=dtype, residual=residual, bias=bias, scale=-0.5)
    for (n, rank), (chunk, groups, residual, bias), dtype in itertools.product(
        ((2, 1), (4, 1), (4, 2), (8, 1)), ((40, 4, "x", True), (13, 1, "none", False), (16, 24, "other", True)), DTYPES
    )
]
MIXED += [Family(160, 24, adapters=8, mix=4, dtype=dtype) for dtype in DTYPES]
# The folded matrices of these adapters do not fit, at least not in a backward.
MIXED += [Family(320, 64, 8, adapters=4, mix=4, dtype=dtype, scale=-0.5) for dtype in DTYPES]
DENSE = [
    dataclasses.replace(case, dtype=dtype, n=0)
    for case, dtype in itertools.product(
        (
            Family(160, 48),
            Family(160, 48, turned=True, residual="none", scale=2.0, tokens=150),
            Family(57, 5, turned=True, bias=False, residual="other"),
            Family(72, 256, activation="relu", tokens=70),
            Family(160, 48, adapters=5, route=(4, 1, -1, 1, 0, 4), turned=True),
            Family(57, 70, adapters=2, route=(0, 1, 1), scale=-0.5),
            Family(160, 24, adapters=4, mix=2, turned=True),
            Family(57, 7, adapters=3, mix=24, bias=False, residual="other"),
        ),
        DTYPES,
    )
]
KRONECKER = [
    Family(
        rows * chunk, rank=rank, rule=(terms, rows, columns), out=columns * 16, dtype=dtype, residual=base, scale=scale
    )
    for (terms, rows, columns, rank), (chunk, base, scale), dtype in itertools.product(
        ((2, 3, 5, 2), (1, 16, 4, 8), (3, 1, 7, 1), (4, 64, 5, 2), (3, 3, 3, 3)),
        ((16, "other", 0.5), (13, "none", 1.0)),
        DTYPES,
    )
]
# Groups of whole tiles of 8 tokens: the forward for pairs of chunks and the folded backward.
WHOLE_TILES = (2, 0, -1, 2, 1, 1, -1, 0, 3, 3, 3, 3)
PAIRS = [
    Family(
        width, d, n, 1, 4, WHOLE_TILES, tokens=192, dtype=BF16, residual=residual, bias=bias, shared=shared, scale=scale
    )
    for (width, d, n) in ((192, 24, 4), (384, 64, 8), (384, 48, 12), (768, 24, 4), (1024, 64, 8))
    for residual, bias, shared, scale in (
        ("x", True, False, 1.0),
        ("other", False, True, 1.0),
        ("none", True, False, -0.5),
    )
]
CHOSEN = [
    BANKS[12],
    BANKS[20],
    BANKS[24],
    MIXED[9],
    MIXED[28],
    DENSE[3],
    DENSE[13],
    DENSE[18],
    KRONECKER[1],
    KRONECKER[13],
    MIXED[-2],
]


@pytest.mark.parametrize("case", BANKS + MIXED + DENSE + KRONECKER + PAIRS, ids=str)
def test_agrees_with_dense(case: Family) -> None:
    case.check()


@pytest.mark.parametrize("device", [AMPERE, BLACKWELL], ids=lambda d: f"sm_{d.capability}")
@pytest.mark.parametrize("case", [dataclasses.replace(case, tokens=13 * case.tokens) for case in CHOSEN], ids=str)
def test_every_device(case: Family, device: cuda.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(load(os.environ[VARIABLE]), monkeypatch, device)
    case.check()


@pytest.mark.parametrize("params", [FP64, FP16, BF16], ids=str)
@pytest.mark.parametrize("case", CHOSEN[::3], ids=str)
def test_any_parameters(case: Family, params: torch.dtype) -> None:
    dataclasses.replace(case, params=params).check()


@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize(
    "route", [(1,) * 8, (-1,) * 8, (1, 0) * 12, (0,) * 23 + (6,), (-1, 5) * 4, tuple(range(6)), (3,), ()], ids=str
)
def test_strange_routes(route: tuple[int, ...], n: int) -> None:
    """An adapter without rows gets zeros, and a row without an adapter its residual, bit by bit."""
    case = Family(n=n, adapters=7, route=route, tokens=24 if route else 0)
    got, tensors = case.check(), case.tensors()
    absent = [e for e in range(7) if e not in route]
    weights = [t for name, t in got.items() if "." in name]
    assert weights and not any(t[absent].any() for t in weights)
    if route:
        alone = torch.tensor(route).repeat_interleave(24 // len(route)) == -1
        assert torch.equal(got["out"][alone], tensors["x"][alone])
        assert torch.equal(got["x"][alone], tensors["grad"][alone])


@pytest.mark.parametrize(
    "case", [Family(n=0, adapters=3), Family(adapters=3), Family(768, 24, adapters=3, tokens=64, dtype=BF16)], ids=str
)
def test_a_route_out_of_range_spoils_its_rows_alone(case: Family) -> None:
    case = dataclasses.replace(case, route=(2, 7, 0, -2, 1, 3, -1, 2))
    tensors = case.tensors()
    right = dataclasses.replace(case, route=(2, -1, 0, -1, 1, -1, -1, 2))
    spoiled = torch.tensor([False, True, False, True, False, True, False, False]).repeat_interleave(case.tokens // 8)
    got, expected = case.run(tensors, "cuda"), right.run(tensors, "cuda")
    for name in ("out", "x"):
        assert got[name][spoiled].isnan().all()
        assert torch.equal(got[name][~spoiled], expected[name][~spoiled])
    assert all(t.isfinite().all() for name, t in got.items() if "." in name)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_a_nan_stays_in_its_row(case: Family) -> None:
    tensors = case.tensors()
    clean = case.run(tensors, "cuda")
    tensors["x"][6, 3] = float("nan")
    spoiled, others = case.run(tensors, "cuda"), torch.arange(case.tokens) != 6
    for name in ("out", "x"):
        assert torch.equal(spoiled[name][others], clean[name][others])


@pytest.mark.parametrize(
    "single",
    [
        *(
            Family(n=0, bottleneck=48, tokens=150, turned=turned, dtype=dtype)
            for turned in (True, False)
            for dtype in DTYPES
        ),
        *(
            Family(width, d, n, tokens=192, dtype=BF16)
            for width, d, n in ((384, 24, 4), (384, 48, 12), (768, 24, 4), (1024, 64, 8))
        ),
    ],
    ids=str,
)
def test_a_bank_of_one_is_the_adapter(single: Family) -> None:
    """The output has the same bits, and what else has the same tiles."""
    tensors = single.tensors()
    bank = dataclasses.replace(single, adapters=1, route=(0,) * 6)
    stacked = {name: t[None] if "." in name else t for name, t in tensors.items()}
    expected = {name: t[None] if "." in name else t for name, t in single.run(tensors, "cuda").items()}
    got = bank.run(stacked, "cuda")
    same = got if single.n == 0 else ("out", "x") if single.width >= 768 else ("out",)
    assert_same_bits({name: got[name] for name in same}, {name: expected[name] for name in same})


@pytest.mark.parametrize("case", [BANKS[12], BANKS[20], DENSE[12]], ids=str)
def test_routed_rows_have_the_bits_of_their_adapter_alone(case: Family) -> None:
    tensors = case.tensors()
    got = case.run(tensors, "cuda")
    for adapter in set(case.route) - {-1}:
        all_one = dataclasses.replace(case, route=(adapter,) * len(case.route))
        rows = torch.tensor(case.route).repeat_interleave(case.tokens // len(case.route)) == adapter
        expected = all_one.run(tensors, "cuda")
        assert all(torch.equal(got[name][rows], expected[name][rows]) for name in ("out", "x"))


@pytest.mark.parametrize("frozen", [("x",), ("down.left", "down.weight", "up.bias"), ("mix",)], ids=str)
@pytest.mark.parametrize("case", [*CHOSEN[:2], *CHOSEN[3:8]], ids=str)
def test_without_a_gradient(case: Family, frozen: tuple[str, ...]) -> None:
    """What is not wanted is not written, and changes nothing else."""
    tensors = case.tensors()
    whole = case.run(tensors, "cuda")
    assert_same_bits(case.run(tensors, "cuda", frozen), {name: t for name, t in whole.items() if name not in frozen})


@pytest.mark.parametrize("case", [CHOSEN[0], CHOSEN[3], CHOSEN[6], CHOSEN[7]], ids=str)
def test_frozen_weights_cost_nothing(case: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bank whose weights are frozen, the backward keeps nothing of each row and no sums."""
    tensors, asked, empty = case.tensors(), [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: asked.append(size) or empty(*size, **options))
    case.run(tensors, "cuda", tuple(name for name in tensors if "." in name))
    (frozen,) = asked[-1]
    case.run(tensors, "cuda")
    (whole,) = asked[-1]
    numbers = (case.n**2 * case.rank if case.n else case.bottleneck) * (case.adapters if case.mix else 1)
    assert frozen + 2 * case.tokens * numbers < whole


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_memory_is_written_before_it_is_read(case: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, empty, like = case.tensors(), torch.empty, torch.empty_like
    expected = case.run(tensors, "cuda")
    for name, function in (("empty", empty), ("empty_like", like)):
        monkeypatch.setattr(torch, name, lambda *a, _f=function, **k: _f(*a, **k).fill_(float("nan")))
    assert_same_bits(case.run(tensors, "cuda"), expected)


@pytest.fixture
def library() -> Iterator[ctypes.CDLL]:
    """The functions of the executed kernels. The order of threads is reset after the test."""
    (path,) = (p for p in [load(os.environ[VARIABLE]).__file__] if p)
    found = ctypes.CDLL(path)
    found.cuda_on_cpu_conflicts()
    yield found
    found.cuda_on_cpu_order(0)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_the_same_bits_in_every_order(case: Family, library: ctypes.CDLL) -> None:
    found = []
    for order in (0, 1, 2, 3):
        library.cuda_on_cpu_order(order)
        found.append(case.run(case.tensors(), "cuda"))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_no_bank_conflicts_of_ldmatrix(case: Family, library: ctypes.CDLL) -> None:
    case.run(case.tensors(), "cuda")
    assert library.cuda_on_cpu_conflicts() == 0


@pytest.mark.parametrize(
    ("n", "residual", "moved"),
    [
        (n, residual, moved)
        for n, weight in ((0, "up.weight"), (4, "down.left"))
        for residual, added in (("x", ()), ("other", ("residual",)))
        for moved in ("x", "grad", weight, *added)
    ],
)
def test_unaligned_addresses(n: int, residual: str, moved: str) -> None:
    case = Family(n=n, adapters=3, route=ROUTE, dtype=BF16, residual=residual)
    tensors = case.tensors()
    there = tensors[moved]
    tensors[moved] = there.new_empty(there.numel() + 1)[1:].view(there.shape).copy_(there)
    assert tensors[moved].data_ptr() % 16
    got, expected = case.run(tensors, "cuda"), case.run(case.tensors(), "cuda")
    assert_same_bits(got, expected)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            Family(n=0, width=512, bottleneck=264, tokens=4),
            "the bottleneck has width 264; the kernels have at most 256",
        ),
        (
            Family(n=3, width=48, bottleneck=6, adapters=2, route=(1, 0), tokens=4),
            "phm_dim=3 with phm_rank=1 is not compiled",
        ),
        (
            Family(1040, rule=(1, 65, 2), out=8, tokens=2, residual="none"),
            "a rule of 65 x 2 is above 64 in a dimension",
        ),
        (Family(64, rule=(9, 4, 2), rank=8, out=8, tokens=2, residual="none"), "9 terms of rank 8 are above 64 in all"),
        (Family(n=12, width=768, bottleneck=48, adapters=16, mix=1, tokens=4), "bytes of shared memory"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_is_named(case: Family, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        case.run(case.tensors(), "cuda")


def test_long_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores truncate, so that no accumulator may live longer than a tile."""
    serve(load(os.environ[VARIABLE]), monkeypatch, DEVICE._replace(multiprocessors=1))
    for case in (Family(24, 12, 4, adapters=2, route=(0, 1) * 2), Family(24, 12, 0, adapters=2, mix=1)):
        dataclasses.replace(case, tokens=6000).check()
