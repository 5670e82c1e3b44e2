"""Plants one bug at a time into copies of the CUDA sources, and prints which ones the tests detect.

    python tests/cuda_on_cpu/plant.py build/cuda_on_cpu [--part 1/8] [--only TEXT] [--list]

The folder is that of a build of the unchanged sources by CMake (COMPACTER_CUDA_ON_CPU). Objects are
written to its subfolder `planted`. Exits with 1 if a bug survives that is not in HARMLESS.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from build import ELEMENTS, HERE, SOURCES, compile_units, environment, included, link, units
from planted import BUGS, HARMLESS, PATTERNS

ROOT = SOURCES.parent

# The arguments of pytest in each build. A bug is tried in all its builds, the likeliest one first.
# One that only the family's kernels have is tried with their tests alone.
TESTS = ["tests/test_cuda_kernels.py", "tests/test_cuda_family.py"]
CHECKS = {"plain": [], "race": ["-k", "every_order"], "sanitized": []}
SECONDS = 240


class Bug(NamedTuple):
    name: str
    file: str
    text: str  # the whole file with the bug
    kinds: tuple[str, ...]


def is_comment(text: str, at: int) -> bool:
    """Whether a // precedes this position on its line."""
    return "//" in text[text.rfind("\n", 0, at) + 1 : at]


def bugs(sources: Path) -> list[Bug]:
    """All bugs of PATTERNS and BUGS, in the order of the files."""
    found = []
    files = {path.name: path.read_text() for path in sorted((sources / "cuda").glob("*.*")) if path.name != "ptx.h"}
    for file, text in files.items():
        for pattern, replacement, kinds in PATTERNS:
            matches = [match for match in re.finditer(pattern, text) if not is_comment(text, match.start())]
            for occurrence, match in enumerate(matches):
                changed = match.expand(replacement)
                name = f"{file}: {match[0]} -> {changed.strip(';') or 'nothing'} #{occurrence}"
                found.append(Bug(name, file, text[: match.start()] + changed + text[match.end() :], kinds))
    for file, old, new, *occurrence in BUGS:
        parts = files[file].split(old)
        at = occurrence[0] if occurrence else 0
        if len(parts) < at + 2:
            sys.exit(f"{file} no longer has {old!r}; see planted.py")
        text = old.join(parts[: at + 1]) + new + old.join(parts[at + 1 :])
        found.append(Bug(f"{file}: {old} -> {new.strip(';') or 'nothing'} #{at}", file, text, ("plain", "sanitized")))
    unknown = HARMLESS.keys() - {bug.name for bug in found}
    if unknown:
        sys.exit(f"HARMLESS names what is not planted: {sorted(unknown)}; see planted.py")
    return found


class Nursery:
    """The folder for compiling the bugs: a copy of the sources, and the objects without a bug."""

    def __init__(self, base: Path) -> None:
        self.base, self.folder = base, base / "planted"
        self.sources = self.folder / "csrc"
        shutil.rmtree(self.sources, ignore_errors=True)
        shutil.copytree(SOURCES, self.sources)
        self.units = units(self.sources)

    def sound(self, kind: str) -> Path:
        """The folder of the objects without a bug. They are compiled again if a source is newer."""
        folder = self.folder / f"sound_{kind}"
        files = [*SOURCES.glob("**/*.h"), *SOURCES.glob("cuda/*.cu"), *HERE.glob("*.h"), HERE / "build.py"]
        newest = max(file.stat().st_mtime for file in files)
        objects = [folder / unit.object for unit in self.units]
        if not all(path.exists() and path.stat().st_mtime > newest for path in objects):
            compile_units(SOURCES, self.units, folder, kind)
        return folder

    def build(self, bug: Bug, kind: str, elements: tuple[str, ...]) -> Path:
        """The folder of the module that has the bug in the kernels of these dtypes."""
        file, folder = self.sources / "cuda" / bug.file, self.folder / "module"
        shutil.rmtree(folder, ignore_errors=True)
        sound, whole = self.sound(kind), file.read_text()
        changed = {
            unit
            for unit in self.units
            if unit.element in (None, *elements) and bug.file in included(self.sources, unit.source)
        }
        file.write_text(bug.text)
        try:
            compile_units(self.sources, changed, folder, kind)
        finally:
            file.write_text(whole)
        objects = [(folder if unit in changed else sound) / unit.object for unit in self.units]
        link(objects, self.base, folder, kind)
        return folder

    def caught(self, bug: Bug) -> str | None:
        """The symptom by which the tests detect the bug, or None.

        The kernels of one dtype are tried first, since they compile sooner.
        """
        attempts = [(bug.kinds[0], ("bf16",)), *((kind, ELEMENTS) for kind in bug.kinds)]
        return next(filter(None, (self.caught_in(bug, kind, elements) for kind, elements in attempts)), None)

    def caught_in(self, bug: Bug, kind: str, elements: tuple[str, ...]) -> str | None:
        try:
            folder = self.build(bug, kind, elements)
        except subprocess.CalledProcessError:
            return "the compiler"
        kernels = [unit for unit in self.units if bug.file in included(self.sources, unit.source)]
        tests = TESTS[1:] if all("family" in unit.source for unit in kernels) else TESTS
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", *tests, *CHECKS[kind]]
        try:
            settings = {**os.environ, **environment(folder, kind)}
            done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"{kind}: no end"
        if done.returncode == 0:
            return None
        lines = (done.stdout + done.stderr).splitlines()
        for sign in (r"^E +RuntimeError", r"ERROR: \w+Sanitizer", r"runtime error", r"^E +", r"^FAILED|^ERROR|Error"):
            if why := [line for line in lines if re.search(sign, line)]:
                return f"{kind}: {why[0].removeprefix('E').strip()}"
        return f"{kind}: exit status {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="where CMake has built")
    parser.add_argument("--part", default="1/1", help="of the bugs, i/n: every n-th from the i-th on")
    parser.add_argument("--only", default="", help="bugs whose name has this text")
    parser.add_argument("--list", action="store_true", help="print the names alone")
    arguments = parser.parse_args()
    first, step = map(int, arguments.part.split("/"))
    chosen = [bug for bug in bugs(SOURCES) if arguments.only in bug.name][first - 1 :: step]
    if arguments.list:
        print("\n".join(bug.name for bug in chosen))
        return
    nursery, survivors = Nursery(arguments.base.resolve()), []
    for bug in chosen:
        begin = time.monotonic()
        why = nursery.caught(bug)
        if not why and bug.name not in HARMLESS:
            survivors.append(bug.name)
        result = "caught" if why else "harmless" if bug.name in HARMLESS else "SURVIVED"
        why = why or HARMLESS.get(bug.name, "")
        print(f"{result:8} {time.monotonic() - begin:5.1f}s  {bug.name}  {why[:160]}", flush=True)
    print(f"{len(chosen)} planted, {len(survivors)} survived")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
