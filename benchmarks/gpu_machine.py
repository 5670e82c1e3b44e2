"""Writes the machine of a run of gpu_run.sh as JSON: python benchmarks/gpu_machine.py OUT.json."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

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
    """Write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    found = machine.describe()
    found["revision"] = found["revision"] or os.environ.get("REVISION")
    found |= {"nvcc": nvcc(), "impls": ck.available_impls()}
    found["device"] = machine.gpu() if torch.cuda.is_available() else None
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(found["device"])


if __name__ == "__main__":
    main()
