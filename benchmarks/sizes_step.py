"""Adapters of several phm_dim, phm_rank and reduction factors, forward and backward.

    taskset --cpu-list 0 python benchmarks/sizes_step.py OUT [--rounds 15]

One adapter of width 768 on 2048 tokens in float32, with the gradients of x and of all parameters.
`copy` moves the same bytes: x.clone(), then x + grad. All calls take turns in one process without
page faults (benchmarks/README.md). Writes OUT/sizes.json and OUT/sizes.txt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from family_common import main, step, take_turns

import compacter_kernels as ck

WIDTH, TOKENS = 768, 2048
PLAIN = 16  # the reduction factor of a plain bottleneck adapter
SIZES = [  # phm_dim, phm_rank, reduction_factor: those of examples/choose_sizes.py
    *((n, 1, 16) for n in (1, 2, 4, 8)),
    *((4, r, 16) for r in (2, 4)),
    *((4, 1, factor) for factor in (32, 4)),
]


def measure(rounds: int) -> dict[str, Any]:
    """The whole content of the JSON file."""
    torch.manual_seed(0)
    x, grad = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)
    adapters = {
        str(sizes): ck.CompacterAdapter(WIDTH, phm_dim=sizes[0], phm_rank=sizes[1], reduction_factor=sizes[2])
        for sizes in SIZES
    }
    modules: dict[str, torch.nn.Module] = {**adapters, "plain": ck.BottleneckAdapter(WIDTH, reduction_factor=PLAIN)}

    def copy() -> object:
        return x.detach().clone(), torch.add(x.detach(), grad)

    calls: dict[str, Callable[[], object]] = {"copy": copy}
    for name, module in modules.items():
        calls[name] = step(partial(module, x), [x, *module.parameters()], grad)
    times = take_turns(calls, rounds)
    unit = times["copy"]["ms"]
    names = dict(zip(map(str, SIZES), SIZES, strict=True)) | {"plain": (None, 1, PLAIN)}
    rows = []
    for name, (n, r, factor) in names.items():
        parameters = sum(p.numel() for p in modules[name].parameters())
        sizes = {"phm_dim": n, "phm_rank": r, "reduction_factor": factor, "parameters": parameters}
        rows.append({**sizes, **times[name], "over_copy": times[name]["ms"] / unit})
    return {"width": WIDTH, "tokens": TOKENS, "copy": times["copy"], "rows": rows, "isa": ck.impl.module.MODULE.isa()}


def table(result: dict[str, Any]) -> str:
    """The rows in columns."""
    about, copy = result["machine"], result["copy"]
    lines = [
        f"an adapter of width {WIDTH}, {TOKENS} tokens, forward and backward, torch {about['torch']}",
        f"{about['cpu']}, kernels {result['isa']}, {about['threads']} thread; * beside other load",
        f"copy of the same bytes {copy['ms']:.2f} ms{'' if copy['quiet'] else '*'}",
        "",
        f"{'n':>5}{'r':>4}{'factor':>8}{'parameters':>12}{'ms':>9}{'of copy':>9}",
    ]
    for row in result["rows"]:
        n, r = ("plain", "") if row["phm_dim"] is None else (row["phm_dim"], row["phm_rank"])
        time = f"{row['ms']:.2f}{'' if row['quiet'] else '*'}"
        lines.append(
            f"{n:>5}{r:>4}{row['reduction_factor']:>8}{row['parameters']:>12,}{time:>9}{row['over_copy']:>9.1f}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main("sizes", __doc__ or "", measure, table))
