"""Banks and Kronecker maps in Triton's interpreter, against float64, for strange routes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from oracle import BF16, FP32
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.accuracy import error, floor
from compacter_kernels.calls import BankCall
from compacter_kernels.cases import Case
from compacter_kernels.impl import triton as impl
from compacter_kernels.problem import adapter_problem, linear_problem
from compacter_kernels.weights import PHMWeights

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter (make interpret)", allow_module_level=True)
pytest.importorskip("triton")

from compacter_kernels.impl.triton import kernel as kernels
from compacter_kernels.impl.triton.plan import served

ROWS = 40


def bank(adapters: int, shared: bool = False, **options: Any) -> tuple[PHMWeights, PHMWeights]:
    """down and up of a bank, whose adapters are cases of different seeds."""
    cases = [Case(seed=seed, **options).inputs() for seed in range(adapters)]

    def stacked(side: str) -> PHMWeights:
        weights = [getattr(case, side) for case in cases]
        columns = [None if None in column else torch.stack(column) for column in zip(*weights, strict=True)]
        if shared:
            columns[0] = columns[0][0]
        return PHMWeights(*columns).map(lambda t: t.detach().requires_grad_())

    return stacked("down"), stacked("up")


def gradients(
    x: Tensor, down: Any, up: Any, route: Tensor, grad: Tensor, impl: str, **options: Any
) -> dict[str, Tensor]:
    """The output and all gradients of a bank by name."""
    out = ck.compacter_adapter_bank(x, down, up, route=route, impl=impl, **options)
    named = {"x": x, **dict([*down.named("down"), *up.named("up")])}
    return {"out": out.detach(), **dict(zip(named, torch.autograd.grad(out, list(named.values()), grad), strict=True))}


def assert_exact(x: Tensor, down: Any, up: Any, route: Tensor, **options: Any) -> dict[str, Tensor]:
    """The results of triton, which are within the limits of the contract."""
    grad = torch.randn(x.shape).to(x.dtype)
    residual = options.get("residual")
    got = gradients(x, down, up, route, grad, "triton", **options)

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    x64 = wide(x)
    if residual is not None:
        options["residual"] = x64 if residual is x else wide(residual)
    exact = gradients(x64, down.map(wide), up.map(wide), route, grad.double(), "dense", **options)
    limit = max(floor(x.dtype, FP32), floor(FP32, FP32))
    for name, tensor in got.items():
        assert error(tensor, exact[name]) <= limit, name
    return got


def drawn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


ROUTES = {
    "one": [1] * ROWS,
    "none": [-1] * ROWS,
    "sorted": [-1] * 5 + [0] * 20 + [2] * 15,
    "unsorted": [2, 0, -1, 1] * 10,
    "alone": [0] * 39 + [2],
    "groups": [1, -1, 0, 1],
    "long groups": [2, 2],
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [4, 12])
@pytest.mark.parametrize("ids", ROUTES.values(), ids=list(ROUTES))
def test_route(ids: list[int], n: int, dtype: torch.dtype) -> None:
    """Adapters that do not occur have a gradient of 0, as those of dense."""
    down, up = bank(3, n=n, width=16 * n, bottleneck=2 * n)
    route = torch.tensor(ids)
    x = drawn(len(ids), ROWS // len(ids), 16 * n, dtype=dtype)
    got = assert_exact(x, down, up, route, residual=x)
    absent = [e for e in range(3) if e not in ids]
    assert all((tensor[absent] == 0).all() for name, tensor in got.items() if name not in ("out", "x"))
    assert torch.equal(got["out"][route == -1], x[route == -1])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{"shared": True}, {"n": 2, "up_n": 4}, {"adapters": 37}], ids=str)
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    sizes = {"width": 48, "bottleneck": 12} | options
    adapters = sizes.pop("adapters", 3)
    down, up = bank(adapters, **sizes)
    x = drawn(5, 13, 48, dtype=dtype)
    route = torch.randint(-1, adapters, (5, 13))
    assert_exact(x, down, up, route, residual=torch.randn(x.shape).to(dtype), scale=0.7)


def test_no_rows() -> None:
    down, up = bank(3)
    got = gradients(drawn(0, 24), down, up, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 24), "triton")
    assert got["out"].shape == (0, 24)
    assert all((tensor == 0).all() for tensor in got.values())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [4, 8, 12])
def test_a_bank_of_one_has_the_bits_of_the_single_kernel(n: int, dtype: torch.dtype) -> None:
    down, up = bank(1, n=n, width=16 * n, bottleneck=2 * n)
    x, grad = drawn(150, 16 * n, dtype=dtype), torch.randn(150, 16 * n).to(dtype)
    many = gradients(x, down, up, torch.zeros(150, dtype=torch.int64), grad, "triton", residual=x)
    leaves = [x, *[t.detach()[0].requires_grad_() for t in (*down, *up)]]
    out = ck.compacter_adapter(x, PHMWeights(*leaves[1:5]), PHMWeights(*leaves[5:]), residual=x, impl="triton")
    single = [out, *torch.autograd.grad(out, leaves, grad)]
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(many.values(), single, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_row_whose_adapter_does_not_exist_is_nan(dtype: torch.dtype) -> None:
    """In output and gradient, and no other number is. On a GPU, as the CPU refuses the call."""
    down, up = (side.map(torch.Tensor.detach) for side in bank(3))
    ids = torch.tensor([0, 3, -1, -2, 2, 2**40, -(2**40), 1])
    x, grad = torch.randn(8, 24).to(dtype), torch.randn(8, 24).to(dtype)
    problem = adapter_problem(x, down, up, "gelu_new", 3, False)
    kernel = impl.prepare(problem)
    call = BankCall(x, down, up, None, True, 1.0, None, ids, None)
    results = (kernel.forward(call), *kernel.backward(call, grad, (True,) * 9 + (False,))[:-1])
    wrong = (ids < -1) | (ids > 2)
    for tensor in results[:2]:
        assert torch.equal(tensor.isnan().all(1), wrong) and torch.equal(tensor.isnan().any(1), wrong)
    assert all(tensor.isfinite().all() for tensor in results[2:])


def test_products_of_a_mix_for_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the products of 16-bit numbers are computed transposed (`tiles.add_turned`)."""
    down, up = (side.map(torch.Tensor.detach) for side in bank(3))
    x, grad, mix = torch.randn(40, 24).to(BF16), torch.randn(40, 24).to(BF16), torch.rand(40, 3)
    problem = adapter_problem(x, down, up, "gelu_new", 3, True)
    call = BankCall(x, down, up, None, True, 0.7, None, None, mix)

    def results() -> tuple[Any, tuple[Tensor, ...]]:
        kernel = impl.prepare(problem)
        return kernel, (kernel.forward(call), *kernel.backward(call, grad, (True,) * 10))

    _, expected = results()
    monkeypatch.setattr(kernels, "served", lambda problem, _, turned: served(problem, "gfx942", turned))
    kernel, got = results()
    assert kernel.served["expand"].precision.TURN
    for one, other in zip(got, expected, strict=True):
        assert error(one, other.double()) <= floor(BF16, FP32)


def test_nan_stays_in_its_row_and_adapter() -> None:
    """Also where a NaN is in the weights of an adapter that no row has, or in rows without one."""
    down, up = bank(3)
    x = drawn(6, 24)
    with torch.no_grad():
        x[1], x[4] = float("nan"), float("nan")
        down.left[2] = float("nan")
    route = torch.tensor([0, 1, 0, 1, -1, 0])
    other = torch.zeros(6, 24)
    got = gradients(x, down, up, route, torch.randn(6, 24), "triton", residual=other)
    assert got["out"].isnan().any(1).tolist() == [False, True, False, False, False, False]
    assert got["down.left"].isfinite().flatten(1).all(1).tolist() == [True, False, True]


KRONECKER = [  # terms, n_in, n_out, rank, in / n_in, out / n_out, has bias and base
    (1, 4, 8, 8, 16, 12, True),
    (3, 2, 4, 2, 24, 12, False),
    (2, 12, 6, 4, 10, 20, True),
    (1, 16, 16, 5, 10, 20, True),
    (4, 4, 4, 1, 16, 12, True),
]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", KRONECKER, ids=str)
def test_kronecker_map(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """With a rule of any shape, a base and a scale."""
    terms, n_in, n_out, rank, chunk_in, chunk_out, full = sizes
    weights = PHMWeights(
        torch.randn(terms, n_in, n_out) / n_in**0.5,
        torch.randn(terms, chunk_in, rank) / chunk_in**0.5,
        torch.randn(terms, rank, chunk_out),
        torch.randn(n_out * chunk_out) if full else None,
    )
    x, base, grad = (torch.randn(33, width).to(dtype) for width in (n_in * chunk_in, *[n_out * chunk_out] * 2))

    def results(change: Any, impl: str) -> list[Tensor]:
        leaves = [None if t is None else change(t).requires_grad_() for t in (x, base if full else None, *weights)]
        out = ck.kronecker_linear(leaves[0], PHMWeights(*leaves[2:]), leaves[1], 0.6, impl=impl)
        return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], change(grad))]

    exact = results(lambda t: t.double(), "dense")
    for got, expected in zip(results(lambda t: t.clone(), "triton"), exact, strict=True):
        assert error(got, expected) <= floor(dtype, FP32)


@pytest.mark.parametrize(("n_out", "reason"), [(16, None), (32, "need 8192 numbers on chip")])
def test_a_rule_that_would_spill_registers_is_refused(n_out: int, reason: str | None) -> None:
    weights = PHMWeights(torch.zeros(1, 16, n_out), torch.zeros(1, 24, 8), torch.zeros(1, 8, 48), None)
    refusal = impl.refuses(linear_problem(torch.zeros(2, 384), weights))
    assert refusal is None if reason is None else reason in str(refusal)


@pytest.mark.parametrize(("adapters", "reason"), [(65535, None), (65536, "the kernels take at most 65535 adapters")])
def test_a_bank_of_more_adapters_than_a_grid_has_rows_is_refused(adapters: int, reason: str | None) -> None:
    side = PHMWeights(*(torch.zeros(shape) for shape in ((2, 2, 2), (adapters, 2, 2, 1), (adapters, 2, 1, 2))), None)
    assert impl.refuses(adapter_problem(torch.zeros(3, 4), side, side, "relu", adapters, False)) == reason
