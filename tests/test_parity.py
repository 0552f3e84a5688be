"""Our networks against timm's LowFormer and CPUBone, with every weight, statistic and gamma random, in timm's and the authors' key layout.

timm's models are the oracle: their forward equals the authors' own files. Weights pass through a checkpoint on disk and our loader.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import cpubone, lowformer
from torch import Tensor, nn

from lowsearch.arch import Downsampler, Head, StemConv
from lowsearch.model.blocks import randomise
from lowsearch.model.lowformer import LowFormer, build_model
from lowsearch.presets import PRESETS

TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest logit."""


def make_oracle(name: str) -> nn.Module:
    """timm's network of preset `name` with random weights. The `bfrobust` CPUBones without their two extra norms are the published ones."""
    if name in ("cpubone_b0", "cpubone_b1", "cpubone_b2"):
        model = timm.create_model(f"{name}_bfrobust", local_mbconv_norm="proj")
    else:
        model = timm.create_model(name)
    randomise(model.eval(), seed=0)
    return model


def images(px: int) -> Tensor:
    return torch.randn(1, 3, px, px, generator=torch.Generator().manual_seed(1))


def difference(ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    return float((a - b).abs().max() / b.abs().max())


class Pair(NamedTuple):
    name: str
    ours: LowFormer
    theirs: nn.Module


@pytest.fixture(scope="module", params=PRESETS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One preset as timm's network with random weights, and as ours with the same weights from a file in timm's layout."""
    theirs = make_oracle(request.param)
    path = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(theirs.state_dict(), path)
    ours = build_model(PRESETS[request.param], pretrained=path).eval()
    path.unlink()  # up to 0.2 GB
    return Pair(request.param, ours, theirs)


def test_params_equal_timms(pair: Pair) -> None:
    assert sum(p.numel() for p in pair.ours.parameters()) == sum(p.numel() for p in pair.theirs.parameters())


@pytest.mark.parametrize("px", [224, 256])
def test_forward_equals_timms(pair: Pair, px: int) -> None:
    assert difference(pair.ours, pair.theirs, images(px)) <= TOLERANCE


def test_stage_outputs_equal_timms(pair: Pair) -> None:
    x = images(96)  # maps of 6 px in stage 3 and 3 px in stage 4
    with torch.no_grad():
        theirs = pair.theirs.forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
        ours = pair.ours.features(x)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and float((a - b).abs().max() / b.abs().max()) <= TOLERANCE


def test_dropping_any_branch_breaks_parity(pair: Pair) -> None:
    x = images(64)
    assert difference(pair.ours, pair.theirs, x) <= TOLERANCE
    with torch.no_grad():
        expected, h = pair.theirs(x), x
        parts = [pair.ours.block(place) for place, _ in pair.ours.arch.named_blocks()]
        for i, (place, block) in enumerate(pair.ours.arch.named_blocks()):
            if not isinstance(block, StemConv | Downsampler | Head):
                y = h  # the branch left out: only its shortcut
                for part in parts[i + 1 :]:
                    y = part(y)
                assert float((y - expected).abs().max() / expected.abs().max()) > 100 * TOLERANCE, place
            h = parts[i](h)


def authors_lowformer_key(key: str) -> str:
    """The authors' name of a weight of timm's LowFormer, from the structure of their network: everything nested in `op_list`s."""
    rules = [
        (r"^stem\.(\d+)\.", r"backbone.input_stem.op_list.\1."),
        (r"^stages\.(\d+)\.(\d+)\.", r"backbone.stages.\1.op_list.\2."),
        (r"\.local\.", ".total.1."),
        (r"\.mlp\.", ".total.0.1."),
        (r"\.conv_proj\.conv\.", ".conv_proj.0."),
        (r"\.conv_proj\.norm\.", ".conv_proj.1."),
        (r"\.pwise\.", ".pwise.0."),
        (r"^in_conv\.", "head.op_list.0."),
        (r"^pre_classifier\.0\.", "head.op_list.2.linear."),
        (r"^pre_classifier\.1\.", "head.op_list.2.norm."),
        (r"^classifier\.", "head.op_list.3.linear."),
    ]
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def authors_cpubone_key(key: str) -> str:
    rules = [
        (r"^stem\.(\d+)\.", r"backbone.input_stem.op_list.\1."),
        (r"^stages\.(\d+)\.(\d+)\.", r"backbone.stages.\1.op_list.\2."),
        (r"\.conv_proj\.conv\.", ".conv_proj.0."),
        (r"\.conv_proj\.norm\.", ".conv_proj.1."),
        (r"\.pwise\.", ".pwise.0."),
        (r"^head\.in_conv\.", "head.op_list.0."),
        (r"^head\.pre_classifier\.", "head.op_list.2."),
        (r"^head\.classifier\.", "head.op_list.3."),
    ]
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def authors_checkpoint(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if name.startswith("cpubone"):
        return {authors_cpubone_key(key): value for key, value in state.items()}
    # Where the MLP is gone (E3), the attention is not nested in a context of two.
    has_mlp = any(".mlp." in key for key in state)
    return {authors_lowformer_key(key).replace(".attn.", ".total.0.0." if has_mlp else ".total.0."): v for key, v in state.items()}


def test_the_authors_checkpoint_loads_here_and_in_timm_to_the_same_network(pair: Pair, tmp_path: Path) -> None:
    name, _, theirs = pair
    path = tmp_path / "authors.pt"
    torch.save({"state_dict": authors_checkpoint(name, theirs.state_dict()), "epoch": 319}, path)
    ours = build_model(PRESETS[name], pretrained=path).eval()
    file = torch.load(path, weights_only=True)
    path.unlink()
    if name.startswith("cpubone"):
        state = cpubone.checkpoint_filter_fn(file["state_dict"], theirs)
    else:
        state = lowformer.checkpoint_filter_fn(file, theirs)
    assert state.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(state, strict=True)
    assert difference(ours, theirs, images(224)) <= TOLERANCE


@pytest.mark.parametrize("style", ["op_list", "opseq", "plain"])
def test_the_authors_container_levels_do_not_matter(style: str, tmp_path: Path) -> None:
    """Their training package and standalone file nest the same parts differently."""
    theirs = make_oracle("lowformer_b0")
    state = authors_checkpoint("lowformer_b0", theirs.state_dict())
    if style == "opseq":
        state = {key.replace("head.op_list.", "head.opseq.op_list."): value for key, value in state.items()}
    if style == "plain":
        state = {key.replace(".op_list.", "."): value for key, value in state.items()}
    torch.save(state, tmp_path / "weights.pth")
    ours = build_model(PRESETS["lowformer_b0"], pretrained=tmp_path / "weights.pth").eval()
    assert difference(ours, theirs, images(64)) <= TOLERANCE


@pytest.mark.parametrize("layout", ["timm", "authors"])
@pytest.mark.parametrize("norms", ["all", "depth_proj"])
def test_extra_norms_of_the_released_cpubones_fold_into_the_convolutions(norms: str, layout: str, tmp_path: Path) -> None:
    theirs = timm.create_model("cpubone_b0_bfrobust", local_mbconv_norm=norms)
    randomise(theirs.eval(), seed=0)
    state = theirs.state_dict()
    if layout == "authors":
        state = {authors_cpubone_key(key): value for key, value in state.items()}
        # Their convolutions keep a bias before the norm, which timm moves into the running mean.
        for key in [key for key in state if re.search(r"(inverted|depth)_conv\.conv\.(1\.)?weight$", key)]:
            bias = key.replace("weight", "bias")
            if bias not in state:
                norm = re.sub(r"\.conv\.(1\.)?weight$", ".norm.", key)
                state[bias] = torch.randn(state[norm + "running_mean"].shape, generator=torch.Generator().manual_seed(2))
                state[norm + "running_mean"] = state[norm + "running_mean"] + state[bias]
    save_file(state, tmp_path / "weights.safetensors")
    ours = build_model(PRESETS["cpubone_b0"], pretrained=tmp_path / "weights.safetensors").eval()
    assert difference(ours, theirs, images(96)) <= TOLERANCE
