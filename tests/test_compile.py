"""torch.compile and torch.export see one graph for every token count, and this graph runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from oracle import BF16, FUSED, Case, assert_same_bits, run
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.fx import GraphModule

import compacter_kernels as ck

pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # in Python 3.13.0


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """aot_eager that counts the calls of its compiled graphs, and records their operators."""

    def __init__(self) -> None:
        self.calls = 0
        self.targets = ""

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled = lookup_backend("aot_eager")(graph, inputs)
        self.targets += " ".join(str(node.target) for node in graph.graph.nodes)

        def run(*args: Any) -> Any:
            self.calls += 1
            return compiled(*args)

        return run


def _compiled(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Backend]:
    backend = Backend()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend), backend


def _no_recompile(count: int) -> AbstractContextManager[object]:
    """The first call may compile. A compilation in a later call raises an error."""
    return torch._dynamo.config.patch(error_on_recompile=True) if count else nullcontext()


CASES = [
    Case("linear", residual="none"),
    Case(residual="x"),
    Case(residual="both"),
    Case(residual="other", dtype=BF16, bias=False, scale=0.5, activation="relu"),
]
FUNCTIONS = [*((case, impl) for case in CASES for impl in FUSED), (CASES[0], "factored")]


@pytest.mark.parametrize(("case", "impl"), FUNCTIONS, ids=str)
def test_function(case: Case, impl: str) -> None:
    """One graph serves all token counts, forward and backward, with the results of eager mode."""
    compiled, backend = _compiled(lambda tensors: case.call(tensors, impl))
    for count, tokens in enumerate((5, 8, 33)):
        sized = Case(**{**vars(case), "shape": (tokens,)})
        tensors = {name: t if name in ("x", "residual") else nn.Parameter(t) for name, t in sized.tensors().items()}
        with _no_recompile(count):
            out = compiled(tensors)
            grads = torch.autograd.grad(out, list(tensors.values()), sized.grad_output())
        expected = run(sized, tensors, impl)
        got = {"out": out.detach(), **dict(zip(tensors, grads, strict=True))}
        if impl == "factored":
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        else:
            assert_same_bits(got, expected)
            assert "compacter_kernels." in backend.targets
        assert backend.calls == count + 1


OPTIONS = {"scale": "learned", "ln_before": True, "learn_phm": False, "factorized_phm_rule": True}
MODULES = {
    "adapter": lambda: ck.CompacterAdapter(24, reduction_factor=2),
    "adapter through factored": lambda: ck.CompacterAdapter(24, reduction_factor=2, impl="factored"),
    "adapter with options": lambda: ck.CompacterAdapter(24, reduction_factor=2, **OPTIONS),
    "layers": lambda: nn.Sequential(ck.PHMLinear(24, 12), nn.Tanh(), ck.PHMLinear(12, 24)),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str) -> None:
    module = MODULES[name]()
    compiled, backend = _compiled(module)
    for count, shape in enumerate(((2, 5), (3, 9), (4, 6))):
        x = torch.randn(*shape, 24)
        gradients = []
        for function in (module, compiled):
            module.zero_grad()
            with _no_recompile(count if function is compiled else 0):
                function(x).square().sum().backward()
            gradients.append([p.grad for p in module.parameters() if p.grad is not None])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        assert backend.calls == count + 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")  # of torch 2.6
@pytest.mark.parametrize("impl", FUSED)
def test_inductor(impl: str) -> None:
    """The default backend gives the bits of eager mode.

    Other token counts need no recompilation.
    """
    case = Case(shape=(6,), residual="other")
    compiled = torch.compile(lambda tensors: case.call(tensors, impl), fullgraph=True, dynamic=True)
    for count, tokens in enumerate((7, 5, 40)):
        sized = Case(**{**vars(case), "shape": (tokens,)})
        tensors = sized.tensors()
        with _no_recompile(count):
            out = compiled(tensors)
            grads = torch.autograd.grad(out, list(tensors.values()), sized.grad_output())
        got = {"out": out.detach(), **dict(zip(tensors, grads, strict=True))}
        assert_same_bits(got, run(sized, tensors, impl))


@pytest.mark.parametrize("impl", FUSED)
def test_compiled_second_derivative_raises(impl: str) -> None:
    tensors = CASES[1].tensors()
    compiled, _ = _compiled(lambda tensors: CASES[1].call(tensors, impl))
    grads = torch.autograd.grad(compiled(tensors).square().sum(), list(tensors.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grads[1].sum().backward()


def test_bad_arguments_raise_under_compile() -> None:
    compiled, _ = _compiled(lambda x, tensors: Case().call({**tensors, "x": x}))
    with pytest.raises(Exception, match=r"x must have shape \(\.\.\., 24\)"):
        compiled(torch.randn(3, 25), Case().tensors())


@pytest.mark.parametrize("impl", ["auto", "factored"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict: bool, impl: str) -> None:
    module = ck.CompacterAdapter(24, reduction_factor=2, impl=impl).requires_grad_(False)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = {"x": {0: tokens}}
    exported = torch.export.export(module, (torch.randn(5, 24),), dynamic_shapes=shapes, strict=strict)
    x = torch.randn(17, 24)
    torch.testing.assert_close(exported.module()(x), module(x))


def test_first_call_may_be_a_compiled_one() -> None:
    """There is no plan and no log line yet, and no module has been called."""
    from compacter_kernels import call_path, dispatch

    call_path._plans.clear()
    dispatch._announced.clear()
    compiled, backend = _compiled(ck.CompacterAdapter(24, reduction_factor=2))
    compiled(torch.randn(5, 24)).sum().backward()
    assert backend.calls == 1
