"""Read a checkpoint that is split into several safetensors files, which an index lists."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from compacter_kernels.checkpoints.files import map_tensors, read_json

INDEX_LIMIT = 1 << 26  # bytes


def read_sharded(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all shards, mapped into memory.

    Raises:
        FileNotFoundError: The index or a shard is not there.
        ValueError: The index is malformed or names files elsewhere; a shard is malformed, or holds
            other tensors than the index says.
        ImportError: safetensors is not installed.
    """
    shard_of = read_json(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} has no weight_map, which says where each tensor is")
    for shard in shard_of.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: a shard must be a .safetensors file of this folder, got {shard!r}")
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing[:4])}, of {len(shards)} shards, and it is not there")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        path = index.parent / shard
        held = map_tensors(path)
        listed = {key for key in shard_of if shard_of[key] == shard}
        for verb, keys in (("lacks", listed - held.keys()), ("has beside those of the index", held.keys() - listed)):
            if keys:
                raise ValueError(f"{path} {verb} {len(keys)} tensors: {', '.join(sorted(keys)[:4])}")
        tensors |= held
    return tensors
