"""The names of the tensors of adapters.

A name is that in the model, without the adapter's name and relative to the model's base, so that
what was trained in one class of a family fits the others. Parameters of adapters have flat names
(`nn.flat_names`): `encoder.layer.0.output.dense.compacter_down_W_left`,
`compacter_shared_phm_rule`. Trained copies have the names of their originals:
`encoder.layer.0.output.LayerNorm.weight`, `classifier.weight`.

In a file, names are those that the library peft gives: relative to the whole model, and with a
prefix, `base_model.model.bert.encoder.layer.0.output.dense.compacter_down_W_left`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from compacter_kernels.nn import CompacterAdapter
from compacter_kernels.nn.flat_names import SHARED, flat
from compacter_kernels.targets.added import NAME
from compacter_kernels.targets.wrappers import IN_FILE, check_not_copied_by_peft, plain_path, unwrapped

SHARED_PATH = f"{NAME}.shared"  # Where a model holds the weights that its adapters share.


def base_prefix(model: nn.Module) -> str:
    """`bert.` for a BertForSequenceClassification. It is empty for a model that is its own base."""
    prefix = getattr(model, "base_model_prefix", None)
    has_base = isinstance(prefix, str) and prefix and isinstance(getattr(model, prefix, None), nn.Module)
    return f"{prefix}." if has_base else ""


def is_head(model: nn.Module, key: str) -> bool:
    """Whether a name, such as `classifier.weight`, is outside of the base."""
    base = unwrapped(model.get_submodule(base_prefix(model).removesuffix(".")))
    return not key.startswith(SHARED) and key.partition(".")[0] not in {name for name, _ in base.named_children()}


def named_tensors(model: nn.Module, parts: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """The parameters and buffers of adapters, shared weights and copies, by name, each once.

    parts: modules with the paths of their parents. ValueError: two tensors have one name, in the
    base and beside it; peft trains copies of a part.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    prefix = base_prefix(model)
    for path, module in parts:
        check_not_copied_by_peft(model, path)
        start, module = plain_path(model, path).removesuffix(NAME), unwrapped(module)
        for name, tensor in module.state_dict(keep_vars=True).items():
            if path == SHARED_PATH:
                key = SHARED + name
            else:
                plain = plain_path(module, name)
                key = f"{start}{flat(plain) if isinstance(module, CompacterAdapter) else plain}".removeprefix(prefix)
            if key in tensors:
                raise ValueError(f"two tensors of {type(model).__name__} would have the name {key}")
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[key] = tensor
    return tensors


def name_in_file(model: nn.Module, key: str) -> str:
    """The name in a file of a tensor of this name."""
    in_base = not key.startswith(SHARED) and not is_head(model, key)
    return IN_FILE + (base_prefix(model) if in_base else "") + key


def names_of_file(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by their names here; ValueError if two have one name."""
    prefix = f"{getattr(model, 'base_model_prefix', None) or ' '}."
    named = {key.removeprefix(IN_FILE).removeprefix(prefix): tensor for key, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise ValueError("two of its tensors have one name, in the model's base and beside it")
    return named
