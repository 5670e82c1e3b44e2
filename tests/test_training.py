"""Tools that a training script uses around a layer.

These are autocast, activation checkpointing, functional calls, and DDP.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from oracle import BF16, FP16, FP32, FUSED, IMPLS, Case, assert_same_bits, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import compacter_kernels as ck

CASES = [Case("linear", shape=(9,), rank=2), Case(shape=(9,)), Case(shape=(9,), dtype=BF16, residual="other")]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("autocast", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["x=fp32", "x=bf16"])
@pytest.mark.parametrize("operation", ["linear", "adapter"])
def test_autocast_changes_no_bit(operation: str, dtype: torch.dtype, autocast: torch.dtype, impl: str) -> None:
    """The output has the dtype of x. Inside, the impl uses its own precision."""
    case = Case(operation, shape=(9,), dtype=dtype)
    tensors = case.tensors()
    expected = run(case, tensors, impl)
    with torch.autocast("cpu", autocast):
        out = case.call(tensors, impl)
    grads = torch.autograd.grad(out, list(tensors.values()), case.grad_output())
    assert out.dtype == dtype
    assert_same_bits({"out": out, **dict(zip(tensors, grads, strict=True))}, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_adapter_in_an_autocast_model(impl: str) -> None:
    """The activation of a frozen layer is bf16. Weights and gradients of the adapter are fp32."""
    adapter = ck.CompacterAdapter(24, reduction_factor=2, impl=impl)
    model = nn.Sequential(nn.Linear(24, 24).requires_grad_(False), adapter)
    with torch.autocast("cpu", BF16):
        out = model(torch.randn(9, 24))
    assert out.dtype == BF16
    out.float().square().sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {FP32}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_activation_checkpointing(case: Case, reentrant: bool, impl: str) -> None:
    tensors = case.tensors()

    def call(*ts: Tensor) -> Tensor:
        return case.call(dict(zip(tensors, ts, strict=True)), impl)

    out = checkpoint(call, *tensors.values(), use_reentrant=reentrant)
    out.backward(case.grad_output())
    got = {"out": out, **{name: t.grad for name, t in tensors.items()}}
    assert_same_bits(got, run(case, case.tensors(), impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_functional_call(impl: str) -> None:
    module = ck.CompacterAdapter(24, reduction_factor=2, impl=impl)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    x = torch.randn(5, 24)
    state = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    out = torch.func.functional_call(module, state, (x,))
    assert torch.equal(out, other(x))
    out.sum().backward()
    other(x).sum().backward()
    for name, p in other.named_parameters():
        torch.testing.assert_close(state[name].grad, p.grad)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("impl", FUSED)
def test_tensor_subclass_goes_through_the_operator(impl: str) -> None:
    """A mode or a subclass sees one operator.

    An ordinary tensor goes directly to the kernel.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    for operation in ("linear", "adapter"):
        case = Case(operation, shape=(9,))
        with FakeTensorMode() as mode:
            out = case.call({name: mode.from_tensor(t.detach()) for name, t in case.tensors().items()}, impl)
        assert out.shape == case.grad_output().shape


@pytest.mark.parametrize("impl", ["dense", "factored"])
def test_meta_tensors(impl: str) -> None:
    module = ck.CompacterAdapter(24, reduction_factor=2, impl=impl, device="meta")
    for context in (nullcontext(), torch.autocast("cpu", BF16)):
        with context:
            assert module(torch.empty(3, 5, 24, device="meta")).shape == (3, 5, 24)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    """Two adapters share one rule, in one process."""
    rule = nn.Parameter(torch.randn(4, 4, 4))
    model = nn.Sequential(*(ck.CompacterAdapter(24, reduction_factor=2, phm_rule=rule) for _ in range(2)))
    x = torch.randn(6, 24)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    nn.parallel.DistributedDataParallel(model)(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
