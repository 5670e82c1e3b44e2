"""The library `adapters` as a whole: its methods replaced on the classes."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from compacter_kernels.patch.report import Entry, Report

SUPPORTED = ("1.2.", "1.3.")  # of `adapters`: where the methods that are replaced read the same


def part_of_ours(name: str) -> Any:
    """Our module of that name, which imports `adapters`, in the one version that it is written for.

    Raises:
        RuntimeError: another version, whose methods may be others than those that are replaced.
    """
    version = sys.modules["adapters"].__version__
    if not version.startswith(SUPPORTED):
        raise RuntimeError(f"adapters {version} is not known to ck.patch, which replaces methods of 1.3; install that")
    return importlib.import_module(f"compacter_kernels.patch.{name}")


def loaded(name: str) -> Any:
    """Our module of that name, if anything needed it in this process."""
    return sys.modules.get(f"compacter_kernels.patch.{name}")


def serves(model: nn.Module) -> bool:
    """Whether the model has bottleneck adapters or PHM layers of `adapters`."""
    modeling = sys.modules.get("adapters.methods.modeling")  # nothing of it is in a process that never imported it
    return modeling is not None and any(isinstance(m, (modeling.Adapter, modeling.PHMLayer)) for m in model.modules())


def patch_library() -> Report:
    """Put the functions in the place of the methods of `adapters`."""
    try:
        importlib.import_module("adapters.methods.bottleneck")
    except ImportError as error:
        raise RuntimeError(
            f"ck.patch() without a model speeds up the library `adapters`, which cannot be imported ({error}); "
            "pip install adapters"
        ) from error
    ours, layers, shortcuts = map(part_of_ours, ("adapters_library", "adapters_layer", "library_shortcuts"))
    patched = []
    for (kind, name), stand_in in (ours.STAND_INS | layers.STAND_INS).items():
        ours.originals.setdefault((kind, name), vars(kind)[name])
        setattr(kind, name, stand_in)
        patched.append(_entry(kind, name))
    shortcuts.take(sys.modules["adapters"])
    return Report(patched=(*patched, *shortcuts.ENTRIES))


def unpatch_library() -> Report:
    """Put the methods of `adapters` back."""
    ours, shortcuts = loaded("adapters_library"), loaded("library_shortcuts")
    if shortcuts is None:
        return Report()
    restored = []
    for (kind, name), method in list(ours.originals.items()):
        setattr(kind, name, method)
        del ours.originals[kind, name]
        restored.append(_entry(kind, name))
    return Report(restored=(*restored, *shortcuts.give_back(sys.modules["adapters"])))


def _entry(kind: type, name: str) -> Entry:
    return Entry(f"{kind.__module__}.{kind.__qualname__}.{name}", "for every model of this process")
