"""The supernet's weights: one store from which every network of a space cuts its own.

Once-for-all networks (arXiv 1908.09791, BigNAS 2003.11142) share weights by nesting. Here the sharing is one mapping: for every parameter
of `build_model(arch)`, which tensor of the store it is cut from, and where (`cuts_of`). The forward pass and the inheritance of weights
both follow it, so no layer is written twice, and a network taken out computes what it computed inside. What is nested in what:

- A place of `Arch.named_blocks()` has weights of its own: a shallower network is the first blocks of a deeper one.
- Channels are the first so many. Of queries, keys and values, the first heads, and of each the first channels.
- Fused and unfused convolutions, numbers of groups, and projections are other functions: each has its own tensors.
- In groups, each group takes its first hidden channels, and reads the columns of the channels that are its own at that width.
- A smaller kernel is the middle of a larger one; a 2x2 kernel is those four taps that lie where its uneven padding puts it.
- BatchNorm's scales are shared, its running statistics are not: no two networks have the same ones. They are estimated anew
  (`train.supernet.inherit`); inside the supernet every batch has its own.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowsearch.arch import Arch, Block, ConvBranch, Downsampler, Head, Lowtention, Mlp, StemConv
from lowsearch.errors import CheckpointError
from lowsearch.model.blocks import build_block, init_weights
from lowsearch.model.lowformer import LowFormer
from lowsearch.space import SearchSpace

Piece = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Taps:
    """An axis of a `kernel` wide convolution kernel, cut from one at least as wide so that both look at the same pixels."""

    kernel: int
    stride: int

    def within(self, stored: int) -> slice:
        if self.kernel % 2 == stored % 2:
            start = (stored - self.kernel) // 2
        else:  # 2x2: padded left and top at stride 1, right and bottom (if at all) at stride 2; see `blocks.convolve`
            start = stored // 2 - (self.kernel // 2 if self.stride == 1 else 0)
        return slice(start, start + self.kernel)


Axis = int | Taps
"""The first so many, or taps."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a parameter is cut out of the tensor `key` of the store."""

    key: str
    axes: tuple[Axis, ...]
    shape: tuple[int, ...]
    """Of the parameter, which merges axes: those of heads, of queries, keys and values, of groups."""
    groups: int = 1
    """Above 1: axis 0 are the groups and axis 2 the columns of one, and group i reads the i-th share of the columns."""

    @property
    def extent(self) -> tuple[int, ...]:
        """The least shape of the stored tensor."""
        sizes = [axis.kernel if isinstance(axis, Taps) else axis for axis in self.axes]
        if self.groups > 1:
            sizes[2] *= self.groups
        return tuple(sizes)

    def pieces(self, stored: tuple[int, ...]) -> list[Piece]:
        """The parts of a tensor of shape `stored` that make the parameter, in order, along the first axis."""
        whole = [axis.within(size) if isinstance(axis, Taps) else slice(0, axis) for axis, size in zip(self.axes, stored, strict=True)]
        if self.groups == 1:
            return [tuple(whole)]
        columns = whole[2].stop
        return [
            (slice(i, i + 1), whole[1], slice(i * columns, (i + 1) * columns), *whole[3:]) for i in range(self.groups)
        ]  # fmt: skip


def cuts_of(block: Block) -> dict[str, Cut]:
    """Name of every parameter of `build_block(block)` -> its cut; keys are relative to the place of the block."""
    match block:
        case StemConv(out_channels=c):
            return _named({"conv.weight": (c, 3, 3, 3), "norm.weight": (c,), "norm.bias": (c,)})
        case ConvBranch():
            return _convolutions(
                block.channels, block.channels, block.fused, block.expansion, block.groups, Taps(block.kernel, 1), bias=block.bias
            )  # fmt: skip
        case Downsampler():
            return _convolutions(
                block.in_channels, block.out_channels, block.fused, block.expansion, block.groups, Taps(3, 2), bias=False
            )  # fmt: skip
        case Lowtention():
            return _attention(block)
        case Mlp(channels=c):
            hidden = c * block.ratio
            return _named(
                {"norm.weight": (c,), "norm.bias": (c,), "expand.weight": (hidden, c, 1, 1), "expand.bias": (hidden,)}
                | {"project.weight": (c, hidden, 1, 1), "project.bias": (c,)}
            )
        case Head(channels=c, conv_width=wide, linear_width=linear):
            return _named(
                {"conv.weight": (wide, c, 1, 1), "conv_norm.weight": (wide,), "conv_norm.bias": (wide,), "linear.weight": (linear, wide)}
                | {"linear_norm.weight": (linear,), "linear_norm.bias": (linear,)}
                | {"classifier.weight": (block.num_classes, linear), "classifier.bias": (block.num_classes,)}
            )


def _named(shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> dict[str, Cut]:
    """Parameters that are the first so many along every axis."""
    return {name: Cut(prefix + name, shape, shape) for name, shape in shapes.items()}


def _convolutions(c_in: int, c_out: int, fused: bool, expansion: int, groups: int, taps: Taps, *, bias: bool) -> dict[str, Cut]:
    """FusedMBConv or MBConv. Hidden channels are counted by group."""
    variant = f"{'fused' if fused else 'unfused'}.g{groups}."
    hidden, in_group = c_in * expansion, c_in * expansion // groups
    k, of_group = taps.kernel, (groups, in_group)
    columns = c_in // groups
    pointwise = {"expand.weight": Cut(f"{variant}expand.weight", (*of_group, columns, 1, 1), (hidden, columns, 1, 1), groups)}
    full = {"expand.weight": Cut(f"{variant}expand.weight", (*of_group, columns, taps, taps), (hidden, columns, k, k), groups)}
    depthwise = {"depthwise.weight": Cut(f"{variant}depthwise.weight", (*of_group, 1, taps, taps), (hidden, 1, k, k))}
    by_hidden = ("expand_norm.weight", "expand_norm.bias") if fused else ()
    biases = ("expand.bias",) if fused else ("expand.bias", "depthwise.bias")
    return {
        **(full if fused else pointwise | depthwise),
        **{name: Cut(variant + name, of_group, (hidden,)) for name in (*by_hidden, *(biases if bias else ()))},
        "project.weight": Cut(f"{variant}project.weight", (c_out, *of_group, 1, 1), (c_out, hidden, 1, 1)),
        **_named({"project_norm.weight": (c_out,), "project_norm.bias": (c_out,)}, variant),
    }


def _attention(block: Lowtention) -> dict[str, Cut]:
    c, inner, taps = block.channels, block.inner_channels, Taps(block.kernel, block.stride)
    of_head = (block.heads, block.head_dim)
    side = 2 * block.stride if block.stride > 1 else 3
    cuts = {
        **(_named({"norm.weight": (c,), "norm.bias": (c,)}) if block.norm else {}),
        "depthwise.weight": Cut("depthwise.weight", (c, 1, taps, taps), (c, 1, block.kernel, block.kernel)),
        **_named({"depthwise_norm.weight": (c,), "depthwise_norm.bias": (c,)}),
        "qkv.weight": Cut("qkv.weight", (block.heads, 3, block.head_dim, c, 1, 1), (3 * inner, c, 1, 1)),
    }
    by_projection, by_stride = f"{block.projection}.", f"{block.projection}.s{block.stride}."
    if block.projection != "fused":
        cuts["project.weight"] = Cut(f"{by_projection}project.weight", (c, *of_head, 1, 1), (c, inner, 1, 1))
        cuts |= _named({"project.bias": (c,)}, by_projection)
    if block.projection == "fused":
        cuts["upsample.weight"] = Cut(f"{by_stride}upsample.weight", (*of_head, c, side, side), (inner, c, side, side))
    elif block.projection == "unfused":
        cuts |= _named({"upsample.weight": (c, 1, side, side)}, by_stride)
    if block.projection != "nearest":
        cuts |= _named({"upsample.bias": (c,)}, by_stride)
    return cuts


class Supernet:
    """The shared weights of all networks of a space."""

    def __init__(self, space: SearchSpace, *, seed: int = 0, device: str = "cpu") -> None:
        """Initialised as `build_model` initialises the largest network that uses a weight."""
        self.space = space
        extents: dict[str, list[int]] = {}
        for place, blocks in space.places.items():
            # In one order in every process: gradients are exchanged by it.
            for cut in dict.fromkeys(cut for block in blocks for cut in cuts_of(block).values()):
                known = extents.setdefault(f"{place}.{cut.key}", [0] * len(cut.axes))
                known[:] = map(max, known, cut.extent)
        self.weights: dict[str, Tensor] = {key: torch.zeros(extent) for key, extent in extents.items()}
        """Leaves that hold gradients; a key is the place, the variant where there are several, and the parameter."""
        generator = torch.Generator().manual_seed(seed)
        for place, blocks in space.places.items():
            for block in self._largest(place, blocks):
                with torch.device("meta"):
                    module = build_block(block)
                module.to_empty(device="cpu")
                init_weights(module, generator=generator)
                self._put(place, block, dict(module.named_parameters()))
        self.weights = {key: value.to(device).requires_grad_() for key, value in self.weights.items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over `weights` of a supernet of the same space. Raises CheckpointError where they are of another."""
        for key, own in self.weights.items():
            if key not in weights or weights[key].shape != own.shape:
                raise CheckpointError(f"weight {key} of the supernet is missing or of another shape", hint="train the supernet again")
        with torch.no_grad():
            for key, own in self.weights.items():
                own.copy_(weights[key])

    def cut(self, arch: Arch) -> dict[str, Tensor]:
        """Name of every parameter of `build_model(arch)` -> its part of the store; gradients flow back. Raises NotInSpaceError."""
        self.space.encode(arch)
        parameters = {}
        for place, block in arch.named_blocks():
            for name, cut in cuts_of(block).items():
                stored = self.weights[f"{place}.{cut.key}"]
                pieces = [stored[piece] for piece in cut.pieces(tuple(stored.shape))]
                parameter = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                # Contiguous, as in a network of its own, so that the same kernels run on the same layout.
                parameters[f"{place}.{name}"] = parameter.reshape(cut.shape).contiguous()
        return parameters

    def logits(self, arch: Arch, x: Tensor) -> Tensor:
        """What the network `arch` inside the supernet makes of images (n, 3, px, px): (n, num_classes), normalised by batch statistics."""
        with torch.device("meta"):
            shell = LowFormer(arch)
        for part in shell.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.track_running_stats = False
                part.running_mean = part.running_var = part.num_batches_tracked = None
        return functional_call(shell, self.cut(arch), (x,), strict=True)

    def subnet(self, arch: Arch) -> LowFormer:
        """The network `arch` on its own, on the CPU, with a copy of its weights. BatchNorm's statistics are those of a fresh one."""
        with torch.device("meta"):
            model = LowFormer(arch)
        model.to_empty(device="cpu")
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.reset_running_stats()
        statistics = dict(model.named_buffers())
        model.load_state_dict({**statistics, **{key: value.detach() for key, value in self.cut(arch).items()}}, strict=True)
        return model

    @torch.no_grad()
    def _put(self, place: str, block: Block, parameters: Mapping[str, Tensor]) -> None:
        for name, cut in cuts_of(block).items():
            stored = self.weights[f"{place}.{cut.key}"]
            pieces = cut.pieces(tuple(stored.shape))
            merged = parameters[name].reshape(tuple(a.kernel if isinstance(a, Taps) else a for a in cut.axes))
            for piece, part in zip(pieces, merged.split(1) if len(pieces) > 1 else [merged], strict=True):
                stored[piece] = part

    def _largest(self, place: str, blocks: Iterable[Block]) -> list[Block]:
        """Blocks that together use every weight of `place`, smaller ones first: those that lie within no other."""
        by_keys: dict[frozenset[str], list[tuple[int, Block, dict[str, list[Piece]]]]] = defaultdict(list)
        seen = set()
        for block in blocks:
            cuts = cuts_of(block)
            if (signature := tuple(cuts.items())) in seen:  # the same block at another resolution
                continue
            seen.add(signature)
            regions = {cut.key: cut.pieces(tuple(self.weights[f"{place}.{cut.key}"].shape)) for cut in cuts.values()}
            size = sum(math.prod(cut.shape) for cut in cuts.values())
            by_keys[frozenset(regions)].append((size, block, regions))
        chosen = []
        for group in by_keys.values():
            group.sort(key=lambda row: row[0], reverse=True)
            kept: list[tuple[int, Block, dict[str, list[Piece]]]] = []
            for row in group:
                if not any(_lies_within(row[2], other[2]) for other in kept):
                    kept.append(row)
            chosen += kept
        return [block for _, block, _ in sorted(chosen, key=lambda row: row[0])]


def _lies_within(inner: Mapping[str, list[Piece]], outer: Mapping[str, list[Piece]]) -> bool:
    return all(
        small.start >= large.start and small.stop <= large.stop
        for key, pieces in inner.items()
        for small, large in zip(itertools.chain(*pieces), itertools.chain(*outer[key]), strict=True)
    )
