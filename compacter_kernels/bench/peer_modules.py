"""The modules of the peers, each with its trained weights in the order that its formula takes.

Compacter modules start from the weights of the case. The other methods have the bottleneck width of
the case, or rank 8, the default of peft.

LoRA and LoKr adapt a linear layer. Here this layer returns its input, so that what they add is
timed alone: x + delta(x), as in an adapter. Both `peft` and `lycoris` compute the delta beside the
output of the layer, and see no difference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.activations import resolve
from compacter_kernels.cases import Inputs
from compacter_kernels.weights import PHMWeights

RANK = 8


class Parts(NamedTuple):
    """The function of x that is timed, the module, and the weights that it trains."""

    function: Callable[[Tensor], Tensor]
    module: nn.Module
    weights: tuple[nn.Parameter, ...]


class PassesOn(nn.Linear):
    """The linear layer that LoRA and LoKr adapt: it returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x itself."""
        return x


class Bottleneck(nn.Module):
    """A plain bottleneck adapter: x + up(act(down(x)))."""

    def __init__(self, width: int, bottleneck: int, activation: str) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.act = resolve(activation).function

    def forward(self, x: Tensor) -> Tensor:
        """Return x + up(act(down(x)))."""
        result: Tensor = x + self.up(self.act(self.down(x)))
        return result


class Sizes(NamedTuple):
    """The sizes of a case, by the names of the field."""

    width: int
    bottleneck: int
    phm_dim: int
    phm_rank: int

    @classmethod
    def of(cls, case: Inputs) -> Sizes:
        """Read the sizes from the weights."""
        assert isinstance(case.down, PHMWeights) and isinstance(case.up, PHMWeights)
        (n, rows, rank), up_rows = case.down.left.shape, case.up.left.shape[1]
        return cls(n * rows, n * up_rows, n, rank)


def _with_weights_of(case: Inputs, sides: Iterable[Any]) -> tuple[nn.Parameter, ...]:
    """Return rule, left, right and bias of each projection, with the values of the case."""
    weights = tuple(parameter for side in sides for parameter in (side.phm_rule, side.W_left, side.W_right, side.b))
    with torch.no_grad():
        for parameter, value in zip(weights, (*case.down, *(case.up or ())), strict=True):
            parameter.copy_(value)
    return weights


def _visible(parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    """Draw all trained parameters, one of which would start at 0 and hide the others."""
    trained = tuple(parameter for parameter in parameters if parameter.requires_grad)
    for parameter in trained:
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return trained


def ours(case: Inputs) -> Parts:
    """CompacterAdapter of this package, with two rules."""
    k, d, n, rank = Sizes.of(case)
    options = {"phm_dim": n, "phm_rank": rank, "activation": case.activation, "shared_phm_rule": False}
    module = ck.CompacterAdapter(k, reduction_factor=k / d, **options)
    return Parts(module, module, _with_weights_of(case, (module.down, module.up)))


def adapters(case: Inputs) -> Parts:
    """Compacter of `adapters`: the module that it puts into a model, with two rules."""
    from adapters import CompacterConfig
    from adapters.methods.modeling import Adapter

    k, d, n, rank = Sizes.of(case)
    sizes = {"phm_dim": n, "phm_rank": rank, "reduction_factor": k / d}
    config = CompacterConfig(non_linearity=case.activation, shared_phm_rule=False, **sizes)
    module = Adapter("peer", k, d, config)
    weights = _with_weights_of(case, (module.adapter_down[0], module.adapter_up))
    return Parts(lambda x: module(x, x)[0], module, weights)


def bottleneck(case: Inputs) -> Parts:
    """A plain bottleneck adapter of two nn.Linear."""
    module = Bottleneck(*Sizes.of(case)[:2], case.activation)
    return Parts(module, module, tuple(module.parameters()))


def peft(case: Inputs, config: str, patched: bool = False) -> Parts:
    """LoRA or LoKr of `peft` on a layer that passes x on."""
    import peft

    width = Sizes.of(case).width
    model = nn.Sequential(PassesOn(width, width))
    options = {"lora_alpha": RANK} if config == "LoraConfig" else {"alpha": RANK}
    chosen = getattr(peft, config)(r=RANK, target_modules=["0"], **options)
    module: Any = peft.get_peft_model(model, chosen).base_model.model[0]
    if patched and not ck.patch(module).patched:
        raise RuntimeError("patch does not know this layer")
    return Parts(module, module, _visible(module.parameters()))


def lycoris(case: Inputs, patched: bool = False, bypass: bool = False) -> Parts:
    """LoKr of `lycoris` on a layer that passes x on; without bypass, as on a linear layer."""
    from lycoris.modules.lokr import LokrModule

    width = Sizes.of(case).width
    layer = PassesOn(width, width).requires_grad_(False)
    module = LokrModule("lokr", layer, lora_dim=RANK, alpha=RANK, bypass_mode=bypass)
    module.apply_to()
    if patched and not ck.patch(layer).patched:
        raise RuntimeError("patch does not know this layer")
    return Parts(layer, module, _visible(module.parameters()))


def compacter_formula(x: Tensor, *weights: Tensor) -> Tensor:
    """x + up(act(down(x))) with H built, of the weights of down and of up."""
    sides = (PHMWeights(*weights[:4]), PHMWeights(*weights[4:]))
    return ck.compacter_adapter(x, *sides, residual=x, impl="dense")


def bottleneck_formula(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """The same with dense projections."""
    result: Tensor = x + resolve("gelu_new").function(x @ down.T + down_bias) @ up.T + up_bias
    return result


def lora_formula(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + B A x."""
    return x + x @ a.T @ b.T


def lokr_formula(x: Tensor, w1: Tensor, *w2: Tensor) -> Tensor:
    """x + (w1 (x) w2) x, where w2 is whole or the product of two factors."""
    return x + x @ torch.kron(w1, functools.reduce(torch.matmul, w2)).T
