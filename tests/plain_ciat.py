"""CIAT in plain torch: its adapters with all matrices built, and a T5 with them."""

from __future__ import annotations

from typing import Any

import torch
from families import inputs
from torch import Tensor
from torch.nn import functional as F

import compacter_kernels as ck


def change(adapter: ck.CompacterAdapter, h: Tensor) -> Tensor:
    """W2 relu(W1 h), with both matrices built."""
    down, up = adapter.down.weights(), adapter.up.weights()
    return F.relu(h @ ck.phm_matrix(down) + down.bias) @ ck.phm_matrix(up) + up.bias


def of_embeddings(layer: Any, x: Tensor, name: str = "default") -> Tensor:
    """x + W2 relu(W1 LN(x)) with the adapter before this layer."""
    adapter = layer.compacter[name]
    return x + change(adapter, F.layer_norm(x, x.shape[-1:], adapter.norm_before.weight, adapter.norm_before.bias))


def beside(module: Any, h: Tensor, name: str = "default") -> Tensor:
    """W2 relu(W1 h) with the parallel adapter that adds to the output of this module."""
    return change(module.compacter[name], h)


def plain_t5(model: Any, given: dict[str, Tensor] | None = None, name: str = "default") -> Tensor:
    """An encoder-decoder with norms before its blocks; no adapters after cross-attention."""
    given = given or inputs("t5")
    source = _t5_stack(model.encoder, given["input_ids"], None, name)
    y = _t5_stack(model.decoder, given["decoder_input_ids"], source, name)
    return model.lm_head(y * model.config.d_model**-0.5)  # type: ignore[no-any-return]


def _t5_stack(stack: Any, tokens: Tensor, source: Tensor | None, name: str) -> Tensor:
    length, bias = tokens.shape[1], stack.block[0].layer[0].SelfAttention.compute_bias(*2 * tokens.shape[1:], "cpu")
    if source is not None:
        bias = bias + torch.full((length, length), -torch.inf, dtype=bias.dtype).triu(1)
    x = of_embeddings(stack.block[0], stack.embed_tokens(tokens), name)
    for block in stack.block:
        attention = block.layer[0].SelfAttention
        h = block.layer[0].layer_norm(x)
        x = x + attention(h, position_bias=bias)[0] + beside(attention.o, h, name)
        if source is not None:
            cross, none = block.layer[1], torch.zeros_like(bias[..., :1, :1])
            x = x + cross.EncDecAttention(cross.layer_norm(x), key_value_states=source, position_bias=none)[0]
        last = block.layer[-1]
        h = last.layer_norm(x)
        x = x + last.DenseReluDense(h) + beside(last.DenseReluDense.wo, h, name)
    return stack.final_layer_norm(x)  # type: ignore[no-any-return]
