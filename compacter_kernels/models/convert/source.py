"""What is converted: a file, a folder, a mapping of tensors or a model; and which format it is in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compacter_kernels.models.files import (
    CONFIG,
    DIGEST,
    TENSORS,
    check_digest,
    read_json,
    read_tensors,
    refuse_pickled,
)
from compacter_kernels.models.wrappers import check_gathered, plain_path, unwrapped

SIGNS = {
    "compacter-kernels": r"(.*\.)?compacter\.(down|up|shared)\..*",
    "adapters": r".*\.adapters\.[^.]+\.adapter_(down|up)\..*",
    "original": r".*\.adapter_controller\.adapters\.[^.]+\.(down|up)_sampler\..*",
    "opendelta": r".*\.compactor\.(down|up)_sampler\..*",
    "t-few": r".*\.adapter\.(down|up)_sampler\..*",
    "hypernets": r"(.*\.)?[as]",
    "phm_linear": r"(.*\.)?(phm_rule(_left)?)",
}
LAYERS = ("hypernets", "phm_linear")
ADAPTERS_TENSORS, ADAPTERS_HEAD = "adapter.safetensors", "model_head.safetensors"


@dataclass
class Source:
    """Tensors by the names of their format, the config beside them, and the model where one was given."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    model: nn.Module | None = None


def open_source(source: Any) -> Source:
    """Read a source; a file or folder is checked, and nothing of it is unpickled.

    Raises:
        TypeError, ValueError, FileNotFoundError: of another type, malformed, pickled, not there.
    """
    if isinstance(source, nn.Module):
        check_gathered(source)
        model = unwrapped(source)
        tensors = {plain_path(model, key): tensor.detach() for key, tensor in model.state_dict().items()}
        return Source(tensors, model=model)
    if isinstance(source, Mapping):
        wrong = [key for key, value in source.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        if wrong:
            raise TypeError(f"source must map names to tensors; {wrong[0]!r} is none (a state dict inside it?)")
        return Source({key: tensor.detach() for key, tensor in source.items()})
    if not isinstance(source, str | Path):
        raise TypeError(f"source must be a path, a mapping of tensors or a module, got {type(source).__name__}")
    path = Path(source)
    if path.is_file():
        refuse_pickled(path)
        return Source(read_tensors(path))
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there")
    return _folder(path)


def _folder(folder: Path) -> Source:
    config = next((read_json(folder / name) for name in (CONFIG, "config.json") if (folder / name).is_file()), {})
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.name != ADAPTERS_HEAD)
    preferred = [name for name in (TENSORS, ADAPTERS_TENSORS) if name in names]
    if not names:
        refuse_pickled(folder)
        raise FileNotFoundError(f"{folder} has no .safetensors file")
    if not preferred and len(names) > 1:
        raise ValueError(f"{folder} has {len(names)} .safetensors files; give one of them: {', '.join(names[:8])}")
    name = (preferred or names)[0]
    tensors = read_tensors(folder / name)
    check_digest(folder / name, config.get(DIGEST))
    head = read_tensors(folder / ADAPTERS_HEAD) if (folder / ADAPTERS_HEAD).is_file() else {}
    return Source(tensors, config, head)


def recognise(names: Iterable[str]) -> str:
    """The format that these names of tensors belong to.

    Raises:
        ValueError: to none, or to several.
    """
    names = list(names)
    found = [kind for kind, sign in SIGNS.items() if any(re.fullmatch(sign, name) for name in names)]
    found = [kind for kind in found if kind not in LAYERS] or found[:1]  # adapters hold layers
    if len(found) != 1:
        what = f"fit {' and '.join(found)}" if found else f"fit no format: {', '.join(sorted(names)[:4]) or 'none'}"
        raise ValueError(f"the names of the tensors {what}; give source_format=, one of {', '.join(SIGNS)}")
    return found[0]


def non_linearity_in(model: nn.Module | None) -> str | None:
    """The activation's name that the adapters of a live model carry, of whichever library they are."""
    for module in model.modules() if model is not None else ():
        if any(hasattr(module, name) for name in ("down_sampler", "up_sampler")):
            config = getattr(module, "config", None)
            for owner, name in (
                (module, "non_linearity"),
                (config, "non_linearity"),
                (config, "adapter_non_linearity"),
            ):
                value = getattr(owner, name, None)
                if isinstance(value, str):
                    return value
    return None
