"""Every impl against the float64 dense oracle, over sizes, dtypes and options.

Both the output and all gradients are compared.
"""

from __future__ import annotations

import os

import pytest
from oracle import BF16, FP16, FP32, FP64, NOT_DENSE, Case, reference, run, skip_if_refused

from compacter_kernels.activations import FUSED as ACTIVATIONS

# (width, bottleneck) for each n. Some sizes are no multiple of a vector in any chunk, and some have
# chunks of one or two numbers.
WIDTHS = {
    1: [(24, 5), (30, 7), (768, 24)],
    2: [(30, 6), (772, 22), (768, 48)],
    3: [(30, 9), (3072, 24), (768, 48)],
    4: [(24, 4), (772, 12), (768, 24)],
    6: [(30, 6), (24, 18), (3072, 96)],
    8: [(24, 8), (768, 48), (1024, 64)],
    12: [(24, 12), (768, 48), (3072, 96)],
}
TOKENS = (0, 1, 2, 3, 5, 17, 1000)

# Triton's interpreter takes seconds for a case. There wide rows have one n, each other n has one
# rank, and the dtypes have narrow rows.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

SIZES = [
    Case(n=n, rank=rank, width=width, bottleneck=bottleneck, shape=(TOKENS[(i + rank) % 6],))
    for i, n in enumerate(WIDTHS)
    for rank, (width, bottleneck) in enumerate(WIDTHS[n], 1)
    if width < 100 or n == 4 or not INTERPRETED
]
EVERY_N = [
    Case(n=n, rank=rank, width=3 * n, bottleneck=2 * n)
    for n in range(1, 13)
    for rank in ((1 + n % 3,) if INTERPRETED else (1, 2, 3))
]
COUNTS = [
    Case(shape=(tokens,), width=width, bottleneck=d, n=n, dtype=dtype)
    for tokens in TOKENS
    for width, d, n, dtype in ((24, 12, 4, FP32), (120 if INTERPRETED else 768, 48, 12, BF16))
]
DTYPES = [
    Case(dtype=dtype, params=params, width=148 if INTERPRETED else 772, bottleneck=20, shape=(33,), rank=2)
    for dtype in (FP32, BF16, FP16)
    for params in (FP32, FP64, BF16, FP16)
]
FUNCTIONS = [Case(activation=name, dtype=dtype, shape=(17,)) for name in ACTIVATIONS for dtype in (FP32, BF16, FP16)]
OPTIONS = [
    Case(residual=residual, bias=bias, scale=scale, width=48, shape=(9,))
    for residual in ("none", "x", "other", "both")
    for bias in (True, False)
    for scale in (1.0, -0.3)
]
MIXED = [
    Case(width=72, bottleneck=24, n=3, rank=2, up_n=8, up_rank=1, residual="other", shape=(19,)),
    Case(width=72, bottleneck=24, n=8, rank=1, up_n=12, up_rank=3, dtype=BF16, shape=(19,)),
    Case(width=768, bottleneck=24, n=12, rank=1, up_n=1, up_rank=2, activation="relu", shape=(40,)),
    Case(width=12, bottleneck=96, n=4, rank=2, shape=(17,), scale=2.0),
]


@pytest.mark.parametrize("impl", NOT_DENSE)
@pytest.mark.parametrize("case", SIZES + EVERY_N + COUNTS + DTYPES + FUNCTIONS + OPTIONS + MIXED, ids=str)
def test_adapter(case: Case, impl: str) -> None:
    skip_if_refused(case, case.tensors(), impl)
    reference(case).accept(run(case, case.tensors(), impl), impl)


# For n = 1 the gradient of the rule is one number, and its error is relative. With this seed no
# such number is nearly 0.
LINEAR = [
    Case("linear", width, bottleneck, case.n, case.rank, shape=case.shape, seed=44 if case.n == 1 else 0)
    for case in SIZES + EVERY_N
    for width, bottleneck in ((case.width, case.bottleneck), (case.bottleneck, case.width))
]
LINEAR_OPTIONS = [
    Case("linear", dtype=dtype, params=params, bias=bias, width=30, bottleneck=42, n=6, rank=2, shape=(7,))
    for dtype in (FP32, BF16, FP16)
    for params in (FP32, FP64, BF16, FP16)
    for bias in (True, False)
]


@pytest.mark.parametrize("impl", NOT_DENSE)
@pytest.mark.parametrize("case", LINEAR + LINEAR_OPTIONS, ids=str)
def test_linear(case: Case, impl: str) -> None:
    skip_if_refused(case, case.tensors(), impl)
    reference(case).accept(run(case, case.tensors(), impl), impl)


@pytest.mark.parametrize("case", [Case("linear", rank=None, bottleneck=20), Case(rank=None, residual="other")], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_unfactorised_weights(case: Case, dtype: object) -> None:
    case = Case(**{**vars(case), "dtype": dtype})
    reference(case).accept(run(case, case.tensors(), "factored"))
