"""Hooks on a projection of an adapter, and changes of its weights, take effect.

The fused kernel does not bypass them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import build, inputs
from oracle import BF16
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

import compacter_kernels as ck
from compacter_kernels.private import runs

LISTENERS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda part: part.register_forward_hook(lambda m, i, out: 2 * out),
    "forward hook with keywords": lambda part: part.register_forward_hook(lambda m, i, k, o: -o, with_kwargs=True),
    "forward pre-hook": lambda part: part.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "backward hook": lambda part: part.register_full_backward_hook(lambda m, given, out: (3 * given[0],)),
    "backward pre-hook": lambda part: part.register_full_backward_pre_hook(lambda m, out: (3 * out[0],)),
    "pruning": lambda part: prune.l1_unstructured(part, "W_left", amount=0.5),
    "pruning of the bias": lambda part: prune.random_unstructured(part, "b", amount=0.5),
    "the old spectral norm": lambda part: spectral_norm(part, "W_right"),
    "spectral norm": lambda part: parametrizations.spectral_norm(part, "W_right"),
    "weight norm": lambda part: parametrizations.weight_norm(part, "W_left"),
    "a forward of its own": lambda part: setattr(part, "forward", lambda x: type(part).forward(part, x).abs()),
}


def adapter(**options: Any) -> ck.CompacterAdapter:
    made = ck.CompacterAdapter(24, reduction_factor=2, **options)
    for p in made.parameters():
        nn.init.normal_(p, 0.0, 0.5)
    return made


def _seeded(listener: str, position: str) -> ck.CompacterAdapter:
    torch.manual_seed(0)
    made = adapter(scale=0.5)
    LISTENERS[listener](getattr(made, position))
    return made


def by_parts(adapter: ck.CompacterAdapter, x: Tensor) -> Tensor:
    return adapter.up(nn.functional.gelu(adapter.down(x), approximate="tanh")) * 0.5 + x


def results(module: nn.Module, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Outputs and gradients before and after a step of an optimizer.

    The step makes values stale that a hook has to compute again.
    """
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    found = []
    for seed in (1, 2):
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        optimizer.zero_grad()
        y = function(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]
        optimizer.step()
    return found


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("position", ["down", "up"])
@pytest.mark.parametrize("listener", LISTENERS)
def test_listeners(listener: str, position: str) -> None:
    module, twin = (_seeded(listener, position) for _ in range(2))
    torch.manual_seed(0)
    plain = adapter(scale=0.5)(torch.ones(2, 24))
    expected = results(twin, lambda x: by_parts(twin, x))
    torch.testing.assert_close(results(module, module), expected, rtol=1e-4, atol=1e-4)
    if "backward" not in listener:
        assert not torch.allclose(module(torch.ones(2, 24)), plain, rtol=1e-2)


@contextmanager
def everywhere(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def test_hooks_on_all_modules() -> None:
    """The hooks of torch.nn.modules.module, which profilers and operation counters use."""
    module, x = adapter(), torch.randn(3, 24)
    called: list[nn.Module] = []
    for register in (global_hooks.register_module_forward_hook, global_hooks.register_module_forward_pre_hook):
        called.clear()
        with everywhere(register, lambda m, *_: called.append(m)):
            module(x)
        assert {module, module.down, module.up} <= set(called)
    called.clear()
    module(x)
    assert not called


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 1


@pytest.mark.parametrize("name", ["W_left", "b", "phm_rule"])
def test_parametrizations(name: str) -> None:
    """There is no hook: the weight becomes a property of the layer's class."""
    module, x = adapter(), torch.randn(3, 24)
    other = copy.deepcopy(module)
    parametrize.register_parametrization(module.down, name, Noisy())
    setattr(other.down, name, nn.Parameter(getattr(other.down, name).detach() + 1))
    torch.testing.assert_close(module(x), other(x))
    if name != "phm_rule":  # `up` shares it, so that removal would change `up` as well
        parametrize.remove_parametrizations(module.down, name)
        torch.testing.assert_close(module(x), other(x))


def test_pruning_that_is_made_permanent() -> None:
    module, x = adapter(), torch.randn(3, 24)
    prune.l1_unstructured(module.up, "W_right", amount=0.5)
    expected = module(x)
    prune.remove(module.up, "W_right")
    assert (module.up.W_right == 0).sum() == module.up.W_right.numel() // 2
    torch.testing.assert_close(module(x), expected)


def test_a_projection_that_was_replaced() -> None:
    """It is replaced by a plain module around it, or by a layer of a subclass."""

    class Louder(ck.PHMLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module, x = adapter(), torch.randn(3, 24)
    replaced = copy.deepcopy(module)
    replaced.down = nn.Sequential(module.down)
    torch.testing.assert_close(replaced(x), module(x))
    assert "Sequential" in repr(replaced)
    replaced.down = Louder(24, 12)
    replaced.down.load_state_dict(module.down.state_dict())
    h = nn.functional.gelu(2 * module.down(x), approximate="tanh")
    torch.testing.assert_close(replaced(x), module.up(h) + x)


@pytest.mark.parametrize(
    "options",
    [{"scale": "learned"}, {"ln_before": True, "ln_after": True}, {"ln_after": True, "residual_before_ln": False}],
    ids=str,
)
def test_options_are_as_without_hooks(options: dict[str, Any]) -> None:
    module = adapter(**options).to(BF16)
    x = torch.randn(4, 24, dtype=BF16)
    expected = module(x)
    module.down.register_forward_hook(lambda *_: None)
    y = module(x)
    assert y.dtype == BF16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_hooks_in_a_whole_model() -> None:
    model = ck.inject(build("bert"), ck.CompacterConfig(reduction_factor=4))
    part = model.bert.encoder.layer[0].output.dense.compacter["default"].up
    seen: list[Tensor] = []
    part.register_forward_hook(lambda m, i, out: seen.append(out))
    model(**inputs("bert"))
    assert len(seen) == 1 and seen[0].shape[-1] == 32


def test_accelerate_hooks() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    module, x = adapter(), torch.randn(3, 24)
    before = module(x)
    hooks.add_hook_to_module(module.up, Doubling())
    torch.testing.assert_close(module(x), 2 * (before - x) + x)
    assert not runs(ck.PHMLinear.forward, module.up)
    hooks.remove_hook_from_module(module.up)
    assert runs(ck.PHMLinear.forward, module.up)
    assert torch.equal(module(x), before)
