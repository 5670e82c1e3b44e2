"""Small models with Compacter from the library `adapters`, and the results of a training step."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("adapters")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing these packages warns
    import adapters
    from adapters import CompacterConfig
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

from compacter_kernels.patch import adapters_forward

WIDTH, VOCABULARY = 32, 60
PAST_KEY_VALUE = "ignore:`past_key_value` is deprecated:FutureWarning"  # T5 of `adapters` passes it to transformers


def _bert(layers: int) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 40}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes, **quiet))


def _t5(layers: int) -> nn.Module:
    sizes = {"d_model": WIDTH, "num_layers": layers, "num_heads": 2, "d_kv": 16, "d_ff": 40}
    config = T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False, **sizes)
    return T5ForConditionalGeneration(config)


def _gpt2(layers: int) -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_layer": layers, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=1, **sizes))


def _llama(layers: int) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 40}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes))


FAMILIES = {"bert": _bert, "t5": _t5, "gpt2": _gpt2, "llama": _llama}


def compacter(**options: Any) -> CompacterConfig:
    return CompacterConfig(**{"phm_dim": 4, "reduction_factor": 2, **options})


def draw_anew(model: nn.Module, seed: int = 0) -> None:
    """Give the adapters large random weights. As the library initialises them, H is almost zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("adapters.", "shared_parameters.", "adapter_fusion_layer.")):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def make(family: str = "bert", setup: Any = "a", layers: int = 2, **configs: Any) -> nn.Module:
    """A model in training mode with the adapters of these configs, by default one named "a"."""
    torch.manual_seed(0)
    model = FAMILIES[family](layers)
    adapters.init(model)
    for name, config in (configs or {"a": compacter()}).items():
        model.add_adapter(name, config=config)
    model.train_adapter(setup)
    draw_anew(model)
    return model


def residuals_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the residual of each later call of `compacter_adapter`, or "normed" for a norm."""
    residuals: list[Any] = []
    kernel = adapters_forward.compacter_adapter

    def record(*args: Any, **options: Any) -> Tensor:
        residuals.append(options["residual"] if options.get("norm") is None else "normed")
        return kernel(*args, **options)

    monkeypatch.setattr(adapters_forward, "compacter_adapter", record)
    return residuals


def inputs(model: nn.Module, rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    tokens = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))
    extra = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **extra}


def step(model: nn.Module, call: Any = None, **more: Any) -> dict[str, Tensor]:
    """The logits, and the gradients of all trained parameters and of the embeddings."""
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    model.zero_grad()
    torch.manual_seed(11)
    logits = (model if call is None else call)(**inputs(model), **more).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits.dtype)
    (logits * weight).sum().backward()
    trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    embeddings.requires_grad_(False)
    return {"logits": logits.detach(), **trained}


def assert_same_step(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every entry agrees within 1e-5 of the largest entry of its tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        error = float((actual[name] - value).abs().max())
        assert error <= 1e-5 * float(value.abs().max()), f"{name}: {error:.1e}"


class ExactStep:
    """A step of the model in float64, from which float32 may differ by as much on every processor.

    The gradient of a learned scale, or of the input of a softmax, is a sum whose terms nearly
    cancel. Its digits in float32 are mostly rounding errors. So the limit for each gradient is the
    larger of two: 1e-5 of its largest entry, or this plus the change of the gradient when every
    parameter moves by four units in the last place. The change is the largest one of three random
    draws of the signs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).double()
        self.values = step(self.model)

    def _moved(self, seed: int) -> dict[str, Tensor]:
        model, generator = copy.deepcopy(self.model), torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.data *= 1 + 4 * torch.finfo(torch.float32).eps * signs.double()
        return {name: (value - self.values[name]).abs().max() for name, value in step(model).items()}

    @functools.cached_property
    def moves(self) -> dict[str, float]:
        draws = [self._moved(seed) for seed in range(3)]
        return {name: max(float(draw[name]) for draw in draws) for name in self.values}

    def check(self, actual: dict[str, Tensor]) -> None:
        assert actual.keys() == self.values.keys()
        for name, value in self.values.items():
            assert actual[name].dtype == torch.float32, name
            error, limit = float((actual[name] - value).abs().max()), 1e-5 * float(value.abs().max())
            assert error <= limit or error <= limit + self.moves[name], f"{name}: {error:.1e}"
