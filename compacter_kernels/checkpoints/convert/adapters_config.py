"""The options of adapters as the `adapters` library has them, and where it keeps these."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compacter_kernels.checkpoints.convert.source import Source
from compacter_kernels.checkpoints.format import about_model, of_model
from compacter_kernels.config import CompacterConfig

# Options of `CompacterConfig` that `adapters` does not have. It has all others, by the same names.
OURS_ALONE = ("init", "target_modules", "train_layer_norms", "modules_to_save", "dtype")
SAME = tuple(option.name for option in dataclasses.fields(CompacterConfig) if option.name not in OURS_ALONE)
OF_START = {  # options of `adapters` that matter only for how weights start, and its defaults
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter_reduction_factor": None,
    "hypercomplex_nonlinearity": "glorot-uniform",
}
FIXED = {  # other options of `adapters` alone, and the only value for which it computes the same
    "phm_layer": True,
    "use_gating": False,
    "inv_adapter": None,
    "stochastic_depth": 0.0,
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
}
REASONS = {
    "phm_layer": "these are plain bottleneck adapters, not Compacter",
    "original_ln_before": "it reads the block's output plus the residual, as adapters' Compacter++ does; "
    "ours and the paper's read the block's output alone",
}
UNUSED_IF_PARALLEL = ("original_ln_before", "residual_before_ln")
NORMS_AFTER = ("bert", "roberta", "xlm-roberta", "electra", "camembert", "distilbert", "bart")


def find_config(source: Source) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the library's config of the adapters, what is known of the model, and the name."""
    if source.model is not None:
        live = getattr(source.model, "adapters_config", None)
        names = list(getattr(live, "adapters", ()))
        if live is None or not names:
            raise ValueError("the model has no adapters of the `adapters` library")
        name = source.choose(names)
        return live.get(name).to_dict(), of_model(source.model), name
    model = about_model(source.config)
    model["model_type"] = source.model_type or model["model_type"]
    if source.is_whole_model() and "adapters" in source.config:
        config, name = _in_whole_model(source)
        return config, model, name
    saved = source.config.get("config")
    if not isinstance(saved, dict):
        raise ValueError("tensors of `adapters` need their adapter_config.json; give the folder that holds both")
    config, name = dict(saved), source.choose([str(source.config.get("name"))])
    if "version" not in source.config:  # before this entry was written, gelu was the name of gelu_new
        renamed = {"gelu": "gelu_new", "gelu_orig": "gelu"}
        config["non_linearity"] = renamed.get(str(config.get("non_linearity")), config.get("non_linearity"))
    return config, model, name


def _in_whole_model(source: Source) -> tuple[dict[str, Any], str]:
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


def read_options(config: Mapping[str, Any], model_type: str | None) -> dict[str, Any]:
    """Return the options of `CompacterConfig`, or raise ValueError for what it cannot do."""
    if config.get("architecture") is not None:
        method = config["architecture"]
        raise ValueError(f"architecture={method!r} is another method than Compacter's bottleneck adapters")
    parallel = bool(config.get("is_parallel"))
    for option, needed in FIXED.items():
        value = config.get(option, needed)
        if value != needed and not (parallel and option in UNUSED_IF_PARALLEL):
            why = REASONS.get(option, "ours have no such thing")
            raise ValueError(f"{option}={value!r} cannot be converted: {why}")
    if config.get("scaling") == "channel":
        raise ValueError("scaling='channel' cannot be converted: ours scale by one number")
    _check_parallel(parallel, model_type)
    options = {option: config[option] for option in SAME if option in config}
    if parallel:
        options["adapter_residual_before_ln"] = False  # so `adapters` computes, whatever the option
    options["leave_out"] = options.get("leave_out") or ()
    defaults = {"ln_before": False, "shared_phm_rule": True, "shared_W_phm": False, "cross_adapter": False}
    return {**defaults, **options, "init": "adapters", "train_layer_norms": False}


def write_options(config: CompacterConfig, model_type: str | None) -> dict[str, Any]:
    """Return the options of `adapters`; ValueError if it would compute something else with them."""
    _check_parallel(config.is_parallel, model_type)
    options = {option: getattr(config, option) for option in SAME} | FIXED | OF_START
    scaling = config.scaling if config.scaling == "learned" else float(config.scaling)
    return {**options, "leave_out": list(config.leave_out), "scaling": scaling}


def _check_parallel(parallel: bool, model_type: str | None) -> None:
    if parallel and model_type not in NORMS_AFTER:
        raise ValueError(
            f"is_parallel=True of a {model_type} cannot be converted: in `adapters` it reads the input of the layer "
            "norm before the block, ours reads the input of the block"
        )
