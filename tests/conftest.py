"""What holds in every test: uninitialised memory is poisoned, and the environment does not choose the impl."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from compacter_kernels.dispatch import ENVIRONMENT

pytest.register_assert_rewrite("oracle")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element which a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """impl="auto" is decided by the library."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Modules draw the same weights in every run."""
    torch.manual_seed(0)
