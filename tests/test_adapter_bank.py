"""AdapterBank computes what a Python loop over its single adapters computes, with all gradients."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from oracle import BF16, FP32, FP64, IMPLS, bits
from phm_lookalikes import hooks_known
from test_bottleneck_adapter import OPTIONS as BOTTLENECK
from test_compacter_adapter import OPTIONS as COMPACTER
from torch import Tensor

import compacter_kernels as ck

NAMES = ["de", "sv", "nl"]
CASES: dict[str, dict[str, Any]] = {
    **{f"compacter: {name}": options for name, options in COMPACTER.items()},
    "compacter: one rule for all": {"share_rule": True},
    "compacter: one factorised rule for all": {"share_rule": True, "factorized_phm_rule": True},
    "compacter: one rule for all, but for each projection": {"share_rule": True, "shared_phm_rule": False},
    **{f"bottleneck: {name}": {"kind": "bottleneck", **options} for name, options in BOTTLENECK.items()},
}
NORMED = [name for name, options in CASES.items() if "ln_before" in options or "ln_after" in options]
KINDS = ["compacter", "bottleneck"]


def make(case: str = "compacter: default", **more: Any) -> ck.AdapterBank:
    bank = ck.AdapterBank(24, NAMES, **{"reduction_factor": 2, **CASES[case], **more})
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(0, 0.5)
    return bank


def of_kind(kind: str, **more: Any) -> ck.AdapterBank:
    return make(f"{kind}: default", **more)


def singles(bank: ck.AdapterBank) -> dict[str, Any]:
    return {name: bank[name] for name in bank.names}


def gradients(bank: ck.AdapterBank, each: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients of the single adapters, as the bank has them."""
    found: dict[str, Tensor] = {}
    for path, own in bank.named_parameters():
        shared = bank.share_rule and "phm_rule" in path
        of_each = [each[name].get_parameter(path).grad for name in bank.names]
        zero = torch.zeros_like(own if shared else own[0])
        of_each = [zero if grad is None else grad for grad in of_each]
        found[path] = sum(of_each) if shared else torch.stack(of_each)  # type: ignore[assignment]
    return found


def close(actual: Tensor, expected: Tensor, limit: float = 1e-10) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= limit * expected.abs().max().clamp(min=1)


ROUTES = {
    "samples": torch.tensor([2, -1, 0, 2]),
    "tokens": torch.tensor([[0, 2, -1, 2, 2], [-1] * 5, [2, 0, 2, 0, -1], [2, 2, 2, 2, 0]]),
    "none": torch.tensor([-1, -1, -1, -1]),
}


def looped(each: dict[str, Any], x: Tensor, route: Tensor, residual: Tensor | None, adds: bool) -> Tensor:
    rows = []
    of_token = route.reshape(route.shape + (1,) * (2 - route.ndim)).expand(x.shape[:2])
    for place in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        row, added = x[place[0], place[1]], None if residual is None else residual[place[0], place[1]]
        index = int(of_token[place[0], place[1]])
        if index >= 0:
            rows.append(each[NAMES[index]](row, added))
        elif added is not None:
            rows.append(added)
        else:
            rows.append(row if adds else 0 * row)
    return torch.stack(rows).reshape(x.shape)


def results(module: Any, function: Any, x: Tensor, residual: Tensor | None, *more: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, *([] if residual is None else [residual]), *more)]
    out = function(*leaves)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    return [out.detach(), *[torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("given", [False, True], ids=["residual is x", "residual given"])
@pytest.mark.parametrize("case", CASES)
def test_routed(case: str, given: bool, route: str) -> None:
    bank, ids = make(case, dtype=FP64), ROUTES[route]
    each, x = singles(bank), torch.randn(4, 5, 24, dtype=FP64)
    residual = torch.randn_like(x) if given else None
    actual = results(bank, lambda x, r=None: bank(x, route=ids, residual=r), x, residual)
    adds = bank._like.add_residual
    expected = results(each, lambda x, r=None: looped(each, x, ids, r, adds), x, residual)
    for one, other in zip(actual, expected, strict=True):
        close(one, other)
    for path, grad in gradients(bank, each).items():
        own = bank.get_parameter(path)
        if own.requires_grad:
            close(own.grad, grad)
            unused = [] if bank.share_rule and "phm_rule" in path else [1]
            assert all(not own.grad[index].any() for index in unused)
        else:
            assert "rule" in path and CASES[case] == {"learn_phm": False}


MIXES = {"adapters": (3,), "samples": (4, 3), "tokens": (4, 5, 3)}


@pytest.mark.parametrize("shape", MIXES)
@pytest.mark.parametrize("case", [case for case in CASES if case not in NORMED])
def test_mixed(case: str, shape: str) -> None:
    bank = make(case, dtype=FP64)
    each, x, w = singles(bank), torch.randn(4, 5, 24, dtype=FP64), torch.randn(MIXES[shape], dtype=FP64)
    adds = bank._like.add_residual

    def loop(x: Tensor, w: Tensor) -> Tensor:
        wide = w.reshape(w.shape[:-1] + (1,) * (3 - w.ndim) + (3,))
        parts = [each[n](x, torch.zeros_like(x)) * wide[..., i, None] for i, n in enumerate(NAMES)]
        return sum(parts, x if adds else torch.zeros_like(x))

    actual = results(bank, lambda x, w: bank(x, mix=w), x, None, w)
    for one, other in zip(actual, results(each, loop, x, None, w), strict=True):
        close(one, other)
    for path, grad in gradients(bank, each).items():
        if bank.get_parameter(path).requires_grad:
            close(bank.get_parameter(path).grad, grad)


@pytest.mark.parametrize("case", NORMED)
def test_adapters_with_norms_are_not_mixed(case: str) -> None:
    with pytest.raises(ValueError, match=r"ln_(before|after)=True: adapters with a layer norm can be routed, but not"):
        make(case)(torch.randn(2, 24), mix=torch.ones(3))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_an_adapter_are_x_bit_for_bit(kind: str) -> None:
    x = torch.randn(4, 5, 24)
    x[1, 0, 0] = float("inf")
    route = torch.tensor([0, -1, 2, -1])
    for options in ({}, {"dropout": 0.5}, {"ln_after": True}, {"impl": "dense"}):
        y = of_kind(kind, **options).train()(x, route=route)
        assert torch.equal(bits(y[[1, 3]]), bits(x[[1, 3]])), options
        wide = of_kind(kind, **options)(x.to(BF16), route=route, residual=x)
        assert wide.dtype == FP32 and torch.equal(bits(wide[[1, 3]]), bits(x[[1, 3]]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_impl(kind: str, impl: str) -> None:
    bank, x = of_kind(kind, impl=impl), torch.randn(4, 5, 24)
    ids = ROUTES["tokens"]
    expected = looped(singles(bank), x, ids, None, True)
    torch.testing.assert_close(bank(x, route=ids), expected, rtol=1e-4, atol=1e-5)
    w = torch.rand(4, 3)
    mixed = sum((w[:, i, None, None] * (bank[n](x) - x) for i, n in enumerate(NAMES)), x)
    torch.testing.assert_close(bank(x, mix=w), mixed, rtol=1e-4, atol=1e-4)


@hooks_known
@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_of_one_has_the_bits_of_its_adapter(kind: str) -> None:
    bank, x = of_kind(kind), torch.randn(4, 70, 24)
    for name in ("de", "sv"):
        bank.drop(name)
    assert bank.names == ("nl",) and len(bank) == 1
    assert torch.equal(bank(x, route=torch.zeros(4, dtype=torch.int64)), bank["nl"](x))


@hooks_known
@pytest.mark.skipif("cpu" not in IMPLS, reason="the native part is not built")
@pytest.mark.parametrize("route", ["samples", "tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_bits_of_a_run_with_their_adapter_alone(kind: str, route: str) -> None:
    bank, ids = of_kind(kind, impl="cpu"), ROUTES[route]
    x = torch.randn(4, 5, 24)
    mixed, of_token = bank(x, route=ids), ids.reshape(4, -1).expand(4, 5)
    for index, name in enumerate(NAMES):
        assert torch.equal(mixed[of_token == index], bank[name](x)[of_token == index])


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_numbers(kind: str) -> None:
    bank, x = of_kind(kind), torch.randn(4, 5, 24)
    ids = torch.tensor([bank.index("sv"), -1, bank.index("de"), bank.index("sv")])
    assert torch.equal(bank(x, route=["sv", None, "de", "sv"]), bank(x, route=ids))
    assert torch.equal(bank(x, route=ids.int()), bank(x, route=ids))
    assert "sv" in bank and "da" not in bank


@pytest.mark.parametrize("case", ["compacter: default", "compacter: one rule for all", "bottleneck: layer norms"])
def test_others_keep_their_bits(case: str) -> None:
    bank = make(case)
    before = singles(bank)

    def unchanged(*names: str) -> None:
        for name in names:
            for path, value in bank[name].state_dict().items():
                assert torch.equal(bits(value), bits(before[name].state_dict()[path]))

    bank.add("da")
    assert bank.names == ("de", "sv", "nl", "da")
    unchanged(*NAMES)
    bank.drop("sv")
    assert bank.names == ("de", "nl", "da") and bank.index("nl") == 1
    unchanged("de", "nl")
    other = copy.deepcopy(before["sv"])
    parameters = dict(bank.named_parameters())
    bank.replace("da", other)
    assert all(bank.get_parameter(path) is parameter for path, parameter in parameters.items())
    bank.add("again", before["sv"].state_dict())
    unchanged("de", "nl")
    for name in ("da", "again"):
        for path, value in bank[name].state_dict().items():
            assert torch.equal(value, other.state_dict()[path])
    x = torch.randn(2, 24)
    torch.testing.assert_close(bank(x, route=["again", "nl"])[0], before["sv"](x[0]), rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in bank.parameters())


def test_the_rule_stays_shared() -> None:
    bank = make("compacter: one rule for all")
    bank.add("da")
    for module in (bank, copy.deepcopy(bank), bank.double()):
        assert module.down.phm_rule is module.up.phm_rule and module.down.phm_rule.shape == (4, 4, 4)
    apart = make()
    apart.add("da")
    assert apart.down.phm_rule is apart.up.phm_rule and apart.down.phm_rule.shape == (4, 4, 4, 4)


def test_fresh_adapters_start_as_single_ones_do() -> None:
    bank = ck.AdapterBank(768, ["a", "b"], reduction_factor=2)
    single = ck.CompacterAdapter(768, reduction_factor=2)
    assert not torch.equal(bank.down.W_left[0], bank.down.W_left[1])
    for path, value in single.state_dict().items():
        for index in range(2):
            spread = bank.get_parameter(path)[index].std()
            assert abs(spread - value.std()) <= 0.25 * value.std()


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "kind": (lambda: ck.AdapterBank(24, NAMES, kind="lora"), ValueError, "kind='lora' is not known; choose one of com"),
    "names": (lambda: ck.AdapterBank(24, []), ValueError, "names is empty"),
    "twice": (lambda: ck.AdapterBank(24, ["a", "a"], reduction_factor=2), ValueError, "has an adapter 'a' already"),
    "a number": (lambda: ck.AdapterBank(24, [1], reduction_factor=2), TypeError, "must be a string, got 1"),
    "rule": (lambda: ck.AdapterBank(24, NAMES, phm_rule=None), TypeError, "phm_rule: the rule of a bank is its own"),
    "no rule": (lambda: of_kind("bottleneck", share_rule=True), ValueError, "share_rule=True: adapters of the kind"),
    "option": (lambda: make(reduction_factor=0), ValueError, "reduction_factor must be a number > 0, got 0"),
    "neither": (lambda: make()(torch.randn(2, 24)), ValueError, "pass either route.* or mix"),
    "both": (
        lambda: make()(torch.randn(2, 24), torch.zeros(2).long(), torch.ones(3)),
        ValueError,
        "pass either route.* or mix",
    ),
    "no such name": (lambda: make()(torch.randn(2, 24), ["de", "da"]), KeyError, "no adapter 'da'; it has de, sv, nl"),
    "names too few": (lambda: make()(torch.randn(2, 24), ["de"]), ValueError, "route has 1 names for 2 samples"),
    "no such number": (lambda: make()(torch.randn(2, 24), torch.tensor([0, 3])), IndexError, "route has the adapter 3"),
    "weights": (lambda: make()(torch.randn(2, 24), mix=torch.ones(2)), ValueError, "mix must have"),
    "last": (lambda: ck.AdapterBank(24, ["a"], reduction_factor=2).drop("a"), ValueError, "'a' is the last adapter"),
    "drop": (lambda: make().drop("da"), KeyError, "the bank has no adapter 'da'"),
    "get": (lambda: make()["da"], KeyError, "the bank has no adapter 'da'"),
    "activation": (
        lambda: make().replace("de", ck.CompacterAdapter(24, reduction_factor=2, activation="relu")),
        ValueError,
        "activation is 'gelu_new' in the bank, and 'relu' in the source",
    ),
    "sizes": (
        lambda: make().add("da", ck.CompacterAdapter(24, reduction_factor=3)),
        ValueError,
        "bottleneck is 12 in the bank, and 8 in the source",
    ),
    "other kind": (lambda: make().add("da", ck.BottleneckAdapter(24)), ValueError, "kind is .*CompacterAdapter"),
    "shape": (
        lambda: make().replace("de", {**make()["de"].state_dict(), "up.b": torch.zeros(3)}),
        ValueError,
        r"up.b must be floats of shape \(24,\), got torch.float32, \(3,\)",
    ),
    "missing": (lambda: make().replace("de", {}), ValueError, "source must have the parameters down.W_left"),
    "no source": (lambda: make().replace("de", 3), TypeError, "source must be an adapter or its state dict, got int"),
    "another rule": (
        lambda: make("compacter: one rule for all").replace("de", make()["de"]),
        ValueError,
        "share_rule=True: the source has another down.phm_rule than the bank",
    ),
    "two rules": (
        lambda: make().replace("de", {**make()["de"].state_dict(), "up.phm_rule": torch.zeros(4, 4, 4)}),
        ValueError,
        "down.phm_rule and up.phm_rule are one parameter in the bank, and differ in the source",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors(case: str) -> None:
    function, kind, match = REFUSED[case]
    with pytest.raises(kind, match=match):
        function()


def test_an_error_leaves_the_bank_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make()
    before = {path: value.clone() for path, value in bank.state_dict().items()}
    wrong = {**bank["de"].state_dict(), "up.b": torch.zeros(3)}
    for call in (lambda: bank.replace("de", wrong), lambda: bank.add("da", wrong), lambda: bank.add("de")):
        with pytest.raises(ValueError, match=r"up.b must be floats|has an adapter 'de' already"):
            call()
    for change in (lambda: bank.add("da"), lambda: bank.drop("de")):
        with monkeypatch.context() as full:
            full.setattr(torch, "cat", Mock(side_effect=[torch.zeros(1), MemoryError]))
            with pytest.raises(MemoryError):
                change()
    assert bank.names == tuple(NAMES)
    assert all(torch.equal(value, before[path]) for path, value in bank.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_state_dict_is_named_as_that_of_one_adapter(case: str) -> None:
    bank, other = make(case), make(case)
    assert list(bank.state_dict()) == list(bank["de"].state_dict())
    other.load_state_dict(bank.state_dict())
    x = torch.randn(4, 24)
    assert torch.equal(other(x, ["de", None, "nl", "sv"]), bank(x, ["de", None, "nl", "sv"]))


@pytest.mark.parametrize("case", CASES)
def test_copies_and_repr(case: str) -> None:
    from torch.nn import functional as F

    bank, x = make(case), torch.randn(4, 24)
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    for again in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank)), torch.load(file, weights_only=False)):
        assert torch.equal(again(x, ["de", None, "nl", "sv"]), bank(x, ["de", None, "nl", "sv"]))
        assert {p.data_ptr() for p in again.parameters()}.isdisjoint(p.data_ptr() for p in bank.parameters())
        assert repr(again) == repr(bank)
    rebuilt = eval(repr(bank), {"softplus": F.softplus, **vars(ck)})
    assert repr(rebuilt) == repr(bank)
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {n: p.shape for n, p in bank.named_parameters()}


def test_a_batch_without_samples() -> None:
    bank = ck.AdapterBank(24, names=["de", "sv"], reduction_factor=2)
    assert bank(torch.empty(0, 24), route=[]).shape == (0, 24)
