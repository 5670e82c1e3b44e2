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
from compacter_kernels.impl.module import BUILD, MISSING, MODULE


def _proc(file: str, field: str) -> str | None:
    """Return the value of the first line `field: value` of a file in /proc, or None."""
    try:
        lines = Path("/proc", file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for name, value in pairs if name.strip() == field), None)


def _output(*command: str) -> str | None:
    """Return what the command prints, or None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def memory_bytes(field: str = "MemAvailable") -> int | None:
    """Return a line of /proc/meminfo in bytes; None where there is no such file."""
    value = _proc("meminfo", field)
    return None if value is None else int(value.split()[0]) * 1024


def git_revision() -> str | None:
    """Return the commit of the source tree, "-dirty" where files differ; None outside of git."""
    root = Path(ck.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ("git", "-C", str(root))
    commit, changes = _output(*git, "rev-parse", "--short=12", "HEAD"), _output(*git, "status", "--porcelain")
    return None if commit is None or changes is None else commit + ("-dirty" if changes else "")


def native() -> dict[str, Any]:
    """Return the compiler and options of the native part, or why it is not built."""
    if MODULE is None:
        return {"built": False, "reason": MISSING}
    return {"built": True, "isa_in_use": MODULE.isa(), **BUILD}


def describe() -> dict[str, Any]:
    """Return the machine, the versions and the revision, as JSON takes them."""
    memory = memory_bytes("MemTotal")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
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


def _triton_version() -> str | None:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None


def gpu() -> dict[str, Any]:
    """Return the current CUDA device and the versions that decide its speed, as JSON takes them."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver.split()[0] if driver else None,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
    }
