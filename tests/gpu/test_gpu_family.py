"""Bottleneck adapters and banks on the device against the float64 dense oracle."""

from __future__ import annotations

import pytest
import test_family as family
import torch
from on_device import SERVING, check, moved
from oracle import BF16, FP16, FP32, Case

import compacter_kernels as ck
from compacter_kernels.cases import weights

MODEL = Case(width=768, bottleneck=24, bank=64, shape=(64, 33), dtype=BF16)
REAL = [
    *(Case("bottleneck", width=k, bottleneck=d, shape=(2053,), dtype=FP32) for k, d in ((768, 48), (1024, 64))),
    *(Case("bottleneck", width=768, bottleneck=48, shape=(2053,), dtype=dtype) for dtype in (BF16, FP16)),
    *(
        Case(**{**vars(MODEL), "operation": operation, "choice": choice})
        for operation in ("adapter", "bottleneck")
        for choice in ("rows", "sequences")
    ),
    *(Case(**{**vars(MODEL), "bank": 8, "choice": choice}) for choice in ("mix", "mix rows")),
]


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", family.BOTTLENECK + family.BANKS + REAL, ids=str)
def test_family(case: Case, impl: str) -> None:
    check(case, impl)


@pytest.mark.parametrize("impl", SERVING)
def test_a_graph_takes_new_routes(impl: str) -> None:
    """A captured call reads the route when it is replayed: nothing of it is kept on the host."""
    case = Case(width=768, bottleneck=24, bank=5, shape=(16, 20), dtype=BF16)
    tensors, route = moved(case.tensors()), torch.zeros(16, dtype=torch.int64, device="cuda")
    down, up = weights(tensors), weights(tensors, "up.")

    def call() -> torch.Tensor:
        with torch.no_grad():
            return ck.compacter_adapter_bank(tensors["x"], down, up, route=route, impl=impl)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(3):
        route.copy_(torch.randint(-1, 5, (16,)))
        graph.replay()
        assert torch.equal(out, call())
