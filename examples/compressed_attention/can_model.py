"""An encoder-decoder in plain torch, whose decoder layers are compressed or standard ones.

A compressed layer (Li et al., An Efficient Transformer Decoder with Compressed Sub-layers, AAAI
2021) has one sublayer in place of self-attention, cross-attention and feed-forward:

    y = LN(x)
    q = Wq y      K = [Wk_e enc; Wk_s y]      V = [Wv_e enc; Wv_s y]
    x <- x + Wo relu(softmax(q K^T / sqrt(d_h)) V + Wr y + b)

enc is the output of the encoder, and V is as wide as a feed-forward. [a; b] are the positions of a
and then those of b, so that one softmax runs over the source and over the tokens so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def by_head(x: Tensor, heads: int) -> Tensor:
    """x (batch, tokens, width) -> (batch, heads, tokens, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d_h)) v of each head, side by side: (batch, tokens, width of v).

    q (batch, heads, T, d_h) are the last T of the positions of k (batch, heads, S, d_h). A token
    sees the positions before it and its own.
    """
    new, known = q.shape[2], k.shape[2]
    mask = torch.ones(new, known, dtype=torch.bool, device=q.device).tril(known - new) if new > 1 else None
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Seen:
    """The keys and values (batch, heads, positions, width) of a layer so far.

    room: how many tokens more it can keep, in the same memory. Without room nothing is kept, and
    the keys and values are differentiable.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        self.room, self.end = room, keys.shape[2]
        self.keys, self.values = (F.pad(t, (0, 0, 0, room)) for t in (keys, values))

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values so far with new ones behind them."""
        if not self.room:
            return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        start, self.end = self.end, self.end + keys.shape[2]
        self.keys[:, :, start : self.end], self.values[:, :, start : self.end] = keys, values
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]


class CompressedLayer(nn.Module):
    """The layer of one sublayer. Adapters follow `output`, which is Wo."""

    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads, self.of_source, self.of_state = heads, (hidden, inner), (hidden, hidden, inner, inner)
        self.norm = nn.LayerNorm(hidden)
        self.source = nn.Linear(hidden, sum(self.of_source), bias=False)  # Wk_e, Wv_e
        self.state = nn.Linear(hidden, sum(self.of_state), bias=False)  # Wq, Wk_s, Wv_s, Wr
        self.bias = nn.Parameter(torch.zeros(inner))
        self.output = nn.Linear(inner, hidden, bias=False)

    def start(self, enc: Tensor, room: int) -> Seen:
        """The keys and values of the source enc (batch, positions, hidden)."""
        k, v = (by_head(t, self.heads) for t in self.source(enc).split(self.of_source, -1))
        return Seen(k, v, room)

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        """x (batch, tokens, hidden) -> the same shape. seen: what `start` gave."""
        *qkv, rest = self.state(self.norm(x)).split(self.of_state, -1)
        q, k, v = (by_head(t, self.heads) for t in qkv)
        y: Tensor = x + self.output(F.relu(attended(q, *seen.add(k, v)) + rest + self.bias))
        return y


class StandardLayer(nn.Module):
    """The pre-norm layer of self-attention, cross-attention and feed-forward."""

    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self_norm, self.cross_norm, self.feed_norm = (nn.LayerNorm(hidden) for _ in range(3))
        self.qkv, self.self_output = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.q, self.kv, self.cross_output = (nn.Linear(hidden, n * hidden) for n in (1, 2, 1))
        self.first, self.second = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def start(self, enc: Tensor, room: int) -> tuple[Seen, Tensor, Tensor]:
        """No token so far, and the keys and values of the source enc (batch, positions, hidden)."""
        k, v = (by_head(t, self.heads) for t in self.kv(enc).chunk(2, -1))
        return Seen(k[:, :, :0], v[:, :, :0], room), k, v

    def forward(self, x: Tensor, seen: tuple[Seen, Tensor, Tensor]) -> Tensor:
        """x (batch, tokens, hidden) -> the same shape. seen: what `start` gave."""
        own, source_k, source_v = seen
        q, k, v = (by_head(t, self.heads) for t in self.qkv(self.self_norm(x)).chunk(3, -1))
        x = x + self.self_output(attended(q, *own.add(k, v)))
        q = by_head(self.q(self.cross_norm(x)), self.heads)
        across = F.scaled_dot_product_attention(q, source_k, source_v).transpose(1, 2).flatten(2)
        x = x + self.cross_output(across)
        y: Tensor = x + self.second(F.relu(self.first(self.feed_norm(x))))
        return y


class Decoder(nn.Module):
    """Tokens and the output of an encoder to scores of the next token.

    Args:
        layer: `CompressedLayer` or `StandardLayer`.
        words, length: how many tokens there are, and the most of them in a row.
        hidden, inner, heads, layers: the sizes; inner is the width of V, or of the feed-forward.
    """

    def __init__(
        self, layer: type[Any], words: int, length: int, hidden: int, inner: int, heads: int, layers: int
    ) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(words, hidden), nn.Embedding(length, hidden)
        self.layers = nn.ModuleList(layer(hidden, inner, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.scores = nn.Linear(hidden, words)

    def start(self, enc: Tensor, room: int = 0) -> list[Any]:
        """What each layer has seen. room: how many tokens `forward` will get one after another."""
        return [layer.start(enc, room) for layer in self.layers]  # type: ignore[operator]

    def forward(self, tokens: Tensor, seen: list[Any], first: int = 0) -> Tensor:
        """tokens (batch, T), of which the first has that position -> scores (batch, T, words)."""
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(positions)
        for layer, own in zip(self.layers, seen, strict=True):
            x = layer(x, own)
        scores: Tensor = self.scores(self.norm(x))
        return scores


class EncoderDecoder(nn.Module):
    """A standard encoder of torch, and a decoder of compressed layers.

    All sources of a batch have one length. Token 0 begins an output.
    """

    def __init__(
        self, words: int, length: int, hidden: int = 64, inner: int = 128, heads: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(words, hidden), nn.Embedding(length, hidden)
        layer = nn.TransformerEncoderLayer(hidden, heads, inner, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(hidden), enable_nested_tensor=False)
        self.decoder = Decoder(CompressedLayer, words, length, hidden, inner, heads, layers)

    def encode(self, source: Tensor) -> Tensor:
        """source (batch, S) -> (batch, S, hidden)."""
        positions = torch.arange(source.shape[1], device=source.device)
        enc: Tensor = self.encoder(self.embedding(source) + self.position(positions))
        return enc

    def forward(self, source: Tensor, tokens: Tensor) -> Tensor:
        """source (batch, S) and tokens (batch, T) -> scores (batch, T, words), all at once."""
        scores: Tensor = self.decoder(tokens, self.decoder.start(self.encode(source)))
        return scores

    @torch.no_grad()
    def generate(self, source: Tensor, length: int, cached: bool = True) -> tuple[Tensor, Tensor]:
        """The likeliest tokens (batch, length), one after another, and their scores.

        cached: keep keys and values; otherwise each step computes all tokens so far again.
        """
        enc = self.encode(source)
        tokens, scores = source.new_zeros(len(source), 1), list[Tensor]()
        seen = self.decoder.start(enc, length)
        for first in range(length):
            if cached:
                step = self.decoder(tokens[:, -1:], seen, first)
            else:
                step = self.decoder(tokens, self.decoder.start(enc))
            scores.append(step[:, -1])
            tokens = torch.cat([tokens, scores[-1].argmax(-1, keepdim=True)], 1)
        return tokens[:, 1:], torch.stack(scores, 1)
