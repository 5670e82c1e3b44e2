"""Modules built like those of OpenDelta, T-Few and the authors, which are known by structure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import BF16
from phm_lookalikes import Activations, LookalikeLinear, OpenDeltaHost, OriginalAdapter, TFewAdapter, hooks_known, swish
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import compacter_kernels as ck
from compacter_kernels.patch import phm_modules
from compacter_kernels.patch.patch import patch, unpatch

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no bias": {"bias": False},
    "rank": {"phm_rank": 2},
    "factorised rule": {"factorized_phm_rule": True},
    "unfactorised W": {"factorized_phm": False},
    "rule not learned": {"learn_phm": False},
}
ADAPTERS: dict[str, tuple[type[nn.Module], str]] = {
    "original": (OriginalAdapter, "one kernel"),
    "T-Few": (TFewAdapter, "one kernel, with the residual"),
    "OpenDelta": (OpenDeltaHost, "one kernel, with the residual"),
}


def _step(model: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    model.zero_grad()
    y = (model if call is None else call)(x)
    (y * torch.linspace(0.5, 1, y.numel()).reshape(y.shape)).sum().backward()  # all of one sign: no sum vanishes
    assert x.grad is not None
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def _built(name: str, **options: Any) -> nn.Module:
    model = ADAPTERS[name][0](**options)
    model(torch.randn(2, 32))  # OpenDelta creates its layers in this call
    return model


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_whole_adapters(name: str, options: str) -> None:
    model = _built(name, **OPTIONS[options])
    expected = _step(model)
    report = patch(model)
    assert [note for _, note in report.patched] == [ADAPTERS[name][1]]
    assert not report.skipped
    _assert_same(_step(model), expected)


def test_opendelta_with_a_tuple() -> None:
    model = _built("OpenDelta", as_tuple=True)
    expected = _step(model)
    patch(model)
    _assert_same(_step(model), expected)


@pytest.mark.parametrize(
    ("f", "fused"),
    [
        *(
            (f, True)
            for f in (F.relu, torch.tanh, F.gelu, F.leaky_relu, swish, nn.SiLU(), nn.GELU("tanh"), nn.Identity())
        ),
        *((f, False) for f in (F.softplus, nn.ELU(), nn.LeakyReLU(0.2), nn.ReLU6(), lambda x: x.clamp(-30, 30) ** 2)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("kind", [OriginalAdapter, TFewAdapter])
def test_activations(kind: type[nn.Module], f: Any, fused: bool) -> None:
    model = kind(f=f)
    expected = _step(model)
    (entry,) = patch(model).patched
    assert ("activation" not in entry.what) == fused
    _assert_same(_step(model), expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_single_layers(options: str) -> None:
    model = nn.Sequential(LookalikeLinear(32, 16, **OPTIONS[options]), nn.Tanh(), LookalikeLinear(16, 32, phm_dim=2))
    expected = _step(model)
    report = patch(model)
    assert [(name, note) for name, note in report.patched] == [(name, "one kernel for the layer") for name in "02"]
    _assert_same(_step(model), expected)


@pytest.mark.parametrize("factorised", [False, True])
def test_weights_that_are_set_from_outside(factorised: bool) -> None:
    options = {"shared_phm_rule": True, "shared_W_phm": True, "factorized_phm_rule": factorised}
    model = nn.ModuleList([OriginalAdapter(**options, factorized_phm=factorised) for _ in range(2)])
    report = patch(model)
    assert not report.patched
    assert all("have not been set yet" in note for _, note in report.skipped)
    donor = OriginalAdapter(factorized_phm_rule=factorised, factorized_phm=factorised)
    for adapter in model:
        for side in ("down_sampler", "up_sampler"):
            layer, source = getattr(adapter, side), getattr(donor, side)
            layer.set_phm_rule(**{k: v for k, v in source.named_parameters() if "rule" in k})
            layer.set_W(**{k: v for k, v in source.named_parameters() if k.startswith("W")})
    chain = nn.Sequential(*model)
    expected = _step(chain)
    assert len(patch(chain).patched) == 2
    _assert_same(_step(chain), expected)
    model[0].down_sampler.set_phm_rule(**{k: v for k, v in donor.up_sampler.named_parameters() if "rule" in k})
    actual = _step(chain)  # a patched layer reads a rule that was set later
    unpatch(chain)
    _assert_same(actual, _step(chain))


class _Scaled(OriginalAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _Dropping(OriginalAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class _Normed(OriginalAdapter):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class _Raising(OriginalAdapter):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 5:
            raise KeyError("only five")
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (_Scaled, "its forward computes something else than up(act(down(x))), with or without + x"),
        (_Dropping, "its forward computes something else than up(act(down(x))), with or without + x"),
        (_Normed, "it also holds norm"),
        (_Raising, "asking its forward failed: KeyError: 'only five'"),
    ],
)
def test_adapters_that_are_something_else_run_layer_by_layer(kind: type[nn.Module], why: str) -> None:
    model = nn.Sequential(kind()).eval()
    expected = _step(model)
    report = patch(model)
    assert report.skipped == (("0", f"{why}; its PHM layers run one by one"),)
    assert [name for name, _ in report.patched] == ["0.down_sampler", "0.up_sampler"]
    _assert_same(_step(model), expected)


class _Transposed(LookalikeLinear):
    def forward(self, x: Tensor, phm_rule: Any = None) -> Tensor:
        return super().forward(x.flip(-1))


def test_a_layer_that_is_something_else_is_left() -> None:
    model = nn.Sequential(_Transposed(32, 16), LookalikeLinear(16, 8))
    expected = _step(model)
    report = patch(model)
    assert report.skipped == (("0", "its forward computes something else than x H + b"),)
    assert [name for name, _ in report.patched] == ["1"]
    assert "forward" not in vars(model[0])
    _assert_same(_step(model), expected)


@hooks_known
def test_probing_changes_nothing() -> None:
    model = _built("T-Few", learn_phm=False)
    model.train()
    model.up_sampler.eval()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    model.down_sampler.register_forward_hook(lambda *_: calls.append("hook"))
    before = {name: (p, p.clone(), p.requires_grad, p._version) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert phm_modules.patch_module(model.down_sampler) == (True, "one kernel for the layer")
    assert phm_modules.patch_module(model) == (True, "one kernel, with the residual")
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls
    assert [module.training for module in model.modules()] == modes
    for name, p in model.named_parameters():
        same, value, requires_grad, version = before[name]
        assert p is same and torch.equal(p, value) and p.requires_grad == requires_grad and p._version == version


def test_a_model_without_memory_is_probed_too() -> None:
    model = OriginalAdapter().to("meta")
    assert [note for _, note in patch(model).patched] == ["one kernel"]


def test_opendelta_before_its_first_call() -> None:
    model = OpenDeltaHost()
    report = patch(model)
    assert report.skipped == (("compactor", "it makes its layers in its first call; patch after that"),)
    _step(model)
    assert [name for name, _ in patch(model).patched] == ["compactor"]


@pytest.mark.parametrize("part", ["down_sampler", "activation", "up_sampler"])
def test_hooks_inside_are_run(part: str) -> None:
    for name in ADAPTERS:
        model = _built(name)
        module = getattr(getattr(model, "compactor", model), part)
        if isinstance(module, nn.Module):
            module.register_forward_hook(lambda module, args, output: output + 1)
            expected = _step(model)
            patch(model)
            _assert_same(_step(model), expected)


def test_float32_adapters_under_a_bfloat16_x() -> None:
    model = OriginalAdapter()
    x = torch.randn(3, 32)
    expected = model(x).detach()
    patch(model)
    y = model(x.to(BF16))
    assert y.dtype == BF16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_checkpointing(name: str, use_reentrant: bool) -> None:
    model = _built(name)
    expected = _step(model)
    patch(model)
    _assert_same(_step(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)), expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_compiles(name: str) -> None:
    model = _built(name)
    expected = _step(model)
    patch(model)
    torch._dynamo.reset()
    _assert_same(_step(model, torch.compile(model, fullgraph=True, backend="aot_eager")), expected)


def test_modules_of_this_package_are_not_taken_for_others() -> None:
    report = patch(nn.Sequential(ck.CompacterAdapter(32, reduction_factor=4)))
    assert not report.patched
    assert {note for _, note in report.skipped} == {"it is one of compacter_kernels"}
    assert not phm_modules.is_phm_layer(nn.Linear(4, 4))
    assert not phm_modules.is_adapter(copy.deepcopy(Activations(F.relu)))
