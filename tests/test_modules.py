"""The common properties of all modules of the library.

These are a repr that rebuilds the module, copies, pickles, dtypes, and errors of the constructor.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from oracle import BF16
from test_bottleneck_adapter import OPTIONS as BOTTLENECK_OPTIONS
from test_compacter_adapter import OPTIONS as ADAPTER_OPTIONS
from test_phm_linear import OPTIONS as LINEAR_OPTIONS
from torch import nn
from torch.nn import functional as F

import compacter_kernels as ck

RULE = nn.Parameter(torch.randn(4, 4, 4))
MORE: dict[str, dict[str, Any]] = {
    "a rule passed in": {"phm_rule": RULE},
    "init": {"init": "adapters", "phm_init_range": 0.01, "phm_c_init": "uniform"},
    "dropout, impl and dtype": {"dropout": 0.1, "impl": "factored", "dtype": BF16},
    "meta": {"device": "meta"},
}
MODULES = {
    **{f"PHMLinear: {name}": (ck.PHMLinear, (24, 36), options) for name, options in LINEAR_OPTIONS.items()},
    **{
        f"CompacterAdapter: {name}": (ck.CompacterAdapter, (24,), {"reduction_factor": 2, **options})
        for name, options in {**ADAPTER_OPTIONS, **MORE}.items()
    },
    **{
        f"BottleneckAdapter: {name}": (ck.BottleneckAdapter, (24,), {"reduction_factor": 2, **options})
        for name, options in {**BOTTLENECK_OPTIONS, "meta": {"device": "meta"}, "impl": {"impl": "factored"}}.items()
    },
}


def _make(name: str) -> nn.Module:
    kind, widths, options = MODULES[name]
    return kind(*widths, **options)


@pytest.mark.parametrize("name", MODULES)
def test_repr_rebuilds_the_module(name: str) -> None:
    module = _make(name)
    options = MODULES[name][2]
    scope = {"torch": torch, "softplus": F.softplus, "phm_rule": options.get("phm_rule"), **vars(ck)}
    again = eval(repr(module), scope)
    assert repr(again) == repr(module)
    settings = [{key: value for key, value in vars(m).items() if not key.startswith("_")} for m in (module, again)]
    assert settings[0] == settings[1]
    shapes = [
        {key: (p.shape, p.dtype, p.device, p.requires_grad) for key, p in m.named_parameters()} for m in (module, again)
    ]
    assert shapes[0] == shapes[1]


def test_repr_is_short() -> None:
    assert repr(ck.PHMLinear(24, 12)) == "PHMLinear(24, 12)"
    assert repr(ck.CompacterAdapter(768, reduction_factor=16)) == "CompacterAdapter(768, reduction_factor=16)"
    assert repr(ck.BottleneckAdapter(768, reduction_factor=8)) == "BottleneckAdapter(768, reduction_factor=8)"


def _pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("name", [name for name in MODULES if "meta" not in name])
def test_copies(name: str, duplicate: Any) -> None:
    """A copy computes the same, has its own memory, and shares the rule as before."""
    module = _make(name).eval()
    x = torch.randn(3, 24)
    module(x)  # so that the module has filled its caches
    again = duplicate(module)
    assert torch.equal(again(x), module(x))
    assert {p.data_ptr() for p in again.parameters()}.isdisjoint(p.data_ptr() for p in module.parameters())
    assert list(dict(again.named_parameters())) == list(dict(module.named_parameters()))
    assert repr(again) == repr(module)


@pytest.mark.parametrize("name", ["CompacterAdapter: default", "CompacterAdapter: layer norms", "PHMLinear: default"])
def test_to_dtype_keeps_the_rule_shared(name: str) -> None:
    module = _make(name).to(BF16)
    assert {p.dtype for p in module.parameters()} == {BF16}
    if isinstance(module, ck.CompacterAdapter):
        assert module.down.phm_rule is module.up.phm_rule
    assert module(torch.randn(3, 24, dtype=BF16)).dtype == BF16
    assert module.double()(torch.randn(3, 24, dtype=torch.float64)).dtype == torch.float64


def _rule(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


COMMON: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"phm_rank": 0}, ValueError, "phm_rank must be an integer >= 1, got 0"),
    ({"phm_rank": 1.5}, ValueError, "phm_rank must be an integer >= 1, got 1.5"),
    ({"init": "glorot"}, ValueError, "init='glorot' is not known; choose one of paper, adapters"),
    ({"phm_c_init": "random"}, ValueError, "phm_c_init='random' is not known; choose one of normal, uniform"),
    ({"phm_init_range": -1.0}, ValueError, "phm_init_range must be a number >= 0, got -1.0"),
    ({"phm_init_range": float("nan")}, ValueError, "phm_init_range must be a number >= 0, got nan"),
    ({"phm_init_range": "small"}, ValueError, "phm_init_range must be a number >= 0, got 'small'"),
    ({"impl": "gpu"}, ValueError, "impl='gpu' is not known; choose one of auto"),
    ({"phm_rule": torch.zeros(4, 4, 4)}, TypeError, "phm_rule must be a torch.nn.Parameter.*got Tensor"),
    ({"phm_rule": _rule(3, 3, 3)}, ValueError, r"phm_rule must have shape \(4, 4, 4\), got \(3, 3, 3\)"),
    ({"phm_rule": _rule(4, 4, 4), "factorized_phm_rule": True}, ValueError, "phm_rule must be 2 tensor"),
    ({"phm_rule": (_rule(4, 4, 1), _rule(4, 1, 4))}, ValueError, "phm_rule must be 1 tensor"),
    ({"phm_rule": 3}, TypeError, "phm_rule must be .*got int"),
]
LINEAR: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((0, 12), {}, ValueError, "in_features must be an integer >= 1, got 0"),
    ((24, -4), {}, ValueError, "out_features must be an integer >= 1, got -4"),
    ((24.0, 12), {}, ValueError, "in_features must be an integer >= 1, got 24.0"),
    ((24, 12), {"phm_dim": 5}, ValueError, "phm_dim=5 does not divide in_features=24; choose one of 1, 2, 3, 4, 6, 12"),
    (
        (24, 12),
        {"phm_dim": 8},
        ValueError,
        "phm_dim=8 does not divide out_features=12; choose one of 1, 2, 3, 4, 6, 12",
    ),
    ((24, 12), {"phm_dim": 0}, ValueError, "phm_dim=0 does not divide in_features=24"),
    ((24, 12), {"phm_dim": "4"}, ValueError, "phm_dim='4' does not divide in_features=24"),
    *(((24, 12), options, kind, match) for options, kind, match in COMMON),
]
ADAPTER: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (
        (768,),
        {"phm_dim": 5},
        ValueError,
        "phm_dim=5 does not divide hidden_size=768; choose one of 1, 2, 3, 4, 6, 8, 12",
    ),
    ((24,), {"phm_dim": 8}, ValueError, "phm_dim=8 does not divide bottleneck=12; choose one of 1, 2, 3, 4, 6, 12"),
    ((0,), {}, ValueError, "hidden_size must be an integer >= 1, got 0"),
    (("24",), {}, ValueError, "hidden_size must be an integer >= 1, got '24'"),
    ((24,), {"reduction_factor": 0}, ValueError, "reduction_factor must be a number > 0, got 0"),
    ((24,), {"reduction_factor": "2"}, ValueError, "reduction_factor must be a number > 0, got '2'"),
    ((24,), {"reduction_factor": float("nan")}, ValueError, "reduction_factor must be a number > 0, got nan"),
    ((24,), {"reduction_factor": 25}, ValueError, "reduction_factor=25 leaves no bottleneck of hidden_size=24"),
    ((24,), {"activation": "gelu9"}, ValueError, "activation='gelu9' is not known"),
    ((24,), {"activation": 3}, TypeError, "activation must be a name or a callable, got int"),
    ((24,), {"scale": "learn"}, ValueError, "scale must be a finite number or 'learned', got 'learn'"),
    ((24,), {"scale": float("inf")}, ValueError, "scale must be a finite number or 'learned', got inf"),
    ((24,), {"scale": None}, ValueError, "scale must be a finite number or 'learned', got None"),
    ((24,), {"dropout": 1.0}, ValueError, r"dropout must be a probability in \[0, 1\), got 1.0"),
    ((24,), {"dropout": -0.1}, ValueError, r"dropout must be a probability in \[0, 1\), got -0.1"),
    ((24,), {"dropout": "0.1"}, ValueError, r"dropout must be a probability in \[0, 1\), got '?0.1"),
    *(((24,), options, kind, match) for options, kind, match in COMMON),
]
BOTTLENECK: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    *(entry for entry in ADAPTER if entry[1].keys() <= {"activation", "scale", "dropout"}),
    ((24,), {"impl": "gpu"}, ValueError, "impl='gpu' is not known; choose one of auto"),
    ((24,), {"init_weights": "xavier"}, ValueError, "init_weights='xavier' is not known; choose one of bert"),
]
ERRORS = [
    *((ck.PHMLinear, *entry) for entry in LINEAR),
    *((ck.CompacterAdapter, widths, {"reduction_factor": 2, **o}, kind, match) for widths, o, kind, match in ADAPTER),
    *((ck.BottleneckAdapter, w, {"reduction_factor": 2, **o}, kind, match) for w, o, kind, match in BOTTLENECK),
]


@pytest.mark.parametrize(
    ("module", "widths", "options", "kind", "match"), ERRORS, ids=[f"{e[0].__name__}: {e[-1][:50]}" for e in ERRORS]
)
def test_errors_at_construction(
    module: Any, widths: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        module(*widths, **options)


def test_errors_at_call_name_x() -> None:
    for module in (
        ck.PHMLinear(24, 12),
        *(kind(24, reduction_factor=2) for kind in (ck.CompacterAdapter, ck.BottleneckAdapter)),
    ):
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 24\).*got \(3, 23\)"):
            module(torch.randn(3, 23))
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
            module([1.0])


def test_parameters_that_are_plain_attributes_serve_too() -> None:
    """nn.DataParallel and the flat parameters of FSDP leave a module in this state."""
    adapter = ck.CompacterAdapter(24, reduction_factor=2, scale="learned")
    x = torch.randn(5, 24)
    expected = adapter(x)
    for module in adapter.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, parameter.detach())
    assert not list(adapter.parameters())
    assert torch.equal(adapter(x), expected)
