"""The accuracy contract: the error of an impl against `dense` evaluated in float64.

The contract covers the output and every gradient, and is the same on every machine and for every
shape. The error of a tensor may be at most twice the error of `dense` in the same dtypes, or
`floor`, whichever is larger. Where an impl rounds the operands of its products to the dtype of x
(`coarse`), the floor of the dtype of x holds for the gradients of wider parameters too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from compacter_kernels.activations import resolve
from compacter_kernels.dispatch import IMPLS
from compacter_kernels.functional import compacter_adapter, phm_linear
from compacter_kernels.nn.initialisation import reset_factors, reset_rule
from compacter_kernels.weights import PHMWeights

RESIDUALS = ("x", "other", "none")
INITS = ("random", "paper")


class Shape(NamedTuple):
    """The sizes of one adapter: hidden width k, bottleneck width d, phm_dim n."""

    k: int
    d: int
    n: int

    def __str__(self) -> str:
        return f"{self.k}/{self.d}/{self.n}"


class Case(NamedTuple):
    """One call, and the gradient that its backward starts from.

    x: (T, k). up: None for phm_linear, whose weights are `down`. residual: None, x itself or
    another tensor like x. grad: like the output.
    """

    x: Tensor
    down: PHMWeights
    up: PHMWeights | None
    residual: Tensor | None
    grad: Tensor
    activation: str = "gelu_new"

    def tensors(self) -> dict[str, Tensor]:
        """Return the inputs that have a gradient by name: x, residual, down.rule, ..., up.bias.

        A residual that is x itself is not repeated.
        """
        tensors = {"x": self.x}
        if self.residual is not None and self.residual is not self.x:
            tensors["residual"] = self.residual
        for side, weights in (("down", self.down), ("up", self.up)):
            for field, tensor in zip(PHMWeights._fields, weights or (), strict=False):
                if tensor is not None:
                    tensors[f"{side}.{field}"] = tensor
        return tensors

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """Return the call with each tensor changed once; a residual that is x stays x."""
        x = change(self.x)
        residual = self.residual
        if residual is not None:
            residual = x if residual is self.x else change(residual)

        def weights(old: PHMWeights) -> PHMWeights:
            return PHMWeights(*(None if w is None else change(w) for w in old))  # type: ignore[arg-type]

        up = None if self.up is None else weights(self.up)
        return Case(x, weights(self.down), up, residual, change(self.grad), self.activation)


Function = Callable[[Case], Tensor]


def call(impl: str) -> Function:
    """Return the public function through that impl, as a function of a case."""

    def function(case: Case) -> Tensor:
        if case.up is None:
            return phm_linear(case.x, case.down, impl=impl)
        activation, residual = case.activation, case.residual
        return compacter_adapter(case.x, case.down, case.up, activation=activation, residual=residual, impl=impl)

    return function


def random_case(
    shape: Shape,
    tokens: int,
    *,
    operation: str = "adapter",
    rank: int | None = 1,
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype | None = None,
    activation: str = "gelu_new",
    residual: str = "x",
    init: str = "random",
    seed: int = 0,
) -> Case:
    """Return a case of random numbers, which are the same for the same arguments on every machine.

    Args:
        operation: "adapter", or "linear" for its down projection alone.
        rank: None for unfactorised weights.
        dtype: of x.
        param_dtype: of the parameters; by default float32, or float64 where x is float64.
        residual: one of RESIDUALS.
        init: "random" keeps every stage at order 1, so that each gradient is visible. "paper" draws
            the weights as the authors do: the rule is near 0 and the bias is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    n = shape.n
    if param_dtype is None:
        param_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int, std: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, generator=generator) * std).to(kind)

    def projection(fan_in: int, fan_out: int) -> PHMWeights:
        """Draw weights whose product has entries of order 1.

        The sums over p, u, i and the rank have n, fan_in/n, n and rank terms. The standard
        deviation of each factor is one over the root of the number of its terms.
        """
        columns = fan_out // n if rank is None else rank
        rule = normal(n, n, n, std=n**-0.5, kind=param_dtype)
        left_std = fan_in**-0.5 if rank is None else (fan_in / n) ** -0.5
        left = normal(n, fan_in // n, columns, std=left_std, kind=param_dtype)
        right = None if rank is None else normal(n, rank, fan_out // n, std=(n * rank) ** -0.5, kind=param_dtype)
        weights = PHMWeights(rule, left, right, normal(fan_out, std=0.5, kind=param_dtype))
        return _as_authors(weights, seed) if init == "paper" else weights

    x, down = normal(tokens, shape.k), projection(shape.k, shape.d)
    if operation == "linear":
        return Case(x, down, None, None, normal(tokens, shape.d), activation)
    up = projection(shape.d, shape.k)
    other = {"x": x, "none": None}
    return Case(
        x,
        down,
        up,
        other[residual] if residual in other else normal(*x.shape),
        normal(*x.shape),
        resolve(activation).name,
    )


def _as_authors(weights: PHMWeights, seed: int) -> PHMWeights:
    """Draw the weights anew, as the authors initialise a shared rule, the factors and the bias."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reset_factors([w for w in (weights.left, weights.right) if w is not None], "paper")
        reset_rule([weights.rule], 1e-4, "normal")
    return weights._replace(bias=None if weights.bias is None else torch.zeros_like(weights.bias))


def evaluate(case: Case, function: Function, gradients: bool = True) -> dict[str, Tensor]:
    """Return the output of `function` as "out", and the gradients of `case.tensors()` by name."""
    if not gradients:
        with torch.no_grad():
            return {"out": function(case)}
    case = case.map(lambda t: t.detach().clone().requires_grad_())
    wanted = case.tensors()
    out = function(case)
    grads = torch.autograd.grad(out, list(wanted.values()), case.grad.detach())
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def error(got: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest number of `exact`.

    It is infinite where the shapes differ or a difference is not finite.
    """
    if got.shape != exact.shape:
        return math.inf
    if exact.numel() == 0:
        return 0.0
    got = got.detach().to(torch.float64)
    largest = exact.abs().max().item()
    difference = (got - exact).abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / largest if largest > 0 else difference


def floor(dtype: torch.dtype, working: torch.dtype) -> float:
    """Return the error that rounding alone may cause in a tensor of `dtype`.

    working: the dtype of the computation, float32 or float64.

    Writing the result rounds it by half a unit in its last place. A whole unit is allowed, because
    the error of the working dtype can move a value across a rounding boundary. A sum of N rounded
    terms has an expected error of sqrt(N)/2 units of the working dtype. 32 units allow for 4096
    terms, which an implementation may add in one run before it should add partial sums. Neither
    number depends on the shape.
    """
    return max(torch.finfo(dtype).eps, 32 * torch.finfo(working).eps)


def coarse(impl: str) -> bool:
    """Return whether this impl rounds the operands of its products to the dtype of x.

    For a name that is no impl it is False.
    """
    return getattr(IMPLS.get(impl), "OPERANDS_LIKE_X", False)


class Deviation(NamedTuple):
    """The error of one tensor, and the limit of the contract."""

    tensor: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        """Return whether the error is within the limit; False for NaN."""
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"{self.tensor}: error {self.error:.2g}, limit {self.limit:.2g}"


class Oracle:
    """The float64 results of a case and the limits, computed once for all implementations."""

    def __init__(self, case: Case, gradients: bool = True) -> None:
        self.case, self.gradients = case, gradients
        self.exact = evaluate(case.map(lambda t: t.to(torch.float64)), call("dense"), gradients)
        dense = evaluate(case, call("dense"), gradients)
        working = torch.float64 if case.x.dtype == torch.float64 else torch.float32
        self.limits = {name: max(2 * error(t, self.exact[name]), floor(t.dtype, working)) for name, t in dense.items()}
        self.floor = floor(case.x.dtype, working)

    def check(self, function: Function, gradients: bool = True, impl: str = "") -> list[Deviation]:
        """Return the error of `function` in each tensor; without gradients, in the output alone.

        impl: the impl that `function` goes through.
        """
        return self.compare(evaluate(self.case, function, gradients and self.gradients), impl)

    def compare(self, got: Mapping[str, Tensor], impl: str = "") -> list[Deviation]:
        """Return the errors of results of `impl` that have the names that `evaluate` gives."""
        least = self.floor if coarse(impl) else 0.0
        return [Deviation(name, error(t, self.exact[name]), max(self.limits[name], least)) for name, t in got.items()]
