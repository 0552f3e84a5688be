"""MACs, params and activations in closed form, per block and per network. Needs no torch.

These are the product's numbers. `lowsearch.model.counters` counts the built modules with three public tools as a cross-check: torch's
FlopCounterMode agrees exactly, the others have gaps that are stated there. All counts are for one image (batch 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from lowsearch.arch import Arch, Block, ConvBranch, Downsampler, Head, Lowtention, Mlp, StemConv


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a block or network costs, whatever the device."""

    macs: int = 0
    """Multiply-adds of convolutions, transposed convolutions, linear layers and attention's two matrix products. FLOPs = 2 x MACs.
    Norms, activation functions, softmax and additions are not counted."""
    params: int = 0
    """Learned weights, norms included; running statistics are not."""
    activations: int = 0
    """Output elements of the same operations that `macs` counts."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            macs=self.macs + other.macs,
            params=self.params + other.params,
            activations=self.activations + other.activations,
        )


class BlockCost(NamedTuple):
    """One block of a network at its place."""

    place: str
    block: Block
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchCost:
    """Cost of a network: the sum, and block by block in the order they run."""

    macs: int
    params: int
    activations: int
    per_block: tuple[BlockCost, ...]


def count(arch: Arch) -> ArchCost:
    """Cost of `arch` at its own resolution and number of classes."""
    per_block = tuple(BlockCost(place, block, of_block(block)) for place, block in arch.named_blocks())
    total = sum((item.cost for item in per_block), Cost())
    return ArchCost(macs=total.macs, params=total.params, activations=total.activations, per_block=per_block)


@cache
def of_block(block: Block) -> Cost:
    """Cost of one block at its input shape."""
    match block:
        case StemConv():
            out_px = _ceil_div(block.resolution_px, block.stride)
            return _conv(out_px, 3, block.out_channels, kernel=3) + _norm(block.out_channels)
        case ConvBranch():
            return _mbconv(
                block.resolution_px, block.channels, block.channels, fused=block.fused, expansion=block.expansion,
                kernel=block.kernel, stride=1, groups=block.groups, bias=block.bias,
            )  # fmt: skip
        case Downsampler():
            return _mbconv(
                block.resolution_px, block.in_channels, block.out_channels, fused=block.fused, expansion=block.expansion,
                kernel=3, stride=2, groups=block.groups, bias=False,
            )  # fmt: skip
        case Lowtention():
            return _lowtention(block)
        case Mlp():
            px, hidden = block.resolution_px, block.channels * block.ratio
            return (
                _norm(block.channels)
                + _conv(px, block.channels, hidden, kernel=1, bias=True)
                + _conv(px, hidden, block.channels, kernel=1, bias=True)
            )
        case Head():
            return (
                _conv(block.resolution_px, block.channels, block.conv_width, kernel=1)
                + _norm(block.conv_width)
                + _conv(1, block.conv_width, block.linear_width, kernel=1)  # a linear layer is a 1x1 convolution on one pixel
                + _norm(block.linear_width)
                + _conv(1, block.linear_width, block.num_classes, kernel=1, bias=True)
            )


def _mbconv(
    px: int, c_in: int, c_out: int, *, fused: bool, expansion: int, kernel: int, stride: int, groups: int, bias: bool
) -> Cost:  # fmt: skip
    hidden, out_px = c_in * expansion, _ceil_div(px, stride)
    last = _conv(out_px, hidden, c_out, kernel=1) + _norm(c_out)
    if fused:
        return _conv(out_px, c_in, hidden, kernel=kernel, groups=groups, bias=bias) + _norm(hidden) + last
    first = _conv(px, c_in, hidden, kernel=1, groups=groups, bias=bias)
    return first + _conv(out_px, hidden, hidden, kernel=kernel, groups=hidden, bias=bias) + last


def _lowtention(block: Lowtention) -> Cost:
    c, inner, px, s = block.channels, block.inner_channels, block.attention_px, block.stride
    tokens = px * px
    products = Cost(macs=2 * block.heads * tokens * tokens * block.head_dim, activations=block.heads * tokens * (tokens + block.head_dim))
    cost = _norm(c) if block.norm else Cost()
    cost += _conv(px, c, c, kernel=block.kernel, groups=c) + _norm(c)
    cost += _conv(px, c, 3 * inner, kernel=1) + products
    kernel = 2 * s if s > 1 else 3
    match block.projection:
        case "fused":
            return cost + _transposed_conv(px, inner, c, kernel=kernel, stride=s)
        case "unfused":
            return cost + _conv(px, inner, c, kernel=1, bias=True) + _transposed_conv(px, c, c, kernel=kernel, stride=s, groups=c)
        case "nearest":
            return cost + _conv(px, inner, c, kernel=1, bias=True)


def _conv(out_px: int, c_in: int, c_out: int, *, kernel: int, groups: int = 1, bias: bool = False) -> Cost:
    weights, out_pixels = c_in // groups * c_out * kernel * kernel, out_px * out_px
    return Cost(macs=out_pixels * weights, params=weights + bias * c_out, activations=out_pixels * c_out)


def _transposed_conv(in_px: int, c_in: int, c_out: int, *, kernel: int, stride: int, groups: int = 1) -> Cost:
    """With bias, and padded so that the output is exactly `stride` times as large. Every input pixel meets every weight once."""
    weights, out_px = c_in * (c_out // groups) * kernel * kernel, in_px * stride
    return Cost(macs=in_px * in_px * weights, params=weights + c_out, activations=out_px * out_px * c_out)


def _norm(channels: int) -> Cost:
    return Cost(params=2 * channels)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
