"""Formats that are a model's state dict and no config: the authors' own, T-Few's and OpenDelta's.

They differ in the names before `down_sampler`; behind it all have the field's. Shared weights stand in every layer, the
authors' also at the root.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, zeros

from compacter_kernels.checkpoints.convert.checkpoint import POSITIONS, Checkpoint, options_of, share
from compacter_kernels.checkpoints.convert.places import head_of, heads_in, is_norm, placement, t5_block, t5_module
from compacter_kernels.checkpoints.convert.source import Source, non_linearity_in

NORMS = {"pre_layer_norm": "norm_before", "post_layer_norm": "norm_after"}
SHARED = r"phm_rule(_left|_right)?|W_(down|up)(_left|_right)?"


class Flat(NamedTuple):
    """A format: how the names begin, where that is in the model, and what the library does by default."""

    pattern: str  # with the groups where, task (or none), position, name
    module: Callable[[str], str]
    prefix: Callable[[str, str], str | None]  # of a module's name and a task's
    non_linearity: str
    norms: bool = False  # whether there can be layer norms in the adapter
    biases: bool = True  # whether projections always have one


_PROJECTION = r"(?P<position>down|up)_sampler\.(?P<name>[^.]+)"


def _in_block(between: str) -> Callable[[str, str], str | None]:
    def prefix(path: str, task: str) -> str | None:
        block = t5_block(path)
        return f"{block}.{between.format(task=task)}" if block else None

    return prefix


FLAT = {
    "original": Flat(
        rf"(?P<where>.*)\.adapter_controller\.(?:adapters\.(?P<task>[^.]+)\.{_PROJECTION}|(?P<norm>pre|post)_layer_norm\.(?P<part>\w+))",
        t5_module,
        _in_block("adapter_controller.adapters.{task}"),
        "gelu_new",
        norms=True,
    ),
    "t-few": Flat(rf"(?P<where>.*)\.adapter\.{_PROJECTION}", t5_module, _in_block("adapter"), "relu"),
    "opendelta": Flat(
        rf"(?P<where>.*)\.compactor\.{_PROJECTION}",
        lambda where: where,
        lambda path, task: f"{path}.compactor",
        "gelu_new",
        biases=False,
    ),
}


def read(kind: str, source: Source, name: str | None, model_type: str | None, non_linearity: str | None) -> Checkpoint:
    """The checkpoint in a state dict of that format.

    Raises:
        ValueError: adapters of several tasks and no name, or in places that the format does not have.
    """
    form = FLAT[kind]
    found = [(m, tensor) for key, tensor in source.tensors.items() if (m := re.fullmatch(form.pattern, key))]
    tasks = sorted({m["task"] for m, _ in found if m.groupdict().get("task")})
    if name is None and len(tasks) > 1:
        raise ValueError(f"there are adapters of {len(tasks)} tasks; give name=, one of {', '.join(tasks)}")
    if name is not None and tasks and name not in tasks:
        raise ValueError(f"there are no adapters of the task {name!r}; there are {', '.join(tasks)}")
    adapters: dict[str, dict[str, Tensor]] = {}
    for m, tensor in found:
        groups = m.groupdict()
        if groups.get("norm"):
            key = f"{NORMS[groups['norm'] + '_layer_norm']}.{groups['part']}"
        elif groups.get("task") in (None, name or (tasks or [None])[0]):
            key = f"{groups['position']}.{groups['name']}"
        else:
            continue
        adapters.setdefault(form.module(m["where"]), {})[key] = tensor
    if not adapters:
        raise ValueError(f"no adapters of the format {kind!r} are in it")
    given = {key: tensor for key, tensor in source.tensors.items() if re.fullmatch(SHARED, key)}
    for tensors in adapters.values():  # a file may hold what is shared at the root alone
        for key, tensor in given.items():
            for position in POSITIONS:
                if not key.startswith("W") or key.startswith(f"W_{position}"):
                    tensors.setdefault(f"{position}.{key.replace(f'W_{position}', 'W')}", tensor)
    shared = share(adapters)
    options = options_of(adapters, shared) | placement(adapters, model_type) | _of_config(source.config)
    checkpoint = Checkpoint(adapters, shared, options=options)
    norms = {key: t for key, t in source.tensors.items() if is_norm(key) and "adapter" not in key and not head_of(key)}
    heads = {key: t for key, t in source.tensors.items() if head_of(key)}
    checkpoint.copies = norms | heads
    options |= {"train_layer_norms": bool(norms), "modules_to_save": heads_in(heads)}
    stated = options.get("non_linearity") or non_linearity_in(source.model) or non_linearity
    options["non_linearity"] = stated or form.non_linearity
    if stated is None:
        checkpoint.notes.append(
            f"such a file does not say the activation: {form.non_linearity!r} is taken, the default of {kind}; "
            "non_linearity= sets another"
        )
    return checkpoint


def _of_config(config: dict[str, Any]) -> dict[str, Any]:
    """What OpenDelta's config.json says beyond the weights."""
    if config.get("delta_type") != "compacter":
        return {}
    names = ("non_linearity", "learn_phm", "phm_c_init", "phm_init_range")
    return {name: config[name] for name in names if config.get(name) is not None}


def write(kind: str, checkpoint: Checkpoint, name: str | None) -> dict[str, Tensor]:
    """The state dict of the adapters in that format, and of the layer norms that were trained with them.

    Raises:
        ValueError: an option, or a place, that the format does not have.
    """
    form, config = FLAT[kind], checkpoint.config
    wrong = {
        "scaling": config.scaling != 1.0,
        "is_parallel": config.is_parallel,
        "ln_before": config.ln_before and not form.norms,
        "ln_after": config.ln_after and not form.norms,
        "adapter_residual_before_ln": config.ln_after and config.adapter_residual_before_ln,
        "cross_adapter": kind == "original" and any("EncDecAttention" in place for place in checkpoint.adapters),
    }
    for option in (option for option, cannot in wrong.items() if cannot):
        raise ValueError(f"{option}={getattr(config, option)!r}: adapters of the format {kind!r} have no such thing")
    tensors: dict[str, Tensor] = {}
    if kind == "original":
        tensors |= checkpoint.shared
    for place, own in checkpoint.whole():
        prefix = form.prefix(place, name or "default")
        if prefix is None:
            raise ValueError(f"the format {kind!r} is for T5 alone, and has no place for an adapter after {place}")
        for key, tensor in own.items():
            position, _, rest = key.partition(".")
            if position in POSITIONS:
                tensors[f"{prefix}.{position}_sampler.{rest}"] = tensor
            else:
                norm = {ours: theirs for theirs, ours in NORMS.items()}[position]
                tensors[f"{prefix.partition('.adapters.')[0]}.{norm}.{rest}"] = tensor
        if form.biases and not config.phm_bias:
            for position in POSITIONS:
                right = own.get(f"{position}.W_right", own.get(f"{position}.W"))
                assert right is not None
                tensors[f"{prefix}.{position}_sampler.b"] = zeros(right.shape[0] * right.shape[2], dtype=right.dtype)
    tensors |= checkpoint.copies
    if kind != "original" and checkpoint.shared:
        checkpoint.notes.append(
            f"{', '.join(checkpoint.shared)} is repeated in each adapter, and would train apart there"
        )
    checkpoint.notes.append(
        f"such a file does not say the activation: build the model with {config.non_linearity!r}, "
        f"reduction factor {config.reduction_factor} and phm_dim {config.phm_dim}"
    )
    if not all(map(t5_block, checkpoint.adapters)):
        checkpoint.notes.append(
            "names are those in the model's base: put `bert.` or the like before them for a model with a head"
        )
    return tensors
