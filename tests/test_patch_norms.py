"""Which layer norms behind an adapter of `adapters` go into the adapter's kernel."""

from __future__ import annotations

import pytest
import torch
from oracle import BF16
from phm_lookalikes import hooks_known
from torch import nn

pytest.importorskip("adapters_models", exc_type=ImportError)
from compacter_kernels.patch.adapters_forward import norm_weights


def _norms() -> dict[str, nn.Module]:
    class Own(nn.LayerNorm):
        pass

    hooked, replaced = nn.LayerNorm(24), nn.LayerNorm(24)
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    return {
        "another class": Own(24).requires_grad_(False),
        "hooked": hooked.requires_grad_(False),
        "replaced": replaced.requires_grad_(False),
        "trained": nn.LayerNorm(24),
        "no bias": nn.LayerNorm(24, bias=False).requires_grad_(False),
        "no weights": nn.LayerNorm(24, elementwise_affine=False),
        "two dimensions": nn.LayerNorm((3, 24)).requires_grad_(False),
        "another dtype": nn.LayerNorm(24, dtype=BF16).requires_grad_(False),
    }


@pytest.mark.parametrize("name", _norms())
def test_norms_that_are_called(name: str) -> None:
    assert norm_weights(_norms()[name], torch.ones(2, 3, 24)) is None


@hooks_known
def test_a_norm_that_is_not_called() -> None:
    norm = nn.LayerNorm(24, eps=0.5).requires_grad_(False)
    actual = norm_weights(norm, torch.ones(2, 3, 24))
    assert actual is not None and actual.weight is norm.weight and actual.bias is norm.bias and actual.eps == 0.5
