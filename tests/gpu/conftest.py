"""These tests need a CUDA device. On other machines each is skipped, and the reason is shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Without it cuBLAS warns in the deterministic mode, which fills memory with NaN. A warning is an
# error here.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytest.register_assert_rewrite("on_device")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(absent)


@pytest.fixture(autouse=True)
def working_device() -> Iterator[None]:
    """End this process if a kernel has faulted, since the device cannot be used in it any more.

    pytest-xdist then replaces the worker.
    """
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise
