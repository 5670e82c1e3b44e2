"""One call of the library as data, the float64 oracle of its output and gradients, and the limits on the error."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.accuracy import coarse, error, floor
from compacter_kernels.activations import resolve
from compacter_kernels.dispatch import IMPLS as MODULES, PLAIN
from compacter_kernels.problem import Problem, Projection, adapter_problem, linear_problem

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Tensors = dict[str, Tensor]


def _why_not(name: str) -> str | None:
    """Why the impl cannot serve a plain call on the CPU in this process, or None."""
    module, sizes = MODULES[name], Projection(1, 1, 2, 2, (FP32,) * 4)
    plain = Problem("adapter", torch.device("cpu"), FP32, (sizes, sizes), resolve("relu"))
    return ck.available_impls()[name] or module.refuses(plain)


# Tests have no cases for the impls that cannot serve; conftest says at the start of a run which these are, and why.
ABSENT = {name: reason for name in MODULES if (reason := _why_not(name)) is not None}
IMPLS = [name for name in MODULES if name not in ABSENT]
FUSED = [name for name in IMPLS if name not in PLAIN]
NOT_DENSE = [name for name in IMPLS if name != "dense"]


@dataclass(frozen=True)
class Case:
    """The sizes and options of one call; the fields that differ from the defaults make the test id."""

    operation: str = "adapter"
    width: int = 24
    bottleneck: int = 12
    n: int = 4
    rank: int | None = 1  # None: unfactorised W
    up_n: int | None = None  # None: as down
    up_rank: int | None = None
    shape: tuple[int, ...] = (5,)
    dtype: torch.dtype = FP32
    params: torch.dtype = FP32
    activation: Any = "gelu_new"
    residual: str = "x"  # "none", "x", "other" or "both"
    bias: bool = True
    scale: Any = 1.0

    def __str__(self) -> str:
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        parts = [f"{name}={_text(value)}" for name, value, default in values if value != default]
        return "-".join(parts) or "default"

    def tensors(self, dtype: torch.dtype | None = None) -> Tensors:
        """Leaves that require grad, the same numbers in every run: x, residual, and the weights of each projection."""
        rng = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

        def leaf(shape: tuple[int, ...], std: float, kind: torch.dtype) -> Tensor:
            return (torch.randn(shape, generator=rng, dtype=FP64) * std).to(dtype or kind).requires_grad_()

        def projection(n: int, rank: int | None, wide_in: int, wide_out: int) -> Tensors:
            columns = wide_out // n if rank is None else rank
            found = {"rule": leaf((n, n, n), n**-0.5, self.params)}
            found["left"] = leaf((n, wide_in // n, columns), wide_in**-0.5, self.params)
            if rank is not None:
                found["right"] = leaf((n, rank, wide_out // n), rank**-0.5, self.params)
            if self.bias:
                found["bias"] = leaf((wide_out,), 0.5, self.params)
            return found

        found = {"x": leaf((*self.shape, self.width), 1.0, self.dtype)}
        if self.operation == "linear":
            return found | projection(self.n, self.rank, self.width, self.bottleneck)
        if self.residual in ("other", "both"):
            found["residual"] = leaf((*self.shape, self.width), 1.0, self.dtype)
        down = projection(self.n, self.rank, self.width, self.bottleneck)
        up = projection(self.up_n or self.n, self.up_rank or self.rank, self.bottleneck, self.width)
        return found | {f"down.{k}": v for k, v in down.items()} | {f"up.{k}": v for k, v in up.items()}

    def call(self, tensors: Tensors, impl: str = "auto", **options: Any) -> Tensor:
        """The public function on these tensors."""
        if self.operation == "linear":
            return ck.phm_linear(tensors["x"], weights(tensors), impl=impl)
        options = {"activation": self.activation, "scale": self.scale, **options}
        residual: Any = tensors["x"] if self.residual == "x" else tensors.get("residual")
        if self.residual == "both":
            residual = (tensors["x"], residual)
        down, up = weights(tensors, "down."), weights(tensors, "up.")
        return ck.compacter_adapter(tensors["x"], down, up, residual=residual, impl=impl, **options)

    def grad_output(self) -> Tensor:
        """What backward starts from, the same numbers in every run."""
        width = self.bottleneck if self.operation == "linear" else self.width
        rng = torch.Generator().manual_seed(zlib.crc32(str(self).encode()) + 1)
        return torch.randn((*self.shape, width), generator=rng, dtype=FP64).to(self.dtype)


def _text(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "()"
    return getattr(value, "__name__", str(value))


def weights(tensors: Tensors, prefix: str = "") -> ck.PHMWeights:
    """The PHMWeights among the tensors, by the prefix of their names."""
    return ck.PHMWeights(*(tensors.get(prefix + field) for field in ck.PHMWeights._fields))  # type: ignore[arg-type]


def run(case: Case, tensors: Tensors, impl: str, grad: Tensor | None = None) -> Tensors:
    """The output and the gradient of every tensor that requires one, by name; the tensors keep no .grad."""
    out = case.call(tensors, impl)
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), case.grad_output() if grad is None else grad)
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def copies(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Fresh contiguous leaves with the same values, in `dtype` where given."""
    return {
        name: t.detach().to(dtype or t.dtype, copy=True).contiguous().requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes: equal for equal bits, NaN included."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same_bits(got: Tensors, expected: Tensors) -> None:
    """Every tensor bitwise the same."""
    assert got.keys() == expected.keys()
    different = [name for name in got if not torch.equal(bits(got[name]), bits(expected[name]))]
    assert not different


def problem(case: Case, device: str = "cpu") -> Problem:
    """What the case asks for on that device."""
    tensors = case.tensors()
    if case.operation == "linear":
        found = linear_problem(tensors["x"], weights(tensors))
    else:
        found = adapter_problem(tensors["x"], weights(tensors, "down."), weights(tensors, "up."), case.activation)
    return found._replace(device=torch.device(device))


def skip_if_refused(case: Case, tensors: Tensors, impl: str) -> None:
    """An impl may refuse sizes: then the call says why, and the test ends here."""
    device = tensors["x"].device.type
    reason = MODULES[impl].refuses(problem(case, device))
    if reason is not None:
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            case.call(tensors, impl)
        pytest.skip(f"{impl}: {reason}")


class Oracle(NamedTuple):
    """The float64 results of one call, and the limit on the error of each: twice that of dense, or the floor."""

    exact: Tensors
    limits: dict[str, float]
    dtypes: dict[str, torch.dtype]

    def violations(self, got: Tensors, impl: str = "") -> Iterator[str]:
        """What is wrong with these results of `impl`, in words; nothing where they are within the limits."""
        least = floor(self.dtypes["x"], FP32) if coarse(impl) else 0.0
        for name, tensor in got.items():
            off, limit = error(tensor, self.exact[name]), max(self.limits[name], least)
            if not off <= limit:
                yield f"{name}: error {off:.3g}, limit {limit:.3g}"
            if tensor.dtype != self.dtypes[name]:
                yield f"{name}: {tensor.dtype} instead of {self.dtypes[name]}"

    def check(self, got: Tensors, impl: str = "") -> None:
        """The results of `impl` are all there, within the limits, in the dtypes of what they belong to."""
        assert got.keys() == self.exact.keys()
        assert not list(self.violations(got, impl))


def oracle(case: Case, tensors: Tensors, grad: Tensor) -> Oracle:
    """The oracle of a call with these tensors, evaluated by impl="dense" in float64."""
    exact = run(case, copies(tensors, FP64), "dense", grad.to(FP64))
    dense = run(case, copies(tensors), "dense", grad)
    limits = {name: max(2 * error(t, exact[name]), floor(t.dtype, FP32)) for name, t in dense.items()}
    return Oracle(exact, limits, {"out": case.dtype, **{name: t.dtype for name, t in tensors.items()}})


@functools.lru_cache(maxsize=4)
def reference(case: Case) -> Oracle:
    """The oracle of a case with its own tensors; consecutive tests of one case share it."""
    return oracle(case, case.tensors(), case.grad_output())
