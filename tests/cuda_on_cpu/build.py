"""Builds the module that executes the CUDA sources on the CPU, in one of several kinds.

    python tests/cuda_on_cpu/build.py build/cuda_on_cpu build/cuda_on_cpu/race race

Each kind of build finds other faults. The first folder is that of an earlier build by CMake
(COMPACTER_CUDA_ON_CPU), from which all objects but the CUDA ones are taken. The new module is
written to the second folder. The program prints the environment variables that a test run with it
needs.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"
ELEMENTS = ("f32", "bf16", "f16")

LANGUAGE = [
    *("-x", "c++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
    *("-ftrivial-auto-var-init=pattern", "-Wno-unknown-pragmas"),
    *("-DCOMPACTER_CUDA_ON_CPU", "-include", str(HERE / "cuda_on_cpu.h")),
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILE = {
    "plain": ["-O1"],
    "sanitized": ["-O0", "-g1", *SANITIZE],
    "race": ["-O1", "-g1", "-fsanitize=thread"],  # without the runtime of the sanitizer, see race_check.h
}
LINK = {"sanitized": SANITIZE}


class Unit(NamedTuple):
    """One source of csrc/cuda, and the dtype if CMake compiles it once for each dtype."""

    source: str
    element: str | None

    @property
    def object(self) -> str:
        return f"{self.source}.{self.element}.o" if self.element else f"{self.source}.o"


def units(sources: Path = SOURCES) -> list[Unit]:
    """The units of these sources of which the module is linked."""
    found = []
    for path in sorted((sources / "cuda").glob("*.cu")):
        elements = ELEMENTS if "COMPACTER_ELEMENT" in path.read_text() else (None,)
        found += [Unit(path.name, element) for element in elements]
    return found


def included(sources: Path, name: str) -> set[str]:
    """This file of csrc/cuda and all files that it includes, directly or indirectly."""
    names, open_names = set(), {name}
    while open_names:
        names |= open_names
        texts = [(sources / "cuda" / name).read_text() for name in open_names]
        open_names = {found for text in texts for found in re.findall(r'#include "(\w+\.h)"', text)} - names
    return names


def compile_units(sources: Path, wanted: Iterable[Unit], folder: Path, kind: str) -> None:
    """Compile the objects of these units into `folder`."""

    def compile_unit(unit: Unit) -> None:
        definitions = [f"-DCOMPACTER_ELEMENT={unit.element}"] if unit.element else []
        files = ["-c", str(sources / "cuda" / unit.source), "-o", str(folder / unit.object)]
        subprocess.run(["g++", *LANGUAGE, *COMPILE[kind], *definitions, *files], check=True)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_unit, wanted))


def link(objects: Iterable[Path], base: Path, folder: Path, kind: str) -> None:
    """Link the module from these objects and from the other objects that CMake left in `base`."""
    (module,) = base.glob("_C.*.so")
    others = [path for name in ("_C", "host", "kernels_*") for path in base.glob(f"CMakeFiles/{name}.dir/**/*.o")]
    command = ["g++", "-shared", "-fopenmp", *LINK.get(kind, []), *map(str, [*others, *objects]), "-ldl"]
    subprocess.run([*command, "-o", str(folder / module.name)], check=True)


def environment(folder: Path, kind: str) -> dict[str, str]:
    """The environment variables of a process that loads the module from `folder`."""
    if kind != "sanitized":
        return {"CUDA_ON_CPU": str(folder)}
    runtimes = [f"-print-file-name=lib{name}.so" for name in ("asan", "ubsan")]
    found = [subprocess.check_output(["g++", runtime], text=True).strip() for runtime in runtimes]
    return {"CUDA_ON_CPU": str(folder), "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="where CMake has built")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("kind", choices=COMPILE)
    arguments = parser.parse_args()
    folder, kind = arguments.folder, arguments.kind
    compile_units(SOURCES, units(), folder, kind)
    link([folder / unit.object for unit in units()], arguments.base, folder, kind)
    print(" ".join(f"{name}={shlex.quote(value)}" for name, value in environment(folder, kind).items()))


if __name__ == "__main__":
    main()
