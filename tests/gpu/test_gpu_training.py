"""The tools that a training script uses around a layer, on the device.

These are compile, export, autocast, checkpointing and deepcopy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from on_device import DEVICE, SERVING, inputs
from oracle import BF16, FP16, FP32, Case, assert_same_bits, bits, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import compacter_kernels as ck

WIDE = {"width": 768, "bottleneck": 24}
CASES = [
    Case("linear", residual="none", shape=(50,), **WIDE),
    Case(residual="x", shape=(50,), dtype=BF16, **WIDE),
    Case(residual="other", shape=(50,), dtype=FP16, bias=False, scale=0.5, activation="relu", **WIDE),
]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("default")  # inductor gives advice by warnings
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compile(case: Case, impl: str, backend: str) -> None:
    """One graph serves all token counts and gives the bits of eager mode."""
    compiled = torch.compile(lambda t: case.call(t, impl), fullgraph=True, dynamic=True, backend=backend)
    for count, tokens in enumerate((50, 7, 333)):
        sized = Case(**{**vars(case), "shape": (tokens,)})
        tensors, grad = inputs(sized)
        with torch._dynamo.config.patch(error_on_recompile=count > 0):
            out = compiled(tensors)
            grads = torch.autograd.grad(out, list(tensors.values()), grad)
        got = {"out": out.detach(), **dict(zip(tensors, grads, strict=True))}
        assert_same_bits(got, run(sized, tensors, impl, grad))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("impl", SERVING)
def test_export(impl: str) -> None:
    module = ck.CompacterAdapter(768, impl=impl, device=DEVICE)
    x = torch.randn(6, 768, device=DEVICE)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},))
    assert any("compacter_kernels" in str(node.target) for node in exported.graph.nodes)
    other = torch.randn(77, 768, device=DEVICE)
    assert torch.equal(exported.module()(other), module(other))


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("autocast", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_changes_no_bit(case: Case, autocast: torch.dtype, impl: str) -> None:
    tensors, grad = inputs(case)
    expected = run(case, tensors, impl, grad)
    with torch.autocast(DEVICE, autocast):
        out = case.call(tensors, impl)
    grads = torch.autograd.grad(out, list(tensors.values()), grad)
    assert_same_bits({"out": out.detach(), **dict(zip(tensors, grads, strict=True))}, expected)


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_activation_checkpointing(case: Case, reentrant: bool, impl: str) -> None:
    tensors, grad = inputs(case)
    expected = run(case, tensors, impl, grad)

    def call(*values: Tensor) -> Tensor:
        return case.call(dict(zip(tensors, values, strict=True)), impl)

    out = checkpoint(call, *tensors.values(), use_reentrant=reentrant)
    out.backward(grad)
    assert_same_bits({"out": out.detach(), **{name: t.grad for name, t in tensors.items()}}, expected)


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_second_derivative_raises(case: Case, impl: str) -> None:
    tensors, _ = inputs(case)
    grads = torch.autograd.grad(case.call(tensors, impl).square().sum(), list(tensors.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grads[-1].sum().backward()


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_module_moved_to_the_device(dtype: torch.dtype, impl: str) -> None:
    """A deepcopy on the device computes the same as the module on the CPU.

    The gradients of the copy do not reach the module.
    """
    module = ck.CompacterAdapter(768, init="adapters")
    there = copy.deepcopy(module).to(DEVICE)
    for part in there.modules():
        if hasattr(part, "impl"):
            part.impl = impl
    x = torch.randn(40, 768, dtype=dtype)
    expected, got = module(x), there(x.to(DEVICE))
    torch.testing.assert_close(got.cpu(), expected, rtol=torch.finfo(dtype).eps * 4, atol=1e-5)
    again = copy.deepcopy(there)
    assert torch.equal(bits(again(x.to(DEVICE))), bits(got))
    got.float().square().sum().backward()
    assert all(p.grad is None for p in (*module.parameters(), *again.parameters()))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in there.parameters() if p.requires_grad)
