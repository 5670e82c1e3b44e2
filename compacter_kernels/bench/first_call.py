"""The first call: from the start of a new process to the end of its first forward and backward.

Each program runs in processes of its own, which take turns. What torch.compile and Triton keep on
disk is empty for each. The files of Python and of the packages are in the memory of the system, and
their modules have been compiled to bytecode, as after a first run. The clock is the one that all
processes of the system share. The time of the processor until the first call has ended is taken
too, because other load disturbs it little, and of it the time of Python's garbage collections.
Counters of objects decide when a collection comes. A full collection takes longer than our import.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compacter_kernels import machine
from compacter_kernels.bench import timer
from compacter_kernels.bench.cpu import environment
from compacter_kernels.bench.first_programs import OURS, PROGRAMS, source
from compacter_kernels.cases import Shape

SHAPE, TOKENS, STARTS = Shape(768, 24, 4), 256, 5
PHASES = ("python", "import", "construct", "first", "second")
PROCESSOR = ("cpu", "gc")  # until the end of the first call, and what of it was garbage collection
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
SECONDS = 600  # for one process


def once(text: str, threads: int, bytecode: str) -> list[float]:
    """Return the seconds of each phase in a new process, and those of the processor.

    bytecode: the folder for the compiled modules of Python, which later processes find there.

    Raises:
        RuntimeError: the process failed; with its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = environment("removed", threads) | {name: f"{folder}/{name}" for name in CACHES}
        settings |= {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
        command = [sys.executable, "-W", "ignore", "-c", text, repr(time.monotonic())]
        done = subprocess.run(
            command, env=settings, capture_output=True, text=True, cwd=folder, check=False, timeout=SECONDS
        )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line[:1].isalpha() and "Error" in line]
        raise RuntimeError((errors or done.stderr.splitlines() or ["it printed nothing"])[-1].strip())
    words = [float(word) for word in done.stdout.split()[-len(PHASES) - 1 - len(PROCESSOR) :]]
    marks, processor = words[: len(PHASES) + 1], words[len(PHASES) + 1 :]
    return [*(later - earlier for earlier, later in itertools.pairwise(marks)), *processor]


def _row(name: str, samples: list[list[float]]) -> dict[str, Any]:
    """Return the medians of the phases, and quantiles of the time to the end of the first call."""
    totals = [sum(sample[: PHASES.index("second")]) for sample in samples]
    low, median, high = timer.quantiles(totals)
    phases = {
        f"{phase}_ms": timer.quantiles(list(values))[1] * 1e3
        for phase, values in zip((*PHASES, *PROCESSOR), zip(*samples, strict=True), strict=True)
    }
    what = PROGRAMS[name].what
    total = {"total_ms": median * 1e3, "total_ms_q20": low * 1e3, "total_ms_q80": high * 1e3}
    return {"provider": name, "what": what, **total, **phases, "samples": len(samples)}


def measure(threads: int, starts: int = STARTS, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return the rows of these programs, or of all, and the absent ones with their reasons."""
    out: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    samples: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as bytecode:
        for name, program in PROGRAMS.items():
            if names is not None and name not in names:
                out.append(timer.absent(name, "left out by --impl"))
                continue
            try:
                versions |= {program.package: version(program.package)} if program.package else {}
                once(source(program, SHAPE, TOKENS), threads, bytecode)  # brings its files into memory
                samples[name] = []
            except PackageNotFoundError:
                reason = f"{program.package} is not installed: pip install {program.package}"
                out.append(timer.absent(name, reason))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                out.append(timer.absent(name, str(error), wrong=name == OURS))
        for turn in range(starts):
            for name in timer.rotated(list(samples), turn):
                print(f"\rfirst call {turn + 1} of {starts}: {name:<20}", end="", file=sys.stderr, flush=True)
                samples[name].append(once(source(PROGRAMS[name], SHAPE, TOKENS), threads, bytecode))
    print(file=sys.stderr)
    return {
        "shape": SHAPE._asdict(),
        "tokens": TOKENS,
        "threads": threads,
        "starts": starts,
        "versions": versions,
        "machine": machine.describe() | {"threads": threads},
        "rows": [_row(name, found) for name, found in samples.items()],
        "absent": out,
    }


def text(result: dict[str, Any]) -> str:
    """Return the rows in columns, below what was measured."""
    about, shape, rows = result["machine"], "/".join(map(str, result["shape"].values())), result["rows"]
    ours = next((row for row in rows if row["provider"] == OURS), None)
    lines = [
        f"First forward and backward of a new process, {shape} (k/d/n), {result['tokens']} tokens, float32",
        f"{about['cpu']}, {result['threads']} threads, torch {about['torch']}, compacter_kernels {about['revision']}; "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        f"ms, medians of {result['starts']} processes in turns; total: from the start of Python to the end of the",
        "first call; cpu: of the processor until then; gc: of cpu, garbage collections of Python; caches on disk of",
        "torch.compile are empty",
        "",
        f"{'':<21}{'total':>9}{'20-80 %':>18}{'/ours':>7}{'cpu':>9}{'/ours':>7}{'gc':>7}"
        + "".join(f"{phase:>11}" for phase in PHASES),
    ]
    for row in rows:
        spread = f"{row['total_ms_q20']:.0f} to {row['total_ms_q80']:.0f}"
        over = [f"{row[key] / ours[key]:.2f}" if ours else "-" for key in ("total_ms", "cpu_ms")]
        phases = "".join(f"{row[f'{phase}_ms']:>11.1f}" for phase in PHASES)
        lines.append(
            f"{row['provider']:<21}{row['total_ms']:>9.0f}{spread:>18}{over[0]:>7}{row['cpu_ms']:>9.0f}{over[1]:>7}"
            f"{row['gc_ms']:>7.0f}{phases}"
        )
    lines += [f"absent: {row['provider']}: {row['reason']}" for row in result["absent"]]
    lines += ["", *(f"{row['provider']:<21}{row['what']}" for row in rows)]
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write first_call.json and first_call.txt into the folder, and return their paths."""
    paths = [folder / f"first_call.{suffix}" for suffix in ("json", "txt")]
    paths[0].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(text(result), encoding="utf-8")
    return paths
