"""Builds the native module compacter_kernels._C with CMake where a C++ compiler is found.

COMPACTER_KERNELS_NATIVE=0 leaves the native part out, =1 makes a missing compiler an error. Without
the variable a missing compiler gives a pure-Python install, which says so: its version ends in
+pure, and `compacter-kernels info` has the reason. A compiler that is there and fails is always an
error. CMAKE_ARGS goes to CMake as it is.

The CUDA part is built for the NVIDIA GPUs of this machine, if there are any and nvcc is found.
COMPACTER_KERNELS_CUDA=1 builds it for every architecture, with or without a GPU, and makes a
missing nvcc an error; =0 leaves it out. nvcc is CUDACXX, or else on the path, in CUDA_HOME or in
/usr/local/cuda. A build without the CUDA part says so at its end, and keeps the reason for `info`.
"""

import ast
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "compacter_kernels"
SWITCH = "COMPACTER_KERNELS_NATIVE"
CUDA_SWITCH = "COMPACTER_KERNELS_CUDA"
COMPILERS = ("c++", "g++", "clang++", "cl")


def read_version() -> str:
    """__version__ of the package, read without importing it (which would need torch)."""
    for node in ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__version__":
            return str(ast.literal_eval(node.value))
    raise RuntimeError(f"{PACKAGE}/__init__.py sets no __version__")


def missing_tools() -> list[str]:
    """The tools that the native build needs and that this machine lacks."""
    missing = []
    if compiler := os.environ.get("CXX"):
        if shutil.which(compiler.split()[0]) is None:
            missing.append(f"the C++ compiler CXX={compiler}")
    elif not any(map(shutil.which, COMPILERS)):
        missing.append(f"a C++ compiler ({', '.join(COMPILERS)})")
    if shutil.which("cmake") is None:
        missing.append("cmake")
    if not any(map(shutil.which, ("ninja", "ninja-build"))):
        missing.append("ninja")
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    return missing


def asked(switch: str, part: str) -> str:
    """The value of an environment variable that controls a part: "0", "1", or "" if it is unset."""
    value = os.environ.get(switch, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{switch}={value} is not known; set it to 0 (no {part} part) or 1 (required), or unset it")
    return value


def why_pure() -> str | None:
    """The reason why this install has no native part; None if it has one."""
    switch, cuda_switch = asked(SWITCH, "native"), asked(CUDA_SWITCH, "CUDA")
    if switch == "0":
        reason = f"left out by {SWITCH}=0"
    elif missing := missing_tools():
        reason = f"not found when it was installed: {', '.join(missing)}"
    else:
        return None
    if "1" in (switch, cuda_switch):
        required = SWITCH if switch == "1" else CUDA_SWITCH
        raise SystemExit(f"{required}=1, but the native part cannot be built; {reason}")
    return reason


def find_nvcc() -> str | None:
    """The path of the CUDA compiler; None if there is none."""
    if compiler := os.environ.get("CUDACXX"):
        return shutil.which(compiler)
    folders = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))


def cuda_options() -> list[str]:
    """The options of CMake that decide on the CUDA part (csrc/cuda/build.cmake)."""
    switch, nvcc = asked(CUDA_SWITCH, "CUDA"), find_nvcc()
    if switch == "1" and nvcc is None:
        missing = os.environ.get("CUDACXX") or "nvcc"
        raise SystemExit(
            f"{CUDA_SWITCH}=1, but the CUDA part cannot be built; not found when it was installed: {missing}"
        )
    chosen = {"0": "OFF", "1": "ON", "": "AUTO"}[switch]
    options = [f"-DCOMPACTER_CUDA={chosen}", f"-DCOMPACTER_NO_CUDA=left out by {CUDA_SWITCH}=0"]
    return options if nvcc is None else [*options, f"-DCMAKE_CUDA_COMPILER={nvcc}"]


class BuildNative(build_ext):
    """Runs CMake. One target builds the whole of compacter_kernels._C."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        # of an earlier build: its options, its compiler, and a Ninja that pip has removed since
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for known in build.glob("CMakeFiles/*/CMake*Compiler.cmake"):
            known.unlink()
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *cuda_options(),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (configure, ["cmake", "--build", str(build)]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise SystemExit(
                    f"the native part of {PACKAGE} did not build: {' '.join(command)} returned {error.returncode}. "
                    f"To install without it, set {SWITCH}=0; without its CUDA part, {CUDA_SWITCH}=0."
                ) from error
        if not target.is_file():
            raise SystemExit(f"CMake built no {target}; is CMAKE_LIBRARY_OUTPUT_DIRECTORY ignored?")


class BuildPython(build_py):
    """Removes what an earlier build left, and leaves a note where this build has no native module.

    It also copies the training scripts into a package that is not editable. The command `train`
    runs them there.
    """

    def run(self) -> None:
        super().run()
        package = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        if self.editable_mode:  # this folder may hold the native modules of other Pythons too
            stale = {package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", package / "_not_built.txt"}
        else:
            stale = {*filter(Path.is_file, package.rglob("*"))} - {*map(Path, self.get_outputs())}
            for unfinished in package.parents[1].glob("bdist.*/wheel"):  # which setuptools would pack too
                shutil.rmtree(unfinished)
        for path in stale:
            path.unlink(missing_ok=True)
        if REASON is not None:
            package.mkdir(parents=True, exist_ok=True)
            (package / "_not_built.txt").write_text(REASON + "\n", encoding="utf-8")
        if not self.editable_mode:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "examples", package / "examples", ignore=ignore, dirs_exist_ok=True)


REASON = why_pure()
if REASON is not None:
    print(f"{PACKAGE}: no native kernels, a pure-Python install. {REASON}", file=sys.stderr)

setup(
    version=read_version() + ("" if REASON is None or "sdist" in sys.argv else "+pure"),
    ext_modules=[Extension(f"{PACKAGE}._C", sources=[])] if REASON is None else [],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
