"""Whisper with adapters of its decoder that are chosen by the language of the translation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

import compacter_kernels as ck

WAYS = ("zero-shot", "shared", "per language")
SHARED = "shared"
LONGEST = 48  # tokens of a translation


class Row(NamedTuple):
    """A translation to learn: the encoder's outputs (positions, width), a language, tokens."""

    states: Tensor
    language: str
    tokens: list[int]


def adapter_for(way: str, language: str) -> str | None:
    """The name of the adapter for `ck.route`; None is the base model."""
    return {"zero-shot": None, "shared": SHARED, "per language": language}[way]


def add_adapters(model: Any, names: Sequence[str], seed: int, **options: Any) -> None:
    """x + W2 relu(W1 LN(x)) after the feed-forward block of each layer of the decoder.

    W1 and W2 are sums of Kronecker products. The names that the model has are replaced.
    """
    settings = {"reduction_factor": 2, "phm_dim": 4, "phm_rank": 4, "phm_init_range": 0.02, **options}
    targets = [f"decoder.layers.{layer}.fc2" for layer in range(model.config.decoder_layers)]
    config = ck.CompacterConfig(
        target_modules=targets,
        non_linearity="relu",
        ln_before=True,
        train_layer_norms=False,
        modules_to_save=[],
        **settings,
    )
    for number, name in enumerate(names):
        torch.manual_seed(100 * seed + number)
        ck.inject(model, config, name=name)


@torch.no_grad()
def encode(model: Any, features: Tensor, positions: int, batch: int = 4) -> Tensor:
    """Log-mel features (B, mels, frames) -> the encoder's first outputs (B, positions, width)."""
    parts = [model.model.encoder(part).last_hidden_state[:, :positions] for part in features.split(batch)]
    return torch.cat(parts)


def prefix(model: Any, language: str) -> list[int]:
    """The tokens before a translation."""
    own = model.generation_config
    start, task = model.config.decoder_start_token_id, own.task_to_id["transcribe"]
    return [start, own.lang_to_id[f"<|{language}|>"], task, own.no_timestamps_token_id]


def loss_of(model: Any, rows: Sequence[Row], names: Sequence[str | None], words: Tensor) -> Tensor:
    """The mean of -log p over the tokens of the rows, each computed with its adapter.

    words: tokens (V,), all of the rows and the end among them; p is a softmax over these alone.
    """
    end = model.config.eos_token_id
    ids = [torch.tensor([*prefix(model, row.language), *row.tokens, end]) for row in rows]
    known = len(prefix(model, rows[0].language))
    classes = words.new_full((model.config.vocab_size,), -100).index_put((words,), torch.arange(len(words)))
    targets = nn.utils.rnn.pad_sequence([classes[own[known:]] for own in ids], True, -100)
    tokens = nn.utils.rnn.pad_sequence(ids, True, end)[:, :-1]
    states = (torch.stack([row.states for row in rows]),)
    with ck.route(model, names):
        hidden = model.model(encoder_outputs=states, decoder_input_ids=tokens, use_cache=False).last_hidden_state
    logits = F.linear(hidden[:, known - 1 :], model.proj_out.weight[words])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def train(
    model: Any, way: str, rows: Sequence[Row], words: Tensor, seed: int, epochs: int, rate: float, batch: int = 16
) -> list[float]:
    """Train the adapters of a way on batches that mix the languages; the mean loss of each epoch.

    The rate rises for a tenth of the steps, then falls to 0.
    """
    ck.set_adapter(model, sorted({str(adapter_for(way, row.language)) for row in rows}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.01)
    steps, order = epochs * -(-len(rows) // batch), random.Random(seed)
    losses = []
    for epoch in range(epochs):
        of_epoch = []
        for number, own in enumerate(_batches(rows, batch, order)):
            step = epoch * steps // epochs + number
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / (0.1 * steps), (steps - step) / steps)
            loss = loss_of(model, own, [adapter_for(way, row.language) for row in own], words)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            of_epoch.append(loss.item())
        losses.append(sum(of_epoch) / len(of_epoch))
    model.requires_grad_(False)
    return losses


def _batches(rows: Sequence[Row], size: int, order: random.Random) -> Iterator[list[Row]]:
    """All rows in random batches, each of about equal lengths."""
    drawn = sorted(order.sample(list(rows), len(rows)), key=lambda row: len(row.tokens) // 4)
    batches = [drawn[start : start + size] for start in range(0, len(drawn), size)]
    yield from order.sample(batches, len(batches))


@torch.no_grad()
def translate(
    model: Any, states: Tensor, languages: Sequence[str], names: Sequence[str | None], **options: Any
) -> list[list[int]]:
    """The tokens of the translations of states (B, positions, width), by `generate`."""
    with ck.route(model, names):
        out = model.generate(
            encoder_outputs=BaseModelOutput(states),  # type: ignore[arg-type]
            language=list(languages),
            task="transcribe",
            **{"max_new_tokens": LONGEST, **options},
        )
    return out.tolist()  # type: ignore[no-any-return]
