"""The time that each private name of torch and Python saves (compacter_kernels/private.py).

    python benchmarks/private_names.py OUT [--rounds 60]

There is one process, one thread and one token, so that a call takes nothing but the host's time.
For each name and each call that uses it, series of calls with the private name and with its public
replacement alternate. `us` is the lower quartile, which other load disturbs least. `saved` is the
share of the time that the private name saves, as the median over the rounds. Writes
OUT/private_names.txt.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import compacter_kernels as ck
from compacter_kernels import autograd, call_path, dispatch, machine
from compacter_kernels.nn import adapter_base, phm_linear, stack

CALLS = 300  # in a series
Call = Callable[[], Any]


def calls() -> dict[str, Call]:
    """The calls that are timed: the public functions and the modules, with one token."""
    torch.manual_seed(0)
    adapter, linear = ck.CompacterAdapter(768, reduction_factor=32, phm_dim=4), ck.PHMLinear(768, 768, phm_dim=4)
    x = torch.randn(1, 768)
    leaf = x.clone().requires_grad_()
    trained = [w.weights() for w in (adapter.down, adapter.up, linear)]
    down, up, weights = (w.map(torch.Tensor.detach) for w in trained)

    def without_grad(function: Call) -> Call:
        def call() -> Any:
            with torch.no_grad():
                return function()

        return call

    return {
        "compacter_adapter": lambda: ck.compacter_adapter(x, down, up),
        "phm_linear": lambda: ck.phm_linear(x, weights),
        "compacter_adapter, recorded": lambda: ck.compacter_adapter(leaf, trained[0], trained[1]),
        "phm_linear, recorded": lambda: ck.phm_linear(leaf, trained[2]),
        "CompacterAdapter": without_grad(lambda: adapter(x)),
        "PHMLinear": without_grad(lambda: linear(x)),
    }


def public(*patches: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    """All of these patches as one context."""
    stack = ExitStack()
    for patch in patches:
        stack.enter_context(patch)
    return stack


def ways() -> dict[str, tuple[Callable[[], AbstractContextManager[Any]], tuple[str, ...]]]:
    """For each private name, a context that uses the public way, and the calls of that name."""
    functions, modules = ("compacter_adapter", "phm_linear"), ("CompacterAdapter", "PHMLinear")
    replace, apply = mock.patch.object, torch.autograd.Function.apply.__func__
    return {
        "os.environ._data": (
            lambda: public(
                replace(call_path, "ENVIRON", os.environ), replace(call_path, "_variable", dispatch.ENVIRONMENT)
            ),
            functions,
        ),
        "_FunctionBase.apply": (
            lambda: public(
                *(
                    replace(function, "apply", classmethod(apply))
                    for function in (autograd.AdapterFunction, autograd.LinearFunction)
                )
            ),
            ("compacter_adapter, recorded", "phm_linear, recorded"),
        ),
        "nn.Module._parameters": (
            lambda: public(replace(phm_linear, "parameter", getattr)),
            modules,
        ),
        "nn.Module._modules": (
            lambda: public(*(replace(module, "children", named_children) for module in (adapter_base, stack))),
            modules[:1],
        ),
    }


def named_children(module: torch.nn.Module) -> dict[str, Any]:
    """The public way to the children of a module."""
    return dict(module.named_children())


def train(call: Call) -> float:
    """Microseconds of one call, in a series of calls."""
    call()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [f"{'private name':<24}{'call':<30}{'us with':>9}{'us without':>12}{'saved':>8}"]
    timed = calls()
    for name, (taken, served) in ways().items():
        for call in served:
            with_it, without = [], []
            for _ in range(args.rounds):
                with_it.append(train(timed[call]))
                with taken():
                    without.append(train(timed[call]))
            low = [statistics.quantiles(times, n=4)[0] for times in (with_it, without)]
            saved = statistics.median(1 - a / b for a, b in zip(with_it, without, strict=True))
            lines.append(f"{name:<24}{call:<30}{low[0]:>9.2f}{low[1]:>12.2f}{saved:>8.0%}")
            print(lines[-1], flush=True)
    about = machine.describe()
    head = f"{CALLS} calls a train, {args.rounds} rounds in turns, one thread, one token, 768/24/4, float32"
    text = "\n".join([head, ", ".join(f"{key} {value}" for key, value in about.items()), "", *lines])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "private_names.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
