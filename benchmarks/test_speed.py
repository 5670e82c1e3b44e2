"""The providers of `compacter-kernels bench` under pytest-benchmark, to compare two revisions.

These are not part of the plain test run: `pytest benchmarks` runs them (see README.md beside this
file).
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from compacter_kernels.accuracy import Oracle
from compacter_kernels.bench.cost import BOTH, DIRECTIONS, FORWARD
from compacter_kernels.bench.gate import judge
from compacter_kernels.bench.providers import Provider, make_call, providers
from compacter_kernels.cases import Case, Shape

CASES = [(Shape(768, 24, 4), 1), (Shape(768, 24, 4), 8192), (Shape(768, 48, 12), 2048), (Shape(4096, 128, 8), 2048)]
PROVIDERS = [provider for provider in providers().values() if not provider.compiled]  # compilation takes long


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize(("shape", "tokens"), CASES, ids=str)
def test_speed(benchmark: BenchmarkFixture, shape: Shape, tokens: int, provider: Provider, direction: str) -> None:
    if direction not in provider.directions:
        pytest.skip(f"{provider.name} has no {BOTH}")
    case = Case.of(shape, tokens).inputs()
    assert judge(provider, Oracle(case, gradients=direction != FORWARD)).wrong is None
    benchmark.group = f"{shape} T={tokens} {direction}"
    benchmark.extra_info.update(threads=torch.get_num_threads(), torch=torch.__version__)
    benchmark(make_call(provider, case, direction))
