"""Arch: canonical values, stable identity, JSON both ways, networks that cannot exist."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from lowsearch.arch import Arch, Attention, Stage, Stem, block_from_dict, block_to_dict
from lowsearch.errors import InvalidArchError, UsageError
from lowsearch.presets import PRESETS, preset

B1 = PRESETS["lowformer_b1"]


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_is_identity(name: str) -> None:
    arch = PRESETS[name]
    assert Arch.from_json(arch.to_json()) == arch


def test_arch_id_is_the_same_in_a_fresh_interpreter() -> None:
    code = "from lowsearch.presets import PRESETS; print(PRESETS['lowformer_b1'].arch_id)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == B1.arch_id


def test_presets_are_distinct_networks() -> None:
    assert len({arch.arch_id for arch in PRESETS.values()}) == len(PRESETS) == 12


def test_fields_without_effect_do_not_distinguish_networks() -> None:
    assert Stage(width=64, depth=1, expansion=2, fused=False, attention=Attention(stride=2), mlp_ratio=4) == Stage(width=64)
    assert Stem(width=16, expansion=2, groups=2) == Stem(width=16)
    assert Stage(width=64, depth=2, expansion=2) != Stage(width=64, depth=2)


def test_blocks_of_b1_follow_the_published_table() -> None:
    kinds = [block.kind for block in B1.blocks()]
    assert kinds.count("downsampler") == 4
    assert kinds.count("attention") == kinds.count("mlp") == kinds.count("conv") == 10
    places = [place for place, _ in B1.named_blocks()]
    assert places[0] == "stem.conv" and places[-1] == "head" and "stage3.5.attention" in places and len(set(places)) == len(places)
    by_place = dict(B1.named_blocks())
    stage3, stage4 = by_place["stage3.1.attention"], by_place["stage4.1.attention"]
    assert (stage3.heads, stage3.head_dim, stage3.attention_px) == (2, 32, 7)
    assert (stage4.heads, stage4.head_dim, stage4.attention_px) == (4, 32, 7)
    assert by_place["stage3.1.conv"].fused and not by_place["stage4.1.conv"].fused


@pytest.mark.parametrize(
    ("width", "heads", "head_dim"), [(128, 2, 32), (160, 2, 40), (192, 3, 32), (224, 3, 37), (256, 4, 32), (320, 5, 32), (512, 8, 32)]
)
def test_heads_follow_the_published_rounding(width: int, heads: int, head_dim: int) -> None:
    assert Attention(compression=0.5).heads_and_dim(width) == (heads, head_dim)


def test_e3_has_attention_without_norm() -> None:
    block = dict(PRESETS["lowformer_e3"].named_blocks())["stage3.1.attention"]
    assert not block.norm
    assert dict(PRESETS["lowformer_b3"].named_blocks())["stage3.1.attention"].norm


def test_every_block_survives_its_dictionary() -> None:
    for arch in PRESETS.values():
        for block in arch.blocks():
            assert block_from_dict(block_to_dict(block)) == block


def _b1(**changes: object) -> dict[str, object]:
    return {**B1.to_dict(), **changes}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (_b1(resolution_px=225), "total stride 32"),
        (_b1(resolution_px="224"), "resolution_px"),
        (_b1(colour="red"), "unknown field 'colour'"),
        (_b1(stages=B1.to_dict()["stages"][:3]), "4 stages"),
        (_b1(stages="four"), "stages"),
        (_b1(stem={"width": 16, "strides": 2}), "unknown field 'strides'"),
        (_b1(stem={"stride": 2}), "'width' is missing"),
        (_b1(stem={"width": 15}), "even number"),
        (_b1(stem={"width": 16, "stride": 3}), "1 or 2"),
        (_b1(head_widths=[1536]), "two positive widths"),
        (_b1(head_widths=[1536, "x"]), "head_widths"),
        (_b1(num_classes=0), "num_classes"),
        ([1, 2], "expected a mapping"),
    ],
)
def test_networks_that_cannot_exist_are_refused(values: object, says: str) -> None:
    with pytest.raises(InvalidArchError, match=says):
        Arch.from_dict(values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"groups": 3}, "groups"),
        ({"kernel": 4}, "kernel"),
        ({"expansion": 0}, "expansion"),
        ({"depth": 0}, "depth"),
        ({"mlp_ratio": -1}, "mlp_ratio"),
        ({"attention": {"stride": 3}}, "attention.stride"),
        ({"attention": {"stride": 4, "kernel": 2}}, "attention.kernel"),
        ({"attention": {"compression": 0.0}}, "compression"),
        ({"attention": {"projection": "bicubic"}}, "projection"),
        ({"fused": 1}, "fused"),
    ],
)
def test_stages_that_cannot_exist_are_refused(fields: dict[str, object], says: str) -> None:
    stages = [*B1.to_dict()["stages"][:3], {"width": 256, "depth": 2, **fields}]
    with pytest.raises(InvalidArchError, match=says):
        Arch.from_dict(_b1(stages=stages))


def test_attention_on_one_token_is_refused() -> None:
    tiny = dataclasses.replace(B1, stages=tuple(dataclasses.replace(s, attention=None) for s in B1.stages), resolution_px=32)
    assert tiny.stage_px(4) == 1
    with pytest.raises(InvalidArchError, match="attention on one token"):
        dataclasses.replace(B1, resolution_px=32)


def test_unknown_preset_names_a_close_one() -> None:
    with pytest.raises(UsageError, match="lowformer_b1"):
        preset("lowformer_b11")


def test_text_that_is_no_architecture_is_refused() -> None:
    with pytest.raises(InvalidArchError, match="not JSON"):
        Arch.from_json("{")
    with pytest.raises(InvalidArchError, match="unknown block kind"):
        block_from_dict({"kind": "pool"})
