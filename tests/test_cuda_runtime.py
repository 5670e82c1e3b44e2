"""What csrc/cuda/runtime.h asks of the CUDA runtime. A stand-in answers (cuda_runtime/)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "cuda_runtime"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_attributes_of_a_kernel_are_set_once_for_each_device(tmp_path: Path) -> None:
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{HERE}", str(HERE / "selftest.cpp")]
    subprocess.run([*command, "-o", str(tmp_path / "selftest")], check=True)
    done = subprocess.run([tmp_path / "selftest"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
