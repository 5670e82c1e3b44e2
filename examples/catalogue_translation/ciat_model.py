"""A small T5 that translates, its adapters as in CIAT, and batches of all language pairs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from catalogues import Sentence
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import compacter_kernels as ck

PAD, END, NO_LABEL = 0, 1, -100
POOL = 16  # batches are cut from so many times their size, in the order of length
OPTIONS: dict[str, dict[str, Any]] = {  # of the two kinds of adapters, each with a bottleneck of d/2
    "Compacter": {"phm_dim": 4, "phm_init_range": 0.5},
    "dense": {"phm_dim": 1, "factorized_phm_W": False, "learn_phm": False},
}


def pair_of(language: str) -> str:
    """The name of the adapters for translations from English."""
    return f"en_{language}"


def new_model(words: int, width: int = 128, layers: int = 1) -> Any:
    """A T5 with random weights: norms before its blocks, relu, positions by a learned bias."""
    config = T5Config(
        vocab_size=words,
        d_model=width,
        d_kv=32,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=width // 32,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
    )
    return T5ForConditionalGeneration(config)


def add_adapters(model: Any, names: Sequence[str], kind: str) -> None:
    """Freeze the model, and give it adapters of these names, all of which train.

    kind: "Compacter", or "dense" for the matrices of CIAT itself: sums of Kronecker products of
    n = 1 term, whose rule (1, 1, 1) is fixed at 1.
    """
    config = ck.CompacterConfig(
        embedding_adapter=True,
        is_parallel=True,
        non_linearity="relu",
        reduction_factor=2,
        train_layer_norms=False,
        modules_to_save=[],
        **OPTIONS[kind],
    )
    for name in names:
        ck.inject(model, config, name=name)
        for key, p in ck.adapter_parameters(model, name) if kind == "dense" else ():
            if key.endswith("phm_rule"):
                nn.init.ones_(p)
            elif key.endswith("up.W"):
                nn.init.normal_(p, std=1e-3)  # so that an adapter changes little at first
    ck.set_adapter(model, list(names))


def new_tokenizer(data: Sequence[Sentence], languages: Sequence[str], words: int) -> Tokenizer:
    """One vocabulary of byte pairs for all languages, with a token for each target language."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", *(f"<{language}>" for language in languages)]
    trainer = trainers.BpeTrainer(vocab_size=words, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((text for sentence in data for text in sentence.values()), trainer)
    return tokenizer


class Batch(NamedTuple):
    """Translations: source and mask (B, S), labels (B, T), and the adapters' name of each."""

    source: Tensor
    mask: Tensor
    labels: Tensor
    names: list[str]


def encoded(data: Sequence[Sentence], languages: Sequence[str], tokenizer: Tokenizer) -> Batch:
    """Every sentence with every language: sentence by sentence, in the order of the languages."""
    rows = [(sentence, language) for sentence in data for language in languages]
    source = [
        [tokenizer.token_to_id(f"<{language}>"), *tokenizer.encode(sentence["en"]).ids, END]
        for sentence, language in rows
    ]
    target = [[*tokenizer.encode(sentence[language]).ids, END] for sentence, language in rows]
    tokens, labels = (
        nn.utils.rnn.pad_sequence([torch.tensor(row) for row in part], batch_first=True, padding_value=fill)
        for part, fill in ((source, PAD), (target, NO_LABEL))
    )
    return Batch(tokens, (tokens != PAD).long(), labels, [pair_of(language) for _, language in rows])


def batches(data: Sequence[Sentence], size: int, seed: int) -> Iterator[list[Sentence]]:
    """Batches of so many sentences, without end. Those of a batch are about as long."""
    shuffle = random.Random(seed)
    while True:
        order = shuffle.sample(data, len(data))
        for start in range(0, len(order), POOL * size):
            pool = sorted(order[start : start + POOL * size], key=lambda sentence: len(sentence["en"]))
            groups = [pool[i : i + size] for i in range(0, len(pool), size)]
            shuffle.shuffle(groups)
            yield from groups


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """The sum of the cross entropies of all tokens."""
    logits = model(input_ids=batch.source, attention_mask=batch.mask, labels=batch.labels).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )


def step(model: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    """One step on a batch, by the mean loss of its tokens, which is returned."""
    loss = summed_loss(model, batch) / (batch.labels != NO_LABEL).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def translations(model: Any, batch: Batch, tokenizer: Tokenizer, longest: int = 24) -> list[str]:
    """The likeliest tokens, one after another, as text."""
    found = model.generate(
        input_ids=batch.source, attention_mask=batch.mask, max_new_tokens=longest, do_sample=False, num_beams=1
    )
    texts: list[str] = tokenizer.decode_batch(found.tolist())
    return texts
