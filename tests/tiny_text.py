"""Tiny models with a tokenizer, in folders as transformers writes them, and texts to train on.

One word of a text determines its target.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

WORDS = [f"w{number}" for number in range(12)]
# the word that determines the target, and the target
KEYS = {"red": "warm", "orange": "warm", "blue": "cold", "green": "cold"}
SPECIAL = ["<pad>", "</s>", "<unk>"]
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
}


def save_model(folder: Path, kind: str, dropout: bool = False) -> Path:
    """A model of that kind and its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

    tokenizer = _tokenizer()
    options: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, **({} if dropout else NO_DROPOUT[kind])}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            model = BertForSequenceClassification(BertConfig(**sizes, **options, initializer_range=0.2))
        else:
            sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "eos_token_id": 1}
            model = T5ForConditionalGeneration(T5Config(**sizes, **options, decoder_start_token_id=0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *WORDS, *KEYS, *sorted(set(KEYS.values()))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


def rows(count: int = 64, seed: int = 0) -> list[dict[str, str]]:
    """Examples of two to six words. One of the words determines the target."""
    generator = torch.Generator().manual_seed(seed)

    def draw(end: int) -> int:
        return int(torch.randint(0, end, (), generator=generator))

    found = []
    for _ in range(count):
        key = list(KEYS)[draw(len(KEYS))]
        words = [WORDS[draw(len(WORDS))] for _ in range(1 + draw(5))]
        words.insert(draw(len(words) + 1), key)
        found.append({"text": " ".join(words), "label": KEYS[key]})
    return found


def save_rows(path: Path, found: list[dict[str, Any]]) -> Path:
    """Write them as JSON lines or CSV, depending on the file name."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in found)
        else:
            writer = csv.DictWriter(file, found[0])
            writer.writeheader()
            writer.writerows(found)
    return path
