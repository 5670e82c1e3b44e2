"""The structure of the repository.

The tests check the direction of imports, file sizes, the names that files may use, and the modules
that an import loads.
"""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "compacter_kernels"

# The order of docs/design.md: a part of the package imports parts of lower rank, and itself.
RANKS = (
    ("_C", "activations", "private", "weights"),
    ("modes",),
    ("calls", "input_statistics", "kronecker_fit", "problem"),
    ("impl", "output_fit"),
    ("proof",),
    ("dispatch",),
    ("ops",),
    ("autograd",),
    ("call_path",),
    ("arguments",),
    ("functional",),
    ("nn",),
    ("compress", "config"),
    ("targets",),
    ("checkpoints", "inject", "patch"),  # As any names of one rank, these three never import each other.
    ("choose", "peft"),
    ("ensemble", "load", "save"),
    ("cases",),
    ("accuracy",),
    ("machine", "options", "saved"),
    ("bench", "train"),
    ("compare", "info"),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
PUBLIC = RANK["load"] + 1  # what `import compacter_kernels` itself needs lies below
SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh"}
HOSTS = {"arxiv.org", "www.apache.org", "keepachangelog.com", "semver.org", "pytorch.org", "github.com"}
HOSTS |= {"www.w3.org"}  # part of the XML namespace in docs/adapter.svg


def project_files() -> list[Path]:
    """Every file that is, or would be, under version control."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """The modules of this package that a module imports, anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            base = node.module or ""
            found |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return {name for name in found if name.split(".")[0] == PACKAGE}


def part_of(module: str) -> str:
    """compacter_kernels.impl.cpu -> impl; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("module", [name for name in MODULES if name != PACKAGE])
def test_nothing_imports_upward(module: str) -> None:
    here = part_of(module)
    assert here in RANK, f"{module}: give {here} its rank in RANKS and in docs/design.md"
    for imported in imports_of(module):
        there = part_of(imported)
        rank = RANK[there] if there else PUBLIC - 1
        assert there == here or rank < RANK[here], f"{module} imports {imported}, which is not below it"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(f"{PACKAGE}.impl.")])
def test_implementations_never_import_one_another(module: str) -> None:
    parts = ("bank_of_one", "chain", "memory", "module", "native", "native_family", "plain")
    shared = {f"{PACKAGE}.impl.{name}" for name in parts}
    names = {name for name in MODULES if name.startswith(f"{PACKAGE}.impl.")} - shared
    own = ".".join(module.split(".")[:3])
    assert not {name for name in imports_of(module) & names if not name.startswith(own)}


@pytest.mark.parametrize("module", [name for name in MODULES if name != f"{PACKAGE}.private"])
def test_private_names_of_torch_stand_in_one_file(module: str) -> None:
    private = re.compile(
        r"\btorch\._(?!_|dynamo)|environ\._\w|_has_any_global_hook|\b_dynamo_\w|\._(?:forward|backward)_(?:pre_)?hooks"
    )
    text = MODULES[module].read_text(encoding="utf-8")
    assert not private.findall(text), "put it into private.py, with its reason and the way without"


def test_the_public_module_needs_no_part_above_load_and_save() -> None:
    assert all(RANK[part_of(name)] < PUBLIC for name in imports_of(PACKAGE))


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_bytes().splitlines()) for path in project_files() if path.suffix in SOURCES}
    assert not {str(path): length for path, length in lengths.items() if length > 400}
    assert statistics.median(lengths.values()) < 150
    assert sum(length <= 300 for length in lengths.values()) >= 0.9 * len(lengths)


def test_files_name_no_machine_and_no_unknown_host() -> None:
    path_of_a_machine = re.compile(r"(?<![\w.\-/}$)])/(?:home|opt|private|root|tmp|Users|work|workspace)/\w")
    url = re.compile(r"(?:https?|ssh|git)://([^/\s\"'`)>]*)")
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            assert not path_of_a_machine.search(line), where
            assert set(url.findall(line)) <= HOSTS, where


def test_import_needs_torch_alone() -> None:
    """It loads no optional package, and the command line begins without one."""
    code = """
import sys
sys.modules.update(dict.fromkeys(('numpy', 'scipy')))
import torch
before = set(sys.modules)
import compacter_kernels as ck
optional = {'triton', 'matplotlib', 'sklearn', 'tqdm', 'transformers', 'adapters', 'safetensors', 'huggingface_hub'}
print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} & optional))
sys.modules.update(dict.fromkeys(optional))
import compacter_kernels.cli
print(sorted(ck.available_impls()))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, impls = done.stdout.splitlines()
    assert loaded == "[]" and "dense" in impls
