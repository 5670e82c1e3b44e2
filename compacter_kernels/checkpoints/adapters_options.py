"""The options of adapters of the `adapters` library, as its files and models say them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compacter_kernels.checkpoints.methods import BOTTLENECK, COMPACTER, METHODS
from compacter_kernels.checkpoints.source import Source

# Options of ours that `adapters` does not have. It has all others, by the same names.
OURS_ALONE = ("init", "target_modules", "train_layer_norms", "modules_to_save", "dtype", "embedding_adapter")
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


def find_config(source: Source) -> tuple[dict[str, Any], str]:
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


def read_options(config: Mapping[str, Any], model_type: str | None, no_invertible: bool) -> tuple[str, dict[str, Any]]:
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
    check_parallel(parallel, model_type)
    return method, {"shared_phm_rule": True, "shared_W_phm": False, **options, "init": "adapters"}


def check_parallel(parallel: bool, model_type: str | None) -> None:
    """Raise ValueError for parallel Compacter in a model whose norms come before the blocks."""
    if parallel and model_type not in NORMS_AFTER:
        raise ValueError(
            f"is_parallel=True of a {model_type} cannot be converted: in `adapters` it reads the input of the layer "
            "norm before the block, ours reads the input of the block"
        )


def compositions(source: Source, name: str) -> list[str]:
    """Return the set-ups of several adapters that this adapter is a part of."""
    live = getattr(source.model, "adapters_config", None)
    saved = source.config.get("adapters")
    fusions = list(getattr(live, "fusions", None) or (isinstance(saved, dict) and saved.get("fusions")) or ())
    losses = [f"the AdapterFusion of {fusion}" for fusion in fusions if name in str(fusion).split(",")]
    setup = getattr(live, "active_setup", None)
    if setup is not None and len(setup.flatten()) > 1 and name in setup.flatten():
        losses.append(f"the composition {setup}: each adapter is converted by itself")
    return losses
