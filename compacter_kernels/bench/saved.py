"""The memory that a call keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from compacter_kernels import saved
from compacter_kernels.accuracy import Case


def saved_bytes(bind: Callable[[Case], Callable[[], Tensor]], case: Case) -> int:
    """Bytes of the storages that autograd saves in `bind(case)()`, beyond those of the inputs and the parameters."""
    case = case.map(lambda t: t.detach().requires_grad_())
    return saved.saved_bytes(bind(case), case.tensors().values())
