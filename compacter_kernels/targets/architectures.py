"""The table of transformer architectures, by `config.model_type`: the modules of their blocks.

Names are relative to a layer. `*` stands for a number, and `a|b` for a choice of two names. An
adapter follows the last linear layer of a block, before dropout and residual, as in the authors'
code.
"""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """The linear layers that take the input of a block and that end it, and its layer norm."""

    read: str
    write: str
    norm: str = ""


class Architecture(NamedTuple):
    """The name of the module list that holds the layers of a model, and the blocks of one layer.

    norms: "after", if the layer norm of a block follows the sum of its input and its output;
    "before", if it precedes the block, whose residual is then the input of the norm; "" if models
    of the family differ.
    """

    layers: str
    norms: str
    attention: Block
    feed_forward: Block
    cross_attention: Block | None = None


# The fields of Architecture, each with the option of CompacterConfig that asks for its adapter.
BLOCK_OPTIONS = {"attention": "mh_adapter", "feed_forward": "output_adapter", "cross_attention": "cross_adapter"}

# The model types of a family, and the fields of its Architecture. A block is "read write norm".
_FAMILIES = {
    "t5 mt5 umt5": (
        "block",
        "before",
        "layer.*.SelfAttention.q layer.*.SelfAttention.o layer.*.layer_norm",
        "layer.*.DenseReluDense.wi|layer.*.DenseReluDense.wi_0 layer.*.DenseReluDense.wo layer.*.layer_norm",
        "layer.*.EncDecAttention.q layer.*.EncDecAttention.o layer.*.layer_norm",
    ),
    "bart": (
        "layers",
        "after",
        "self_attn.q_proj self_attn.out_proj self_attn_layer_norm",
        "fc1 fc2 final_layer_norm",
        "encoder_attn.q_proj encoder_attn.out_proj encoder_attn_layer_norm",
    ),
    "mbart whisper": (
        "layers",
        "before",
        "self_attn.q_proj self_attn.out_proj self_attn_layer_norm",
        "fc1 fc2 final_layer_norm",
        "encoder_attn.q_proj encoder_attn.out_proj encoder_attn_layer_norm",
    ),
    "bert roberta xlm-roberta electra camembert": (
        "layer",
        "after",
        "attention.self.query attention.output.dense attention.output.LayerNorm",
        "intermediate.dense output.dense output.LayerNorm",
        "crossattention.self.query crossattention.output.dense crossattention.output.LayerNorm",
    ),
    "llama mistral qwen2 qwen3": (
        "layers",
        "before",
        "self_attn.q_proj self_attn.o_proj input_layernorm",
        "mlp.gate_proj mlp.down_proj post_attention_layernorm",
    ),
    "distilbert": (
        "layer",
        "after",
        "attention.q_lin attention.out_lin sa_layer_norm",
        "ffn.lin1 ffn.lin2 output_layer_norm",
    ),
    "gpt2": (
        "h",
        "before",
        "attn.c_attn attn.c_proj ln_1",
        "mlp.c_fc mlp.c_proj ln_2",
        "crossattention.q_attn crossattention.c_proj ln_cross_attn",
    ),
    "vit": (  # The first name of each choice is that of transformers 4, the second of 5.
        "layer|layers",
        "before",
        "attention.attention.query|attention.q_proj attention.output.dense|attention.o_proj layernorm_before",
        "intermediate.dense|mlp.fc1 output.dense|mlp.fc2 layernorm_after",
    ),
    "wav2vec2": (
        "layers",
        "",
        "attention.q_proj attention.out_proj",
        "feed_forward.intermediate_dense feed_forward.output_dense",
    ),
}
ARCHITECTURES = {
    model_type: Architecture(layers, norms, *(Block(*block.split()) for block in blocks))
    for model_types, (layers, norms, *blocks) in _FAMILIES.items()
    for model_type in model_types.split()
}
# The child that is the base, in the classes of transformers that have a head; a T5 has none.
_BASES = {"bert": "bert", "roberta": "roberta xlm-roberta camembert", "electra": "electra", "distilbert": "distilbert"}
_BASES |= {"model": "bart mbart whisper llama mistral qwen2 qwen3", "transformer": "gpt2", "vit": "vit"}
_BASES |= {"wav2vec2": "wav2vec2"}
BASE_PREFIXES = {kind: base for base, kinds in _BASES.items() for kind in kinds.split()}
