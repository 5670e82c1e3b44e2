"""The error about a bad argument of a public function names the argument.

It does so on the first call and on every later one.
"""

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
    ("rule of another width", _of_linear(rule=_ones(4, 4, 3)), ValueError, r"weights\.bias must have shape \(9,\)"),
    ("rule 2-d", _of_linear(rule=_ones(4, 4)), ValueError, r"weights\.rule must have 3 dimensions, .*\(4, 4\)"),
    ("rule empty", _of_linear(rule=_ones(0, 0, 0)), ValueError, r"weights\.rule must have shape"),
    ("rule int", _of_linear(rule=_ones(4, 4, 4).int()), TypeError, r"weights\.rule must be float32.*got int32"),
    ("left None", _of_linear(left=None), TypeError, r"weights\.left must be a torch\.Tensor, got NoneType"),
    (
        "left of other n",
        _of_linear(left=_ones(3, 8, 1)),
        ValueError,
        r"weights\.left must have shape \(4, in/4, rank\)",
    ),
    ("left empty", _of_linear(left=_ones(4, 6, 0)), ValueError, r"weights\.left must have shape"),
    ("left 4-d", _of_linear(left=_ones(4, 6, 1, 1)), ValueError, r"weights\.left must have 3 dimensions"),
    ("left complex", _of_linear(left=_ones(4, 6, 1) * 1j), TypeError, r"weights\.left must be float32.*got complex64"),
    ("left on meta", _of_linear(left=_ones(4, 6, 1, device="meta")), ValueError, r"weights\.left is on meta"),
    (
        "right of other rank",
        _of_linear(right=_ones(4, 2, 3)),
        ValueError,
        r"weights\.right must have shape \(4, 1, out/4\)",
    ),
    ("right empty", _of_linear(right=_ones(4, 1, 0)), ValueError, r"weights\.right must have shape"),
    ("right a number", _of_linear(right=1.0), TypeError, r"weights\.right must be a torch\.Tensor, got float"),
    ("bias too short", _of_linear(bias=_ones(11)), ValueError, r"weights\.bias must have shape \(12,\), got \(11,\)"),
    ("bias 2-d", _of_linear(bias=_ones(1, 12)), ValueError, r"weights\.bias must have 1 dimension"),
    ("bias bool", _of_linear(bias=_ones(12) > 0), TypeError, r"weights\.bias must be float32.*got bool"),
    ("bias on meta", _of_linear(bias=_ones(12, device="meta")), ValueError, r"weights\.bias is on meta"),
]
INPUTS = [
    ("x no tensor", [1.0], TypeError, r"x must be a torch\.Tensor, got list"),
    ("x a string", "24", TypeError, r"x must be a torch\.Tensor, got str"),
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


META = [_ones(*shape, device="meta") for shape in ((4, 4, 4), (4, 3, 1), (4, 1, 6))]
SCALE = r"scale must be a number or a tensor of one number, got "
OPTIONS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("impl unknown", {"impl": "cuda9"}, ValueError, r"impl='cuda9' is not known; choose one of auto, dense"),
    ("impl None", {"impl": None}, ValueError, r"impl=None is not known"),
    ("impl a list", {"impl": []}, ValueError, r"impl=\[\] is not known"),
    ("activation unknown", {"activation": "gelu9"}, ValueError, r"activation='gelu9' is not known; choose one of"),
    ("activation a number", {"activation": 3}, TypeError, r"activation must be a name or a callable, got int"),
    ("activation a list", {"activation": []}, TypeError, r"activation must be a name or a callable, got list"),
    ("residual of another shape", {"residual": _ones(4, 24)}, ValueError, r"residual must have shape \(5, 24\), got"),
    ("residual to broadcast", {"residual": _ones(24)}, ValueError, r"residual must have shape \(5, 24\), got \(24,\)"),
    (
        "residual of another dtype",
        {"residual": _ones(5, 24).to(BF16)},
        TypeError,
        r"residual must .*float32, got bfloat16",
    ),
    ("three residuals", {"residual": (_ones(5, 24),) * 3}, TypeError, r"a tensor or two of them, got a tuple of 3"),
    (
        "one of two residuals of another shape",
        {"residual": (_ones(5, 24), _ones(24))},
        ValueError,
        r"residual must have",
    ),
    ("residual a number", {"residual": 1.0}, TypeError, r"residual must be a torch\.Tensor, got float"),
    ("residual on meta", {"residual": _ones(5, 24, device="meta")}, ValueError, r"residual is on meta, x on cpu"),
    ("scale a string", {"scale": "2"}, TypeError, SCALE + "str"),
    ("scale None", {"scale": None}, TypeError, SCALE + "NoneType"),
    ("scale complex", {"scale": 2j}, TypeError, SCALE + "complex"),
    ("scale of two numbers", {"scale": _ones(2)}, ValueError, SCALE + r"shape \(2,\)"),
    ("scale of no number", {"scale": _ones(0)}, ValueError, SCALE + r"shape \(0,\)"),
    ("scale an integer tensor", {"scale": torch.tensor(2)}, TypeError, r"scale must be float32.*got int64"),
    ("scale on meta", {"scale": _ones(1, device="meta")}, ValueError, r"scale is on meta, up on cpu"),
    ("scale a tensor, up bad", {"scale": _ones(1), "up": 3}, TypeError, r"up must be PHMWeights.* got int"),
    ("out of another shape", {"out": _ones(5, 23)}, ValueError, r"out must have shape \(5, 24\), got \(5, 23\)"),
    ("out of another dtype", {"out": _ones(5, 24).to(FP64)}, TypeError, r"out must have the dtype of x, float32, got"),
    ("out a number", {"out": 1}, TypeError, r"out must be a torch\.Tensor, got int"),
    ("out on meta", {"out": _ones(5, 24, device="meta")}, ValueError, r"out is on meta, x on cpu"),
    ("out requires grad", {"out": _ones(5, 24, requires_grad=True)}, ValueError, r"out= records no gradient"),
    ("down no weights", {"down": 3}, TypeError, r"down must be PHMWeights.* got int"),
    ("up no weights", {"up": "up"}, TypeError, r"up must be PHMWeights.* got str"),
    ("down bad", {"down": _of_linear(bias=_ones(5))}, ValueError, r"down\.bias must have shape \(12,\), got \(5,\)"),
    ("up takes another width", {"up": _of_linear()}, ValueError, r"up takes width 24, but down gives width 12"),
    ("up gives another width", {"up": _of_linear(left=_ones(4, 3, 1))}, ValueError, r"up gives width 12, but x has"),
    ("up on meta", {"up": ck.PHMWeights(*META)}, ValueError, r"x is on cpu, up on meta"),
]
for function in (ck.compacter_adapter, ck.explain):
    TABLE += [
        (f"{function.__name__}: {name}", lambda f=function, o=options: adapter(function=f, **o), kind, match)
        for name, options, kind, match in OPTIONS
    ]
TABLE += [
    (
        "phm_linear: impl unknown",
        lambda: linear(impl="gpu"),
        ValueError,
        r"impl='gpu' is not known; choose one of auto",
    ),
    ("phm_linear: impl None", lambda: linear(impl=None), ValueError, r"impl=None is not known"),
    ("phm_linear: two positional", lambda: ck.phm_linear(_ones(3, 24)), TypeError, r"'weights'"),
]


@pytest.mark.parametrize("warm", [False, True], ids=["first", "after a good call"])
@pytest.mark.parametrize(("call", "kind", "match"), [entry[1:] for entry in TABLE], ids=[entry[0] for entry in TABLE])
def test_error_names_the_argument(
    call: Callable[[], object], kind: type[Exception], match: str, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ck.call_path, "_plans", {})
    if warm:
        linear()
        adapter()
        adapter(residual=_ones(5, 24))
    with pytest.raises(kind, match=match):
        call()


def test_sparse_weights() -> None:
    with pytest.raises(TypeError, match=r"weights\.right must be a dense \(strided\) tensor"):
        ck.phm_matrix(_of_linear(right=_ones(4, 1, 3).to_sparse()))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_tensor_of_sparse_rows_after_a_call() -> None:
    """torch does not even say whether it is contiguous."""
    x = _ones(5, 24)
    for name, given in (("x", {"x": x.to_sparse_csr()}), ("residual", {"residual": x.to_sparse_csr()})):
        adapter(x)
        adapter(x, residual=x + 1)
        with pytest.raises(TypeError, match=rf"{name} must be a dense \(strided\) tensor, got torch\.sparse_csr"):
            adapter(**given)
