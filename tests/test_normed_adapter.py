"""An adapter, both residuals and the frozen layer norm after them, computed by one kernel.

The results are compared with the same computation in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import BF16, FP16, FP32, FP64, Case, Reference, Tensors, assert_same_bits, bits, copies, weights
from test_strides import LAYOUTS
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels import call_path
from compacter_kernels.accuracy import error, floor
from compacter_kernels.cases import Inputs
from compacter_kernels.impl.cpu import unavailable
from compacter_kernels.saved import saved_bytes
from compacter_kernels.weights import NormWeights

built = pytest.mark.skipif(unavailable() is not None, reason=f"cpu: {unavailable()}")
EPS = 1e-5
CASES = [
    Case(residual="both", shape=(37,)),
    Case(residual="both", shape=(2, 3), width=30, bottleneck=18, n=6, rank=2, bias=False, scale=0.37),
    Case(residual="both", shape=(3, 5), width=70, bottleneck=6, n=2, up_rank=3, activation="relu"),
    Case(residual="both", shape=(16,), width=772, bottleneck=8, params=BF16),
    Case(residual="both", shape=(33,), width=48, n=12, dtype=BF16),
    Case(residual="both", shape=(33,), width=36, dtype=FP16, params=FP64),
    Case(residual="both", shape=(20011,), width=192),  # larger than the caches, so that stores bypass them
    Case(residual="other", shape=(37,)),
    Case(residual="x", shape=(37,), rank=2),
    Case(residual="none", shape=(37,)),
    Case(residual="both", shape=(0,)),
    Case(residual="both", shape=()),
    Case(residual="both", shape=(17,), rank=None),  # not fused: adapter and norm are computed separately
    Case(residual="both", shape=(17,), dtype=FP64, params=FP64),
]


def _norm(case: Case, dtype: torch.dtype | None = None) -> NormWeights:
    rng = torch.Generator().manual_seed(case.width)
    weight, bias = (torch.randn(case.width, generator=rng, dtype=FP64) for _ in range(2))
    return NormWeights(weight.to(case.dtype).to(dtype or case.dtype), bias.to(case.dtype).to(dtype or case.dtype), EPS)


def _fused(case: Case, tensors: Tensors, norm: NormWeights, scale: Any = None, out: Tensor | None = None) -> Tensor:
    residual = {"none": None, "x": tensors["x"]}.get(case.residual, tensors.get("residual"))
    return ck.compacter_adapter(
        tensors["x"],
        weights(tensors, "down."),
        weights(tensors, "up."),
        activation=case.activation,
        residual=(tensors["x"], residual) if case.residual == "both" else residual,
        scale=case.scale if scale is None else scale,
        norm=norm,
        out=out,
    )


def _apart(case: Case, tensors: Tensors, norm: NormWeights) -> Tensor:
    return nn.functional.layer_norm(case.call(tensors, "dense"), (case.width,), norm.weight, norm.bias, EPS)


def _run(function: Callable[..., Tensor], case: Case, tensors: Tensors, norm: NormWeights, grad: Tensor) -> Tensors:
    out = function(case, tensors, norm)
    grads = torch.autograd.grad(out, list(tensors.values()), grad)
    return {"out": out.detach(), **dict(zip(tensors, grads, strict=True))}


def _oracle(case: Case, tensors: Tensors, grad: Tensor) -> Reference:
    def definition(inputs: Inputs) -> Tensor:
        return _apart(case, inputs.tensors(), _norm(case, inputs.x.dtype))

    return Reference(case.inputs(tensors, grad), definition=definition)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    """The output and every gradient agree, and the kernel changes no argument.

    Without a gradient the output is the same.
    """
    tensors, norm, grad = case.tensors(), _norm(case), case.grad_output()
    before = copies(tensors)
    got = _run(_fused, case, tensors, norm, grad)
    _oracle(case, tensors, grad).accept(got)
    assert_same_bits(tensors, before)
    assert torch.equal(norm.weight, _norm(case).weight) and torch.equal(grad, case.grad_output())
    with torch.no_grad():
        assert torch.equal(bits(_fused(case, tensors, norm)), bits(got["out"]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    case = Case(residual="both", shape=(4, 3), rank=2)
    tensors = case.tensors()
    for name in ("x", "residual"):
        tensors[name] = layout(tensors[name]).requires_grad_()
    norm, grad = _norm(case), layout(case.grad_output())
    strided = NormWeights(*(torch.stack((t, t + 1), 1)[:, 0] for t in norm[:2]), EPS)
    _oracle(case, tensors, grad).accept(_run(_fused, case, tensors, strided, grad))


@pytest.mark.parametrize("missing", ["residual", "x", "down.left", "up.right"])
def test_gradients_that_nobody_wants(missing: str) -> None:
    case = Case(residual="both", shape=(19,))
    tensors, norm, grad = case.tensors(), _norm(case), case.grad_output()
    expected = _run(_fused, case, tensors, norm, grad)
    tensors[missing].requires_grad_(False)
    out = _fused(case, tensors, norm)
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    got = dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))
    assert_same_bits(got, {name: expected[name] for name in wanted})


def test_only_the_residual_is_trained() -> None:
    """The second derivative goes through the norm. torch has this derivative, but no kernel has."""
    case = Case(residual="both", shape=(19,))
    tensors, norm = case.tensors(), _norm(case)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == "residual")
    (first,) = torch.autograd.grad(_fused(case, tensors, norm).square().sum(), tensors["residual"], create_graph=True)
    expected = _apart(case, tensors, norm).square().sum()
    (other,) = torch.autograd.grad(expected, tensors["residual"], create_graph=True)
    second, also = (torch.autograd.grad(g.square().sum(), tensors["residual"])[0] for g in (first, other))
    torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, also, rtol=1e-3, atol=1e-4)


@built
@pytest.mark.parametrize("of", ["x", "residual", "down.rule"])
def test_a_second_derivative_raises(of: str) -> None:
    case = Case(residual="both", shape=(19,))
    tensors = case.tensors()
    loss = _fused(case, tensors, _norm(case)).square().sum()
    (grad,) = torch.autograd.grad(loss, tensors[of], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_a_learned_scale() -> None:
    case = Case(residual="both", shape=(19,))
    tensors, norm, grad = case.tensors(), _norm(case), case.grad_output()
    scale, exact = (torch.tensor([0.7], dtype=dtype, requires_grad=True) for dtype in (FP32, FP64))
    (got,) = torch.autograd.grad(_fused(case, tensors, norm, scale), scale, grad)
    wide = copies(tensors, FP64)
    y = case.call(wide, "dense", scale=exact)
    out = nn.functional.layer_norm(y, (case.width,), norm.weight.double(), norm.bias.double(), EPS)
    (expected,) = torch.autograd.grad(out, exact, grad.double())
    assert abs(got.item() - expected.item()) <= 1e-5 * abs(expected.item())


@built
def test_saved_for_backward() -> None:
    """x, the input of the norm, and parameters are saved."""
    case = Case(residual="both", shape=(1000,), bottleneck=24)
    tensors, norm = case.tensors(), _norm(case)
    given = [*(t for name, t in tensors.items() if name not in ("x", "residual")), norm.weight, norm.bias]
    assert saved_bytes(lambda: _fused(case, tensors, norm), given) == 2 * tensors["x"].numel() * 4


@built
@pytest.mark.parametrize("options", [{"retain_graph": True}, {"create_graph": True}], ids=str)
def test_backward_twice(options: dict[str, bool]) -> None:
    """A backward that keeps the graph also keeps the input of the norm."""
    case = Case(residual="both", shape=(19,))
    tensors, grad = case.tensors(), case.grad_output()
    out = _fused(case, tensors, _norm(case))
    first = torch.autograd.grad(out, list(tensors.values()), grad, **options)
    second = torch.autograd.grad(out, list(tensors.values()), grad)
    assert_same_bits(dict(zip(tensors, first, strict=True)), dict(zip(tensors, second, strict=True)))


@built
def test_what_hooks_have_seen_stays() -> None:
    case, seen = Case(residual="both", shape=(19,)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append((t, t.clone())), t)[1], lambda t: t):
        out = _fused(case, case.tensors(), _norm(case))
    out.sum().backward()
    assert seen and all(torch.equal(t, before) for t, before in seen)


@built
def test_a_plain_backward_spends_what_was_normed() -> None:
    """It overwrites the saved input of the norm with the gradient of the residual."""
    case = Case(residual="both", shape=(19,))
    tensors = case.tensors()
    out = _fused(case, tensors, _norm(case))
    address = out.grad_fn.saved_tensors[1].data_ptr()  # type: ignore[union-attr]
    (grad,) = torch.autograd.grad(out.sum(), tensors["residual"])
    assert grad.data_ptr() == address


@built
def test_a_norm_that_changed_before_the_backward() -> None:
    case = Case(residual="both", shape=(3,))
    norm = _norm(case)
    out = _fused(case, case.tensors(), norm)
    norm.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    case = Case(residual="both", shape=(37,), activation="relu")
    tensors, norm = case.tensors(), _norm(case)
    with torch.no_grad():
        tensors["residual"][18, 3] = value
        out = _fused(case, tensors, norm)
    assert out[18].isnan().all() and out.isnan().sum() == case.width


@built
@pytest.mark.parametrize("sizes", [{"width": 768, "bottleneck": 8}, {"width": 70, "bottleneck": 6, "n": 2}], ids=str)
def test_nearly_equal_numbers(sizes: dict[str, int]) -> None:
    """Rows far from 0 with a small variance have a larger error.

    It is that of half a unit in the last place of the input of the norm, and no more.
    """
    case = Case(residual="both", shape=(64,), **sizes)
    tensors, norm = case.tensors(), _norm(case)
    with torch.no_grad():
        tensors["residual"].add_(1100.0)
        wide, wide_norm = copies(tensors, FP64), _norm(case, FP64)
        y, exact = case.call(wide, "dense"), _apart(case, wide, wide_norm)
        rounding = torch.finfo(FP32).eps / 2 * y.abs().max()
        slope = (wide_norm.weight.abs().max() / y.std(-1, correction=0)).max()
        assert error(_fused(case, tensors, norm), exact) <= rounding * slope / exact.abs().max() + floor(FP32, FP32)


@pytest.mark.usefixtures("threads")
def test_threads_give_the_same_bits() -> None:
    case = Case(residual="both", shape=(700,), width=96)
    tensors, norm, grad = case.tensors(), _norm(case), case.grad_output()
    runs = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        runs.append(_run(_fused, case, tensors, norm, grad))
    assert_same_bits(runs[1], runs[2])
    assert_same_bits(*({name: t for name, t in r.items() if "." not in name} for r in runs[:2]))


@built
@pytest.mark.parametrize("residual", ["none", "x", "other", "both"])
def test_one_kernel_computes_it(residual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(residual=residual, shape=(3,))
    monkeypatch.setattr(call_path, "F", None)
    _fused(case, case.tensors(), _norm(case)).sum().backward()


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """An impl without norms computes the adapter alone, and torch computes the norm."""
    case = Case(residual="both", shape=(3,))
    expected = _fused(case, case.tensors(), _norm(case))
    monkeypatch.setenv("COMPACTER_KERNELS_IMPL", "factored")
    torch.testing.assert_close(_fused(case, case.tensors(), _norm(case)), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(call_path, "F", None)
    with pytest.raises(AttributeError, match="layer_norm"):
        _fused(case, case.tensors(), _norm(case))


@pytest.mark.parametrize("impl", ["auto", "factored"])
def test_a_norm_that_trains(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the norm get their gradients with every impl of the adapter."""
    monkeypatch.setenv("COMPACTER_KERNELS_IMPL", impl)
    case = Case(residual="both", shape=(19,))
    tensors, norm, grad = case.tensors(), _norm(case), case.grad_output()
    got, expected = [], []
    for function, found in ((_fused, got), (_apart, expected)):
        leaves = [t.clone().requires_grad_() for t in norm[:2]]
        out = function(case, tensors, NormWeights(*leaves, EPS))
        found += torch.autograd.grad(out, [*leaves, *tensors.values()], grad)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", [torch.empty_like, lambda x: x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]])
def test_out(place: Callable[[Tensor], Tensor]) -> None:
    case = Case(residual="both", shape=(19,))
    tensors, norm = case.tensors(), _norm(case)
    with torch.no_grad():
        out = place(tensors["x"])
        assert _fused(case, tensors, norm, out=out) is out
        assert torch.equal(bits(out), bits(_fused(case, tensors, norm)))


def test_compiled() -> None:
    case = Case(residual="both", shape=(19,))
    tensors, norm = case.tensors(), _norm(case)
    with torch.no_grad():
        compiled = torch.compile(_fused, backend="eager", fullgraph=True)(case, tensors, norm)
        torch.testing.assert_close(compiled, _fused(case, tensors, norm), rtol=1e-4, atol=1e-5)


WRONG: list[tuple[Any, type[Exception], str]] = [
    (3, TypeError, "norm must be NormWeights.* got int"),
    (NormWeights(torch.ones(23), torch.ones(24)), ValueError, r"norm\.weight must have shape \(24,\), got \(23,\)"),
    (NormWeights(torch.ones(24), torch.ones(24, 1)), ValueError, r"norm\.bias must have 1 dimension"),
    (NormWeights(torch.ones(24), torch.ones(24, dtype=BF16)), TypeError, r"norm\.bias must have the dtype of x"),
    (NormWeights(torch.ones(24, device="meta"), torch.ones(24)), ValueError, r"norm\.weight is on meta"),
]


@pytest.mark.parametrize(("norm", "kind", "match"), WRONG, ids=[match for _, _, match in WRONG])
def test_a_norm_that_does_not_fit(norm: Any, kind: type[Exception], match: str) -> None:
    case = Case(residual="both", shape=(3,))
    for _ in range(2):
        with pytest.raises(kind, match=match):
            _fused(case, case.tensors(), norm)
        _fused(case, case.tensors(), _norm(case))


def test_autocast_leaves_layer_norms_alone() -> None:
    """So a kernel may compute a norm without a check for autocast."""
    x, weight, bias = (torch.randn(3, 24) for _ in range(3))
    expected = nn.functional.layer_norm(x, (24,), weight[0], bias[0])
    with torch.autocast("cpu", BF16):
        found = nn.functional.layer_norm(x, (24,), weight[0], bias[0])
    assert found.dtype == FP32 and torch.equal(found, expected)
