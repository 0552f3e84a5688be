"""Architectures as values: one LowFormer network (`Arch`) and the blocks it is made of (`Block`).

Everything else is computed from these values: the genome of a search space, the torch module, the cost, the latency.
A Block is one residual branch (Lowtention, MLP, convolution), a downsampler, the stem convolution, or the head, at one input
shape. It is the key of a latency table. Structure and names follow LowFormer (arXiv 2409.03460, 2603.26551); the 2x2 kernels,
grouped expansion and nearest upsampling follow CPUBone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, get_args

from lowsearch.errors import InvalidArchError

Projection = Literal["fused", "unfused", "nearest"]
"""How Lowtention projects and upsamples its output: one dense transposed convolution (`fused`), a 1x1 convolution and a depthwise
transposed convolution (`unfused`), or a 1x1 convolution and nearest-neighbour upsampling (`nearest`, CPUBone)."""

N_STAGES = 4
KERNELS = (2, 3, 5, 7)
HEAD_DIM_TARGET = 30
"""Lowtention aims at heads of about this many channels: heads = max(1, floor(compression * width / 30))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StemConv:
    """3x3 convolution, BatchNorm, Hardswish on the image. Input (3, resolution_px, resolution_px)."""

    kind: ClassVar[str] = "stem"
    out_channels: int
    resolution_px: int
    stride: int

    @property
    def out_px(self) -> int:
        return self.resolution_px // self.stride


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvBranch:
    """Residual FusedMBConv (`fused`) or MBConv at constant width. Input (channels, resolution_px, resolution_px).

    FusedMBConv: k x k convolution to `expansion` times the channels (in `groups`), BatchNorm, Hardswish, 1x1 convolution, BatchNorm.
    MBConv: 1x1 convolution (in `groups`), Hardswish, depthwise k x k convolution, Hardswish, 1x1 convolution, BatchNorm.
    `bias`: the convolutions without a BatchNorm of MBConv, or the first one of FusedMBConv, have a bias (stages 3 and 4).
    """

    kind: ClassVar[str] = "conv"
    channels: int
    resolution_px: int
    fused: bool
    expansion: int
    kernel: int
    groups: int
    bias: bool

    @property
    def out_channels(self) -> int:
        return self.channels

    @property
    def out_px(self) -> int:
        return self.resolution_px


@dataclass(frozen=True, slots=True, kw_only=True)
class Downsampler:
    """FusedMBConv or MBConv, kernel 3, stride 2, without residual or bias. Expansion is relative to `in_channels`."""

    kind: ClassVar[str] = "downsampler"
    in_channels: int
    out_channels: int
    resolution_px: int
    fused: bool
    expansion: int
    groups: int

    @property
    def out_px(self) -> int:
        return self.resolution_px // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowtention:
    """Residual attention at `1/stride` of the resolution and `heads * head_dim` channels. Input (channels, px, px).

    Optional GroupNorm(1) (`norm`, present where the stage has an MLP), depthwise kernel x kernel convolution with `stride` and
    BatchNorm, 1x1 convolution to queries, keys and values, softmax attention, then `projection` back to the input's shape.
    """

    kind: ClassVar[str] = "attention"
    channels: int
    resolution_px: int
    stride: int
    kernel: int
    heads: int
    head_dim: int
    projection: Projection
    norm: bool

    @property
    def inner_channels(self) -> int:
        """Channels of the values: heads x head_dim."""
        return self.heads * self.head_dim

    @property
    def attention_px(self) -> int:
        """Side of the map that attention runs on; it attends over its square in tokens."""
        return -(-self.resolution_px // self.stride)

    @property
    def out_channels(self) -> int:
        return self.channels

    @property
    def out_px(self) -> int:
        return self.resolution_px


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """Residual GroupNorm(1), 1x1 convolution to `ratio` times the channels, GELU, 1x1 convolution. Input (channels, px, px)."""

    kind: ClassVar[str] = "mlp"
    channels: int
    resolution_px: int
    ratio: int

    @property
    def out_channels(self) -> int:
        return self.channels

    @property
    def out_px(self) -> int:
        return self.resolution_px


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """1x1 convolution to `conv_width`, BatchNorm, Hardswish, global average pooling, Linear to `linear_width` (no bias), LayerNorm,
    Hardswish, Linear to `num_classes`. Input (channels, resolution_px, resolution_px), output (num_classes,)."""

    kind: ClassVar[str] = "head"
    channels: int
    resolution_px: int
    conv_width: int
    linear_width: int
    num_classes: int


Block = StemConv | ConvBranch | Downsampler | Lowtention | Mlp | Head
BLOCK_TYPES: dict[str, type[Block]] = {t.kind: t for t in get_args(Block)}


def input_channels(block: Block) -> int:
    """Channels of the tensor that enters `block`."""
    if isinstance(block, StemConv):
        return 3
    return block.in_channels if isinstance(block, Downsampler) else block.channels


def block_to_dict(block: Block) -> dict[str, Any]:
    """`block` as JSON-ready values, `kind` first."""
    return {"kind": block.kind, **dataclasses.asdict(block)}


def block_from_dict(values: Mapping[str, Any]) -> Block:
    """Inverse of `block_to_dict`. Raises InvalidArchError on an unknown kind, a missing or unknown field, or a value of another type."""
    fields = dict(values)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in BLOCK_TYPES:
        raise InvalidArchError(f"unknown block kind {kind!r}; known: {', '.join(BLOCK_TYPES)}")
    return _from_fields(BLOCK_TYPES[kind], fields, f"block {kind}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The Lowtention of a stage: attention at `1/stride` of the resolution and about `compression` times the width."""

    stride: int = 1
    kernel: int = 3
    """Kernel of the depthwise convolution before the projections; published: 5 with stride 2, 3 with stride 1, CPUBone 2."""
    compression: float = 0.5
    projection: Projection = "fused"

    def __post_init__(self) -> None:
        _check("attention.stride", self.stride, self.stride in (1, 2, 4), "1, 2 or 4")
        _check("attention.kernel", self.kernel, self.kernel in KERNELS, f"one of {KERNELS}")
        # A 2x2 kernel that tiles needs its stride to be 1 or 2; with stride 4 half of the map would never be read.
        _check("attention.kernel", self.kernel, not (self.kernel == 2 and self.stride == 4), "larger than 2 where the stride is 4")
        _check("attention.compression", self.compression, 0 < self.compression <= 1, "in (0, 1]")
        _check("attention.projection", self.projection, self.projection in get_args(Projection), f"one of {get_args(Projection)}")

    def heads_and_dim(self, width: int) -> tuple[int, int]:
        """(heads, head_dim) at `width` channels, by LowFormer's rounding."""
        heads = max(1, int(self.compression * width // HEAD_DIM_TARGET))
        return heads, int(width // heads * self.compression)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stem:
    """Stem convolution, then `depth - 1` residual convolution branches at the same resolution."""

    width: int
    stride: int = 2
    depth: int = 1
    """Blocks including the stem convolution. Upstream's L0 is `depth - 1`."""
    fused: bool = True
    expansion: int = 4
    groups: int = 1

    def __post_init__(self) -> None:
        _check_channels("stem.width", self.width)
        _check("stem.stride", self.stride, self.stride in (1, 2), "1 or 2")
        _check("stem.depth", self.depth, self.depth >= 1, "at least 1, the stem convolution")
        if self.depth == 1:  # No branch left that these could shape: equal networks are equal values.
            _reset(self, fused=True, expansion=4, groups=1)
        _check_conv("stem", self.width, self.expansion, self.groups, 3, fused=self.fused)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stride-2 downsampler, then `depth - 1` blocks of [Lowtention] [MLP] convolution, each a residual branch."""

    width: int
    depth: int = 1
    """Blocks including the downsampler. Upstream's L1, L2 count it too; its L3 and L4 are `depth - 1`."""
    down_fused: bool = True
    down_expansion: int = 6
    down_groups: int = 1
    fused: bool = True
    expansion: int = 4
    groups: int = 1
    kernel: int = 3
    attention: Attention | None = None
    mlp_ratio: int = 0
    """0: no MLP, and then no GroupNorm before the attention either (LowFormer-E3)."""

    def __post_init__(self) -> None:
        _check_channels("width", self.width)
        _check("depth", self.depth, self.depth >= 1, "at least 1, the downsampler")
        _check("down_expansion", self.down_expansion, self.down_expansion >= 1, "at least 1")
        _check("mlp_ratio", self.mlp_ratio, self.mlp_ratio >= 0, "0 (no MLP) or more")
        if self.depth == 1:
            _reset(self, fused=True, expansion=4, groups=1, kernel=3, attention=None, mlp_ratio=0)
        _check_conv("", self.width, self.expansion, self.groups, self.kernel, fused=self.fused)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """One network of the LowFormer space, input resolution and number of classes included.

    Fields without effect (the expansion of a stem without blocks) hold their default, so equal networks are equal values.
    Raises InvalidArchError for a network that cannot exist: a resolution that the total stride does not divide, groups that do not
    divide a width, attention on a single token.
    """

    resolution_px: int
    stem: Stem
    stages: tuple[Stage, Stage, Stage, Stage]
    head_widths: tuple[int, int] = (1536, 1600)
    num_classes: int = 1000

    def __post_init__(self) -> None:
        _check("stages", len(self.stages), len(self.stages) == N_STAGES, f"{N_STAGES} stages")
        _check("head_widths", self.head_widths, len(self.head_widths) == 2 and min(self.head_widths) >= 1, "two positive widths")
        _check("num_classes", self.num_classes, self.num_classes >= 1, "at least 1")
        px = self.resolution_px
        _check("resolution_px", px, px >= 1, "positive")
        if px % self.total_stride:
            raise InvalidArchError(f"resolution_px {px} is not a multiple of the network's total stride {self.total_stride}")
        channels = self.stem.width
        for number, stage in enumerate(self.stages, start=1):
            hidden = channels * stage.down_expansion
            if channels % stage.down_groups or hidden % stage.down_groups:
                raise InvalidArchError(f"stage {number}: down_groups {stage.down_groups} does not divide {channels} and {hidden} channels")
            channels = stage.width
            if stage.attention is not None:
                px, stride = self.stage_px(number), stage.attention.stride
                if -(-px // stride) < 2:
                    raise InvalidArchError(f"stage {number}: attention on one token ({px} px map at stride {stride})")

    @property
    def total_stride(self) -> int:
        return self.stem.stride * 2**N_STAGES

    def stage_px(self, number: int) -> int:
        """Side in pixels of the maps of stage `number` (0: the stem, 1 to 4: the stages)."""
        return self.resolution_px // (self.stem.stride * 2**number)

    def named_blocks(self) -> tuple[tuple[str, Block], ...]:
        """Every block in the order it runs, with its place: `stem.conv`, `stem.1.conv`, `stage3.down`, `stage3.1.attention`, `head`."""
        return _named_blocks(self)

    def blocks(self) -> tuple[Block, ...]:
        """Every block in the order it runs; equal blocks repeat."""
        return tuple(block for _, block in self.named_blocks())

    @property
    def arch_id(self) -> str:
        """Ten hexadecimal digits of the SHA-256 of the canonical JSON; the same on every machine and in every run."""
        return _arch_id(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` inverts it."""
        values = dataclasses.asdict(self)
        values["stages"] = list(values["stages"])
        values["head_widths"] = list(values["head_widths"])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Arch:
        """Inverse of `to_dict`; fields left out hold their default. Raises InvalidArchError on unknown fields and wrong types."""
        fields = dict(_mapping(values, "architecture"))
        stages = fields.get("stages")
        if not isinstance(stages, list | tuple):
            raise InvalidArchError(f"architecture: stages is {stages!r}, expected a list of {N_STAGES} stages")
        fields["stages"] = tuple(stage_from_dict(s, f"stage {i}") for i, s in enumerate(stages, start=1))
        fields["stem"] = stem_from_dict(fields.get("stem"))
        if "head_widths" in fields:
            widths = fields["head_widths"]
            if not isinstance(widths, list | tuple) or not all(isinstance(w, int) and not isinstance(w, bool) for w in widths):
                raise InvalidArchError(f"architecture: head_widths is {widths!r}, expected two whole numbers")
            fields["head_widths"] = tuple(widths)
        return _from_fields(cls, fields, "architecture")

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Arch:
        """Inverse of `to_json`. Raises InvalidArchError on text that is not a JSON architecture."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidArchError(f"architecture is not JSON: {error}") from error
        return cls.from_dict(values)


def stem_conv(arch_px: int, stem: Stem) -> StemConv:
    """The stem's first convolution on an `arch_px` image."""
    return StemConv(out_channels=stem.width, resolution_px=arch_px, stride=stem.stride)


def stem_branch(arch_px: int, stem: Stem) -> ConvBranch:
    """The residual branch that the stem repeats `depth - 1` times."""
    return ConvBranch(
        channels=stem.width, resolution_px=arch_px // stem.stride, fused=stem.fused, expansion=stem.expansion,
        kernel=3, groups=stem.groups, bias=False,
    )  # fmt: skip


def downsampler(in_channels: int, in_px: int, stage: Stage) -> Downsampler:
    """The stride-2 block that opens `stage`."""
    return Downsampler(
        in_channels=in_channels, out_channels=stage.width, resolution_px=in_px, fused=stage.down_fused,
        expansion=stage.down_expansion, groups=stage.down_groups,
    )  # fmt: skip


def lowtention(stage_px: int, stage: Stage) -> Lowtention | None:
    """The attention branch that `stage` repeats `depth - 1` times, or None where it has none."""
    if stage.attention is None:
        return None
    heads, head_dim = stage.attention.heads_and_dim(stage.width)
    return Lowtention(
        channels=stage.width, resolution_px=stage_px, stride=stage.attention.stride, kernel=stage.attention.kernel,
        heads=heads, head_dim=head_dim, projection=stage.attention.projection, norm=stage.mlp_ratio > 0,
    )  # fmt: skip


def mlp(stage_px: int, stage: Stage) -> Mlp | None:
    """The MLP branch that `stage` repeats `depth - 1` times, or None where it has none."""
    return Mlp(channels=stage.width, resolution_px=stage_px, ratio=stage.mlp_ratio) if stage.mlp_ratio else None


def conv_branch(number: int, stage_px: int, stage: Stage) -> ConvBranch:
    """The convolution branch that stage `number` repeats `depth - 1` times. Upstream gives biases to stages 3 and 4 only."""
    return ConvBranch(
        channels=stage.width, resolution_px=stage_px, fused=stage.fused, expansion=stage.expansion,
        kernel=stage.kernel, groups=stage.groups, bias=number >= 3,
    )  # fmt: skip


def stem_from_dict(values: object, where: str = "stem") -> Stem:
    """A Stem from its fields; those left out hold their default. Raises InvalidArchError, its message opening with `where`."""
    return _from_fields(Stem, _mapping(values, where), where)


def stage_from_dict(values: object, where: str = "stage") -> Stage:
    """A Stage from its fields; those left out hold their default. Raises InvalidArchError, its message opening with `where`."""
    fields = dict(_mapping(values, where))
    if fields.get("attention") is not None:
        fields["attention"] = _from_fields(Attention, _mapping(fields["attention"], f"{where}: attention"), f"{where}: attention")
    return _from_fields(Stage, fields, where)


@cache
def _arch_id(arch: Arch) -> str:
    canonical = json.dumps(arch.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


@cache
def _named_blocks(arch: Arch) -> tuple[tuple[str, Block], ...]:
    blocks: list[tuple[str, Block]] = [("stem.conv", stem_conv(arch.resolution_px, arch.stem))]
    blocks += [(f"stem.{i}.conv", stem_branch(arch.resolution_px, arch.stem)) for i in range(1, arch.stem.depth)]
    channels = arch.stem.width
    for number, stage in enumerate(arch.stages, start=1):
        blocks.append((f"stage{number}.down", downsampler(channels, arch.stage_px(number - 1), stage)))
        px = arch.stage_px(number)
        branches = {"attention": lowtention(px, stage), "mlp": mlp(px, stage), "conv": conv_branch(number, px, stage)}
        for i in range(1, stage.depth):
            blocks += [(f"stage{number}.{i}.{name}", branch) for name, branch in branches.items() if branch is not None]
        channels = stage.width
    head = Head(
        channels=channels, resolution_px=arch.stage_px(N_STAGES), conv_width=arch.head_widths[0],
        linear_width=arch.head_widths[1], num_classes=arch.num_classes,
    )  # fmt: skip
    return (*blocks, ("head", head))


def _mapping(values: object, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise InvalidArchError(f"{where} is {values!r}, expected a mapping of fields")
    return values


_PLAIN: dict[str, type | tuple[type, ...]] = {"int": int, "bool": bool, "float": (int, float), "Projection": str}


def _from_fields(cls: type[Any], fields: Mapping[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise InvalidArchError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(known)}")
    for name, field in known.items():
        if name not in fields:
            if field.default is dataclasses.MISSING:
                raise InvalidArchError(f"{where}: field {name!r} is missing")
            continue
        plain = _PLAIN.get(str(field.type))
        value = fields[name]
        if plain is not None and (not isinstance(value, plain) or (plain is not bool and isinstance(value, bool))):
            raise InvalidArchError(f"{where}: {name} is {value!r}, expected {field.type}")
    return cls(**fields)


def _reset(value: object, **fields: object) -> None:
    for name, field in fields.items():
        object.__setattr__(value, name, field)


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise InvalidArchError(f"{name} is {value!r}, expected {expected}")


def _check_channels(name: str, width: int) -> None:
    _check(name, width, width >= 4 and width % 2 == 0, "an even number of channels, at least 4")


def _check_conv(where: str, width: int, expansion: int, groups: int, kernel: int, *, fused: bool) -> None:
    prefix = f"{where}." if where else ""
    _check(f"{prefix}expansion", expansion, expansion >= 1, "at least 1")
    _check(f"{prefix}groups", groups, groups >= 1 and width % groups == 0, f"a divisor of the width {width}")
    _check(f"{prefix}kernel", kernel, kernel in KERNELS, f"one of {KERNELS}")
