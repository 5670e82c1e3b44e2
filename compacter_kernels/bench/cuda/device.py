"""The CUDA device: whether there is one, what it is, and what a large copy moves."""

from __future__ import annotations

import importlib
import statistics
import subprocess
from typing import Any

import torch

COPY_BYTES = 2**30  # of each of the two buffers: far beyond the L2
COPY_REPEATS = 20


def require() -> None:
    """Raise an error that says what to do where torch has no CUDA device."""
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        raise RuntimeError(f"--device cuda: torch {torch.__version__} is built without CUDA; install a build with it")
    raise RuntimeError(
        "--device cuda: torch finds no CUDA device; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu"
    )


def _triton_version() -> str | None:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def describe() -> dict[str, Any]:
    """The current device and the versions that decide its speed, as JSON takes them."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": found.name,
        "capability": f"sm_{found.major}{found.minor}",
        "sms": found.multi_processor_count,
        "l2_bytes": l2_bytes(),
        "memory_gib": round(found.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
    }


def l2_bytes() -> int:
    """The size of the L2 cache."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(found, "L2_cache_size", 0)) or 64 * 2**20


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy between two large buffers; the median."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 8)
    source, target = (torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    seconds = []
    for _ in range(COPY_REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        seconds.append(float(start.elapsed_time(stop)) / 1e3)
    return 2 * size / statistics.median(seconds)
