"""ReLU-linear attention, which Lowtention is compared with. Not part of the search space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowsearch.model.blocks import conv2d


class LinearAttention(nn.Module):
    """Multi-scale linear attention of EfficientViT (arXiv 2205.14756, section 3.1) with one 5x5 aggregation, as a residual branch.

    Queries, keys and values are taken as they are and once more aggregated over 5x5 pixels. With ReLU in place of softmax the product
    of keys and values is formed first, so that cost grows with the pixels and not with their square.
    Maps (n, channels, height, width) to the same shape; `head_dim` divides `channels`.
    """

    def __init__(self, channels: int, *, head_dim: int = 16) -> None:
        super().__init__()
        assert channels % head_dim == 0, f"head_dim {head_dim} does not divide {channels} channels"
        self.head_dim = head_dim
        self.qkv = conv2d(channels, 3 * channels, 1)
        self.aggregate = conv2d(3 * channels, 3 * channels, 5, groups=3 * channels)
        self.mix = conv2d(3 * channels, 3 * channels, 1, groups=3 * channels // head_dim)
        self.project = conv2d(2 * channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        qkv = self.qkv(x)
        both = torch.cat([qkv, self.mix(self.aggregate(qkv))], dim=1)
        q, k, v = both.reshape(batch, -1, 3 * self.head_dim, height * width).split(self.head_dim, dim=2)
        q, k = F.relu(q), F.relu(k)
        # Values get a row of ones: its product with the keys is what each query's weights sum to.
        v = F.pad(v, (0, 0, 0, 1), value=1.0)
        out = torch.matmul(torch.matmul(v, k.transpose(-2, -1)), q)
        out = out[:, :, :-1] / (out[:, :, -1:] + 1e-6)
        return x + self.norm(self.project(out.reshape(batch, -1, height, width)))
