"""Weights on disk and from timm's hub, in four key layouts: ours, timm's LowFormer, timm's CPUBone, the authors' checkpoints.

Every layout is a table of names: for each part of our network, the name of the same part over there. A checkpoint must hold exactly
the named weights; what is missing, left over or of another shape is an error. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lowsearch.arch import Arch, Block, ConvBranch, Downsampler, Head, Lowtention, Mlp, StemConv
from lowsearch.errors import CheckpointError
from lowsearch.presets import PRESETS

if TYPE_CHECKING:
    from lowsearch.model.lowformer import LowFormer

Layout = Literal["lowsearch", "timm-lowformer", "timm-cpubone", "authors"]

TIMM_NAMES: dict[str, str] = {
    **{f"lowformer_{size}": f"lowformer_{size}.in1k" for size in ("b0", "b1", "b15", "b3", "e1", "e2", "e3")},
    **{f"cpubone_{size}": f"cpubone_{size}_bfrobust.r224_in1k" for size in ("b0", "b1", "b2")},
    "cpubone_b3": "cpubone_b3.r224_in1k",
}
"""Preset -> timm's name for its published weights. LowFormer-B2 has none. The `bfrobust` CPUBones were trained with two more
BatchNorms in each MBConv of stages 3 and 4; loading folds these into the convolutions before them."""

CLASSIFIER = "head.classifier."


def load_pretrained(model: LowFormer, source: str | Path, *, replace_classifier: bool = False) -> None:
    """Fill `model` with the weights in file `source`, or with published ones from timm's hub where it is "timm".

    `replace_classifier`: where the weights are for another number of classes, keep the model's own last linear layer instead of
    refusing. Raises CheckpointError, naming the key at fault.
    """
    state = download(model.arch) if source == "timm" else read_checkpoint(source)
    own = to_own_keys(state, model)
    expected = model.state_dict()
    classes, published = model.arch.num_classes, own[CLASSIFIER + "weight"].shape[0]
    if classes != published:
        if not replace_classifier:
            raise CheckpointError(
                f"the weights are for {published} classes, the network for {classes}",
                hint=f"build_model(..., num_classes={classes}) keeps the rest and starts the classifier afresh",
            )
        own.update({key: value for key, value in expected.items() if key.startswith(CLASSIFIER)})
    for key, value in expected.items():
        if own[key].shape != value.shape:
            raise CheckpointError(f"weight {key} has shape {tuple(own[key].shape)} in the checkpoint, {tuple(value.shape)} in the network")
    model.load_state_dict(own, strict=True)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch checkpoint, unwrapped from `state_dict`. Raises CheckpointError on anything else."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}", hint='give a .safetensors or .pth file, or "timm" for published weights')
    try:
        if path.suffix == ".safetensors":
            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make a reader fail in any way
        raise CheckpointError(f"{path} is not a checkpoint of plain tensors: {_first_line(error)}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} does not hold a state dict of tensors")
    return dict(state)


def download(arch: Arch) -> dict[str, Tensor]:
    """Published ImageNet weights of `arch` through timm's hub, in timm's layout. Resolution and number of classes are free."""
    name = preset_of(arch)
    if name is None or name not in TIMM_NAMES:
        what = f"{name}" if name else f"architecture {arch.arch_id}"
        raise CheckpointError(f"no published weights for {what}", hint=f"presets with weights: {', '.join(TIMM_NAMES)}")
    import timm

    try:
        return timm.create_model(TIMM_NAMES[name], pretrained=True).state_dict()
    except Exception as error:  # the hub client's errors share no base class; whatever they are, there are no weights
        raise CheckpointError(
            f"could not fetch {TIMM_NAMES[name]} from timm's hub: {_first_line(error)}",
            hint="check the network, or download the file elsewhere and pass its path",
        ) from error


def preset_of(arch: Arch) -> str | None:
    """Name of the preset that `arch` equals but for resolution and number of classes, or None."""
    for name, preset in PRESETS.items():
        if dataclasses.replace(arch, resolution_px=preset.resolution_px, num_classes=preset.num_classes) == preset:
            return name
    return None


def detect_layout(state: Mapping[str, Tensor]) -> Layout:
    """Which layout the keys of `state` are in. Raises CheckpointError where it is none of ours."""
    if any(key.startswith("backbone.") for key in state):
        return "authors"
    signs: dict[str, Layout] = {
        "stem.conv.conv.weight": "lowsearch",
        "in_conv.conv.weight": "timm-lowformer",
        "head.in_conv.conv.weight": "timm-cpubone",
    }
    for key, layout in signs.items():
        if key in state:
            return layout
    raise CheckpointError(f"not a LowFormer checkpoint: its first key is {next(iter(state), None)!r}")


def to_own_keys(state: Mapping[str, Tensor], model: LowFormer) -> dict[str, Tensor]:
    """`state` in our key layout. Raises CheckpointError where it does not hold exactly the weights of `model`."""
    layout = detect_layout(state)
    left = {_without_containers(key): value for key, value in state.items()} if layout == "authors" else dict(state)
    names = part_names(model.arch, layout)
    _fold_extra_norms(left, model.arch, names)
    own = {}
    for key in model.state_dict():
        part, _, weight = key.rpartition(".")
        theirs = f"{names[part]}.{weight}"
        if theirs not in left:
            alias = "" if theirs == key else f" ({key} in the network)"
            raise CheckpointError(f"weight {theirs}{alias} is missing from the {layout} checkpoint")
        own[key] = left.pop(theirs)
    if left:
        raise CheckpointError(f"the {layout} checkpoint holds {len(left)} weights that the network has not: {', '.join(sorted(left)[:3])}")
    return own


def part_names(arch: Arch, layout: Layout) -> dict[str, str]:
    """Our name of every part that can hold weights -> its name in `layout` (the authors' without their container levels)."""
    names = {}
    for place, block in arch.named_blocks():
        parts = _parts(block, layout)
        if layout == "lowsearch":
            names.update({f"{place}.{part}": f"{place}.{part}" for part in parts})
        else:
            names.update({f"{place}.{part}": _prefix(place, block, layout) + name for part, name in parts.items()})
    return names


def _prefix(place: str, block: Block, layout: Layout) -> str:
    """Name in `layout` of the module at `place`, with its closing dot."""
    if place == "head":
        return "" if layout == "timm-lowformer" else "head."
    root, *index, branch = place.split(".")
    if root == "stem":
        stem = "input_stem" if layout == "authors" else "stem"
        return f"{stem}.{index[0]}.main." if index else f"{stem}.0."
    number = int(root.removeprefix("stage"))
    module = f"stages.{number - 1}.{index[0] if index else 0}."
    if branch == "down" or number <= 2:
        return module + "main."
    if layout == "timm-lowformer":
        return module + {"attention": "attn", "mlp": "mlp", "conv": "local"}[branch] + ".main."
    # `total` holds [context, convolution]; the context holds [attention, MLP], or is the attention itself where there is no MLP.
    alone = isinstance(block, Lowtention) and not block.norm
    return module + {"attention": "total.0" if alone else "total.0.0", "mlp": "total.0.1", "conv": "total.1"}[branch] + ".main."


def _parts(block: Block, layout: Layout) -> dict[str, str]:
    """Our name of every part of `block` -> its name in `layout`, below the block."""
    padded = ".1"  # a 2x2 convolution at stride 1 stands behind its padding in a Sequential
    match block:
        case StemConv():
            return {"conv": "conv", "norm": "norm"}
        case ConvBranch() | Downsampler():
            pad = padded if isinstance(block, ConvBranch) and block.kernel == 2 else ""
            last = {"project": "point_conv.conv", "project_norm": "point_conv.norm"}
            if block.fused:
                return {"expand": f"spatial_conv.conv{pad}", "expand_norm": "spatial_conv.norm", **last}
            return {"expand": "inverted_conv.conv", "depthwise": f"depth_conv.conv{pad}", **last}
        case Lowtention():
            at = "1." if block.norm else ""  # behind the GroupNorm
            pad = padded if block.kernel == 2 and block.stride == 1 else ""
            conv, norm, pointwise = ("0", "1", "pwise.0") if layout == "authors" else ("conv", "norm", "pwise")
            nearest = block.projection == "nearest"
            return {
                "norm": "0",
                "depthwise": f"{at}conv_proj.{conv}{pad}",
                "depthwise_norm": f"{at}conv_proj.{norm}",
                "qkv": f"{at}{pointwise}",
                "project": f"{at}upsampling.0" if nearest else f"{at}o_proj",
                "upsample": f"{at}upsampling",
            }
        case Mlp():
            return {"norm": "0", "expand": "1", "project": "3"}
        case Head():
            ours = ("conv", "conv_norm", "linear", "linear_norm", "classifier")
            return dict(zip(ours, _HEAD_PARTS.get(layout, ours), strict=True))


_HEAD_PARTS: dict[Layout, tuple[str, ...]] = {
    "timm-lowformer": ("in_conv.conv", "in_conv.norm", "pre_classifier.0", "pre_classifier.1", "classifier"),
    "timm-cpubone": ("in_conv.conv", "in_conv.norm", "pre_classifier.linear", "pre_classifier.norm", "classifier.linear"),
    "authors": ("0.conv", "0.norm", "2.linear", "2.norm", "3.linear"),
}


def _without_containers(key: str) -> str:
    """The authors' key without the levels of their containers, which differ between their training package and standalone file."""
    levels = key.split(".")
    return ".".join(level for i, level in enumerate(levels) if level not in ("op_list", "opseq") and not (i == 0 and level == "backbone"))


def _fold_extra_norms(state: dict[str, Tensor], arch: Arch, names: Mapping[str, str]) -> None:
    """Fold BatchNorms after the first two convolutions of an MBConv into these, in place; ours have a bias instead.

    Equal in inference. The `bfrobust` CPUBones carry these norms; the published parameter counts are those without.
    """
    for place, block in arch.named_blocks():
        if not isinstance(block, ConvBranch) or block.fused or not block.bias:
            continue
        for part in ("expand", "depthwise"):
            conv = names[f"{place}.{part}"]
            norm = conv.removesuffix(".1").removesuffix(".conv") + ".norm"
            if f"{norm}.running_var" not in state:
                continue
            keys = ("weight", "bias", "running_mean", "running_var")
            missing = [f"{name}.{key}" for name, key in [(conv, "weight"), *((norm, key) for key in keys)] if f"{name}.{key}" not in state]
            if missing:
                raise CheckpointError(f"weight {missing[0]} is missing from the checkpoint")
            gamma, beta, mean, var = (state.pop(f"{norm}.{key}") for key in keys)
            state.pop(f"{norm}.num_batches_tracked", None)
            scale = gamma / torch.sqrt(var + nn.BatchNorm2d(1).eps)
            bias = state.pop(f"{conv}.bias", torch.zeros_like(mean))
            state[f"{conv}.weight"] = state[f"{conv}.weight"] * scale.view(-1, 1, 1, 1)
            state[f"{conv}.bias"] = beta + (bias - mean) * scale


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
