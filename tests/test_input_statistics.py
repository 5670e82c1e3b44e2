"""InputStatistics: the sum is the recursion, in any batches, and wrong rows change nothing."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from oracle import BF16, FP16, FP32
from torch import Tensor, nn

import compacter_kernels as ck

FP64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def statistics(*batches: Tensor, forget: float = 1.0) -> ck.InputStatistics:
    stats = ck.InputStatistics(forget)
    for x in batches:
        stats.update(x)
    return stats


def recursion(x: Tensor, forget: float) -> Tensor:
    """C <- forget * C + x^T x, row by row."""
    c = torch.zeros(x.shape[1], x.shape[1], dtype=FP64)
    for row in x.double():
        c = forget * c + torch.outer(row, row)
    return c


@pytest.mark.parametrize("forget", [1.0, 0.9, 1e-3])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_it_is_the_recursion(dtype: torch.dtype, forget: float) -> None:
    x = draw(50, 6).to(dtype)
    stats = statistics(x, forget=forget)
    assert (stats.rows, stats.covariance.dtype) == (50, FP64)
    torch.testing.assert_close(stats.covariance, recursion(x, forget), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("forget", [1.0, 0.97])
def test_two_halves_equal_one(forget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(90, 5)
    whole = statistics(x, forget=forget).covariance
    monkeypatch.setattr("compacter_kernels.input_statistics.ROWS", 7)
    first, second = statistics(x[:40], forget=forget), statistics(x[40:], forget=forget)
    for stats in (
        statistics(x, forget=forget),
        statistics(x[:40], x[40:], forget=forget),
        statistics(*x.split(1), forget=forget),
    ):
        torch.testing.assert_close(stats.covariance, whole, rtol=1e-12, atol=1e-12)
    first.merge(second)
    assert first.rows == 90
    torch.testing.assert_close(first.covariance, whole, rtol=1e-12, atol=1e-12)
    empty = ck.InputStatistics(forget)
    empty.merge(first)
    empty.merge(ck.InputStatistics(forget))
    assert torch.equal(empty.covariance, first.covariance) and empty.rows == 90


def test_any_leading_dimensions_and_strides() -> None:
    x = draw(4, 3, 2, 5)
    expected = recursion(x.reshape(-1, 5), 1.0)
    for view in (x, x.reshape(12, 2, 5), x.transpose(0, 2).contiguous().transpose(0, 2)):
        torch.testing.assert_close(statistics(view).covariance, expected)
    torch.testing.assert_close(statistics(*x.reshape(-1, 5).unbind()).covariance, expected)
    stats = statistics(x[:0])
    assert stats.rows == 0 and not stats.covariance.any()


def test_recording_adds_the_inputs_of_a_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    x, stats = torch.randn(2, 7, 6, requires_grad=True), ck.InputStatistics()
    with stats.recording(model[2]) as same:
        model[2](input=model[:2](x))
    model(x)
    assert same is stats and stats.rows == 14 and not stats.covariance.requires_grad
    inside = model[1](model[0](x)).detach().double().flatten(0, 1)
    torch.testing.assert_close(stats.covariance, inside.T @ inside)
    with pytest.raises(RuntimeError, match="stop"), stats.recording(model[2]):
        raise RuntimeError("stop")
    assert not model[2]._forward_pre_hooks


def test_save_and_load() -> None:
    stats = statistics(draw(20, 4), forget=0.9)
    torch.save(stats.state_dict(), file := io.BytesIO())
    file.seek(0)
    loaded = ck.InputStatistics()
    loaded.load_state_dict(torch.load(file))
    for each in (stats, loaded):
        each.update(draw(5, 4, seed=1))
    assert torch.equal(stats.covariance, loaded.covariance) and repr(stats) == repr(loaded)
    assert repr(loaded) == "InputStatistics(forget=0.9, rows=25, width=4)"


WRONG: list[tuple[Any, type[Exception], str]] = [
    ([1.0], TypeError, "x must be a float tensor, got list"),
    (torch.ones(2, 4, dtype=torch.long), TypeError, "got torch.int64"),
    (torch.ones(2, 4, dtype=torch.complex64), TypeError, "got torch.complex64"),
    (torch.tensor(1.0), ValueError, r"x must have shape \(..., width\), got \(\)"),
    (torch.ones(2, 0), ValueError, r"got \(2, 0\)"),
    (torch.ones(2, 5), ValueError, "x has the width 5 on cpu, the rows before had 4 on cpu"),
    (torch.ones(2, 4, device="meta"), ValueError, "on meta"),
    (torch.tensor([[1.0, float("nan"), 1.0, 1.0]]), ValueError, "NaN or infinite"),
    (torch.tensor([[1.0, 1.0, float("-inf"), 1.0]]), ValueError, "NaN or infinite"),
    (torch.full((1, 4), 1e200, dtype=FP64), ValueError, "squares are too large"),
]


@pytest.mark.parametrize(("x", "kind", "match"), WRONG, ids=[entry[-1][-20:] for entry in WRONG])
def test_wrong_rows_change_nothing(x: Any, kind: type[Exception], match: str) -> None:
    stats = statistics(draw(3, 4))
    before = stats.covariance.clone()
    with pytest.raises(kind, match=match):
        stats.update(x)
    assert torch.equal(stats.covariance, before) and stats.rows == 3


@pytest.mark.parametrize("forget", [0, -0.5, 1.5, float("nan"), "1", True, None])
def test_wrong_forget(forget: Any) -> None:
    with pytest.raises(ValueError, match="forget must be a number above 0 and at most 1"):
        ck.InputStatistics(forget)


def test_wrong_merges() -> None:
    stats = statistics(draw(3, 4))
    with pytest.raises(TypeError, match="later must be InputStatistics, got Tensor"):
        stats.merge(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"forget is 0\.5 there and 1\.0 here"):
        stats.merge(ck.InputStatistics(0.5))
    with pytest.raises(ValueError, match="the width is 5 there and 4 here"):
        stats.merge(statistics(draw(3, 5)))
