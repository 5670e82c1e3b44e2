"""Modules with the structure of those in OpenDelta, T-Few and the authors' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compacter_kernels import private

# Without the private names of torch every module counts as hooked, and none runs as one kernel.
hooks_known = pytest.mark.skipif(private.PUBLIC, reason="whether a module has hooks is not known")


class LookalikeLinear(nn.Module):
    """The PHMLinear of those libraries.

    It builds H in each call. A shared rule or W is set from outside.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        phm_dim: int = 4,
        bias: bool = True,
        learn_phm: bool = True,
        shared_phm_rule: bool = False,
        factorized_phm: bool = True,
        shared_W_phm: bool = False,
        factorized_phm_rule: bool = False,
        phm_rank: int = 1,
    ) -> None:
        super().__init__()
        n, rows, columns = phm_dim, in_features // phm_dim, out_features // phm_dim
        self.in_features, self.out_features, self.phm_dim, self.phm_rank = in_features, out_features, n, phm_rank
        self.learn_phm, self.shared_phm_rule, self.factorized_phm_rule = learn_phm, shared_phm_rule, factorized_phm_rule
        self.factorized_phm, self.shared_W_phm = factorized_phm, shared_W_phm
        shapes: dict[str, tuple[int, ...]] = {}
        if not shared_phm_rule:
            halves = {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
            shapes |= halves if factorized_phm_rule else {"phm_rule": (n, n, n)}
        if not shared_W_phm:
            factors = {"W_left": (n, rows, phm_rank), "W_right": (n, phm_rank, columns)}
            shapes |= factors if factorized_phm else {"W": (n, rows, columns)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.4, learn_phm or "rule" not in name))
        self.register_parameter("b", nn.Parameter(torch.randn(out_features)) if bias else None)

    def set_phm_rule(self, phm_rule: Any = None, phm_rule_left: Any = None, phm_rule_right: Any = None) -> None:
        if self.factorized_phm_rule:
            self.phm_rule_left, self.phm_rule_right = phm_rule_left, phm_rule_right
        else:
            self.phm_rule = phm_rule

    def set_W(self, W: Any = None, W_left: Any = None, W_right: Any = None) -> None:
        if self.factorized_phm:
            self.W_left, self.W_right = W_left, W_right
        else:
            self.W = W

    def forward(self, x: Tensor, phm_rule: Any = None) -> Tensor:
        rule = self.phm_rule_left @ self.phm_rule_right if self.factorized_phm_rule else self.phm_rule
        W = self.W_left @ self.W_right if self.factorized_phm else self.W
        H = sum(torch.kron(a, w) for a, w in zip(rule, W, strict=True))
        y = x @ H
        return y if self.b is None else y + self.b


class Activations(nn.Module):
    """The module of those libraries around an activation function."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class OriginalAdapter(nn.Module):
    """rabeehk/compacter's HyperComplexAdapter."""

    def __init__(self, width: int = 32, bottleneck: int = 8, f: Any = F.gelu, **options: Any) -> None:
        super().__init__()
        self.activation = Activations(f)
        self.down_sampler = LookalikeLinear(width, bottleneck, **options)
        self.up_sampler = LookalikeLinear(bottleneck, width, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_sampler(self.activation(self.down_sampler(x)))


class TFewAdapter(OriginalAdapter):
    """T-Few's HyperComplexAdapter. It adds x, and its activation is a function, not a module."""

    def __init__(self, width: int = 32, bottleneck: int = 8, f: Any = F.gelu, **options: Any) -> None:
        super().__init__(width, bottleneck, f, **options)
        del self.activation
        self.activation = f

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class OpenDeltaAdapter(nn.Module):
    """OpenDelta's HyperComplexAdapterLayer. Its first call creates the parameters."""

    def __init__(self, f: Any = swish, **options: Any) -> None:
        super().__init__()
        self.f, self.options, self.hypercomplex_division, self.instantiated = f, options, 4, False

    def instantiate(self, width: int) -> None:
        self.activation = Activations(self.f)
        self.down_sampler = LookalikeLinear(width, width // 4, **self.options)
        self.up_sampler = LookalikeLinear(width // 4, width, **self.options)
        self.instantiated = True

    def post_forward(self, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        if not self.instantiated:
            self.instantiate(x.shape[-1])
        y = self.up_sampler(self.activation(self.down_sampler(x))) + x
        return (y, *output[1:]) if isinstance(output, tuple) else y


class OpenDeltaHost(nn.Module):
    """A module that OpenDelta adapted: its output goes through `compactor.post_forward`."""

    def __init__(self, width: int = 32, as_tuple: bool = False, **options: Any) -> None:
        super().__init__()
        self.linear, self.as_tuple = nn.Linear(width, width), as_tuple
        self.compactor = OpenDeltaAdapter(**options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        output = self.compactor.post_forward((y, "cache") if self.as_tuple else y)
        if self.as_tuple:
            assert output[1:] == ("cache",)
        return output[0] if self.as_tuple else output
