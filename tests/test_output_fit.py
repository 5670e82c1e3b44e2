"""from_dense(inputs=): the errors of the outputs fall, C = I is the fit to the matrices."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import BF16, FP32
from test_from_dense import FP64, _dense, _draw, _linear, random_pair
from test_input_statistics import statistics
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels import from_dense, kronecker_fit as kf, output_fit as of


def inputs(rows: int, width: int, seed: int = 5) -> Tensor:
    """Rows whose directions differ by a factor of 100 in size, somewhat as in a trained layer."""
    return _draw(rows, width, seed=seed) * torch.logspace(0, -2, width, dtype=FP64) @ _draw(width, width, seed=6)


def output_error(x: Tensor, layer: ck.PHMLinear, linear: nn.Linear) -> float:
    """|X (H - H')| / |X H| in plain torch."""
    with torch.no_grad():
        y, reached = x @ linear.weight.double().T, x @ layer.weight.double().T
    return ((y - reached).norm() / y.norm()).item()


def sum_of_krons(weights: ck.PHMWeights) -> Tensor:
    w = weights.left if weights.right is None else weights.left @ weights.right
    return sum(torch.kron(a, b) for a, b in zip(weights.rule, w, strict=True))


@pytest.mark.parametrize(("n", "r"), [(1, 2), (2, 3), (4, 1), (4, None), (8, 2)])
def test_c_of_identity_reproduces_the_fit(n: int, r: int | None) -> None:
    """The matrices lie near planted structure, so that the fit to them has converged."""
    matrices = [
        linear.weight.detach().T + 1e-3 * _draw(32, 16).reshape(linear.weight.T.shape)
        for linear in _dense(32, 16, n, r or 4)
    ]
    found = kf.fit(matrices, n, r, starts=2)
    again = of.refit(matrices, [torch.eye(len(h), dtype=FP64) * 7 for h in matrices], found)
    for h, one, other in zip(matrices, found, again, strict=True):
        torch.testing.assert_close(sum_of_krons(other), sum_of_krons(one), rtol=1e-4, atol=1e-4)
        assert kf.relative_error(h, other) == pytest.approx(kf.relative_error(h, one), rel=1e-6)


@pytest.mark.parametrize("keep_rule", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rows", [200, 5])
def test_the_loss_never_rises(rows: int, whole: bool, keep_rule: bool) -> None:
    """Nor where C is singular, with fewer rows than columns. The loss is that of plain torch."""
    n, shapes = 4, [(32, 16), (16, 32)]
    xs, matrices = [inputs(rows, i) for i, _ in shapes], [_draw(*shape, seed=3) for shape in shapes]
    targets = [of.Target(h, x.T @ x, x.T @ x @ h, whole) for x, h in zip(xs, matrices, strict=True)]
    ranks = [o // n if whole else 2 for _, o in shapes]
    lefts = [_draw(n, i // n, r, seed=8) for (i, _), r in zip(shapes, ranks, strict=True)]
    rights = [
        torch.eye(r, dtype=FP64).expand(n, r, r) if whole else _draw(n, r, o // n, seed=9)
        for (_, o), r in zip(shapes, ranks, strict=True)
    ]
    start = kf.State(_draw(n * n, n, seed=7), lefts, rights)
    states = list(kf.descent(partial(of.sweep, targets, keep_rule=keep_rule), start, 40, 0.0))

    def plain(state: kf.State) -> float:
        weights = [ck.PHMWeights(state.rule.T.reshape(n, n, n), *sides) for sides in zip(*state[1:], strict=True)]
        return sum(
            (x @ (h - sum_of_krons(w))).square().sum().item() for x, h, w in zip(xs, matrices, weights, strict=True)
        )

    losses = [loss for _, loss in states]
    assert losses[0] < plain(start)
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] == pytest.approx(plain(states[-1][0]), rel=1e-9, abs=1e-9 * plain(start))
    assert torch.allclose(states[-1][0].rule, start.rule) == keep_rule
    if whole:
        assert all(torch.equal(a, b) for a, b in zip(states[-1][0].right, rights, strict=True))


def test_nothing_near_the_result_is_better() -> None:
    """The gradient of the plain float64 objective vanishes at the result."""
    x, h = inputs(100, 24), _draw(24, 12, seed=2)
    c = x.T @ x
    (found,) = kf.fit([h], 2, 2, starts=2)
    (better,) = of.refit([h], [c], [found])

    def objective(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return (x @ (h - sum_of_krons(ck.PHMWeights(rule, left, right)))).square().sum() / (x @ h).square().sum()

    sizes = []
    for weights in (found, better):
        points = [t.clone().requires_grad_() for t in weights[:3]]
        gradients = torch.autograd.grad(objective(*points), points)
        sizes.append(sum(float((g * t).detach().norm()) for g, t in zip(gradients, points, strict=True)))
    assert sizes[1] < 0.01 * sizes[0]
    assert objective(*better[:3]) < 0.9 * objective(*found[:3])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_the_outputs_of_a_layer_come_nearer(dtype: torch.dtype) -> None:
    linear, x = _linear(_draw(48, 24, seed=1), dtype), inputs(500, 48)
    held_out, stats = inputs(300, 48, seed=11), statistics(x)
    before, _ = ck.PHMLinear.from_dense(linear, phm_dim=4, phm_rank=2, starts=2)
    after, error = ck.PHMLinear.from_dense(linear, inputs=stats, phm_dim=4, phm_rank=2, starts=2)
    assert error == pytest.approx(output_error(x, after, linear), rel=2e-2 if dtype == BF16 else 1e-5)
    assert error < 0.9 * output_error(x, before, linear)
    assert output_error(held_out, after, linear) < 0.9 * output_error(held_out, before, linear)
    assert torch.equal(after.b, linear.bias)


def test_planted_structure_comes_back_where_the_inputs_go() -> None:
    """The inputs see half of the directions. There, H is a sum of Kronecker products."""
    planted = _dense(32, 16, 4, 2)[0].weight.detach().T
    basis = torch.linalg.qr(_draw(32, 32, seed=4)).Q
    seen, unseen = basis[:16], basis[16:]
    h = planted + 3 * unseen.T @ unseen @ _draw(32, 16, seed=3)
    x = _draw(400, 16, seed=5) @ seen
    _, error = ck.PHMLinear.from_dense(_linear(h), inputs=statistics(x), phm_dim=4, phm_rank=2)
    plain, _ = ck.PHMLinear.from_dense(_linear(h), phm_dim=4, phm_rank=2)
    assert error < 0.1 < output_error(x, plain, _linear(h))


def test_the_inputs_of_down_and_of_up() -> None:
    down, up = random_pair(24, 12)
    x = inputs(200, 24)
    z = torch.relu(x @ down.weight.detach().T)
    runs = {
        name: from_dense(down, up, inputs=given, phm_dim=2, phm_rank=2, starts=2)
        for name, given in {
            "none": None,
            "down": statistics(x),
            "up": (None, statistics(z)),
            "both": (statistics(x), statistics(z)),
        }.items()
    }
    reached = {
        name: (output_error(x, run.adapter.down, down), output_error(z, run.adapter.up, up))
        for name, run in runs.items()
    }
    assert runs["both"].errors[0] == pytest.approx(reached["both"], rel=1e-9)
    assert runs["down"].errors[0][0] == pytest.approx(reached["down"][0], rel=1e-9)
    assert reached["down"][0] < reached["none"][0] and reached["up"][1] < reached["none"][1]
    assert sum(e**2 for e in reached["both"]) < sum(e**2 for e in reached["none"])
    assert from_dense(down, up, inputs=(None, None), phm_dim=2, phm_rank=2, starts=2).errors == runs["none"].errors


def test_several_adapters_and_a_given_rule() -> None:
    pairs = [random_pair(24, 12), random_pair(24, 6)]
    given = [statistics(inputs(200, 24)), (None, statistics(inputs(200, 6, seed=8)))]
    rule = nn.Parameter(_draw(3, 3, 3))
    for options in ({"phm_dim": 3}, {"phm_rule": rule}, {"phm_dim": 3, "shared_phm_rule": False}):
        before = from_dense(pairs, phm_rank=1, starts=2, **options)
        after = from_dense(pairs, inputs=given, phm_rank=1, starts=2, **options)
        x = inputs(200, 24)
        assert after.errors[0][0] < output_error(x, before.adapters[0].down, pairs[0][0])
        if "phm_rule" in options:
            assert after.adapters[0].down.phm_rule is rule and torch.equal(rule, _draw(3, 3, 3))


def test_search_by_the_errors_of_the_outputs() -> None:
    """The least score of all forms, and with a tolerance the fewest parameters."""
    down, up = random_pair(24, 12)
    given, ranks = statistics(inputs(200, 24)), [1, 2]
    found = from_dense(down, up, inputs=given, phm_dim=[2, 4], phm_rank=ranks, starts=1)
    single = [from_dense(down, up, inputs=given, phm_dim=n, phm_rank=r, starts=1) for n in (2, 4) for r in ranks]
    best = min(single, key=lambda one: one.error**2 + one.parameters_after / one.parameters_before)
    assert (found.phm_dim, found.phm_rank, found.error) == (best.phm_dim, best.phm_rank, best.error)
    enough = [one for one in single if one.error <= best.error * 1.1]
    least = from_dense(down, up, inputs=given, phm_dim=[2, 4], phm_rank=ranks, starts=1, tolerance=best.error * 1.1)
    assert least.parameters_after == min(one.parameters_after for one in enough)


@pytest.mark.parametrize("zero", ["matrix", "inputs"])
def test_nothing_to_fit(zero: str) -> None:
    linear = _linear(torch.zeros(24, 12, dtype=FP64) if zero == "matrix" else _draw(24, 12))
    x = torch.zeros(5, 24) if zero == "inputs" else inputs(50, 24)
    layer, error = ck.PHMLinear.from_dense(linear, inputs=statistics(x), phm_dim=3, phm_rank=2)
    assert error == 0
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("k", "d", "n", "r"), [(8, 4, 4, 30), (12, 24, 2, 7), (9, 3, 3, 1), (10, 3, 1, 2), (6, 6, 6, 1)]
)
def test_strange_shapes(k: int, d: int, n: int, r: int) -> None:
    """One row, more ranks than the blocks hold, blocks of one number."""
    down, up = random_pair(k, d)
    for rows in (1, 100):
        x, z = inputs(rows, k), inputs(rows, d)
        before = from_dense(down, up, phm_dim=n, phm_rank=r, starts=2).adapter
        after = from_dense(down, up, inputs=(statistics(x), statistics(z)), phm_dim=n, phm_rank=r, starts=2)
        old = (output_error(x, before.down, down), output_error(z, before.up, up))
        assert sum(e**2 for e in after.errors[0]) <= sum(e**2 for e in old) + 1e-12
        assert after.adapter.down.W_left.shape == (n, k // n, r)


WIDE, NONE = statistics(inputs(9, 24)), ck.InputStatistics()
DOWN, UP = random_pair(24, 12)
ERRORS: list[tuple[tuple[Any, ...], Any, type[Exception], str]] = [
    ((DOWN, UP), torch.ones(9, 24), TypeError, "inputs must be InputStatistics, or a pair of them or None"),
    ((DOWN, UP), (WIDE, 3), TypeError, "inputs must be InputStatistics, or a pair"),
    ((DOWN, UP), (WIDE, WIDE), ValueError, "inputs of up: the rows have 24 columns, the projection takes 12"),
    ((DOWN, UP), NONE, ValueError, "inputs of down: no rows were seen"),
    (([(DOWN, UP)],), WIDE, ValueError, "inputs must be a sequence with an entry for each of the 1 adapters"),
    (([(DOWN, UP), (DOWN, UP)],), [WIDE, (None, WIDE)], ValueError, r"inputs\[1\] of up: the rows have 24 columns"),
]


@pytest.mark.parametrize(("args", "given", "kind", "match"), ERRORS, ids=[entry[-1][:50] for entry in ERRORS])
def test_errors_before_any_work(
    args: tuple[Any, ...], given: Any, kind: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compacter_kernels.compress.compression.fit", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(kind, match=match):
        from_dense(*args, inputs=given)


def test_errors_of_a_layer() -> None:
    with pytest.raises(TypeError, match="inputs must be InputStatistics or None, got Tensor"):
        ck.PHMLinear.from_dense(DOWN, inputs=torch.ones(3, 24))
    with pytest.raises(ValueError, match="inputs: the rows have 24 columns, the projection takes 12"):
        ck.PHMLinear.from_dense(UP, inputs=WIDE)
