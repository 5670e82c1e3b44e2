"""A batch whose samples have different adapters, by adapter_names, equals a run for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import WIDTH, WORDS, build, inputs
from peft_models import add, config, peft, wrapped
from torch import Tensor, nn

NAMES = ["__base__", "default", "second", "default", "second"]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "parallel": {"is_parallel": True},
    "all shared": {"shared_W_phm": True, "modules_to_save": []},
    "adapters alone": {"train_layer_norms": False, "modules_to_save": []},
}


def two_adapters(family: str, **options: Any) -> Any:
    return add(wrapped(build(family), **options), "second", 1, **{**options, "shared_W_phm": False})


def alone(model: Any, name: str, call: Any) -> Any:
    """What `call` gives when all samples have that adapter."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    return call()


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_samples_get_their_adapters(family: str, options: dict[str, Any]) -> None:
    model, batch = two_adapters(family, **options), inputs(family, len(NAMES))
    with torch.no_grad():
        mixed = model(**batch, adapter_names=NAMES)[0]
        for name in set(NAMES):
            expected = alone(model, name, lambda: model(**batch)[0])
            rows = [row for row, other in enumerate(NAMES) if other == name]
            torch.testing.assert_close(mixed[rows], expected[rows], rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(**batch, adapter_names=NAMES)[0], model(**batch)[0])


def test_layers_that_only_one_adapter_has() -> None:
    model = wrapped(build("bert"), target_modules=["output.dense"], train_layer_norms=False)
    add(model, "second", 1, target_modules=["intermediate.dense"], modules_to_save=[])
    batch = inputs("bert", len(NAMES))
    with torch.no_grad():
        mixed = model(**batch, adapter_names=NAMES)[0]
        for row, name in enumerate(NAMES):
            expected = alone(model, name, lambda: model(**batch)[0])
            torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-5)


def test_gradients() -> None:
    """Each adapter gets the gradients of its own samples, while both are trained."""
    base = build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, batch = add(wrapped(base), "second", 1).train(), inputs("bert", len(NAMES))
    model.set_requires_grad(["default", "second"])
    model(**batch, adapter_names=NAMES).logits.square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {"default", "second"} <= {part for name in got for part in name.split(".")}
    model.zero_grad()
    for name in ("default", "second"):
        rows = [row for row, other in enumerate(NAMES) if other == name]
        model.set_adapter(name)
        model(**{key: value[rows] for key, value in batch.items()}).logits.square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
@pytest.mark.parametrize(
    "generation", [{"num_beams": 3}, {}, {"generation_config": {"num_beams": 2, "num_return_sequences": 2}}]
)
def test_generate(family: str, generation: dict[str, Any]) -> None:
    """Also with beams, for which generate() repeats each sample, but not for the encoder."""
    if "generation_config" in generation:
        from transformers import GenerationConfig

        sizes = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1}
        generation = {"generation_config": GenerationConfig(**generation["generation_config"], **sizes)}
    task = "CAUSAL_LM" if family == "gpt2" else "SEQ_2_SEQ_LM"
    model = peft.get_peft_model(
        build(family, **({"add_cross_attention": False} if family == "gpt2" else {})), config(task_type=task)
    ).eval()
    model.add_adapter("second", config(task_type=task))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "compacter_" in name:
                p.normal_(std=0.5)
    tokens = torch.randint(3, WORDS, (len(NAMES), 6))

    def generate(**options: Any) -> Tensor:
        sizes = {"max_new_tokens": 5, "min_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
        made: Tensor = model.generate(input_ids=tokens, do_sample=False, **sizes, **generation, **options)
        return made.reshape(len(NAMES), -1)

    mixed = generate(adapter_names=NAMES)
    assert not torch.equal(mixed, generate())
    for row, name in enumerate(NAMES):
        assert torch.equal(mixed[row], alone(model, name, generate)[row])


def test_what_cannot_be_is_refused() -> None:
    model, batch = two_adapters("bert"), inputs("bert")
    with pytest.raises(ValueError, match=r"non-existing adapter.*: third, fourth; the model has default, second"):
        model(**batch, adapter_names=["third", "fourth"])
    with pytest.raises(ValueError, match=r"Length of `adapter_names` .* but got 3 and 2 respectively"):
        model(**batch, adapter_names=["default"] * 3)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"call gradient_checkpointing_disable\(\) first"):
        model(**batch, adapter_names=["default", "second"])
    hooks = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    assert not [module for module in hooks if type(module).__name__ in ("AdapterLayer", "ModulesToSaveWrapper")]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.both = nn.Linear(WIDTH, WIDTH), nn.Bilinear(WIDTH, WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        result: Tensor = self.both(x, y)
        return result


def test_a_module_of_two_inputs_that_is_trained_whole_is_refused() -> None:
    model = wrapped(TwoInputs(), target_modules=["lin"], modules_to_save=["both"])
    with pytest.raises(TypeError, match="a Bilinear that is trained whole must take a single tensor, by position"):
        model(torch.randn(2, WIDTH), adapter_names=["default", "__base__"])
