"""A tiny model of each family of transformers that `inject` knows, with inputs for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

WIDTH, WORDS = 32, 50
_TOKENS = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_LLAMA = {**_BERT, **_TOKENS, "num_key_value_heads": 2}
_BART = {"d_model": WIDTH, **{f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in
         (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))}}  # fmt: skip

# family: (configuration class, its options, model class)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertConfig", {**_BERT, **_TOKENS}, "BertForSequenceClassification"),
    "roberta": ("RobertaConfig", {**_BERT, **_TOKENS}, "RobertaModel"),
    "distilbert": (
        "DistilBertConfig",
        {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, **_TOKENS},
        "DistilBertModel",
    ),
    "gpt2": (
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, **_TOKENS, "add_cross_attention": True},
        "GPT2LMHeadModel",
    ),
    "t5": (
        "T5Config",
        {"d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, **_TOKENS,
         "decoder_start_token_id": 0},
        "T5ForConditionalGeneration",
    ),
    "bart": ("BartConfig", {**_BART, **_TOKENS}, "BartForConditionalGeneration"),
    "mbart": ("MBartConfig", {**_BART, **_TOKENS}, "MBartForConditionalGeneration"),
    "llama": ("LlamaConfig", _LLAMA, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", _LLAMA, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", _LLAMA, "Qwen2ForCausalLM"),
    "vit": ("ViTConfig", {**_BERT, "image_size": 32, "patch_size": 16}, "ViTForImageClassification"),
    "whisper": (
        "WhisperConfig",
        {**_BART, **_TOKENS, "num_mel_bins": 8, "max_source_positions": 20, "decoder_start_token_id": 1},
        "WhisperForConditionalGeneration",
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        {**_BERT, "vocab_size": 32, "conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2),
         "num_feat_extract_layers": 2},
        "Wav2Vec2ForCTC",
    ),
}  # fmt: skip
CROSS_ATTENTION = ("gpt2", "t5", "bart", "mbart", "whisper")


def build(family: str, seed: int = 0, **options: Any) -> nn.Module:
    """A tiny model of the family in eval mode; the same for the same seed."""
    transformers = pytest.importorskip("transformers")
    config, defaults, model = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**{**defaults, **options}))
    return made.eval()


def inputs(family: str, batch: int = 2, length: int = 6) -> dict[str, Tensor]:
    """The inputs of the model's forward; always the same."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, WORDS, (batch, length), generator=generator)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    if family == "wav2vec2":
        return {"input_values": torch.randn(batch, 400, generator=generator)}
    if family == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator), "decoder_input_ids": words}
    if family in ("t5", "bart", "mbart"):
        return {"input_ids": words, "decoder_input_ids": words}
    if family == "gpt2":
        return {"input_ids": words, "encoder_hidden_states": torch.randn(batch, 5, WIDTH, generator=generator)}
    return {"input_ids": words}


def output(family: str, model: nn.Module) -> Tensor:
    """The first output: logits, or hidden states of a model without a head."""
    result: Tensor = model(**inputs(family))[0]
    return result
