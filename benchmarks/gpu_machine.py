"""Prints the machine of a run of gpu_run.sh as JSON."""

from __future__ import annotations

import json
import os
import subprocess

import torch

import compacter_kernels as ck
from compacter_kernels import machine


def nvcc() -> str | None:
    """The release of nvcc on the path."""
    try:
        lines = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return next((line.strip() for line in lines if "release" in line), None)


def main() -> None:
    """Print one JSON object."""
    found = machine.describe()
    found["revision"] = found["revision"] or os.environ.get("REVISION")
    found |= {"nvcc": nvcc(), "impls": ck.available_impls()}
    found["device"] = machine.gpu() if torch.cuda.is_available() else None
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
