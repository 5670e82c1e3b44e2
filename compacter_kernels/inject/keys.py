"""Under which names the tensors of adapters stand in a file.

As in the model, with the adapter's name left out and relative to the model's base where they lie in it, so that what
was trained in one class of a family fits the others: `encoder.layer.0.output.dense.compacter.down.W_left`,
`encoder.layer.0.output.LayerNorm.compacter.weight`, `compacter.shared.phm_rule`, `classifier.compacter.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from compacter_kernels.targets.added import NAME
from compacter_kernels.targets.wrappers import check_not_copied_by_peft, plain_path, unwrapped

Parts = Iterable[tuple[str, nn.Module]]


def base_prefix(model: nn.Module) -> str:
    """`bert.` of a BertForSequenceClassification; empty for a model that is its own base."""
    prefix = getattr(model, "base_model_prefix", None)
    inside = isinstance(prefix, str) and prefix and isinstance(getattr(model, prefix, None), nn.Module)
    return f"{prefix}." if inside else ""


def is_head(model: nn.Module, key: str) -> bool:
    """Whether a name in a file belongs to no part of the model's base, such as `classifier.compacter.weight`."""
    base = unwrapped(model.get_submodule(base_prefix(model).removesuffix(".")))
    return key.partition(".")[0] not in {NAME, *(name for name, _ in base.named_children())}


def named_tensors(model: nn.Module, parts: Parts) -> dict[str, Tensor]:
    """Parameters and buffers by their names in a file, each once.

    Raises:
        ValueError: two of one name, in the base and beside it; what peft trains in copies of its own.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    prefix = base_prefix(model)
    for path, module in parts:
        check_not_copied_by_peft(model, path)
        where, module = plain_path(model, path), unwrapped(module)
        for name, tensor in module.state_dict(keep_vars=True).items():
            key = f"{where}.{plain_path(module, name)}".removeprefix(prefix)
            if key in found:
                raise ValueError(f"two tensors of {type(model).__name__} would have the name {key}")
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                found[key] = tensor
    return found
