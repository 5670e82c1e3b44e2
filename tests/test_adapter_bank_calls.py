"""AdapterBank under torch.compile, checkpointing and autocast, in bfloat16 and with dropout."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from oracle import BF16, FP32
from test_adapter_bank import KINDS, ROUTES, make, of_kind, results
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _call(options: dict[str, Tensor], run: Any, x: Tensor) -> Tensor:
    return run(x, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_compile_one_graph_for_all_batches(kind: str) -> None:
    torch._dynamo.reset()
    bank = of_kind(kind, scale="learned")
    compiled = torch.compile(bank, fullgraph=True, dynamic=True, backend="aot_eager")
    for turn, batch in enumerate((4, 7, 3)):
        x, ids = torch.randn(batch, 5, 24), torch.randint(-1, 3, (batch,))
        w = torch.rand(batch, 3)
        for options in ({"route": ids}, {"mix": w}):
            call = functools.partial(_call, options)
            expected, actual = (results(run, functools.partial(call, run), x, None) for run in (bank, compiled))
            with torch._dynamo.config.patch(error_on_recompile=turn > 1):
                for one, other in zip(actual, expected, strict=True):
                    torch.testing.assert_close(one, other)
    torch.testing.assert_close(compiled(x, ["de", None, "nl"]), bank(x, ["de", None, "nl"]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    bank, x, ids = make(), torch.randn(4, 5, 24), ROUTES["samples"]
    expected = results(bank, lambda x: bank(x, ids), x, None)
    grads = [p.grad.clone() for p in bank.parameters()]
    bank.zero_grad()
    actual = results(bank, lambda x: checkpoint(bank, x, ids, use_reentrant=reentrant), x, None)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(bank.parameters(), grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_bf16(kind: str) -> None:
    bank, x, ids = of_kind(kind), torch.randn(4, 5, 24), ROUTES["tokens"]
    with torch.autocast("cpu", BF16):
        assert torch.equal(bank(x, ids), bank(x, ids))
        assert bank(x, ids).dtype == FP32
    low = bank(x.to(BF16), ids)
    assert low.dtype == BF16
    torch.testing.assert_close(low.float(), bank(x.to(BF16).float(), ids), rtol=2**-7, atol=2**-7)
    low.float().sum().backward()
    assert {p.grad.dtype for p in bank.parameters()} == {FP32}


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_in_training(kind: str) -> None:
    bank, x = of_kind(kind, dropout=0.4), torch.randn(40, 10, 24)
    ids = torch.arange(40) % 3
    evaluated = bank.eval()(x, ids) - x
    for options in ({"route": ids}, {"mix": torch.nn.functional.one_hot(ids, 3).float()}):
        delta = bank.train()(x, **options) - x
        dropped = delta.abs() < 1e-6
        assert 0.35 < dropped.float().mean() < 0.45
        torch.testing.assert_close(delta[~dropped], (evaluated / 0.6)[~dropped], rtol=1e-3, atol=1e-4)
