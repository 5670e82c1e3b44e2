"""`convert`: a checkpoint of one library, or a live model, in the form of another."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from compacter_kernels.activations import resolve
from compacter_kernels.checkpoints import adapters, compacter_kernels as ours, hypernets, peft, state_dicts
from compacter_kernels.checkpoints.checkpoint import Checkpoint, Written
from compacter_kernels.checkpoints.files import TENSORS, write_folder
from compacter_kernels.checkpoints.methods import COMPACTER, METHODS
from compacter_kernels.checkpoints.source import ADAPTERS_HEAD, ADAPTERS_TENSORS, Rule, Source, open_source
from compacter_kernels.targets.added import adapters_of


class Format(NamedTuple):
    """How to recognise, read and write adapters; a format of single layers cannot be read."""

    sign: str  # a regular expression for names of tensors that occur in this format alone
    read: Callable[[Source], Checkpoint] | None = None
    write: Callable[[Checkpoint, str | None], Written] | None = None
    dense: bool = False  # whether it also holds plain bottleneck adapters
    residual: bool = False  # whether it also holds adapters with original_ln_before


def _state_dict(adapter: str, form: state_dicts.StateDict) -> Format:
    sign = rf".*\.{adapter}\.(down|up)_sampler\..*"
    return Format(sign, partial(state_dicts.read, form), partial(state_dicts.write, form))


FORMATS = {
    "compacter-kernels": Format(
        r"(.*\.)?compacter(\.|_)(down|up|shared)(\.|_).*", ours.read, peft.write, residual=True
    ),
    "peft": Format(r".*\.bottleneck_adapter_(down|up)_.*", peft.read, peft.write, True, True),
    "adapters": Format(adapters.SIGN, adapters.read, adapters.write, True, True),
    "original": _state_dict(r"adapter_controller\.adapters\.[^.]+", state_dicts.ORIGINAL),
    "opendelta": _state_dict("compactor", state_dicts.OPENDELTA),
    "t-few": _state_dict("adapter", state_dicts.T_FEW),
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
    method = source.config.get("peft_type")
    if method not in (None, *METHODS):
        raise ValueError(f"it holds adapters of another method than Compacter and Bottleneck, peft_type {method!r}")
    fitting = [kind for kind, form in FORMATS.items() if any(re.fullmatch(form.sign, key) for key in source.tensors)]
    fitting = [kind for kind in fitting if kind not in LAYERS] or fitting[:1]  # adapters contain layers
    if not fitting and source.is_whole_model():
        model_type = source.config["model_type"]
        raise ValueError(f"it holds a whole model of the type {model_type!r}, and no Compacter adapters")
    if len(fitting) != 1:
        names = " and ".join(fitting) or f"no format: {', '.join(sorted(source.tensors)[:4]) or 'none'}"
        raise ValueError(f"the names of the tensors fit {names}; give source_format=, one of {', '.join(FORMATS)}")
    return fitting[0]


@dataclass
class Converted:
    """A checkpoint in the target format.

    config: the content of the config file, None if the format has none. head: the tensors of a
    separate file for the head. losses: what the format cannot hold. notes: what was assumed.
    """

    source_format: str
    target_format: str
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    head: dict[str, Tensor] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path | Mapping[str, Tensor] | nn.Module,
    target_format: str,
    target: str | Path | None = None,
    *,
    source_format: str | None = None,
    name: str | None = None,
    target_name: str | None = None,
    model_type: str | None = None,
    non_linearity: str | None = None,
    phm_rule: Rule | None = None,
    allow_loss: bool = False,
    allow_pickle: bool = False,
) -> Converted:
    """Convert a checkpoint of one library into the form of another, value by value.

    docs/checkpoints.md describes the formats. Values keep their dtypes.

    Args:
        source: a safetensors file, the folder of a checkpoint or of a whole model, also in shards,
            a state dict, or a live model of any of the libraries.
        target_format: "compacter-kernels" (for `load_adapter` and peft), "peft" (also plain
            bottleneck adapters), "adapters", "original", "opendelta", "t-few", "hypernets", or
            "phm_linear" (the state dict of `PHMLinear`).
        target: the folder to write, or the .safetensors file for a format without a config; None
            writes nothing.
        source_format: one of the same names; by default it is recognised by the tensors' names.
        name: of the adapter, or of the authors' task, if the source has several.
        target_name: of the adapter or the task in the target; by default `name`, or "default".
        model_type: `config.model_type` of the base model, if the source does not say it.
        non_linearity: the activation of the adapters, if the source does not say it.
        phm_rule: the shared rule (or its two factors, or a safetensors file with it), if the source
            lacks it.
        allow_loss: convert even if the target format cannot hold everything; see `losses`.
        allow_pickle: read the pytorch_adapter.bin of an `adapters` folder, as most of those on the
            hub have, with torch.load(weights_only=True), which reads tensors and runs no code.

    Returns:
        `tensors`, `config` and `head`, which are written; `losses`, what the target format cannot
        hold; `notes`, what was assumed.

    Raises:
        TypeError, ValueError, FileNotFoundError: The source is malformed, pickled or incomplete, or
            the target cannot compute the same, or there is a loss that is not allowed. Nothing was
            written.
    """
    for option, kind in (("target_format", target_format), ("source_format", source_format)):
        if kind not in FORMATS and not (kind is None and option == "source_format"):
            raise ValueError(f"{option}={kind!r} is not known; choose one of {', '.join(FORMATS)}")
    told = {"name": name, "model_type": model_type, "non_linearity": non_linearity}
    opened = open_source(source, phm_rule=phm_rule, allow_pickle=allow_pickle, **told)
    source_format = source_format or format_of(opened)
    write = FORMATS[target_format].write
    if source_format in LAYERS and target_format in LAYERS:
        layers = hypernets.to_phm_linear(opened.tensors) if source_format == "hypernets" else opened.tensors
        layers = hypernets.from_phm_linear(layers) if target_format == "hypernets" else dict(layers)
        converted = Converted(source_format, target_format, layers)
    elif source_format in LAYERS or write is None:
        raise ValueError(
            f"{source_format!r} to {target_format!r}: hypernets and phm_linear are layers, without what makes them an "
            "adapter; they convert into each other, and adapters into hypernets"
        )
    else:
        checkpoint = read(opened, source_format)
        _check_held(checkpoint, target_format)
        written = write(checkpoint, target_name or name)
        converted = Converted(source_format, target_format, *written, checkpoint.losses, checkpoint.notes)
    if converted.losses and not allow_loss:
        losses = "; ".join(converted.losses)
        raise ValueError(f"the format {target_format!r} cannot hold {losses}. allow_loss=True leaves it out")
    if target is not None:
        _store(converted, Path(target))
    return converted


def _check_held(checkpoint: Checkpoint, target_format: str) -> None:
    """Raise ValueError if the format does not hold such adapters."""
    if checkpoint.method != COMPACTER and not FORMATS[target_format].dense:
        raise ValueError(
            "phm_layer=False cannot be converted: these are plain bottleneck adapters, not Compacter. Convert them to "
            "'peft'"
        )
    if checkpoint.config.original_ln_before and not FORMATS[target_format].residual:
        raise ValueError(
            "original_ln_before=True cannot be converted: it reads the block's output plus the residual, as "
            f"Compacter++ of `adapters` does; adapters of {target_format!r} read the block's output alone"
        )


def read(source: Source, source_format: str) -> Checkpoint:
    """Return the checkpoint in a source of this format, checked; raise errors as `convert` does."""
    read_format = FORMATS[source_format].read
    assert read_format is not None
    checkpoint = read_format(source)
    stated = checkpoint.options.get("non_linearity", "gelu_new")
    if source.non_linearity is not None and resolve(source.non_linearity) != resolve(stated):
        raise ValueError(f"non_linearity={source.non_linearity!r}, but the source says {stated!r}")
    if checkpoint.options.get("embedding_adapter"):
        raise ValueError("embedding_adapter=True cannot be converted: no other format has adapters of embeddings")
    checkpoint.check()
    return checkpoint


def _store(converted: Converted, target: Path) -> None:
    if converted.config is None:
        if target.suffix != ".safetensors":
            kind = converted.target_format
            raise ValueError(f"{target}: the format {kind!r} is one file; give a name in .safetensors")
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder; give a file")
        write_folder(target.parent, {target.name: converted.tensors}, None)
    elif converted.target_format == "adapters":
        for stale in ("pytorch_adapter.bin", *(() if converted.head else (ADAPTERS_HEAD,))):
            if (target / stale).exists():
                problem = "which `adapters` may read instead; take it away, or give another folder"
                raise ValueError(f"{target / stale} is there, {problem}")
        files = {ADAPTERS_TENSORS: converted.tensors} | ({ADAPTERS_HEAD: converted.head} if converted.head else {})
        write_folder(target, files, converted.config)
    else:
        write_folder(target, {TENSORS: converted.tensors}, converted.config)
