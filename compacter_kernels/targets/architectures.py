"""Where the blocks of a transformer write: the table of module names, by `config.model_type`.

Names are relative to a layer, of which `layers` is the name of the list; `*` stands for a number, and a choice of names
is written `a|b`. `write` is the linear layer that ends a block, before dropout and residual: an adapter behind it sits
where the authors of Compacter have it. `read` is the one that gets the block's input, for parallel adapters.
"""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """The first and the last linear layer of an attention or feed-forward block."""

    read: str
    write: str


class Architecture(NamedTuple):
    """The blocks of one layer; cross_attention is None where the family has none."""

    layers: str
    attention: Block
    feed_forward: Block
    cross_attention: Block | None = None


_T5 = Architecture(
    layers="block",
    attention=Block("layer.*.SelfAttention.q", "layer.*.SelfAttention.o"),
    feed_forward=Block("layer.*.DenseReluDense.wi|layer.*.DenseReluDense.wi_0", "layer.*.DenseReluDense.wo"),
    cross_attention=Block("layer.*.EncDecAttention.q", "layer.*.EncDecAttention.o"),
)
_BERT = Architecture(
    layers="layer",
    attention=Block("attention.self.query", "attention.output.dense"),
    feed_forward=Block("intermediate.dense", "output.dense"),
    cross_attention=Block("crossattention.self.query", "crossattention.output.dense"),
)
_BART = Architecture(
    layers="layers",
    attention=Block("self_attn.q_proj", "self_attn.out_proj"),
    feed_forward=Block("fc1", "fc2"),
    cross_attention=Block("encoder_attn.q_proj", "encoder_attn.out_proj"),
)
_LLAMA = Architecture(
    layers="layers",
    attention=Block("self_attn.q_proj", "self_attn.o_proj"),
    feed_forward=Block("mlp.gate_proj", "mlp.down_proj"),
)
_DISTILBERT = Architecture(
    layers="layer",
    attention=Block("attention.q_lin", "attention.out_lin"),
    feed_forward=Block("ffn.lin1", "ffn.lin2"),
)
_GPT2 = Architecture(
    layers="h",
    attention=Block("attn.c_attn", "attn.c_proj"),
    feed_forward=Block("mlp.c_fc", "mlp.c_proj"),
    cross_attention=Block("crossattention.q_attn", "crossattention.c_proj"),
)
_VIT = Architecture(  # of transformers 4, then of 5
    layers="layer|layers",
    attention=Block("attention.attention.query|attention.q_proj", "attention.output.dense|attention.o_proj"),
    feed_forward=Block("intermediate.dense|mlp.fc1", "output.dense|mlp.fc2"),
)
_WAV2VEC2 = Architecture(
    layers="layers",
    attention=Block("attention.q_proj", "attention.out_proj"),
    feed_forward=Block("feed_forward.intermediate_dense", "feed_forward.output_dense"),
)

ARCHITECTURES = {
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "whisper"), _BART),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "distilbert": _DISTILBERT,
    "gpt2": _GPT2,
    "vit": _VIT,
    "wav2vec2": _WAV2VEC2,
}
