"""The Hub kernel (tools/hub_kernel.py) computes what the package computes, without the package."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.dispatch import ENVIRONMENT

try:
    import kernels
except ImportError:  # it needs another huggingface-hub than the pinned transformers; `make hub-kernel` has both
    kernels = None

PACKAGE = Path(ck.__file__).parent
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter (make hub-kernel)"
)


def imported(name: str, file: Path) -> ModuleType:
    """The module of a file, imported under this name."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write = imported("hub_kernel", Path(__file__).parents[1] / "tools" / "hub_kernel.py").write


@contextmanager
def without_the_package() -> Iterator[None]:
    """Every import of the installed package fails."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == ck.__name__]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, ck.__name__, None)
        yield


def identifier(repository: Path) -> str:
    """The name of the kernel for the CPU, and the namespace of its operators."""
    return str(json.loads((repository / "build/torch-cpu/metadata.json").read_text(encoding="utf-8"))["id"])


def load(repository: Path) -> Any:
    """The kernel for the CPU, by `kernels` where it is installed, else as its version 0.17 does."""
    with without_the_package():
        if kernels is not None:
            return kernels.get_local_kernel(repository, backend="cpu")
        return imported(identifier(repository), repository / "build/torch-cpu/__init__.py")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repository"
    write(folder)
    return folder


@pytest.fixture(scope="module")
def hub(repository: Path) -> Any:
    return load(repository)


def results(source: Any, impl: str) -> list[Tensor]:
    """The outputs and all gradients of the adapters of the package, or of a kernel."""
    torch.manual_seed(0)
    x, route = torch.randn(5, 16, requires_grad=True), torch.tensor([0, 1, 1, -1, 0])
    options = {"reduction_factor": 2, "impl": impl}
    compacter = source.CompacterAdapter(16, phm_init_range=1.0, **options)
    bottleneck = source.BottleneckAdapter(16, **options)
    bank = source.AdapterBank(16, ["a", "b"], phm_init_range=1.0, **options)
    found = []
    for module, y in ((compacter, compacter(x)), (bottleneck, bottleneck(x)), (bank, bank(x, route=route))):
        found += [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]
    return found


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("impl", ["dense", "factored", pytest.param("triton", marks=INTERPRETED)])
def test_it_computes_the_bits_of_the_package(hub: Any, impl: str) -> None:
    expected = results(ck, impl)
    with without_the_package():
        assert_same_bits(results(hub, impl), expected)


def test_two_versions_in_one_process(repository: Path, hub: Any, tmp_path: Path) -> None:
    later = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, later, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
    text = (later / "__init__.py").read_text(encoding="utf-8")
    (later / "__init__.py").write_text(text.replace(ck.__version__, "7.0.0"), encoding="utf-8")
    write(tmp_path / "later", later)
    other = load(tmp_path / "later")
    assert (hub.__version__, other.__version__) == (ck.__version__, "7.0.0")
    assert_same_bits(results(hub, "factored"), results(other, "factored"))

    namespaces = [identifier(repository), identifier(tmp_path / "later"), ck.__name__]
    assert len(set(namespaces)) == 3
    x, weights = torch.randn(3, 8), ck.PHMLinear(8, 4, phm_dim=2).weights()
    outputs = [getattr(torch.ops, name).phm_linear(x, *weights, "factored") for name in namespaces]
    assert_same_bits(outputs, [ck.phm_linear(x, weights, impl="factored")] * 3)


def test_it_has_no_native_part_and_says_so(hub: Any) -> None:
    impls = hub.available_impls()
    assert impls["dense"] is None and impls["factored"] is None
    assert impls["cpu"] == "not built: a Hub kernel has no native part; the package compacter-kernels has it"


def test_it_imports_itself_the_standard_library_torch_and_triton(repository: Path) -> None:
    for path in (repository / "build" / "torch-cpu").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            roots = {name.split(".")[0] for name in names}
            assert roots <= {*sys.stdlib_module_names, "torch", "triton"}, f"{path}:{node.lineno}"


def test_it_holds_nothing_for_whole_models(repository: Path) -> None:
    folder = repository / "torch-ext" / PACKAGE.name
    assert (folder / "impl" / "triton" / "kernel.py").is_file()
    for part in ("bench", "checkpoints", "compress", "inject", "patch", "peft", "targets", "cli.py", "load.py"):
        assert (PACKAGE / part).exists() and not (folder / part).exists()


def contents(folder: Path) -> dict[Path, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def test_the_same_sources_give_the_same_bytes(repository: Path, tmp_path: Path) -> None:
    write(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(repository)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_example_of_the_card_runs(repository: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (repository / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    monkeypatch.setenv(ENVIRONMENT, "factored")  # for Triton's interpreter it is too large
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda *args, **options: hub))
    exec(code[1], {})


@pytest.mark.skipif(kernels is None, reason="needs the package kernels (make hub-kernel)")
def test_kernels_reads_its_files(repository: Path) -> None:
    from kernels._rust import Build, Digest

    assert [str(b) for b in Build.open(repository).general.backends] == ["cpu", "cuda", "rocm"]
    for variant in (repository / "build").iterdir():
        metadata = kernels.Metadata.read_from_file(variant / "metadata.json")
        assert metadata.name.python_name == PACKAGE.name
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
