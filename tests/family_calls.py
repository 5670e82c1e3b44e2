"""Calls of banks, plain bottlenecks and rules of any shape, with random tensors, and a check."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from oracle import FP32, FP64
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.accuracy import error, floor

Tensors = dict[str, Tensor]
Projection = tuple[int, int, int]  # the sizes of a rule


@dataclasses.dataclass(frozen=True)
class Family:
    """A call of one of the public functions, with random tensors."""

    width: int = 160
    bottleneck: int = 12
    n: int = 4  # 0: dense projections
    rank: int = 1
    adapters: int = 0  # of a bank
    route: tuple[int, ...] = ()
    mix: int = 0  # groups
    tokens: int = 24
    dtype: torch.dtype = FP32
    params: torch.dtype = FP32
    activation: str = "gelu_new"
    residual: str = "x"
    bias: bool = True
    scale: float = 1.0
    turned: bool = False  # dense weights are those of nn.Linear
    shared: bool = False  # one rule of down
    rule: Projection | None = None  # kronecker_linear
    out: int = 0

    def __str__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return " ".join(f"{f.name}={getattr(self, f.name)}".replace("torch.", "") for f in changed)

    def tensors(self, seed: int = 0) -> Tensors:
        """The leaves of the call and grad, the gradient of its output."""
        generator = torch.Generator().manual_seed(seed)
        lead = (self.adapters,) if self.adapters else ()

        def normal(*shape: int, spread: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator) * spread

        k, d = self.width, self.bottleneck
        made = {"x": normal(self.tokens, k)}
        if self.rule:
            terms, rows, columns = self.rule
            made["weights.rule"] = normal(*self.rule, spread=1 / rows)
            made["weights.left"] = normal(terms, k // rows, self.rank)
            made["weights.right"] = normal(terms, self.rank, self.out // columns, spread=(rows / k) ** 0.5)
        for side, i, o in () if self.rule else (("down", k, d), ("up", d, k)):
            if not self.n:
                made[f"{side}.weight"] = normal(*lead, i, o, spread=i**-0.5)
                if self.turned:
                    made[f"{side}.weight"] = made[f"{side}.weight"].mT.contiguous().mT
                continue
            made[f"{side}.rule"] = normal(
                *(() if self.shared and side == "down" else lead), *[self.n] * 3, spread=1 / self.n
            )
            made[f"{side}.left"] = normal(*lead, self.n, i // self.n, self.rank)
            made[f"{side}.right"] = normal(*lead, self.n, self.rank, o // self.n, spread=(self.n / i) ** 0.5)
        for side, size in (("weights", self.out),) if self.rule else (("down", d), ("up", k)):
            if self.bias:
                made[f"{side}.bias"] = normal(*lead, size, spread=0.3)
        if self.mix:
            made["mix"] = normal(self.mix, self.adapters)
        given = {name: t.to(self.params) for name, t in made.items() if name != "x"}
        leaves = {"x": made["x"].to(self.dtype), **given}
        if self.residual == "other":
            leaves["residual"] = normal(self.tokens, self.out or k).to(self.dtype)
        return {**leaves, "grad": normal(self.tokens, self.out or k).to(self.dtype)}

    def call(self, tensors: Tensors, impl: str) -> Tensor:
        """The output."""
        if self.rule:
            weights = ck.PHMWeights(*(tensors.get(f"weights.{name}") for name in ("rule", "left", "right", "bias")))  # type: ignore[arg-type]
            return ck.kronecker_linear(tensors["x"], weights, tensors.get("residual"), self.scale, impl=impl)
        fields, kind = (
            (("weight", "bias"), ck.LinearWeights) if not self.n else (("rule", "left", "right", "bias"), ck.PHMWeights)
        )
        down, up = (kind(*(tensors.get(f"{side}.{name}") for name in fields)) for side in ("down", "up"))  # type: ignore[arg-type]
        residual = tensors["x"] if self.residual == "x" else tensors.get("residual")
        options: dict[str, Any] = {
            "activation": self.activation,
            "residual": residual,
            "scale": self.scale,
            "impl": impl,
        }
        if not self.adapters:
            function = ck.compacter_adapter if self.n else ck.bottleneck_adapter
            return function(tensors["x"], down, up, **options)
        x, mix = tensors["x"], tensors.get("mix")
        groups = len(self.route) or self.mix
        x = x.unflatten(0, (groups, -1)) if groups else x
        if isinstance(options["residual"], Tensor):
            options["residual"] = x if self.residual == "x" else options["residual"].view(x.shape)
        route = None if self.mix else torch.tensor(self.route, dtype=torch.int64)
        return ck.compacter_adapter_bank(x, down, up, route=route, mix=mix, **options).view(self.tokens, self.width)

    def run(self, tensors: Tensors, impl: str, frozen: tuple[str, ...] = ()) -> Tensors:
        """The output and the gradients of all tensors that are not frozen."""
        leaves = {name: t.detach().requires_grad_(name not in (*frozen, "grad")) for name, t in tensors.items()}
        out = self.call(leaves, impl)
        wanted = {name: t for name, t in leaves.items() if t.requires_grad}
        return {
            "out": out.detach(),
            **dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), leaves["grad"]), strict=True)),
        }

    def check(self, seed: int = 0) -> Tensors:
        """Compare with `dense` in float64. Returns the results."""
        tensors = self.tensors(seed)
        got = self.run(tensors, "cuda")
        exact = self.run({name: t.to(FP64) for name, t in tensors.items()}, "dense")
        plain = self.run(tensors, "dense")
        for name, t in got.items():
            limit = max(2 * error(plain[name], exact[name]), floor(t.dtype, FP32), floor(self.dtype, FP32))
            assert error(t, exact[name]) <= limit, (name, error(t, exact[name]), limit)
            assert t.dtype == plain[name].dtype
        return got
