"""Which impl serves a call: an explicit choice never falls back, "auto" asks each in turn and says so once.

On a GPU "auto" asks first what was measured on such calls, fastest first: a new measurement
changes the table `MEASURED`, nothing else.
"""

from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple

import torch

from compacter_kernels import proof
from compacter_kernels.impl import Impl, Kernel, architecture, cpu, cuda, dense, factored, triton
from compacter_kernels.problem import Problem

IMPLS: dict[str, Impl] = {"dense": dense, "factored": factored, "cpu": cpu, "triton": triton, "cuda": cuda}
PLAIN = ("dense", "factored")  # plain torch: autograd and torch.compile see through them
PREFERENCE = ("cpu", "cuda", "triton", "factored", "dense")  # in which "auto" asks, after what was measured
ENVIRONMENT = "COMPACTER_KERNELS_IMPL"
logger = logging.getLogger("compacter_kernels")
_announced: set[tuple[str, str]] = set()


class Class(NamedTuple):
    """Calls that run alike: an operation of rank 1 with both projections of one of these phm_dims."""

    operation: str
    architecture: str
    dtype: torch.dtype
    phm_dims: tuple[int, ...]


class Measured(NamedTuple):
    """The impls that were timed, fastest first, and the file or folder that says so."""

    impls: tuple[str, ...]
    source: str


MEASURED = {
    Class("adapter", "sm_90", torch.bfloat16, (4, 8, 12)): Measured(("triton",), "benchmarks/results/h200"),
}
NOTHING = Measured((), "")


def measured(problem: Problem) -> Measured:
    """What was measured on calls like this one."""
    sizes = {(p.phm_dim, p.rank) for p in problem.projections}
    here = architecture(problem.device)
    for kind, found in MEASURED.items():
        if (problem.operation, here, problem.dtype) == kind[:3] and sizes <= {(n, 1) for n in kind.phm_dims}:
            return found
    return NOTHING


class OnlyTorch(NamedTuple):
    """Why "auto" takes an impl of plain torch; required: why an explicit choice of another is refused too."""

    why: str
    required: bool


class Plan(NamedTuple):
    """An impl chosen for a problem.

    kernel: None where a fused impl runs through its operator. visible: whether torch must see the
    call. foreign: whether the reason is a tensor of another class than torch's own. final: whether
    every later call of the problem would get the same plan.
    """

    problem: Problem
    name: str
    reason: str
    kernel: Kernel[Any] | None
    visible: bool
    foreign: bool
    final: bool


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


def _why_not(name: str, problem: Problem, only_torch: OnlyTorch | None) -> str | None:
    """Why this impl does not serve, or None."""
    impl = IMPLS[name]
    barred = only_torch.why if only_torch is not None and name not in PLAIN else None
    return impl.unavailable() or impl.refuses(problem) or barred


def _unproved(name: str, problem: Problem, shown: tuple[str, ...]) -> str | None:
    """Why "auto" does not trust this impl on the device, or None. shown: those that a committed file shows there."""
    if name in PLAIN or not proof.asked(problem):
        return None
    if proof.comparable():
        return proof.failure(problem, name, IMPLS[name]) or None
    found = proof.known(problem, name)
    if found is None and name not in shown:
        return "it has not proved itself on this device, and nothing can be compared now; call it once before"
    return found or None


def _first(problem: Problem, only_torch: OnlyTorch | None) -> tuple[str, str]:
    """What "auto" takes, and the reason."""
    timed, passed = measured(problem), []
    for name in (*timed.impls, *(name for name in PREFERENCE if name not in timed.impls)):
        reason = _why_not(name, problem, only_torch) or _unproved(name, problem, timed.impls)
        if reason is None:
            break
        passed.append(f"{name}: {reason}")
    if name in timed.impls:
        why = f"the fastest measured on such calls of those that serve this one ({timed.source})"
    else:
        why = "the first of auto's order that serves this call" + _unmeasured(problem)
    if name not in PLAIN and proof.asked(problem) and proof.known(problem, name) == "":
        why += ", and right on this device when tried"
    return name, "; ".join([why, *passed])


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


def choose(problem: Problem, impl: str, only_torch: OnlyTorch | None = None) -> tuple[str, str]:
    """The impl that serves the problem, and the reason.

    Raises:
        ValueError: a name that is not known.
        RuntimeError: an explicit choice that cannot serve; the message says why, and what can.
    """
    source = "impl"
    if check_name(impl) == "auto":
        impl, source = check_name(auto_impl(), ENVIRONMENT), ENVIRONMENT
    if impl == "auto":
        return _first(problem, only_torch)
    required = only_torch is not None and only_torch.required
    reason = _why_not(impl, problem, only_torch if required else None)
    if reason is not None:
        others = [name for name in PREFERENCE if _why_not(name, problem, only_torch) is None]
        raise RuntimeError(
            f"{source}={impl!r} cannot serve this {problem.operation}: {reason}. Try {', '.join(others)}"
        )
    return impl, f"chosen by {source}={impl!r}"


def plan(
    problem: Problem, impl: str, only_torch: OnlyTorch | None = None, visible: bool = False, foreign: bool = False
) -> Plan:
    """Choose the impl and prepare its kernel; where torch is to see the call, none of a fused impl."""
    name, reason = choose(problem, impl, only_torch)
    if visible and name not in PLAIN:
        return Plan(problem, name, reason, None, visible, foreign, True)
    if not torch.compiler.is_compiling():
        _announce(problem.operation, name, reason)
    final = not proof.asked(problem) or proof.comparable()
    return Plan(problem, name, reason, IMPLS[name].prepare(problem), visible, foreign, final)


def _announce(operation: str, name: str, reason: str) -> None:
    """Say once which impl an operation runs through."""
    if (operation, name) not in _announced:
        _announced.add((operation, name))
        logger.info("%s runs through impl %r (%s)", operation, name, reason)


def explain(problem: Problem, impl: str = "auto", only_torch: OnlyTorch | None = None) -> Explanation:
    """The impl for this problem, and for each other one why not."""
    name, reason = choose(problem, impl, only_torch)
    but = f"can serve this call, but {name} was {reason.split(';')[0]}"
    failed = {other: proof.known(problem, other) for other in IMPLS if proof.asked(problem)}
    others = {o: _why_not(o, problem, only_torch) or failed.get(o) or but for o in IMPLS if o != name}
    return Explanation(name, reason, others)
