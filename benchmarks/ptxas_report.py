"""Compiles every CUDA kernel for every architecture, without a GPU, and prints a report.

    python benchmarks/ptxas_report.py [BUILD] [--arch sm_90] [--json] [--jobs 2] [--only forward]

The sources of csrc/cuda are compiled as CMake compiles them for the package, in the folder BUILD
(by default build/ptxas). The report is read from the output of ptxas and from the PTX. It has the
registers and the limit that the launch bounds set, the stack, the spills, the matrix instructions,
and the accesses to global memory that are 128 bits wide.

Exits with 1 if a kernel spills, has a stack, takes more registers than its launch bounds allow,
lacks matrix instructions or wide accesses, or asks the caches to evict what it stores. The sources
in SUMS need neither matrix instructions nor wide accesses: they add up floats, or order rows.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
REGISTERS = 65536  # a multiprocessor of each of these architectures has as many
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
USED = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
ENTRY = re.compile(r"\.entry\s+(\w+)\(.*?(?=\.entry|\Z)", re.DOTALL)
INSTRUCTIONS = {
    "mma": re.compile(r"\bmma\.sync"),
    "wide_loads": re.compile(r"\bld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64)|\bcp\.async\.cg\S*[^;]*\b16\b"),
    "wide_stores": re.compile(r"\bst\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64)"),
    "evicted_stores": re.compile(r"\bst\.global\S*\.(?:cs|wt|evict_first|no_allocate)\b"),
}
SUMS = ("reduce.cu", "family_reduce.cu", "family_images.cu", "family_table.cu")  # sources without matrix products
WRITES_SUMS = (*SUMS, "family_weights.cu")  # sources whose kernels write no rows of x's dtype
LEFT_OUT = {("backward_routed.cu", "sm_80"), ("backward_routed.cu", "sm_120")}  # empty kernels


class Unit(NamedTuple):
    """One compilation: a source and its definitions."""

    source: str
    element: str
    command: list[str]
    folder: str


def units(build: Path, archs: list[str]) -> list[Unit]:
    """The compilations of CMake for these architectures, which is configured in that folder."""
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
        *("-DCOMPACTER_CUDA=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", f"-DPython_EXECUTABLE={sys.executable}"),
        f"-DCOMPACTER_CUDA_ARCHS={';'.join(f'{arch[3:]}-real' for arch in archs)}",
    ]
    subprocess.run(configure, check=True, capture_output=True, text=True)
    found = []
    for entry in json.loads((build / "compile_commands.json").read_text(encoding="utf-8")):
        if entry["file"].endswith(".cu"):
            command = shlex.split(entry["command"])
            element = [word.partition("=")[2] for word in command if word.startswith("-DCOMPACTER_ELEMENT=")]
            found.append(Unit(Path(entry["file"]).name, *(element or [""]), command, entry["directory"]))
    return sorted(found, key=lambda unit: unit.source)  # backward, which takes the longest, first


def rows_of(unit: Unit) -> list[dict[str, Any]]:
    """A row for each kernel and architecture of one compilation."""
    with tempfile.TemporaryDirectory() as kept:
        command = list(unit.command)
        command[command.index("-o") + 1] = str(Path(kept) / "object.o")
        command += ["-Xptxas=-v", "--keep", "--keep-dir", kept]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=unit.folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        seconds = round(time.perf_counter() - start, 1)
        ptx = {name: text for path in Path(kept).glob("*.ptx") for name, text in entries(path).items()}
    head = {"source": unit.source, "element": unit.element, "seconds": seconds}
    return [
        {**head, **resources(match), **instructions(ptx[match["arch"], match["name"]])}
        for match in USED.finditer(done.stdout + done.stderr)
    ]


def entries(path: Path) -> dict[tuple[str, str], str]:
    """The PTX of each kernel in a file, by architecture and name."""
    text = path.read_text(encoding="utf-8")
    arch = re.findall(r"^\.target (sm_\d+)", text, re.MULTILINE)[0]
    return {(arch, match[1]): match[0] for match in ENTRY.finditer(text)}


def resources(match: re.Match[str]) -> dict[str, Any]:
    """The numbers that ptxas prints for a kernel."""
    spilled = int(match["stores"]) + int(match["loads"])
    numbers = {"registers": int(match["registers"]), "stack_bytes": int(match["stack"]), "spill_bytes": spilled}
    return {"kernel": match["name"], "arch": match["arch"], **numbers}


def instructions(ptx: str) -> dict[str, Any]:
    """The launch bounds of a kernel and the number of instructions of each kind, from its PTX."""
    threads = int(re.findall(r"\.maxntid (\d+)", ptx)[0]) if ".maxntid" in ptx else 0
    blocks = int(re.findall(r"\.minnctapersm (\d+)", ptx)[0]) if ".minnctapersm" in ptx else 1
    limit = min(255, REGISTERS // (threads * blocks) // 8 * 8) if threads else None
    counts = {kind: len(pattern.findall(ptx)) for kind, pattern in INSTRUCTIONS.items()}
    return {"threads": threads, "blocks": blocks, "register_limit": limit, **counts}


def faults(row: dict[str, Any]) -> list[str]:
    """The faults of a kernel."""
    sums = row["source"] in SUMS or (row["source"], row["arch"]) in LEFT_OUT
    return [
        text
        for wrong, text in (
            (row["spill_bytes"] > 0, f"{row['spill_bytes']} bytes spilled"),
            (row["stack_bytes"] > 0, f"{row['stack_bytes']} bytes of stack"),
            (row["register_limit"] is None, "no launch bounds"),
            (row["registers"] > (row["register_limit"] or 255), f"more than {row['register_limit']} registers"),
            (not sums and row["mma"] == 0, "no matrix instructions"),
            (not sums and row["wide_loads"] == 0, "no 128-bit loads"),
            (not sums and row["source"] not in WRITES_SUMS and row["wide_stores"] == 0, "no 128-bit stores"),
            (row["evicted_stores"] > 0, "stores that the caches evict before the next layer reads them"),
        )
        if wrong
    ]


def demangled(names: list[str]) -> dict[str, str]:
    """The names as they are in the source; {} if c++filt is not installed."""
    if not names or shutil.which("c++filt") is None:
        return {}
    done = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def report(build: Path, archs: list[str], jobs: int, only: str = "") -> list[dict[str, Any]]:
    """All rows, each with its faults."""
    chosen = [unit for unit in units(build, archs) if only in unit.source]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        rows = [row for several in pool.map(rows_of, chosen) for row in several]
    return [{**row, "faults": faults(row)} for row in rows]


def main() -> int:
    """Compile all kernels and print the table. Returns 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", nargs="?", type=Path, default=ROOT / "build" / "ptxas", help="where CMake configures")
    parser.add_argument("--arch", default=",".join(ARCHS), help="default all")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    parser.add_argument("--only", default="", help="sources with this in their name")
    args = parser.parse_args()
    archs = args.arch.split(",")
    if unknown := set(archs) - set(ARCHS):
        parser.error(f"--arch {min(unknown)} is not known; choose of {', '.join(ARCHS)}")
    start = time.perf_counter()
    rows = report(args.build, archs, args.jobs, args.only)
    if args.json:
        print(json.dumps(rows, indent=1))
        return 1 if any(row["faults"] for row in rows) else 0
    names = demangled([row["kernel"] for row in rows])
    for row in rows:
        name = names.get(row["kernel"], row["kernel"]).removeprefix("void ").replace("compacter::cuda::", "")
        print(
            f"{row['arch']:<7} {row['registers']:>4} of {row['register_limit']} reg {row['stack_bytes']:>4} stack "
            f"{row['spill_bytes']:>4} spilled {row['mma']:>4} mma {row['wide_loads']:>3} loads {row['wide_stores']:>3} "
            f"stores  {row['element']:<4} {name}",
            *row["faults"],
            sep="  ",
        )
    wrong = sum(bool(row["faults"]) for row in rows)
    print(f"{len(rows)} kernels, {wrong} with a fault, {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
