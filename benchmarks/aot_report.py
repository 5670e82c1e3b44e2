"""Compiles every configuration in use for every architecture, without a GPU, and prints a report.

    python benchmarks/aot_report.py [--arch sm_90,gfx942] [--operations bank,mixed] [--json]

Each kernel is compiled ahead of time as the package would launch it (impl/triton/config.py). The
report has registers, spills, shared memory and matrix instructions. It also has the share of the
accesses to x, g, the residual, out and dx that are 128 bits wide. For NVIDIA an access belongs to
the pointer from which its address is computed, and for AMD to its line of source.

Exits with 1 if a kernel spills, needs more shared memory than the architecture has, multiplies
without matrix instructions, or has narrow accesses.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from accesses import lines_that_access, share_by_line, share_by_pointer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import compacter_kernels.impl.triton as package
from compacter_kernels.activations import resolve
from compacter_kernels.cases import Case, Shape
from compacter_kernels.impl.triton.kernel import KERNELS, REDUCE_WARPS, reduction
from compacter_kernels.impl.triton.launch import compile_options, fits
from compacter_kernels.impl.triton.mixing import MIXED_KERNELS
from compacter_kernels.impl.triton.plan import Options, Served, plan, served
from compacter_kernels.impl.triton.reduce import reduce_bank, reduce_rows
from compacter_kernels.impl.triton.routed import BANK_KERNELS, bank_reduction
from compacter_kernels.problem import Bank, Problem, Projection, adapter_problem, linear_problem

KIB = 1024
LIMITS = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "sm_120": 99 * KIB, "gfx942": 64 * KIB}
SHAPES = [
    Shape(*sizes_)
    for sizes_ in (
        (768, 24, 4), (768, 48, 8), (768, 48, 12), (1024, 64, 4), (1024, 64, 8), (1024, 128, 8), (3072, 96, 12),
        (4096, 64, 4), (4096, 128, 8),
    )
]  # fmt: skip
PROJECTIONS = [Shape(768, 3072, 4), Shape(1024, 4096, 8), Shape(4096, 128, 8)]  # for `phm_linear`: in, out, n
# for `kronecker_linear`, as LoKr of peft: in, out, n_in, and n_out
MAPS = {Shape(384, 384, 16): 16, Shape(768, 1024, 12): 8, Shape(1024, 768, 8): 12, Shape(768, 3072, 4): 8}
RANK = 8  # of their factors
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
WIDE = ("X", "G", "RESIDUAL", "OUT", "DX")  # the pointers of the wide side, in x's dtype
IDS = {"ROUTE": "*i64", "ORDER": "*i64", "TABLE": "*i32", "IN_TABLE": "*i32", "OUT_TABLE": "*i32"}
SCALARS = {"scale": "fp32", **dict.fromkeys(("T", "per", "wide_rows", "rows", "wide_parts", "parts"), "i32")}
ADAPTERS = 8  # of a bank
FUNCTIONS = {
    **dict.fromkeys(("adapter", "linear", "kronecker", "bottleneck"), KERNELS),
    **dict.fromkeys(("bank", "dense-bank"), BANK_KERNELS),
    **dict.fromkeys(("mixed", "dense-mixed"), MIXED_KERNELS),
}
_OF_ONE = ("T1", "B1", "A2", "S2", "G4", "G5", "G6", "G7")
_OF_DENSE = ("A1", "T1", "A2", "S2", "Z", "DV", "G3", "G4", "G6", "G7")
ABSENT = {  # None in a launch
    "adapter": (),
    "bank": (),
    "linear": ("RESIDUAL", *_OF_ONE),
    "kronecker": ("B2", "G2", *_OF_ONE),
    "bottleneck": _OF_DENSE,
    "dense-bank": _OF_DENSE,
    "mixed": (),
    "dense-mixed": _OF_DENSE,
}
DENSE, BANKS = ("bottleneck", "dense-bank", "dense-mixed"), ("bank", "dense-bank", "mixed", "dense-mixed")
BOTTLENECKS = [Shape(*widths, 1) for widths in ((768, 48), (768, 256), (1024, 64), (4096, 128))]
SIZES = {"linear": PROJECTIONS, "kronecker": list(MAPS), **dict.fromkeys(DENSE, BOTTLENECKS)}  # else SHAPES
SECOND_STAGE = "reduce_rows"  # every backward ends with it; its code is the same for all sizes
OPTIONS = Options(SAME=True, RESIDUAL=True, HAS_BIAS=True)
MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)")


class Job(NamedTuple):
    """One kernel of one operation, shape, dtype and architecture."""

    operation: str
    kernel: str
    shape: Shape
    dtype: str
    arch: str


def target(arch: str) -> GPUTarget:
    """The target that Triton compiles for."""
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def problem_of(job: Job) -> Problem:
    """The problem whose kernels the package compiles."""
    (k, d, n), dtype, cuda, fp32 = job.shape, DTYPES[job.dtype], torch.device("cuda"), torch.float32
    bank = Bank(ADAPTERS, "mixed" in job.operation, (False, False)) if job.operation in BANKS else None
    if job.operation in DENSE:
        sides = [Projection(0, 1, 1, None, *widths, (fp32, fp32)) for widths in ((k, d), (d, k))]
        return Problem("bottleneck", cuda, dtype, tuple(sides), resolve("swish"), bank)
    if job.operation == "kronecker":
        factors = Projection(1, n, MAPS[job.shape], RANK, k, d, (fp32, fp32, fp32, None))
        return Problem("linear", cuda, dtype, (factors,), None, base=True)
    operation = "linear" if job.operation == "linear" else "adapter"
    case = Case.of(job.shape, 1, operation=operation, dtype=dtype).inputs()
    if case.up is None:
        return linear_problem(case.x, case.down)
    return adapter_problem(case.x, case.down, case.up, case.activation)._replace(bank=bank)


def served_by(job: Job) -> dict[str, Served]:
    """The kernels that serve a shape, with their sizes, precision and configurations."""
    return served(problem_of(job), job.arch)


class Launched(NamedTuple):
    """A kernel with its compile-time arguments, as the package launches it."""

    kernel: Any
    constants: dict[str, Any]
    warps: int
    config: list[int]  # as the table shows it


def launches_of(job: Job, options: Options) -> list[Launched]:
    """The launch with each configuration, best first; [] if this shape does not use the kernel."""
    kernels = served_by(job)
    if job.kernel == SECOND_STAGE:
        s = kernels["backward" if "backward" in kernels else "tokens"].sizes
        banked = job.operation in BANKS
        constants, kernel = (bank_reduction(s), reduce_bank) if banked else (reduction(s), reduce_rows)
        return [Launched(kernel, constants, REDUCE_WARPS, [constants["BLOCK"], constants["BR"], REDUCE_WARPS])]
    if job.kernel not in kernels:
        return []
    s, rounding, configs = kernels[job.kernel]
    kernel = FUNCTIONS[job.operation][job.kernel]
    return [Launched(kernel, {"P": plan(s, c, rounding, options)}, c.warps, list(c)) for c in configs]


def pointers(launched: Launched, job: Job) -> list[str]:
    """The names of the arguments that the compiled kernel takes, in its order."""
    absent = set(ABSENT[job.operation])
    if (job.kernel == "tokens") is not (job.operation in DENSE) and job.kernel in ("tokens", "columns"):
        absent.add("DX")  # `tokens` writes it for dense projections, `columns` for the others
    return [name for name in launched.kernel.arg_names if name not in launched.constants and name not in absent]


def compiled(launched: Launched, job: Job) -> Any:
    """The kernel, compiled for aligned pointers and float32 parameters."""
    names = list(launched.kernel.arg_names)
    taken = pointers(launched, job)
    signature, attributes, constants = {}, {}, {}
    for i, name in enumerate(names):
        if name not in taken:
            signature[name], constants[(i,)] = "constexpr", launched.constants.get(name)
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        elif name in IDS:
            signature[name], attributes[(i,)] = IDS[name], [["tt.divisibility", 16]]
        else:
            signature[name] = POINTERS[DTYPES[job.dtype]] if name in WIDE else "*fp32"
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launched.kernel, signature, constants, attributes)
    return triton.compile(source, target=target(job.arch), options=compile_options(launched.warps))


def wide_access_share(found: Any, launched: Launched, job: Job) -> float | None:
    """The share of 128-bit accesses among those to the wide side; None if there are none."""
    if job.arch.startswith("sm_"):
        names = [None if name in SCALARS else name for name in pointers(launched, job)]
        return share_by_pointer(found.asm["ptx"], names, WIDE)
    if not touches_wide_side(job.operation, job.kernel):
        return None  # its source may use these names for other pointers
    return share_by_line(found.asm["amdgcn"], lines_that_access(Path(package.__file__).parent, WIDE))


def resources(found: Any, arch: str) -> tuple[int, int]:
    """The number of registers of a thread, and the bytes that it spills to memory.

    AMD may keep a spilled scalar register in a lane of a vector register. This takes no memory, and
    does not count.
    """
    if not arch.startswith("sm_"):
        text = found.asm["amdgcn"]
        registers, scratch = (
            int(re.findall(rf"\.{key}:\s*(\d+)", text)[0]) for key in ("vgpr_count", "private_segment_fixed_size")
        )
        return registers, scratch
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[0]
    return int(registers), int(stack)


def rows_of(job: Job) -> list[dict[str, Any]]:
    """The rows of a job; [] if the shape does not use the kernel.

    A row is about the first configuration that fits into the shared memory of the architecture.
    """
    both = {"linear": Options(HAS_BIAS=True), "kronecker": Options()}.get(job.operation, OPTIONS)
    used = served_by(job).get(job.kernel)
    apart = used is not None and (
        job.kernel == "expand"
        or (job.kernel == "columns" and not used.sizes.SQUARE)
        or (job.kernel == "sums" and len(used.sizes.sums) > 1)
    )  # a launch for each side
    options = [replace(both, OUT_SIDE=False), replace(both, IN_SIDE=False)] if apart else [both]
    launches = [launches_of(job, choice) for choice in options]
    return [row(job, several) for several in launches if several]


def row(job: Job, launches: list[Launched]) -> dict[str, Any]:
    """The row of one launch."""
    limit, found, error = LIMITS[job.arch], None, ""
    for launched in launches:
        try:
            found = compiled(launched, job)
        except Exception as problem:
            while problem.__cause__ is not None:
                problem = problem.__cause__
            error = f"{type(problem).__name__}: {str(problem)[-200:]}"
            continue
        if fits(found.metadata, limit):
            break
    k, d, n = job.shape
    head = {
        "operation": job.operation,
        "kernel": job.kernel,
        "k": k,
        "d": d,
        "n": n,
        "r": RANK if job.operation == "kronecker" else 1,
        "dtype": job.dtype,
        "arch": job.arch,
        "triton": triton.__version__,
    }
    if found is None:
        return {**head, "error": error}
    registers, spilled = resources(found, job.arch)
    assembly = found.asm["ptx"] if job.arch.startswith("sm_") else found.asm["amdgcn"]
    return {
        **head,
        "config": launched.config,
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": found.metadata.shared,
        "shared_limit": limit,
        "mma": len(MATRIX.findall(assembly)),
        "wide_access_share": wide_access_share(found, launched, job),
    }


def touches_wide_side(operation: str, kernel: str) -> bool:
    """Whether a kernel reads or writes rows that are as wide as x or as the output."""
    return kernel != SECOND_STAGE and not set(WIDE).isdisjoint(FUNCTIONS[operation][kernel].arg_names)


def faults(found: dict[str, Any]) -> list[str]:
    """The faults that a row shows."""
    if "error" in found:
        return [found["error"]]
    return [
        text
        for wrong, text in (
            (found["spill_bytes"] > 0, f"{found['spill_bytes']} bytes spilled"),
            (found["shared_bytes"] > found["shared_limit"], "too much shared memory"),
            (found["mma"] == 0 and found["kernel"] != SECOND_STAGE, "no matrix instructions"),
            (
                found["wide_access_share"] != (1.0 if touches_wide_side(found["operation"], found["kernel"]) else None),
                f"only {found['wide_access_share']} of the accesses are 128 bits wide",
            ),
        )
        if wrong
    ]


def line_of(found: dict[str, Any]) -> str:
    """A row of the table."""
    name = f"{found['arch']:<7} {found['operation']:<7} {found['kernel']:<16}"
    shape = f"{found['k']}/{found['d']}/{found['n']}"
    cells = "" if "error" in found else (
        f"{found['registers']:>4} reg {found['spill_bytes']:>5} spilled {found['shared_bytes']:>7} of "
        f"{found['shared_limit']:>6} shared {found['mma']:>4} mma, wide {found['wide_access_share']} {found['config']}"
    )  # fmt: skip
    return "  ".join([f"{name} {shape:<11} {found['dtype']} {cells}", *faults(found)])


def main() -> int:
    """Compile all kernels and print the table. Returns 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join(LIMITS), help=f"of {', '.join(LIMITS)}; default all")
    parser.add_argument("--shapes", default="", help="k/d/n,... of the table's, n = 1 if dense; default all")
    parser.add_argument("--operations", default=",".join(FUNCTIONS), help=f"of {', '.join(FUNCTIONS)}; default all")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    archs = args.arch.split(",")
    if unknown := [arch for arch in archs if arch not in LIMITS]:
        parser.error(f"--arch {unknown[0]} is not known; choose of {', '.join(LIMITS)}")
    operations = args.operations.split(",")
    if unknown := [operation for operation in operations if operation not in FUNCTIONS]:
        parser.error(f"--operations {unknown[0]} is not known; choose of {', '.join(FUNCTIONS)}")
    cases = [
        (operation, shape)
        for operation in operations
        for shape in SIZES.get(operation, SHAPES)
        if not args.shapes or str(shape) in args.shapes.split(",")
    ]
    jobs = [
        Job(operation, kernel, shape, dtype, arch)
        for arch in archs
        for operation, shape in cases
        for dtype in DTYPES
        for kernel in FUNCTIONS[operation]
    ]
    firsts = [next(case for case in cases if case[0] == operation) for operation in dict(cases)]
    jobs += [Job(operation, SECOND_STAGE, shape, "bf16", arch) for arch in archs for operation, shape in firsts]
    rows = []
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for several in pool.map(rows_of, jobs):
            rows += several
            for found in [] if args.json else several:
                print(line_of(found), flush=True)
    wrong = sum(bool(faults(found)) for found in rows)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{len(rows)} kernels, {wrong} with a fault, Triton {triton.__version__}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
