"""Image tokens for cross-attention: a strided convolutional stem, then transformer blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.presets import EncoderSpec


class TokenBlock(nn.Module):
    """Pre-norm self-attention and MLP on (b, tokens, dim)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.heads = dim // head_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.out(attended)
        return x + self.mlp(self.norm2(x))


class ImageEncoder(nn.Module):
    """Input view (b, 3, H, W) in [0, 1] to tokens (b, grid^2, token_dim)."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        stem: list[nn.Module] = []
        before = 3
        for channels in spec.stem_channels:
            stem += [
                nn.Conv2d(before, channels, 4, stride=2, padding=1),
                nn.GroupNorm(8, channels),
                nn.SiLU(),
            ]
            before = channels
        self.stem = nn.Sequential(*stem)
        self.project = nn.Conv2d(before, spec.token_dim, 1)
        self.position = nn.Parameter(torch.randn(1, spec.grid**2, spec.token_dim) * 0.02)
        self.blocks = nn.ModuleList(TokenBlock(spec.token_dim, spec.head_dim) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.token_dim)

    def forward(self, image: Tensor) -> Tensor:
        x = self.project(self.stem(image * 2.0 - 1.0)).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
