"""kronecker_linear against float64: maps of any shape, a base, a scale, and every kind of call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from foreign_tensors import KINDS, outcome
from oracle import BF16, FP16, FP32, FP64, FUSED, IMPLS, MODULES, Reference
from test_patch_lokr_models import Largest
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.accuracy import evaluate
from compacter_kernels.cases import Inputs
from compacter_kernels.functional import kronecker_linear
from compacter_kernels.problem import linear_problem

OPS = torch.ops.compacter_kernels
LOW_RANK = [  # terms, (n_in, n_out), (in/n_in, r, out/n_out)
    (1, (6, 8), (10, 2, 12)),
    (2, (3, 5), (7, 3, 4)),
    (3, (1, 4), (16, 1, 2)),
    (2, (4, 1), (5, 6, 9)),
    (1, (1, 1), (7, 2, 5)),
    (5, (2, 3), (1, 1, 1)),
    (4, (4, 4), (6, 2, 5)),
    (1, (32, 16), (32, 8, 33)),
    (2, (64, 48), (4, 32, 3)),
]
WHOLE = [
    (1, (6, 8), (10, None, 12)),
    (3, (5, 2), (4, None, 9)),
    (4, (4, 4), (6, None, 5)),
    (2, (1, 3), (17, None, 1)),
    (1, (32, 16), (16, None, 33)),
]
SQUARE = (1, (6, 6), (10, 2, 10))


def draw(
    shape: Any,
    leading: tuple[int, ...] = (3, 37),
    dtype: torch.dtype = FP32,
    params: torch.dtype = FP32,
    **options: Any,
) -> Inputs:
    """The call of a map of this shape, with numbers of order 1, a base (residual) and a scale."""
    terms, (n_in, n_out), (chunk_in, rank, chunk_out) = shape

    def numbers(*sizes: int, fan: int = 1) -> Tensor:
        return (torch.randn(sizes, dtype=FP64) / fan**0.5).to(params)

    weights = ck.PHMWeights(
        numbers(terms, n_in, n_out, fan=terms * n_in),
        numbers(terms, chunk_in, rank or chunk_out, fan=chunk_in),
        numbers(terms, rank, chunk_out, fan=rank) if rank else None,
        numbers(n_out * chunk_out),
    )
    x, base, grad = (torch.randn(*leading, size).to(dtype) for size in (n_in * chunk_in, *[n_out * chunk_out] * 2))
    options = {"base": base, "scale": 0.7, "bias": True, **options}
    weights = weights if options["bias"] else weights._replace(bias=None)
    return Inputs(x, weights, None, options["base"], grad, scale=options["scale"])


def through(impl: str = "auto") -> Callable[[Inputs], Tensor]:
    def function(inputs: Inputs) -> Tensor:
        return kronecker_linear(inputs.x, inputs.down, inputs.residual, inputs.scale, impl=impl)

    return function


def definition(inputs: Inputs) -> Tensor:
    rule, left, right, bias = inputs.down
    w = left if right is None else left @ right
    y = inputs.x @ sum(torch.kron(a, b) for a, b in zip(rule, w, strict=True))
    y = inputs.scale * (y if bias is None else y + bias)
    return y if inputs.residual is None else inputs.residual + y


def assert_within_contract(inputs: Inputs, impl: str) -> None:
    """Or that the impl refuses the call, which then raises the reason."""
    reason = MODULES[impl].refuses(linear_problem(inputs.x, inputs.down, inputs.residual))
    if reason is not None:
        with pytest.raises(RuntimeError, match=rf"impl='{impl}' cannot serve this linear: "):
            through(impl)(inputs)
        pytest.skip(f"{impl}: {reason}")
    reference = Reference(inputs, definition=through("dense"))
    reference.accept(evaluate(inputs, through(impl)), impl)


@pytest.mark.parametrize("shape", LOW_RANK + WHOLE, ids=str)
def test_dense_is_the_sum_of_kronecker_products(shape: Any) -> None:
    inputs = draw(shape, (5,), FP64, FP64)
    for name, value in evaluate(inputs, through("dense")).items():
        torch.testing.assert_close(value, evaluate(inputs, definition)[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("shape", LOW_RANK + WHOLE, ids=str)
def test_output_and_gradients(shape: Any, dtype: torch.dtype, impl: str) -> None:
    assert_within_contract(draw(shape, dtype=dtype, params=FP64 if dtype == FP64 else FP32), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options", [{"base": None}, {"bias": False}, {"base": None, "bias": False, "scale": 1.0}], ids=str
)
@pytest.mark.parametrize("shape", [LOW_RANK[0], LOW_RANK[1], WHOLE[0], WHOLE[1]], ids=str)
def test_without_base_or_bias_or_scale(shape: Any, options: dict[str, Any], impl: str) -> None:
    assert_within_contract(draw(shape, **options), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("params", [BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [LOW_RANK[1], WHOLE[0]], ids=str)
def test_weights_of_another_dtype(shape: Any, dtype: torch.dtype, params: torch.dtype, impl: str) -> None:
    assert_within_contract(draw(shape, dtype=dtype, params=params), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0, 3), (17,)], ids=str)
@pytest.mark.parametrize("shape", [LOW_RANK[1], WHOLE[1]], ids=str)
def test_any_number_of_tokens(shape: Any, leading: tuple[int, ...], impl: str) -> None:
    assert_within_contract(draw(shape, leading), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [LOW_RANK[1], WHOLE[1]], ids=str)
def test_strided_tensors(shape: Any, impl: str) -> None:
    inputs = draw(shape, (6, 4))

    def strided(t: Tensor) -> Tensor:
        return torch.stack((t, t), -1).transpose(0, -2).contiguous().transpose(0, -2)[..., 1]

    moved = inputs.map(strided)
    assert not any(t.is_contiguous() for t in moved.tensors().values())
    expected = evaluate(inputs, through(impl)) if _serves(impl, inputs) else pytest.skip("refused")
    leaves = [tensor.requires_grad_() for tensor in moved.tensors().values()]
    out = through(impl)(moved)
    grads = torch.autograd.grad(out, leaves, moved.grad)
    for got, exact in zip((out, *grads), expected.values(), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


def _serves(impl: str, inputs: Inputs) -> bool:
    return MODULES[impl].refuses(linear_problem(inputs.x, inputs.down, inputs.residual)) is None


@pytest.fixture(params=[SQUARE, (1, (6, 6), (10, None, 10))], ids=str)
def square(request: pytest.FixtureRequest) -> Inputs:
    return draw(request.param, (4, 5))


def _impls(inputs: Inputs) -> Iterator[str]:
    yield from (name for name in IMPLS if _serves(name, inputs))


def test_a_base_that_is_x(square: Inputs) -> None:
    x = square.x.double().requires_grad_()
    exact = definition(square.map(Tensor.double)._replace(x=x, residual=x))
    (expected,) = torch.autograd.grad(exact, [x], square.grad.double())
    for impl in _impls(square):
        leaf = square.x.clone().requires_grad_()
        y = kronecker_linear(leaf, square.down, leaf, square.scale, impl=impl)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        (got,) = torch.autograd.grad(y, [leaf], square.grad)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_base_that_overlaps_x(square: Inputs) -> None:
    """In one storage, or the one row that all rows have; no input is changed."""
    memory = torch.randn(21 * 60)
    x, base = memory[:1200].view(4, 5, 60), memory[7:1207].view(4, 5, 60)
    for added in (base, torch.randn(60).expand(4, 5, 60), torch.randn(5, 1).expand(4, 5, 60)):
        inputs = square._replace(x=x, residual=added)
        exact, before = definition(inputs.map(Tensor.double)), memory.clone()
        for impl in _impls(square):
            torch.testing.assert_close(through(impl)(inputs).double(), exact, rtol=1e-5, atol=1e-5)
            assert torch.equal(memory, before)


def test_the_gradient_of_an_expanded_base_is_summed(square: Inputs) -> None:
    for impl in _impls(square):
        row = torch.randn(60, requires_grad=True)
        through(impl)(square._replace(residual=row.expand(4, 5, 60))).backward(square.grad)
        assert row.grad is not None
        torch.testing.assert_close(row.grad, square.grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [LOW_RANK[1], WHOLE[1]], ids=str)
def test_frozen_tensors_get_no_gradient(shape: Any) -> None:
    inputs = draw(shape)
    for impl in _impls(inputs):
        exact = evaluate(inputs, through(impl))
        for name in inputs.tensors():
            one = inputs.map(Tensor.clone)
            leaf = one.tensors()[name].requires_grad_()
            through(impl)(one).backward(one.grad)
            assert torch.equal(leaf.grad, exact[name])  # type: ignore[arg-type]
            assert all(t.grad is None for other, t in one.tensors().items() if other != name)


@pytest.mark.parametrize("shape", [LOW_RANK[1], WHOLE[1]], ids=str)
def test_a_scale_that_is_learned(shape: Any) -> None:
    inputs = draw(shape)
    exact = inputs.map(Tensor.double)
    for value in (torch.tensor(0.7), torch.tensor([-1.3]), torch.tensor(2.0, dtype=BF16)):
        wide = value.double().reshape(()).requires_grad_()
        y = definition(exact._replace(scale=wide))
        (expected,) = torch.autograd.grad(y, [wide], exact.grad)
        for impl in _impls(inputs):
            leaf = value.clone().requires_grad_()
            got = through(impl)(inputs._replace(scale=leaf))
            torch.testing.assert_close(got.double(), y, rtol=1e-5, atol=1e-5)
            (grad,) = torch.autograd.grad(got, [leaf], inputs.grad)
            torch.testing.assert_close(
                grad.double().reshape(()), expected, rtol=8e-3 if leaf.dtype == BF16 else 1e-5, atol=0
            )


@pytest.mark.parametrize("shape", [LOW_RANK[4], (2, (2, 3), (2, 1, 2)), (2, (2, 2), (1, None, 3))], ids=str)
@pytest.mark.parametrize("impl", ["dense", "factored"])
def test_gradcheck_of_plain_torch(shape: Any, impl: str) -> None:
    inputs = draw(shape, (2,), FP64, FP64)
    leaves = [t.requires_grad_() for t in inputs.tensors().values()]
    names = list(inputs.tensors())

    def function(*tensors: Tensor) -> Tensor:
        found = dict(zip(names, tensors, strict=True))
        weights = ck.PHMWeights(*(found.get(f"down.{field}") for field in ck.PHMWeights._fields))  # type: ignore[arg-type]
        return kronecker_linear(found["x"], weights, found["residual"], 0.7, impl=impl)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("impl", FUSED)
def test_a_second_derivative_of_a_fused_kernel_raises(impl: str) -> None:
    inputs = draw(LOW_RANK[0])
    if not _serves(impl, inputs):
        pytest.skip("refused")
    x = inputs.x.requires_grad_()
    (first,) = torch.autograd.grad(through(impl)(inputs).square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='factored'"):
        first.sum().backward()


@pytest.mark.parametrize("shape", [LOW_RANK[1], WHOLE[1]], ids=str)
def test_the_same_bits_every_time(shape: Any) -> None:
    inputs = draw(shape, (333,))
    for impl in _impls(inputs):
        first, *others = (evaluate(inputs, through(impl)) for _ in range(4))
        assert all(torch.equal(other[name], value) for other in others for name, value in first.items())


@pytest.mark.parametrize("impl", FUSED)
def test_phm_without_base_and_scale_is_phm_linear(impl: str) -> None:
    inputs = draw(LOW_RANK[6], base=None, scale=1.0)
    if not _serves(impl, inputs):
        pytest.skip("refused")
    assert torch.equal(through(impl)(inputs), ck.phm_linear(inputs.x, inputs.down, impl=impl))


def test_no_matrix_of_the_size_of_h() -> None:
    for shape in ((1, (32, 16), (32, 4, 32)), (1, (32, 16), (32, None, 32)), (4, (8, 16), (32, None, 32))):
        inputs = draw(shape, (2,), FP64, FP64)
        leaves = [t.requires_grad_() for t in inputs.tensors().values()]
        sizes = []
        for impl in ("dense", "factored"):
            with Largest([*leaves, inputs.grad]) as mode:
                torch.autograd.grad(through(impl)(inputs), leaves, inputs.grad)
            sizes.append(mode.largest)
        h = inputs.x.shape[-1] * inputs.grad.shape[-1]
        assert sizes[0] >= h > 4 * sizes[1]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("options", [{}, {"base": None}, {"bias": False, "dtype": BF16}, {"params": BF16}], ids=str)
def test_the_operator(options: dict[str, Any], impl: str) -> None:
    inputs = draw(LOW_RANK[1], (5,), **options)
    if not _serves(impl, inputs):
        pytest.skip("refused")
    tensors = inputs.map(lambda t: t.clone().requires_grad_())
    rest = (*tensors.down, 0.7, impl)
    torch.library.opcheck(OPS.kronecker_linear.default, (tensors.x, tensors.residual, *rest))
    arguments = (inputs.grad, inputs.x, *inputs.down, 0.7, impl)
    torch.library.opcheck(OPS.kronecker_linear_backward.default, arguments)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("shape", [LOW_RANK[1], WHOLE[1]], ids=str)
def test_compiles_without_a_break(shape: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(through(), fullgraph=True, backend="aot_eager", dynamic=True)
    for leading in ((5,), (9,)):
        inputs = draw(shape, leading)
        expected = evaluate(inputs, through())
        for name, value in evaluate(inputs, compiled).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("shape", [LOW_RANK[1], WHOLE[1]], ids=str)
def test_transforms_and_forward_mode(shape: Any) -> None:
    inputs = draw(shape, (3,), FP64, FP64)

    def function(x: Tensor, left: Tensor, base: Tensor) -> Tensor:
        return through()(inputs._replace(x=x, down=inputs.down._replace(left=left), residual=base))

    at = (inputs.x, inputs.down.left, inputs.residual)
    expected = evaluate(inputs, through("dense"))
    torch.testing.assert_close(torch.func.vmap(function, in_dims=(0, None, 0))(*at), expected["out"])
    grads = torch.func.grad(lambda *tensors: (function(*tensors) * inputs.grad).sum(), (0, 1, 2))(*at)
    for name, got in zip(("x", "down.left", "residual"), grads, strict=True):
        torch.testing.assert_close(got, expected[name])
    direction = tuple(torch.randn_like(t) for t in at)
    _, tangent = torch.func.jvp(function, at, direction)
    linear = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    torch.testing.assert_close((tangent * inputs.grad).sum(), linear)


@pytest.mark.parametrize("kind", ["two_tensor", "meta", "freed", "shortened", "strided_and_freed", "sparse"])
@pytest.mark.parametrize("shape", [LOW_RANK[1], WHOLE[1]], ids=str)
def test_foreign_tensors_are_right_or_named(shape: Any, kind: str) -> None:
    inputs = draw(shape, (5,))
    expected = [through("dense")(inputs)]
    for name, tensor in inputs.tensors().items():
        foreign, field = KINDS[kind](tensor), name.removeprefix("down.")
        if field == name:
            given, argument = inputs._replace(**{name: foreign}), "base" if name == "residual" else name
        else:
            given, argument = inputs._replace(down=inputs.down._replace(**{field: foreign})), f"weights.{field}"
        found = outcome(lambda given=given: [through()(given)], expected)  # type: ignore[misc]
        assert found == "right" if kind == "two_tensor" else argument in found


def test_errors_name_the_argument() -> None:
    inputs = draw(LOW_RANK[1], (5,))
    x, weights, base = inputs.x, inputs.down, inputs.residual
    wrong: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((x[..., 1:], weights, base), ValueError, r"x must have shape \(\.\.\., 21\)"),
        ((x, weights, base[..., 1:]), ValueError, r"base must have shape \(5, 20\), got \(5, 19\)"),
        ((x, weights, base[0]), ValueError, r"base must have shape \(5, 20\), got \(20,\)"),
        ((x, weights, base.double()), TypeError, "base must have the dtype of x, float32, got float64"),
        ((x, weights, 1.0), TypeError, "base must be a torch.Tensor, got float"),
        ((x, weights, base, "2"), TypeError, "scale must be a number or a tensor of one number, got str"),
        ((x, weights, base, torch.ones(2)), ValueError, r"scale must be a number or a tensor of one number, .*\(2,\)"),
        ((x, tuple(weights)), TypeError, "weights must be PHMWeights"),
        ((x, weights._replace(left=weights.left[:1])), ValueError, "weights.left must have shape"),
        ((x, weights._replace(right=weights.right[:, 1:])), ValueError, "weights.right must have shape"),  # type: ignore[index]
        ((x, weights._replace(bias=weights.bias[1:])), ValueError, "weights.bias must have shape"),  # type: ignore[index]
    ]
    for arguments, kind, message in wrong:
        with pytest.raises(kind, match=message):
            kronecker_linear(*arguments)
    with pytest.raises(ValueError, match="impl='fast' is not known"):
        kronecker_linear(x, weights, impl="fast")


@pytest.mark.parametrize("impl", FUSED)
def test_an_explicit_kernel_says_what_it_does_not_serve(impl: str) -> None:
    with pytest.raises(RuntimeError, match=rf"impl='{impl}' cannot serve this linear: the weights are not factorised"):
        through(impl)(draw(WHOLE[0]))
    with pytest.raises(RuntimeError, match=rf"impl='{impl}' cannot serve this linear: x is float64"):
        through(impl)(draw(LOW_RANK[0], dtype=FP64))


def test_krona() -> None:
    """KronA (arXiv 2212.10650): y = x W + s x (A (x) B)."""
    x, w, a, b, s = torch.randn(7, 60), torch.randn(60, 96), torch.randn(6, 8), torch.randn(10, 12), 0.5
    y = kronecker_linear(x, ck.PHMWeights(a[None], b[None]), x @ w, s)
    torch.testing.assert_close(y, x @ w + s * x @ torch.kron(a, b), rtol=1e-4, atol=1e-4)


def test_cdka() -> None:
    """CDKA: the change of a weight (out, in) is the sum over i of B_i (x) A_i, here of three."""
    x, w, b, a = torch.randn(7, 60), torch.randn(96, 60), torch.randn(3, 8, 6), torch.randn(3, 12, 10)
    y = kronecker_linear(x, ck.PHMWeights(b.mT, a.mT), x @ w.T)
    change = sum(torch.kron(*pair) for pair in zip(b, a, strict=True))
    torch.testing.assert_close(y, x @ (w + change).T, rtol=1e-4, atol=1e-4)
