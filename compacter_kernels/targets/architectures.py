"""The table of transformer architectures, by `config.model_type`: the modules of their blocks.

Names are relative to a layer. `*` stands for a number, and `a|b` for a choice of two names. An
adapter follows the last linear layer of a block, before dropout and residual, as in the authors'
code.
"""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """The linear layer that takes the input of a block, and the linear layer that ends it."""

    read: str
    write: str


class Architecture(NamedTuple):
    """The name of the module list that holds the layers of a model, and the blocks of one layer."""

    layers: str
    attention: Block
    feed_forward: Block
    cross_attention: Block | None = None


# The fields of Architecture, each with the option of CompacterConfig that asks for its adapter.
BLOCK_OPTIONS = {"attention": "mh_adapter", "feed_forward": "output_adapter", "cross_attention": "cross_adapter"}

# The model types of a family, and the fields of its Architecture. A block is "read write".
_FAMILIES = {
    "t5 mt5 umt5": (
        "block",
        "layer.*.SelfAttention.q layer.*.SelfAttention.o",
        "layer.*.DenseReluDense.wi|layer.*.DenseReluDense.wi_0 layer.*.DenseReluDense.wo",
        "layer.*.EncDecAttention.q layer.*.EncDecAttention.o",
    ),
    "bart mbart whisper": (
        "layers",
        "self_attn.q_proj self_attn.out_proj",
        "fc1 fc2",
        "encoder_attn.q_proj encoder_attn.out_proj",
    ),
    "bert roberta xlm-roberta electra camembert": (
        "layer",
        "attention.self.query attention.output.dense",
        "intermediate.dense output.dense",
        "crossattention.self.query crossattention.output.dense",
    ),
    "llama mistral qwen2 qwen3": ("layers", "self_attn.q_proj self_attn.o_proj", "mlp.gate_proj mlp.down_proj"),
    "distilbert": ("layer", "attention.q_lin attention.out_lin", "ffn.lin1 ffn.lin2"),
    "gpt2": ("h", "attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj", "crossattention.q_attn crossattention.c_proj"),
    "vit": (  # The first name of each choice is that of transformers 4, the second of 5.
        "layer|layers",
        "attention.attention.query|attention.q_proj attention.output.dense|attention.o_proj",
        "intermediate.dense|mlp.fc1 output.dense|mlp.fc2",
    ),
    "wav2vec2": (
        "layers",
        "attention.q_proj attention.out_proj",
        "feed_forward.intermediate_dense feed_forward.output_dense",
    ),
}
ARCHITECTURES = {
    model_type: Architecture(layers, *(Block(*block.split()) for block in blocks))
    for model_types, (layers, *blocks) in _FAMILIES.items()
    for model_type in model_types.split()
}
# The child that is the base, in the classes of transformers that have a head; a T5 has none.
_BASES = {"bert": "bert", "roberta": "roberta xlm-roberta camembert", "electra": "electra", "distilbert": "distilbert"}
_BASES |= {"model": "bart mbart whisper llama mistral qwen2 qwen3", "transformer": "gpt2", "vit": "vit"}
_BASES |= {"wav2vec2": "wav2vec2"}
BASE_PREFIXES = {kind: base for base, kinds in _BASES.items() for kind in kinds.split()}
