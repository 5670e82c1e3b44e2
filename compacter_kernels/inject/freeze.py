"""`requires_grad` off, without a loss for graphs that were recorded before."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

MARK = "compacter_kernels.freeze"


def freeze(parameter: nn.Parameter) -> None:
    """Train the parameter no further: graphs to come do not hold it, one that holds it already still gives a gradient.

    autograd drops what arrives at a leaf that requires none by then. So what arrives is added to `grad` before that, by
    a hook of the node where it arrives; the node, and the hook with it, lives as long as there is such a graph.
    """
    if not parameter.requires_grad:
        return
    with torch.inference_mode(False):
        node = get_gradient_edge(parameter).node
        known: dict[str, bool] = node.metadata  # type: ignore[assignment]  # a property, in the stubs a method
        if MARK not in known:
            known[MARK] = True
            node.register_prehook(functools.partial(_keep, parameter))
    parameter.requires_grad_(False)


def _keep(parameter: nn.Parameter, gradients: tuple[Tensor | None, ...]) -> None:
    gradient = gradients[0]
    if gradient is not None and not parameter.requires_grad:
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
