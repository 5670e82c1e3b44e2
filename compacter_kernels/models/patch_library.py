"""The library `adapters` as a whole: its methods replaced on the classes."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from compacter_kernels.models import adapters_library, attention_copies
from compacter_kernels.models.report import Entry, Report

SUPPORTED = ("1.2.", "1.3.")  # of `adapters`: where the methods that are replaced read the same
_METHODS = (
    ("Adapter", "forward", adapters_library.bottleneck),
    ("ParallelAdapter", "forward", adapters_library.bottleneck),
    ("PHMLayer", "forward", adapters_library.projection),
    ("BottleneckLayer", "compose_single", adapters_library.compose_single),
    ("BottleneckLayer", "bottleneck_layer_forward", adapters_library.layer_forward),
)


def imported_library() -> Any:
    """`adapters.methods.bottleneck`, which names the classes that hold adapters; None where it was never imported."""
    return sys.modules.get("adapters.methods.bottleneck")


def check_version() -> None:
    """Raise RuntimeError for an `adapters` whose methods may be others than those that are replaced."""
    version = sys.modules["adapters"].__version__
    if not version.startswith(SUPPORTED):
        raise RuntimeError(f"adapters {version} is not known to ck.patch, which replaces methods of 1.3; install that")


def patch_library() -> Report:
    """Put the functions in the place of the methods of `adapters`."""
    try:
        importlib.import_module("adapters.methods.bottleneck")
    except ImportError as error:
        raise RuntimeError(
            f"ck.patch() without a model speeds up the library `adapters`, which cannot be imported ({error}); "
            "pip install adapters"
        ) from error
    check_version()
    patched = []
    for kind, name, function in _targets():
        adapters_library.originals.setdefault((kind, name), vars(kind)[name])
        setattr(kind, name, function)
        patched.append(Entry(f"{kind.__module__}.{kind.__qualname__}.{name}", "for every model of this process"))
    attention_copies.leave_out(sys.modules["adapters"])
    return Report(patched=(*patched, attention_copies.ENTRY))


def unpatch_library() -> Report:
    """Put the methods of `adapters` back."""
    restored = []
    for (kind, name), method in list(adapters_library.originals.items()):
        setattr(kind, name, method)
        del adapters_library.originals[kind, name]
        restored.append(Entry(f"{kind.__module__}.{kind.__qualname__}.{name}", "for every model of this process"))
    if attention_copies.put_back(sys.modules.get("adapters")):
        restored.append(attention_copies.ENTRY)
    return Report(restored=tuple(restored))


def _targets() -> list[tuple[type, str, Any]]:
    places = [sys.modules[f"adapters.methods.{name}"] for name in ("bottleneck", "modeling")]
    kinds = {kind: next(vars(place)[kind] for place in places if kind in vars(place)) for kind, _, _ in _METHODS}
    return [(kinds[kind], name, function) for kind, name, function in _METHODS]
