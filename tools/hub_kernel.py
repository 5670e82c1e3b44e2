"""Writes the repository of the Hub kernel, which the package `kernels` of Hugging Face loads.

    python tools/hub_kernel.py OUT

docs/hub.md says what the repository holds. A process may load several versions of a kernel, each
under a name of its own. So the modules of a kernel import one another by relative imports, and its
operators are in a namespace of its own (docs/source/kernel-requirements.md of
github.com/huggingface/kernels). Nothing else in the modules changes, apart from the `__init__` of
the package, of which the part in `API` stays. The same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "compacter_kernels"
API = tuple(f"{PACKAGE}.{part}" for part in ("dispatch", "functional", "nn", "weights"))
BACKENDS = ("cpu", "cuda", "rocm")
OPERATORS = f"{PACKAGE}::"  # how the name of an operator begins
PREFIX = "add_op_namespace_prefix"  # kernel-builder makes this function, in a module _ops
GENERAL = {"name": "compacter-kernels", "license": "apache-2.0"}

NOT_BUILT = "a Hub kernel has no native part; the package {name} has it\n"
OPS = '''"""The namespace of the operators, which no other build has."""


def {prefix}(op_name: str) -> str:
    """The full name of an operator."""
    return f"{identifier}::{{op_name}}"
'''
BUILD = """[general]
name = "{name}"
version = {major}
edition = 5
license = "{license}"
backends = {backends}

[torch-noarch]
pyext = ["py", "txt"]
"""
CARD = """---
library_name: kernels
license: {license}
---

# {name}

Fused Triton kernels for Compacter adapters (arXiv 2106.04647) and for plain bottleneck adapters.
The kernels never build the matrix of a projection. This repository is generated from version
{version} of the package {name}.

```python
import torch
from kernels import get_kernel

ck = get_kernel("OWNER/{name}", version={major}, trust_remote_code=True)
device = "cuda" if torch.cuda.is_available() else "cpu"
adapter = ck.CompacterAdapter(hidden_size=768, reduction_factor=32, phm_dim=4, device=device)
x = torch.randn(8, 128, 768, device=device, requires_grad=True)
adapter(x).square().mean().backward()
print(ck.explain(x, adapter.down.weights(), adapter.up.weights()))  # which kernel runs, and why
```

It needs Python 3.10 and torch 2.6, or later ones. Where there is no GPU or no Triton,
operations of torch compute the same functions.

{names}
"""


def is_own(module: str | None) -> bool:
    """Whether a module is one of the package."""
    return module is not None and module.split(".")[0] == PACKAGE


def imported(source: str) -> Iterator[str]:
    """All that a module imports of the package, in functions too: modules, and names in modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_own(alias.name))
        elif isinstance(node, ast.ImportFrom) and is_own(node.module):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: Path) -> dict[Path, str]:
    """The source of the API and of all that it imports, by the path in the package."""
    found = {Path("__init__.py"): api((package / "__init__.py").read_text(encoding="utf-8"))}
    new = list(found)
    while new:
        for name in imported(found[new.pop()]):
            parts = name.split(".")[1:]
            stems = [Path(*parts[:end]) for end in range(1, len(parts) + 1)]  # a module's packages, and itself
            for path in (path for stem in stems for path in (stem.with_suffix(".py"), stem / "__init__.py")):
                if path not in found and (package / path).is_file():
                    found[path] = (package / path).read_text(encoding="utf-8")
                    new.append(path)
    return dict(sorted(found.items()))


def api(source: str) -> str:
    """The package's `__init__`, without what is not in the API."""
    docstring, *body = ast.parse(source).body
    kept = [node for node in body if isinstance(node, ast.ImportFrom) and node.module in API]
    names = sorted(["__version__", *(alias.name for node in kept for alias in node.names)])
    version = next(node for node in body if ast.unparse(node).startswith("__version__ = "))
    return ast.unparse(ast.Module([docstring, *kept, version, *ast.parse(f"__all__ = {names}").body], [])) + "\n"


def replacement(node: ast.AST, level: int) -> str | None:
    """What stands in the kernel for a node, or None for the node itself.

    level: the number of dots that lead from the module to the kernel.
    """
    if isinstance(node, ast.ImportFrom) and is_own(node.module):
        return ast.unparse(ast.ImportFrom(str(node.module).partition(".")[2] or None, node.names, level))
    if isinstance(node, ast.Import) and is_own(node.names[0].name):  # import compacter_kernels.a.b as c
        module, _, name = node.names[0].name.partition(".")[2].rpartition(".")
        return ast.unparse(ast.ImportFrom(module or None, [ast.alias(name, node.names[0].asname)], level))
    if isinstance(node, ast.JoinedStr) and ast.unparse(node.values[0]).startswith(f"'{OPERATORS}"):
        start = ast.Constant(ast.literal_eval(node.values[0]).removeprefix(OPERATORS))
        return f"{PREFIX}({ast.unparse(ast.JoinedStr([start, *node.values[1:]]))})"
    return None


def portable(source: str, level: int) -> str:
    """The module with its replacements. All else, comments too, stays as it is."""
    lines = source.encode().splitlines(keepends=True)
    nodes: Any = ast.walk(ast.parse(source))
    found = [(node, text) for node in nodes if (text := replacement(node, level)) is not None]
    found.sort(key=lambda edit: edit[0].lineno, reverse=True)
    if any(text.startswith(PREFIX) for _, text in found):
        node, text = found[-1]  # the first import
        found[-1] = node, f"from {'.' * level}_ops import {PREFIX}\n{text}"
    for node, text in found:
        first, last = node.lineno - 1, node.end_lineno - 1
        changed = lines[first][: node.col_offset] + text.encode() + lines[last][node.end_col_offset :]
        lines[first : last + 1] = [changed]
    return b"".join(lines).decode()


def repository(package: Path) -> dict[str, str]:
    """The text of every file of the repository, by its path."""
    sources = {path.as_posix(): portable(text, len(path.parts)) for path, text in modules(package).items()}
    public: Any = ast.parse(sources["__init__.py"]).body
    version, names = (ast.literal_eval(assignment.value) for assignment in public[-2:])
    sources["_not_built.txt"] = NOT_BUILT.format(**GENERAL)
    unique = hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:10]

    stated = {**GENERAL, "version": version, "major": int(version.split(".")[0]), "backends": json.dumps(BACKENDS)}
    stated["names"] = textwrap.fill(f"It offers {', '.join(names)}.", 100)
    files = {"build.toml": BUILD.format(**stated), "README.md": CARD.format(**stated)}
    files["LICENSE"] = (ROOT / "LICENSE").read_text(encoding="utf-8")
    files |= {f"torch-ext/{PACKAGE}/{path}": text for path, text in sources.items()}
    for backend in BACKENDS:
        identifier = f"_{PACKAGE}_{backend}_{unique}"
        built = {**sources, "_ops.py": OPS.format(prefix=PREFIX, identifier=identifier)}
        built["metadata.json"] = metadata(identifier, backend, stated["major"], built)
        files |= {f"build/torch-{backend}/{path}": text for path, text in built.items()}
    return files


def metadata(identifier: str, backend: str, major: int, files: dict[str, str]) -> str:
    """The description of a build, with the hash of each of its files."""
    hashes = {path: hashlib.sha256(text.encode()).digest() for path, text in sorted(files.items())}
    content = {
        **GENERAL,
        "id": identifier,
        "version": major,
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {path: base64.b64encode(value).decode() for path, value in hashes.items()},
        },
    }
    return json.dumps(content, indent=2) + "\n"


def write(out: Path, package: Path = ROOT / PACKAGE) -> None:
    """Write the repository of the package into a new folder.

    Raises:
        FileExistsError: there is such a folder or file.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it, or name another folder")
    files = repository(package)
    out.mkdir(parents=True)
    for path, text in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the repository of the Hub kernel.")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    write(parser.parse_args().out)
