"""The format of the `adapters` library 1.3.0: `adapter.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from compacter_kernels.checkpoints import names
from compacter_kernels.checkpoints.adapters_heads import read_heads
from compacter_kernels.checkpoints.adapters_options import (
    FIXED,
    OF_START,
    SAME,
    check_parallel,
    compositions,
    find_config,
    read_options,
)
from compacter_kernels.checkpoints.checkpoint import Checkpoint, MissingRuleError, Written, sizes
from compacter_kernels.checkpoints.files import about_model, of_model
from compacter_kernels.checkpoints.methods import BOTTLENECK, COMPACTER
from compacter_kernels.checkpoints.source import Source
from compacter_kernels.targets.architectures import ARCHITECTURES

VERSION = "adapters.1.3.0"
_LEGACY = r"(?:attention|layer)_text_(?:task|lang)_adapters"  # what versions before 2 called `adapters`
SIGN = rf".*\.(?:adapters|{_LEGACY})\.[^.]+\.adapter_(down|up)\..*"
# The kind of a block -> the module in a layer that holds its adapters.
_IN_BERT = {"attention": "attention.output", "feed_forward": "output", "cross_attention": "crossattention.output"}
_IN_OTHERS = {kind: f"{kind}_adapters" for kind in ("attention", "cross_attention")}
_IN_OTHERS["feed_forward"] = "output_adapters"
_IN_VIT = _IN_OTHERS | {"feed_forward": "output.output_adapters"}
_KINDS = {holder: kind for holders in (_IN_BERT, _IN_VIT, _IN_OTHERS) for kind, holder in holders.items()}


def read(source: Source) -> Checkpoint:
    """Return the checkpoint in a source; ValueError if its adapters compute what ours do not."""
    tensors = names.names_in_base({re.sub(_LEGACY, "adapters", key): tensor for key, tensor in source.tensors.items()})
    config, name = find_config(source)
    model = about_model(source.config) if source.model is None else of_model(source.model)
    model_type = model["model_type"] = (source.model is None and source.model_type) or model["model_type"]
    model["base_model_name_or_path"] = model["base_model_name_or_path"] or source.config.get("model_name")
    unused = source.config.get("type") == "text_task" and not any("invertible" in key for key in tensors)
    method, options = read_options(config, model_type, unused)
    checkpoint = Checkpoint(method=method, options=options, model=model, losses=compositions(source, name))
    for key, tensor in tensors.items():
        holder, in_adapter, rest = key.rpartition(f".adapters.{name}.")
        _, is_shared, shared_name = f".{key}".rpartition(f".shared_parameters.{name}.")
        if is_shared:
            checkpoint.shared[shared_name] = tensor
        elif in_adapter:
            adapter = checkpoint.adapters.setdefault(_target(holder, model_type), {})
            adapter[_name_in_adapter(rest, options["ln_before"])] = tensor
    if not checkpoint.adapters:
        raise ValueError(f"there are no adapters of the name {name!r} in it")
    if source.given and not checkpoint.shared:
        checkpoint.shared = dict(source.given)
        checkpoint.notes.append(f"the file lacks {', '.join(source.given)}; what was given is taken")
    if missing := checkpoint.missing_shared():
        raise MissingRuleError(
            f"the file lacks {', '.join(missing)}, which its adapters share: `adapters` 1.3.0 leaves it out when it "
            "saves a T5 or a model without a head. Convert the live model if you have it, or give phm_rule= (a "
            "tensor, or a safetensors file that holds it); what was learned and is in no other file cannot be recovered"
        )
    if method == BOTTLENECK:  # `adapters` gives a bottleneck at least one number, whatever the factor.
        hidden, _ = sizes(next(iter(checkpoint.adapters.values())))
        options["reduction_factor"] = _at_most(hidden, options.get("reduction_factor"))
    read_heads(source, tensors, name, checkpoint)
    options["modules_to_save"] = sorted({key.partition(".")[0] for key in checkpoint.copies})
    blocks = [names.block_of(target, family) for target in checkpoint.adapters for family in ARCHITECTURES.values()]
    options["cross_adapter"] = any(block is not None and block.kind == "cross_attention" for block in blocks)
    return checkpoint


def _at_most(limit: int, factor: Any) -> Any:
    """Return a reduction factor, or those by layer, with this limit; anything else as it is."""
    if isinstance(factor, Mapping):
        return {layer: _at_most(limit, each) for layer, each in factor.items()}
    return min(factor, limit) if isinstance(factor, int | float) else factor


def _target(holder: str, model_type: str | None) -> str:
    """Return `encoder.layer.0.output.dense` for `encoder.layer.0.output` of a BERT, and so on."""
    if ".block." in f".{holder}":
        return names.t5_target(holder)
    match = re.fullmatch(r"(?P<layer>(?:.*\.)?(?:layer|layers|h)\.\d+)\.(?P<child>.*)", holder)
    block = getattr(ARCHITECTURES.get(model_type or ""), _KINDS.get(match["child"], ""), None) if match else None
    if match is None or block is None:
        raise ValueError(f"adapters in {holder} of a model of type {model_type!r}: no such module is known")
    return f"{match['layer']}.{block.write.partition('|')[0]}"


def _holder(target: str, model_type: str | None) -> str:
    """Return the module that holds the adapters after a target: the inverse of `_target`."""
    if t5_block := names.t5_block(target):
        return t5_block
    family = ARCHITECTURES.get(model_type or "")
    block = names.block_of(target, family) if family else None
    if block is None or (model_type == "gpt2" and block.kind == "cross_attention"):
        raise ValueError(f"`adapters` cannot put an adapter after {target} of a model of type {model_type!r}")
    holders = _IN_BERT if family == ARCHITECTURES["bert"] else _IN_VIT if model_type == "vit" else _IN_OTHERS
    return f"{block.stack}.{block.layer}.{holders[block.kind]}"


def _name_in_adapter(rest: str, ln_before: bool) -> str:
    """Return `down.W_left` for `adapter_down.0.W_left`; `.0` is the layer norm if there is one."""
    rest = rest.replace("adapter_norm_", "norm_")
    if ln_before and rest.startswith("adapter_down.0."):
        return rest.replace("adapter_down.0.", "norm_before.")
    return re.sub(r"^adapter_(?:(down)\.\d|(up))\.", r"\1\2.", rest)


def write(checkpoint: Checkpoint, name: str | None) -> Written:
    """Return what the library reads with use_safetensors=True, or raise ValueError if it cannot."""
    config, name = checkpoint.config, name or "default"
    model_type = checkpoint.model.get("model_type") or ("t5" if all(map(names.t5_block, checkpoint.adapters)) else None)
    options = {option: getattr(config, option) for option in SAME[checkpoint.method]}
    options = OF_START | options | FIXED | {"phm_layer": checkpoint.method == COMPACTER}
    if checkpoint.method == COMPACTER:
        check_parallel(config.is_parallel, model_type)
    options["scaling"] = config.scaling if config.scaling == "learned" else float(config.scaling)
    options["leave_out"] = list(config.leave_out)
    if config.target_modules is not None:
        targets = names.target_options(checkpoint.adapters, model_type)
        if "target_modules" in targets:
            raise ValueError("target_modules: `adapters` has no way to put adapters after these modules alone")
        options |= targets
    tensors = {f"shared_parameters.{name}.{key}": tensor for key, tensor in checkpoint.shared.items()}
    for target, adapter in checkpoint.adapters.items():
        prefix = f"{_holder(target, model_type)}.adapters.{name}"
        for key, tensor in adapter.items():
            down = f"adapter_down.{int(config.ln_before)}."
            theirs = key if key == "scaling" else f"adapter_{key}".replace("adapter_down.", down)
            tensors[f"{prefix}.{theirs}"] = tensor
            if key.startswith("norm_before."):
                tensors[f"{prefix}.{key.replace('norm_before', 'adapter_down.0')}"] = tensor
    norms = [key for key in checkpoint.copies if names.is_norm(key) and not names.head_of(key)]
    if norms:
        checkpoint.losses.append(f"{len(norms)} trained layer norm weights, such as {norms[0]}")
    hidden, _ = sizes(next(iter(checkpoint.whole().values())))
    about = {"model_type": model_type, "hidden_size": checkpoint.model.get("hidden_size") or hidden, "name": name}
    about |= {"config": options, "model_class": None, "model_name": None, "version": VERSION}
    return tensors, about, {key: tensor for key, tensor in checkpoint.copies.items() if names.head_of(key)}
