"""from_dense: it recovers planted structure, fits no worse than simpler methods, and searches.

It refuses unsuitable arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import BF16, FP16, FP32
from torch import Tensor, nn
from torch.nn import functional as F

import compacter_kernels as ck
from compacter_kernels import from_dense, kronecker_fit as kf

FP64 = torch.float64


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def _planted(widths: Sequence[tuple[int, int]], n: int, r: int, seed: int = 0) -> list[Tensor]:
    """Matrices (in, out) that share a rule, by torch.kron. Their norms differ."""
    rule, found = _draw(n, n, n, seed=seed), []
    for number, (i, o) in enumerate(widths):
        left, right = (
            _draw(n, i // n, r, seed=seed + 10 + number),
            _draw(n, r, o // n, seed=seed + 50 + number) * 10.0 ** (-number),
        )
        found.append(sum(torch.kron(a, s @ t) for a, s, t in zip(rule, left, right, strict=True)))
    return found


def _linear(matrix: Tensor, dtype: torch.dtype = FP64, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(*matrix.shape, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(matrix.T)
    return linear


def _dense(k: int, d: int, n: int, r: int, dtype: torch.dtype = FP64, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    down, up = _planted([(k, d), (d, k)], n, r)
    return _linear(down, dtype, bias), _linear(up, dtype, bias)


def random_pair(k: int, d: int, dtype: torch.dtype = FP64) -> tuple[nn.Linear, nn.Linear]:
    return _linear(_draw(k, d, seed=1), dtype), _linear(_draw(d, k, seed=2), dtype)


def _errors(adapter: ck.CompacterAdapter, down: nn.Linear, up: nn.Linear) -> tuple[float, ...]:
    """The relative errors of the matrices that the layers represent."""
    pairs = ((adapter.down, down), (adapter.up, up))
    with torch.no_grad():
        built = [(ck.phm_matrix(_widened(layer)), linear.weight.double().T) for layer, linear in pairs]
    return tuple(((h - target).norm() / target.norm()).item() for h, target in built)


def _widened(layer: ck.PHMLinear) -> ck.PHMWeights:
    return ck.PHMWeights(*(None if t is None else t.double() for t in layer.weights()))


PLANTED = [
    (24, 12, 3, 1),
    (36, 10, 2, 3),
    (48, 24, 4, 2),
    (64, 32, 4, 3),
    (768, 24, 4, 1),
    (96, 48, 12, 1),
    (64, 32, 8, 1),
]


@pytest.mark.parametrize(("k", "d", "n", "r"), PLANTED)
def test_planted_structure_comes_back(k: int, d: int, n: int, r: int) -> None:
    down, up = _dense(k, d, n, r)
    found = from_dense(down, up, phm_dim=n, phm_rank=r)
    adapter, x = found.adapter, _draw(7, k)
    assert found.error < 1e-7
    assert (found.phm_dim, found.phm_rank) == (n, r) == (adapter.down.phm_dim, adapter.up.phm_rank)
    assert adapter.down.phm_rule is adapter.up.phm_rule
    torch.testing.assert_close(adapter(x), x + up(F.gelu(down(x), approximate="tanh")), rtol=1e-5, atol=1e-5)
    assert found.parameters_after == sum(p.numel() for p in adapter.parameters())
    assert found.parameters_before == sum(p.numel() for m in (down, up) for p in m.parameters())


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_unfactorised_fit_is_the_truncated_svd(n: int) -> None:
    """A rank that limits nothing gives the same fit. The least error is that of this fit."""
    h = _draw(32, 24)
    blocks = torch.stack([b.flatten() for row in h.chunk(n, 0) for b in row.chunk(n, 1)])
    expected = (torch.linalg.svdvals(blocks)[n:].norm() / h.norm()).item()
    for rank in (None, 24 // n):
        (weights,) = kf.fit([h], n, rank)
        assert (weights.right is None) == (rank is None)
        assert kf.relative_error(h, weights) == pytest.approx(expected, abs=1e-12)
    assert kf.least_error([h], n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("keep_rule", [False, True])
def test_descent_never_rises(keep_rule: bool) -> None:
    matrices = [_draw(32, 16, seed=1), _draw(16, 32, seed=2)]
    targets = [kf.rearranged(h / h.norm(), 4)[None] for h in matrices]
    rule = _draw(16, 4, seed=3)
    start = kf.State(rule, [_draw(1, 4, t.shape[2], 1) for t in targets], [_draw(1, 4, 1, t.shape[3]) for t in targets])
    states = list(kf.descent(partial(kf.sweep, targets, keep_rule=keep_rule), start, 60, 0.0))
    losses = [loss for _, loss in states]
    assert len(losses) > 20
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]
    last, loss = states[-1]
    assert torch.equal(last.rule, rule) == keep_rule
    recomputed = sum(
        (t[0].flatten(1) - last.rule @ (a @ b)[0].flatten(1)).square().sum().item()
        for t, a, b in zip(targets, last.left, last.right, strict=True)
    )
    assert loss == pytest.approx(recomputed, rel=1e-12)


@pytest.mark.parametrize(("k", "d", "n", "r"), [(32, 16, 4, 1), (32, 16, 2, 2), (48, 12, 6, 1)])
def test_random_matrices_are_fitted_better_than_by_cutting_off(k: int, d: int, n: int, r: int) -> None:
    """Cutting off takes the truncated SVD for the rule, and then reduces each W_i to its rank.

    Two rules, one for each matrix, fit better than a shared one.
    """
    down, up = random_pair(k, d)
    found = from_dense(down, up, phm_dim=n, phm_rank=r, starts=3)
    matrices = [down.weight.detach().T, up.weight.detach().T]
    blocks = [torch.stack([b.flatten() for row in h.chunk(n, 0) for b in row.chunk(n, 1)]) / h.norm() for h in matrices]
    rule = torch.linalg.svd(torch.cat(blocks, 1), full_matrices=False).U[:, :n]
    cut = 0.0
    for h, block in zip(matrices, blocks, strict=True):
        w = (rule.T @ block).reshape(n, h.shape[0] // n, h.shape[1] // n)
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        w = (u[..., :r] * s[:, None, :r]) @ v[:, :r]
        cut += (block - rule @ w.flatten(1)).square().sum().item()
    reached = sum(e**2 for pair in found.errors for e in pair)
    assert 2 * kf.least_error(matrices, n) ** 2 < reached < cut
    apart = from_dense(down, up, phm_dim=n, phm_rank=r, starts=3, shared_phm_rule=False)
    assert sum(e**2 for pair in apart.errors for e in pair) < reached
    assert apart.adapter.down.phm_rule is not apart.adapter.up.phm_rule
    assert apart.parameters_after == sum(p.numel() for p in apart.adapter.parameters())


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("planted", [True, False])
def test_error_is_that_of_the_stored_weights(planted: bool, dtype: torch.dtype) -> None:
    down, up = _dense(24, 12, 3, 2, dtype) if planted else random_pair(24, 12, dtype)
    found = from_dense(down, up, phm_dim=3, phm_rank=2)
    assert {p.dtype for p in found.adapter.parameters()} == {dtype}
    assert found.errors[0] == pytest.approx(_errors(found.adapter, down, up), rel=1e-6, abs=1e-14)
    assert found.error == max(found.errors[0])
    if planted:
        assert found.error < {FP64: 1e-7, FP32: 1e-6, BF16: 2e-2, FP16: 2e-3}[dtype]
    assert found.adapter(torch.randn(3, 24).to(FP32 if dtype != FP64 else FP64)).isfinite().all()


@pytest.mark.parametrize("tolerance", [None, 1e-5])
@pytest.mark.parametrize(("n", "r"), [(4, 1), (2, 3), (8, 1)])
def test_search_finds_the_planted_form(n: int, r: int, tolerance: float | None) -> None:
    found = from_dense(*_dense(64, 32, n, r), tolerance=tolerance)
    assert (found.phm_dim, found.phm_rank) == (n, r)
    chosen = next(c for c in found.candidates if (c.phm_dim, c.phm_rank) == (n, r))
    assert (chosen.parameters, chosen.error) == (found.parameters_after, found.error)
    assert all(c.error > 1e-3 for c in found.candidates if c.parameters < chosen.parameters)


def test_search_without_a_tolerance_is_the_least_score() -> None:
    """The score is the least one of all forms that the caller allows, each fitted separately."""
    down, up = _dense(24, 12, 3, 1)
    with torch.no_grad():
        for linear in (down, up):
            linear.weight += 0.3 * linear.weight.std() * _draw(*linear.weight.shape)
    dims, ranks = [1, 2, 3, 4], (1, 2, 3)
    found = from_dense(down, up, phm_dim=dims, phm_rank=ranks, starts=2)
    single = [from_dense(down, up, phm_dim=n, phm_rank=r, starts=2) for n in dims for r in ranks]
    best = min(single, key=lambda one: one.error**2 + one.parameters_after / one.parameters_before)
    assert (found.phm_dim, found.phm_rank, found.error) == (best.phm_dim, best.phm_rank, best.error)


def test_search_over_unfactorised_forms() -> None:
    found = from_dense(*_dense(32, 16, 4, 4), factorized_phm_W=False, tolerance=1e-6)
    assert (found.phm_dim, found.phm_rank) == (4, None)
    assert found.adapter.down.W.shape == (4, 8, 4)
    assert found.parameters_after == sum(p.numel() for p in found.adapter.parameters())


def test_tolerance_missed_says_what_was_reached() -> None:
    pair = random_pair(24, 12)
    with pytest.raises(ValueError, match=r"tolerance=0\.01: the least that any rank leaves is 0\.\d+, at phm_dim=2"):
        from_dense(*pair, tolerance=0.01, phm_dim=[2, 4])
    limit = kf.least_error([linear.weight.detach().T for linear in pair], 4)
    with pytest.raises(
        ValueError, match=r"the best found is Candidate\(phm_dim=4, phm_rank=1, parameters=\d+, error=0"
    ):
        from_dense(*pair, tolerance=limit + 0.01, phm_dim=4, phm_rank=1)


def test_adapters_of_a_model_share_one_rule() -> None:
    widths = [(24, 12), (12, 24), (24, 6), (6, 24), (24, 12), (12, 24)]
    linears = [_linear(h) for h in _planted(widths, 3, 2)]
    pairs = list(zip(linears[::2], linears[1::2], strict=True))
    found = from_dense(pairs, phm_dim=3, phm_rank=2)
    assert found.error < 1e-7
    assert [a.bottleneck for a in found.adapters] == [12, 6, 12]
    stack = nn.ModuleList(found.adapters)
    assert found.parameters_after == sum(p.numel() for p in stack.parameters())
    assert len([name for name, _ in stack.named_parameters() if "rule" in name]) == 1
    for adapter, pair, errors in zip(found.adapters, pairs, found.errors, strict=True):
        assert _errors(adapter, *pair) == pytest.approx(errors, abs=1e-12)
    with pytest.raises(ValueError, match="there are 3 adapters"):
        _ = found.adapter


def test_a_rule_passed_in_is_kept() -> None:
    down, up = _dense(24, 12, 4, 1)
    rule = nn.Parameter(_draw(4, 4, 4))
    before = rule.detach().clone()
    found = from_dense(down, up, phm_rule=rule, phm_rank=1)
    assert found.error < 1e-7  # the planted structure fits exactly
    assert found.adapter.down.phm_rule is found.adapter.up.phm_rule is rule
    assert torch.equal(rule, before)
    other = from_dense(*random_pair(24, 12), phm_rule=rule, phm_rank=1)
    assert other.errors[0] == pytest.approx(_errors(other.adapter, *random_pair(24, 12)), rel=1e-9)


def test_biases() -> None:
    down, up = _dense(24, 12, 3, 1)
    found = from_dense(down, up, phm_dim=3, phm_rank=1).adapter
    assert torch.equal(found.down.b, down.bias)
    assert torch.equal(found.up.b, up.bias)
    plain = from_dense(down.weight, up.weight, phm_dim=3, phm_rank=1)
    assert plain.adapter.down.b is plain.adapter.up.b is None
    assert plain.parameters_before == 2 * 24 * 12
    one = from_dense((down.weight, down.bias), (up.weight, None), phm_dim=3, phm_rank=1)
    assert torch.equal(one.adapter.down.b, down.bias)
    assert not one.adapter.up.b.any()
    assert one.parameters_after == sum(p.numel() for p in one.adapter.parameters())


@pytest.mark.parametrize("rank", [1, 2])
def test_zero_matrices(rank: int) -> None:
    """The up projection of an adapter starts at zero."""
    down, up = _dense(24, 12, 3, 1)
    nn.init.zeros_(up.weight)
    found = from_dense(down, up, phm_dim=3, phm_rank=rank)
    assert found.error < 1e-7
    assert not ck.phm_matrix(found.adapter.up.weights()).any()
    nn.init.zeros_(down.weight)
    assert from_dense(down, up, phm_dim=3, phm_rank=rank).error == 0


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_more_terms_and_ranks_than_the_matrix_holds(rank: int) -> None:
    found = from_dense(*random_pair(8, 4), phm_dim=4, phm_rank=rank)
    assert found.error < 1
    assert found.adapter.down.W_left.shape == (4, 2, rank)
    assert all(p.isfinite().all() for p in found.adapter.parameters())


def test_the_seed_decides_and_nothing_else() -> None:
    pair = random_pair(24, 12)
    before = torch.get_rng_state()
    weights = [linear.weight.detach().clone() for linear in pair]
    runs = [from_dense(*pair, phm_dim=4, phm_rank=1, seed=seed, starts=3) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(linear.weight, old) for linear, old in zip(pair, weights, strict=True))
    states = [run.adapter.state_dict() for run in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["down.W_left"], states[2]["down.W_left"])


def test_factors_are_of_like_magnitude() -> None:
    """The scale of the source does not matter, so that float16 can represent all factors."""
    down, up = (_linear(1e-4 * linear.weight.detach().T, FP16) for linear in _dense(24, 12, 3, 1))
    found = from_dense(down, up, phm_dim=3, phm_rank=1).adapter
    sizes = [p.double().square().mean().sqrt().item() for name, p in found.named_parameters() if not name.endswith("b")]
    assert max(sizes) < 30 * min(sizes)


def test_each_matrix_counts_by_its_relative_error() -> None:
    """The norms of down and up do not change their influence on the rule."""
    down, up = random_pair(24, 12)
    even = from_dense(down, up, phm_dim=4, phm_rank=1)
    uneven = from_dense(1000 * down.weight.detach(), up, phm_dim=4, phm_rank=1)
    assert uneven.errors[0] == pytest.approx(even.errors[0], rel=1e-6)


class Bottleneck(nn.Module):
    """A dense adapter whose attribute `up` comes before `down`."""

    def __init__(self, act: Any, **more: Any) -> None:
        super().__init__()
        down, up = _dense(24, 12, 3, 1)
        self.up, self.act, self.down, self.drop, self.scaling = up, act, down, nn.Dropout(0.25), 0.5
        for name, value in more.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_new"),
        (nn.SiLU(), "silu"),
        (nn.Softplus(), None),
    ],
    ids=str,
)
def test_a_module_is_read_by_its_structure(act: nn.Module, name: str | None) -> None:
    module = Bottleneck(act)
    adapter = from_dense(module, phm_dim=3, phm_rank=1).adapter.eval()
    assert adapter.activation == (name or act)
    assert (adapter.dropout, adapter.scale) == (0.25, 0.5)
    x = _draw(5, 24)
    torch.testing.assert_close(adapter(x), x + 0.5 * module.up(act(module.down(x))), rtol=1e-6, atol=1e-6)
    assert from_dense(module, phm_dim=3, phm_rank=1, activation="tanh", scale=2.0).adapter.scale == 2.0


@pytest.mark.slow
def test_an_adapter_of_the_adapters_library() -> None:
    adapters = pytest.importorskip("adapters")
    from adapters.methods.modeling import Adapter

    dense = Adapter("a", 24, 12, adapters.SeqBnConfig(non_linearity="swish", scaling=2.0))
    down, up = _dense(24, 12, 3, 1)
    dense.adapter_down[0], dense.adapter_up = down, up
    found = from_dense(dense, phm_dim=3, phm_rank=1)
    assert (found.adapter.activation, found.adapter.scale) == ("silu", 2.0)
    x = _draw(5, 24)
    torch.testing.assert_close(found.adapter(x), dense(x, x)[0], rtol=1e-6, atol=1e-6)
    normed = Adapter("a", 24, 12, adapters.SeqBnConfig(ln_after=True))
    with pytest.raises(ValueError, match=r"Adapter must have two nn.Linear.*adapter_norm_after.weight"):
        from_dense(normed)


@pytest.mark.parametrize("factorized", [True, False])
def test_linear_from_dense(factorized: bool) -> None:
    linear = _linear(_planted([(24, 36)], 4, 2)[0])
    state = torch.get_rng_state()
    layer, error = ck.PHMLinear.from_dense(linear, phm_dim=4, phm_rank=2, factorized_phm_W=factorized, impl="factored")
    assert torch.equal(torch.get_rng_state(), state)
    assert error < 1e-7
    assert repr(layer).startswith("PHMLinear(24, 36")
    x = _draw(5, 24)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-6, atol=1e-6)
    assert ck.PHMLinear.from_dense(linear.weight)[0].b is None
    with pytest.raises(ValueError, match="phm_dim=5 does not divide in_features=24"):
        ck.PHMLinear.from_dense(linear, phm_dim=5)
    with pytest.raises(TypeError, match="from_dense takes no dtype"):
        ck.PHMLinear.from_dense(linear, dtype=FP32)


@pytest.mark.parametrize(("k", "d"), [(10, 3), (100, 7), (12, 24), (768, 767)])
def test_any_bottleneck(k: int, d: int) -> None:
    found = from_dense(*random_pair(k, d), phm_dim=1, phm_rank=1, starts=1)
    assert found.adapter.bottleneck == d
    assert eval(repr(found.adapter), {"torch": torch, **vars(ck)}).bottleneck == d
