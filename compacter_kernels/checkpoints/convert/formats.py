"""The table of formats, and how the format of a source is recognised."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from compacter_kernels.checkpoints.convert import adapters, compacter_kernels, hypernets
from compacter_kernels.checkpoints.convert.checkpoint import Checkpoint, Written
from compacter_kernels.checkpoints.convert.source import Source
from compacter_kernels.checkpoints.convert.state_dicts import OPENDELTA, ORIGINAL, T_FEW, StateDict, read, write
from compacter_kernels.checkpoints.format import PEFT_TYPE
from compacter_kernels.targets.added import adapters_of


class Format(NamedTuple):
    """How to recognise, read and write adapters; a format of single layers cannot be read."""

    sign: str  # a regular expression for names of tensors that occur in this format alone
    read: Callable[[Source], Checkpoint] | None = None
    write: Callable[[Checkpoint, str | None], Written] | None = None


def _state_dict(adapter: str, form: StateDict) -> Format:
    return Format(rf".*\.{adapter}\.(down|up)_sampler\..*", partial(read, form), partial(write, form))


FORMATS = {
    "compacter-kernels": Format(
        r"(.*\.)?compacter\.(down|up|shared)\..*", compacter_kernels.read, compacter_kernels.write
    ),
    "adapters": Format(r".*\.adapters\.[^.]+\.adapter_(down|up)\..*", adapters.read, adapters.write),
    "original": _state_dict(r"adapter_controller\.adapters\.[^.]+", ORIGINAL),
    "opendelta": _state_dict("compactor", OPENDELTA),
    "t-few": _state_dict("adapter", T_FEW),
    "hypernets": Format(r"(.*\.)?[as]", write=hypernets.write),
    "phm_linear": Format(r"(.*\.)?(phm_rule(_left)?)"),
}
LAYERS = tuple(kind for kind, form in FORMATS.items() if form.read is None)


def format_of(source: Source) -> str:
    """Return the format of a source, by its model or tensors' names, or raise ValueError."""
    if adapters_of(source.model) is not None:
        return "compacter-kernels"
    if getattr(source.model, "adapters_config", None) is not None:
        return "adapters"
    method = source.config.get("peft_type", PEFT_TYPE)
    if method != PEFT_TYPE:
        raise ValueError(f"it holds adapters of another method than Compacter, peft_type {method!r}")
    fitting = [kind for kind, form in FORMATS.items() if any(re.fullmatch(form.sign, key) for key in source.tensors)]
    fitting = [kind for kind in fitting if kind not in LAYERS] or fitting[:1]  # adapters contain layers
    if not fitting and source.is_whole_model():
        model_type = source.config["model_type"]
        raise ValueError(f"it holds a whole model of the type {model_type!r}, and no Compacter adapters")
    if len(fitting) != 1:
        names = ", ".join(sorted(source.tensors)[:4]) or "none"
        problem = f"fit {' and '.join(fitting)}" if fitting else f"fit no format: {names}"
        raise ValueError(f"the names of the tensors {problem}; give source_format=, one of {', '.join(FORMATS)}")
    return fitting[0]
