"""The three public MAC counters beside the closed form: where they agree, and exactly which gaps they have."""

from __future__ import annotations

import pytest
import torch

from lowsearch import cost
from lowsearch.arch import Arch, Attention, Downsampler, Head, Lowtention, Mlp, Stage, Stem, StemConv
from lowsearch.model.counters import count_operators_with_fvcore, count_with_fvcore, count_with_thop, count_with_torch
from lowsearch.model.lowformer import LowFormer

pytestmark = [
    # fvcore traces with torch.jit, which warns that it is deprecated; thop still imports distutils.
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The distutils package is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:distutils Version classes are deprecated:DeprecationWarning"),
]


def network(attention: Attention | None, *, mlp_ratio: int = 0) -> Arch:
    late = {"depth": 3, "attention": attention, "mlp_ratio": mlp_ratio, "down_expansion": 2}
    return Arch(
        resolution_px=128,
        stem=Stem(width=8, depth=2),
        stages=(Stage(width=16, depth=2, groups=2), Stage(width=24, fused=False), Stage(width=64, **late), Stage(width=64, **late)),
        head_widths=(96, 80),
        num_classes=10,
    )


NETWORKS = {
    "convolutions only": network(None),
    "fused attention": network(Attention(stride=2, kernel=5, projection="fused"), mlp_ratio=2),
    "unfused attention": network(Attention(stride=2, kernel=5, projection="unfused"), mlp_ratio=2),
    "fused attention at stride 1": network(Attention(projection="fused")),
    "nearest attention": network(Attention(stride=2, kernel=2, projection="nearest"), mlp_ratio=2),
}


def attention_products(arch: Arch) -> int:
    """MACs of the scores and of the weighted values."""
    return sum(2 * b.attention_px**4 * b.inner_channels for b in arch.blocks() if isinstance(b, Lowtention))


def transposed_convolutions(arch: Arch, *, by_output_pixels: bool = False) -> int:
    total = 0
    for b in arch.blocks():
        if isinstance(b, Lowtention) and b.projection != "nearest":
            weights = (2 * b.stride if b.stride > 1 else 3) ** 2 * b.channels * (b.inner_channels if b.projection == "fused" else 1)
            total += weights * b.attention_px**2 * (b.stride**2 if by_output_pixels else 1)
    return total


def norm_elements(arch: Arch) -> dict[str, int]:
    """Elements that pass through each kind of norm."""
    batch = group = layer = 0
    for b in arch.blocks():
        match b:
            case StemConv():
                batch += b.out_channels * b.out_px**2
            case Lowtention():
                batch += b.channels * b.attention_px**2
                group += b.norm * b.channels * b.resolution_px**2
            case Mlp():
                group += b.channels * b.resolution_px**2
            case Head():
                batch += b.conv_width * b.resolution_px**2
                layer += b.linear_width
            case _:  # the convolution blocks: a norm at the end, and one on the hidden channels where it is fused
                width = b.in_channels if isinstance(b, Downsampler) else b.channels
                batch += (b.out_channels + b.fused * b.expansion * width) * b.out_px**2
    return {"batch_norm": batch, "group_norm": group, "layer_norm": layer}


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_agrees_exactly(name: str) -> None:
    assert count_with_torch(NETWORKS[name]) == cost.count(NETWORKS[name]).macs


@pytest.mark.parametrize("name", NETWORKS)
def test_fvcore_misses_attention_and_adds_norms(name: str) -> None:
    arch = NETWORKS[name]
    by_operator = count_operators_with_fvcore(arch)
    macs = by_operator["conv"] + by_operator["linear"]
    assert macs == cost.count(arch).macs - attention_products(arch)
    elements = norm_elements(arch)
    assert by_operator["batch_norm"] == 2 * elements["batch_norm"]
    assert by_operator["group_norm"] == 5 * elements["group_norm"]
    assert by_operator["layer_norm"] == 5 * elements["layer_norm"]
    small = by_operator["adaptive_avg_pool2d"] + by_operator["upsample_nearest2d"]
    assert count_with_fvcore(arch) == macs + 2 * elements["batch_norm"] + 5 * (elements["group_norm"] + elements["layer_norm"]) + small
    assert count_with_fvcore(arch) != cost.count(arch).macs


@pytest.mark.parametrize("name", NETWORKS)
def test_thop_misses_attention_and_counts_transposed_convolutions_by_output(name: str) -> None:
    arch = NETWORKS[name]
    elements = norm_elements(arch)
    expected = cost.count(arch).macs - attention_products(arch) + 4 * (elements["batch_norm"] + elements["layer_norm"])
    expected += transposed_convolutions(arch, by_output_pixels=True) - transposed_convolutions(arch)
    assert count_with_thop(arch) == expected


def test_the_gaps_are_there_to_be_seen() -> None:
    arch = NETWORKS["fused attention"]
    assert attention_products(arch) > 0
    assert transposed_convolutions(arch, by_output_pixels=True) == 4 * transposed_convolutions(arch) > 0
    assert attention_products(NETWORKS["convolutions only"]) == transposed_convolutions(NETWORKS["convolutions only"]) == 0


def test_thop_leaves_its_buffers_behind_which_is_why_it_gets_a_throwaway_network() -> None:
    from thop import profile

    with torch.device("meta"):
        model = LowFormer(NETWORKS["nearest attention"]).eval()
        image = torch.empty(1, 3, 128, 128)
    before = set(model.state_dict())
    profile(model, inputs=(image,), verbose=False)
    assert {key.rpartition(".")[2] for key in set(model.state_dict()) - before} == {"total_ops", "total_params"}
