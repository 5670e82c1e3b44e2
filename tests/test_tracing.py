"""Tracers and exporters record a call. The token count may change afterwards."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import compacter_kernels as ck
from compacter_kernels.impl.cpu import unavailable

pytestmark = pytest.mark.filterwarnings("ignore")  # each of these tools gives warnings
WIDTH = 32


def adapter() -> nn.Module:
    torch.manual_seed(0)
    return ck.CompacterAdapter(WIDTH, reduction_factor=4, phm_init_range=1.0, dtype=torch.float32)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(ck.PHMLinear(WIDTH, 16), nn.Tanh(), ck.PHMLinear(16, WIDTH))


MODULES = {"adapter": adapter, "layers": layers}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return MODULES[request.param]().eval()


def check(found: Callable[[Tensor], Tensor], module: nn.Module) -> None:
    for count in (5, 9):
        x = torch.randn(count, WIDTH)
        torch.testing.assert_close(found(x).detach(), module(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_jit_trace(module: nn.Module, trained: bool, tmp_path: Path) -> None:
    """The trace consists of operators of torch, and can be saved and loaded."""
    traced = torch.jit.trace(module.requires_grad_(trained), torch.randn(5, WIDTH))
    check(traced, module)
    assert "compacter_kernels::" not in str(traced.inlined_graph)
    traced.save(tmp_path / "traced.pt")
    check(torch.jit.load(tmp_path / "traced.pt"), module)


def test_make_fx(module: nn.Module) -> None:
    """A fused impl is one operator in the graph."""
    graph = make_fx(module.requires_grad_(False))(torch.randn(5, WIDTH))
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(graph(x), module(x), rtol=1e-4, atol=1e-4)
    assert ("compacter_kernels" in str(graph.graph)) == (unavailable() is None)


def test_make_fx_of_a_gradient() -> None:
    module = adapter()

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(module(x).square().sum(), x)[0]  # type: ignore[no-any-return]

    x = torch.randn(5, WIDTH, requires_grad=True)
    torch.testing.assert_close(make_fx(gradient)(x)(x), gradient(x), rtol=1e-4, atol=1e-4)


def test_a_dispatch_mode_sees_the_call(module: nn.Module) -> None:
    x = torch.randn(5, WIDTH)
    expected = module(x)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def onnx_of(module: nn.Module, dynamo: bool, arguments: tuple[Any, ...], folder: Path) -> Callable[..., Tensor]:
    """The output of the exported model in onnx's reference evaluator."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    if dynamo:
        shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in arguments)
        path = folder / "model.onnx"
        torch.onnx.export(module, arguments, dynamo=True, dynamic_shapes=shapes, verbose=False).save(path)
        model = onnx.load(path)
    else:
        names = [f"input{i}" for i in range(len(arguments))]
        file = io.BytesIO()
        axes = {name: {0: "rows"} for name in names}
        torch.onnx.export(module, arguments, file, dynamo=False, input_names=names, dynamic_axes=axes)
        model = onnx.load_from_string(file.getvalue())
    evaluator = ReferenceEvaluator(model)

    def run(*inputs: Tensor) -> Tensor:
        named = {given.name: value.numpy() for given, value in zip(model.graph.input, inputs, strict=True)}
        return torch.from_numpy(evaluator.run(None, named)[0])

    return run


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(dynamo: bool, tmp_path: Path) -> None:
    module = adapter().eval().requires_grad_(False)
    check(onnx_of(module, dynamo, (torch.randn(5, WIDTH),), tmp_path), module)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        return logits


def injected() -> nn.Module:
    model = build("bert", attn_implementation="eager")
    torch.manual_seed(1)
    config = ck.CompacterConfig(reduction_factor=4, phm_init_range=1.0)
    return ck.inject(model, config).eval().requires_grad_(False)


def patched() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("adapters")
        from adapters_models import make
    model = make("bert").eval().requires_grad_(False)
    ck.patch(model)
    return model


MODELS = {"inject": injected, "patch": patched}
TOKENS = torch.randint(2, 20, (3, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", MODELS)
def test_whole_models_traced(kind: str) -> None:
    model = Logits(MODELS[kind]()).eval()
    expected = model(TOKENS)
    traced = torch.jit.trace(model, TOKENS[:2], check_trace=False)
    ck.unpatch(model.model) if kind == "patch" else None
    torch.testing.assert_close(traced(TOKENS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_whole_model_as_onnx(dynamo: bool, tmp_path: Path) -> None:
    model = Logits(injected()).eval()
    found = onnx_of(model, dynamo, (TOKENS,), tmp_path)
    torch.testing.assert_close(found(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)
