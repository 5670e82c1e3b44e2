"""The names that the tensors of adapters have in a file.

A name is that in the model, without the adapter's name and relative to the model's base, so that
what was trained in one class of a family fits the others:
`encoder.layer.0.output.dense.compacter.down.W_left`,
`encoder.layer.0.output.LayerNorm.compacter.weight`, `compacter.shared.phm_rule`,
`classifier.compacter.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from compacter_kernels.targets.added import NAME
from compacter_kernels.targets.wrappers import check_not_copied_by_peft, plain_path, unwrapped


def base_prefix(model: nn.Module) -> str:
    """`bert.` for a BertForSequenceClassification. It is empty for a model that is its own base."""
    prefix = getattr(model, "base_model_prefix", None)
    has_base = isinstance(prefix, str) and prefix and isinstance(getattr(model, prefix, None), nn.Module)
    return f"{prefix}." if has_base else ""


def is_head(model: nn.Module, key: str) -> bool:
    """Whether a name in a file, such as `classifier.compacter.weight`, is outside of the base."""
    base = unwrapped(model.get_submodule(base_prefix(model).removesuffix(".")))
    return key.partition(".")[0] not in {NAME, *(name for name, _ in base.named_children())}


def named_tensors(model: nn.Module, parts: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """The parameters and buffers of modules, by their names in a file, each tensor once.

    parts: modules with the paths that their names in the file begin with. ValueError: two tensors
    have one name, in the base and beside it; peft trains copies of a part.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    prefix = base_prefix(model)
    for path, module in parts:
        check_not_copied_by_peft(model, path)
        start, module = plain_path(model, path), unwrapped(module)
        for name, tensor in module.state_dict(keep_vars=True).items():
            key = f"{start}.{plain_path(module, name)}".removeprefix(prefix)
            if key in tensors:
                raise ValueError(f"two tensors of {type(model).__name__} would have the name {key}")
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[key] = tensor
    return tensors
