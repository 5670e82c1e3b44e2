"""The offloading of accelerate, before and after inject.

A module has its weights only while it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, output
from torch import nn

import compacter_kernels as ck

accelerate = pytest.importorskip("accelerate")


def shaken(model: nn.Module) -> nn.Module:
    """Give adapters, heads and norms random weights."""
    generator = torch.Generator().manual_seed(3)
    for _, p in ck.adapter_parameters(model):
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


OPTIONS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "parallel": {"is_parallel": True},
    "all shared": {"shared_W_phm": True, "phm_bias": False, "scaling": "learned", "ln_after": True},
    "unshared": {"shared_phm_rule": False},
}


@torch.no_grad()
@pytest.mark.parametrize("first", ["inject", "offload"])
@pytest.mark.parametrize(
    ("family", "options"), [("bert", "sequential"), ("t5", "parallel"), ("bert", "all shared"), ("llama", "unshared")]
)
def test_offloaded_models_compute_the_same(family: str, options: str, first: str) -> None:
    config = ck.CompacterConfig(reduction_factor=4, phm_init_range=1.0, **OPTIONS[options])
    plain = output(family, build(family))
    torch.manual_seed(0)
    expected = output(family, shaken(ck.inject(build(family), config)))
    model = build(family)
    torch.manual_seed(0)
    if first == "inject":
        accelerate.cpu_offload(shaken(ck.inject(model, config)), torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
    else:
        accelerate.cpu_offload(model, torch.device("cpu"))
        shaken(ck.inject(model, config))
    # The projections are computed separately.
    torch.testing.assert_close(output(family, model), expected, rtol=1e-5, atol=1e-5)
    with ck.disable_adapters(model):
        assert torch.equal(output(family, model), plain)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(output(family, model), expected)
    ck.remove_adapters(model)
    assert torch.equal(output(family, model), plain)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_offloaded_adapters_are_saved(family: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    model = shaken(ck.inject(build(family), ck.CompacterConfig(reduction_factor=4)))
    ck.save_adapter(model, tmp_path / "plain")
    accelerate.cpu_offload(model, torch.device("cpu"))
    ck.save_adapter(model, tmp_path / "offloaded")
    assert all(p.is_meta for p in model.parameters())
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("plain", "offloaded")]
    assert files[0] == files[1]
