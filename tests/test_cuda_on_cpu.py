"""The execution of CUDA kernels on the CPU (cuda_on_cpu/): right results, and detected faults."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

HERE = Path(__file__).parent / "cuda_on_cpu"
FLAGS = [
    *("-x", "c++", "-std=c++17", "-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DCOMPACTER_CUDA_ON_CPU", "-include", str(HERE / "cuda_on_cpu.h")),
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILE = {
    "plain": ["-O2"],
    "ucontext": ["-O1", "-DCUDA_ON_CPU_UCONTEXT=1"],
    "sanitized": ["-O1", "-g1", *SANITIZE],
    "race": ["-O1", "-g1", "-fsanitize=thread"],
}
LINK = {"sanitized": SANITIZE}

REPORTED = {
    "different instructions": "__shfl_sync (faults.cpp:",
    "different mmas": "divergence: mma.m16n8k8 (faults.cpp:",
    "different barriers": "divergence: __syncthreads (faults.cpp:",
    "one lane has left": "the mask names lanes that have left the kernel",
    "not in its own mask": "the lane is not in its own mask",
    "lanes that are not there": "the mask names lanes that the block does not have",
    "half a warp at a barrier": "deadlock in block 0: threads 0..47 at __syncthreads (faults.cpp:",
    "barrier 16": "there is no such barrier",
    "half of a group": "deadlock in block 0: threads 0..31 at bar.sync (faults.cpp:",
    "masks that differ": "deadlock in block 0: threads 0..2 at __shfl_sync (faults.cpp:",
    "misaligned ldmatrix": "the shared address is no multiple of 16",
    "ldmatrix beyond": "ldmatrix.trans (faults.cpp:",
    "ldmatrix from global memory": "the address is outside shared memory",
    "misaligned copy": "the address is misaligned",
    "copy to global memory": "the address is outside shared memory",
    "copy from shared memory": "the address is in shared memory",
    "copy written over": "what was under way here has been written over",
    "write beyond": "has written beyond its 128 bytes of shared memory",
    "too many threads": "a block has 1025 threads",
    "no blocks": "there are 0 blocks",
    "too much shared memory": "a block has 232449 bytes of shared memory",
    "no wait": "a kernel that overlaps its predecessor has not waited for it",
}
CRASHES = {
    "write beyond": "use-after-poison",
    "crash: shared": "use-after-poison",
    "crash: last byte": "use-after-poison",
    "crash: global": "heap-buffer-overflow",
    "crash: copy": "heap-buffer-overflow",
    "crash: local": "index 8 out of bounds",
    "crash: misaligned": "misaligned address",
}
RACES = {
    "race: no barrier": "reads at",
    "race: __syncwarp is no barrier": "reads at",
    "race: a shuffle orders nothing": "reads at",
    "race: halves of a warp": "reads at",
    "race: read then written": "writes at",
    "race: copies are waited for by each thread alone": "at cp.async",
    "race: barriers of two groups": "reads at",
    "race: ldmatrix": "at ldmatrix (faults.cpp:",
    "race: blocks": "block 1, thread ",
    "race: launches": "(in the launch before)",
}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, Path]:
    """The programs are built once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "cuda_on_cpu"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            build_programs(folder)
    return {build: folder / build for build in COMPILE}


def build_programs(folder: Path) -> None:
    compilers = [
        subprocess.Popen(["g++", *FLAGS, *flags, "-c", str(HERE / source), "-o", str(folder / f"{build}.{source}.o")])
        for build, flags in COMPILE.items()
        for source in ("selftest.cpp", "faults.cpp")
    ]
    assert not any([compiler.wait() for compiler in compilers])
    for build in COMPILE:
        objects = map(str, folder.glob(f"{build}.*.o"))
        subprocess.run(["g++", *LINK.get(build, []), *objects, "-ldl", "-o", str(folder / build)], check=True)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A kernel that stops at a fault does not free its memory.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("build", COMPILE)
def test_results(programs: dict[str, Path], build: str) -> None:
    done = run(programs[build])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("build", "name"),
    [(build, name) for build in COMPILE for name in REPORTED if (build, name) != ("sanitized", "write beyond")],
)
def test_fault_is_reported_under_every_order(programs: dict[str, Path], build: str, name: str) -> None:
    done = run(programs[build], name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(REPORTED[name]) >= 4, done.stdout
    assert "no fault" not in done.stdout


@pytest.mark.parametrize("name", CRASHES)
def test_sanitizer_stops_it(programs: dict[str, Path], name: str) -> None:
    done = run(programs["sanitized"], name)
    assert done.returncode != 0 and CRASHES[name] in done.stderr


@pytest.mark.parametrize("name", RACES)
def test_race_is_found_under_every_order(programs: dict[str, Path], name: str) -> None:
    done = run(programs["race"], name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("race: ") == 4 and RACES[name] in done.stdout and "faults.cpp:" in done.stdout


@pytest.mark.parametrize("build", COMPILE)
@pytest.mark.parametrize("name", ["none: barriers", "none: launches"])
def test_nothing_is_found_where_nothing_is_wrong(programs: dict[str, Path], build: str, name: str) -> None:
    assert run(programs[build], name).stdout == 4 * "no fault\n"
