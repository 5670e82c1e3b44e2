"""The module that executes the CUDA sources on the CPU, in one of the builds that find different faults.

    python tests/cuda_on_cpu/build.py build/cuda_on_cpu build/cuda_on_cpu/race race

takes all but the CUDA objects from the folder of an earlier build by CMake (COMPACTER_CUDA_ON_CPU), and writes the new
module to the second folder. What a test run with it needs is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    "sanitized": ["-O1", "-g1", *SANITIZE],
    "race": ["-O1", "-g1", "-fsanitize=thread"],  # without its runtime, see race_check.h
}
LINK = {"sanitized": SANITIZE}


def units(sources: Path = SOURCES) -> Iterator[tuple[Path, list[str]]]:
    """Each source with its definitions, once for each dtype where CMake compiles it so."""
    for source in sorted((sources / "cuda").glob("*.cu")):
        if "COMPACTER_ELEMENT" in source.read_text():
            yield from ((source, [f"-DCOMPACTER_ELEMENT={element}"]) for element in ELEMENTS)
        else:
            yield source, []


def compile_units(sources: Path, folder: Path, kind: str, only: Iterable[str] | None = None) -> None:
    """All objects of the CUDA part, or those of the sources of these names, into `folder`."""

    def compile_unit(unit: tuple[Path, list[str]]) -> None:
        source, definitions = unit
        target = folder / f"{source.stem}{''.join(definitions).replace('-DCOMPACTER_ELEMENT=', '.')}.o"
        command = ["g++", *LANGUAGE, *COMPILE[kind], *definitions, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)

    folder.mkdir(parents=True, exist_ok=True)
    wanted = [unit for unit in units(sources) if only is None or unit[0].name in only]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_unit, wanted))


def link(base: Path, folder: Path, kind: str) -> Path:
    """The module of the objects in `folder` and, for all else, those that CMake has left in `base`."""
    (module,) = base.glob("_C.*.so")
    others = [
        *base.glob("CMakeFiles/_C.dir/**/*.o"),
        *base.glob("CMakeFiles/host.dir/**/*.o"),
        *base.glob("CMakeFiles/kernels_*.dir/**/*.o"),
    ]
    command = ["g++", "-shared", "-fopenmp", *LINK.get(kind, []), *map(str, [*others, *folder.glob("*.o")]), "-ldl"]
    subprocess.run([*command, "-o", str(folder / module.name)], check=True)
    return folder / module.name


def environment(kind: str) -> dict[str, str]:
    """What a process that loads such a module needs of its environment."""
    if kind != "sanitized":
        return {}
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    return {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="where CMake has built")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("kind", choices=COMPILE)
    parser.add_argument("--sources", type=Path, default=SOURCES, help="instead of csrc")
    arguments = parser.parse_args()
    compile_units(arguments.sources, arguments.folder, arguments.kind)
    link(arguments.base, arguments.folder, arguments.kind)
    settings = " ".join(f"{name}='{value}'" for name, value in environment(arguments.kind).items())
    print(f"{settings} CUDA_ON_CPU={arguments.folder}".strip())


if __name__ == "__main__":
    main()
