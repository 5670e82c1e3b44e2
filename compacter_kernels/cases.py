"""One call of the library as data: `Case` has its sizes and options, `Inputs` its tensors."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compacter_kernels.functional import bottleneck_adapter, compacter_adapter, compacter_adapter_bank, phm_linear
from compacter_kernels.nn.initialisation import reset_factors, reset_rule
from compacter_kernels.weights import LinearWeights, PHMWeights, Weights

RESIDUALS = ("x", "other", "none")
INITS = ("random", "paper")
Tensors = dict[str, Tensor]


class Shape(NamedTuple):
    """The sizes of one adapter: hidden width k, bottleneck width d, phm_dim n."""

    k: int
    d: int
    n: int

    def __str__(self) -> str:
        return f"{self.k}/{self.d}/{self.n}"


class Inputs(NamedTuple):
    """The tensors of one call, and the gradient that its backward starts from.

    x: (..., k). up: None for phm_linear, whose weights are `down`. residual: None, x itself,
    another tensor like x, or the pair of both. grad: like the output. route or mix: of a bank.
    """

    x: Tensor
    down: Weights
    up: Weights | None
    residual: Any
    grad: Tensor
    activation: Any = "gelu_new"
    scale: Any = 1.0
    route: Tensor | None = None
    mix: Tensor | None = None

    def tensors(self) -> Tensors:
        """The inputs that can have a gradient, by name: x, mix, residual, down.rule, ..."""
        named = {"x": self.x}
        if self.mix is not None:
            named["mix"] = self.mix
        residual = self.residual[1] if isinstance(self.residual, tuple) else self.residual
        if residual is not None and residual is not self.x:
            named["residual"] = residual
        for side, weights in (("down", self.down), ("up", self.up)):
            named |= {} if weights is None else dict(weights.named(side))
        return named

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same call with `change` applied to each tensor once. A residual that is x stays x."""
        x, residual = change(self.x), self.residual
        if isinstance(residual, tuple):
            residual = (x, change(residual[1]))
        elif residual is not None:
            residual = x if residual is self.x else change(residual)
        up, mix = None if self.up is None else self.up.map(change), None if self.mix is None else change(self.mix)
        route = None if self.route is None else self.route.to(x.device)
        changed = {"x": x, "down": self.down.map(change), "up": up, "residual": residual, "grad": change(self.grad)}
        return self._replace(**changed, route=route, mix=mix)


def call(impl: str, **options: Any) -> Callable[[Inputs], Tensor]:
    """The public function through that impl, with further options, as a function of inputs."""

    def function(inputs: Inputs) -> Tensor:
        x, down, up, residual, _, activation, scale, route, mix = inputs
        if up is None:
            return phm_linear(x, down, impl=impl)  # type: ignore[arg-type]
        given = {"activation": activation, "scale": scale, "residual": residual, "impl": impl, **options}
        if route is not None or mix is not None:
            return compacter_adapter_bank(x, down, up, route=route, mix=mix, **given)
        adapter: Any = bottleneck_adapter if isinstance(down, LinearWeights) else compacter_adapter
        result: Tensor = adapter(x, down, up, **given)
        return result

    return function


@dataclass(frozen=True)
class Case:
    """The sizes and options of one call.

    The text of a case names the fields that differ from their defaults, except init and seed. A
    case has the same numbers in every process and on every machine, and others for another text or
    seed. init: "random" keeps every stage at order 1, so that each gradient is visible; "paper"
    is the authors' start, where the rule is near 0 and the bias is 0.
    """

    operation: str = "adapter"  # "bottleneck", of dense projections, or "linear", the down projection alone
    width: int = 24
    bottleneck: int = 12
    n: int = 4
    rank: int | None = 1  # None: unfactorised W
    up_n: int | None = None  # None: as down
    up_rank: int | None = None
    shape: tuple[int, ...] = (5,)  # of x, without its last dimension
    dtype: torch.dtype = torch.float32
    params: torch.dtype = torch.float32
    activation: Any = "gelu_new"
    residual: str = "x"  # "none", "x", "other", or "both" for x and another
    bias: bool = True
    scale: Any = 1.0
    bank: int | None = None  # the number of adapters
    choice: str = "rows"  # of a bank: "rows" or "sequences" are routed, "mix", "mix sequences" or "mix rows" mixed
    shared_rule: bool = False
    init: str = "random"
    seed: int = 0

    @classmethod
    def of(cls, shape: Shape, tokens: int, *, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
        """The case of an adapter of this shape, with float64 parameters beside a float64 x."""
        options.setdefault("params", torch.float64 if dtype == torch.float64 else torch.float32)
        return cls(width=shape.k, bottleneck=shape.d, n=shape.n, shape=(tokens,), dtype=dtype, **options)

    def __str__(self) -> str:
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        named = (row for row in values if row[0] not in ("init", "seed") and row[1] != row[2])
        return "-".join(f"{name}={_text(value)}" for name, value, _ in named) or "default"

    def tensors(self, dtype: torch.dtype | None = None) -> Tensors:
        """Leaves that require a gradient: x, the residual, and the weights of each projection."""
        rng = torch.Generator().manual_seed(zlib.crc32(str(self).encode()) + self.seed)

        def leaf(shape: tuple[int, ...], std: float, kind: torch.dtype = self.params) -> Tensor:
            drawn = torch.randn(shape, generator=rng, dtype=torch.float64) * std
            return drawn.to(dtype or kind).requires_grad_()

        bank = () if self.bank is None else (self.bank,)

        def projection(side: str, n: int, rank: int | None, fan_in: int, fan_out: int) -> Tensors:
            if self.operation == "bottleneck":
                weight = leaf((*bank, fan_in, fan_out), fan_in**-0.5)
                return dict(LinearWeights(weight, leaf((*bank, fan_out), 0.5) if self.bias else None).named(side))
            columns = fan_out // n
            weights = PHMWeights(
                leaf((*(() if self.shared_rule else bank), n, n, n), n**-0.5),
                leaf((*bank, n, fan_in // n, rank or columns), fan_in**-0.5),
                leaf((*bank, n, rank, columns), rank**-0.5) if rank else None,
                leaf((*bank, fan_out), 0.5) if self.bias else None,
            )
            if self.init == "paper":
                _as_authors(weights, self.seed)
            return dict(weights.named(side))

        named = {"x": leaf((*self.shape, self.width), 1.0, self.dtype)}
        adapter = self.operation != "linear"
        if self.choice.startswith("mix") and self.bank is not None:
            named["mix"] = leaf((*self._chosen(), self.bank), 1.0)
        if adapter and self.residual in ("other", "both"):
            named["residual"] = leaf((*self.shape, self.width), 1.0, self.dtype)
        named |= projection("down", self.n, self.rank, self.width, self.bottleneck)
        if adapter:
            named |= projection("up", self.up_n or self.n, self.up_rank or self.rank, self.bottleneck, self.width)
        return named

    def _chosen(self) -> tuple[int, ...]:
        """The first sizes of x, for each of which there is one choice of adapters."""
        if self.choice == "mix":
            return ()
        return self.shape if self.choice.endswith("rows") else self.shape[:1]

    def route(self) -> Tensor | None:
        """The adapters of a routed bank, among them -1."""
        if self.bank is None or self.choice.startswith("mix"):
            return None
        rng = torch.Generator().manual_seed(zlib.crc32(str(self).encode()) + self.seed + 2)
        return torch.randint(-1, self.bank, self._chosen(), generator=rng)

    def grad_output(self) -> Tensor:
        """The gradient that a backward starts from."""
        width = self.bottleneck if self.operation == "linear" else self.width
        rng = torch.Generator().manual_seed(zlib.crc32(str(self).encode()) + self.seed + 1)
        return torch.randn((*self.shape, width), generator=rng, dtype=torch.float64).to(self.dtype)

    def inputs(self, tensors: Tensors | None = None, grad: Tensor | None = None) -> Inputs:
        """The inputs of the call: its own numbers, detached, or other tensors by the same names."""
        if tensors is None:
            tensors = {name: tensor.detach() for name, tensor in self.tensors().items()}
        grad = self.grad_output() if grad is None else grad
        x, other = tensors["x"], tensors.get("residual")
        if self.operation == "linear":
            return Inputs(x, weights(tensors), None, None, grad)
        residual = {"x": x, "other": other, "both": (x, other), "none": None}[self.residual]
        down, up = weights(tensors), weights(tensors, "up.")
        route = self.route()
        chosen = (None if route is None else route.to(x.device), tensors.get("mix"))
        return Inputs(x, down, up, residual, grad, self.activation, self.scale, *chosen)


def weights(tensors: Tensors, prefix: str = "down.") -> Any:
    """The weights of a projection among the tensors, by the prefix of their names."""
    kind: type[Any] = LinearWeights if prefix + "weight" in tensors else PHMWeights
    return kind(*(tensors.get(prefix + field) for field in kind._fields))


def _text(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "()"
    return getattr(value, "__name__", str(value))


def _as_authors(weights: PHMWeights, seed: int) -> None:
    """Draw the weights anew, as the authors start a shared rule, its factors and the bias."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        reset_factors([factor for factor in weights[1:3] if factor is not None], "paper")
        reset_rule([weights.rule], 1e-4, "normal")
        if weights.bias is not None:
            weights.bias.zero_()
