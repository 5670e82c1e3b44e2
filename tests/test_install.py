"""Installing with a compiler, without one, and without the native part. Each prints the outcome."""

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
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
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
    """The python of a new virtual environment, with the packages of this one, but no commands."""
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


def setup(source: Path, command: str, path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py as pip does, and capture the messages that pip hides."""
    arguments = [sys.executable, "-W", "ignore", "setup.py", command]
    return subprocess.run(arguments, env=environment(path, **variables), cwd=source, capture_output=True, text=True)


def program(folder: Path, name: str, code: str) -> Path:
    """An executable of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return path


def installed(python: Path) -> list[str]:
    """The path of the package, and the reasons why it lacks cpu and cuda kernels, or None."""
    command = [str(python), "-c", SHOW]
    done = subprocess.run(command, env=environment(os.defpath), cwd=python.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("editable", [False, True], ids=["install", "editable"])
def test_without_a_compiler_it_installs_and_says_so(python: Path, source: Path, editable: bool) -> None:
    """An editable install removes the native module of an earlier build, not of another Python."""
    earlier, other = (source / "compacter_kernels" / name for name in (f"_C{EXT_SUFFIX}", "_C.of-another.so"))
    earlier.touch()
    other.touch()
    target = ["--editable", str(source)] if editable else [str(source)]
    done = pip(python, "install", "--ignore-installed", *target, env=environment(str(python.parent)))
    assert done.returncode == 0, done.stderr
    assert "compacter-kernels-0.1.0+pure" in done.stdout
    file, reason, _ = installed(python)
    assert Path(file).is_relative_to(source if editable else python.parents[1])
    assert "not built" in reason
    assert "a C++ compiler" in reason
    assert other.exists() and not (editable and earlier.exists())
    scripts = source / "examples" if editable else Path(file).with_name("examples")
    command = [str(python), "-m", "compacter_kernels", "train", "--help"]
    shown = subprocess.run(command, env=environment(os.defpath), cwd=python.parent, capture_output=True, text=True)
    assert f"The scripts, to read and to copy: {scripts}\n" in shown.stdout


PURE = [
    ({"CXX": "no-such-compiler"}, "the C++ compiler CXX=no-such-compiler"),
    ({"COMPACTER_KERNELS_NATIVE": "0"}, "left out by COMPACTER_KERNELS_NATIVE=0"),
]


@pytest.mark.parametrize(("variables", "reason"), PURE, ids=["named", "left out"])
def test_a_pure_install_says_why(source: Path, variables: dict[str, str], reason: str) -> None:
    done = setup(source, "--version", os.environ["PATH"], **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("+pure\n")
    assert reason in done.stderr


REFUSED = [
    ({"COMPACTER_KERNELS_NATIVE": "1"}, "the native part cannot be built"),
    ({"COMPACTER_KERNELS_NATIVE": "yes"}, "set it to 0 (no native part) or 1 (required)"),
    (
        {"COMPACTER_KERNELS_CUDA": "1", "COMPACTER_KERNELS_NATIVE": "0"},
        "COMPACTER_KERNELS_CUDA=1, but the native part cannot be built",
    ),
]


@pytest.mark.parametrize(("variables", "reason"), REFUSED, ids=["required", "unknown", "CUDA without native"])
def test_what_cannot_be_built_as_asked_is_refused(
    source: Path, tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    done = setup(source, "--version", str(tmp_path), **variables)
    assert done.returncode != 0
    assert reason in done.stderr


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_a_compiler_that_fails_is_an_error(source: Path, tmp_path: Path) -> None:
    compiler = program(tmp_path / "broken", "c++", "exit 1")
    done = setup(source, "build_ext", os.environ["PATH"], CXX=str(compiler))
    assert done.returncode != 0
    assert "COMPACTER_KERNELS_NATIVE=0" in done.stderr


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_an_earlier_build_decides_nothing(source: Path, tmp_path: Path) -> None:
    """Its tools are gone, as the environment in which pip builds, and the checkout was moved.

    In place of a module CMake writes the tools and the options that it has.
    """
    (source / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.18)
        project(shown LANGUAGES CXX)
        file(WRITE ${{CMAKE_LIBRARY_OUTPUT_DIRECTORY}}/_C{EXT_SUFFIX}
             "${{CMAKE_MAKE_PROGRAM}} ${{CMAKE_CXX_COMPILER}} ${{CMAKE_CXX_FLAGS}} ${{OPTION}}")""")
    for name in ("ninja", "c++"):
        program(tmp_path / "earlier", name, f'exec {shutil.which(name)} "$@"')
    earlier, path = str(tmp_path / "earlier"), os.environ["PATH"]
    options = {"CXX": f"{earlier}/c++", "CXXFLAGS": "-Dearlier", "CMAKE_ARGS": "-DOPTION=earlier"}
    done = setup(source, "build", os.pathsep.join((earlier, path)), **options)
    assert done.returncode == 0, done.stderr
    (module,) = source.glob(f"build/lib.*/compacter_kernels/_C{EXT_SUFFIX}")
    assert module.read_text() == f"{earlier}/ninja {earlier}/c++ -Dearlier earlier"
    shutil.rmtree(earlier)
    moved = source.rename(tmp_path / "moved")
    done = setup(moved, "build", path)
    assert done.returncode == 0, done.stderr
    assert "earlier" not in (moved / module.relative_to(source)).read_text()


def test_a_wheel_holds_no_file_that_the_sources_have_lost(source: Path) -> None:
    """Also if the earlier build ended half way, as on a full disk: a file stands for a folder."""
    dist, lost = source / "dist", [source / "compacter_kernels" / "lost.py", source / "examples" / "lost.py"]
    for path in (dist, *lost):
        path.touch()
    failed = setup(source, "bdist_wheel", os.environ["PATH"], COMPACTER_KERNELS_NATIVE="0")
    assert failed.returncode != 0 and len([*source.glob("build/bdist.*/wheel/**/lost.py")]) == 2
    for path in (dist, *lost):
        path.unlink()
    done = setup(source, "bdist_wheel", os.environ["PATH"], COMPACTER_KERNELS_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = dist.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "lost" in name]


@pytest.mark.parametrize("half_made", [True, False], ids=["without pip", "its Python is gone"])
def test_make_repairs_an_environment(tmp_path: Path, half_made: bool) -> None:
    """As one of a Python that was removed, or one that ended before it had pip.

    It makes the environment again for another torch only.
    """
    works = program(tmp_path, "works", "exit 0")
    python = program(tmp_path / "venv" / "bin", "python", "exit 1")
    if not half_made:
        python.unlink()
        python.symlink_to(tmp_path / "gone")
    new = program(tmp_path, "new", f'cp "{works}" "$3/bin/python"')  # -m venv FOLDER
    command = ["make", "-C", ROOT, "ready", f"VENV={tmp_path / 'venv'}", f"PYTHON={new}"]
    for torch, again in (("torch==2.13.0", False), ("torch==2.13.0", True), ("torch>=2.6", False)):
        made = subprocess.run([*command, f"TORCH={torch}"], env=environment(os.environ["PATH"]), capture_output=True)
        assert made.returncode == 0, made.stderr
        assert again == (b"Nothing to be done for 'ready'" in made.stdout)


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize(("switch", "asked"), [("", "AUTO"), ("0", "OFF"), ("1", "ON")])
def test_the_cuda_part_is_built_as_asked(source: Path, tmp_path: Path, switch: str, asked: str) -> None:
    """The options for CMake. tests/test_cuda_choice.py tests their effect."""
    cmake, nvcc = program(tmp_path / "bin", "cmake", "exit 1"), program(tmp_path / "bin", "an-nvcc", "exit 1")
    path = os.pathsep.join((str(cmake.parent), os.environ["PATH"]))
    done = setup(source, "build_ext", path, COMPACTER_KERNELS_CUDA=switch, CUDACXX=str(nvcc))
    assert f"-DCOMPACTER_CUDA={asked} " in done.stderr
    assert "-DCOMPACTER_NO_CUDA=left out by COMPACTER_KERNELS_CUDA=0 " in done.stderr
    assert f"-DCMAKE_CUDA_COMPILER={nvcc} " in done.stderr


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_a_cuda_part_that_is_required_needs_nvcc(source: Path) -> None:
    done = setup(source, "build_ext", os.environ["PATH"], COMPACTER_KERNELS_CUDA="1", CUDACXX="no-such-nvcc")
    assert done.returncode != 0
    assert "the CUDA part cannot be built; not found when it was installed: no-such-nvcc" in done.stderr


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_the_native_wheel_installs_and_holds_what_it_should(python: Path, source: Path, tmp_path: Path) -> None:
    """One wheel serves every torch. With the CUDA part it needs neither a GPU nor CUDA.

    The CUDA part is built where nvcc is, as unoptimised PTX of one architecture, which is quick.
    """
    options = "-DCMAKE_BUILD_TYPE=Debug -DCOMPACTER_CUDA_ARCHS=90-virtual -DCMAKE_CUDA_FLAGS=-Xcicc=-O0"
    cuda = {"COMPACTER_KERNELS_CUDA": "1", "CUDACXX": NVCC} if NVCC else {"COMPACTER_KERNELS_CUDA": "0"}
    env = environment(os.environ["PATH"], CMAKE_ARGS=options, **cuda)
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
    file, *reasons = installed(python)
    left_out = "not built: left out by COMPACTER_KERNELS_CUDA=0"
    assert reasons in ([["None", "None"], ["None", "no CUDA device"]] if NVCC else [["None", left_out]])
    (module,) = Path(file).parent.glob("_C.*.so")
    needed = subprocess.run(["readelf", "--dynamic", "--wide", module], capture_output=True, text=True).stdout
    assert "libc.so" in needed and "cuda" not in needed
    code = "from compacter_kernels._C import build_info; print(build_info()['cuda'], build_info()['cuda_archs'])"
    done = subprocess.run(
        [python, "-c", code], env=environment(os.defpath), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == ("True ['sm_90']\n" if NVCC else "False []\n"), done.stderr
    script = python.parent / "compacter-kernels"
    assert subprocess.run([script, "--help"], env=env, capture_output=True, cwd=tmp_path).returncode == 0
