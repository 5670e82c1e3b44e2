"""Every bad argument of every public function is named in its error, on the first call and on every later one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import BF16, FP64, Case, weights
from torch import Tensor

import compacter_kernels as ck

CASE = Case(width=24, bottleneck=12)
LINEAR = Case("linear", width=24, bottleneck=12)


def linear(x: Any = None, w: Any = None, **options: Any) -> Tensor:
    tensors = {name: t.detach() for name, t in LINEAR.tensors().items()}
    return ck.phm_linear(tensors["x"] if x is None else x, weights(tensors) if w is None else w, **options)


def _of_linear(**fields: Any) -> ck.PHMWeights:
    return weights(LINEAR.tensors())._replace(**fields)


def adapter(x: Any = None, down: Any = None, up: Any = None, **options: Any) -> Tensor:
    tensors = {name: t.detach() for name, t in CASE.tensors().items()}
    down = weights(tensors, "down.") if down is None else down
    up = weights(tensors, "up.") if up is None else up
    return options.pop("function", ck.compacter_adapter)(tensors["x"] if x is None else x, down, up, **options)


def _ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, **options)


WEIGHTS = [
    ("no PHMWeights", 3, TypeError, r"weights must be PHMWeights.* got int"),
    ("a plain tuple", tuple(_of_linear()), TypeError, r"weights must be PHMWeights.* got tuple"),
    ("rule no tensor", _of_linear(rule=[1.0]), TypeError, r"weights\.rule must be a torch\.Tensor, got list"),
    ("rule not square", _of_linear(rule=_ones(4, 4, 3)), ValueError, r"weights\.rule must have shape .*\(4, 4, 3\)"),
    ("rule 2-d", _of_linear(rule=_ones(4, 4)), ValueError, r"weights\.rule must have 3 dimensions, .*\(4, 4\)"),
    ("rule empty", _of_linear(rule=_ones(0, 0, 0)), ValueError, r"weights\.rule must have shape"),
    ("rule int", _of_linear(rule=_ones(4, 4, 4).int()), TypeError, r"weights\.rule must be float32.*got int32"),
    ("left None", _of_linear(left=None), TypeError, r"weights\.left must be a torch\.Tensor, got NoneType"),
    ("left of other n", _of_linear(left=_ones(3, 8, 1)), ValueError, r"weights\.left must have shape \(4, in/4, rank\)"),
    ("left empty", _of_linear(left=_ones(4, 6, 0)), ValueError, r"weights\.left must have shape"),
    ("left 4-d", _of_linear(left=_ones(4, 6, 1, 1)), ValueError, r"weights\.left must have 3 dimensions"),
    ("left complex", _of_linear(left=_ones(4, 6, 1) * 1j), TypeError, r"weights\.left must be float32.*got complex64"),
    ("left on meta", _of_linear(left=_ones(4, 6, 1, device="meta")), ValueError, r"weights\.left is on meta"),
    ("right of other rank", _of_linear(right=_ones(4, 2, 3)), ValueError, r"weights\.right must have shape \(4, 1, out/4\)"),
    ("right empty", _of_linear(right=_ones(4, 1, 0)), ValueError, r"weights\.right must have shape"),
    ("right a number", _of_linear(right=1.0), TypeError, r"weights\.right must be a torch\.Tensor, got float"),
    ("right sparse", _of_linear(right=_ones(4, 1, 3).to_sparse()), TypeError, r"weights\.right must be a dense"),
    ("bias too short", _of_linear(bias=_ones(11)), ValueError, r"weights\.bias must have shape \(12,\), got \(11,\)"),
    ("bias 2-d", _of_linear(bias=_ones(1, 12)), ValueError, r"weights\.bias must have 1 dimension"),
    ("bias bool", _of_linear(bias=_ones(12) > 0), TypeError, r"weights\.bias must be float32.*got bool"),
    ("bias on meta", _of_linear(bias=_ones(12, device="meta")), ValueError, r"weights\.bias is on meta"),
]
INPUTS = [
    ("x no tensor", [1.0], TypeError, r"x must be a torch\.Tensor, got list"),
    ("x None", "None", TypeError, r"x must be a torch\.Tensor, got str"),
    ("x of another width", _ones(3, 25), ValueError, r"x must have shape \(\.\.\., 24\).*got \(3, 25\)"),
    ("x a number", _ones(()), ValueError, r"x must have shape \(\.\.\., 24\).*got \(\)"),
    ("x int", _ones(3, 24).long(), TypeError, r"x must be float32.*got int64"),
    ("x on meta", _ones(3, 24, device="meta"), ValueError, r"x is on meta.*on cpu; move one of them"),
    ("x sparse", _ones(3, 24).to_sparse(), TypeError, r"x must be a dense \(strided\) tensor"),
]
Entry = tuple[str, Callable[[], object], type[Exception], str]
TABLE: list[Entry] = [
    *((f"phm_linear: {name}", lambda w=w: linear(w=w), kind, match) for name, w, kind, match in WEIGHTS),
    *((f"phm_matrix: {name}", lambda w=w: ck.phm_matrix(w), kind, match) for name, w, kind, match in WEIGHTS),
    *((f"phm_linear: {name}", lambda x=x: linear(x), kind, match) for name, x, kind, match in INPUTS),
    *((f"adapter: {name}", lambda x=x: adapter(x), kind, match) for name, x, kind, match in INPUTS),
    *(
        (f"adapter with residual: {name}", lambda x=x: adapter(x, residual=_ones(3, 24)), kind, match)
        for name, x, kind, match in INPUTS
    ),
    *(
        (f"explain: {name}", lambda x=x: adapter(x, function=ck.explain), kind, match)
        for name, x, kind, match in INPUTS
    ),
]


def _options(function: Callable[..., object], name: str) -> list[Entry]:
    def call(**options: Any) -> Callable[[], object]:
        return lambda: function(x, function=function, **options) if False else adapter(function=function, **options)

    x = _ones(5, 24)
    return [
        (f"{name}: impl unknown", call(impl="cuda9"), ValueError, r"impl='cuda9' is not known; choose one of auto, dense"),
        (f"{name}: impl None", call(impl=None), ValueError, r"impl=None is not known"),
        (f"{name}: impl a list", call(impl=[]), ValueError, r"impl=\[\] is not known"),
        (f"{name}: activation unknown", call(activation="gelu9"), ValueError, r"activation='gelu9' is not known; choose one of"),
        (f"{name}: activation a number", call(activation=3), TypeError, r"activation must be a name or a callable, got int"),
        (f"{name}: activation a list", call(activation=[]), TypeError, r"activation must be a name or a callable, got list"),
        (f"{name}: residual of another shape", call(residual=_ones(4, 24)), ValueError, r"residual must have shape \(5, 24\), got \(4, 24\)"),
        (f"{name}: residual of another dtype", call(residual=x.to(BF16)), TypeError, r"residual must have the dtype of x, float32, got bfloat16"),
        (f"{name}: residual a number", call(residual=1.0), TypeError, r"residual must be a torch\.Tensor, got float"),
        (f"{name}: residual on meta", call(residual=x.to("meta")), ValueError, r"residual is on meta, x on cpu"),
        (f"{name}: scale a string", call(scale="2"), TypeError, r"scale must be a number or a tensor of one number, got str"),
        (f"{name}: scale None", call(scale=None), TypeError, r"scale must be a number or a tensor of one number, got NoneType"),
        (f"{name}: scale complex", call(scale=2j), TypeError, r"scale must be a number or a tensor of one number, got complex"),
        (f"{name}: scale of two numbers", call(scale=_ones(2)), ValueError, r"scale must be a number or a tensor of one number, got shape \(2,\)"),
        (f"{name}: scale an empty tensor", call(scale=_ones(0)), ValueError, r"scale must be a number or a tensor of one number, got shape \(0,\)"),
        (f"{name}: scale on meta", call(scale=_ones((), device="meta")), ValueError, r"scale is on meta, x on cpu"),
        (f"{name}: scale tensor and bad up", call(scale=_ones(1), up=3), TypeError, r"up must be PHMWeights.* got int"),
        (f"{name}: out of another shape", call(out=_ones(5, 23)), ValueError, r"out must have shape \(5, 24\), got \(5, 23\)"),
        (f"{name}: out of another dtype", call(out=x.to(FP64)), TypeError, r"out must have the dtype of x, float32, got float64"),
        (f"{name}: out a number", call(out=1), TypeError, r"out must be a torch\.Tensor, got int"),
        (f"{name}: out requires grad", call(out=_ones(5, 24, requires_grad=True)), ValueError, r"out= records no gradient"),
        (f"{name}: down no weights", call(down=None if False else 3), TypeError, r"down must be PHMWeights.* got int"),
        (f"{name}: up no weights", call(up="up"), TypeError, r"up must be PHMWeights.* got str"),
        (f"{name}: down bad", call(down=_of_linear(bias=_ones(5))), ValueError, r"down\.bias must have shape \(12,\), got \(5,\)"),
        (f"{name}: up takes another width", call(up=_of_linear()), ValueError, r"up takes width 24, but down gives width 12"),
        (f"{name}: up gives another width", call(up=_of_linear(left=_ones(4, 3, 1))), ValueError, r"up gives width 12, but x has width 24"),
        (f"{name}: up on meta", call(up=ck.PHMWeights(*(_ones(*s, device="meta") for s in ((4, 4, 4), (4, 3, 1), (4, 1, 6))))), ValueError, r"x is on cpu, up on meta"),
    ]


TABLE += _options(ck.compacter_adapter, "adapter") + _options(ck.explain, "explain")
TABLE += [
    ("phm_linear: impl unknown", lambda: linear(impl="gpu"), ValueError, r"impl='gpu' is not known; choose one of auto"),
    ("phm_linear: impl None", lambda: linear(impl=None), ValueError, r"impl=None is not known"),
    ("phm_linear: two positional", lambda: ck.phm_linear(_ones(3, 24)), TypeError, r"'weights'"),
]


@pytest.mark.parametrize("warm", [False, True], ids=["first", "after a good call"])
@pytest.mark.parametrize(("call", "kind", "match"), [entry[1:] for entry in TABLE], ids=[entry[0] for entry in TABLE])
def test_error_names_the_argument(
    call: Callable[[], object], kind: type[Exception], match: str, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ck.functional, "_plans", {})
    if warm:
        linear()
        adapter()
        adapter(residual=_ones(5, 24))
    with pytest.raises(kind, match=match):
        call()
