"""The source of a conversion: a file, a folder, a mapping of tensors or a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compacter_kernels.checkpoints import files
from compacter_kernels.checkpoints.checkpoint import SHARED
from compacter_kernels.targets.wrappers import check_gathered, plain_path, unwrapped

Rule = Tensor | tuple[Tensor, Tensor] | Mapping[str, Tensor] | str | Path
# Of the `adapters` library:
HEAD_CONFIG, FUSION_CONFIG = "head_config.json", "adapter_fusion_config.json"
ADAPTERS_PICKLED = ("pytorch_adapter.bin", "pytorch_model_head.bin")
ADAPTERS_TENSORS, ADAPTERS_HEAD = "adapter.safetensors", "model_head.safetensors"


@dataclass
class Source:
    """What a source holds, and what the caller of `convert` says of it.

    tensors: by the names of their format. config: the content of the JSON file beside them. head,
    head_config: the same of a separate file for the head. given: the shared weights of `phm_rule`.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    head_config: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None
    name: str | None = None
    model_type: str | None = None
    non_linearity: str | None = None
    given: dict[str, Tensor] = field(default_factory=dict)

    def is_whole_model(self) -> bool:
        """Whether this is the folder of a whole model, which transformers wrote."""
        return isinstance(self.config.get("model_type"), str) and "transformers_version" in self.config

    def choose(self, names: Sequence[str], kind: str = "name", default: str | None = None) -> str:
        """Return the name that the caller asks for, else the default, else the only name."""
        name = default if self.name is None else self.name
        if name is None and len(names) > 1:
            raise ValueError(f"there are adapters of {len(names)} {kind}s; give name=, one of {', '.join(names)}")
        if name is not None and name not in names:
            raise ValueError(f"there are no adapters of the {kind} {name!r}; there are {', '.join(names)}")
        return names[0] if name is None else name


def open_source(source: Any, *, phm_rule: Rule | None = None, allow_pickle: bool = False, **told: Any) -> Source:
    """Read a source, with errors as `convert` has. told: `name` and other fields of `Source`."""
    told["given"] = {} if phm_rule is None else _shared_weights(phm_rule)
    if isinstance(source, nn.Module):
        check_gathered(source)
        model = unwrapped(source)
        tensors = {plain_path(model, key): t.detach() for key, t in model.state_dict().items()}
        return Source(tensors, model=model, **told)
    if isinstance(source, Mapping):
        wrong = [key for key, value in source.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        if wrong:
            raise TypeError(f"source must map names to tensors; {wrong[0]!r} is none (a state dict inside it?)")
        return Source({key: tensor.detach() for key, tensor in source.items()}, **told)
    if not isinstance(source, str | Path):
        raise TypeError(f"source must be a path, a mapping of tensors or a module, got {type(source).__name__}")
    path = Path(source)
    if path.is_file():
        files.refuse_pickled(path)
        return Source(files.read_tensors(path), **told)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there")
    folder = _snapshot(path)
    if allow_pickle and (folder / ADAPTERS_PICKLED[0]).is_file() and not (folder / ADAPTERS_TENSORS).is_file():
        paths = [folder / name for name in ADAPTERS_PICKLED]
        tensors, head = (files.read_pickled(path) if path.is_file() else {} for path in paths)
        return Source(tensors, files.read_json(folder / files.CONFIG), head, _head_config(folder), **told)
    return Source(*_read_folder(folder), **told)


def _snapshot(folder: Path) -> Path:
    """Return the snapshot in a folder of the hub's cache, of its main branch, or the folder."""
    if not (folder / "snapshots").is_dir():
        return folder
    revisions = sorted(path.name for path in (folder / "snapshots").iterdir())
    main = folder / "refs" / "main"
    revision = main.read_text(encoding="utf-8").strip() if main.is_file() else None
    if len(revisions) == 1:
        revision = revisions[0]
    if revision not in revisions:
        raise ValueError(f"{folder} has the snapshots {', '.join(revisions)}; give the folder of one of them")
    return folder / "snapshots" / revision


def _head_config(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / HEAD_CONFIG) if (folder / HEAD_CONFIG).is_file() else {}


def _shared_weights(rule: Rule) -> dict[str, Tensor]:
    if isinstance(rule, Tensor):
        return {"phm_rule": rule}
    if isinstance(rule, tuple):
        return dict(zip(("phm_rule_left", "phm_rule_right"), rule, strict=True))
    tensors = dict(rule) if isinstance(rule, Mapping) else files.read_tensors(Path(rule))
    shared = {name: tensor for key, tensor in tensors.items() if (name := key.rpartition(".")[2]) in SHARED}
    if not shared:
        raise ValueError(f"phm_rule: no tensor is named phm_rule; there are {', '.join(sorted(tensors)[:4])}")
    return shared


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, the config, the head and its config."""
    configs = (folder / name for name in (files.CONFIG, "config.json"))
    config = next((files.read_json(path) for path in configs if path.is_file()), {})
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.name != ADAPTERS_HEAD)
    of_adapters = [name for name in (files.TENSORS, ADAPTERS_TENSORS) if name in names]
    indices = sorted(path.name for path in folder.glob(f"*{files.INDEX}"))
    complete = [name for name in names if not files.SHARD.fullmatch(name)]
    checkpoints = of_adapters[:1] or [*indices, *complete]
    if not names and not indices:
        if (folder / FUSION_CONFIG).is_file():
            problem = "an AdapterFusion, which no other library has; give the folders of its adapters"
            raise ValueError(f"{folder} holds {problem}")
        files.refuse_pickled(folder)
        below = dict.fromkeys(sorted(path.parent.name for path in folder.glob("*/*.safetensors")))
        hint = f", but its folders {', '.join(below)} have; give one of them" if below else ""
        raise FileNotFoundError(f"{folder} has no .safetensors file{hint}")
    if not checkpoints:
        shards = f"shards of a checkpoint, such as {names[0]}"
        raise FileNotFoundError(f"{folder} has {shards}, and no *{files.INDEX} beside them")
    if not of_adapters and (len(checkpoints) > 1 or (complete and complete != names)):
        listed = ", ".join(checkpoints[:8])
        raise ValueError(f"{folder} holds {len(checkpoints)} checkpoints; give one of them: {listed}")
    tensors = files.read_tensors(folder / checkpoints[0])
    if of_adapters:
        files.check_digest(folder / checkpoints[0], config.get(files.DIGEST))
    head = files.read_tensors(folder / ADAPTERS_HEAD) if (folder / ADAPTERS_HEAD).is_file() else {}
    return tensors, config, head, _head_config(folder)
