"""Banks and bottleneck adapters on a GPU: first whether they are right, then their times.

    python benchmarks/gpu_family.py OUT.json IMPL... [--tokens 16384] [--limit 90]

x is bfloat16. Each case is compared with the contract on few tokens. One that is wrong is not
timed. The timer is that of `bench --device cuda`, in turns with a copy and with the single adapter
of Compacter. Backward is the kernel alone, with all gradients. Its copy reads x and the gradient
and writes dx. OUT.json is written anew after each case. Returns 1 if something is wrong or failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compacter_kernels import machine, options
from compacter_kernels.accuracy import Oracle
from compacter_kernels.arguments import adapter_call, bank_call
from compacter_kernels.bench import cuda
from compacter_kernels.bench.cost import FORWARD
from compacter_kernels.bench.timer import Cell
from compacter_kernels.calls import AdapterCall, BankCall
from compacter_kernels.cases import Case, Inputs, Shape, call
from compacter_kernels.dispatch import IMPLS
from compacter_kernels.problem import adapter_problem

SEQUENCES = 64
SINGLE = Case(width=768, bottleneck=24, shape=(SEQUENCES, 1), dtype=torch.bfloat16)


def like(case: Case, **changes: Any) -> Case:
    """The case with other fields."""
    return Case(**{**vars(case), **changes})


CASES = {
    "single": SINGLE,
    "bank of 64": like(SINGLE, bank=64, choice="sequences", shared_rule=True),
    "bank of 256": like(SINGLE, bank=256, choice="sequences", shared_rule=True),
    "mix of 8": like(SINGLE, bank=8, choice="mix sequences", shared_rule=True),
    "bottleneck 768/48": like(SINGLE, operation="bottleneck", bottleneck=48),
    "bottleneck 1024/64": like(SINGLE, operation="bottleneck", width=1024, bottleneck=64),
    "bank of 64, bottleneck 768/48": like(SINGLE, operation="bottleneck", bottleneck=48, bank=64, choice="sequences"),
}


def right(case: Case, impl: str) -> str:
    """Empty if the output and all gradients of few tokens are within the limits of the contract."""
    few = like(case, shape=(37, 9)).inputs().map(lambda t: t.to("cuda"))
    return "; ".join(str(each) for each in Oracle(few).check(call(impl), impl=impl) if not each.holds)


def packed(inputs: Inputs) -> AdapterCall | BankCall:
    """The call of these inputs, whose rows belong to SEQUENCES sequences."""
    x = inputs.x.view(SEQUENCES, -1, inputs.x.shape[-1])
    assert inputs.up is not None
    if inputs.route is None and inputs.mix is None:
        return adapter_call(x, inputs.down, inputs.up, x, 1.0, None)
    return bank_call(x, inputs.down, inputs.up, inputs.route, inputs.mix, x, 1.0, None)


def timed(impl: str, direction: str, first: Inputs) -> Callable[[Inputs], Callable[[], object]]:
    """The timed call, as a function of inputs like the first ones."""
    if impl == "copy":
        return lambda i: i.x.clone if direction == FORWARD else partial(torch.add, i.x, i.grad)
    one = packed(first)
    bank = (one.down.slots()[1].shape[0], one.mix is not None) if isinstance(one, BankCall) else ()
    kernel = IMPLS[impl].prepare(adapter_problem(one.x, one.down, one.up, first.activation, *bank))
    if direction == FORWARD:
        return lambda i: partial(kernel.forward, packed(i))
    wanted = tuple(leaf is not None for leaf in one.differentiable())
    return lambda i: partial(kernel.backward, packed(i), i.grad.view(one.x.shape), wanted)


def rows(name: str, case: Case, impls: list[str], tokens: int, seconds: float) -> list[dict[str, Any]]:
    """The rows of one case in both directions."""
    timer = cuda.Timer(Cell(Shape(case.width, case.bottleneck, case.n), tokens), torch.bfloat16)
    base = case.inputs().map(lambda t: t.to("cuda"))
    timer.cases = [base._replace(x=each.x, residual=each.x, grad=each.grad) for each in timer.cases]
    timer.case = timer.cases[0]
    found = []
    for direction in (FORWARD, "backward"):
        timer.timings, failed = {}, {}
        for impl in ("copy", *impls):
            try:
                timer.timings[impl] = timer.capture(timed(impl, direction, timer.case), FORWARD)
            except Exception as error:
                failed[impl] = f"{type(error).__name__}: {error}".splitlines()[0]
        timer.measure(None, seconds)
        copy = timer.timings["copy"].quantiles()[1]
        for impl in ("copy", *impls):
            row = {"case": name, "tokens": tokens, "direction": direction, "impl": impl}
            if impl in failed:
                found.append({**row, "error": failed[impl]})
                continue
            low, median, high = (1e6 * each for each in timer.timings[impl].quantiles())
            found.append({**row, "us": median, "us_q20": low, "us_q80": high, "of_copy": 1e6 * copy / median})
    return found


def main() -> int:
    """Check and time all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("impls", nargs="+", choices=("cuda", "triton"), metavar="IMPL")
    parser.add_argument("--tokens", type=options.positive, default=16384)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for everything, default 90")
    args = parser.parse_args()
    start, failures = time.monotonic(), 0
    found: dict[str, Any] = {"machine": machine.describe(), **cuda.Timer.describe(), "wrong": [], "rows": []}
    for index, (name, case) in enumerate(CASES.items()):
        serving = []
        for impl in args.impls:
            try:
                wrong = right(case, impl)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}".splitlines()[0]
            if wrong:
                failures += 1
                found["wrong"].append({"case": name, "impl": impl, "reason": wrong})
                print(f"FAIL {name} {impl}: {wrong}", flush=True)
            else:
                serving.append(impl)
        left = args.limit - (time.monotonic() - start)
        if left > 0:
            with torch.no_grad():
                found["rows"] += rows(name, case, serving, args.tokens, left / (len(CASES) - index) / 4)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for row in found["rows"]:
        failures += "error" in row
        said = row.get("error") or f"{row['us']:9.2f} us, {row['of_copy']:.1%} of copy"
        print(f"{row['case']:<32}{row['direction']:<10}{row['impl']:<8}{said}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
