"""The table of transformer architectures, by `config.model_type`: the modules of their blocks.

Names are relative to a layer. `*` stands for a number, and `a|b` for a choice of two names. An
adapter follows the last linear layer of a block, before dropout and residual, as in the authors'
code.
"""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """An attention or feed-forward block.

    read: the linear layer that takes the block's input. write: the linear layer that ends the
    block.
    """

    read: str
    write: str


class Architecture(NamedTuple):
    """The blocks of one layer of a model.

    layers: the name of the module list that holds the layers.
    """

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
_VIT = Architecture(  # The first name of each choice is that of transformers 4, the second of 5.
    layers="layer|layers",
    attention=Block("attention.attention.query|attention.q_proj", "attention.output.dense|attention.o_proj"),
    feed_forward=Block("intermediate.dense|mlp.fc1", "output.dense|mlp.fc2"),
)
_WAV2VEC2 = Architecture(
    layers="layers",
    attention=Block("attention.q_proj", "attention.out_proj"),
    feed_forward=Block("feed_forward.intermediate_dense", "feed_forward.output_dense"),
)

# The fields of Architecture, each with the option of CompacterConfig that asks for its adapter.
BLOCK_OPTIONS = {"attention": "mh_adapter", "feed_forward": "output_adapter", "cross_attention": "cross_adapter"}
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
