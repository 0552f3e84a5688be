"""The published networks as Arch values: LowFormer B0 to B3 and E1 to E3, CPUBone B0 to B3.

Widths double from stage to stage. Convolution branches are fused below 256 channels in LowFormer's stages 3 and 4, downsamplers
always are. B2 follows the authors' training package (depths 0, 1, 1, 6, 6), not their standalone file.
Sources: arXiv 2409.03460, arXiv 2603.26551 and the CPUBone release; parameters are checked against timm in the tests.
"""

from __future__ import annotations

from difflib import get_close_matches

from lowsearch.arch import Arch, Attention, Stage, Stem
from lowsearch.errors import UsageError

FUSED_BELOW_CHANNELS = 256
DEFAULT_HEAD = (1536, 1600)
BIG_HEAD = (2304, 2560)


def _network(
    width: int,
    layers: tuple[int, int, int, int, int],
    *,
    down_expansion: int = 6,
    head: tuple[int, int] = DEFAULT_HEAD,
    attention: bool = True,
    mlp_ratio: int = 4,
    cpu: bool = False,
) -> Arch:
    """A published network from its stem width and upstream's block counts L0 to L4. `cpu`: CPUBone's choices."""
    groups = 2 if cpu else 1
    stages = []
    for number in range(1, 5):
        stage_width = width * 2**number
        late = number >= 3
        stages.append(
            Stage(
                width=stage_width,
                # Upstream counts the downsampler among the layers of stages 1 and 2 only.
                depth=layers[number] + (1 if late else 0),
                down_expansion=down_expansion,
                down_groups=groups,
                fused=not late or stage_width < FUSED_BELOW_CHANNELS,
                groups=groups,
                kernel=2 if late and cpu else 3,
                attention=_attention(number, cpu=cpu) if late and attention else None,
                mlp_ratio=mlp_ratio if late else 0,
            )
        )
    stem = Stem(width=width, depth=layers[0] + 1, groups=groups)
    return Arch(resolution_px=224, stem=stem, stages=(stages[0], stages[1], stages[2], stages[3]), head_widths=head)


def _attention(number: int, *, cpu: bool) -> Attention:
    stride = 2 if number == 3 else 1
    kernel = 2 if cpu else (5 if stride == 2 else 3)
    return Attention(stride=stride, kernel=kernel, projection="nearest" if cpu else "fused")


PRESETS: dict[str, Arch] = {
    "lowformer_b0": _network(16, (0, 1, 1, 3, 4), down_expansion=4),
    "lowformer_b1": _network(16, (0, 1, 1, 5, 5)),
    "lowformer_b15": _network(20, (0, 1, 1, 6, 6), head=BIG_HEAD),
    "lowformer_b2": _network(24, (0, 1, 1, 6, 6), head=BIG_HEAD),
    "lowformer_b3": _network(32, (1, 2, 3, 6, 6)),
    "lowformer_e1": _network(20, (0, 1, 1, 4, 4), head=BIG_HEAD, attention=False, mlp_ratio=0),
    "lowformer_e2": _network(32, (1, 2, 3, 4, 4), attention=False, mlp_ratio=0),
    "lowformer_e3": _network(32, (1, 2, 3, 6, 6), mlp_ratio=0),
    "cpubone_b0": _network(16, (0, 1, 1, 3, 4), down_expansion=4, cpu=True),
    "cpubone_b1": _network(16, (0, 1, 1, 5, 5), cpu=True),
    "cpubone_b2": _network(20, (0, 1, 1, 6, 6), head=BIG_HEAD, cpu=True),
    "cpubone_b3": _network(32, (1, 2, 3, 6, 6), cpu=True),
}


def preset(name: str) -> Arch:
    """The published network `name`, at 224 px and 1000 classes. Raises UsageError naming the known presets."""
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, n=1, cutoff=0.85)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown preset {name!r}", hint=f"{meant}known: {', '.join(PRESETS)}")
    return PRESETS[name]
