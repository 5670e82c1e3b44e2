"""CMake builds the CUDA part for the GPUs of this machine, or for all (csrc/cuda/gpus.cmake)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = f"""
include({ROOT.as_posix()}/csrc/cuda/gpus.cmake)
find_gpus(gpus)
choose_archs(archs "${{gpus}}")
message("${{gpus}}: ${{archs}}")
"""
WITHOUT_GPU = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")

pytestmark = pytest.mark.skipif(
    None in map(shutil.which, ("cmake", "ninja", "c++")), reason="no cmake, no ninja or no C++ compiler"
)


def environment(folder: Path, answer: str) -> dict[str, str]:
    """An environment whose nvidia-smi prints this answer."""
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{answer}'\n")
    smi.chmod(0o755)
    return {**os.environ, "PATH": os.pathsep.join((str(folder), os.environ["PATH"]))}


@pytest.mark.parametrize(
    ("nvcc", "answer", "archs"),
    [
        ("13.0", "9.0", "90: 90"),
        ("13.0", "9.0\n9.0", "90;90: 90"),
        ("13.0", "8.6", "86: 80"),
        ("13.0", "12.1\n8.0", "121;80: 80-real;120"),
        ("13.0", "7.5", "75: 80"),
        ("12.4", "12.0", "120: 90"),
        pytest.param("13.0", "No devices were found", ": 80-real;90-real;100-real;120", marks=WITHOUT_GPU),
        pytest.param("12.4", "No devices were found", ": 80-real;90", marks=WITHOUT_GPU),
    ],
)
def test_the_gpus_of_this_machine_are_built_for(tmp_path: Path, nvcc: str, answer: str, archs: str) -> None:
    """CMake builds machine code for each GPU, and PTX for the last one.

    Without a GPU it builds for all architectures.
    """
    (tmp_path / "script.cmake").write_text(SCRIPT)
    command = ["cmake", f"-DCMAKE_CUDA_COMPILER_VERSION={nvcc}", "-P", tmp_path / "script.cmake"]
    done = subprocess.run(command, env=environment(tmp_path, answer), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, archs + "\n")


@WITHOUT_GPU
def test_without_a_gpu_there_is_no_cuda_part_and_the_build_says_so(tmp_path: Path) -> None:
    """With COMPACTER_CUDA=ON there is a CUDA part, which tests/test_cuda_compile.py compiles."""
    command = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(command, env=environment(tmp_path, "No devices were found"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "build.ninja").read_text()
    assert "no NVIDIA GPU was seen when it was built, COMPACTER_KERNELS_CUDA=1 builds it for all" in commands
    assert "backward.cu" not in commands
