"""What is converted: a file, a folder, a mapping of tensors or a model; and which format it is in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compacter_kernels.checkpoints.files import (
    CONFIG,
    DIGEST,
    INDEX,
    TENSORS,
    check_digest,
    is_shard,
    read_json,
    read_sharded,
    read_tensors,
    refuse_pickled,
)
from compacter_kernels.checkpoints.format import PEFT_TYPE
from compacter_kernels.targets.added import adapters_of
from compacter_kernels.targets.wrappers import check_gathered, plain_path, unwrapped

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
        return Source(read_sharded(path) if path.name.endswith(INDEX) else read_tensors(path))
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there")
    return _folder(path)


def _folder(folder: Path) -> Source:
    config = next((read_json(folder / name) for name in (CONFIG, "config.json") if (folder / name).is_file()), {})
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.name != ADAPTERS_HEAD)
    preferred = [name for name in (TENSORS, ADAPTERS_TENSORS) if name in names]
    indices = sorted(path.name for path in folder.glob(f"*{INDEX}"))
    whole = [name for name in names if not is_shard(name)]
    if preferred:
        tensors = read_tensors(folder / preferred[0])
        check_digest(folder / preferred[0], config.get(DIGEST))
    elif len(indices) == 1 and not whole:
        tensors = read_sharded(folder / indices[0])
    elif len(names) == 1 and not indices:
        tensors = read_tensors(folder / names[0])
    elif not names and not indices:
        refuse_pickled(folder)
        below = sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
        where = f", but its folders {', '.join(dict.fromkeys(below))} have; give one of them" if below else ""
        raise FileNotFoundError(f"{folder} has no .safetensors file{where}")
    elif not whole and not indices:
        raise FileNotFoundError(f"{folder} has shards of a checkpoint, such as {names[0]}, and no *{INDEX} beside them")
    else:
        found = [*indices, *whole]
        raise ValueError(f"{folder} holds {len(found)} checkpoints; give one of them: {', '.join(found[:8])}")
    head = read_tensors(folder / ADAPTERS_HEAD) if (folder / ADAPTERS_HEAD).is_file() else {}
    return Source(tensors, config, head)


def format_of(source: Source) -> str:
    """The format of a source, by its model or else by the names of its tensors.

    Raises:
        ValueError: of none, or of several.
    """
    if adapters_of(source.model) is not None:
        return "compacter-kernels"
    if getattr(source.model, "adapters_config", None) is not None:
        return "adapters"
    names, config = list(source.tensors), source.config
    method = config.get("peft_type", PEFT_TYPE)
    if method != PEFT_TYPE:
        raise ValueError(f"it holds adapters of another method than Compacter, peft_type {method!r}")
    found = [kind for kind, sign in SIGNS.items() if any(re.fullmatch(sign, name) for name in names)]
    found = [kind for kind in found if kind not in LAYERS] or found[:1]  # adapters hold layers
    if not found and is_whole_model(source):
        raise ValueError(f"it holds a whole model of the type {config['model_type']!r}, and no Compacter adapters")
    if len(found) != 1:
        what = f"fit {' and '.join(found)}" if found else f"fit no format: {', '.join(sorted(names)[:4]) or 'none'}"
        raise ValueError(f"the names of the tensors {what}; give source_format=, one of {', '.join(SIGNS)}")
    return found[0]


def is_whole_model(source: Source) -> bool:
    """Whether this is a folder that `save_pretrained` of transformers wrote: its config.json is that of a model."""
    return isinstance(source.config.get("model_type"), str) and "transformers_version" in source.config


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
