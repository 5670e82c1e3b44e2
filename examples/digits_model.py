"""A small vision transformer in plain torch, which can have an adapter after each sub-layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS = 16


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, hidden) -> the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """A pre-norm transformer block. Adapters come after each sub-layer, before its residual."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = Attention(hidden_size, heads)
        self.attention_adapter: nn.Module = nn.Identity()
        self.feed_forward_norm = nn.LayerNorm(hidden_size)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size), nn.GELU(), nn.Linear(2 * hidden_size, hidden_size)
        )
        self.feed_forward_adapter: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, hidden) -> the same shape."""
        x = x + self.attention_adapter(self.attention(self.attention_norm(x)))
        y: Tensor = x + self.feed_forward_adapter(self.feed_forward(self.feed_forward_norm(x)))
        return y


class VisionTransformer(nn.Module):
    """Images of 8x8 pixels, as 16 overlapping 4x4 patches, to class scores.

    Args:
        classes: how many scores.
        hidden_size, layers, heads: the size of the transformer.
    """

    def __init__(self, classes: int, hidden_size: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.embedding = nn.Conv2d(1, hidden_size, kernel_size=4, stride=2, padding=1)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, hidden_size))
        self.blocks = nn.ModuleList(Block(hidden_size, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, classes)

    def forward(self, images: Tensor) -> Tensor:
        """images (batch, 8, 8) -> scores (batch, classes)."""
        x = self.embedding(images.unsqueeze(1)).flatten(2).transpose(1, 2) + self.position  # (batch, 16, hidden)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x).mean(1))
        return scores
