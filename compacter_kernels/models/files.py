"""The two files of an adapter folder: `adapter_config.json` and a safetensors file, read with checks, written at once.

Nothing is ever unpickled. The config holds the tensor file's SHA-256, so that a pair of which one half was replaced, or
damaged, is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
DIGEST = "adapter_model_sha256"
JSON_LIMIT = 1 << 20
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

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
        data = file.read(JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        refuse(f"it is larger than {JSON_LIMIT} bytes")
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
    safetensors = require_safetensors()
    if not path.is_file():
        refuse_pickled(path.parent)
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no sound safetensors file: {error}") from error


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
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str = TENSORS, digest: bool = True
) -> None:
    """Write both files, complete and flushed, beside their places and then move them there.

    A new folder appears at once. In one that exists other files stay; a crash between the two moves leaves a pair that
    `check_digest` tells.

    Raises:
        OSError, ImportError: the folder is as it was.
    """
    safetensors = require_safetensors()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder")
    apart = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    home = folder if folder.is_dir() else folder.parent
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=home) as made:
        new = Path(made, "adapter")
        new.mkdir()  # with the permissions of a usual folder
        safetensors.torch.save_file(apart, new / name, metadata={"format": "pt"})
        content = {**config, DIGEST: sha256(new / name)} if digest else config
        (new / CONFIG).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        for file in (name, CONFIG, ""):
            _flush(new / file)
        if home is folder:
            for file in (name, CONFIG):
                os.replace(new / file, folder / file)
        else:
            new.rename(folder)
    _flush(home)


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
