"""The torch module of every Block kind. What each computes is described on the Block's class in `lowsearch.arch`.

Tensors are (batch, channels, height, width). A module is built for one Block, but runs at any input size: sizes come from the
input. Residual branches add their input themselves, so a module is exactly one Block and one row of a latency table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowsearch.arch import Block, ConvBranch, Downsampler, Head, Lowtention, Mlp, StemConv


def build_block(block: Block, *, mlp_dropout: float = 0.0) -> nn.Module:
    """Module of exactly `block`, its residual addition included, with torch's default random weights.

    Maps (n, input channels, resolution_px, resolution_px) to (n, out_channels, out_px, out_px), the head to (n, num_classes).
    """
    match block:
        case StemConv():
            return StemConvModule(block)
        case ConvBranch():
            convs = FusedMBConv if block.fused else MBConv
            return convs(
                block.channels, block.channels, expansion=block.expansion, kernel=block.kernel, groups=block.groups,
                bias=block.bias, residual=True,
            )  # fmt: skip
        case Downsampler():
            convs = FusedMBConv if block.fused else MBConv
            return convs(
                block.in_channels, block.out_channels, expansion=block.expansion, stride=2, groups=block.groups, residual=False
            )  # fmt: skip
        case Lowtention():
            return LowtentionModule(block)
        case Mlp():
            return MlpModule(block, dropout=mlp_dropout)
        case Head():
            return HeadModule(block)


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes the branch of a random `rate` of the images and rescales the others."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=x.dtype) >= self.rate
        return x * kept / (1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def conv2d(c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """Convolution to ceil(size / stride), odd kernels padded evenly. One that may be 2x2 runs through `convolve`, which pads it."""
    return nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2 if kernel % 2 else 0, groups=groups, bias=bias)


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv` on `x`; for a 2x2 kernel with the zeros it needs: left and top at stride 1, right and bottom to an even size at stride 2."""
    if conv.kernel_size != (2, 2):
        return conv(x)
    if conv.stride == (1, 1):
        left = top = True
        right = bottom = False
    else:
        left = top = False
        right, bottom = bool(x.shape[-1] % 2), bool(x.shape[-2] % 2)
        if not (right or bottom):
            return conv(x)
    if torch.onnx.is_in_onnx_export() and torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        pads = (int(top), int(left), int(bottom), int(right))
        return _UnevenlyPaddedConv.apply(x, conv.weight, conv.bias, conv.stride[0], conv.groups, pads)
    return conv(F.pad(x, (int(left), int(right), int(top), int(bottom))))


class _UnevenlyPaddedConv(torch.autograd.Function):
    """ONNX convolutions pad each side on its own, torch's do not. One node instead of two: on a CPU a separate padding makes ONNX Runtime
    leave its blocked layout, which costs 30 to 50 % of an MBConv (measured; torch's newer exporter merges the two by itself)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int, pads: tuple[int, int, int, int]
    ) -> Tensor:
        top, left, bottom, right = pads
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride=stride, groups=groups)

    @staticmethod
    def symbolic(g: Any, x: Any, weight: Any, bias: Any, stride: int, groups: int, pads: tuple[int, int, int, int]) -> Any:
        inputs = (x, weight) if bias is None or bias.node().mustBeNone() else (x, weight, bias)
        return g.op(
            "Conv", *inputs, kernel_shape_i=(2, 2), strides_i=(stride, stride), pads_i=pads, dilations_i=(1, 1), group_i=groups
        )  # fmt: skip


class StemConvModule(nn.Module):
    def __init__(self, block: StemConv) -> None:
        super().__init__()
        self.conv = conv2d(3, block.out_channels, 3, stride=block.stride)
        self.norm = nn.BatchNorm2d(block.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.norm(self.conv(x)))


class FusedMBConv(nn.Module):
    """Residual branch or downsampler with one full convolution instead of MBConv's pointwise and depthwise pair."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        expansion: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        residual: bool,
    ) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.expand = conv2d(c_in, hidden, kernel, stride=stride, groups=groups, bias=bias)
        self.expand_norm = nn.BatchNorm2d(hidden)
        self.project = conv2d(hidden, c_out, 1)
        self.project_norm = nn.BatchNorm2d(c_out)
        self.drop_path = DropPath() if residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.expand_norm(convolve(self.expand, x)))
        y = self.project_norm(self.project(y))
        return y if self.drop_path is None else x + self.drop_path(y)


class MBConv(nn.Module):
    """Residual branch or downsampler with a depthwise convolution; only the last convolution has a BatchNorm."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        expansion: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        residual: bool,
    ) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.expand = conv2d(c_in, hidden, 1, groups=groups, bias=bias)
        self.depthwise = conv2d(hidden, hidden, kernel, stride=stride, groups=hidden, bias=bias)
        self.project = conv2d(hidden, c_out, 1)
        self.project_norm = nn.BatchNorm2d(c_out)
        self.drop_path = DropPath() if residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.expand(x))
        y = F.hardswish(convolve(self.depthwise, y))
        y = self.project_norm(self.project(y))
        return y if self.drop_path is None else x + self.drop_path(y)


class LowtentionModule(nn.Module):
    """Attention at reduced resolution and width, between a strided depthwise convolution and an upsampling projection."""

    def __init__(self, block: Lowtention) -> None:
        super().__init__()
        c, inner, s = block.channels, block.inner_channels, block.stride
        self.heads = block.heads
        self.head_dim = block.head_dim
        self.norm = nn.GroupNorm(1, c) if block.norm else None
        self.depthwise = conv2d(c, c, block.kernel, stride=s, groups=c)
        self.depthwise_norm = nn.BatchNorm2d(c)
        self.qkv = conv2d(c, 3 * inner, 1)
        # Kernel and padding that make the output exactly `stride` times as large.
        kernel, padding = (2 * s, s // 2) if s > 1 else (3, 1)
        fused = block.projection == "fused"
        self.project = None if fused else conv2d(inner, c, 1, bias=True)
        self.upsample = (
            None
            if block.projection == "nearest"
            else nn.ConvTranspose2d(inner if fused else c, c, kernel, stride=s, padding=padding, groups=1 if fused else c)
        )
        self.nearest_factor = s if block.projection == "nearest" else 1
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        y = x if self.norm is None else self.norm(x)
        y = self.qkv(self.depthwise_norm(convolve(self.depthwise, y)))
        y = self._attend(y)
        if self.project is not None:
            y = self.project(y)
        if self.upsample is not None:
            y = self.upsample(y)
        if self.nearest_factor > 1:
            y = F.interpolate(y, scale_factor=float(self.nearest_factor), mode="nearest")
        if y.shape[-2] != height or y.shape[-1] != width:  # a map that the stride does not divide overshoots
            y = y[..., :height, :width]
        return x + self.drop_path(y)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Softmax attention of every pixel over all pixels. Each head's channels are its queries, keys, values in this order."""
        batch, _, height, width = qkv.shape
        q, k, v = qkv.reshape(batch, self.heads, 3 * self.head_dim, height * width).split(self.head_dim, dim=2)
        if torch.onnx.is_in_onnx_export():
            # The same two products as plain nodes: values stay channels-first, and a runtime folds the transposes into its products.
            scores = torch.matmul(q.transpose(-2, -1) * (1.0 / math.sqrt(self.head_dim)), k)
            out = torch.matmul(v, scores.softmax(dim=-1).transpose(-2, -1))
        else:
            out = F.scaled_dot_product_attention(q.transpose(-2, -1), k.transpose(-2, -1), v.transpose(-2, -1)).transpose(-2, -1)
        return out.reshape(batch, self.heads * self.head_dim, height, width)


class MlpModule(nn.Module):
    def __init__(self, block: Mlp, *, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = block.channels * block.ratio
        self.norm = nn.GroupNorm(1, block.channels)
        self.expand = conv2d(block.channels, hidden, 1, bias=True)
        self.project = conv2d(hidden, block.channels, 1, bias=True)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(F.gelu(self.expand(self.norm(x))))
        return x + self.drop_path(self.dropout(y))


class HeadModule(nn.Module):
    def __init__(self, block: Head) -> None:
        super().__init__()
        self.conv = conv2d(block.channels, block.conv_width, 1)
        self.conv_norm = nn.BatchNorm2d(block.conv_width)
        self.linear = nn.Linear(block.conv_width, block.linear_width, bias=False)
        self.linear_norm = nn.LayerNorm(block.linear_width)
        self.classifier = nn.Linear(block.linear_width, block.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv_norm(self.conv(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        x = F.hardswish(self.linear_norm(self.linear(x)))
        return self.classifier(x)


@torch.no_grad()
def init_weights(module: nn.Module, *, generator: torch.Generator | None = None) -> None:
    """Initialise every weight and running statistic for training; every residual branch starts as the identity.

    Without the identity a short training misjudges attention: its branches start as noise on top of the features, and larger
    networks train worse than smaller ones. The layer that closes each residual branch starts at zero, all others as usual.
    """
    for part in module.modules():
        match part:
            case nn.ConvTranspose2d():
                _normal(part.weight, 1.0 / math.sqrt(part.in_channels // part.groups), generator)
            case nn.Conv2d():
                fan_out = part.out_channels // part.groups * part.kernel_size[0] * part.kernel_size[1]
                _normal(part.weight, math.sqrt(2.0 / fan_out), generator)
            case nn.Linear():
                nn.init.trunc_normal_(part.weight, std=0.02, a=-0.04, b=0.04, generator=generator)
            case nn.BatchNorm2d():
                part.reset_parameters()  # the running statistics as well
            case nn.GroupNorm() | nn.LayerNorm():
                part.reset_parameters()
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    for part in module.modules():
        match part:
            case FusedMBConv() | MBConv() if part.drop_path is not None:
                nn.init.zeros_(part.project_norm.weight)
            case LowtentionModule():
                _normal(part.qkv.weight, 1.0 / math.sqrt(part.qkv.in_channels), generator)
                _zero(part.upsample or part.project)
            case MlpModule():
                _normal(part.expand.weight, 1.0 / math.sqrt(part.expand.in_channels), generator)
                _zero(part.project)


@torch.no_grad()
def randomise(module: nn.Module, *, seed: int) -> None:
    """Fill every weight, norm and running statistic with random values that keep activations near one.

    For comparing two implementations: a fresh or trained module may hold exact zeros and ones, and then the comparison proves nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue  # BatchNorm's count of batches
        if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.ndim == 1:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
        else:
            value.copy_(torch.randn(value.shape, generator=generator) / math.sqrt(value[0].numel()))


def _normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    nn.init.normal_(weight, std=std, generator=generator)


def _zero(layer: nn.Module | None) -> None:
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
