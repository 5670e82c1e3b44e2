"""Which impl serves a call: an explicit choice never falls back, "auto" asks each in turn and says so once.

On a GPU "auto" asks first what was measured on such calls, fastest first (`compacter_kernels.measured`).
"""

from __future__ import annotations

import logging
import os
from types import ModuleType
from typing import Any, NamedTuple

from compacter_kernels.impl import architecture, cpu, cuda, dense, factored, triton
from compacter_kernels.measured import measured
from compacter_kernels.problem import Problem

IMPLS = {"dense": dense, "factored": factored, "cpu": cpu, "triton": triton, "cuda": cuda}
PLAIN = ("dense", "factored")  # plain torch: autograd and torch.compile see through them
PREFERENCE = ("cpu", "cuda", "triton", "factored", "dense")  # in which "auto" asks, after what was measured
ENVIRONMENT = "COMPACTER_KERNELS_IMPL"
logger = logging.getLogger("compacter_kernels")
_announced: set[tuple[str, str]] = set()


class Plan(NamedTuple):
    """An impl chosen for a problem. kernel is None for the plain-torch impls, which are differentiable themselves."""

    name: str
    reason: str
    module: ModuleType
    kernel: Any


class Explanation(NamedTuple):
    """What `explain` returns: the impl of this call, why, and for each other impl why not."""

    impl: str
    reason: str
    others: dict[str, str]

    def __str__(self) -> str:
        rows = [f"{self.impl}: {self.reason}", *(f"not {name}: {why}" for name, why in self.others.items())]
        return "\n".join(rows)


def available_impls() -> dict[str, str | None]:
    """Every impl, and why it cannot run in this process: None where it can.

    Example: {"dense": None, "factored": None, "cpu": "not built: ..."}
    """
    return {name: module.unavailable() for name, module in IMPLS.items()}


def auto_impl() -> str:
    """What impl="auto" means now: the environment variable COMPACTER_KERNELS_IMPL, else "auto" itself."""
    return os.environ.get(ENVIRONMENT) or "auto"


def _why_not(name: str, problem: Problem) -> str | None:
    module = IMPLS[name]
    reason: str | None = module.unavailable() or module.refuses(problem)
    return reason


def _first(problem: Problem) -> tuple[str, str]:
    """What "auto" takes, and the reason."""
    timed = measured(problem)
    order = [*timed.impls, *(name for name in PREFERENCE if name not in timed.impls)]
    name = next(name for name in order if _why_not(name, problem) is None)
    if name in timed.impls:
        why = f"the fastest measured on such calls of those that serve this one ({timed.source})"
    else:
        why = "the first of auto's order that serves this call" + _unmeasured(problem)
    return name, "; ".join([why, *(f"{n}: {_why_not(n, problem)}" for n in order[: order.index(name)])])


def _unmeasured(problem: Problem) -> str:
    if problem.device.type != "cuda":
        return ""
    dtype = str(problem.dtype).removeprefix("torch.")
    return f", not measured on {architecture(problem.device)} in {dtype} at these sizes"


def check_name(impl: object, source: str = "impl") -> str:
    """Raise ValueError unless this is "auto" or the name of an impl."""
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"{source}={impl!r} is not known; choose one of auto, {', '.join(IMPLS)}")
    return str(impl)


def choose(problem: Problem, impl: str) -> tuple[str, str]:
    """The impl that serves the problem, and the reason.

    Raises:
        ValueError: a name that is not known.
        RuntimeError: an explicit choice that cannot serve; the message says why, and what can.
    """
    source = "impl"
    if check_name(impl) == "auto":
        impl, source = check_name(auto_impl(), ENVIRONMENT), ENVIRONMENT
    if impl == "auto":
        return _first(problem)
    reason = _why_not(impl, problem)
    if reason is not None:
        others = [name for name in PREFERENCE if _why_not(name, problem) is None]
        raise RuntimeError(
            f"{source}={impl!r} cannot serve this {problem.operation}: {reason}. Try {', '.join(others)}"
        )
    return impl, f"chosen by {source}={impl!r}"


def plan(problem: Problem, impl: str) -> Plan:
    """Choose the impl, announce it once, and prepare its kernel."""
    name, reason = choose(problem, impl)
    if (problem.operation, name) not in _announced:
        _announced.add((problem.operation, name))
        logger.info("%s runs through impl %r (%s)", problem.operation, name, reason)
    module = IMPLS[name]
    kernel = None if name in PLAIN else module.prepare(problem)
    return Plan(name, reason, module, kernel)


def explain(problem: Problem, impl: str = "auto") -> Explanation:
    """The impl for this problem, and for each other one why not."""
    name, reason = choose(problem, impl)
    but = f"can serve this call, but {name} was {reason.split(';')[0]}"
    others = {other: _why_not(other, problem) or but for other in IMPLS if other != name}
    return Explanation(name, reason, others)
