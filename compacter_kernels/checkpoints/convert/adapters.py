"""The format of the `adapters` library: `adapter.safetensors` and `adapter_config.json`, as of its version 1.3.0."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compacter_kernels.checkpoints.convert.checkpoint import Checkpoint, MissingRuleError, about_model, sizes
from compacter_kernels.checkpoints.convert.places import (
    Place,
    head_of,
    heads_in,
    is_norm,
    place_of,
    placement,
    t5_block,
    t5_module,
)
from compacter_kernels.checkpoints.convert.source import Source, is_whole_model
from compacter_kernels.checkpoints.format import of_model
from compacter_kernels.targets.architectures import ARCHITECTURES

VERSION = "adapters.1.3.0"
SAME = (
    "phm_dim",
    "phm_rank",
    "phm_bias",
    "factorized_phm_W",
    "factorized_phm_rule",
    "shared_phm_rule",
    "shared_W_phm",
    "learn_phm",
    "phm_init_range",
    "phm_c_init",
    "reduction_factor",
    "non_linearity",
    "scaling",
    "dropout",
    "ln_before",
    "ln_after",
    "adapter_residual_before_ln",
    "mh_adapter",
    "output_adapter",
    "cross_adapter",
    "is_parallel",
    "leave_out",
)
OTHERS = {  # options that we do not have, and the only value of each that means what we compute
    "phm_layer": True,
    "use_gating": False,
    "inv_adapter": None,
    "stochastic_depth": 0.0,
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter_reduction_factor": None,
    "hypercomplex_nonlinearity": "glorot-uniform",
}
_START = ("init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "hypercomplex_nonlinearity")
_BERT = {"attention.output": "attention", "output": "feed_forward", "crossattention.output": "cross_attention"}
_CHILDREN = {"attention_adapters": "attention", "cross_attention_adapters": "cross_attention"}
_CHILDREN |= {"output_adapters": "feed_forward", "output.output_adapters": "feed_forward"}  # the latter of ViT
_NORMS_AFTER = ("bert", "roberta", "xlm-roberta", "electra", "camembert", "distilbert", "bart")


def read(source: Source, name: str | None, rule: Mapping[str, Tensor] | None) -> Checkpoint:
    """The checkpoint in a folder of `adapters`, or in one of its models.

    rule: the shared weights, for a file that lacks them.

    Raises:
        MissingRuleError: shared weights that are neither in it nor given.
        ValueError: a config that is none of Compacter, or has what we do not compute.
    """
    config, model, name = _config(source, name)
    options = _options(config, model.get("model_type"))
    checkpoint = Checkpoint({}, options=options, model=model)
    for key, tensor in source.tensors.items():
        m = re.fullmatch(rf"(?P<where>.*)\.adapters\.{re.escape(name)}\.(?P<rest>.*)", key)
        shared = re.fullmatch(rf"(?:.*\.)?shared_parameters\.{re.escape(name)}\.(?P<rest>.*)", key)
        if shared:
            checkpoint.shared[shared["rest"]] = tensor
        elif m:
            own = checkpoint.adapters.setdefault(_module(m["where"], model.get("model_type")), {})
            own[_our_name(m["rest"], options["ln_before"])] = tensor
    if not checkpoint.adapters:
        raise ValueError(f"there are no adapters of the name {name!r} in it")
    if rule is not None and not checkpoint.shared:
        checkpoint.shared = dict(rule)
        checkpoint.notes.append(f"the file lacks {', '.join(rule)}; what was given is taken")
    _require_shared(checkpoint, options)
    head = source.head if "config" in source.config else source.tensors  # of an adapter's folder, or of a whole model
    checkpoint.copies = {key: tensor for key, tensor in head.items() if head_of(key)}
    options["modules_to_save"] = heads_in(checkpoint.copies)
    flexible = sorted(key for key in {**source.head, **source.tensors} if key.startswith("heads."))
    if flexible:
        checkpoint.losses.append(
            f"prediction heads of `adapters` itself, for its model classes alone: {flexible[0]}, ..."
        )
    others = sorted(key for key in source.head if not head_of(key) and key not in flexible)
    if others:
        checkpoint.notes.append(f"{', '.join(others)}, saved as a head, is not taken over: it is part of the base")
    options["cross_adapter"] = any(_kind(place) == "cross_attention" for place in checkpoint.adapters)
    return checkpoint


def _config(source: Source, name: str | None) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The options, what is known of the model, the adapter's name."""
    if source.model is not None:
        found = getattr(source.model, "adapters_config", None)
        names = list(getattr(found, "adapters", ()))
        if found is None or not names:
            raise ValueError("the model has no adapters of the `adapters` library")
        if name is None and len(names) > 1:
            raise ValueError(f"there are adapters of {len(names)} names; give name=, one of {', '.join(names)}")
        name = name or names[0]
        if name not in names:
            raise ValueError(f"there are no adapters of the name {name!r}; there are {', '.join(names)}")
        return found.get(name).to_dict(), of_model(source.model), name
    if is_whole_model(source) and "adapters" in source.config:
        return _config_of_model(source.config, name)
    config = source.config.get("config")
    if not isinstance(config, dict):
        raise ValueError("tensors of `adapters` need their adapter_config.json; give the folder that holds both")
    if name is not None and name != source.config.get("name"):
        raise ValueError(f"there are no adapters of the name {name!r}; it is {source.config.get('name')!r}")
    config = dict(config)
    if "version" not in source.config:  # before that entry was there, gelu was the name of gelu_new
        old = {"gelu": "gelu_new", "gelu_orig": "gelu"}
        config["non_linearity"] = old.get(str(config.get("non_linearity")), config.get("non_linearity"))
    return config, about_model(source.config), str(source.config.get("name"))


def _config_of_model(found: Mapping[str, Any], name: str | None) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The same from the config.json of a whole model, where the library keeps the configs of all its adapters."""
    about = found["adapters"] if isinstance(found["adapters"], dict) else {}
    names, configs = about.get("adapters"), about.get("config_map")
    if not isinstance(names, dict) or not isinstance(configs, dict) or not names:
        raise ValueError("config.json says nothing of the adapters that are in the model")
    if name is None and len(names) > 1:
        raise ValueError(f"there are adapters of {len(names)} names; give name=, one of {', '.join(names)}")
    name = name or next(iter(names))
    if name not in names:
        raise ValueError(f"there are no adapters of the name {name!r}; there are {', '.join(names)}")
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
    return config, about_model(found), name


def _options(config: Mapping[str, Any], model_type: str | None) -> dict[str, Any]:
    """Our options; an error for what we do not compute."""
    if config.get("architecture") is not None:
        raise ValueError(
            f"architecture={config['architecture']!r} is another method than Compacter's bottleneck adapters"
        )
    parallel = bool(config.get("is_parallel"))
    for option, ours in OTHERS.items():
        value = config.get(option, ours)
        idle = option in _START or (parallel and option in ("original_ln_before", "residual_before_ln"))
        if value != ours and not idle:
            why = {
                "phm_layer": "these are plain bottleneck adapters, not Compacter",
                "original_ln_before": "it reads the block's output plus the residual, as adapters' Compacter++ does; "
                "ours and the paper's read the block's output alone",
            }.get(option, "ours have no such thing")
            raise ValueError(f"{option}={value!r} cannot be converted: {why}")
    if config.get("scaling") == "channel":
        raise ValueError("scaling='channel' cannot be converted: ours scale by one number")
    if parallel and model_type not in _NORMS_AFTER:
        raise ValueError(
            f"is_parallel=True of a {model_type} cannot be converted: its adapter reads what the layer norm before the "
            "block reads, ours what the block reads"
        )
    options = {option: config[option] for option in SAME if option in config}
    if parallel:
        options["adapter_residual_before_ln"] = False  # adapters' parallel ones have it so whatever the option says
    options["leave_out"] = options.get("leave_out") or ()
    defaults = {"ln_before": False, "shared_phm_rule": True, "shared_W_phm": False, "cross_adapter": False}
    return {**defaults, **options, "init": "adapters", "train_layer_norms": False}


def _module(where: str, model_type: str | None) -> str:
    """encoder.layer.0.output -> encoder.layer.0.output.dense, and so on."""
    if ".block." in f".{where}":
        return t5_module(where)
    m = re.fullmatch(r"(?P<layer>(?:.*\.)?(?:layer|layers|h)\.\d+)\.(?P<what>.*)", where)
    kind = {**_BERT, **_CHILDREN}.get(m["what"]) if m else None
    family = ARCHITECTURES.get(model_type or "")
    if m is None or kind is None or family is None or getattr(family, kind) is None:
        raise ValueError(f"adapters at {where} of a model of type {model_type!r}: no such place is known")
    return f"{m['layer']}.{getattr(family, kind).write.partition('|')[0]}"


def _location(path: str, model_type: str | None) -> str:
    """The other way round."""
    block = t5_block(path)
    if block:
        return block
    family = ARCHITECTURES.get(model_type or "")
    place: Place | None = place_of(path, family) if family else None
    if place is None or (model_type == "gpt2" and place.kind == "cross_attention"):
        raise ValueError(f"`adapters` has no place for an adapter after {path} of a model of type {model_type!r}")
    layer = f"{place.stack}.{place.layer}"
    if family is ARCHITECTURES["bert"]:
        return f"{layer}.{next(where for where, kind in _BERT.items() if kind == place.kind)}"
    if model_type == "vit" and place.kind == "feed_forward":
        return f"{layer}.output.output_adapters"
    return f"{layer}.{next(where for where, kind in _CHILDREN.items() if kind == place.kind)}"


def _kind(path: str) -> str | None:
    return next((place.kind for family in ARCHITECTURES.values() if (place := place_of(path, family))), None)


def _our_name(rest: str, ln_before: bool) -> str:
    """adapter_down.0.W_left -> down.W_left; the layer norm before is in adapter_down as well, at 0."""
    rest = rest.replace("adapter_norm_", "norm_")
    if ln_before and rest.startswith("adapter_down.0."):
        return rest.replace("adapter_down.0.", "norm_before.")
    return re.sub(r"^adapter_(down\.\d|up)\.", lambda m: f"{m[1].partition('.')[0]}.", rest)


def _require_shared(checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
    wanted: list[str] = []
    if options["shared_phm_rule"]:
        wanted += ["phm_rule_left", "phm_rule_right"] if options.get("factorized_phm_rule") else ["phm_rule"]
    if options["shared_W_phm"]:
        ends = ("_left", "_right") if options.get("factorized_phm_W", True) else ("",)
        wanted += [f"W_{position}{end}" for position in ("down", "up") for end in ends]
    missing = [name for name in wanted if name not in checkpoint.shared]
    if missing:
        raise MissingRuleError(
            f"the file lacks {', '.join(missing)}, which its adapters share: `adapters` 1.3.0 leaves it out when it "
            "saves a T5 or a model without a head. Convert the live model if you have it, or give phm_rule= (a "
            "tensor, or a safetensors file that holds it); what was learned and is in no other file cannot be recovered"
        )


def write(checkpoint: Checkpoint, name: str | None) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """The tensors, the config and the tensors of the head, as `adapters` loads them with use_safetensors=True.

    Raises:
        ValueError: an option, or a place, that `adapters` does not have.
    """
    config, name = checkpoint.config, name or "default"
    model_type = checkpoint.model.get("model_type") or ("t5" if all(map(t5_block, checkpoint.adapters)) else None)
    if config.is_parallel and model_type not in _NORMS_AFTER:
        raise ValueError(
            f"is_parallel=True of a {model_type} cannot be converted: in `adapters` it reads another input"
        )
    options = {option: getattr(config, option) for option in SAME} | OTHERS
    if config.target_modules is not None:
        found = placement(checkpoint.adapters, model_type)
        if "target_modules" in found:
            raise ValueError("target_modules: `adapters` has no way to put adapters into these places alone")
        options |= found
    options |= {"leave_out": list(config.leave_out)}
    options["scaling"] = config.scaling if config.scaling == "learned" else float(config.scaling)
    tensors = {f"shared_parameters.{name}.{key}": tensor for key, tensor in checkpoint.shared.items()}
    for place, own in checkpoint.adapters.items():
        prefix = f"{_location(place, model_type)}.adapters.{name}"
        for key, tensor in own.items():
            position, _, rest = key.partition(".")
            where = {"down": f"adapter_down.{int(config.ln_before)}", "up": "adapter_up"}.get(
                position, f"adapter_{position}"
            )
            tensors[f"{prefix}.{where}.{rest}" if rest else f"{prefix}.{key}"] = tensor
            if position == "norm_before":
                tensors[f"{prefix}.adapter_down.0.{rest}"] = tensor
    norms = [key for key in checkpoint.copies if is_norm(key) and not head_of(key)]
    if norms:
        checkpoint.losses.append(f"{len(norms)} trained layer norm weights, such as {norms[0]}")
    hidden, _ = sizes(next(checkpoint.whole())[1])
    about = {"model_type": model_type, "hidden_size": checkpoint.model.get("hidden_size") or hidden, "name": name}
    head = {key: tensor for key, tensor in checkpoint.copies.items() if head_of(key)}
    return tensors, {**about, "config": options, "model_class": None, "model_name": None, "version": VERSION}, head
