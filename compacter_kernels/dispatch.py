"""The choice of the impl for a call. An explicit choice never falls back.

"auto" takes the first impl that can serve the call, and logs once which one that is. It asks the
impls that were measured on such calls first, then those that a model of their time ranks, each time
the fastest first. A new measurement or model changes the table `MEASURED` or `EXPECTED` and nothing
else.
"""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

import torch

from compacter_kernels import proof
from compacter_kernels.impl import Impl, Kernel, architecture, cpu, cuda, dense, factored, triton
from compacter_kernels.problem import Problem, dtype_name

IMPLS: dict[str, Impl] = {"dense": dense, "factored": factored, "cpu": cpu, "triton": triton, "cuda": cuda}
PLAIN = ("dense", "factored")  # made of torch's operations, which autograd and torch.compile see
PREFERENCE = ("cpu", "cuda", "triton", "factored", "dense")  # the order of "auto" after the two tables
ENVIRONMENT = "COMPACTER_KERNELS_IMPL"
logger = logging.getLogger("compacter_kernels")
_announced: set[tuple[str, str]] = set()


class Class(NamedTuple):
    """Calls that run alike: all projections have rank 1 and one of these phm_dims."""

    operation: str
    architecture: str
    dtype: torch.dtype
    phm_dims: tuple[int, ...]


class Ranking(NamedTuple):
    """Impls for such calls, the fastest first, and the file or folder that shows it."""

    impls: tuple[str, ...]
    source: str


Table = dict[Class, Ranking]
MEASURED: Table = {
    Class("adapter", "sm_90", torch.bfloat16, (4, 8, 12)): Ranking(("triton",), "benchmarks/results/h200"),
}
EXPECTED: Table = {
    Class("adapter", "sm_90", torch.bfloat16, (4, 8, 12)): Ranking(("triton", "cuda"), "docs/design.md"),
}


def ranking(table: Table, problem: Problem) -> Ranking:
    """The line of a table for calls like this one, or one of no impls."""
    if problem.bank is not None:
        return Ranking((), "")
    wanted = (problem.operation, architecture(problem.device), problem.dtype)
    for kind, found in table.items():
        same = wanted == (kind.operation, kind.architecture, kind.dtype)  # torch.compile of torch 2.6 takes no slice
        if same and all([p.phm_dim in kind.phm_dims and p.rank == 1 for p in problem.projections]):
            return found
    return Ranking((), "")


class OnlyTorch(NamedTuple):
    """Why "auto" takes plain torch. required: an explicit other choice is refused too."""

    why: str
    required: bool


class Plan(NamedTuple):
    """The impl chosen for a problem.

    kernel: None where a fused impl runs through its operator. visible: whether torch must see the
    call. foreign: whether the reason is a tensor of another class than torch's own. final: whether
    every later call of the problem would get the same plan.
    """

    problem: Problem
    name: str
    kernel: Kernel | None
    visible: bool
    foreign: bool
    final: bool


class Explanation(NamedTuple):
    """The impl of a call and the reason; others: the reason against each other impl."""

    impl: str
    reason: str
    others: dict[str, str]

    def __str__(self) -> str:
        rows = [f"{self.impl}: {self.reason}", *(f"not {name}: {why}" for name, why in self.others.items())]
        return "\n".join(rows)


def available_impls() -> dict[str, str | None]:
    """Every impl with the reason why it cannot run in this process, or None if it can.

    Example: {"dense": None, "factored": None, "cpu": "not built: ..."}
    """
    return {name: module.unavailable() for name, module in IMPLS.items()}


def _why_not(name: str, problem: Problem, only_torch: OnlyTorch | None) -> str | None:
    """Why this impl cannot serve the problem, or None."""
    impl = IMPLS[name]
    not_torch = only_torch.why if only_torch is not None and name not in PLAIN else None
    return impl.unavailable() or impl.refuses(problem) or not_torch


def _unproved(name: str, problem: Problem, measured_impls: tuple[str, ...]) -> str | None:
    """Why "auto" cannot trust this impl, or None. A measured one needs no proof in advance."""
    if name in PLAIN or not proof.required(problem):
        return None
    if proof.comparable():
        return proof.failure(problem, name, IMPLS[name]) or None
    earlier = proof.earlier_failure(problem, name)
    if earlier is None and name not in measured_impls:
        return "it has not proved itself on this device, and nothing can be compared now; call it once before"
    return earlier or None


def _automatic(problem: Problem, only_torch: OnlyTorch | None) -> tuple[str, str]:
    """The impl that "auto" takes, and the reason."""
    timed, modelled, passed_over = ranking(MEASURED, problem), ranking(EXPECTED, problem), []
    for name in dict.fromkeys((*timed.impls, *modelled.impls, *PREFERENCE)):
        reason = _why_not(name, problem, only_torch) or _unproved(name, problem, timed.impls)
        if reason is None:
            break
        passed_over.append(f"{name}: {reason}")
    if name in timed.impls:
        why = f"the fastest measured on such calls of those that serve this one ({timed.source})"
    elif name in modelled.impls:
        why = f"the fastest that serves this call by a model, and not by a measurement ({modelled.source})"
    else:
        why = "the first of auto's order that serves this call"
        if problem.device.type == "cuda":
            why += f", not measured on {architecture(problem.device)} in {dtype_name(problem.dtype)} at these sizes"
    if name not in PLAIN and proof.required(problem) and proof.earlier_failure(problem, name) == "":
        why += ", and right on this device when tried"
    return name, "; ".join([why, *passed_over])


def check_name(impl: object, source: str = "impl") -> str:
    """Raise ValueError unless this is "auto" or the name of an impl."""
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"{source}={impl!r} is not known; choose one of auto, {', '.join(IMPLS)}")
    return str(impl)


def choose(problem: Problem, impl: str, only_torch: OnlyTorch | None = None) -> tuple[str, str]:
    """The impl that serves the problem, and the reason.

    Raises:
        ValueError: the name of the impl is unknown.
        RuntimeError: an explicit impl cannot serve; the message says why, and which impls can.
    """
    source = "impl"
    if check_name(impl) == "auto":
        impl, source = check_name(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT), ENVIRONMENT
    if impl == "auto":
        return _automatic(problem, only_torch)
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
    """Choose the impl and prepare its kernel, except a fused one if torch must see the call."""
    name, reason = choose(problem, impl, only_torch)
    if visible and name not in PLAIN:
        return Plan(problem, name, None, visible, foreign, True)
    if not torch.compiler.is_compiling() and (problem.operation, name) not in _announced:
        _announced.add((problem.operation, name))
        logger.info("%s runs through impl %r (%s)", problem.operation, name, reason)
    final = not proof.required(problem) or proof.comparable()
    return Plan(problem, name, IMPLS[name].prepare(problem), visible, foreign, final)


def explain(problem: Problem, impl: str = "auto", only_torch: OnlyTorch | None = None) -> Explanation:
    """The impl for this problem, and the reason against each other one."""
    name, reason = choose(problem, impl, only_torch)
    not_chosen = f"can serve this call, but {name} was {reason.split(';')[0]}"
    failed = {impl: proof.earlier_failure(problem, impl) for impl in IMPLS if proof.required(problem)}
    others = {i: _why_not(i, problem, only_torch) or failed.get(i) or not_chosen for i in IMPLS if i != name}
    return Explanation(name, reason, others)
