"""What the names of modules and parameters say: base of a model, blocks and targets, norms, heads.

A target is the module that an adapter follows. It is the last linear layer of a block. For example,
`encoder.layer.3.output.dense` ends the feed-forward block of layer 3 of a BERT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from compacter_kernels.targets.architectures import ARCHITECTURES, BLOCK_OPTIONS, Architecture
from compacter_kernels.targets.find import HEADS, block_pattern
from compacter_kernels.targets.wrappers import plain_names

# The blocks of a T5: a pattern for their names -> the names of their targets.
_T5_BLOCKS = {
    r"(?:encoder|decoder)\.block\.\d+\.layer\.0": "SelfAttention.o",
    r"decoder\.block\.\d+\.layer\.1": "EncDecAttention.o",
    r"(?:encoder\.block\.\d+\.layer\.1|decoder\.block\.\d+\.layer\.2)": "DenseReluDense.wo",
}
_BASE = r"bert|roberta|electra|distilbert|vit|wav2vec2|model|transformer(?=\.(?:h|encoder|decoder|shared_parameters)\.)"


class TargetBlock(NamedTuple):
    """The block that a target ends, for example `encoder.layer`, 3, "feed_forward"."""

    stack: str
    layer: int
    kind: str


def names_in_base(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by their names in the plain model's base; ValueError if two have one name.

    For example, `module.bert.encoder...` of DistributedDataParallel becomes `encoder...`.
    """
    tensors = plain_names(tensors)
    in_base = {re.sub(rf"^(?:{_BASE})\.", "", key): tensor for key, tensor in tensors.items()}
    if len(in_base) < len(tensors):
        twice = next(key for key in in_base if key in tensors and any(k.endswith(f".{key}") for k in tensors))
        raise ValueError(f"{twice} is in it twice, in the model's base and beside it")
    return in_base


def is_norm(key: str) -> bool:
    """Whether a parameter belongs to a layer norm, as the families of the table name theirs."""
    module = key.rpartition(".")[0].rpartition(".")[2].lower()
    return "norm" in module or module in ("ln_1", "ln_2", "ln_f", "ln_cross_attn")


def head_of(key: str) -> str | None:
    """Return the name of the head that a parameter belongs to, or None."""
    first = key.partition(".")[0]
    return first if first in HEADS else None


def block_of(target: str, architecture: Architecture) -> TargetBlock | None:
    """Return the block that a module of this name ends in a family, or None if it ends none."""
    for kind in BLOCK_OPTIONS:
        block = getattr(architecture, kind)
        match = block and block_pattern(architecture, block.write).fullmatch(target)
        if match:
            return TargetBlock(match["stack"], int(match["layer"]), kind)
    return None


def t5_target(block: str) -> str:
    """Return a T5's `encoder.block.0.layer.1.DenseReluDense.wo` for `encoder.block.0.layer.1`."""
    for pattern, target in _T5_BLOCKS.items():
        if re.fullmatch(pattern, block):
            return f"{block}.{target}"
    raise ValueError(f"{block} is no layer of a T5, such as encoder.block.0.layer.1")


def t5_block(target: str) -> str | None:
    """Return the block of a T5 that has this target, or None if there is none."""
    match = re.fullmatch("|".join(rf"({block})\.{re.escape(end)}" for block, end in _T5_BLOCKS.items()), target)
    return match[match.lastindex or 0] if match else None


def target_options(targets: Iterable[str], model_type: str | None = None) -> dict[str, Any]:
    """Return the options under which `inject` puts adapters after these modules.

    If they end the blocks of some kinds in all layers, these are the options of the kinds;
    otherwise it is `target_modules`. Without a `model_type`, all families are tried.
    """
    targets = list(targets)
    families = [ARCHITECTURES[model_type]] if model_type in ARCHITECTURES else ARCHITECTURES.values()
    for family in dict.fromkeys(families):
        blocks = [block for target in targets if (block := block_of(target, family))]
        if len(blocks) == len(targets) and _are_in_every_layer(blocks):
            return {option: any(block.kind == kind for block in blocks) for kind, option in BLOCK_OPTIONS.items()}
    return {"target_modules": sorted(targets)}


def _are_in_every_layer(blocks: list[TargetBlock]) -> bool:
    stacks, kinds = {block.stack for block in blocks}, {block.kind for block in blocks}
    halves = {stack.partition(".")[0] for stack in stacks} & {"encoder", "decoder"}
    if any(stack.endswith(("block", "layers")) for stack in stacks) and len(halves) == 1:
        return False  # only the encoder, or only the decoder, of a model that has both
    for stack in stacks:
        layers = set(range(1 + max(block.layer for block in blocks if block.stack == stack)))
        for kind in kinds:
            present = {block.layer for block in blocks if (block.stack, block.kind) == (stack, kind)}
            if present != layers and (present or kind != "cross_attention"):
                return False
    return True
