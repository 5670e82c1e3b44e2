"""Small transformers models, their batches, and checks after a training with adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from families import WORDS, build
from torch import Tensor, nn

import compacter_kernels as ck

CONFIG = ck.CompacterConfig(reduction_factor=4)
CLASSES = 3
MODELS: dict[str, dict[str, Any]] = {  # without dropout, so that two ways to compute the same can be compared
    "bert": {"num_labels": CLASSES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "gpt2": {"add_cross_attention": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def base_of(kind: str, **sizes: int) -> nn.Module:
    """A model without adapters, the same each time."""
    return build(kind, **MODELS[kind], **sizes)


def make(
    kind: str, config: ck.CompacterConfig = CONFIG, impl: str = "auto", **sizes: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with adapters in training mode, and a copy of the state of its base.

    Both are the same each time.
    """
    torch.manual_seed(0)
    model = base_of(kind, **sizes)
    base = copy.deepcopy(model.state_dict())
    return ck.inject(model, config, impl=impl).train(), base


def batch(kind: str, size: int = 4, seed: int = 0, length: int = 7) -> dict[str, Tensor]:
    """Random tokens. The labels of BERT depend on the first token alone."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, WORDS, (size, length), generator=generator)
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
    """A copy of the trained parameters."""
    return {name: p.detach().clone() for name, p in trained(model).items()}


def gradients(
    model: nn.Module, inputs: dict[str, Tensor], run: Any = None, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The loss and the gradient of every trained parameter, computed through `run`.

    By default `run` is the model itself. The gradients are cleared.
    """
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = (model if run is None else run)(**inputs).loss
    loss.backward()
    missing = [name for name, p in trained(model).items() if p.grad is None]
    assert not missing, f"no gradient for {missing}"
    result = {
        "loss": loss.detach(),
        **{name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None},
    }
    model.zero_grad()
    return result


def assert_only_adapters_trained(model: nn.Module, base: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """The base is the same bit by bit, and every trained parameter has moved."""
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.items())
    still = [name for name, p in trained(model).items() if torch.equal(p, start[name])]
    assert not still, f"did not move: {still}"


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model).values(), lr=1e-2)


def fit(model: nn.Module, kind: str, steps: range, optimizer: torch.optim.Optimizer, size: int = 8) -> list[float]:
    """Train in a plain loop, and return the losses."""
    losses = []
    for step in steps:
        loss = model(**batch(kind, size, seed=step % 2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trainer_arguments(folder: Path, **options: Any) -> Any:
    """TrainingArguments that print nothing and save nothing, unless the options say otherwise."""
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
        **{"save_strategy": "no", **options},
    )
