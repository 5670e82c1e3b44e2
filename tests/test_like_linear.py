"""PHMLinear in place of an nn.Linear.

It takes the same positional arguments, has `weight` and `bias`, and works with tools for nn.Linear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, inputs, output
from oracle import BF16, FP16
from torch import Tensor, nn
from torch.nn.utils import fuse_linear_bn_eval, parametrizations, parametrize, prune, skip_init

import compacter_kernels as ck

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "rank 3, no bias": {"phm_rank": 3, "bias": False},
    "unfactorised": {"factorized_phm_W": False, "factorized_phm_rule": True},
    "fixed rule": {"learn_phm": False},
}


def phm(*arguments: Any, **options: Any) -> ck.PHMLinear:
    layer = ck.PHMLinear(*arguments, **options)
    for p in layer.parameters():
        nn.init.normal_(p, 0.0, 0.5)
    return layer


def test_positional_arguments() -> None:
    for bias in (True, False):
        ours, theirs = (kind(32, 64, bias, "meta", BF16) for kind in (ck.PHMLinear, nn.Linear))
        assert (ours.b is not None) == (theirs.bias is not None) == bias
        assert (ours.weight.shape, ours.weight.dtype, ours.weight.device) == (
            theirs.weight.shape,
            theirs.weight.dtype,
            theirs.weight.device,
        )
    with pytest.raises(TypeError, match="bias must be True or False, got 12; phm_dim is given by name, phm_dim=12"):
        ck.PHMLinear(24, 24, 12)  # as the authors' PHMLinear is called


@pytest.mark.parametrize("name", OPTIONS)
def test_weight_and_bias(name: str) -> None:
    layer = phm(24, 36, **OPTIONS[name])
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 24)
    ours, theirs = layer(x), nn.functional.linear(x, twin.weight, twin.bias)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    for y in (ours, theirs):
        y.square().sum().backward()
    for (key, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4, msg=key)
    assert layer.bias is layer.b
    assert list(layer.state_dict()) == [key for key, _ in layer.named_parameters()]
    assert not {"weight", "bias"} & set(layer.state_dict())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_weight_has_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    """It is that of nn.Linear. The weight is summed in float32 and rounded once."""
    layer = phm(24, 36, dtype=dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    exact = ck.phm_matrix(ck.PHMWeights(*(None if w is None else w.double() for w in layer.weights()))).T
    torch.testing.assert_close(layer.weight, exact.to(dtype))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_in_a_transformer_encoder(activation: str, norm_first: bool) -> None:
    """In eval mode without gradients the fast path of the encoder reads `weight` of these layers.

    With gradients the layers are called.
    """
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    layer.linear1, layer.linear2 = phm(32, 64), phm(64, 32)
    layer.self_attn.out_proj = phm(32, 32)
    plain = copy.deepcopy(layer)
    for owner, name in ((plain, "linear1"), (plain, "linear2"), (plain.self_attn, "out_proj")):
        part = getattr(owner, name)
        dense = nn.modules.linear.NonDynamicallyQuantizableLinear(part.in_features, part.out_features)
        dense.load_state_dict({"weight": part.weight, "bias": part.bias})
        setattr(owner, name, dense)
    x = torch.randn(2, 5, 32)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for training, grad in ((True, True), (False, True), (False, False)):
        with torch.set_grad_enabled(grad):
            ours, theirs = (
                module.train(training)(x, src_key_padding_mask=padded)[~padded] for module in (layer, plain)
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    layer.train()(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def with_phm(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build("t5")
    for name, module in list(model.named_modules()):
        if name.endswith("DenseReluDense"):
            module.wo = phm(64, 32)
    return model


def test_in_t5() -> None:
    """T5 casts the input of its layer `wo` to the dtype of the weight of that layer."""
    model = with_phm()
    called = []
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    wo.register_forward_hook(lambda *_: called.append(1))
    expected = output("t5", model)
    assert len(called) == 1 and expected.isfinite().all()
    before = {key: tensor.clone() for key, tensor in wo.state_dict().items()}
    model._init_weights(model.encoder.block[0].layer[1].DenseReluDense)
    assert all(torch.equal(before[key], tensor) for key, tensor in wo.state_dict().items() if key != "b")
    assert (wo.b == 0).all()
    assert output("t5", model.to(BF16)).dtype == BF16
    ck.inject(model, ck.CompacterConfig(reduction_factor=4))
    assert output("t5", model).isfinite().all()


def test_peft_leaves_it_alone() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"Target module PHMLinear\(64, 32\) is not supported"):
        peft.get_peft_model(with_phm(), peft.LoraConfig(target_modules=["wo"]))
    model = peft.get_peft_model(with_phm(), peft.LoraConfig(target_modules="all-linear"))
    assert sum(isinstance(module, ck.PHMLinear) for module in model.modules()) == 4
    assert torch.equal(model(**inputs("t5"))[0], output("t5", with_phm()))


WRITES: dict[str, Callable[[ck.PHMLinear], Any]] = {
    "a parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(36, 24))),
    "a tensor": lambda layer: setattr(layer, "weight", torch.zeros(36, 24)),
    "bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.zeros(36))),
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    "weight norm": parametrizations.weight_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "spectral norm": parametrizations.spectral_norm,
    "fusion": lambda layer: fuse_linear_bn_eval(layer.eval(), nn.BatchNorm1d(36).eval()),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_would_write_to_weight_is_refused(write: str) -> None:
    layer = phm(24, 36)
    x, state = torch.randn(3, 24), list(layer.state_dict())
    expected = layer(x)
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        WRITES[write](layer)
    assert list(layer.state_dict()) == state and torch.equal(layer(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_of_the_layers_around() -> None:
    model = nn.Sequential(nn.Linear(24, 24), phm(24, 24), ck.CompacterAdapter(24, reduction_factor=2)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert [type(part).__name__ for part in quantised] == ["Linear", "PHMLinear", "CompacterAdapter"]
    assert "quantized" in type(quantised[0]).__module__
    x = torch.randn(3, 24)
    assert torch.equal(quantised(x), model[1:](quantised[0](x)))


MAKERS: dict[str, Callable[[], ck.CompacterAdapter]] = {
    "skip_init": lambda: skip_init(ck.CompacterAdapter, 24, reduction_factor=2),
    "to_empty": lambda: ck.CompacterAdapter(24, reduction_factor=2, device="meta").to_empty(device="cpu"),
    "in a model": lambda: nn.Sequential(MAKERS["skip_init"]()).to("meta").to_empty(device="cpu")[0],
    "factorised": lambda: skip_init(ck.CompacterAdapter, 24, reduction_factor=2, factorized_phm_rule=True),
}


@pytest.mark.parametrize("make", MAKERS)
def test_a_shared_rule_is_one_on_any_way_from_meta(make: str) -> None:
    adapter = MAKERS[make]()
    assert all(a is b for a, b in zip(adapter.down.rule_parameters(), adapter.up.rule_parameters(), strict=True))
    adapter.reset_parameters()
    assert adapter(torch.randn(3, 24)).isfinite().all()


@pytest.mark.parametrize("way", ["swap", "overwrite"])
def test_a_shared_rule_is_one_however_torch_converts(way: str) -> None:
    adapter = ck.CompacterAdapter(24, reduction_factor=2)
    switch = getattr(torch.__future__, f"set_{way}_module_params_on_conversion")
    switch(True)
    try:
        adapter.double()
    finally:
        switch(False)
    assert adapter.down.phm_rule is adapter.up.phm_rule and adapter.down.phm_rule.dtype == torch.float64


def test_functional_call_and_shallow_copies() -> None:
    adapter = ck.CompacterAdapter(24, reduction_factor=2)
    x: Tensor = torch.randn(3, 24)
    values = {key: p.detach() + 1 for key, p in adapter.named_parameters()}
    found = torch.func.functional_call(adapter, values, (x,))
    assert torch.equal(copy.copy(adapter)(x), adapter(x))
    adapter.load_state_dict(values, strict=False)  # `values` has the shared rule under one of its two names
    assert torch.equal(found, adapter(x))
