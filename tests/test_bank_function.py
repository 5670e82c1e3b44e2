"""compacter_adapter_bank: which adapter a row gets, what keeps its bits, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from oracle import BF16, FP32, FP64, FUSED, IMPLS, Case, assert_same_bits, bits, copies, run, skip_if_refused
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.cases import Tensors, weights

OPERATIONS = ("adapter", "bottleneck")
ROUTED = {operation: Case(operation, bank=4, shape=(6, 5), width=48, residual="x") for operation in OPERATIONS}
MIXED = {operation: Case(operation, bank=4, choice="mix rows", shape=(6, 5), width=48) for operation in OPERATIONS}


def single(case: Case) -> Case:
    return Case(**{**vars(case), "bank": None})


def adapter(tensors: Tensors, index: int) -> Tensors:
    """The tensors of one adapter of a bank, as leaves."""
    return {
        name: (t if name in ("x", "residual") else t[index]).detach().clone().requires_grad_()
        for name, t in tensors.items()
        if name != "mix"
    }


def call(case: Case, tensors: Tensors, impl: str, **chosen: Tensor) -> Tensor:
    down, up = weights(tensors), weights(tensors, "up.")
    return ck.compacter_adapter_bank(
        tensors["x"], down, up, activation=case.activation, residual=tensors["x"], scale=case.scale, impl=impl, **chosen
    )


def gradients(case: Case, tensors: Tensors, impl: str, route: Tensor) -> Tensors:
    out = call(case, tensors, impl, route=route)
    return {
        "out": out,
        **dict(zip(tensors, torch.autograd.grad(out, list(tensors.values()), case.grad_output()), strict=True)),
    }


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_bank_of_one_has_the_bits_of_the_single_kernel(operation: str, dtype: torch.dtype, impl: str) -> None:
    case = Case(operation, bank=1, shape=(9, 37), width=96, dtype=dtype)
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    got = gradients(case, tensors, impl, torch.zeros(9, dtype=torch.int64))
    one = run(single(case), adapter(tensors, 0), impl, case.grad_output())
    assert_same_bits(got, {name: t if name in ("out", "x") else t[None] for name, t in one.items()})


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("residual", ["none", "x", "other"])
def test_a_bank_of_one_and_rows_without_it(residual: str, operation: str, impl: str) -> None:
    """They get what is added, even if it is not finite, and take no part in the gradients."""
    case = Case(operation, bank=1, shape=(6, 5), width=48, residual=residual)
    tensors, route = case.tensors(), torch.tensor([0, -1, 0, -1, 0, -1])
    skip_if_refused(case, tensors, impl)
    has, grad = route == 0, case.grad_output()
    with torch.no_grad():
        tensors["x"][~has] *= torch.tensor([torch.inf, -0.0, torch.nan])[:, None, None]
    others = {name: t for name, t in tensors.items() if name in ("x", "residual")}
    own = {name: t[has] if name in others else t[0] for name, t in tensors.items()}
    expected = run(Case(**{**vars(single(case)), "shape": (3, 5)}), copies(own), impl, grad[has])
    added = None if residual == "none" else others.get("residual", tensors["x"])
    out = ck.compacter_adapter_bank(
        tensors["x"], weights(tensors), weights(tensors, "up."), activation=case.activation, residual=added,
        scale=case.scale, route=route, impl=impl,
    )  # fmt: skip
    got = dict(zip(tensors, torch.autograd.grad(out, list(tensors.values()), grad), strict=True))
    passed = torch.zeros_like(out[~has]) if added is None else added[~has]
    assert torch.equal(bits(out[~has]), bits(passed))
    assert torch.equal(got["x"][~has], grad[~has] if residual == "x" else torch.zeros_like(grad[~has]))
    torch.testing.assert_close(out[has], expected["out"], rtol=1e-4, atol=1e-4)
    for name in tensors:
        row = got[name][has if name in others else 0]
        torch.testing.assert_close(row, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_equal_weights_of_a_mix_give_the_same_bits(operation: str, dtype: torch.dtype, impl: str) -> None:
    """Of all tokens, of a sequence or of a token; a block may have tokens of two sequences."""
    case = Case(operation, bank=3, choice="mix", shape=(3, 37), width=52, dtype=dtype)
    tensors = {name: tensor.detach() for name, tensor in case.tensors().items()}
    skip_if_refused(case, tensors, impl)
    mix = tensors.pop("mix")
    out = call(case, tensors, impl, mix=mix)
    for sizes in ((3,), (3, 37)):
        assert torch.equal(bits(out), bits(call(case, tensors, impl, mix=mix.expand(*sizes, 3)))), sizes


ROUTES = {
    "one adapter": [2] * 6,
    "no adapter": [-1] * 6,
    "sorted": [-1, 0, 0, 1, 2, 3],
    "reversed": [3, 3, 2, 1, 0, -1],
    "repeated": [1, 3, 1, 3, 1, 3],
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("route", ROUTES.values(), ids=list(ROUTES))
def test_each_sequence_gets_its_adapter(route: list[int], operation: str, impl: str) -> None:
    """Rows are those of runs with one adapter; an adapter without rows gets zeros."""
    case = ROUTED[operation]
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    got = gradients(case, tensors, impl, torch.tensor(route))
    for index in range(4):
        rows = [row for row, chosen in enumerate(route) if chosen == index]
        if not rows:
            assert not any(got[name][index].any() for name in got if name not in ("out", "x"))
            continue
        own = {**adapter(tensors, index), "x": tensors["x"][rows].detach().requires_grad_()}
        alone = Case(**{**vars(single(case)), "shape": (len(rows), 5)})
        expected = run(alone, own, impl, case.grad_output()[rows])
        for name in ("out", "x"):
            if impl == "cpu":
                assert torch.equal(bits(got[name][rows]), bits(expected[name]))
            torch.testing.assert_close(got[name][rows], expected[name], rtol=1e-4, atol=1e-4)
        for name in expected.keys() - {"out", "x"}:
            torch.testing.assert_close(got[name][index], expected[name], rtol=1e-4, atol=1e-4)
    without = [row for row, chosen in enumerate(route) if chosen == -1]
    assert torch.equal(got["out"][without], tensors["x"][without])
    assert torch.equal(got["x"][without], case.grad_output()[without])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_order_of_rows_is_the_same_rows(operation: str, impl: str) -> None:
    case = ROUTED[operation]
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    route, order = torch.randint(-1, 4, (6, 5)), torch.randperm(30)
    with torch.no_grad():
        expected = call(case, tensors, impl, route=route).view(30, -1)[order]
        shuffled = {**tensors, "x": tensors["x"].view(30, -1)[order]}
        got = call(case, shuffled, impl, route=route.view(30)[order])
    if impl == "cpu":
        assert torch.equal(bits(got), bits(expected))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wrong", [4, -2, 2**40])
def test_an_adapter_that_does_not_exist(wrong: int, impl: str) -> None:
    case = ROUTED["adapter"]
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    if impl in ("triton", "cuda"):
        out = call(case, tensors, impl, route=torch.tensor([0, wrong, 1, 2, 3, -1]))
        assert out[1].isnan().all()
        assert out[[0, 2, 3, 4, 5]].isfinite().all()
        return
    with pytest.raises(IndexError, match=re.escape(f"route has the adapter {wrong}; the bank has 4: 0 to 3")):
        call(case, tensors, impl, route=torch.tensor([0, wrong, 1, 2, 3, -1]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_kinds_of_routes(kind: torch.dtype, operation: str, impl: str) -> None:
    """An expanded route, and one of another integer dtype."""
    case = ROUTED[operation]
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    with torch.no_grad():
        expected = call(case, tensors, impl, route=torch.full((6,), 2))
        for route in (torch.tensor(2, dtype=kind), torch.tensor([2], dtype=kind).expand(6, 5)):
            torch.testing.assert_close(call(case, tensors, impl, route=route), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", [*ROUTED.values(), *MIXED.values()], ids=str)
def test_frozen_weights_need_no_gradient(case: Case, impl: str) -> None:
    """The gradients that are wanted do not depend on the others."""
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    everything = run(case, tensors, impl)
    wanted = [name for name in ("x", "mix") if name in tensors]
    for name, t in tensors.items():
        t.requires_grad_(name in wanted)
    assert_same_bits(run(case, tensors, impl), {name: everything[name] for name in ("out", *wanted)})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", [*ROUTED.values(), *MIXED.values()], ids=str)
def test_same_bits_every_time(case: Case, impl: str) -> None:
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    assert_same_bits(run(case, tensors, impl), run(case, tensors, impl))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("bank", [None, 3])
def test_a_weight_in_the_layout_of_nn_linear(bank: int | None, impl: str) -> None:
    """It gives the same bits as a contiguous one, and a gradient of its own layout."""
    case = Case("bottleneck", bank=bank, shape=(6, 5), width=48, bottleneck=20)
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    turned = {n: t.detach().mT.contiguous().mT.requires_grad_() if "weight" in n else t for n, t in tensors.items()}
    got, expected = run(case, turned, impl), run(case, tensors, impl)
    assert_same_bits(got, expected)
    if impl != "triton":
        assert got["down.weight"].stride() == turned["down.weight"].stride()


@pytest.mark.parametrize("impl", IMPLS)
def test_scales_of_the_adapters(impl: str) -> None:
    case = ROUTED["adapter"]
    tensors, route = case.tensors(), torch.tensor([0, 1, 2, 3, -1, 2])
    skip_if_refused(case, tensors, impl)
    x, down, up = tensors["x"], weights(tensors), weights(tensors, "up.")
    scale = torch.tensor([0.5, 2.0, -1.0, 0.0], requires_grad=True)
    got = ck.compacter_adapter_bank(x, down, up, route=route, scale=scale, impl=impl)
    plain = ck.compacter_adapter_bank(x, down, up, route=route, impl=impl)
    factor = torch.cat([scale, torch.zeros(1)])[route][:, None, None]
    torch.testing.assert_close(got, plain * factor, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(got.sum(), scale)
    expected = [plain[route == index].sum() for index in range(4)]
    torch.testing.assert_close(grad, torch.stack(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", ["dense", "factored"])
@pytest.mark.parametrize("choice", ["rows", "sequences", "mix rows"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradcheck(operation: str, choice: str, impl: str) -> None:
    case = Case(operation, bank=2, choice=choice, shape=(3, 2), width=8, bottleneck=4, dtype=FP64, params=FP64)
    tensors = case.tensors()
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *values: case.call(dict(zip(names, values, strict=True)), impl), tuple(tensors.values())
    )


@pytest.mark.parametrize("impl", [*FUSED, "factored"])
@pytest.mark.parametrize("case", [*ROUTED.values(), *MIXED.values(), Case("bottleneck")], ids=str)
def test_compiled(case: Case, impl: str) -> None:
    """One graph for all batch sizes, with the results of the eager call."""
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    torch.compiler.reset()

    def function(tensors: Tensors, chosen: Tensors) -> Tensor:
        down, up = weights(tensors), weights(tensors, "up.")
        if not chosen:
            return ck.bottleneck_adapter(tensors["x"], down, up, impl=impl)
        return ck.compacter_adapter_bank(tensors["x"], down, up, impl=impl, **chosen)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (6, 4, 5):
        given = {n: (t[:batch] if n in ("x", "mix") else t).detach().requires_grad_() for n, t in tensors.items()}
        route = case.route()
        chosen = {"route": route[:batch]} if route is not None else {"mix": given["mix"]} if "mix" in given else {}
        got, expected = compiled(given, chosen), function(given, chosen)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        of_got, of_expected = (torch.autograd.grad(y.square().sum(), list(given.values())) for y in (got, expected))
        torch.testing.assert_close(of_got, of_expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", [*ROUTED.values(), *MIXED.values()], ids=str)
def test_operator(case: Case, impl: str) -> None:
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    down, up = weights(tensors), weights(tensors, "up.")
    route, mix = case.route(), tensors.get("mix")
    chosen = (None, route.view(-1)) if mix is None else (mix.detach().view(-1, 4).requires_grad_(), None)
    arguments = (tensors["x"], None, *down.slots(), *up.slots(), *chosen)
    torch.library.opcheck(
        torch.ops.compacter_kernels.adapter_bank.default,
        (*arguments, True, "gelu_new", 0.5, impl),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_gradients_of_an_adapter_without_rows_are_0(operation: str, impl: str) -> None:
    """Not -0, and not 0 times a scale that is not finite."""
    case = Case(operation, bank=4, shape=(6, 5), width=48, scale=-2.0)
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    for scale in (-2.0, torch.inf):
        changed = Case(**{**vars(case), "scale": scale})
        got = gradients(changed, tensors, impl, torch.ones(6, dtype=torch.int64))
        for name in tensors.keys() - {"x", "residual"}:
            for adapter in (0, 2, 3):
                assert not bits(got[name][adapter]).any(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_choice_without_memory(impl: str) -> None:
    case = ROUTED["adapter"]
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    for name, choice in (
        ("route", torch.zeros(6, dtype=torch.int32)),
        ("route", torch.zeros(5, 6, dtype=torch.int64).t()),
        ("mix", torch.rand(5, 6, 4).transpose(0, 1)),
    ):
        choice.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=f"{name} has no memory"):
            call(case, tensors, impl, **{name: choice})
    zeros = torch._efficientzerotensor  # without an address
    for name, choice in (("route", zeros(6, dtype=torch.int64)), ("mix", zeros(4))):
        if impl in FUSED and (impl, name) != ("triton", "route"):
            with pytest.raises(ValueError, match="has no memory"):
                call(case, tensors, impl, **{name: choice})
        else:  # torch reads it
            expected = call(case, tensors, impl, **{name: torch.zeros(choice.shape, dtype=choice.dtype)})
            assert torch.equal(call(case, tensors, impl, **{name: choice}), expected)


def test_wrong_arguments() -> None:
    case = ROUTED["adapter"]
    tensors = case.tensors()
    x, down, up = tensors["x"], weights(tensors), weights(tensors, "up.")
    route = torch.zeros(6, dtype=torch.int64)
    dense = weights(ROUTED["bottleneck"].tensors())
    for error, message, given in (
        (ValueError, "pass either route", {"route": None}),
        (ValueError, "pass either route", {"route": route, "mix": torch.ones(4)}),
        (TypeError, "route must be int64 or int32, got float32", {"route": torch.zeros(6)}),
        (ValueError, r"route must have the first sizes of \(6, 5\), got \(5,\)", {"route": route[:5]}),
        (ValueError, r"mix must have the first sizes of \(6, 5\), then 4 for the adapters", {"mix": torch.ones(6, 3)}),
        (TypeError, "mix must be float32", {"mix": torch.ones(4, dtype=torch.int64)}),
        (TypeError, "down must be PHMWeights or LinearWeights", {"down": (1, 2)}),
        (TypeError, "down and up must be of one class", {"down": dense}),
        (ValueError, r"up.right must have shape \(4, 4, 1, out/4\)", {"up": up._replace(right=up.right[:3])}),
        (ValueError, r"up.bias must have shape \(4, 48,\)", {"up": up._replace(bias=up.bias[:3])}),
        (ValueError, "down.left must have 4 dimensions", {"down": down._replace(left=torch.tensor(1.0))}),
        (ValueError, "down.weight must have 3 dimensions", {"down": ck.LinearWeights(torch.ones(48, 4))}),
        (ValueError, "up.rule must have shape", {"up": up._replace(rule=up.rule[:3])}),
        (ValueError, "scale must be a number or a tensor of one number or of 4", {"scale": torch.ones(3)}),
    ):
        arguments = {"down": down, "up": up, "route": None if "mix" in given else route, **given}
        with pytest.raises(error, match=message):
            ck.compacter_adapter_bank(x, arguments.pop("down"), arguments.pop("up"), **arguments)


def test_explain_and_norm_and_out() -> None:
    case = ROUTED["adapter"]
    tensors, route = case.tensors(), torch.tensor([0, 1, 2, 3, -1, 2])
    x, down, up = tensors["x"].detach(), weights(tensors), weights(tensors, "up.")
    assert ck.explain(x, down, up, route=route).impl in IMPLS
    norm = ck.NormWeights(torch.rand(48), torch.rand(48))
    with torch.no_grad():
        plain = ck.compacter_adapter_bank(x, down, up, route=route, residual=x)
        expected = torch.nn.functional.layer_norm(plain, (48,), norm.weight, norm.bias, norm.eps)
        out = torch.empty_like(x)
        got = ck.compacter_adapter_bank(x, down, up, route=route, residual=x, norm=norm, out=out)
    assert got is out
    torch.testing.assert_close(got, expected)
