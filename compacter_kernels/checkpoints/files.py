"""Read and write the two files of an adapter folder: `adapter_config.json` and a safetensors file.

Nothing is ever unpickled. The config holds the SHA-256 of the tensor file, so that a reader notices
when one of the two was replaced or damaged, and says which base model the adapters are for.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from compacter_kernels.config import AdapterConfig, BottleneckConfig, CompacterConfig

Config = TypeVar("Config", bound=AdapterConfig)
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
DIGEST = "adapter_model_sha256"
INDEX = ".safetensors.index.json"  # the end of the name of an index of shards
SHARD = re.compile(r".*-\d+-of-(?!0*[01]\.)\d+\.safetensors")  # model-00001-of-00002.safetensors
JSON_LIMIT, INDEX_LIMIT = 1 << 20, 1 << 26  # bytes
PEFT_TYPES: dict[str, type[AdapterConfig]] = {"COMPACTER": CompacterConfig, "BOTTLENECK": BottleneckConfig}
VERSION = 2
FORMAT = {"peft_type": "COMPACTER", "format_version": VERSION}
MODEL = {"base_model_name_or_path": str, "model_type": str, "hidden_size": int, "num_hidden_layers": int}
# What peft writes beside the options of a method, and an option that `inject` does not have.
OF_PEFT = ("auto_mapping", "inference_mode", "peft_version", "revision", "task_type", "exclude_modules")
ALLOW = ", which convert does for you with allow_pickle=True or --allow-pickle"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_folder(source: str | Path, **options: Any) -> Path:
    """Return this folder, or what `snapshot_download` gives; FileNotFoundError if there is none."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file; give the folder with {CONFIG} and {TENSORS}")
    missing = f"{source} is no folder"
    if len(folder.parts) != 2 or folder.is_absolute() or folder.parts[0] in (".", ".."):
        raise FileNotFoundError(missing)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise FileNotFoundError(f"{missing}; for one on the hub: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, TENSORS], **options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{missing}, and the hub gave none: {error}") from error


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError if it is malformed or above `limit` bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    try:
        if len(data) > limit:
            raise ValueError(f"it is larger than {limit} bytes")
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
        if not isinstance(content, dict):
            raise ValueError(f"an object is expected, got {type(content).__name__}")
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply
        raise ValueError(f"{path} is not a config: {error}") from error
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("it has a key twice")
    return dict(pairs)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)  # NaN or Infinity, which JSON does not have


def about_model(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config file says of the base model, with None for a value of another type."""
    return {key: content[key] if isinstance(content.get(key), kind) else None for key, kind in MODEL.items()}


def of_model(model: nn.Module) -> dict[str, Any]:
    """Return what `about_model` returns, from the config of a model."""
    config = getattr(model, "config", None)
    return about_model({key: getattr(config, key.removeprefix("base_model"), None) or None for key in MODEL})


def read_config(
    content: Mapping[str, Any], path: Path, adapted: Callable[[], Sequence[str]], kind: type[Config]
) -> Config:
    """Return the options of a config file; ValueError for wrong ones, another method or version.

    adapted: gives the names of the modules that have adapters. They become target_modules where
    peft was told in a way of its own, by a regular expression or by exclude_modules.
    """
    method, version = content.get("peft_type"), content.get("format_version")
    needed = next(name for name, its in PEFT_TYPES.items() if its is kind)
    if method != needed:
        raise ValueError(
            f"{path} has peft_type {method!r}, not {needed!r}; compacter-kernels convert reads other formats"
        )
    if version not in (1, VERSION) or isinstance(version, bool):
        raise ValueError(f"{path} has format_version {version!r}; this compacter_kernels reads 1 and {VERSION}")
    options = {key: value for key, value in content.items() if key not in {*FORMAT, *MODEL, *OF_PEFT, DIGEST}}
    if content.get("exclude_modules") or isinstance(options.get("target_modules"), str):
        options["target_modules"] = list(adapted())
    try:
        return kind.from_dict(options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of all shards that an index lists.

    They are mapped into memory: data is read when it is used. Raises FileNotFoundError, or
    ValueError for a file that is malformed, pickled, or one of several shards.
    """
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if not path.is_file():
        refuse_pickled(path.parent)
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    if SHARD.fullmatch(path.name):
        raise ValueError(f"{path} is one of several shards; give their folder, which must hold the *{INDEX} too")
    return _map_tensors(path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    shard_of = read_json(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} has no weight_map, which says where each tensor is")
    for shard in shard_of.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: a shard must be a .safetensors file of this folder, got {repr(shard)[:100]}")
    paths = [index.with_name(shard) for shard in sorted(set(shard_of.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing[:4])}, of {len(paths)} shards, and it is not there")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        held = _map_tensors(path)
        listed = {key for key in shard_of if shard_of[key] == path.name}
        for verb, keys in (("lacks", listed - held.keys()), ("has beside those of the index", held.keys() - listed)):
            if keys:
                raise ValueError(f"{path} {verb} {len(keys)} tensors: {', '.join(sorted(keys)[:4])}")
        tensors |= held
    return tensors


def _map_tensors(path: Path) -> dict[str, Tensor]:
    safetensors = require_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, RuntimeError) as error:  # RuntimeError: too large to map
        raise ValueError(f"{path} is no sound safetensors file: {str(error).splitlines()[0]}") from error


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, which torch reads without running any code of it.

    ValueError: it holds anything else, or is damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # By what is damaged, torch raises nearly any.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} holds more than tensors, or is damaged: {reason}") from error
    items = content.items() if isinstance(content, dict) else [(None, content)]
    if any(not isinstance(key, str) or not isinstance(value, Tensor) for key, value in items):
        raise ValueError(f"{path} is no state dict, which maps names to tensors")
    return dict(content)


def refuse_pickled(path: Path) -> None:
    """Raise ValueError for a pickled file, or a folder that has one, and say how to convert it."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    pickled = next((file for file in files if file.suffix in PICKLED), None)
    if pickled is not None:
        safe = pickled.with_suffix(".safetensors").name
        raise ValueError(
            f"{pickled} is a pickle, which can run code when it is read, and is not read here. Where you trust it: "
            f"safetensors.torch.save_file(torch.load({pickled.name!r}, weights_only=True), {safe!r})"
            f"{ALLOW if pickled.name == 'pytorch_adapter.bin' else ''}"
        )


def check_digest(path: Path, expected: object) -> None:
    """Raise ValueError if the SHA-256 that a config has, if it has one, is not that of the file."""
    if expected is not None and expected != _sha256(path):
        raise ValueError(
            f"{path} is not the file that the {CONFIG} beside it was saved with: a save was interrupted between the "
            f"two, or one of them was changed or damaged. Save again, or take {DIGEST} out of {CONFIG}"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_folder(folder: Path, files: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any] | None) -> None:
    """Write tensor files, given by name, and the config if there is one.

    All files are written and flushed beside the folder, and then moved: until then, an error leaves
    the folder unchanged. A new folder appears at once. A folder that exists keeps its other files.
    After a crash between two moves, `check_digest` refuses the files by the digest in our config.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder")
    parent = folder if folder.is_dir() else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=parent) as temporary:
        new = Path(temporary, "adapter")
        new.mkdir()  # has the permissions of a usual folder, which the temporary one has not
        for name, tensors in files.items():
            copies = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
            with _writing(folder / name):
                require_safetensors().torch.save_file(copies, new / name, metadata={"format": "pt"})
                (new / name).chmod(new.stat().st_mode & 0o666)  # safetensors gives the owner alone access
                _flush(new / name)
        if config is not None:
            content = {**config, DIGEST: _sha256(new / TENSORS)} if TENSORS in files else config
            with _writing(folder / CONFIG):
                (new / CONFIG).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
                _flush(new / CONFIG)
        _flush(new)
        if parent is folder:
            for name in (*files, CONFIG) if config is not None else files:
                os.replace(new / name, folder / name)
        else:
            new.rename(folder)
    _flush(parent)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """An error within it, such as of a full disk, becomes an OSError that names the file."""
    try:
        yield
    except (OSError, require_safetensors().SafetensorError) as error:
        raise OSError(getattr(error, "errno", None) or errno.EIO, f"{path} cannot be written: {error}") from error


def _flush(path: Path) -> None:
    """Bring a file or the names in a folder to disk. Windows flushes only what is written."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():  # Windows opens no folder.
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_safetensors() -> Any:
    """Return the package safetensors, or raise ImportError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("checkpoints need the package safetensors: pip install safetensors") from None
    return safetensors
