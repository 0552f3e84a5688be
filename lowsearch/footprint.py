"""What an exported network weighs as a file, and what it needs in memory while it runs, in closed form per block. Needs no torch.

Both are of the network as `latency.onnx_runtimes.export_onnx` writes it: every BatchNorm folded into the convolution before it.

**Artifact**: the bytes of the weights in the ONNX file. Beside them the file holds its graph, which no weight makes larger: 0.4 to 4 KB
a block; in int8, where every tensor has its scale, up to 25 KB. At int8 a kernel takes one byte a weight and five a channel (its scale and
zero point), a bias twelve a channel.

**Peak memory**: the weights and the largest sum of activations alive at once in one forward pass. Operators run one by one: each output
is allocated while its inputs live, nothing is computed in place, and a tensor is freed after its last use; attention is two products
and a softmax, a convolution pads as it reads. What lives while one block runs depends on that block alone (its input, which a residual
branch keeps to its end, and what it computes), so the peak of a network is its weights plus the largest peak of its blocks. A runtime
that fuses or reuses needs less, one that keeps workspaces or unpacked weights more. Activations at int8 count four bytes: ONNX Runtime
computes the activation functions between its 8-bit operators in fp32.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

from lowsearch.arch import Arch, Block, ConvBranch, Downsampler, Head, Lowtention, Mlp, StemConv

Precision = Literal["fp32", "fp16", "bf16", "int8"]
MB = 1_000_000
"""Bytes of a megabyte in every `_mb` of lowsearch."""
WEIGHT_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
ACTIVATION_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 4}


def artifact_mb(arch: Arch, *, precision: Precision = "fp32") -> float:
    """Megabytes of the weights of `arch` in its ONNX file."""
    return sum(weight_bytes(block, precision) for block in arch.blocks()) / MB


def peak_memory_mb(arch: Arch, *, precision: Precision = "fp32", batch: int = 1) -> float:
    """Megabytes that one forward pass of `arch` on `batch` images holds at its peak, weights and input included."""
    activations = max(map(peak_elements, arch.blocks())) * batch * ACTIVATION_BYTES[precision]
    return artifact_mb(arch, precision=precision) + activations / MB


@cache
def weight_bytes(block: Block, precision: Precision) -> int:
    """Bytes of the weights of `block` in an ONNX file."""
    layers, norm_weights = _layers(block)
    size = WEIGHT_BYTES[precision]
    if precision == "int8":
        return norm_weights + sum(layer.weights + layer.int8_channel_bytes * layer.channels for layer in layers)
    return size * (norm_weights + sum(layer.weights + layer.bias * layer.channels for layer in layers))


@cache
def peak_elements(block: Block) -> int:
    """The most elements of activations that live at once while `block` runs on one image, its input and output among them."""
    match block:
        case StemConv():
            image, out = _map(3, block.resolution_px), _map(block.out_channels, block.out_px)
            return max(image + out, 2 * out)
        case ConvBranch():
            x = _map(block.channels, block.resolution_px)
            return x + 2 * block.expansion * x  # The activation function between the convolutions, x kept for the sum.
        case Mlp():
            x = _map(block.channels, block.resolution_px)
            return x + 2 * block.ratio * x
        case Downsampler():
            hidden = block.in_channels * block.expansion
            x, reduced = _map(block.in_channels, block.resolution_px), _map(hidden, block.out_px)
            last = max(2 * reduced, reduced + _map(block.out_channels, block.out_px))
            if block.fused:
                return max(x + reduced, last)
            full = _map(hidden, block.resolution_px)
            return max(x + full, 2 * full, full + reduced, last)
        case Lowtention():
            return _map(block.channels, block.resolution_px) + _attention_peak(block)
        case Head():
            x, features = _map(block.channels, block.resolution_px), _map(block.conv_width, block.resolution_px)
            linear = block.linear_width + max(block.conv_width, block.linear_width, block.num_classes)
            return max(x + features, 2 * features, features + block.conv_width, linear)


def _attention_peak(block: Lowtention) -> int:
    """Beside the block's input, which is kept for the sum."""
    a, px, inner = block.attention_px, block.resolution_px, _map(block.inner_channels, block.attention_px)
    x, reduced, raised = (_map(block.channels, side) for side in (px, a, a * block.stride))
    scores = block.heads * a**4
    qkv = 3 * inner  # Queries, keys and values are views of one tensor, alive until the values are weighted.
    steps = [
        (x if block.norm else 0) + reduced,
        reduced + qkv,
        qkv + inner + scores,  # The scaled queries, and the scores they give; then the output beside the softmax.
        qkv + 2 * scores,
        raised + x,
    ]
    if block.projection == "fused":
        return max(*steps, inner + raised)
    return max(*steps, inner + reduced, reduced + raised if block.projection == "unfused" or block.stride > 1 else 0)


class _Layer(NamedTuple):
    weights: int
    channels: int
    """Of its output."""
    bias: bool
    """Also where only the BatchNorm after it makes one."""
    per_channel: bool = True
    """Whether int8 gives every channel a scale: ONNX Runtime's quantiser does not in a grouped transposed convolution."""

    @property
    def int8_channel_bytes(self) -> int:
        """What a channel takes beside its weights: for the kernel a scale and an 8-bit zero point, for the bias 32 bits and its own two."""
        return (5 + 12 * self.bias) if self.per_channel else 4 * self.bias


def _layers(block: Block) -> tuple[list[_Layer], int]:
    """The convolutions and linear layers of `block` once its BatchNorms are folded, and how many weights its other norms have."""
    match block:
        case StemConv():
            return [_Layer(27 * block.out_channels, block.out_channels, True)], 0
        case ConvBranch():
            return _mbconv(block, block.channels, block.channels, kernel=block.kernel, bias=block.bias), 0
        case Downsampler():
            return _mbconv(block, block.in_channels, block.out_channels, kernel=3, bias=False), 0
        case Mlp():
            c, hidden = block.channels, block.channels * block.ratio
            return [_Layer(c * hidden, hidden, True), _Layer(hidden * c, c, True)], 2 * c
        case Lowtention():
            c, inner, area = block.channels, block.inner_channels, (2 * block.stride if block.stride > 1 else 3) ** 2
            first = [_Layer(block.kernel**2 * c, c, True), _Layer(c * 3 * inner, 3 * inner, False)]
            last = {
                "fused": [_Layer(inner * c * area, c, True)],
                "unfused": [_Layer(inner * c, c, True), _Layer(c * area, c, True, per_channel=False)],
                "nearest": [_Layer(inner * c, c, True)],
            }
            return first + last[block.projection], 2 * c * block.norm
        case Head():
            c, wide, linear, classes = block.channels, block.conv_width, block.linear_width, block.num_classes
            return [_Layer(c * wide, wide, True), _Layer(wide * linear, linear, False), _Layer(linear * classes, classes, True)], 2 * linear


def _mbconv(block: ConvBranch | Downsampler, c_in: int, c_out: int, *, kernel: int, bias: bool) -> list[_Layer]:
    hidden = c_in * block.expansion
    last = _Layer(hidden * c_out, c_out, True)
    if block.fused:
        return [_Layer(c_in // block.groups * hidden * kernel**2, hidden, True), last]
    return [_Layer(c_in // block.groups * hidden, hidden, bias), _Layer(hidden * kernel**2, hidden, bias), last]


def _map(channels: int, px: int) -> int:
    return channels * px * px
