"""Generation with one adapter, with several in one model, and without adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import CONFIG, adamw, batch, fit, make, trained, values
from torch import Tensor, nn

import compacter_kernels as ck

LENGTH = 10


def strong(model: nn.Module, seed: int) -> nn.Module:
    """Give the active adapters large weights, so that they determine the generated text."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in ck.adapter_parameters(model):
            if "down" in name or "up" in name or "phm_rule" in name:
                p.normal_(std=0.5, generator=generator)
    return model


def greedy(model: nn.Module, kind: str) -> Tensor:
    """The definition of greedy generation: the most likely next token, one after the other.

    Nothing is kept between the steps.
    """
    inputs = batch(kind)
    tokens = inputs["input_ids"]
    text = torch.zeros(len(tokens), 1, dtype=torch.long) if kind == "t5" else tokens
    for _ in range(LENGTH):
        with torch.no_grad():
            out = model(tokens, decoder_input_ids=text) if kind == "t5" else model(text)
        text = torch.cat([text, out.logits[:, -1:].argmax(-1)], dim=1)
    return text


def generated(model: nn.Module, kind: str) -> Tensor:
    inputs = batch(kind)
    del inputs["labels"]
    tokens: Tensor = model.generate(
        **inputs, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return tokens


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_generation_is_step_by_step_argmax(kind: str) -> None:
    """generate() keeps keys and values, and still gives the text of `greedy`.

    Without the adapters the text is that of the base model.
    """
    model, _ = make(kind)
    model.eval()
    with ck.disable_adapters(model):
        plain = generated(model, kind)
    strong(model, 0)
    text = generated(model, kind)
    assert torch.equal(text, greedy(model, kind))
    assert not torch.equal(text, plain)
    with ck.disable_adapters(model):
        assert torch.equal(generated(model, kind), plain)
        assert torch.equal(greedy(model, kind), plain)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_generation_with_each_of_two_adapters(kind: str) -> None:
    model, _ = make(kind)
    model.eval()
    strong(model, 1)
    ck.inject(model, ck.CompacterPlusPlusConfig(reduction_factor=8), name="second").eval()
    strong(model, 2)
    second = generated(model, kind)
    ck.set_adapter(model, "default")
    first = generated(model, kind)
    assert not torch.equal(first, second)
    ck.set_adapter(model, "second")
    assert torch.equal(generated(model, kind), second)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_training_one_adapter_leaves_the_other(kind: str) -> None:
    """Adapters that are trained in turn in one model get the values that each gets alone."""
    alone = []
    for seed in (1, 2):
        model, _ = make(kind)
        strong(model, seed)
        fit(model, kind, range(4), adamw(model))
        alone.append(values(model))
    model, base = make(kind)
    strong(model, 1)
    ck.inject(model, CONFIG, name="second").train()
    fresh = make(kind)[0]
    for name, p in ck.adapter_parameters(model, "second"):  # the second starts with the values of the first
        p.data.copy_(fresh.get_parameter(name.replace("second", "default")))
    strong(model, 2)
    optimizers = {}
    for name in ("second", "default"):
        ck.set_adapter(model, name)
        optimizers[name] = adamw(model)
    for steps in (range(2), range(2, 4)):
        for name, optimizer in optimizers.items():
            ck.set_adapter(model, name)
            before = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
            fit(model, kind, steps, optimizer)
            assert all(torch.equal(model.get_parameter(key), value) for key, value in before.items())
    for name, expected in zip(("default", "second"), alone, strict=True):
        ck.set_adapter(model, name)
        got = {key.replace("second", "default"): p for key, p in trained(model).items()}
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())


@pytest.mark.parametrize("config", [CONFIG, ck.CompacterConfig(reduction_factor=4, ln_before=True, ln_after=True)])
def test_further_adapters_copy_nothing_of_the_first_ones(config: ck.CompacterConfig) -> None:
    """Two kinds of layer norms do not count as layer norms of the model.

    These are trained copies, and the layer norms of the adapters themselves.
    """
    model, _ = make("bert", config)
    first = [name for name, _ in ck.adapter_parameters(model)]
    ck.inject(model, config, name="second")
    assert [name.replace("second", "default") for name, _ in ck.adapter_parameters(model)] == first
    assert [name for name, _ in ck.adapter_parameters(model, "default")] == first


def test_no_gradient_reaches_disabled_adapters() -> None:
    model, _ = make("bert")
    untouched = copy.deepcopy(model)
    ck.remove_adapters(untouched)
    with ck.disable_adapters(model):
        loss = model(**batch("bert")).loss
    assert torch.equal(loss, untouched(**batch("bert")).loss)
    assert not loss.requires_grad
