"""Small transformers models, their batches, and what must hold after any training of one with adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compacter_kernels as ck

pytest.importorskip("transformers")

CONFIG = ck.CompacterConfig(reduction_factor=4)
VOCABULARY, CLASSES = 50, 3


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


MODELS = {"bert": bert, "t5": t5, "gpt2": gpt2}


def make(kind: str, config: ck.CompacterConfig = CONFIG) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with adapters, in training, the same each time; and a copy of what its base holds."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    base = copy.deepcopy(model.state_dict())
    return ck.inject(model, config).train(), base


def batch(kind: str, size: int = 4, seed: int = 0, length: int = 7) -> dict[str, Tensor]:
    """Random tokens; of BERT, labels that a look at the first token tells."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (size, length), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    labels = {"bert": tokens[:, 0] % CLASSES, "t5": tokens[:, :5].contiguous(), "gpt2": tokens}
    return {**inputs, "labels": labels[kind]}


def rows(kind: str, count: int) -> list[dict[str, Tensor]]:
    """A data set of that many examples."""
    full = batch(kind, count)
    return [{name: value[row] for name, value in full.items()} for row in range(count)]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what has been trained."""
    return {name: p.detach().clone() for name, p in trained(model).items()}


def gradients(model: nn.Module, inputs: dict[str, Tensor], run: Any = None) -> dict[str, Tensor]:
    """Loss and gradient of every trained parameter, through `run` (by default the model itself); grads are cleared."""
    loss = (model if run is None else run)(**inputs).loss
    loss.backward()
    missing = [name for name, p in trained(model).items() if p.grad is None]
    assert not missing, f"no gradient for {missing}"
    found = {
        "loss": loss.detach(),
        **{name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None},
    }
    model.zero_grad()
    return found


def assert_only_adapters_trained(model: nn.Module, base: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """The base is the same bit by bit, and every trained parameter has moved."""
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.items())
    still = [name for name, p in trained(model).items() if torch.equal(p, start[name])]
    assert not still, f"did not move: {still}"


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model).values(), lr=3e-3)


def fit(model: nn.Module, kind: str, steps: range, optimizer: torch.optim.Optimizer, size: int = 8) -> list[float]:
    """Plain training; the losses."""
    losses = []
    for step in steps:
        loss = model(**batch(kind, size, seed=step % 2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
