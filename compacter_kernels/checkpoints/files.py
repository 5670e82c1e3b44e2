"""The files of an adapter folder, `adapter_config.json` and a safetensors file: read with checks, written at once.

Nothing is ever unpickled. The config holds the tensor file's SHA-256, so that a pair of which one half was replaced, or
damaged, is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
DIGEST = "adapter_model_sha256"
INDEX = ".safetensors.index.json"  # how the name of an index of shards ends
JSON_LIMIT, INDEX_LIMIT = 1 << 20, 1 << 26
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_folder(
    source: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None, offline: bool = False
) -> Path:
    """The local folder of that path, or of that id on the hub, of which the two files alone are fetched.

    Raises:
        FileNotFoundError: there is none.
    """
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
        return Path(
            snapshot_download(
                str(source),
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=offline,
                allow_patterns=[CONFIG, TENSORS],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{missing}, and the hub gave none: {error}") from error


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The object in a JSON file of at most that many bytes.

    Raises:
        FileNotFoundError, ValueError: no such file; one that is too large, not UTF-8, not JSON or not one object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")

    def refuse(why: object) -> NoReturn:
        raise ValueError(f"{path} is not a config: {why}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("it has a key twice")
        return found

    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        refuse(f"it is larger than {limit} bytes")
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too deep
        refuse(error)
    if not isinstance(found, dict):
        refuse(f"an object is expected, got {type(found).__name__}")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory: their data is read when it is used.

    Raises:
        FileNotFoundError, ValueError: no such file; only a pickled one beside it; one that is truncated or malformed.
        ImportError: safetensors is not installed.
    """
    if not path.is_file():
        refuse_pickled(path.parent)
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    if is_shard(path.name):
        raise ValueError(f"{path} is one of several shards; give their folder, which must hold the *{INDEX} too")
    return _mapped(path)


def _mapped(path: Path) -> dict[str, Tensor]:
    safetensors = require_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, RuntimeError) as error:  # the latter: larger than what can be mapped
        raise ValueError(f"{path} is no sound safetensors file: {str(error).splitlines()[0]}") from error


def is_shard(name: str) -> bool:
    """Whether a file's name is that of one part of several: model-00001-of-00002.safetensors."""
    part = re.fullmatch(r".*-(\d+)-of-(\d+)\.safetensors", name)
    return part is not None and int(part[2]) > 1


def read_sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in several files, which its index lists, mapped into memory.

    Raises:
        FileNotFoundError, ValueError: no index, or one that is malformed or names files elsewhere; a shard that is not
            there, is malformed, or holds other tensors than the index says.
        ImportError: safetensors is not installed.
    """
    places = read_json(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map, which says where each tensor is")
    for shard in places.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: a shard must be a .safetensors file of this folder, got {shard!r}")
    shards = sorted(set(places.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing[:4])}, of {len(shards)} shards, and it is not there")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        found = _mapped(index.parent / shard)
        listed = {key for key, place in places.items() if place == shard}
        for what, keys in (("lacks", listed - found.keys()), ("has beside those of the index", found.keys() - listed)):
            if keys:
                raise ValueError(f"{index.parent / shard} {what} {len(keys)} tensors: {', '.join(sorted(keys)[:4])}")
        tensors |= found
    return tensors


def refuse_pickled(path: Path) -> None:
    """Raise ValueError for a pickled file, or a folder that has one, saying how to convert it."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    pickled = [file for file in files if file.suffix in PICKLED]
    if pickled:
        safe = pickled[0].with_suffix(".safetensors").name
        raise ValueError(
            f"{pickled[0]} is a pickle, which can run code when it is read, and is not read here. Where you trust it: "
            f"safetensors.torch.save_file(torch.load({pickled[0].name!r}, weights_only=True), {safe!r})"
        )


def check_digest(path: Path, expected: object) -> None:
    """Raise ValueError where a config names another SHA-256 than the tensor file has."""
    if expected is not None and expected != sha256(path):
        raise ValueError(
            f"{path} is not the file that the {CONFIG} beside it was saved with: a save was interrupted between the "
            f"two, or one of them was changed or damaged. Save again, or take {DIGEST} out of {CONFIG}"
        )


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_folder(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], *, digest: bool = True
) -> None:
    """Write tensor files, by name, and the config, complete and flushed, beside their places; then move them there.

    A new folder appears at once. In one that exists other files stay; a crash between two moves leaves files that
    `check_digest` tells, where the config has the digest of the first.

    Raises:
        OSError, ImportError: the folder is as it was.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder")
    home = folder if folder.is_dir() else folder.parent
    with _beside(home) as made:
        new = made / "adapter"
        new.mkdir()  # with the permissions of a usual folder
        for name, tensors in files.items():
            _save(tensors, new / name)
        content = {**config, DIGEST: sha256(new / next(iter(files)))} if digest else config
        (new / CONFIG).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        for name in (CONFIG, ""):
            _flush(new / name)
        if home is folder:
            for name in (*files, CONFIG):
                os.replace(new / name, folder / name)
        else:
            new.rename(folder)
    _flush(home)


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one tensor file, which appears at its place complete or not at all.

    Raises:
        OSError, ImportError: what was there is as it was.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file")
    with _beside(path.parent) as made:
        _save(tensors, made / path.name)
        os.replace(made / path.name, path)
    _flush(path.parent)


@contextmanager
def _beside(home: Path) -> Iterator[Path]:
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=home) as made:
        yield Path(made)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    safetensors = require_safetensors()
    apart = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    safetensors.torch.save_file(apart, path, metadata={"format": "pt"})
    _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_safetensors() -> Any:
    """The package safetensors.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("checkpoints need the package safetensors: pip install safetensors") from None
    return safetensors
