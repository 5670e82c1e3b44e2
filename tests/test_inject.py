"""`inject` on every family of models.

The base is frozen and unchanged, and every adapter is in use. Models with adapters are copied,
compiled and restored.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import CROSS_ATTENTION, FAMILIES, build, output
from torch import nn

import compacter_kernels as ck


def config(family: str, is_parallel: bool = False) -> ck.CompacterConfig:
    """Adapters after every block, with a rule that is large enough to change the output."""
    return ck.CompacterConfig(
        reduction_factor=4,
        phm_init_range=1.0,
        cross_adapter=family in CROSS_ATTENTION,
        is_parallel=is_parallel,
    )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("is_parallel", [False, True], ids=["sequential", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_every_adapter_and_leaves_the_base(family: str, is_parallel: bool) -> None:
    model = build(family)
    before = state(model)
    model.requires_grad_(False)  # torch may compute differently if it records a gradient
    plain = output(family, model)
    assert ck.inject(model, config(family, is_parallel)) is model

    trained = dict(ck.adapter_parameters(model))
    assert trained.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    assert (output(family, model) - plain).abs().max() > 1e-4
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)  # moves every parameter that has a gradient
    for _ in range(2):  # the biases of the down projections need a second step where the up projections start at 0
        optimizer.zero_grad()
        output(family, model).square().mean().backward()
        optimizer.step()
    unmoved = [name for name, p in trained.items() if p.grad is None or torch.equal(p, start[name])]
    assert [name for name in unmoved if "feature_" not in name and ".k_proj" not in name] == []

    assert_unchanged(model, before)
    with ck.disable_adapters(model):
        assert torch.equal(output(family, model), plain)
    assert not torch.equal(output(family, model), plain)
    ck.remove_adapters(model)
    assert model.state_dict().keys() == before.keys()
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(output(family, model), plain)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_are_apart(family: str) -> None:
    model = ck.inject(build(family), config(family))
    expected = output(family, model)
    others = [copy.deepcopy(model)]
    if family != "wav2vec2":  # its weight norm cannot be pickled
        others.append(pickle.loads(pickle.dumps(model)))
    for other in others:
        assert torch.equal(output(family, other), expected)
        for p in other.parameters():
            p.data.zero_()
        assert torch.equal(output(family, model), expected)
        assert not torch.equal(output(family, other), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "is_parallel", "one_layer"),
    [
        ("gpt2", False, {"n_layer": 1}),
        ("bart", False, {"encoder_layers": 1, "decoder_layers": 1}),
        *((family, False, {"num_hidden_layers": 1}) for family in ("llama", "vit", "wav2vec2")),
        ("bert", True, {"num_hidden_layers": 1}),
    ],
)
def test_compiles_without_a_graph_break(family: str, is_parallel: bool, one_layer: dict[str, int]) -> None:
    """One family for each kind of block. test_loops_compile.py has BERT and T5."""
    torch._dynamo.reset()
    model = ck.inject(build(family, **one_layer), config(family, is_parallel))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, expected = output(family, compiled), output(family, model)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    parameters = [p for _, p in ck.adapter_parameters(model)]
    for got, wanted in zip(
        torch.autograd.grad(y.square().mean(), parameters, allow_unused=True),
        torch.autograd.grad(expected.square().mean(), parameters, allow_unused=True),
        strict=True,
    ):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_adapter_follows_the_target_of_the_table(family: str) -> None:
    """The result is y + adapter(y), where y is the output of the block's last layer.

    Hooks of the test record both.
    """
    model = ck.inject(build(family), config(family))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    names = {m: name for name, m in model.named_modules() if isinstance(m, ck.CompacterAdapter)}
    for adapter in names:
        adapter.register_forward_hook(lambda module, args, y: seen.update({names[module]: (args[0], y)}))
    output(family, model)
    assert seen.keys() == set(names.values())
    for name, (x, y) in seen.items():
        adapter = model.get_submodule(name)
        expected = ck.compacter_adapter(
            x.double(), adapter.down.weights(), adapter.up.weights(), residual=x.double(), impl="dense"
        )
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "trained"), [("Compacter", 161_728), ("CompacterPlusPlus", 104_704)])
def test_t5_base_has_the_paper_s_counts(kind: str, trained: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Table 1 of arXiv 2106.04647: 0.073 % and 0.047 %."""
    with torch.device("meta"):
        model = build("t5", vocab_size=32100, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    ck.inject(model, getattr(ck, f"{kind}Config")())
    assert ck.count_parameters(model) == (trained, 222_882_048)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    ck.print_trainable_parameters(model)
    percent = {161_728: "0.073", 104_704: "0.047"}[trained]
    assert capsys.readouterr().out == f"{trained:,} trainable of 222,882,048 ({percent} %)\n"
