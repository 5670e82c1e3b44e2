"""The folder of one adapter of an `AdapterBank`, which belongs to no model.

It has the two files of the folder of a model's adapters. The config holds the options of the
adapter, and the tensors have its flat names: `compacter_down_W_left`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compacter_kernels.checkpoints import files
from compacter_kernels.config import DTYPES
from compacter_kernels.nn.bank import AdapterBank
from compacter_kernels.nn.flat_names import BOTTLENECK, PREFIX, dotted, flat

KIND = "adapter_kind"
_PREFIXES = {"compacter": PREFIX, "bottleneck": BOTTLENECK}


def save_one(bank: AdapterBank, folder: str | Path, name: str) -> None:
    """Write the adapter of that name into a folder; KeyError, ValueError: it cannot be."""
    options, adapter = bank.options(), bank[name]
    unsaved = [option for option, value in options.items() if callable(value)]
    if unsaved:
        raise ValueError(f"{unsaved[0]} is a function, which no file can hold; give it by name")
    config = {KIND: bank.kind, "format_version": files.VERSION, **options}
    tensors = {flat(path, _PREFIXES[bank.kind]): value for path, value in adapter.state_dict().items()}
    files.write_folder(Path(folder), {files.TENSORS: tensors}, config)


def load_one(bank: AdapterBank, folder: str | Path, name: str) -> None:
    """Read an adapter that `save_one` wrote, as a new adapter of that name or in place of one.

    ValueError: the files are malformed, or of an adapter with other options or shapes.
    """
    path = files.find_folder(folder)
    content: dict[str, Any] = files.read_json(path / files.CONFIG)
    if KIND not in content:
        raise ValueError(f"{path / files.CONFIG} is not of an adapter of a bank, as it has no {KIND}")
    if content.get("format_version") != files.VERSION:
        raise ValueError(
            f"{path / files.CONFIG} has format_version {content.get('format_version')!r}, not {files.VERSION}"
        )
    for option, value in {KIND: bank.kind, **bank.options()}.items():
        if content.get(option) != value:
            raise ValueError(f"{option} is {value!r} in the bank, and {content.get(option)!r} in {path / files.CONFIG}")
    tensors = files.read_tensors(path / files.TENSORS)
    files.check_digest(path / files.TENSORS, content.get(files.DIGEST))
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{path / files.TENSORS}: {key} is {tensor.dtype}, not {' or '.join(DTYPES)}")
    state = {dotted(key, _PREFIXES[bank.kind]) or key: value for key, value in tensors.items()}
    if name in bank:
        bank.replace(name, state)
    else:
        bank.add(name, state)
