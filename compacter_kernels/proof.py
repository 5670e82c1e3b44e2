"""The proof that a fused impl computes correctly on a GPU, which "auto" requires in each process.

The first call of each problem compares the output and every gradient of a small case with those of
`factored` in float64. This takes a few milliseconds, besides compiling the kernel. Nothing can be
compared while a CUDA graph is captured, a compiler traces or a dispatch mode is active. Then the
result of an earlier comparison counts.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from compacter_kernels import modes
from compacter_kernels.calls import AdapterCall, BankCall, Call, LinearCall
from compacter_kernels.impl import Impl, factored
from compacter_kernels.impl.native import plan_arguments
from compacter_kernels.private import evaluated_when_compiled
from compacter_kernels.problem import Problem, Projection
from compacter_kernels.weights import LinearWeights, PHMWeights, Weights

logger = logging.getLogger("compacter_kernels")
TOKENS = 333  # more than a tile of any kernel, and no multiple of one
# The largest error allowed, as a share of the largest number: far above rounding, and far below a
# mistake. float32 products may be tf32 if the user allows it.
LIMITS = {torch.float32: 2.0**-9, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4, torch.float64: 2.0**-9}
_failures: dict[tuple[Any, ...], str] = {}  # the failure of each impl and problem compared; empty: none


def required(problem: Problem) -> bool:
    """Whether a fused impl must prove itself: only on a GPU, since tests run the CPU's kernels."""
    return problem.device.type == "cuda"


def comparable() -> bool:
    """Whether a small case can run now."""
    if torch.compiler.is_compiling() or not modes.alone():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def earlier_failure(problem: Problem, name: str) -> str | None:
    """The result of an earlier call of `failure`, or None if there was no such call."""
    return _earlier_failure(*_key(problem, name))


def _key(problem: Problem, name: str) -> tuple[Any, ...]:
    return (problem.operation, plan_arguments(problem), problem.bank, problem.base, problem.device.index or 0, name)


@evaluated_when_compiled
def _earlier_failure(*key: Any) -> str | None:
    return _failures.get(key)


def failure(problem: Problem, name: str, impl: Impl) -> str:
    """Compare an impl once on the problem's device: its failure, logged as a WARNING, or ""."""
    key = _key(problem, name)
    if key not in _failures:
        try:
            # not in the caller's inference mode, and not through the hooks of a checkpoint
            with torch.inference_mode(False), torch.autograd.graph.saved_tensors_hooks(_kept, _kept):
                _failures[key] = _compare(problem, impl)
        except torch.OutOfMemoryError:  # says nothing of the impl
            raise
        except Exception as error:  # whatever a driver or a compiler raises, the next impl serves
            _failures[key] = f"{type(error).__name__}: {error}".splitlines()[0]
        if _failures[key]:
            message = (
                "impl %r is not taken for such calls on %s, since it failed against 'factored': %s. Please report it"
            )
            logger.warning(message, name, problem.device, _failures[key])
    return _failures[key]


def _kept(tensor: Tensor) -> Tensor:
    return tensor


def _compare(problem: Problem, impl: Impl) -> str:
    """Name the tensors whose error is above the limit; empty if there are none."""
    call, grad = _case(problem)
    wanted, exact_call = tuple(t is not None for t in call.differentiable()), call.map(Tensor.double)
    kernel, exact_kernel = impl.prepare(problem), factored.prepare(problem)
    names = [
        "the output",
        *(f"the gradient of {name}" for name, _ in call.named() if name not in ("residual", "base", "route")),
    ]
    with torch.no_grad():
        results = (kernel.forward(call), *kernel.backward(call, grad, wanted))
        exact = (exact_kernel.forward(exact_call), *exact_kernel.backward(exact_call, grad.double(), wanted))
    pairs = [(r, e) for r, e in zip(results, exact, strict=True) if r is not None and e is not None]
    wrong = []
    for name, (result, expected) in zip(names, pairs, strict=True):
        error = ((result.double() - expected).abs().max() / expected.abs().max()).item()
        limit = max(LIMITS[result.dtype], LIMITS[problem.dtype])
        if not error <= limit:
            wrong.append(f"{name} is off by {error:.1e}, {limit:.1e} is allowed")
    return "; ".join(wrong)


def _case(problem: Problem) -> tuple[Call, Tensor]:
    """A call of this problem, numbers of order 1 at every stage, and a gradient of its output."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...], std: float, dtype: torch.dtype | None) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cpu") * std).to(problem.device, dtype or torch.float32)

    bank = () if problem.bank is None else (problem.bank.adapters,)

    def weights(p: Projection, shared_rule: bool) -> Weights:
        bias = None if p.dtypes[-1] is None else normal((*bank, p.out_features), 0.5, p.dtypes[-1])
        if not p.terms:
            return LinearWeights(normal((*bank, p.in_features, p.out_features), p.in_features**-0.5, p.dtypes[0]), bias)
        rule, left, right, _ = p.dtypes
        chunk_in, chunk_out, rank = p.in_features // p.n_in, p.out_features // p.n_out, p.rank or 0
        return PHMWeights(
            normal((*(() if shared_rule else bank), p.terms, p.n_in, p.n_out), p.n_in**-0.5, rule),
            normal((*bank, p.terms, chunk_in, rank), chunk_in**-0.5, left),
            normal((*bank, p.terms, rank, chunk_out), (p.terms * rank) ** -0.5, right),
            bias,
        )

    first, last = problem.projections[0], problem.projections[-1]
    x = normal((TOKENS, first.in_features), 1.0, problem.dtype)
    grad = normal((TOKENS, last.out_features), 1.0, problem.dtype)
    if problem.activation is None:
        base = normal(tuple(grad.shape), 1.0, problem.dtype) if problem.base else None
        return LinearCall(x, weights(first, False), base, 0.5 if problem.base else 1.0), grad  # type: ignore[arg-type]
    residual = normal(tuple(x.shape), 1.0, problem.dtype)
    shared = (False, False) if problem.bank is None else problem.bank.shared_rules
    down, up = weights(first, shared[0]), weights(last, shared[1])
    if problem.bank is None:
        return AdapterCall(x, down, up, residual, True, 0.5), grad
    route, mix, adapters = None, None, problem.bank.adapters
    if problem.bank.mixed:
        mix = normal((TOKENS, adapters), 1.0, torch.float32)
    else:
        route = torch.randint(-1, adapters, (TOKENS,), generator=generator, device="cpu").to(problem.device)
    return BankCall(x, down, up, residual, True, 0.5, None, route, mix), grad
