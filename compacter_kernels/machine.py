"""What a measurement was taken on: processor, memory, threads, versions, revision."""

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
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes(field: str = "MemAvailable") -> int | None:
    """That line of /proc/meminfo in bytes; None where there is no such file."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def git_revision() -> str | None:
    """The commit of the source tree that the package runs from, "-dirty" where it was changed; None outside of git."""
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
    """The native part: `built`, then its compiler and what else it says of itself; or why it is not there."""
    try:
        module = importlib.import_module("compacter_kernels._C")
    except ImportError:
        return {"built": False, "reason": ck.available_impls()["cpu"]}
    return {"built": True, "isa_in_use": module.isa(), **module.build_info()}


def describe() -> dict[str, Any]:
    """Machine, versions and revision, as JSON takes them."""
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
