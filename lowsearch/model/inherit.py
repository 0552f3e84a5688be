"""Pretrained starts: a network takes over what fits of another one's weights, by slicing and copying blocks.

A block inherits from the block at the same place: stage, position in the stage, branch. Every dimension of a weight is matched by what it
stands for, not by its position alone: residual channels (with their groups, where the source's convolutions are grouped), the hidden
channels of an expansion, heads and the channels within a head, kernel offsets, classes. Where both networks are the same, everything is
copied; a branch without a counterpart keeps its own initialisation, which is the identity for `init_weights`, so a deeper network
computes what its source does. What a wider network has beyond its source keeps its own initialisation too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowsearch.arch import Arch, Block, ConvBranch, Downsampler, Head, Lowtention, Mlp, StemConv
from lowsearch.errors import CheckpointError
from lowsearch.model.lowformer import LowFormer, build_model
from lowsearch.model.pretrained import CLASSIFIER, TIMM_NAMES, download, load_pretrained, preset_of, read_checkpoint, to_own_keys
from lowsearch.presets import PRESETS

_NONE = -1
"""In an index map: this element has no counterpart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """What a network took over."""

    source: str
    """Name of the source."""
    params: int
    """Parameters of the network."""
    copied_params: int
    """Those of them that hold a parameter of the source; zeros between its groups and around its smaller kernels do not count."""
    source_params: int
    blocks: Mapping[str, float]
    """Place of every block -> part of its parameters that was taken over, 0 to 1."""

    @property
    def share(self) -> float:
        """Part of the network's parameters that was taken over."""
        return self.copied_params / self.params

    @property
    def overlap(self) -> float:
        """Parameters in common, of all that either has: 1 for the same network. A far larger source covers everything, and computes
        something else once it is cut down; this prefers the source that is cut and extended least."""
        return self.copied_params / (self.params + self.source_params - self.copied_params)


@torch.no_grad()
def inherit_weights(model: LowFormer, source_model: LowFormer, *, source: str = "") -> Inherited:
    """Fill `model` with what fits of the weights of `source_model`, in place, and say what that was. `source`: its name, for the report."""
    state, theirs = model.state_dict(), source_model.state_dict()
    for key, pick in _picks(model.arch, source_model.arch).items():
        if key in state:
            pick.copy(theirs[key], state[key])
    return inheritance(model.arch, source_model.arch, source=source)


def inheritance(arch: Arch, source_arch: Arch, *, source: str = "") -> Inherited:
    """What `arch` would take over from `source_arch`, without any weights."""
    with torch.device("meta"):
        model, other = LowFormer(arch), LowFormer(source_arch)
    picks = _picks(arch, source_arch)
    total: dict[str, int] = {place: 0 for place, _ in arch.named_blocks()}
    copied = dict(total)
    for key, value in model.named_parameters():
        place = _place(key, total)
        total[place] += value.numel()
        if key in picks:
            copied[place] += picks[key].count(tuple(value.shape))
    return Inherited(
        source=source or source_arch.arch_id, params=sum(total.values()), copied_params=sum(copied.values()),
        source_params=sum(p.numel() for p in other.parameters()), blocks={place: copied[place] / total[place] for place in total},
    )  # fmt: skip


def nearest_published(arch: Arch) -> Inherited:
    """The published network with weights whose parameters `arch` shares most (`Inherited.overlap`)."""
    found = [inheritance(arch, dataclasses.replace(PRESETS[name], num_classes=arch.num_classes), source=name) for name in TIMM_NAMES]
    return max(found, key=lambda inherited: inherited.overlap)


def pretrained_start(arch: Arch, *, seed: int, weights: Path | None = None) -> tuple[LowFormer, Inherited]:
    """A network of `arch` that inherits published weights, and the report.

    From the nearest published network by timm's hub, or from the file `weights`: a checkpoint of any preset (ours, timm's or the authors'),
    or `model.safetensors` of `lowsearch train` with its arch.json beside it. What is not inherited is initialised by `seed`. A classifier
    for another number of classes starts afresh. Raises CheckpointError where the file fits no known network or the hub cannot be reached.
    """
    model = build_model(arch, seed=seed)
    if weights is None:
        name = nearest_published(arch).source
        source_arch = PRESETS[name]
        source_model = build_model(source_arch, seed=0)
        source_model.load_state_dict(to_own_keys(download(source_arch), source_model))
    else:
        name, source_model = _from_file(weights)
    return model, inherit_weights(model, source_model, source=name)


def _from_file(weights: Path) -> tuple[str, LowFormer]:
    """(name, network) of a file of weights. The network is that of the arch.json beside it, or the preset that the weights fit."""
    beside = weights.with_name("arch.json")
    if beside.is_file():
        arch = Arch.from_json(beside.read_text(encoding="utf-8"))
        return preset_of(arch) or arch.arch_id, build_model(arch, pretrained=weights)
    state = read_checkpoint(weights)
    classes = next((len(value) for key, value in state.items() if key.endswith(("classifier.weight", "classifier.linear.weight"))), 1000)
    reason = ""
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = LowFormer(dataclasses.replace(preset, num_classes=classes))
        try:
            own = to_own_keys(state, model)
            if all(own[key].shape == value.shape for key, value in model.state_dict().items()):
                filled = build_model(model.arch, seed=0)
                load_pretrained(filled, weights)
                return name, filled
        except CheckpointError as error:
            reason = error.message
    raise CheckpointError(
        f"{weights} fits no published network ({reason or 'shapes differ'})",
        hint="put the network's arch.json beside it, or give the weights of a preset",
    )


def _place(key: str, places: Mapping[str, object]) -> str:
    """The block that weight `key` belongs to."""
    return next(place for place in places if key.startswith(place + "."))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pick:
    """Where each element of one tensor comes from. Outputs and inputs are index maps into the source; `_NONE` is nowhere."""

    out: np.ndarray
    into: np.ndarray | None = None
    """None for tensors of one dimension."""
    groups: int = 1
    source_groups: int = 1
    source_sizes: tuple[int, int] = (1, 1)
    """Channels of the source's convolution, out and in."""
    offsets: tuple[int, int] | None = None
    """First offset of the kernel from its centre, here and in the source; None where there is no kernel to match."""
    source_kernel: int = 0
    transposed: bool = False
    """Weights of a transposed convolution lie as (in, out, k, k)."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Write the counterparts of `target`'s elements, all others stay."""
        if self.into is None:
            rows = torch.from_numpy(self.out >= 0).to(target.device)
            target[rows] = source[torch.from_numpy(self.out[self.out >= 0])].to(target.dtype)
            return
        if self.transposed and self.groups == 1:
            self._copy_dense(source.transpose(0, 1), target.transpose(0, 1))
            return
        dense = _dense(source, self.source_groups)
        whole = _dense(target, self.groups)
        self._copy_dense(dense, whole)
        target.copy_(_grouped(whole, self.groups))

    def _copy_dense(self, source: Tensor, target: Tensor) -> None:
        assert self.into is not None
        rows, columns = np.flatnonzero(self.out >= 0), np.flatnonzero(self.into >= 0)
        block = source[torch.from_numpy(self.out[rows])][:, torch.from_numpy(self.into[columns])].to(target.dtype)
        at = (torch.from_numpy(rows)[:, None], torch.from_numpy(columns)[None])
        if self.offsets is None:
            target[at] = block
            return
        # A larger kernel is zero where the smaller one does not reach; a smaller one keeps the taps at its own offsets.
        size, (low, high) = target.shape[-1], self._shared_taps(target.shape[-1])
        new = torch.zeros(*block.shape[:2], size, size, dtype=target.dtype)
        ours, theirs = (slice(low - first, high - first) for first in self.offsets)
        new[..., ours, ours] = block[..., theirs, theirs]
        target[at] = new

    def _shared_taps(self, size: int) -> tuple[int, int]:
        """First and last (exclusive) offset that a kernel of `size` and the source's have in common."""
        assert self.offsets is not None
        here, there = self.offsets
        return max(here, there), min(here + size, there + self.source_kernel)

    def count(self, shape: tuple[int, ...]) -> int:
        """Elements of a tensor of `shape` that hold one of the source."""
        if self.into is None:
            return int((self.out >= 0).sum())
        taps = int(np.prod(shape[2:]))
        if self.offsets is not None:
            low, high = self._shared_taps(shape[-1])
            taps = (high - low) ** 2
        each = [size // self.source_groups if self.source_groups > 1 else np.iinfo(int).max for size in self.source_sizes]
        rows, columns = (
            np.where(index >= 0, index // n, _NONE)  # the source's group that an element is of
            for index, n in zip((self.out, self.into), each, strict=True)
        )
        halves = zip(np.array_split(rows, self.groups), np.array_split(columns, self.groups), strict=True)
        return taps * sum(int((r == g).sum()) * int((c == g).sum()) for r, c in halves for g in range(self.source_groups))


def _dense(weight: Tensor, groups: int) -> Tensor:
    """A grouped convolution's (out, in / groups, ...) as (out, in, ...), zero between groups."""
    if groups == 1:
        return weight.clone()
    out, per_group = weight.shape[:2]
    dense = weight.new_zeros(out, per_group * groups, *weight.shape[2:])
    rows = out // groups
    for g in range(groups):
        dense[g * rows : (g + 1) * rows, g * per_group : (g + 1) * per_group] = weight[g * rows : (g + 1) * rows]
    return dense


def _grouped(dense: Tensor, groups: int) -> Tensor:
    """Inverse of `_dense`: what lies between groups is dropped."""
    if groups == 1:
        return dense
    rows, columns = (n // groups for n in dense.shape[:2])
    return torch.cat([dense[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)])


def _leading(n: int, n_source: int, groups: int = 1) -> np.ndarray:
    """Index map of the first channels; of the first of every group, where `groups` divide both."""
    if n % groups or n_source % groups:
        groups = 1
    each, each_source = n // groups, n_source // groups
    within = np.arange(each)
    one = np.where(within < each_source, within, _NONE)
    return np.concatenate([np.where(one >= 0, one + g * each_source, _NONE) for g in range(groups)])


def _nested(outer: tuple[int, int], inner: tuple[int, int], parts: int = 1) -> np.ndarray:
    """Index map of channels that lie as (outer, parts, inner), sizes given as (here, in the source): heads, q k v, channels of a head."""
    index = np.arange(outer[1] * parts * inner[1]).reshape(outer[1], parts, inner[1])
    found = np.full((outer[0], parts, inner[0]), _NONE)
    n, m = min(outer), min(inner)
    found[:n, :, :m] = index[:n, :, :m]
    return found.reshape(-1)


def _picks(arch: Arch, source_arch: Arch) -> dict[str, _Pick]:
    """Key of every tensor that inherits -> from where. Blocks of another kind or form than their counterpart have no entries."""
    sources = dict(source_arch.named_blocks())
    picks: dict[str, _Pick] = {}
    streams = _streams(arch, source_arch)
    for place, block in arch.named_blocks():
        other = sources.get(place)
        if other is None or type(other) is not type(block):
            continue
        root = place.split(".")[0]
        number = 0 if root == "stem" else len(streams) - 1 if root == "head" else int(root.removeprefix("stage"))
        for part, pick in _block_picks(block, other, streams[max(0, number - 1)], streams[number]).items():
            picks[f"{place}.{part}"] = pick
    return picks


def _streams(arch: Arch, source_arch: Arch) -> list[np.ndarray]:
    """Index maps of the residual channels of the stem and the four stages.

    Where the source's convolutions of a stage are grouped, the first channels of every group are taken, so that channels that are convolved
    together stay together.
    """
    pairs = zip((arch.stem, *arch.stages), (source_arch.stem, *source_arch.stages), strict=True)
    return [_leading(ours.width, theirs.width, theirs.groups) for ours, theirs in pairs]


def _norm(name: str, channels: np.ndarray, *, batch: bool = True) -> dict[str, _Pick]:
    """The tensors of a norm over `channels`; a BatchNorm has its running statistics."""
    keys = ("weight", "bias", *(("running_mean", "running_var") if batch else ()))
    return {f"{name}.{key}": _Pick(out=channels) for key in keys}


def _first_offset(kernel: int, stride: int) -> int:
    """Offset of a kernel's first tap from the pixel it is centred on (`blocks.convolve` pads a 2x2 kernel left and top at stride 1)."""
    return -(kernel // 2) if kernel % 2 or stride == 1 else 0


def _block_picks(block: Block, other: Block, entering: np.ndarray, stream: np.ndarray) -> dict[str, _Pick]:
    """Tensor of `block` -> from where in `other`. `entering`: channels of the stage before, `stream`: of this one."""
    match block, other:
        case StemConv(), StemConv():
            return {"conv.weight": _Pick(out=stream, into=np.arange(3)), **_norm("norm", stream)}
        case ConvBranch(), ConvBranch() if block.fused == other.fused:
            offsets = (_first_offset(block.kernel, 1), _first_offset(other.kernel, 1))
            return _mbconv(block, other, stream, stream, offsets)
        case Downsampler(), Downsampler() if block.fused == other.fused:
            return _mbconv(block, other, entering, stream, (-1, -1))
        case Lowtention(), Lowtention():
            return _attention(block, other, stream)
        case Mlp(), Mlp():
            hidden = _leading(block.channels * block.ratio, other.channels * other.ratio)
            return {
                **_norm("norm", stream, batch=False),
                "expand.weight": _Pick(out=hidden, into=stream), "expand.bias": _Pick(out=hidden),
                "project.weight": _Pick(out=stream, into=hidden), "project.bias": _Pick(out=stream),
            }  # fmt: skip
        case Head(), Head():
            conv, linear = _leading(block.conv_width, other.conv_width), _leading(block.linear_width, other.linear_width)
            found = {
                "conv.weight": _Pick(out=conv, into=stream), **_norm("conv_norm", conv),
                "linear.weight": _Pick(out=linear, into=conv), **_norm("linear_norm", linear, batch=False),
            }  # fmt: skip
            if block.num_classes == other.num_classes:
                classes = np.arange(block.num_classes)
                classifier = CLASSIFIER.removeprefix("head.")
                found |= {f"{classifier}weight": _Pick(out=classes, into=linear), f"{classifier}bias": _Pick(out=classes)}
            return found
        case _:
            return {}


def _mbconv(
    block: ConvBranch | Downsampler, other: ConvBranch | Downsampler, entering: np.ndarray, leaving: np.ndarray, offsets: tuple[int, int]
) -> dict[str, _Pick]:
    hidden_sizes = [(b.channels if isinstance(b, ConvBranch) else b.in_channels) * b.expansion for b in (block, other)]
    hidden = _leading(hidden_sizes[0], hidden_sizes[1], other.groups)
    entering_size = other.channels if isinstance(other, ConvBranch) else other.in_channels
    groups = {"groups": block.groups, "source_groups": other.groups, "source_sizes": (hidden_sizes[1], entering_size)}
    kernel = {"offsets": offsets, "source_kernel": other.kernel if isinstance(other, ConvBranch) else 3}
    found = {"project.weight": _Pick(out=leaving, into=hidden), **_norm("project_norm", leaving)}
    if block.fused:
        found |= {"expand.weight": _Pick(out=hidden, into=entering, **kernel, **groups), **_norm("expand_norm", hidden)}
    else:
        found["expand.weight"] = _Pick(out=hidden, into=entering, **groups)
        found["depthwise.weight"] = _Pick(out=hidden, into=np.zeros(1, int), **kernel)
    if isinstance(block, ConvBranch) and isinstance(other, ConvBranch) and block.bias and other.bias:
        found |= {"expand.bias": _Pick(out=hidden)} | ({} if block.fused else {"depthwise.bias": _Pick(out=hidden)})
    return found


def _attention(block: Lowtention, other: Lowtention, stream: np.ndarray) -> dict[str, _Pick]:
    """Queries, keys and values are cut head by head. The layers that close the branch are taken only where both upsample alike on normed or
    unnormed input alike; the branch starts as the identity elsewhere."""
    heads, dims = (block.heads, other.heads), (block.head_dim, other.head_dim)
    inner = _nested(heads, dims)
    offsets = (_first_offset(block.kernel, block.stride), _first_offset(other.kernel, other.stride))
    found = {
        "depthwise.weight": _Pick(out=stream, into=np.zeros(1, int), offsets=offsets, source_kernel=other.kernel),
        **_norm("depthwise_norm", stream),
        "qkv.weight": _Pick(out=_nested(heads, dims, parts=3), into=stream),
    }  # fmt: skip
    if block.norm and other.norm:
        found |= _norm("norm", stream, batch=False)
    if (block.stride, block.projection, block.norm) != (other.stride, other.projection, other.norm):
        return found
    if block.projection != "fused":
        found |= {"project.weight": _Pick(out=stream, into=inner), "project.bias": _Pick(out=stream)}
    if block.projection == "fused":
        found["upsample.weight"] = _Pick(out=stream, into=inner, transposed=True)
    if block.projection == "unfused":
        found["upsample.weight"] = _Pick(out=stream, into=np.zeros(1, int))
    if block.projection != "nearest":
        found["upsample.bias"] = _Pick(out=stream)
    return found
