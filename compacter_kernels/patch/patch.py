"""ck.patch and ck.unpatch: faster computation under the modules of other libraries, in place."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from compacter_kernels.patch import Entry, Report, phm_modules
from compacter_kernels.patch.methods import is_ours, restore

SUPPORTED = ("1.2.", "1.3.")  # versions of `adapters` in which the replaced methods are the same
SUPPORTED_PEFT = ("0.18.", "0.19.", "0.20.", "0.21.")  # the same of `peft`
SUPPORTED_LYCORIS = ("4.1.",)  # the same of `lycoris`
# These import `adapters`, `peft` and `lycoris`, so they are imported only where that is needed.
LIBRARY = "compacter_kernels.patch.adapters_library"
LOKR = "compacter_kernels.patch.peft_lokr"
LYCORIS = "compacter_kernels.patch.lycoris_lokr"


def patch(model: nn.Module | None = None, *, shortcuts: bool = False) -> Report:
    """Put the kernels under the adapters of a model, or under the library `adapters`.

    The model keeps its modules, Parameters and state dict. It computes the same function with the
    same gradients. These modules are recognised: the adapters of `adapters` 1.2 and 1.3 (of
    Compacter, and plain bottleneck adapters of up to 256 numbers), and modules built like PHMLinear
    and HyperComplexAdapter of OpenDelta, of T-Few and of the original repository. An adapter runs
    as one kernel where its options allow it; torch computes the options that the kernel does not
    have, before, between or after the projections. Otherwise each PHM layer runs as one kernel.
    `patch` does not change which parameters train: the `train_adapter` of `adapters` trains the
    rule in spite of `learn_phm=False`, patched or not.

    The linear layers of LoKr in `peft` 0.18 to 0.21 and in `lycoris` 4.1 are recognised, too. They
    run on `kronecker_linear` (`lokr`), and no matrix of the size of the weight is built. For
    `lycoris`, the model is the LycorisNetwork or the model that it was applied to.

    Patching again is harmless, and covers adapters that were added since. A patched model can be
    copied and pickled. It cannot run under nn.DataParallel, whose replicas would use the weights
    of the first one; a model that is covered by `ck.patch()` can.

    Args:
        model: any module. None: the classes of `adapters` in this process, for all models made
            before and later.
        shortcuts: leave out work that `adapters` does in every attention and linear layer and that
            most models do not need (`adapters_library`). This replaces two functions of
            `adapters` for every model of the process, with the same results, until the last model
            that was patched so is unpatched. Without a model they are always replaced; a model
            without this option replaces none.

    Returns:
        The modules that were patched and how, those that were not and why, and the two functions
        where the shortcuts are taken. It prints as a list.

    Raises:
        TypeError: model is no module.
        ValueError: a model without any such module, or shortcuts of a model without
            `adapters`.
        RuntimeError: `adapters` is not installed (without a model), or it, `peft` or `lycoris` is
            of a version not known.
    """
    if model is None:
        return Report(patched=_imported_library().patch_classes())
    _check_model(model)
    library: Any = _imported_library() if _has(model, "adapters.methods.modeling", "Adapter", "PHMLayer") else None
    lokr = _imported_lokr() if _has(model, "peft.tuners.lokr.layer", "LoKrLayer") else None
    lycoris = _imported_lycoris() if _has(model, "lycoris.modules.lokr", "LokrModule") else None
    handlers = [part.patch_module for part in (library, lokr, lycoris, phm_modules) if part is not None]
    if shortcuts and library is None:
        raise ValueError(
            f"shortcuts=True replaces functions of the library `adapters`, and {type(model).__name__} has no adapters "
            "of that library"
        )
    patched: list[Entry] = []
    skipped: list[Entry] = []
    reported: set[int] = set()  # modules that a line of the report covers, with the parts of whole adapters
    for name, module in _modules(model):
        done, note = next(filter(None, (handle(module) for handle in handlers)), (False, ""))
        if done and id(module) not in reported:
            patched.append(Entry(name, note))
            reported.update(map(id, module.modules()))
        elif note and not done:
            skipped.append(Entry(name, note))
    if not patched and not skipped:
        raise ValueError(
            f"{type(model).__name__} has no PHM layer: no module with phm_dim, phm_rule and W_left, W_right or W, as "
            "`adapters`, OpenDelta, T-Few and the original repository have them. It has no bottleneck adapter of "
            "`adapters`. It has no LoKr layer of `peft` either, nor one of `lycoris` that apply_to() put onto it. Add "
            "the adapter first; ck.patch() without a model covers `adapters` models made later"
        )
    if shortcuts and patched:
        patched += library.take_shortcuts(model)
    return Report(patched=tuple(patched), skipped=tuple(skipped))


def unpatch(model: nn.Module | None = None) -> Report:
    """Undo `patch(model)`, or `patch()`; harmless where nothing is patched.

    Raises:
        TypeError: model is no module.
    """
    library = sys.modules.get(LIBRARY)
    if model is None:
        return Report(restored=library.unpatch_classes()) if library else Report()
    _check_model(model)
    restored, skipped = [], []
    for name, module in _modules(model):
        if names := restore(module):
            restored.append(Entry(name, ", ".join(names)))
        elif is_ours(vars(module).get("_old_forward")):
            skipped.append(Entry(name, "its forward was wrapped after it was patched; remove that hook first"))
    if library:
        restored += library.give_back_shortcuts(model)
    return Report(restored=tuple(restored), skipped=tuple(skipped))


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules, and those of `lycoris` that replace a layer's forward without being in it."""
    seen: set[int] = set()
    for name, layer in model.named_modules():
        for module in (layer, *vars(layer).get("_lycoris_wrappers", ())):
            if id(module) not in seen:
                seen.add(id(module))
                yield name, module


def _has(model: nn.Module, path: str, *kinds: str) -> bool:
    """Whether the model has a module of these classes, whose file every such model has imported."""
    file = sys.modules.get(path)
    known = tuple(getattr(file, kind) for kind in kinds) if file else ()
    return any(isinstance(module, known) for _, module in _modules(model))


def _imported_lokr() -> Any:
    """`peft_lokr`, where `peft` has a version that it is written for."""
    version = sys.modules["peft"].__version__
    if not version.startswith(SUPPORTED_PEFT):
        raise RuntimeError(
            f"peft {version} is not known to ck.patch, which replaces a method of 0.18 to 0.21; install one of these"
        )
    return importlib.import_module(LOKR)


def _imported_lycoris() -> Any:
    """`lycoris_lokr`, where `lycoris` has a version that it is written for."""
    version = importlib.metadata.version("lycoris-lora")
    if not version.startswith(SUPPORTED_LYCORIS):
        raise RuntimeError(
            f"lycoris-lora {version} is not known to ck.patch, which replaces methods of 4.1; install that"
        )
    return importlib.import_module(LYCORIS)


def _imported_library() -> Any:
    """`adapters_library`, where `adapters` is installed in a version that it is written for."""
    try:
        importlib.import_module("adapters.methods.bottleneck")
    except ImportError as error:
        raise RuntimeError(
            f"ck.patch() without a model speeds up the library `adapters`, which cannot be imported ({error}); "
            "pip install adapters, or pass the model"
        ) from error
    version = sys.modules["adapters"].__version__
    if not version.startswith(SUPPORTED):
        raise RuntimeError(f"adapters {version} is not known to ck.patch, which replaces methods of 1.3; install that")
    return importlib.import_module(LIBRARY)
