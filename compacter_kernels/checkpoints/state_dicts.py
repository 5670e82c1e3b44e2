"""The formats of the authors ("original"), T-Few and OpenDelta: a model's state dict, no config.

They differ in the names before `down_sampler` and `up_sampler`; the names after it are those of
`PHMLinear`. Each adapter has a copy of the shared weights. The authors' state dict also has them at
its root.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compacter_kernels.checkpoints import names
from compacter_kernels.checkpoints.checkpoint import POSITIONS, SHARED, Checkpoint, Written, borrowed, sizes
from compacter_kernels.checkpoints.files import of_model
from compacter_kernels.checkpoints.source import Source

PARTS = {"down_sampler": "down", "up_sampler": "up"}
PARTS |= {"pre_layer_norm": "norm_before", "post_layer_norm": "norm_after"}  # The authors' code alone has these.
_FROM_OPENDELTA = ("non_linearity", "learn_phm", "phm_c_init", "phm_init_range")


class StateDict(NamedTuple):
    """How a library names the tensors of an adapter, and what it does by default."""

    kind: str  # the name of the format
    holder: str  # the child of a T5's block, or else of the target, that holds the adapter
    non_linearity: str
    t5: bool = True  # whether the format is for T5 alone, and its projections always have a bias


ORIGINAL = StateDict("original", "adapter_controller", "gelu_new")  # It holds adapters.TASK and the layer norms.
T_FEW = StateDict("t-few", "adapter", "relu")
OPENDELTA = StateDict("opendelta", "compactor", "gelu_new", t5=False)


def read(form: StateDict, source: Source) -> Checkpoint:
    """Return the checkpoint in a state dict of this form; ValueError if it has no adapters."""
    state = {**source.given, **names.names_in_base(source.tensors)}
    pattern = re.compile(
        rf"(?P<block>.*)\.{form.holder}\.(?:adapters\.(?P<task>[^.]+)\.)?(?P<part>{'|'.join(PARTS)})\.(?P<name>[^.]+)"
    )
    matches = {key: match for key in state if (match := pattern.fullmatch(key))}
    tasks = sorted({match["task"] for match in matches.values() if match["task"]})
    task = source.choose(tasks, "task") if tasks else None
    checkpoint = Checkpoint()
    for key, match in matches.items():
        if match["task"] in (None, task):
            target = names.t5_target(match["block"]) if form.t5 else match["block"]
            checkpoint.adapters.setdefault(target, {})[f"{PARTS[match['part']]}.{match['name']}"] = state[key]
    if not checkpoint.adapters:
        raise ValueError(f"no adapters of the format {form.kind!r} are in it")
    at_root = borrowed({key: state[key] for key in SHARED if key in state})
    checkpoint.adapters = {target: {**at_root, **adapter} for target, adapter in checkpoint.adapters.items()}
    checkpoint.check_dtypes()
    checkpoint.share_equal_weights()
    heads = {key: tensor for key, tensor in state.items() if names.head_of(key)}
    norms = {key: t for key, t in state.items() if names.is_norm(key) and "adapter" not in key and key not in heads}
    checkpoint.copies = norms | heads
    checkpoint.model = {"model_type": source.model_type} if source.model is None else of_model(source.model)
    options = checkpoint.options_of_weights() | names.target_options(checkpoint.adapters, source.model_type)
    options |= {"train_layer_norms": bool(norms), "modules_to_save": sorted({key.partition(".")[0] for key in heads})}
    if source.config.get("delta_type") == "compacter":  # OpenDelta wrote it.
        options |= {key: source.config[key] for key in _FROM_OPENDELTA if source.config.get(key) is not None}
    stated = options.get("non_linearity") or _non_linearity_in(source.model) or source.non_linearity
    checkpoint.options = {**options, "non_linearity": stated or form.non_linearity}
    if stated is None:
        checkpoint.notes.append(
            f"such a file does not say the activation: {form.non_linearity!r} is taken, the default of {form.kind}; "
            "non_linearity= sets another"
        )
    return checkpoint


def _non_linearity_in(model: nn.Module | None) -> str | None:
    """Return the name of the activation that the adapters of a live model have as an attribute."""
    for module in model.modules() if model is not None else ():
        if hasattr(module, "down_sampler") or hasattr(module, "up_sampler"):
            config = getattr(module, "config", None)
            owners = ((module, "non_linearity"), (config, "non_linearity"), (config, "adapter_non_linearity"))
            for owner, name in owners:
                if isinstance(value := getattr(owner, name, None), str):
                    return value
    return None


def write(form: StateDict, checkpoint: Checkpoint, name: str | None) -> Written:
    """Return the state dict of what was trained; ValueError if the format cannot compute it."""
    config, original = checkpoint.config, form is ORIGINAL
    unsupported = {
        "scaling": config.scaling != 1.0,
        "is_parallel": config.is_parallel,
        "ln_before": config.ln_before and not original,
        "ln_after": config.ln_after and not original,
        "adapter_residual_before_ln": config.ln_after and config.adapter_residual_before_ln,
        "cross_adapter": original and any("EncDecAttention" in target for target in checkpoint.adapters),
    }
    option = next((option for option, used in unsupported.items() if used), None)
    if option is not None:
        value = getattr(config, option)
        raise ValueError(f"{option}={value!r}: adapters of the format {form.kind!r} have no such thing")
    state: dict[str, Tensor] = dict(checkpoint.shared) if original else {}
    theirs = {ours: part for part, ours in PARTS.items()}
    for target, adapter in checkpoint.whole().items():
        block = names.t5_block(target) if form.t5 else target
        if block is None:
            raise ValueError(f"the format {form.kind!r} is for T5 alone, and cannot hold an adapter after {target}")
        holder = f"{block}.{form.holder}"
        prefix = f"{holder}.adapters.{name or 'default'}" if original else holder
        for key, tensor in adapter.items():
            part, _, rest = key.partition(".")
            state[f"{prefix if part in POSITIONS else holder}.{theirs[part]}.{rest}"] = tensor
        if form.t5 and not config.phm_bias:
            hidden, bottleneck = sizes(adapter)
            dtype = adapter["down.W_right" if config.factorized_phm_W else "down.W"].dtype
            state[f"{prefix}.down_sampler.b"] = torch.zeros(bottleneck, dtype=dtype)
            state[f"{prefix}.up_sampler.b"] = torch.zeros(hidden, dtype=dtype)
    state |= checkpoint.copies
    if checkpoint.shared and not original:
        repeated = ", ".join(checkpoint.shared)
        checkpoint.notes.append(f"{repeated} is repeated in each adapter, and would train apart there")
    checkpoint.notes.append(
        f"such a file does not say the activation: build the model with {config.non_linearity!r}, "
        f"reduction factor {config.reduction_factor} and phm_dim {config.phm_dim}"
    )
    if not all(map(names.t5_block, checkpoint.adapters)):
        checkpoint.notes.append(
            "names are those in the model's base: put `bert.` or the like before them for a model with a head"
        )
    return state, None, {}
