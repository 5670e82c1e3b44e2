"""Installs the wheel beside chosen versions of Python, torch and Triton, and tests it there.

    python tools/matrix.py                                              # oldest torch, newest torch
    python tools/matrix.py --python 3.10 3.13 --torch 2.6.0 newest --triton none newest
    python tools/matrix.py --wheel dist/*.whl --out benchmarks/results/matrix

Each pair of a Python and a torch has a fresh virtual environment. pip installs the wheel and torch
in it with one command, and one process imports the package and calls an adapter for the first time.
The short suite of the tests (tests/short.txt) then runs outside of the checkout, so that it finds
the wheel and not the sources. This is repeated with each of the Tritons, in the same environment.
With a Triton, the suite runs the Triton kernels too, in Triton's interpreter. `newest` is the
newest version with a wheel for that Python. Times are seconds of a processor, which a busy machine
changes little.

Without --wheel, the wheel is built from the checkout for each Python. The variables of setup.py and
of pip apply. The exit code is 1 if a cell fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEST_TOOLS = ("numpy<2.4", "pytest>=8.2", "hypothesis")  # a later numpy refuses what Triton 3.6 interprets
# without the sizes that take the interpreter seconds, and two tests that its bf16 fails by chance
INTERPRETED = "triton and not (1000 or 1024 or 3072 or learned_scale or fp32_weights)"

FIRST_CALL = """
import json, torch, compacter_kernels as ck
adapter = ck.CompacterAdapter(hidden_size=768, reduction_factor=32, phm_dim=4)
x = torch.randn(8, 128, 768)
adapter(x)
impl = ck.explain(x, adapter.down.weights(), adapter.up.weights(), residual=x).impl
print(json.dumps({"torch": torch.__version__, "version": ck.__version__, "impl": impl, "file": ck.__file__}))
"""
IMPORTS = ("import torch", "import compacter_kernels")

COLUMNS = {
    "python": "Python",
    "torch": "torch",
    "triton": "Triton",
    "impl": "impl",
    "install_s": "pip install, s",
    "first_call_s": "first call, s",
    "import_ratio": "import / torch's",
    "tests": "tests",
}


class CommandError(Exception):
    """A command of a cell failed. The message has the end of its output."""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """The output of a command. CommandError: it returned another code than 0."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-30:])
        raise CommandError(f"{' '.join(map(str, command))} returned {done.returncode}:\n{end}")
    return done.stdout


def interpreter(version: str) -> str:
    """The path of that Python: on the path, of pyenv or of uv. SystemExit: there is none."""
    found = [shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    if uv := shutil.which("uv"):
        found.append(subprocess.run([uv, "python", "find", version], capture_output=True, text=True).stdout.strip())
    for path in filter(None, found):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        if subprocess.run([str(path), "-c", code], capture_output=True, text=True).stdout.strip() == version:
            return str(path)
    raise SystemExit(f"Python {version} is not on the path, nor one of pyenv or uv; install it or leave it out")


def build(python: str, folder: Path) -> Path:
    """The wheel of the checkout for that Python."""
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def choose(wheels: list[Path], version: str) -> Path:
    """The one of these wheels that fits that Python. SystemExit: none does, or more than one."""
    tags = (f"-cp{version.replace('.', '')}-", "-py3-none-any")
    fitting = [wheel.resolve() for wheel in wheels if any(tag in wheel.name for tag in tags)]
    if len(fitting) != 1:
        raise SystemExit(f"--wheel needs one wheel for Python {version}, got {[wheel.name for wheel in fitting]}")
    return fitting[0]


def timed(*command: str | Path, cwd: Path) -> tuple[str, float]:
    """The output of a command, and the processor's seconds that it took."""
    before = sum(os.times()[2:4])  # of the processes that have ended
    output = run(*command, cwd=cwd)
    return output, sum(os.times()[2:4]) - before


def requirement(package: str, version: str) -> str:
    """What pip installs for that version, or for `newest`."""
    return package if version == "newest" else f"{package}=={version}"


def install(python: str, wheel: Path, torch: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A fresh environment with the wheel and torch: its Python, and what the first call showed."""
    run(python, "-m", "venv", folder / "venv", cwd=folder)
    inside = folder / "venv" / "bin" / "python"
    _, install_s = timed(inside, "-m", "pip", "install", "--quiet", wheel, requirement("torch", torch), cwd=folder)
    output, first_call_s = timed(inside, "-W", "ignore", "-c", FIRST_CALL, cwd=folder)
    shown = json.loads(output.splitlines()[-1])
    if not Path(shown.pop("file")).is_relative_to(folder / "venv"):
        raise CommandError("compacter_kernels was not imported from the environment")
    of_torch, own = (min(timed(inside, "-c", code, cwd=folder)[1] for _ in range(3)) for code in IMPORTS)
    times = {"install_s": install_s, "first_call_s": first_call_s, "import_ratio": own / of_torch}
    return inside, shown | {name: round(value, 2) for name, value in times.items()}


def test(python: Path, triton: str, folder: Path) -> dict[str, str]:
    """Run the short suite with that Triton: its version, and what pytest counted.

    CommandError: a test failed.
    """
    pip = (python, "-m", "pip", "--quiet")
    shown = ("-q", "-rf", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider")
    suite = (python.with_name("pytest"), *shown, "@tests/short.txt")
    if triton == "none":
        run(*pip, "uninstall", "--yes", "triton", cwd=folder)
        return {"triton": triton, "tests": counted(run(*suite, cwd=folder))}
    run(*pip, "install", "--upgrade", "--no-deps", requirement("triton", triton), cwd=folder)
    found = run(python, "-c", "from importlib.metadata import version; print(version('triton'))", cwd=folder)
    other = "--deselect=tests/test_compile.py"  # a torch compiles beside the Triton of its time alone
    interpreted = ("-W", "ignore", "-k", INTERPRETED)  # numpy warns of Triton 3.6
    outputs = run(*suite, other, cwd=folder), run(*suite, other, *interpreted, cwd=folder, TRITON_INTERPRET="1")
    return {"triton": found.strip(), "tests": "; ".join(map(counted, outputs))}


def counted(output: str) -> str:
    """What pytest counted, as its last line says, without the time."""
    return output.splitlines()[-1].partition(" in ")[0]


def cells(version: str, torch: str, tritons: list[str], wheels: list[Path]) -> list[dict[str, Any]]:
    """The rows of one Python and one torch. A row whose tests did not pass has `failure`."""
    start = {"python": version, "torch": torch}
    with tempfile.TemporaryDirectory(prefix="matrix-") as name:
        folder = Path(name).resolve()
        try:
            python = interpreter(version)
            wheel = choose(wheels, version) if wheels else build(python, folder)
            inside, shown = install(python, wheel, torch, folder)
            start |= shown
            run(inside, "-m", "pip", "install", "--quiet", *TEST_TOOLS, cwd=folder)
        except CommandError as failure:
            return [{**start, "triton": triton, "failure": str(failure)} for triton in tritons]
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        rows = []
        for triton in tritons:
            try:
                rows.append({**start, **test(inside, triton, folder)})
            except CommandError as failure:
                rows.append({**start, "triton": triton, "failure": str(failure)})
        return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table of Markdown, oldest versions first."""
    lines = [f"| {' | '.join(COLUMNS.values())} |", "|---" * len(COLUMNS) + "|"]
    for row in sorted(rows, key=key):
        shown = {"tests": "FAILED", **row}
        lines.append(f"| {' | '.join(str(shown.get(name, '')) for name in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a row, in the order of versions."""
    versions = (row[name].partition("+")[0].split(".") for name in ("python", "torch", "triton"))
    words = {"newest": 10**6}  # it is left in a row that failed
    return tuple([int(part) if part.isdigit() else words.get(part, -1) for part in parts] for parts in versions)


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write matrix.json and matrix.md. Rows of other versions that the folder has are kept."""
    file = folder / "matrix.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    every = {str(key(row)): row for row in (*earlier, *rows)}
    folder.mkdir(parents=True, exist_ok=True)
    document = {"system": platform.platform(), "cores": os.cpu_count(), "rows": sorted(every.values(), key=key)}
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / "matrix.md").write_text(table(list(every.values())), encoding="utf-8")


def main() -> int:
    """Run every cell, print the table, and return 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = "{}.{}".format(*sys.version_info)
    parser.add_argument("--python", nargs="+", default=[here], help="versions, as 3.10 3.13; default: this one")
    parser.add_argument("--torch", nargs="+", default=["2.6.0", "newest"], help="versions; default: %(default)s")
    parser.add_argument("--triton", nargs="+", default=["none"], help="versions, newest or none; default: %(default)s")
    parser.add_argument("--wheel", nargs="+", type=Path, default=[], help="built wheels, one for each Python")
    parser.add_argument("--out", type=Path, help="a folder for matrix.json and matrix.md")
    args = parser.parse_args()
    for version in args.python:  # before any work is done
        interpreter(version)
        if args.wheel:
            choose(args.wheel, version)
    rows: list[dict[str, Any]] = []
    for version, torch in itertools.product(args.python, args.torch):
        print(f"Python {version}, torch {torch}", flush=True)
        rows += cells(version, torch, args.triton, args.wheel)
        if args.out:
            write(rows, args.out)
    failed = [row for row in rows if "failure" in row]
    for row in failed:
        print(f"\nPython {row['python']}, torch {row['torch']}, Triton {row['triton']}: {row['failure']}")
    print("\n" + table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
