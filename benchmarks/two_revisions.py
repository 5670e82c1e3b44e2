"""The speed of two revisions of this package on one machine, in turns: ratios after / before.

    python benchmarks/two_revisions.py OUT BEFORE AFTER [--rounds 30] [--threads 2] [--only T=1]

BEFORE and AFTER are checkouts with their native parts built. Each is imported by a process of its
own, through the public functions and modules alone. In every round each process times each row
once, and the two take turns row by row, in changing order. `before` and `after` are lower quartiles
in microseconds; `ratio` is the median over the rounds of after / before. The rows of `x.clone()`,
which no revision changes, show the noise. A revision has nan for what it lacks. Writes
OUT/two_revisions.txt.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from turns import Server, serve

SHAPES = ((768, 32, 4), (768, 16, 12), (1024, 16, 8), (4096, 32, 8))  # hidden_size, reduction_factor, phm_dim
TOKENS = (1, 256, 2048)
IMPLS = ("cpu", "factored", "dense")
MIXES = ((768, 32, 4, 2048), (768, 32, 4, 8192), (768, 16, 12, 2048))  # with the tokens
SEQUENCE = 128  # tokens; a mix has weights for each token, or for each sequence
BOTTLENECKS = ((768, 48), (1024, 64))  # plain ones, all in bfloat16


def rows() -> dict[str, Callable[[], Any]]:
    """The calls of one revision, by the names of the rows."""
    import torch

    import compacter_kernels as ck

    found: dict[str, Callable[[], Any]] = {}
    for k, factor, n in SHAPES:
        torch.manual_seed(0)
        adapter = ck.CompacterAdapter(k, reduction_factor=factor, phm_dim=n)
        down, up = adapter.down.weights(), adapter.up.weights()
        frozen = [w.map(torch.Tensor.detach) for w in (down, up)]
        for tokens in TOKENS:
            x, grad = torch.randn(tokens, k), torch.randn(tokens, k)
            leaf = x.clone().requires_grad_()
            wanted = [leaf, *(t for w in (down, up) for t in w if t is not None)]
            title = f"{k}/{k // factor}/{n} T={tokens}"

            def both(impl: str, leaf: Any = leaf, wanted: Any = wanted, grad: Any = grad, w: Any = (down, up)) -> Any:
                y = ck.compacter_adapter(leaf, *w, residual=leaf, impl=impl)
                return torch.autograd.grad(y, wanted, grad)

            found[f"{title} copy"] = x.clone
            for impl in IMPLS:
                if impl != "cpu" and tokens > 1 and k > 1024:
                    continue  # long, and the same Python as above
                found[f"{title} {impl} forward"] = lambda x=x, w=frozen, impl=impl: ck.compacter_adapter(
                    x, *w, residual=x, impl=impl
                )
                found[f"{title} {impl} forward+backward"] = lambda impl=impl, both=both: both(impl)
            if tokens == 1:
                found[f"{title} module"] = lambda x=x, adapter=adapter: adapter(x)
    if hasattr(ck, "bottleneck_adapter"):
        found |= bottlenecks()
    return found | (mixes() if hasattr(ck, "compacter_adapter_bank") else {})


def bottlenecks() -> dict[str, Callable[[], Any]]:
    """The calls of plain bottleneck adapters in bfloat16."""
    import torch

    import compacter_kernels as ck

    found: dict[str, Callable[[], Any]] = {}
    for k, d in BOTTLENECKS:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(*sizes, dtype=torch.bfloat16) for sizes in ((k, d), (d, k))]
        sides = [ck.LinearWeights(layer.weight.t(), layer.bias) for layer in layers]
        leaf = torch.randn(TOKENS[-1], k, dtype=torch.bfloat16, requires_grad=True)
        wanted = [leaf, *(p for layer in layers for p in layer.parameters())]
        grad = torch.randn_like(leaf)
        forward = partial(ck.bottleneck_adapter, leaf, *sides, residual=leaf, impl="cpu")
        found |= directions(f"{k}/{d} bfloat16 T={TOKENS[-1]} cpu", forward, wanted, grad)
    return found


def mixes() -> dict[str, Callable[[], Any]]:
    """The calls of a weighted sum of adapters, each adapter with a rule and biases of its own."""
    import torch

    import compacter_kernels as ck

    found: dict[str, Callable[[], Any]] = {}
    for k, factor, n, tokens in MIXES:
        torch.manual_seed(0)
        bank = ck.AdapterBank(k, names=list("abcdefgh"), reduction_factor=factor, phm_dim=n)
        for parameter in bank.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        leaf, grad = (torch.randn(tokens // SEQUENCE, SEQUENCE, k) for _ in range(2))
        leaf.requires_grad_()
        title = f"mix of {len(bank)}, {k}/{k // factor}/{n} T={tokens}"
        found[f"{title} copy"] = leaf.detach().clone
        for of, sizes in (("", leaf.shape[:2]), (" of sequences", leaf.shape[:1])):
            mix = torch.randn(*sizes, len(bank), requires_grad=True)
            found |= directions(f"{title}{of}", partial(bank, leaf, mix=mix), [leaf, mix, *bank.parameters()], grad)
    return found


def directions(title: str, forward: Callable[[], Any], leaves: list[Any], grad: Any) -> dict[str, Callable[[], Any]]:
    """The rows of a forward, and of it with its backward."""
    import torch

    return {
        f"{title} forward": forward,
        f"{title} forward+backward": lambda: torch.autograd.grad(forward(), leaves, grad),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    args = parser.parse_args()
    servers = [Server(__file__, checkout.resolve(), args.threads) for checkout in (args.before, args.after)]
    names = [name for name in rows() if args.only in name]
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for turn in range(args.rounds):
        for number, name in enumerate(names):
            for side in (0, 1) if (turn + number) % 2 else (1, 0):
                times[name][side].append(servers[side].ask(name))
        print(f"\rround {turn + 1} of {args.rounds}", end="", file=sys.stderr, flush=True)
    lines = [f"{'row':<44}{'before us':>12}{'after us':>12}{'ratio':>8}"]
    for name, samples in times.items():
        low = [statistics.quantiles(side, n=4, method="inclusive")[0] for side in samples]
        ratio = statistics.median(after / before for before, after in zip(*samples, strict=True))
        lines.append(f"{name:<44}{low[0]:>12.1f}{low[1]:>12.1f}{ratio:>8.3f}")
    from compacter_kernels import machine

    about = machine.describe()
    setting = f"{args.rounds} rounds in turns, {args.threads} threads, float32 unless named"
    head = f"{setting}, {about['cpu']}, torch {about['torch']}"
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([head, "", *lines]) + "\n"
    (args.out / "two_revisions.txt").write_text(text, encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    serve(rows()) if sys.argv[1:2] == ["--serve"] else main()
