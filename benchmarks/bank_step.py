r"""Banks of Compacter adapters of 768/24/4 beside the single kernel, loops, and `adapters`.

    python benchmarks/bank_step.py OUT [--rounds 15] [--threads 1]

Routed: each sequence has one of E adapters. `single` is the kernel of one adapter on the same x,
`bank` the routed call with the adapters in order, `unsorted` with them in any order, `loop` one
call of the single kernel for each sequence, and `BatchSplit` the composition of that name of the
library `adapters`, as shipped and without its layer norm. Mixed: the weighted sum of 8 adapters,
with weights for each sequence, as ck.mix gives them, or for each token. A step is forward and
backward; that of a bank also has the gradients of all adapters, and that of a mix those of the
weights.

All calls take turns in one process without page faults (benchmarks/README.md), in float32. Writes
OUT/bank.json and OUT/bank.txt. Needs transformers 4.57 and adapters 1.3.0.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from family_common import Function, cells, forward, main, step, take_turns
from torch import Tensor

import compacter_kernels as ck

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing these packages warns
    import adapters
    import transformers
    from adapters.composition import BatchSplit
    from adapters.methods.bottleneck import BottleneckLayer, BottleneckState

WIDTH, BOTTLENECK, PHM_DIM, MIXED = 768, 24, 4, 8
CELLS = [(64, 64, 4), (64, 64, 128), *((adapters_, 64, 128) for adapters_ in (1, 8, 256))]  # E, sequences, tokens


def drawn(adapters_: int, fan_in: int, fan_out: int) -> ck.PHMWeights:
    """The leaves of a side of a bank, with one rule for all adapters."""
    n = PHM_DIM
    shapes = ((n, n, n), (adapters_, n, fan_in // n, 1), (adapters_, n, 1, fan_out // n), (adapters_, fan_out))
    return ck.PHMWeights(*(torch.randn(shape).mul_(0.3).requires_grad_() for shape in shapes))


def batch_split(names: list[str], x: Tensor) -> Function:
    """The composition of `adapters`, in a layer of its own with the adapters of these names."""
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1))
    adapters.init(model)
    for name in names:
        options = {"reduction_factor": WIDTH // BOTTLENECK, "phm_dim": PHM_DIM, "shared_phm_rule": False}
        model.add_adapter(name, config=adapters.CompacterPlusPlusConfig(**options))
    layer = next(m for m in model.modules() if isinstance(m, BottleneckLayer) and len(m.adapters))
    setup = BatchSplit(*names, batch_sizes=[1] * len(names))

    def call() -> Tensor:
        state: Tensor = layer.compose_batch_split(setup, BottleneckState(x, x, x, None)).hidden_states
        return state

    return call


def routed(cell: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """The times of one routed cell, in both directions."""
    count, sequences, tokens = cell
    torch.manual_seed(0)
    x = torch.randn(sequences, tokens, WIDTH, requires_grad=True)
    down, up = drawn(count, WIDTH, BOTTLENECK), drawn(count, BOTTLENECK, WIDTH)
    route = torch.arange(sequences) * count // sequences
    shuffled, alone = route[torch.randperm(sequences)], route.tolist()
    one = [side.adapter(0).map(lambda t: t.detach().clone().requires_grad_()) for side in (down, up)]
    each = [[side.adapter(index).map(Tensor.detach) for side in (down, up)] for index in range(count)]

    def loop() -> Tensor:
        parts = [ck.compacter_adapter(part, *each[e], residual=part) for part, e in zip(x.split(1), alone, strict=True)]
        return torch.cat(parts)

    functions: dict[str, Function] = {
        "single": lambda: ck.compacter_adapter(x, *one, residual=x),
        "bank": lambda: ck.compacter_adapter_bank(x, down, up, route=route, residual=x),
        "unsorted": lambda: ck.compacter_adapter_bank(x, down, up, route=shuffled, residual=x),
    }
    grad, leaves = torch.randn_like(x), [x, *down, *up]
    steps: dict[str, Callable[[], object]] = {"single": step(functions["single"], [x, *one[0], *one[1]], grad)}
    steps |= {name: step(functions[name], leaves, grad) for name in ("bank", "unsorted")}
    if not torch.allclose(functions["bank"](), loop(), rtol=1e-4, atol=1e-4):
        raise SystemExit(f"{cell}: the bank and the loop differ: nothing was timed")
    if tokens == 4:
        functions |= {"loop": loop, "BatchSplit": batch_split([f"a{index}" for index in alone], x)}
    rows = take_turns({name: forward(function) for name, function in functions.items()}, rounds)
    return {"cell": cell, "forward": rows, "step": take_turns(steps, rounds)}


def mixed(rounds: int) -> dict[str, Any]:
    """The times of the mix; frozen: with the gradients of x and of the weights of the mix only."""
    torch.manual_seed(0)
    x = torch.randn(64, 128, WIDTH, requires_grad=True)
    down, up = drawn(MIXED, WIDTH, BOTTLENECK), drawn(MIXED, BOTTLENECK, WIDTH)
    one = [side.adapter(0).map(lambda t: t.detach().clone().requires_grad_()) for side in (down, up)]
    grad = torch.randn_like(x)
    mix, of_tokens = (torch.randn(*sizes, MIXED, requires_grad=True) for sizes in ((64,), (64, 128)))
    functions: dict[str, Function] = {
        "single": lambda: ck.compacter_adapter(x, *one, residual=x),
        "mix": lambda: ck.compacter_adapter_bank(x, down, up, mix=mix, residual=x),
        "of tokens": lambda: ck.compacter_adapter_bank(x, down, up, mix=of_tokens, residual=x),
    }
    rows = take_turns({name: forward(function) for name, function in functions.items()}, rounds)
    steps = {
        "single": step(functions["single"], [x, *one[0], *one[1]], grad),
        "mix": step(functions["mix"], [x, mix, *down, *up], grad),
        "of tokens": step(functions["of tokens"], [x, of_tokens, *down, *up], grad),
    }
    for weight in (*down, *up, *one[0], *one[1]):
        weight.requires_grad_(False)
    frozen = {name: step(functions[name], leaves, grad) for name, leaves in (("single", [x]), ("mix", [x, mix]))}
    for name, call in frozen.items():
        call()
        steps[f"{name}, frozen"] = call
    trained = [*down, *up, *one[0], *one[1]]

    def training(call: Callable[[], object], on: bool) -> Callable[[], object]:
        def run() -> object:
            for weight in trained:
                weight.requires_grad_(on)
            return call()

        return run

    return {
        "forward": rows,
        "step": take_turns({name: training(call, "frozen" not in name) for name, call in steps.items()}, rounds),
    }


def measure(rounds: int) -> dict[str, Any]:
    """The whole content of the JSON file."""
    banks = []
    for cell in CELLS:
        banks.append(routed(cell, rounds))
        print(cell, file=sys.stderr)
    return {"banks": banks, "mix": mixed(rounds), "versions": {"adapters": adapters.__version__}}


def table(result: dict[str, Any]) -> str:
    """The rows in columns."""
    about = result["machine"]
    lines = [
        f"{WIDTH}/{BOTTLENECK}/{PHM_DIM}, float32, torch {about['torch']}, adapters {result['versions']['adapters']}",
        f"{about['cpu']}, {about['torch_cpu_capability']}, {about['threads']} thread",
        f"ms, medians of {result['rounds']} rounds in turns (multiples of the first); * beside other load",
    ]
    tables = [
        (f"{e} adapters, {b} sequences of {t} tokens", bank) for bank in result["banks"] for e, b, t in [bank["cell"]]
    ]
    tables.append((f"mix of {MIXED} adapters, 64 sequences of 128 tokens", result["mix"]))
    for what, rows in tables:
        lines += ["", what]
        for direction in ("forward", "step"):
            found = zip(rows[direction], cells(rows[direction], "single"), strict=True)
            lines.append(f"  {direction:<8}" + "".join(f"{f'{name} {cell}':<32}" for name, cell in found).rstrip())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main("bank", __doc__ or "", measure, table))
