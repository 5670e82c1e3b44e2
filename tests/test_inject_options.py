"""The options of `inject`: names, sharing, layers, dtypes, other trained modules, errors."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from families import WIDTH, build, inputs, output
from torch import nn

import compacter_kernels as ck
from compacter_kernels.inject.trained_copies import TrainedCopies

SMALL = {"reduction_factor": 4, "phm_init_range": 1.0}


def adapters(model: nn.Module) -> dict[str, ck.CompacterAdapter]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ck.CompacterAdapter)}


OPTIONS: dict[str, dict[str, Any]] = {
    "rank 2": {"phm_rank": 2},
    "n=2": {"phm_dim": 2},
    "factorised rule": {"factorized_phm_rule": True},
    "own rules": {"shared_phm_rule": False},
    "shared W": {"shared_W_phm": True},
    "unfactorised W": {"factorized_phm_W": False},
    "unfactorised shared W": {"factorized_phm_W": False, "shared_W_phm": True},
    "fixed rule": {"learn_phm": False},
    "no bias": {"phm_bias": False},
    "no bias, all shared": {"phm_bias": False, "shared_W_phm": True, "train_layer_norms": False},
    "learned scaling": {"scaling": "learned"},
    "norms": {"ln_before": True, "ln_after": True},
    "relu and a number": {"non_linearity": "relu", "scaling": 0.5},
    "as adapters draws them": {"init": "adapters", "phm_c_init": "uniform"},
}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains(name: str, parallel: bool) -> None:
    model = ck.inject(build("t5"), ck.CompacterConfig(**SMALL, **OPTIONS[name], is_parallel=parallel))
    trained = dict(ck.adapter_parameters(model))
    output("t5", model).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in trained.values())
    fixed = {name.rpartition(".")[2] for name, p in trained.items() if not p.requires_grad}
    assert fixed == ({"phm_rule"} if name == "fixed rule" else set())
    assert len({id(p) for p in trained.values()}) == len(trained), "a parameter is held twice"


def test_a_shared_weight_is_held_once() -> None:
    model = ck.inject(build("bert"), ck.CompacterConfig(**SMALL, shared_W_phm=True))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "compacter" in name]
    assert sum(name.endswith("phm_rule") for name in names) == 1
    assert sum("W_" in name for name in names) == 4
    assert all(not dict(a.down.named_parameters()).keys() - {"b"} for a in adapters(model).values())


def test_a_layer_of_its_own_and_layers_left_out() -> None:
    config = ck.CompacterConfig(
        reduction_factor={1: 2, "3": 8, "default": 4}, leave_out=[0], phm_dim=2, train_layer_norms=False
    )
    model = ck.inject(build("t5"), config)
    sizes = {
        name.split(".SelfAttention")[0].split(".DenseRelu")[0]: a.bottleneck for name, a in adapters(model).items()
    }
    assert sizes == {
        "encoder.block.1.layer.0": 16,
        "encoder.block.1.layer.1": 16,
        "decoder.block.0.layer.0": 8,
        "decoder.block.0.layer.2": 8,
        "decoder.block.1.layer.0": 4,
        "decoder.block.1.layer.2": 4,
    }


def test_several_adapters_by_name() -> None:
    model = build("bert")
    ck.inject(model, ck.CompacterConfig(**SMALL), name="first")
    first = output("bert", model)
    ck.inject(model, ck.CompacterPlusPlusConfig(**SMALL, is_parallel=True), name="second")
    second = output("bert", model)
    assert not torch.allclose(first, second, atol=1e-4)
    assert all(".second." in name for name, p in model.named_parameters() if p.requires_grad)
    assert all(".second." in name for name, _ in ck.adapter_parameters(model))
    ck.set_adapter(model, "first")
    assert torch.equal(output("bert", model), first)
    assert all(".first." in name for name, p in model.named_parameters() if p.requires_grad)
    ck.remove_adapters(model, "first")
    assert torch.equal(output("bert", model), second)
    with pytest.raises(ValueError, match="no adapters of the name 'first'; it has second"):
        ck.set_adapter(model, "first")
    ck.remove_adapters(model)
    with pytest.raises(ValueError, match="has no Compacter adapters"):
        ck.remove_adapters(model)


def test_disabling_nests_and_survives_an_error() -> None:
    model = build("bert").requires_grad_(False)
    plain = output("bert", model)
    ck.inject(model, ck.CompacterConfig(**SMALL))
    adapted = output("bert", model)
    with contextlib.suppress(KeyError), ck.disable_adapters(model), ck.disable_adapters(model):
        assert torch.equal(output("bert", model), plain)
        raise KeyError
    assert torch.equal(output("bert", model), adapted)


def three_adapters() -> nn.Module:
    model = build("bert")
    for name in ("first", "second", "third"):
        ck.inject(model, ck.CompacterConfig(**SMALL), name=name)
    return model


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_removing_one_leaves_the_others_in_training() -> None:
    model = three_adapters()
    ck.set_adapter(model, ["first", "second"])
    before = trains(model)
    ck.remove_adapters(model, "third")
    assert trains(model) == before


@pytest.mark.parametrize(("removed", "active"), [("first", "second"), ("third", "first")])
def test_removing_while_disabled(removed: str, active: str) -> None:
    plain, model = output("bert", build("bert")), three_adapters()
    ck.set_adapter(model, "first")
    with ck.disable_adapters(model):
        ck.remove_adapters(model, removed)
        assert torch.equal(output("bert", model), plain)
    assert not torch.equal(output("bert", model), plain)
    assert trains(model) == {name for name in trains(model) if f".{active}." in name} != set()
    ck.remove_adapters(model)
    with pytest.raises(ValueError, match="has no Compacter adapters"):
        ck.set_adapter(model, active)


def test_activating_while_disabled() -> None:
    model = three_adapters()
    ck.set_adapter(model, "second")
    second = output("bert", model)
    ck.set_adapter(model, "first")
    with ck.disable_adapters(model):
        ck.set_adapter(model, "second")
    assert torch.equal(output("bert", model), second)
    assert all(".second." in name for name in trains(model))


def test_modules_that_came_after_inject_go_on_training() -> None:
    model = ck.inject(build("bert"), ck.CompacterConfig(**SMALL))
    model.projector = nn.Linear(WIDTH, WIDTH)
    model.projector.bias.requires_grad_(False)
    ck.remove_adapters(model)
    assert model.projector.weight.requires_grad and not model.projector.bias.requires_grad


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_adapters_follow_the_base_s_dtype(base: torch.dtype, dtype: str | None) -> None:
    model = ck.inject(build("llama").to(base), ck.CompacterConfig(**SMALL, dtype=dtype))
    expected = base if dtype is None else torch.float32
    assert {p.dtype for a in adapters(model).values() for p in a.parameters()} == {expected}
    y = output("llama", model)
    assert y.dtype == base and y.isfinite().all()
    y.float().square().mean().backward()
    assert all(p.grad is not None for _, p in ck.adapter_parameters(model))


def test_adapters_follow_a_quantised_layer() -> None:
    class Linear4bit(nn.Module):
        """A layer like the quantised layers of bitsandbytes.

        It has packed integers, and a dtype to compute in.
        """

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features, self.compute_dtype = (
                linear.in_features,
                linear.out_features,
                torch.bfloat16,
            )
            self.weight = nn.Parameter(linear.weight.detach().mul(100).to(torch.int8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype) / 100)

    model = build("llama").to(torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.o_proj = Linear4bit(layer.self_attn.o_proj)
        layer.mlp.down_proj = Linear4bit(layer.mlp.down_proj)
    ck.inject(model, ck.CompacterConfig(**SMALL))
    assert {p.dtype for a in adapters(model).values() for p in a.parameters()} == {torch.bfloat16}
    output("llama", model).float().square().mean().backward()
    assert all(p.grad is not None for _, p in ck.adapter_parameters(model))


def test_heads_train_in_copies() -> None:
    model = build("bert")
    head = model.classifier.weight.detach().clone()
    ck.inject(model, ck.CompacterConfig(**SMALL))
    assert {name for name, _ in ck.adapter_parameters(model) if name.startswith("classifier")} == {
        "classifier.compacter.default.weight",
        "classifier.compacter.default.bias",
    }
    assert torch.equal(model.classifier.weight, head) and not model.classifier.weight.requires_grad
    ck.remove_adapters(model)
    ck.inject(model, ck.CompacterConfig(**SMALL, modules_to_save=[]))
    assert not any(name.startswith("classifier") for name, _ in ck.adapter_parameters(model))
    ck.remove_adapters(model)
    ck.inject(model, ck.CompacterConfig(**SMALL, modules_to_save=["pooler.dense"]))
    assert any(name.startswith("bert.pooler.dense.compacter") for name, _ in ck.adapter_parameters(model))


class Strange(nn.Module):
    """A model that is not in the table of targets."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"norm": nn.LayerNorm(WIDTH), **{name: nn.Linear(WIDTH, WIDTH) for name in ("mix", "out_proj")}}
            )
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["out_proj"](block["mix"](block["norm"](x)))
        return x


@pytest.mark.parametrize("parallel", [False, True])
def test_any_model_by_target_modules(parallel: bool) -> None:
    model = ck.inject(Strange(), ck.CompacterConfig(**SMALL, target_modules=["out_proj"], is_parallel=parallel))
    assert list(adapters(model)) == [f"blocks.{i}.out_proj.compacter.default" for i in range(2)]
    model(torch.randn(3, WIDTH)).sum().backward()
    assert all(p.grad is not None for _, p in ck.adapter_parameters(model))


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown model": (Strange, {}, r"not in the table \(t5.*likely ones: \['out_proj', 'mix'\]"),
    "unknown target": (Strange, {"target_modules": ["attn"]}, r"no module's name ends with attn.*likely ones"),
    "phm_dim": (
        lambda: build("t5"),
        {"phm_dim": 5},
        r"encoder.*phm_dim=5 does not divide hidden_size=32; choose one of",
    ),
    "no such layer": (lambda: build("bert"), {"reduction_factor": {"0": 4}}, r"has none for layer 1; add"),
    "no cross-attention": (
        lambda: build("llama"),
        {"mh_adapter": False, "output_adapter": False, "cross_adapter": True},
        "has no block of the kind",
    ),
    "unknown head": (lambda: build("bert"), {"modules_to_save": ["scorer"]}, "modules_to_save: no module's name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_change_nothing(name: str) -> None:
    make, options, message = REFUSED[name]
    model = make()
    before = {key: (p.requires_grad, id(p)) for key, p in model.named_parameters()}
    modules = [key for key, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        ck.inject(model, ck.CompacterConfig(**{"reduction_factor": 4, **options}))
    assert before == {key: (p.requires_grad, id(p)) for key, p in model.named_parameters()}
    assert modules == [key for key, _ in model.named_modules()]
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["default", "a.b", "", "keys", 3])
def test_names_that_cannot_be(name: Any) -> None:
    model = ck.inject(build("bert"), ck.CompacterConfig(**SMALL))
    with pytest.raises(ValueError, match="name"):
        ck.inject(model, ck.CompacterConfig(**SMALL), name=name)


def test_an_error_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory ends, or a layer norm is of a class that takes no subclass."""

    class Final(nn.LayerNorm):
        def __init_subclass__(cls) -> None:
            raise TypeError("it takes no subclass")

    def state(model: nn.Module) -> Any:
        return list(model.state_dict()), trains(model), [type(part) for part in model.modules()]

    final = build("bert")
    final.bert.encoder.layer[1].output.LayerNorm = Final(WIDTH)
    before = state(final)
    with pytest.raises(TypeError, match="it takes no subclass"):
        ck.inject(final, ck.CompacterConfig(**SMALL))
    assert state(final) == before
    model = three_adapters()
    ck.set_adapter(model, ["first", "second"])
    before, expected = state(model), output("bert", model)
    monkeypatch.setattr(TrainedCopies, "add_copy", Mock(side_effect=[None, MemoryError]))
    with pytest.raises(MemoryError):
        ck.inject(model, ck.CompacterConfig(**SMALL), name="fourth")
    assert state(model) == before and torch.equal(output("bert", model), expected)


def test_only_a_config_is_a_config() -> None:
    with pytest.raises(TypeError, match="must be a CompacterConfig, got dict"):
        ck.inject(build("bert"), {"reduction_factor": 4})  # type: ignore[arg-type]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduction_factor": 0}, ValueError, "reduction_factor must be a number > 0"),
    ({"reduction_factor": {}}, ValueError, "reduction_factor must be"),
    ({"reduction_factor": {"first": 2}}, ValueError, 'keys like "0" and "default"'),
    ({"reduction_factor": {"0": 2}, "shared_W_phm": True}, ValueError, "shared_W_phm needs one"),
    ({"phm_dim": 0}, ValueError, "phm_dim"),
    ({"phm_rank": True}, ValueError, "phm_rank"),
    ({"non_linearity": "gelu2"}, ValueError, "choose one of"),
    ({"non_linearity": torch.relu}, TypeError, "must be a name"),
    ({"init": "x"}, ValueError, "init='x'"),
    ({"scaling": "channel"}, ValueError, "scaling must be"),
    ({"dropout": 1.0}, ValueError, "dropout must be"),
    ({"dtype": "int8"}, ValueError, "dtype='int8' is not known"),
    ({"leave_out": 3}, TypeError, "leave_out must be a list"),
    ({"leave_out": [-1]}, ValueError, "leave_out must be numbers"),
    ({"target_modules": "o_proj"}, TypeError, "target_modules must be a list"),
    ({"target_modules": []}, ValueError, "target_modules is empty"),
    ({"modules_to_save": [1]}, TypeError, "modules_to_save must be names"),
    ({"learn_phm": "no"}, TypeError, "learn_phm must be True or False"),
    ({"mh_adapter": False, "output_adapter": False}, ValueError, "no adapter is asked for"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_config_checks_itself(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ck.CompacterConfig(**options)


def test_a_config_goes_through_json_and_back() -> None:
    import json

    config = ck.CompacterPlusPlusConfig(reduction_factor={0: 8, "default": 16}, leave_out=(1,), scaling="learned")
    again = ck.CompacterConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="not an option of CompacterConfig: rank"):
        ck.CompacterConfig.from_dict({"rank": 1})


def test_the_input_gets_a_gradient_under_reentrant_checkpointing() -> None:
    """Otherwise the adapters of the first layer would not train, without an error."""
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = ck.inject(build("gpt2"), ck.CompacterConfig(**SMALL, train_layer_norms=False)).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model(**inputs("gpt2"), use_cache=False)[0].square().mean().backward()
        grads.append([p.grad for _, p in ck.adapter_parameters(model)])
    for without, with_it in zip(*grads, strict=True):
        torch.testing.assert_close(with_it, without)


def test_copies_by_data_parallel_are_refused() -> None:
    """A replica shares the hooks of its original, and therefore also its adapters."""
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    ck.inject(layer, ck.CompacterConfig(**SMALL, target_modules=["0"]))
    replica = layer[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = layer[0].weight, layer[0].bias
    with pytest.raises(RuntimeError, match="torchrun"):
        replica(torch.randn(2, WIDTH))
