"""Where the embeddings of a model end: at the input of the first layer of each stack."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from compacter_kernels.targets.find import Target
from compacter_kernels.targets.wrappers import unwrapped


def embedding_targets(model: nn.Module, targets: Sequence[Target]) -> list[Target]:
    """The first layer of each stack that has targets, whose input an embedding adapter takes.

    ValueError: a target is no part of a layer in a list of layers.
    """
    found: dict[str, Target] = {}
    for target in targets:
        if target.first not in found:
            found[target.first] = Target(target.first, target.first, target.layer, like=target.write)
            path, _, name = target.first.rpartition(".")
            stack = unwrapped(model.get_submodule(path))
            if not isinstance(stack, nn.ModuleList | nn.Sequential) or name not in stack._modules:
                raise ValueError(
                    f"embedding_adapter=True needs a list of layers, nn.ModuleList or nn.Sequential: the embeddings "
                    f"end at the input of its first layer. {target.write} is no part of such a layer"
                )
    return list(found.values())
