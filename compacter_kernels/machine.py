"""Describe the machine of a measurement: processor, memory, GPU, threads, versions, revision."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import compacter_kernels as ck


def cpu_model() -> str:
    """Return the name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes(field: str = "MemAvailable") -> int | None:
    """Return a line of /proc/meminfo in bytes; None where there is no such file."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def git_revision() -> str | None:
    """Return the commit of the source tree, "-dirty" where files differ; None outside of git."""
    root = Path(ck.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def native() -> dict[str, Any]:
    """Return the compiler and options of the native part, or why it is not built."""
    try:
        module = importlib.import_module("compacter_kernels._C")
    except ImportError:
        return {"built": False, "reason": ck.available_impls()["cpu"]}
    return {"built": True, "isa_in_use": module.isa(), **module.build_info()}


def describe() -> dict[str, Any]:
    """Return the machine, the versions and the revision, as JSON takes them."""
    memory = memory_bytes("MemTotal")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "compacter_kernels": ck.__version__,
        "revision": git_revision(),
        "native": native(),
    }


def l2_bytes() -> int:
    """Return the L2 cache of the current CUDA device; 64 MiB where torch does not know it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "L2_cache_size", 0)) or 64 * 2**20


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


def gpu() -> dict[str, Any]:
    """Return the current CUDA device and the versions that decide its speed, as JSON takes them."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "sms": properties.multi_processor_count,
        "l2_bytes": l2_bytes(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
    }
