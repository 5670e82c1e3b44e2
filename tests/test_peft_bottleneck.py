"""BottleneckConfig of `compacter_kernels.peft` computes what the library `adapters` computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs, output
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.checkpoints.names import names_in_base
from compacter_kernels.nn.bottleneck import BottleneckAdapter

adapters = pytest.importorskip("adapters")
peft = pytest.importorskip("peft")
ckp = pytest.importorskip("compacter_kernels.peft")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

DROPOUT = {  # the options of dropout in the config of a family
    "bert": "hidden_dropout_prob attention_probs_dropout_prob",
    "roberta": "hidden_dropout_prob attention_probs_dropout_prob",
    "distilbert": "dropout attention_dropout",
    "t5": "dropout_rate",
    "bart": "dropout",
    "mbart": "dropout",
    "gpt2": "resid_pdrop embd_pdrop attn_pdrop",
    "llama": "",
    "mistral": "",
    "vit": "",
    "whisper": "dropout",
}
CROSS = ("t5", "bart", "mbart", "whisper")
CONFIGS: dict[str, Any] = {
    "seq_bn": adapters.SeqBnConfig(reduction_factor=4),
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": adapters.ParBnConfig(reduction_factor=4),
    "scaled, parallel, norms": adapters.ParBnConfig(scaling="learned", mh_adapter=True, ln_before=True, ln_after=True),
    "norms, residual before": adapters.SeqBnConfig(
        reduction_factor={"0": 2, "default": 8}, ln_before=True, ln_after=True, adapter_residual_before_ln=True
    ),
    "residual of the norm": adapters.SeqBnConfig(residual_before_ln=False, mh_adapter=True, ln_after=True),
    "a layer less, scaled": adapters.DoubleSeqBnConfig(leave_out=[0], scaling=0.5, non_linearity="gelu_new"),
    "compacter++": adapters.CompacterPlusPlusConfig(reduction_factor=4, mh_adapter=True),
}


@pytest.fixture(autouse=True)
def nondeterministic_operators() -> None:
    """Allow operators of the other library that would warn."""
    torch.use_deterministic_algorithms(False)


def base_of(family: str) -> nn.Module:
    return build(family, **dict.fromkeys(DROPOUT[family].split(), 0.0))


def theirs(family: str, config: Any) -> nn.Module:
    """A model of `adapters` with random adapters, which trains them."""
    model = base_of(family)
    adapters.init(model)
    model.add_adapter("task", config=config)
    model.train_adapter("task")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".adapters.task." in name or "phm_rule" in name:
            nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


def close(actual: Tensor, expected: Tensor, limit: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= limit * expected.abs().max()


def output_in(dtype: torch.dtype, family: str, model: nn.Module) -> Tensor:
    """The output of a model that is cast to this dtype."""
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(family).items()}
    result: Tensor = model.to(dtype)(**batch)[0]
    return result


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", DROPOUT)
def test_outputs_and_gradients_are_those_of_adapters(family: str, method: str, tmp_path: Path) -> None:
    config = CONFIGS[method].replace(cross_adapter=family in CROSS)
    model = theirs(family, config)
    ck.convert(model, "peft", tmp_path)
    ours = peft.PeftModel.from_pretrained(base_of(family), tmp_path, is_trainable=True).eval()
    plain = output(family, base_of(family))
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        expected, actual = (output_in(dtype, family, each.eval()) for each in (model, ours))
        assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
        close(actual, expected, limit)
        expected, actual = (output_in(dtype, family, each.train()) for each in (model, ours))
        close(actual, expected, limit)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    for result in (expected, actual):
        (result * weights).sum().backward()
    for name, parameter in model.named_parameters():  # Gradients get our names as values do.
        if ".adapters.task." in name or "phm_rule" in name:
            parameter.data.copy_(parameter.grad)
    gradients = names_in_base(ck.convert(model, "peft").tensors)
    parameters = ((name.removesuffix(".default"), p.grad) for name, p in ours.named_parameters())
    trained = names_in_base({name: grad for name, grad in parameters if "adapter_" in name or "compacter_" in name})
    assert len(trained) == sum("adapter_" in key or "compacter_" in key for key in gradients)
    for name, gradient in trained.items():
        close(gradient, gradients[name], 1e-10)


def adapted(family: str, **options: Any) -> nn.Module:
    """A model with adapters by peft and random weights."""
    model = peft.get_peft_model(base_of(family), ckp.BottleneckConfig(reduction_factor=4, **options))
    return random_values(model)


def random_values(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model.eval()


PFEIFFER = {"mh_adapter": False, "original_ln_before": True, "non_linearity": "relu"}
PARALLEL = {"is_parallel": True, "scaling": 4.0}


@pytest.mark.parametrize("options", [{}, PFEIFFER, PARALLEL], ids=["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_save_load_and_several_adapters(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(family, **options)
    first = output(family, model)
    model.add_adapter("second", ckp.BottleneckConfig(reduction_factor=8, scaling=0.5))
    model.set_adapter("second")
    second = output(family, random_values(model, 2))
    model.save_pretrained(tmp_path)
    assert (first - second).abs().max() > 1e-3
    plain = output(family, base_of(family))
    with model.disable_adapter():
        assert torch.equal(output(family, model.train(False)), plain)

    again = peft.PeftModel.from_pretrained(base_of(family), tmp_path).eval()
    assert torch.equal(output(family, again), first)
    again.load_adapter(tmp_path / "second", "second")
    again.set_adapter("second")
    assert torch.equal(output(family, again), second)
    if family != "t5":
        mixed = again(**inputs(family), adapter_names=["default", "__base__"])[0]
        close(mixed[:1], first[:1])
        close(mixed[1:], plain[1:])
    again.delete_adapter("default")
    assert torch.equal(output(family, again), second)
    assert torch.equal(output(family, again.unload()), plain)


def test_active_adapters_add_up() -> None:
    """Both take the same input, and what they add to the output is summed."""
    layer = nn.Sequential(nn.Linear(8, 8))
    options = {"target_modules": ["0"], "reduction_factor": 2, "ln_after": True, "adapter_residual_before_ln": True}
    model = peft.get_peft_model(layer, ckp.BottleneckConfig(**options))
    model.add_adapter("second", ckp.BottleneckConfig(**options))
    model.base_model.set_adapter(["default", "second"])
    random_values(model)
    x = torch.randn(3, 8)
    both, single = model(x), []
    for name in ("default", "second"):
        model.base_model.set_adapter([name])
        single.append(model(x))
    with model.disable_adapter():
        base = model(x)
    close(both, single[0] + single[1] - base)


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_trained_layer_norms_and_a_copy_of_the_model(family: str, tmp_path: Path) -> None:
    """peft copies a layer norm with its hooks, and then calls the copy instead."""
    model = adapted(family, train_layer_norms=True, original_ln_before=True)
    expected = output(family, model)
    assert torch.equal(output(family, copy.deepcopy(model)), expected)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base_of(family), tmp_path).eval()
    assert torch.equal(output(family, again), expected)
    with again.disable_adapter():
        assert torch.equal(output(family, again), output(family, base_of(family)))
    assert any("norm" in name.lower() or "ln_" in name for name, _ in again.named_parameters() if "modules_to" in name)


@pytest.mark.parametrize("init_weights", ["bert", "mam_adapter", "houlsby"])
def test_initial_weights_are_drawn_as_in_adapters(init_weights: str) -> None:
    ours = BottleneckAdapter(400, reduction_factor=2, init_weights=init_weights)
    model = build("bert", hidden_size=400)
    adapters.init(model)
    model.add_adapter("task", config=adapters.SeqBnConfig(reduction_factor=2, init_weights=init_weights))
    adapter = model.bert.encoder.layer[0].output.adapters["task"]
    for linear, other in ((ours.down, adapter.adapter_down[0]), (ours.up, adapter.adapter_up)):
        assert linear.weight.shape == other.weight.shape
        assert abs(linear.weight.std() - other.weight.std()) <= 0.02 * other.weight.std()
        assert abs(linear.weight.abs().max() - other.weight.abs().max()) <= 0.2 * other.weight.abs().max()
        assert torch.equal(linear.bias, other.bias)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "original_ln_after": ({"original_ln_after": False}, "original_ln_after=False"),
    "init_weights": ({"init_weights": "xavier"}, "init_weights='xavier' is not known; choose one of .*bert"),
    "two inputs": ({"original_ln_before": True, "is_parallel": True}, "original_ln_before=True is for adapters that"),
    "activation": ({"non_linearity": "nothing"}, "'nothing' is not known"),
    "phm_layer": ({"phm_layer": True}, "phm_layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        ckp.BottleneckConfig(**options)


def test_the_residual_must_be_known() -> None:
    for family, options in (("bert", {"target_modules": ["output.dense"]}), ("wav2vec2", {})):
        model = build(family)
        before = str(model)
        with pytest.raises(ValueError, match="original_ln_before=True needs the residual of the block"):
            peft.get_peft_model(model, ckp.BottleneckConfig(original_ln_before=True, **options))
        with pytest.raises(ValueError, match="original_ln_before=True needs the residual of the block"):
            ck.inject(model, ck.CompacterConfig(original_ln_before=True, reduction_factor=4, **options))
        assert str(model) == before


@pytest.mark.parametrize("residual_before_ln", [True, False])
@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_inject_takes_the_residual_as_peft_does(family: str, residual_before_ln: bool, tmp_path: Path) -> None:
    options = {"original_ln_before": True, "residual_before_ln": residual_before_ln, "reduction_factor": 4}
    model = random_values(ck.inject(base_of(family), ck.CompacterConfig(**options)))
    expected = output(family, model)
    ck.save_adapter(model, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(base_of(family), tmp_path).eval()
    close(output(family, wrapped), expected)
    assert torch.equal(output(family, ck.load_adapter(base_of(family), tmp_path)), expected)
    assert torch.equal(output(family, copy.deepcopy(model)), expected)
    torch._dynamo.reset()
    close(torch.compile(model, fullgraph=True, backend="eager")(**inputs(family))[0], expected)
    ck.remove_adapters(model)
    assert torch.equal(output(family, model), output(family, base_of(family)))


@pytest.mark.parametrize("options", [{}, PFEIFFER, PARALLEL], ids=["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_compile_and_gradient_checkpointing(family: str, options: dict[str, Any]) -> None:
    """A compiled model has one graph, and a forward that is computed again has the gradients."""
    model = adapted(family, **options)
    expected = output(family, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(**inputs(family))[0], expected)
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    output(family, model.train()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            close(parameter.grad, gradients[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = base_of("bert").to(dtype)
    wrapped = peft.get_peft_model(model, ckp.BottleneckConfig(reduction_factor=4, original_ln_before=True))
    result = output("bert", wrapped)
    assert result.dtype == dtype and result.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert output("bert", adapted("bert", original_ln_before=True)).isfinite().all()
