"""`compacter-kernels train`: the training scripts of the folder `examples`, under one command.

The scripts are made to be read and copied. A wheel installs them as `compacter_kernels/examples`.
In a checkout, and with an editable install, they lie beside the package. `examples/train_any.py`
joins their options and chooses the script that these ask for.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

SCRIPT = "train_any"


def folder() -> Path:
    """The folder of the training scripts; FileNotFoundError unless in or beside the package."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "examples", package.parent / "examples"):
        if (candidate / f"{SCRIPT}.py").is_file():
            return candidate
    raise FileNotFoundError(
        f"the training scripts are neither in {package / 'examples'} nor in {package.parent / 'examples'}: "
        "install compacter-kernels again, or copy the folder examples of its repository there"
    )


def _script() -> Any:
    """The script of that folder. The scripts import each other by their plain names."""
    if str(folder()) not in sys.path:
        sys.path.insert(0, str(folder()))
    return importlib.import_module(SCRIPT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `train`."""
    _script().add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the script that the options ask for."""
    code: int = _script().run(args)
    return code
