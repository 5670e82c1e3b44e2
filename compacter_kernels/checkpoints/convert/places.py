"""Where adapters sit, in the words of each format: the module that one follows, the block that it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from compacter_kernels.targets.architectures import ARCHITECTURES, Architecture
from compacter_kernels.targets.find import HEADS, block_pattern
from compacter_kernels.targets.wrappers import plain_names

KINDS = {"attention": "mh_adapter", "feed_forward": "output_adapter", "cross_attention": "cross_adapter"}
_BASE = r"bert|roberta|electra|distilbert|vit|wav2vec2|model|transformer(?=\.(?:h|encoder|decoder|shared_parameters)\.)"
T5_LAYERS = {
    "encoder": ("SelfAttention.o", "DenseReluDense.wo"),
    "decoder": ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),
}


class Place(NamedTuple):
    """A place in a family: `encoder.layer`, 3, "feed_forward"."""

    stack: str
    layer: int
    kind: str


def relative(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in the plain model's base: `module.bert.encoder...` of DDP is `encoder...`.

    Raises:
        ValueError: two of one name.
    """
    tensors = plain_names(tensors)
    found = {re.sub(rf"^(?:{_BASE})\.", "", key): tensor for key, tensor in tensors.items()}
    if len(found) < len(tensors):
        twice = next(
            key for key in found if key in tensors and any(k != key and k.endswith(f".{key}") for k in tensors)
        )
        raise ValueError(f"{twice} is in it twice, in the model's base and beside it")
    return found


def place_of(path: str, architecture: Architecture) -> Place | None:
    """The place of the module of that name, or None for one that ends no block of the family."""
    for kind in KINDS:
        block = getattr(architecture, kind)
        match = block and block_pattern(architecture, block.write).fullmatch(path)
        if match:
            return Place(match["stack"], int(match["layer"]), kind)
    return None


def t5_module(block: str) -> str:
    """encoder.block.0.layer.1 -> encoder.block.0.layer.1.DenseReluDense.wo, and so on.

    Raises:
        ValueError: no such layer of a T5.
    """
    match = re.fullmatch(r"(encoder|decoder)\.block\.\d+\.layer\.(\d)", block)
    layers = T5_LAYERS[match[1]] if match else ()
    if match is None or int(match[2]) >= len(layers):
        raise ValueError(f"{block} is no layer of a T5, such as encoder.block.0.layer.1")
    return f"{block}.{layers[int(match[2])]}"


def t5_block(path: str) -> str | None:
    """The other way round; None for what is no such module."""
    block = path.rpartition(".")[0].rpartition(".")[0]
    try:
        return block if t5_module(block) == path else None
    except ValueError:
        return None


def placement(paths: Iterable[str], model_type: str | None = None) -> dict[str, Any]:
    """The options under which `inject` puts adapters there: by kind of block if they fill all layers, else by name."""
    paths = list(paths)
    families = [ARCHITECTURES[model_type]] if model_type in ARCHITECTURES else ARCHITECTURES.values()
    for family in dict.fromkeys(families):
        places = [place_of(path, family) for path in paths]
        kinds = _filled([place for place in places if place is not None]) if all(places) else None
        if kinds is not None:
            return {option: kind in kinds for kind, option in KINDS.items()}
    return {"target_modules": sorted(paths)}


def _filled(places: list[Place]) -> set[str] | None:
    """The kinds of adapters that are in every layer; None where one is in some layers only."""
    depth: dict[str, int] = {}
    for place in places:
        depth[place.stack] = max(depth.get(place.stack, 0), place.layer + 1)
    halves = {stack.partition(".")[0] for stack in depth} & {"encoder", "decoder"}
    if any(stack.endswith(("block", "layers")) for stack in depth) and len(halves) == 1:
        return None  # one half of an encoder and decoder
    kinds = {place.kind for place in places}
    for stack, layers in depth.items():
        for kind in kinds:
            here = {place.layer for place in places if place.stack == stack and place.kind == kind}
            if here != set(range(layers)) and not (kind == "cross_attention" and not here):
                return None
    return kinds


def is_norm(key: str) -> bool:
    """Whether a parameter's name is that of a layer norm, as the families of the table name theirs."""
    module = key.rpartition(".")[0].rpartition(".")[2].lower()
    return "norm" in module or module in ("ln_1", "ln_2", "ln_f", "ln_cross_attn")


def head_of(key: str) -> str | None:
    """The head that a parameter of that name belongs to."""
    first = key.partition(".")[0]
    return first if first in HEADS else None


def heads_in(keys: Iterable[str]) -> list[str]:
    """The heads that parameters of these names belong to."""
    return sorted({head for key in keys if (head := head_of(key))})
