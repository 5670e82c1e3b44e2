"""`convert`: a checkpoint of one library, or a live model, in the form of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compacter_kernels.activations import resolve
from compacter_kernels.checkpoints.convert import adapters, hypernets, ours
from compacter_kernels.checkpoints.convert.checkpoint import FACTORS, RULES, Checkpoint
from compacter_kernels.checkpoints.convert.flat import FLAT, read as read_flat, write as write_flat
from compacter_kernels.checkpoints.convert.places import relative
from compacter_kernels.checkpoints.convert.source import (
    ADAPTERS_HEAD,
    ADAPTERS_TENSORS,
    LAYERS,
    SIGNS,
    Source,
    format_of,
    open_source,
)
from compacter_kernels.checkpoints.files import TENSORS, read_tensors, write_file, write_folder
from compacter_kernels.checkpoints.format import of_model

FORMATS = tuple(SIGNS)
Rule = Tensor | tuple[Tensor, Tensor] | Mapping[str, Tensor] | str | Path


@dataclass
class Converted:
    """A checkpoint in the target's form, and what is to be said about it.

    tensors, and config where the form has one; head: tensors of a file of their own. losses: what the target cannot
    hold. notes: what was assumed.
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
) -> Converted:
    """Convert a Compacter checkpoint between libraries, value by value; docs/checkpoints.md lists the formats.

    Args:
        source: a safetensors file, the folder of a checkpoint or of a whole model, also in shards, a state dict, or a
            live model of any of the libraries.
        target_format: "compacter-kernels" (for `load_adapter`), "adapters", "original", "opendelta", "t-few",
            "hypernets", or "phm_linear" (the state dict of `PHMLinear` layers).
        target: where to write: a folder, for the formats without a config a .safetensors file. None: nowhere.
        source_format: of the same names; by default recognised by the names of the tensors.
        name: of the adapter, or of the authors' task, where the source has several.
        target_name: of the adapter or the task in a target that has names; by default `name`, or "default".
        model_type: `config.model_type`, where the source does not say it.
        non_linearity: of the adapters, where the source does not say it.
        phm_rule: the shared rule (or its two factors, or a safetensors file that holds it) for a source that lacks it.
        allow_loss: convert though the target cannot hold everything; what is lost is in `losses`.

    Returns:
        A `Converted`.

    Raises:
        TypeError, ValueError, FileNotFoundError: before anything is written: a source that is malformed, pickled,
            incomplete, or has what the target cannot compute; a loss that is not allowed.
    """
    for kind, what in ((target_format, "target_format"), (source_format, "source_format")):
        if kind not in FORMATS and not (kind is None and what == "source_format"):
            raise ValueError(f"{what}={kind!r} is not known; choose one of {', '.join(FORMATS)}")
    opened = open_source(source)
    source_format = source_format or format_of(opened)
    if source_format in LAYERS or target_format == "phm_linear":
        converted = _layers(opened, source_format, target_format)
    else:
        checkpoint = read(opened, source_format, name, model_type, non_linearity, phm_rule)
        converted = _write(checkpoint, source_format, target_format, target_name or name)
    if converted.losses and not allow_loss:
        raise ValueError(
            f"the format {target_format!r} cannot hold {'; '.join(converted.losses)}. allow_loss=True leaves it out"
        )
    if target is not None:
        _store(converted, Path(target))
    return converted


def read(
    source: Source,
    source_format: str,
    name: str | None = None,
    model_type: str | None = None,
    non_linearity: str | None = None,
    phm_rule: Rule | None = None,
) -> Checkpoint:
    """The checkpoint in a source, checked.

    Raises:
        TypeError, ValueError: as `convert`.
    """
    rule = None if phm_rule is None else _rule(phm_rule)
    if source_format == "compacter-kernels":
        checkpoint = ours.read(source, name)
    elif source_format == "adapters":
        source.tensors = relative(source.tensors)
        if model_type is not None:
            source.config = {**source.config, "model_type": model_type}
        checkpoint = adapters.read(source, name, rule)
    else:
        source.tensors = {**(rule or {}), **relative(source.tensors)}
        checkpoint = read_flat(source_format, source, name, model_type, non_linearity)
        checkpoint.model = {"model_type": model_type} if source.model is None else of_model(source.model)
    stated = checkpoint.options.get("non_linearity", "gelu_new")
    if non_linearity is not None and resolve(non_linearity) != resolve(stated):
        raise ValueError(f"non_linearity={non_linearity!r}, but the source says {stated!r}")
    checkpoint.check()
    return checkpoint


def _rule(given: Rule) -> dict[str, Tensor]:
    if isinstance(given, Tensor):
        return {"phm_rule": given}
    if isinstance(given, tuple):
        return dict(zip(("phm_rule_left", "phm_rule_right"), given, strict=True))
    tensors = dict(given) if isinstance(given, Mapping) else read_tensors(Path(given))
    names = {*RULES, *(name.replace("W", f"W_{position}") for name in FACTORS for position in ("down", "up"))}
    found = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] in names}
    if not found:
        raise ValueError(f"phm_rule: no tensor is named phm_rule; there are {', '.join(sorted(tensors)[:4])}")
    return found


def _layers(source: Source, source_format: str, target_format: str) -> Converted:
    if {source_format, target_format} - set(LAYERS):
        raise ValueError(
            f"{source_format!r} to {target_format!r}: hypernets and phm_linear are layers, without what makes them an "
            "adapter; they convert into each other, and adapters into hypernets"
        )
    plain = hypernets.read(source.tensors) if source_format == "hypernets" else source.tensors
    tensors = dict(plain) if target_format == "phm_linear" else hypernets.write(plain)
    return Converted(source_format, target_format, tensors)


def _write(checkpoint: Checkpoint, source_format: str, target_format: str, name: str | None) -> Converted:
    converted = Converted(source_format, target_format, {}, losses=checkpoint.losses, notes=checkpoint.notes)
    if target_format == "compacter-kernels":
        converted.tensors, converted.config = ours.write(checkpoint)
    elif target_format == "adapters":
        converted.tensors, converted.config, converted.head = adapters.write(checkpoint, name)
    elif target_format in FLAT:
        converted.tensors = write_flat(target_format, checkpoint, name)
    else:
        converted.tensors = hypernets.write(checkpoint)
    return converted


def _store(converted: Converted, target: Path) -> None:
    if converted.config is None:
        if target.suffix != ".safetensors":
            raise ValueError(
                f"{target}: the format {converted.target_format!r} is one file; give a name in .safetensors"
            )
        write_file(target, converted.tensors)
    elif converted.target_format == "adapters":
        pickled = target / "pytorch_adapter.bin"
        if pickled.exists():
            raise ValueError(
                f"{pickled} is there, which `adapters` may read instead; take it away, or give another folder"
            )
        files = {ADAPTERS_TENSORS: converted.tensors}
        files |= {ADAPTERS_HEAD: converted.head} if converted.head else {}
        write_folder(target, files, converted.config, digest=False)
    else:
        write_folder(target, {TENSORS: converted.tensors}, converted.config)
