"""Small models with adapters as a method of peft, and the same models with `inject`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compacter_kernels as ck

peft = pytest.importorskip("peft", reason="peft is not installed")
import compacter_kernels.peft as ckp  # noqa: E402

SMALL = {"reduction_factor": 4, "phm_dim": 4}
IN_PEFT = "base_model.model."


def config(kind: type = ckp.CompacterConfig, **options: Any) -> Any:
    return kind(**{**SMALL, **options})


def randomise(model: nn.Module, seed: int = 0, name: str = "default") -> nn.Module:
    """Give all weights of the adapters of that name values that matter, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in sorted(model.named_parameters()):
        if re.search(rf"(compacter_|modules_to_save\.).*\b{name}\b", key):
            mean = 1.0 if "orm" in key and key.endswith(("weight", f"weight.{name}")) else 0.0
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(mean + 0.3 * values)
    return model


def wrapped(model: nn.Module, name: str = "default", seed: int = 0, **options: Any) -> Any:
    """The model as `get_peft_model` wraps it, in eval mode, with adapters that matter."""
    return randomise(peft.get_peft_model(model, config(**options), adapter_name=name), seed, name).eval()


def add(model: Any, name: str, seed: int, **options: Any) -> Any:
    """Add other adapters that matter to a model of peft."""
    model.add_adapter(name, config(**options))
    return randomise(model, seed, name)


def adapter_values(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """What a file of these adapters holds."""
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key.removeprefix(IN_PEFT): value for key, value in state.items()}


def name_in_file(key: str) -> str:
    """The name in peft's file of a parameter of `inject`."""
    path, _, parameter = re.fullmatch(r"(?:(.*)\.)?(compacter(?:\.shared)?\.default)\.(.*)", key).groups()  # type: ignore[union-attr]
    if path is None:
        return f"compacter_shared_{parameter}"
    if re.match(r"down|up|scaling|norm_", parameter):
        return f"{path}.compacter_{parameter.replace('.', '_')}"
    return f"{path}.{parameter}"


def injected_like(model: nn.Module, base: nn.Module, **options: Any) -> nn.Module:
    """The base with the adapters of a model of peft, put in by `inject`."""
    made = ck.inject(base, ck.CompacterConfig(**{**SMALL, **options}))
    values, names = adapter_values(model), {name_in_file(key): p for key, p in ck.adapter_parameters(made)}
    assert values.keys() == names.keys()
    for key, value in values.items():
        names[key].data.copy_(value)
    return made
