"""LoKr modules of lycoris under ck.patch: the same outputs and gradients, with every option.

The oracle is lycoris itself in float64. lycoris and the patch draw the same random numbers.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lokr_layers import assert_within_contract, exact_step, step
from oracle import BF16, FP16, FP32, FP64
from test_patch_lokr_models import Largest
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.dispatch import ENVIRONMENT
from compacter_kernels.saved import saved_bytes

pytest.importorskip("lycoris", reason="lycoris is not installed")
from lycoris.modules.lokr import LokrModule
from lycoris.wrapper import LycorisNetwork, create_lycoris

pytestmark = [
    # torch.compile gives these warnings
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

# the options of LokrModule for a layer 60 -> 96. In the comment: w1 and w2, or their two factors
SETUPS: dict[str, dict[str, Any]] = {
    "low rank": {"lora_dim": 2},  # 8x6, 12x2 2x10
    "whole w2": {"lora_dim": 6},  # 8x6, 12x10
    "full matrix": {"full_matrix": True},
    "factorised w1": {"lora_dim": 3, "decompose_both": True},  # 8x3 3x6, 12x3 3x10
    "factor 4": {"lora_dim": 2, "factor": 4},  # 4x4, 24x2 2x15
    "unbalanced": {"lora_dim": 2, "unbalanced_factorization": True},  # 12x6, 8x2 2x10
    "alpha and rs_lora": {"lora_dim": 2, "alpha": 8, "rs_lora": True},
    "scalar": {"lora_dim": 2, "use_scalar": True},
    "multiplier": {"lora_dim": 2, "multiplier": 0.7},
    "bypass": {"lora_dim": 2, "bypass_mode": True},
    "bypass of all options": {"lora_dim": 3, "decompose_both": True, "use_scalar": True, "bypass_mode": True},
}
DROPOUTS: dict[str, dict[str, Any]] = {
    "rank": {"rank_dropout": 0.4},
    "scaled rank": {"rank_dropout": 0.4, "rank_dropout_scale": True},
    "module": {"module_dropout": 0.5},
    "bypass": {"dropout": 0.4, "bypass_mode": True},
    "all": {"rank_dropout": 0.4, "module_dropout": 0.5, "dropout": 0.3},
}


@pytest.fixture(autouse=True)
def presets() -> Iterator[None]:
    """create_lycoris changes the class; its log says what it does in colours."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    yield
    for name, value in before.items():
        setattr(LycorisNetwork, name, value)


class Adapted(nn.Module):
    """A layer and the LoKr modules that replace its forward."""

    def __init__(self, layer: nn.Module, *adapters: nn.Module) -> None:
        super().__init__()
        self.layer, self.adapters = layer, nn.ModuleList(adapters)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def make(setup: str = "low rank", count: int = 1, **options: Any) -> Any:
    """A frozen layer with `count` LoKr modules whose weights are not zero."""
    layer = nn.Linear(60, 96).requires_grad_(False)
    options = {"alpha": 4, **SETUPS[setup], **options}
    model = Adapted(layer, *(LokrModule(f"a{index}", layer, **options) for index in range(count)))
    for adapter in model.adapters:
        adapter.apply_to()
    for parameter in model.adapters.parameters():
        nn.init.normal_(parameter)
    return model


def patched(model: Any) -> Any:
    """A patched copy."""
    model = copy.deepcopy(model)
    report = ck.patch(model)
    assert [entry.what for entry in report.patched] == len(model.adapters) * ["LoKr from its factors"]
    assert not report.skipped
    return model


def batch(dtype: torch.dtype = FP32, leading: tuple[int, ...] = (3, 5)) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output."""
    return torch.randn(*leading, 60).to(dtype), torch.randn(*leading, 96).to(dtype)


def assert_same_step(model: Any, *args: Any, seed: int = 1, **options: Any) -> None:
    """The model and a patched copy of it agree."""
    exact, shipped = exact_step(model, *args, seed=seed), step(model, *args, seed=seed, **options)
    assert_within_contract(step(patched(model), *args, seed=seed, **options), shipped, exact)


def test_the_setups_have_the_parts_that_they_name() -> None:
    kinds = {(adapter.use_w1, adapter.use_w2) for setup in SETUPS for adapter in make(setup).adapters}
    assert kinds == {(True, True), (True, False), (False, False)}
    assert [tuple(p.shape) for p in make("unbalanced").adapters.parameters()] == [(12, 6), (8, 2), (2, 10)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("setup", SETUPS)
def test_float32(setup: str, training: bool, count: int) -> None:
    assert_same_step(make(setup, count).train(training), *batch())


@pytest.mark.parametrize("setup", SETUPS)
def test_float64(setup: str) -> None:
    model, (x, grad) = make(setup).double(), batch(FP64)
    expected = step(model, x, grad)
    for name, value in step(patched(model), x, grad).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("setup", SETUPS)
def test_a_model_of_low_precision(setup: str, dtype: torch.dtype) -> None:
    """Its adapters too, or those alone in float32."""
    model = make(setup).to(dtype)
    assert_same_step(model, *batch(dtype))
    if "bypass" not in setup and "decompose_both" not in SETUPS[setup]:  # where lycoris cannot mix dtypes
        model.adapters.float()
        assert_same_step(model, *batch(dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("setup", ["low rank", "whole w2", "factorised w1", "bypass"])
def test_autocast(setup: str, dtype: torch.dtype) -> None:
    assert_same_step(make(setup), *batch(), autocast=dtype)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("setup", ["low rank", "whole w2", "scalar"])
def test_dropout_in_training(setup: str, dropout: str, seed: int) -> None:
    model = make(setup, count=2, **DROPOUTS[dropout]).train()
    assert_same_step(model, *batch(), seed=seed)


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_dropout_drops(dropout: str) -> None:
    """Seeds differ in training, but not in evaluation; lycoris would draw as many numbers."""
    model, (x, grad) = make(**DROPOUTS[dropout]), batch()
    again = patched(model)
    outputs = [[step(again.train(mode), x, grad, seed=seed)["y"] for seed in range(8)] for mode in (True, False)]
    assert any(not torch.equal(y, outputs[0][0]) for y in outputs[0])
    assert all(torch.equal(y, outputs[1][0]) for y in outputs[1])
    drawn = []
    for one in (model.train(), again.train()):
        step(one, x, grad)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


def test_rank_dropout_of_low_precision() -> None:
    model = make(rank_dropout=0.4, rank_dropout_scale=True).to(BF16).train()
    assert_same_step(model, *batch(BF16))


def test_the_multiplier_may_change_behind_the_patch() -> None:
    model, (x, grad) = make(), batch()
    again = patched(model)
    for one in (model, again):
        one.adapters[0].multiplier = -0.3
    assert_within_contract(step(again, x, grad), step(model, x, grad), exact_step(model, x, grad))


@pytest.mark.parametrize("impl", ["auto", "factored"])
@pytest.mark.parametrize("options", [{}, {"rank_dropout": 0.5}], ids=["plain", "dropout"])
@pytest.mark.parametrize("setup", [name for name in SETUPS if "bypass" not in name])
def test_no_matrix_of_the_size_of_the_weight(
    setup: str, options: dict[str, Any], impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, impl)
    model = make(setup, count=2, **options).train()
    size, (x, grad) = model.layer.weight.numel(), batch(leading=(2,))
    largest = []
    for one in (model, patched(model)):
        with Largest([*one.parameters(), x, grad]) as mode:
            step(one, x, grad)
        largest.append(mode.largest)
    assert largest[0] >= size  # the test sees what lycoris makes
    assert largest[1] < size


@pytest.mark.parametrize("impl", ["auto", "factored"])
@pytest.mark.parametrize("setup", ["low rank", "whole w2", "factor 4", "multiplier", "bypass"])
def test_only_x_and_the_parameters_are_kept(setup: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, impl)
    model, x = patched(make(setup)), torch.randn(2, 60, requires_grad=True)
    assert saved_bytes(lambda: model(x), (*model.parameters(), x)) == 0


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("setup", ["low rank", "whole w2", "scalar", "bypass"])
def test_compiles_without_a_break(setup: str, training: bool) -> None:
    model, (x, grad) = make(setup, count=2).train(training), batch()
    torch._dynamo.reset()
    again = torch.compile(patched(model), fullgraph=True, backend="aot_eager")
    assert_within_contract(step(again, x, grad), step(model, x, grad), exact_step(model, x, grad))


def test_unpatch_restores_bitwise() -> None:
    model, (x, grad) = make("whole w2", count=2), batch()
    attributes, expected, state = set(vars(model.adapters[0])), step(model, x, grad), list(model.state_dict())
    report = ck.patch(model)
    assert report.patched == (("layer", "LoKr from its factors"),) * 2
    assert ck.patch(model) == report  # again
    assert list(model.state_dict()) == state
    assert not torch.equal(step(model, x, grad)["y"], expected["y"])  # it rounds differently
    assert ck.unpatch(model).restored == (("layer", "_rebuild_forward, bypass_forward"),) * 2
    assert set(vars(model.adapters[0])) == attributes
    actual = step(model, x, grad)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_merge_is_that_of_lycoris() -> None:
    model = make("whole w2")
    again = patched(model)
    for one in (model, again):
        with torch.no_grad():
            one.adapters[0].merge_to(0.5)
        one.adapters[0].restore()
    assert torch.equal(model.layer.weight, again.layer.weight)
    x, _ = batch()
    assert torch.equal(model(x), again(x))


def test_training_gives_the_same_losses() -> None:
    model = make(count=2, rank_dropout=0.1).double().train()
    x, target = batch(FP64, (16,))
    curves = []
    for one in (model, patched(model)):
        torch.manual_seed(5)
        optimizer, losses = torch.optim.AdamW(one.adapters.parameters(), lr=1e-2), []
        for _ in range(20):
            loss = (one(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-9)
    assert curves[0][-1] < 0.9 * curves[0][0]


class _Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(x).flatten(2).mT)
        return found


@pytest.mark.parametrize("through", ["the network", "the model"])
def test_a_network_of_lycoris(through: str) -> None:
    """Found in the network and in the model. Convolutions stay as they are and are reported."""
    model = _Convolution()
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1, algo="lokr", warn_on_unmatched=False)
    with pytest.raises(ValueError, match=r"nor one of `lycoris` that apply_to\(\) put onto it"):
        ck.patch(model)
    network.apply_to()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    names = ("lycoris_first", "lycoris_last") if through == "the network" else ("first", "last")
    one = network if through == "the network" else model
    report = ck.patch(one)
    assert report.patched == ((names[1], "LoKr from its factors"),)
    assert report.skipped == ((names[0], "LoKr of a Conv2d: `lycoris` builds its matrix"),)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in ck.unpatch(one).restored] == [names[1]]
    assert torch.equal(model(x), expected)


def test_modules_that_the_factors_cannot_serve_are_left_and_reported() -> None:
    model = make(weight_decompose=True)
    assert "weight_decompose (DoRA)" in ck.patch(model).skipped[0].what

    class Own(LokrModule):
        def get_weight(self, *args: Any) -> Tensor:
            return 2 * super().get_weight(*args)

    model = make()
    model.adapters[0].__class__ = Own
    assert ck.patch(model).skipped == (("layer", "Own has a forward of its own"),)
    layer = nn.Linear(60, 96)
    LokrModule.parametrize(layer, "weight", lora_dim=2)
    assert ck.patch(layer).skipped == (
        ("parametrizations.weight.0", "its forward was replaced on the module, as by LokrModule.parametrize"),
    )


def test_a_version_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.0.0")
    with pytest.raises(RuntimeError, match=r"lycoris-lora 5\.0\.0 is not known to ck\.patch, .* of 4\.1; install that"):
        ck.patch(model)
