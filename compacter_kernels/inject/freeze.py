"""Sets `requires_grad` to False so that graphs recorded before still give their gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

MARK = "compacter_kernels.freeze"


def freeze(parameter: nn.Parameter) -> None:
    """Exclude the parameter from new graphs; a graph that holds it still gives it a gradient.

    autograd drops the gradient of a leaf that does not require one when it arrives. So a hook of
    the graph's node for the parameter adds the gradient to `grad` before that. The node, and with
    it the hook, lives as long as a graph holds it.
    """
    if not parameter.requires_grad:
        return
    with torch.inference_mode(False):
        node = get_gradient_edge(parameter).node
        metadata: dict[str, bool] = node.metadata  # type: ignore[assignment]  # The stubs say that it is a method.
        if MARK not in metadata:
            metadata[MARK] = True
            node.register_prehook(functools.partial(_accumulate, parameter))
    parameter.requires_grad_(False)


def _accumulate(parameter: nn.Parameter, gradients: tuple[Tensor | None, ...]) -> None:
    gradient = gradients[0]
    if gradient is not None and not parameter.requires_grad:
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
