"""Installing: with a compiler, without one, left out on request; each says what it did, and each imports."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))
SOURCES = (
    "compacter_kernels",
    "csrc",
    "examples",
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
SHOW = (
    "import compacter_kernels as ck; print(ck.__file__); "
    "print(*(ck.available_impls()[name] for name in ('cpu', 'cuda')), sep='\\n')"
)

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A clean copy of the sources."""
    folder = tmp_path / "source"
    folder.mkdir()
    built = shutil.ignore_patterns("__pycache__", "_C.*", "_not_built.txt")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=built)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The python of an empty virtual environment that borrows packages of this one (torch, pip), but no commands."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return tmp_path / "venv" / "bin" / "python"


def environment(path: str, **variables: str) -> dict[str, str]:
    chosen = ("COMPACTER_", "PYTHON", "CC", "CXX", "CUDA")
    return (
        {name: value for name, value in os.environ.items() if not name.startswith(chosen)} | {"PATH": path} | variables
    )


def pip(python: Path, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=python.parent)


def installed(python: Path) -> list[str]:
    """Where the package was imported from, and why it has no cpu kernels and no cuda kernels (or None)."""
    command = [str(python), "-c", SHOW]
    done = subprocess.run(command, env=environment(os.defpath), cwd=python.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("editable", [False, True], ids=["install", "editable"])
def test_without_a_compiler_it_installs_and_says_so(python: Path, source: Path, editable: bool) -> None:
    target = ["--editable", str(source)] if editable else [str(source)]
    done = pip(python, "install", "--ignore-installed", *target, env=environment(str(python.parent)))
    assert done.returncode == 0, done.stderr
    assert "compacter-kernels-0.1.0+pure" in done.stdout
    file, reason, _ = installed(python)
    assert Path(file).is_relative_to(source if editable else python.parents[1])
    assert "not built" in reason
    assert "a C++ compiler" in reason
    scripts = source / "examples" if editable else Path(file).with_name("examples")
    command = [str(python), "-m", "compacter_kernels", "train", "--help"]
    shown = subprocess.run(command, env=environment(os.defpath), cwd=python.parent, capture_output=True, text=True)
    assert f"The scripts, to read and to copy: {scripts}\n" in shown.stdout


def test_a_compiler_that_is_named_but_not_there_is_said(python: Path, source: Path) -> None:
    env = environment(os.environ["PATH"], CXX="no-such-compiler", CC="no-such-compiler")
    done = pip(python, "install", "--verbose", "--ignore-installed", str(source), env=env)
    assert done.returncode == 0, done.stderr
    assert "the C++ compiler CXX=no-such-compiler" in done.stdout + done.stderr
    assert "CXX=no-such-compiler" in installed(python)[1]


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_a_compiler_that_fails_is_an_error(python: Path, source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    env = environment(os.environ["PATH"], CXX=str(compiler))
    done = pip(python, "install", "--ignore-installed", str(source), env=env)
    assert done.returncode != 0
    assert "COMPACTER_KERNELS_NATIVE=0" in done.stdout + done.stderr


def test_the_native_part_can_be_required(python: Path, source: Path) -> None:
    env = environment(str(python.parent), COMPACTER_KERNELS_NATIVE="1")
    done = pip(python, "install", "--ignore-installed", str(source), env=env)
    assert done.returncode != 0
    assert "the native part cannot be built" in done.stdout + done.stderr


def test_a_switch_that_is_not_known_is_refused(python: Path, source: Path) -> None:
    env = environment(str(python.parent), COMPACTER_KERNELS_NATIVE="yes")
    done = pip(python, "install", "--ignore-installed", str(source), env=env)
    assert done.returncode != 0
    assert "set it to 0 (no native part) or 1 (required)" in done.stdout + done.stderr


def test_an_editable_install_without_the_native_part_removes_an_earlier_one(python: Path, source: Path) -> None:
    earlier = source / "compacter_kernels" / "_C.earlier.so"
    earlier.touch()
    env = environment(os.environ["PATH"], COMPACTER_KERNELS_NATIVE="0")
    done = pip(python, "install", "--ignore-installed", "--editable", str(source), env=env)
    assert done.returncode == 0, done.stderr
    assert not earlier.exists()
    assert "left out by COMPACTER_KERNELS_NATIVE=0" in installed(python)[1]


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_the_native_wheel_installs_and_holds_what_it_should(python: Path, source: Path, tmp_path: Path) -> None:
    env = environment(os.environ["PATH"], CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug", COMPACTER_KERNELS_CUDA="0")  # quick
    done = pip(python, "wheel", "--wheel-dir", str(tmp_path), str(source), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sysconfig.get_config_var("SOABI").split("-")[1] in wheel.name
    assert {"compacter_kernels/py.typed", "compacter_kernels/examples/train_text.py"} <= set(names)
    assert sum(name.startswith("compacter_kernels/_C.") for name in names) == 1
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"compacter_kernels"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".txt.in"))]
    done = pip(python, "install", "--ignore-installed", str(wheel), env=env)
    assert done.returncode == 0, done.stderr
    assert installed(python)[1:] == ["None", "not built: left out by COMPACTER_KERNELS_CUDA=0"]
    script = python.parent / "compacter-kernels"
    assert subprocess.run([script, "--help"], env=env, capture_output=True, cwd=tmp_path).returncode == 0


@pytest.mark.skipif(not COMPILER or NVCC is None, reason="no C++ compiler, or no nvcc")
def test_a_wheel_with_the_cuda_part_needs_no_gpu_and_no_cuda(python: Path, source: Path, tmp_path: Path) -> None:
    """One wheel for every torch; here for one architecture, unoptimised, which is quick to build."""
    options = "-DCMAKE_BUILD_TYPE=Debug -DCOMPACTER_CUDA_ARCHS=90-real"
    env = environment(os.environ["PATH"], CMAKE_ARGS=options, COMPACTER_KERNELS_CUDA="1", CUDACXX=str(NVCC))
    done = pip(python, "wheel", "--wheel-dir", str(tmp_path), str(source), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    done = pip(python, "install", "--ignore-installed", str(wheel), env=env)
    assert done.returncode == 0, done.stderr
    file, cpu, cuda = installed(python)
    assert (cpu, cuda) in [("None", "None"), ("None", "no CUDA device")]
    (module,) = Path(file).parent.glob("_C.*.so")
    needed = subprocess.run(["readelf", "--dynamic", "--wide", module], capture_output=True, text=True).stdout
    assert "libc.so" in needed and "cuda" not in needed
    code = "from compacter_kernels._C import build_info; print(build_info()['cuda'], build_info()['cuda_archs'])"
    command = [python, "-c", code]
    done = subprocess.run(command, env=environment(os.defpath), cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "True ['sm_90']\n", done.stderr


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_a_cuda_part_that_is_required_needs_nvcc(python: Path, source: Path) -> None:
    env = environment(os.environ["PATH"], COMPACTER_KERNELS_CUDA="1", CUDACXX="no-such-nvcc")
    done = pip(python, "install", "--ignore-installed", str(source), env=env)
    assert done.returncode != 0
    assert "the CUDA part cannot be built; not found when it was installed: no-such-nvcc" in done.stdout + done.stderr
    env = environment(os.environ["PATH"], COMPACTER_KERNELS_CUDA="1", COMPACTER_KERNELS_NATIVE="0")
    done = pip(python, "install", "--ignore-installed", str(source), env=env)
    assert done.returncode != 0
    assert "COMPACTER_KERNELS_CUDA=1, but the native part cannot be built" in done.stdout + done.stderr
