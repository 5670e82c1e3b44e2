"""The source of a conversion: a file, a folder, a mapping of tensors or a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compacter_kernels.checkpoints.convert.checkpoint import FACTORS, POSITIONS, RULES
from compacter_kernels.checkpoints.files import (
    CONFIG,
    DIGEST,
    INDEX,
    TENSORS,
    check_digest,
    is_shard,
    read_json,
    read_tensors,
    refuse_pickled,
)
from compacter_kernels.checkpoints.shards import read_sharded
from compacter_kernels.targets.wrappers import check_gathered, plain_path, unwrapped

ADAPTERS_TENSORS, ADAPTERS_HEAD = "adapter.safetensors", "model_head.safetensors"  # of the `adapters` library

Rule = Tensor | tuple[Tensor, Tensor] | Mapping[str, Tensor] | str | Path


@dataclass
class Source:
    """What a source holds, and what the caller says of it.

    tensors: by the names of their format. config: the content of the JSON file beside them. head:
    the tensors of a separate file for the head. model: the live model, if that is the source.
    name, model_type, non_linearity: as in `convert`. given: the shared weights of `phm_rule`.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    model: nn.Module | None = None
    name: str | None = None
    model_type: str | None = None
    non_linearity: str | None = None
    given: dict[str, Tensor] = field(default_factory=dict)

    def is_whole_model(self) -> bool:
        """Whether this is a folder that `save_pretrained` of transformers wrote for a whole model."""
        return isinstance(self.config.get("model_type"), str) and "transformers_version" in self.config

    def choose(self, names: Sequence[str], kind: str = "name", default: str | None = None) -> str:
        """Return the name that the caller asks for, else the default, else the only name.

        Raises:
            ValueError: The name asked for is not one of these; or there are several and no default.
        """
        name = default if self.name is None else self.name
        if name is None and len(names) > 1:
            raise ValueError(f"there are adapters of {len(names)} {kind}s; give name=, one of {', '.join(names)}")
        if name is not None and name not in names:
            raise ValueError(f"there are no adapters of the {kind} {name!r}; there are {', '.join(names)}")
        return names[0] if name is None else name


def open_source(
    source: Any,
    *,
    name: str | None = None,
    model_type: str | None = None,
    non_linearity: str | None = None,
    phm_rule: Rule | None = None,
) -> Source:
    """Read and check a source. Nothing of it is unpickled.

    Raises:
        TypeError: The source is of another type.
        ValueError: It is malformed or pickled, or phm_rule holds no shared weights.
        FileNotFoundError: It is not there.
    """
    given = {} if phm_rule is None else _shared_weights(phm_rule)
    told = {"name": name, "model_type": model_type, "non_linearity": non_linearity, "given": given}
    return replace(_open(source), **told)


def _shared_weights(given: Rule) -> dict[str, Tensor]:
    if isinstance(given, Tensor):
        return {"phm_rule": given}
    if isinstance(given, tuple):
        return dict(zip(("phm_rule_left", "phm_rule_right"), given, strict=True))
    tensors = dict(given) if isinstance(given, Mapping) else read_tensors(Path(given))
    names = {*RULES, *(name.replace("W", f"W_{position}") for name in FACTORS for position in POSITIONS)}
    shared = {name: tensor for key, tensor in tensors.items() if (name := key.rpartition(".")[2]) in names}
    if not shared:
        raise ValueError(f"phm_rule: no tensor is named phm_rule; there are {', '.join(sorted(tensors)[:4])}")
    return shared


def _open(source: Any) -> Source:
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
        return Source(_read(path))
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there")
    return _open_folder(path)


def _read(path: Path) -> dict[str, Tensor]:
    return read_sharded(path) if path.name.endswith(INDEX) else read_tensors(path)


def _open_folder(folder: Path) -> Source:
    config = next((read_json(folder / name) for name in (CONFIG, "config.json") if (folder / name).is_file()), {})
    files = sorted(path.name for path in folder.glob("*.safetensors") if path.name != ADAPTERS_HEAD)
    of_adapters = [name for name in (TENSORS, ADAPTERS_TENSORS) if name in files]
    indices = sorted(path.name for path in folder.glob(f"*{INDEX}"))
    complete = [name for name in files if not is_shard(name)]
    checkpoints = of_adapters[:1] or [*indices, *complete]
    if not files and not indices:
        refuse_pickled(folder)
        below = sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
        hint = f", but its folders {', '.join(dict.fromkeys(below))} have; give one of them" if below else ""
        raise FileNotFoundError(f"{folder} has no .safetensors file{hint}")
    if not checkpoints:
        raise FileNotFoundError(f"{folder} has shards of a checkpoint, such as {files[0]}, and no *{INDEX} beside them")
    if not of_adapters and (len(checkpoints) > 1 or (complete and complete != files)):
        raise ValueError(
            f"{folder} holds {len(checkpoints)} checkpoints; give one of them: {', '.join(checkpoints[:8])}"
        )
    tensors = _read(folder / checkpoints[0])
    if of_adapters:
        check_digest(folder / checkpoints[0], config.get(DIGEST))
    head = read_tensors(folder / ADAPTERS_HEAD) if (folder / ADAPTERS_HEAD).is_file() else {}
    return Source(tensors, config, head)
