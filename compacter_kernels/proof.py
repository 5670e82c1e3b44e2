"""A fused impl on a GPU is taken by "auto" once it has shown there, in this process, that it computes the right thing.

The first call of each problem runs a small case through the impl and through `factored` in float64, the output and
every gradient, which takes a few milliseconds beside compiling the kernel. Nothing can be compared while a CUDA graph
is captured, a compiler traces or a dispatch mode is active: then an impl counts that proved itself before.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from compacter_kernels import modes
from compacter_kernels.calls import AdapterCall, Call, LinearCall
from compacter_kernels.impl import Impl, factored
from compacter_kernels.impl.native import plan_arguments
from compacter_kernels.private import constant_when_compiled
from compacter_kernels.problem import Problem, Projection
from compacter_kernels.weights import PHMWeights

logger = logging.getLogger("compacter_kernels")
TOKENS = 333  # more than a tile of any kernel, and no multiple of one
# How far off a number may be, as a part of the largest: far more than rounding, far less than a mistake. float32
# products may be tf32 where the user allows it.
LIMITS = {torch.float32: 2.0**-9, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4, torch.float64: 2.0**-9}
_found: dict[tuple[Any, ...], str] = {}  # what was found: empty, or what is wrong


def asked(problem: Problem) -> bool:
    """Whether a fused impl has to prove itself for such calls: the kernels for the CPU run in every test."""
    return problem.device.type == "cuda"


def comparable() -> bool:
    """Whether a small case can be run now."""
    if torch.compiler.is_compiling() or not modes.alone():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def known(problem: Problem, name: str) -> str | None:
    """What an earlier `failure` found, or None where there was none."""
    return _known(*_key(problem, name))


def _key(problem: Problem, name: str) -> tuple[Any, ...]:
    return (problem.operation, plan_arguments(problem), problem.device.index or 0, name)


@constant_when_compiled
def _known(*key: Any) -> str | None:
    return _found.get(key)


def failure(problem: Problem, name: str, impl: Impl) -> str:
    """What is wrong with an impl on the device of this problem, found out once; empty where it proved itself.

    A failure is one WARNING in the log.
    """
    key = _key(problem, name)
    if key not in _found:
        try:
            _found[key] = _compare(problem, impl)
        except Exception as error:  # whatever a driver or a compiler raises, the next impl serves
            _found[key] = f"{type(error).__name__}: {error}".splitlines()[0]
        if _found[key]:
            message = (
                "impl %r is not taken for such calls on %s, since it failed against 'factored': %s. Please report it"
            )
            logger.warning(message, name, problem.device, _found[key])
    return _found[key]


def _compare(problem: Problem, impl: Impl) -> str:
    """The tensors that are too far off, in words."""
    call, grad = _case(problem)
    exact_call = call.map(Tensor.double)
    names = ["the output", *(f"the gradient of {name}" for name, _ in call.named() if name != "residual")]
    with torch.no_grad():
        got, exact = (
            (kernel.forward(c), *kernel.backward(c, g, tuple(t is not None for t in c.differentiable())))
            for kernel, c, g in (
                (impl.prepare(problem), call, grad),
                (factored.prepare(problem), exact_call, grad.double()),
            )
        )
    pairs = [(g, e) for g, e in zip(got, exact, strict=True) if g is not None and e is not None]
    wrong = []
    for name, (tensor, right) in zip(names, pairs, strict=True):
        off = ((tensor.double() - right).abs().max() / right.abs().max()).item()
        limit = max(LIMITS[tensor.dtype], LIMITS[problem.dtype])
        if not off <= limit:
            wrong.append(f"{name} is off by {off:.1e}, {limit:.1e} is allowed")
    return "; ".join(wrong)


def _case(problem: Problem) -> tuple[Call, Tensor]:
    """A call of this problem with numbers of order 1 at every stage, and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...], std: float, dtype: torch.dtype | None) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(problem.device, dtype or torch.float32)

    def weights(p: Projection) -> PHMWeights:
        n, rank, chunk_in, chunk_out = p.phm_dim, p.rank or 0, p.in_features // p.phm_dim, p.out_features // p.phm_dim
        rule, left, right, bias = p.dtypes
        return PHMWeights(
            normal((n, n, n), n**-0.5, rule),
            normal((n, chunk_in, rank), chunk_in**-0.5, left),
            normal((n, rank, chunk_out), (n * rank) ** -0.5, right),
            None if bias is None else normal((p.out_features,), 0.5, bias),
        )

    first, last = problem.projections[0], problem.projections[-1]
    x = normal((TOKENS, first.in_features), 1.0, problem.dtype)
    grad = normal((TOKENS, last.out_features), 1.0, problem.dtype)
    if problem.activation is None:
        return LinearCall(x, weights(first)), grad
    residual = normal(tuple(x.shape), 1.0, problem.dtype)
    return AdapterCall(x, weights(first), weights(last), residual, True, 0.5), grad
