"""Blocks as numbers, for the regression that predicts unmeasured ones and for spreading what is measured over their sizes.

Sizes enter as log2, so that distances are ratios and a power law is a line; switches as 0 or 1. The columns depend on the kind only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

import numpy as np

from lowsearch import cost
from lowsearch.arch import Block, ConvBranch, Downsampler, Head, Lowtention, Mlp, StemConv, input_channels

N_SIZES = 4
"""The first columns are what every kind has: MACs, parameters, activations, elements that enter."""


def block_features(blocks: Sequence[Block]) -> np.ndarray:
    """Features of `blocks`, all of one kind, (n, n_features)."""
    return np.array([[*_sizes(block), *_shape(block)] for block in blocks], dtype=float)


def _sizes(block: Block) -> list[float]:
    """What every kind has: the closed-form cost, and the tensors that enter and leave."""
    counted = cost.of_block(block)
    entering = input_channels(block) * block.resolution_px**2
    return [log2(counted.macs), log2(counted.params), log2(counted.activations), log2(entering)]


def _shape(block: Block) -> list[float]:
    match block:
        case StemConv():
            return [log2(block.out_channels), log2(block.resolution_px), float(block.stride)]
        case ConvBranch():
            convolution = [float(block.fused), log2(block.expansion), log2(block.groups), float(block.kernel), float(block.bias)]
            vectors = _vectors(block.channels, block.expansion, block.groups)
            return [log2(block.channels), log2(block.resolution_px), *convolution, *vectors]
        case Downsampler():
            convolution = [float(block.fused), log2(block.expansion), log2(block.groups)]
            vectors = _vectors(block.in_channels, block.expansion, block.groups)
            return [log2(block.in_channels), log2(block.out_channels), log2(block.resolution_px), *convolution, *vectors]
        case Lowtention():
            projection = [float(block.projection == name) for name in ("fused", "unfused", "nearest")]
            attention = [log2(block.attention_px), log2(block.heads), log2(block.head_dim), float(block.stride), float(block.kernel)]
            overshoots = float(block.resolution_px % block.stride > 0)  # The upsampled map is then cropped.
            return [log2(block.channels), log2(block.resolution_px), *attention, *projection, float(block.norm), overshoots]
        case Mlp():
            return [log2(block.channels), log2(block.resolution_px), log2(block.ratio)]
        case Head():
            widths = [log2(block.conv_width), log2(block.linear_width), log2(block.num_classes)]
            return [log2(block.channels), log2(block.resolution_px), *widths]


def _vectors(channels: int, expansion: int, groups: int) -> list[float]:
    """Whether a group's channels fill vectors of 8 and 16 numbers. Where they do not, a runtime takes another kernel: on one CPU this
    halved the error of predicted blocks."""
    return [float(c // groups % width > 0) for c in (channels, channels * expansion) for width in (8, 16)]
