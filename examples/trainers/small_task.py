"""A tiny language model on bytes with random weights, and a text: what the scripts here train.

In your script, `AutoModelForCausalLM.from_pretrained(...)`, its tokenizer and your data stand here.
"""

from __future__ import annotations

import codecs
import contextlib
import io

import torch
from torch import Tensor
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

with contextlib.redirect_stdout(io.StringIO()):  # It prints the text.
    import this

TOKENIZER = ByT5Tokenizer(extra_ids=0)  # The bytes of UTF-8 are its tokens.
LENGTH = 48


def base_model() -> LlamaForCausalLM:
    """A LLaMA of two layers, the same each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens))


def lines() -> list[str]:
    """The lines of the Zen of Python."""
    return [line for line in codecs.decode(this.s, "rot13").splitlines() if line]


def examples() -> list[dict[str, Tensor]]:
    """The lines as tokens, with labels; -100 is the label of padding."""
    batch = TOKENIZER(lines(), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    keys = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
    return [{key: values[row] for key, values in keys.items()} for row in range(len(labels))]


@torch.no_grad()
def loss_of(model: torch.nn.Module) -> float:
    """The loss of a model on all lines, in eval mode."""
    rows = examples()
    model.eval()
    return float(model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss)
