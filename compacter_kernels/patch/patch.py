"""ck.patch and ck.unpatch: the kernels under the Compacter modules of other libraries, in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from compacter_kernels.patch.instances import is_ours, restore
from compacter_kernels.patch.patch_library import loaded, patch_library, unpatch_library
from compacter_kernels.patch.patch_model import patch_model
from compacter_kernels.patch.report import Entry, Report


def patch(model: nn.Module | None = None) -> Report:
    """Put the kernels under the Compacter modules that are in a model, or under the whole library `adapters`.

    The model keeps its modules, Parameters and state dict and computes the same function with the same gradients. What
    is recognised: the adapters of `adapters` 1.3, and modules built like OpenDelta's, T-Few's and the original
    repository's PHMLinear and HyperComplexAdapter. An adapter runs as one kernel where its options let it, with what is
    between or around its projections done in torch; where they do not, its PHM layers run one by one. What `adapters`
    does in every attention and linear layer for other methods is left out (`library_shortcuts`), with the same results
    and for every model of the process, until the last patched one is unpatched. What trains is left as it was:
    `learn_phm=False` is undone by the `train_adapter` of `adapters`, patched or not.

    Patching again is harmless, and covers adapters added since. A patched model can be copied and pickled, but not run
    under nn.DataParallel, whose replicas would call the first one's weights; ck.patch() without a model can.

    Args:
        model: any module. None: the classes of `adapters` in this process, for all models made before and later.

    Returns:
        what was patched and how, what was left and why; it prints as a list.

    Raises:
        TypeError: model is no module.
        ValueError: a model without any PHM layer.
        RuntimeError: `adapters` is not installed (without a model), or is of a version not known.
    """
    if model is None:
        return patch_library()
    _check_model(model)
    report = patch_model(model)
    if not report.patched and not report.skipped:
        raise ValueError(
            f"{type(model).__name__} has no PHM layer: no module with phm_dim, phm_rule and W_left, W_right or W, as "
            "`adapters`, OpenDelta, T-Few and the original repository have them. Add the adapter first; "
            "ck.patch() without a model covers `adapters` models made later"
        )
    return report


def unpatch(model: nn.Module | None = None) -> Report:
    """Undo `patch(model)`, or `patch()`; harmless where nothing is patched.

    Raises:
        TypeError: model is no module.
    """
    if model is None:
        return unpatch_library()
    _check_model(model)
    restored, skipped = [], []
    for name, module in model.named_modules():
        if names := restore(module):
            restored.append(Entry(name, ", ".join(names)))
        elif is_ours(vars(module).get("_old_forward")):
            skipped.append(Entry(name, "its forward was wrapped after it was patched; remove that hook first"))
    if shortcuts := loaded("library_shortcuts"):
        restored += shortcuts.give_back(model)
    return Report(restored=tuple(restored), skipped=tuple(skipped))


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
