"""torch's encoder reads the weights of its modules in eval mode and calls none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compacter_kernels as ck

WIDTH = 32
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def encoder(norm_first: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def outputs(model: nn.Module) -> list[Tensor]:
    """The outputs without and with padding, without the rows of the padding."""
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    return [model(x), model(x, src_key_padding_mask=PADDED)[~PADDED]]


CONFIGS: dict[str, dict[str, Any]] = {
    "linear2": {"target_modules": ["linear2"]},
    "a layer of norms alone": {"target_modules": ["linear2"], "leave_out": [1]},
    "attention": {"target_modules": ["self_attn"]},
    "attention, parallel": {"target_modules": ["self_attn"], "is_parallel": True},
    "attention trained whole": {"target_modules": ["linear2"], "modules_to_save": ["self_attn"]},
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_eval_computes_what_training_does(name: str) -> None:
    model = encoder().requires_grad_(False).eval()
    plain = outputs(model)
    flags = [vars(module).copy() for module in (model, *model.layers)]
    ck.inject(model, ck.CompacterConfig(reduction_factor=4, phm_init_range=1.0, **CONFIGS[name]))
    for _, p in ck.adapter_parameters(model):
        p += 0.3 * torch.randn_like(p)
    expected = outputs(model.train())  # there is no dropout, but in training mode all modules are called
    got = outputs(model.eval())
    for y, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    with ck.disable_adapters(model):
        assert all(map(torch.equal, outputs(model), plain)), "the base's own path, bit by bit"
    for y, wanted in zip(outputs(model), got, strict=True):
        assert torch.equal(y, wanted)
    ck.remove_adapters(model)
    assert all(map(torch.equal, outputs(model), plain))
    for module, before in zip((model, *model.layers), flags, strict=True):
        names = ("use_nested_tensor", "activation_relu_or_gelu")
        assert all(vars(module).get(key) == before.get(key) for key in names)


@torch.no_grad()
def test_a_single_layer_is_as_it_was_while_adapters_are_disabled() -> None:
    model = encoder().layers[0].eval()
    x = torch.randn(2, 5, WIDTH)
    plain = model(x)
    ck.inject(model, ck.CompacterConfig(reduction_factor=4, phm_init_range=1.0, target_modules=["linear2"]))
    assert not torch.allclose(model(x), plain, atol=1e-3)
    with ck.disable_adapters(model):
        assert torch.equal(model(x), plain)


def test_modules_that_attention_never_calls_are_refused() -> None:
    model = encoder()
    with pytest.raises(ValueError, match=r"self_attn.out_proj is never called, layers.0.self_attn reads .*'self_attn'"):
        ck.inject(model, ck.CompacterConfig(reduction_factor=4, target_modules=["self_attn.out_proj"]))
    with pytest.raises(ValueError, match=r"modules_to_save: layers.0.self_attn.out_proj is never called"):
        ck.inject(model, ck.CompacterConfig(target_modules=["linear2"], modules_to_save=["out_proj"]))
    with pytest.raises(ValueError, match=r"likely ones: \['linear1', 'linear2'\]"):
        ck.inject(model)
    assert all(p.requires_grad for p in model.parameters())


class Plain(nn.MultiheadAttention):
    """A typical subclass of a user, which still calls torch's forward."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Calling(nn.MultiheadAttention):
    """A subclass whose own forward calls its parts."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.out_proj(x)
        return out


def test_subclasses_of_the_attention() -> None:
    config = ck.CompacterConfig(reduction_factor=4, target_modules=["out_proj"])
    with pytest.raises(ValueError, match=r"0.out_proj is never called"):
        ck.inject(nn.Sequential(Plain(WIDTH, 2)), config)
    model = nn.Sequential(Calling(WIDTH, 2))
    x = torch.randn(2, WIDTH)
    plain = model(x)
    ck.inject(model, config)
    assert torch.equal(model(x), model[0].out_proj.compacter["default"](plain))


def test_wavlm_reads_the_weights_of_its_projections() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    conv = {"conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1}
    model = transformers.WavLMModel(transformers.WavLMConfig(**sizes, **conv))
    with pytest.raises(ValueError, match=r"attention.out_proj is never called"):
        ck.inject(model, ck.CompacterConfig(reduction_factor=4, target_modules=["attention.out_proj"]))
