"""Bottleneck adapters and banks through every impl, against the float64 dense oracle.

Both the output and all gradients are compared.
"""

from __future__ import annotations

import os

import pytest
from oracle import BF16, FP16, FP32, FP64, NOT_DENSE, Case, reference, run, skip_if_refused

from compacter_kernels.activations import FUSED as ACTIVATIONS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # seconds for a case

BOTTLENECK = [
    *(
        Case("bottleneck", width=k, bottleneck=d, shape=(t,))
        for k, d, t in ((24, 5, 0), (30, 7, 1), (1, 1, 3), (52, 33, 17))
    ),
    *(Case("bottleneck", width=768, bottleneck=d, shape=(19,)) for d in (() if INTERPRETED else (16, 48, 100, 256))),
    *(
        Case("bottleneck", dtype=dtype, params=params, shape=(33,))
        for dtype in (FP32, BF16, FP16)
        for params in (FP32, FP64, BF16)
    ),
    *(  # few and many rows of numbers that are all in bf16, whose products have kernels of their own
        Case("bottleneck", dtype=BF16, params=BF16, width=k, bottleneck=d, shape=(t,), bias=k != 90)
        for k, d, t in (
            () if INTERPRETED else ((90, 14, 1), (90, 15, 333), (208, 48, 333), (90, 14, 1000), (1024, 64, 40))
        )
    ),
    *(Case("bottleneck", activation=name, shape=(17,)) for name in ACTIVATIONS),
    *(
        Case("bottleneck", residual=r, bias=b, scale=0.3, shape=(9,))
        for r in ("none", "x", "other", "both")
        for b in (True, False)
    ),
]
CHOICES = ("rows", "sequences", "mix", "mix sequences", "mix rows")
BANKS = [
    *(
        Case("adapter", bank=3, choice=c, shape=(5, 7), residual=r)
        for c in CHOICES
        for r in ("none", "x", "other", "both")
    ),
    *(Case("bottleneck", bank=4, choice=c, shape=(5, 7), width=40) for c in CHOICES),
    *(Case("adapter", bank=4, choice=c, shape=(6, 3), shared_rule=True, rank=2, scale=-0.3) for c in CHOICES),
    *(Case("adapter", bank=2, choice=c, shape=(3, 20), bias=False, dtype=BF16) for c in CHOICES),
    *(
        Case("adapter", bank=2, choice=c, shape=(40,), dtype=d, params=p)
        for c in CHOICES
        for d, p in ((FP32, BF16), (BF16, FP64), (FP16, FP16))
    ),
    *(
        Case("adapter", bank=5, choice=c, shape=(100,), width=72, bottleneck=24, n=3, rank=2, up_n=8, up_rank=1)
        for c in CHOICES
    ),
    *(Case("adapter", bank=3, choice=c, shape=(2, 33), width=48, n=12) for c in CHOICES),
    *(
        Case("adapter", bank=2, choice=c, shape=(3, 150), width=96, bottleneck=32, n=16, dtype=BF16, params=BF16)
        for c in (() if INTERPRETED else CHOICES)
    ),
    *(Case("adapter", bank=1, choice=c, shape=shape) for c in ("rows", "mix") for shape in ((0,), (1,), (17,))),
    *(
        Case("adapter", bank=3, choice=c, shape=(64, 4), width=768, bottleneck=24)
        for c in (() if INTERPRETED else CHOICES)
    ),
]


@pytest.mark.parametrize("impl", NOT_DENSE)
@pytest.mark.parametrize("case", BOTTLENECK + BANKS, ids=str)
def test_family(case: Case, impl: str) -> None:
    skip_if_refused(case, case.tensors(), impl)
    reference(case).accept(run(case, case.tensors(), impl), impl)
