"""The format of the `adapters` library 1.3.0: `adapter.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compacter_kernels.checkpoints import names
from compacter_kernels.checkpoints.adapters_heads import AUTO_CLASSES, class_of, described, named_as_in_class
from compacter_kernels.checkpoints.checkpoint import Checkpoint, MissingRuleError, Written, sizes
from compacter_kernels.checkpoints.files import about_model, of_model
from compacter_kernels.checkpoints.methods import BOTTLENECK, COMPACTER, METHODS
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

# Options of ours that `adapters` does not have. It has all others, by the same names.
OURS_ALONE = ("init", "target_modules", "train_layer_norms", "modules_to_save", "dtype")
SAME = {
    method: tuple(option.name for option in dataclasses.fields(kind.config) if option.name not in OURS_ALONE)
    for method, kind in METHODS.items()
}
OF_START = {  # options of `adapters` that matter only for how weights start, and its defaults
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter_reduction_factor": None,
    "hypercomplex_nonlinearity": "glorot-uniform",
}
FIXED = {  # other options of `adapters` alone, and the only value for which it computes the same
    "use_gating": False,
    "inv_adapter": None,
    "stochastic_depth": 0.0,
    "original_ln_after": True,
}
REASONS = {
    "use_gating": "no adapter here has a gate",
    "inv_adapter": "no invertible adapter, which follows the embeddings, is here",
    "stochastic_depth": "no adapter here is dropped in training",
    "original_ln_after": "an adapter here does not take the model's own residual away",
}
NORMS_AFTER = ("bert", "roberta", "xlm-roberta", "electra", "camembert", "distilbert", "bart")


def read(source: Source) -> Checkpoint:
    """Return the checkpoint in a source; ValueError if its adapters compute what ours do not."""
    tensors = names.names_in_base({re.sub(_LEGACY, "adapters", key): tensor for key, tensor in source.tensors.items()})
    config, name = _find_config(source)
    model = about_model(source.config) if source.model is None else of_model(source.model)
    model_type = model["model_type"] = (source.model is None and source.model_type) or model["model_type"]
    live = {} if source.model is None else {"model_class": type(source.model).__name__}
    model |= {"model_class": source.config.get("model_class"), **live}
    model["base_model_name_or_path"] = model["base_model_name_or_path"] or source.config.get("model_name")
    unused = source.config.get("type") == "text_task" and not any("invertible" in key for key in tensors)
    method, options = _read_options(config, model_type, unused)
    checkpoint = Checkpoint(method=method, options=options, model=model, losses=_compositions(source, name))
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
    _read_heads(source, tensors, name, checkpoint)
    options["modules_to_save"] = sorted({key.partition(".")[0] for key in checkpoint.copies})
    blocks = [names.block_of(target, family) for target in checkpoint.adapters for family in ARCHITECTURES.values()]
    options["cross_adapter"] = any(block is not None and block.kind == "cross_attention" for block in blocks)
    return checkpoint


def _read_heads(source: Source, tensors: Mapping[str, Tensor], name: str, checkpoint: Checkpoint) -> None:
    """Take over the head of a class of transformers, or one of `adapters` of that structure."""
    head = source.head if "config" in source.config else tensors  # an adapter's folder has a file for the head
    checkpoint.copies = {key: tensor for key, tensor in head.items() if names.head_of(key)}
    flexible: dict[str, dict[str, Tensor]] = {}
    for key, tensor in {**source.head, **tensors}.items():
        if key.startswith("heads."):
            _, head_name, rest = key.split(".", 2)
            flexible.setdefault(head_name, {})[rest] = tensor
    for head_name, parameters in flexible.items():
        config = _head_config(source, head_name)
        named = named_as_in_class(parameters, config, checkpoint.model["model_type"])
        head_type = str(config.get("head_type"))
        if named is None or head_name != name or checkpoint.copies:
            checkpoint.losses.append(
                f"prediction heads of `adapters` itself, for its model classes alone: {head_name}, {described(config)}"
            )
        else:
            checkpoint.copies = named
            checkpoint.model["model_class"] = class_of(checkpoint.model["model_type"], head_type)
            labels = {number: label for label, number in (config.get("label2id") or {}).items()}
            checkpoint.notes.append(
                f"the head is that of {AUTO_CLASSES[head_type]}, with num_labels={config.get('num_labels')}"
                f"{f' and id2label={labels}' if labels else ''}"
            )
    in_base = sorted(key for key in source.head if not names.head_of(key) and not key.startswith("heads."))
    if in_base:
        checkpoint.notes.append(f"{', '.join(in_base)}, saved as a head, is not taken over: it is part of the base")


def _head_config(source: Source, name: str) -> Mapping[str, Any]:
    """Return the library's config of one of its heads, empty if it is not there."""
    if source.model is not None:
        config = getattr(source.model.heads[name], "config", None)  # type: ignore[index]
    else:
        saved = source.head_config
        config = saved.get("config") if saved.get("name") == name else None
    return config if isinstance(config, Mapping) else {}


def _compositions(source: Source, name: str) -> list[str]:
    """Return the set-ups of several adapters that this adapter is a part of."""
    live = getattr(source.model, "adapters_config", None)
    saved = source.config.get("adapters")
    fusions = list(getattr(live, "fusions", None) or (isinstance(saved, dict) and saved.get("fusions")) or ())
    losses = [f"the AdapterFusion of {fusion}" for fusion in fusions if name in str(fusion).split(",")]
    setup = getattr(live, "active_setup", None)
    if setup is not None and len(setup.flatten()) > 1 and name in setup.flatten():
        losses.append(f"the composition {setup}: each adapter is converted by itself")
    return losses


def _find_config(source: Source) -> tuple[dict[str, Any], str]:
    """Return the library's config of the adapters, and their name."""
    if source.model is not None:
        live = getattr(source.model, "adapters_config", None)
        names = list(getattr(live, "adapters", ()))
        if live is None or not names:
            raise ValueError("the model has no adapters of the `adapters` library")
        name = source.choose(names)
        return live.get(name).to_dict(), name
    if source.is_whole_model() and "adapters" in source.config:
        return _config_in_whole_model(source)
    saved = source.config.get("config")
    if not isinstance(saved, dict):
        raise ValueError("tensors of `adapters` need their adapter_config.json; give the folder that holds both")
    config, name = dict(saved), source.choose([str(source.config.get("name"))])
    if "version" not in source.config:  # before this entry was written, gelu was the name of gelu_new
        renamed = {"gelu": "gelu_new", "gelu_orig": "gelu"}
        config["non_linearity"] = renamed.get(str(config.get("non_linearity")), config.get("non_linearity"))
    return config, name


def _config_in_whole_model(source: Source) -> tuple[dict[str, Any], str]:
    content = source.config["adapters"] if isinstance(source.config["adapters"], dict) else {}
    names, configs = content.get("adapters"), content.get("config_map")
    if not isinstance(names, dict) or not isinstance(configs, dict) or not names:
        raise ValueError("config.json says nothing of the adapters that are in the model")
    name = source.choose(list(names))
    config = configs.get(str(names[name]))
    if not isinstance(config, dict):
        raise ValueError(
            f"config.json does not say the options of {name!r}, only {names[name]!r}; load the model with `adapters` "
            "and convert it, or what its save_adapter writes"
        )
    if config.get("non_linearity") in ("gelu", "gelu_orig") and "init_weights_seed" not in config:
        raise ValueError(
            "config.json does not say which version of the library wrote it, and its 'gelu' was once gelu_new; load "
            "the model with that version and convert it, or what its save_adapter writes"
        )
    return config, name


def _read_options(config: Mapping[str, Any], model_type: str | None, no_invertible: bool) -> tuple[str, dict[str, Any]]:
    """Return the method and its options, or raise ValueError for what it cannot do.

    no_invertible: there are no invertible adapters, whatever the config says. Early versions named
    them in the configs of all adapters.
    """
    if (architecture := config.get("architecture")) is not None:
        raise ValueError(f"architecture={architecture!r} is another method than bottleneck adapters")
    method = COMPACTER if config.get("phm_layer", False) else BOTTLENECK
    parallel, before = bool(config.get("is_parallel")), bool(config.get("original_ln_before"))
    stated = {**config, "inv_adapter": config.get("inv_adapter") or config.get("invertible_adapter")}
    for option, needed in FIXED.items():
        value = stated.get(option, needed)
        if value != needed and not (option == "inv_adapter" and (no_invertible or not value)):
            raise ValueError(f"{option}={value!r} cannot be converted: {REASONS[option]}")
    if config.get("scaling") == "channel":
        raise ValueError("scaling='channel' cannot be converted: ours scale by one number")
    if not parallel and not isinstance(config.get("residual_before_ln", True), bool):
        value = config["residual_before_ln"]
        raise ValueError(f"residual_before_ln={value!r} cannot be converted: ours is True or False")
    options: dict[str, Any] = {"ln_before": False, "cross_adapter": False, "train_layer_norms": False}
    options |= {option: config[option] for option in SAME[method] if option in config}
    options["leave_out"] = options.get("leave_out") or ()
    # So `adapters` computes, whatever these options say.
    options["original_ln_before"] = before and not parallel
    options["residual_before_ln"] = bool(config.get("residual_before_ln", True)) or not options["original_ln_before"]
    if parallel:
        options["adapter_residual_before_ln"] = False
    if method == BOTTLENECK:
        return method, options
    _check_parallel(parallel, model_type)
    return method, {"shared_phm_rule": True, "shared_W_phm": False, **options, "init": "adapters"}


def _check_parallel(parallel: bool, model_type: str | None) -> None:
    if parallel and model_type not in NORMS_AFTER:
        raise ValueError(
            f"is_parallel=True of a {model_type} cannot be converted: in `adapters` it reads the input of the layer "
            "norm before the block, ours reads the input of the block"
        )


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
        _check_parallel(config.is_parallel, model_type)
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
