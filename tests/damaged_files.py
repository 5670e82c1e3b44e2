"""Good files, changed at random: in their bytes, their JSON and their headers of safetensors."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st

from compacter_kernels.checkpoints.files import CONFIG, DIGEST, TENSORS

Files = dict[str, bytes]
NUMBER = st.integers(0, (1 << 20) - 1)
EDITS = st.lists(st.tuples(NUMBER, NUMBER, NUMBER, NUMBER), min_size=1, max_size=3)
DTYPES = (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn)
ODD: list[Any] = [None, True, [], {}, [None], [-1], [2, 2], [0, 2**40], {"0": -1}, {"default": 2}]
ODD += [-1, 0, 1, 3, 7, 2**31, 2**63, 2**70, 1e308, 0.5]
ODD += ["", "x", "relu", "F64", "BF16", "I64", "a.b", "../x", "down.W_left", "\x00", "é" * 50]


def read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(files: Files, folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def damaged(files: Files, edits: list[tuple[int, int, int, int]]) -> Files:
    """The files after these edits. The digest of half of them fits again, or is left out."""
    changed = dict(files)
    for which, how, where, what in edits:
        name = sorted(changed)[which % len(changed)]
        data = changed[name]
        if name.endswith(".json") and how % 4:
            changed[name] = _in_json(data, where, what)
        elif name.endswith(".safetensors") and how % 4 == 1 and len(data) > 8:
            changed[name] = _in_header(data, where, what)
        elif name.endswith(".safetensors") and how % 4 > 1:
            changed[name] = _in_tensors(data, where, what)
        else:
            changed[name] = BYTES[how // 4 % len(BYTES)](data, where % (len(data) + 1), what)
    last = edits[-1][-1]
    if CONFIG in changed and TENSORS in changed and last % 4 < 2:
        try:
            content = json.loads(changed[CONFIG])
            content[DIGEST] = hashlib.sha256(changed[TENSORS]).hexdigest()
            if last % 4:
                del content[DIGEST]
            changed[CONFIG] = json.dumps(content).encode()
        except (ValueError, TypeError, RecursionError):  # It is no JSON, or no object, any more.
            pass
    return changed


BYTES: tuple[Callable[[bytes, int, int], bytes], ...] = (
    lambda data, at, what: data[:at] + bytes([what % 256]) + data[at + 1 :],
    lambda data, at, what: data[:at] + bytes([what % 256]) * (1 + what % 9) + data[at:],
    lambda data, at, what: data[:at] + data[at + 1 + what % 64 :],
    lambda data, at, what: data[:at],
    lambda data, at, what: data[:at] + struct.pack("<Q", (1 << what % 64) - what % 2) + data[at + 8 :],
    lambda data, at, what: data[:at] + data[what % (len(data) + 1) :],
)


def _in_json(data: bytes, where: int, what: int) -> bytes:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    return json.dumps(_changed(content, where, what)).encode()


def _in_header(data: bytes, where: int, what: int) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = _in_json(data[8 : 8 + size], where, what)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _in_tensors(data: bytes, where: int, what: int) -> bytes:
    """A sound file again, with a tensor less or more, or one of another name, shape or dtype."""
    try:
        tensors = safetensors.torch.load(data)
        key = sorted(tensors)[where % len(tensors)]
    except (safetensors.SafetensorError, ZeroDivisionError):
        return data
    other = sorted(tensors)[what // 8 % len(tensors)]
    tensor = tensors.pop(key)
    kept = {
        1: {str(ODD[what // 8 % len(ODD)]): tensor},
        2: {key.replace(key.split(".")[where // 8 % (key.count(".") + 1)], "x"): tensor},
        3: {key: tensor.flatten()},
        4: {key: tensor.to(DTYPES[what // 8 % len(DTYPES)])},
        5: {key: tensor[..., : what // 8 % 3].contiguous() if tensor.dim() else tensor},
        6: {key: tensor.transpose(0, -1).contiguous()} if tensor.dim() else {key: tensor},
        7: {key: tensor, other.rpartition(".")[0] + "." + key.rpartition(".")[2]: tensor.clone()},
    }
    return safetensors.torch.save({**tensors, **kept.get(what % 8, {})})


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Each container in it with each of its keys, or indices."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    own = [(content, key) for key, _ in inner]
    items = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return own + [place for item in items for place in _places(item)]


def _changed(content: Any, where: int, what: int) -> Any:
    places = _places(content)
    if not places:
        return ODD[what % len(ODD)]
    holder, key = places[where % len(places)]
    other, source = places[what % len(places)]
    kind = what // 64 % 5
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(ODD[what % len(ODD)])] = holder.pop(key)
    elif kind == 2:
        holder[key] = json.loads(json.dumps(other[source]))
    else:
        holder[key] = ODD[what % len(ODD)]
    return content
