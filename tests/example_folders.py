"""Folders of examples whose scripts import one another by their plain names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def first_on_path(folder: Path) -> Any:
    """A fixture for all tests of a file: Python looks first there, as if a script was started."""

    @pytest.fixture(autouse=True)
    def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.syspath_prepend(folder)
        yield
        for script in folder.glob("*.py"):
            sys.modules.pop(script.stem, None)

    return path
