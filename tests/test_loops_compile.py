"""torch.compile of a whole model with adapters.

One graph serves every batch size and gives the gradients of the eager model.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_models import adamw, assert_only_adapters_trained, batch, gradients, make, values

pytestmark = pytest.mark.slow
ONE_LAYER = {"bert": {"num_hidden_layers": 1}, "t5": {"num_layers": 1}}  # of each kind, since compilation takes long


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_one_graph_for_all_batch_sizes(kind: str) -> None:
    """fullgraph=True raises an error at a graph break.

    error_on_recompile raises one at a second compilation.
    """
    model, base = make(kind, **ONE_LAYER[kind])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    start = values(model)
    optimizer = adamw(model)
    for turn, size in enumerate((4, 2, 9, 3)):
        inputs = batch(kind, size, seed=turn)
        expected = gradients(model, inputs)
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            got = gradients(model, inputs, run=compiled)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
            if name != "loss":
                model.get_parameter(name).grad = value
        optimizer.step()
        optimizer.zero_grad()
    assert_only_adapters_trained(model, base, start)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch itself uses it
def test_inductor() -> None:
    """The default compiler, without and with gradients."""
    model, _ = make("bert", **ONE_LAYER["bert"])
    inputs = batch("bert")
    expected = gradients(model, inputs)
    got = gradients(model, inputs, run=torch.compile(model, fullgraph=True))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(**inputs).logits, model(**inputs).logits)
