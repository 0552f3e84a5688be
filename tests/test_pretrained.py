"""Checkpoints: what is written reads back, foreign layouts load strictly, and everything else is refused with the key at fault."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import cpubone, lowformer
from torch import Tensor, nn

from lowsearch.arch import Arch, Attention, Stage, Stem
from lowsearch.errors import CheckpointError
from lowsearch.model import pretrained
from lowsearch.model.blocks import randomise
from lowsearch.model.lowformer import LowFormer, build_model
from lowsearch.model.pretrained import TIMM_NAMES, Layout, part_names, preset_of
from lowsearch.presets import PRESETS


def small_arch(*, cpu: bool = False, **changes: Any) -> Arch:
    """Small and of the published structure, so that timm can hold it."""
    groups, kernel = (2, 2) if cpu else (1, 3)

    def attention(stride: Literal[1, 2]) -> Attention:
        return Attention(stride=stride, kernel=2 if cpu else (5 if stride == 2 else 3), projection="nearest" if cpu else "fused")

    common: dict[str, Any] = {"down_expansion": 4, "down_groups": groups, "groups": groups}
    values: dict[str, Any] = {
        "resolution_px": 64,
        "stem": Stem(width=8, depth=2, expansion=2, groups=groups),
        "stages": (
            Stage(width=16, depth=2, **common),
            Stage(width=24, depth=1, **common),
            Stage(width=32, depth=3, attention=attention(2), mlp_ratio=4, kernel=kernel, **common),
            Stage(width=256, depth=2, attention=attention(1), mlp_ratio=4, kernel=kernel, fused=False, **common),
        ),
        "head_widths": (40, 48),
        "num_classes": 7,
    }
    return Arch(**{**values, **changes})


TIMM_ARGUMENTS: dict[str, Any] = {
    "width_list": [8, 16, 24, 32, 256], "depth_list": [1, 2, 1, 2, 1], "head_widths": (40, 48), "num_classes": 7, "fused_conv": True,
    "attn_mlp_ratio": 4,
}  # fmt: skip


def foreign(layout: Layout) -> tuple[Arch, dict[str, Tensor]]:
    """An architecture and random weights for it in `layout`, made by the other side's own network."""
    if layout == "timm-cpubone":
        arch = small_arch(cpu=True)
        model: nn.Module = cpubone.CPUBone(
            **TIMM_ARGUMENTS, fused_downsample=True, expand_groups=2, small_kernels=True, attn_upsample="nearest"
        )
    else:
        arch = small_arch()
        model = lowformer.LowFormer(**TIMM_ARGUMENTS) if layout == "timm-lowformer" else LowFormer(arch)
    randomise(model.eval(), seed=0)
    state = model.state_dict()
    if layout == "authors":  # named by our table; that the table is theirs is proven in test_parity
        names = part_names(arch, "authors")
        state = {f"backbone.{names[part]}.{leaf}": v for key, v in state.items() for part, _, leaf in [key.rpartition(".")]}
        state = {key.replace("backbone.head.", "head."): value for key, value in state.items()}
    return arch, state


def save_weights(model: nn.Module, path: Path) -> None:
    save_file(model.state_dict(), path)


LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_completely(layout: Layout, suffix: str, tmp_path: Path) -> None:
    arch, state = foreign(layout)
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = build_model(arch, pretrained=path)
    key = next(key for key in state if key.endswith("classifier.weight") or key.endswith("linear.weight") and state[key].shape[0] == 7)
    assert torch.equal(model.block("head").state_dict()["classifier.weight"], state[key])
    assert sorted(v.double().sum().item() for v in model.state_dict().values()) == sorted(v.double().sum().item() for v in state.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_missing_key_is_an_error_that_names_it(layout: Layout, tmp_path: Path) -> None:
    arch, state = foreign(layout)
    for key in list(state)[5::7]:
        save_file({k: v for k, v in state.items() if k != key}, tmp_path / "weights.safetensors")
        with pytest.raises(CheckpointError) as caught:
            build_model(arch, pretrained=tmp_path / "weights.safetensors")
        assert pretrained._without_containers(key) in caught.value.message if layout == "authors" else key in caught.value.message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unexpected_key_is_an_error_that_names_it(layout: Layout, tmp_path: Path) -> None:
    arch, state = foreign(layout)
    save_file({**state, "stages.0.extra.weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"stages\.0\.extra\.weight"):
        build_model(arch, pretrained=tmp_path / "weights.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_another_architecture_are_refused(layout: Layout, tmp_path: Path) -> None:
    arch, state = foreign(layout)
    save_file(state, tmp_path / "weights.safetensors")
    stages = arch.stages
    deeper = dataclasses.replace(arch, stages=(*stages[:3], dataclasses.replace(stages[3], depth=3)))
    shallower = dataclasses.replace(arch, stages=(*stages[:2], dataclasses.replace(stages[2], depth=2), stages[3]))
    wider = dataclasses.replace(arch, head_widths=(40, 64))
    for other, message in ((deeper, "missing"), (shallower, "has not"), (wider, "shape")):
        with pytest.raises(CheckpointError, match=message):
            build_model(other, pretrained=tmp_path / "weights.safetensors")


def test_names_of_parts_are_unique_in_every_layout() -> None:
    for arch in PRESETS.values():
        with torch.device("meta"):
            parts = {key.rpartition(".")[0] for key in LowFormer(arch).state_dict()}
        for layout in LAYOUTS:
            names = part_names(arch, layout)
            used = [names[part] for part in parts]
            assert len(set(used)) == len(used)


def test_saved_weights_read_back_bit_for_bit(tmp_path: Path) -> None:
    arch = small_arch(cpu=True)
    model = build_model(arch, seed=1)
    randomise(model, seed=2)
    save_weights(model, tmp_path / "model.safetensors")
    again = build_model(arch, pretrained=tmp_path / "model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_another_number_of_classes_is_refused_unless_asked_for(tmp_path: Path) -> None:
    arch = small_arch()
    model = build_model(arch, seed=1)
    randomise(model, seed=2)
    save_weights(model, tmp_path / "model.safetensors")
    ten = dataclasses.replace(arch, num_classes=10)
    with pytest.raises(CheckpointError, match="7 classes, the network for 10") as caught:
        build_model(ten, pretrained=tmp_path / "model.safetensors")
    assert caught.value.hint and "num_classes=10" in caught.value.hint
    fresh = build_model(arch, num_classes=10, pretrained=tmp_path / "model.safetensors", seed=3)
    assert fresh.arch == ten
    for key, value in model.state_dict().items():
        if key.startswith("head.classifier."):
            assert fresh.state_dict()[key].shape[0] == 10
        else:
            assert torch.equal(fresh.state_dict()[key], value), key
    start = build_model(ten, seed=3).state_dict()["head.classifier.weight"]
    assert torch.equal(fresh.state_dict()["head.classifier.weight"], start)


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploited",)


def write(path: Path, content: object) -> Path:
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "empty.safetensors": b"",
        "text.safetensors": b"not tensors at all",
        "cut.safetensors": (200).to_bytes(8, "little") + b'{"a":{"dtype":"F32"',
        "empty.pth": b"",
        "text.pth": b"not tensors at all",
        "zip.pth": b"PK\x03\x04garbage",
        "pickle.pth": pickle.dumps(Exploit(), protocol=2),
        "exploit.pth": {"state_dict": Exploit()},
        "list.pth": [torch.ones(2)],
        "number.pth": 3,
        "nothing.pth": {},
        "mixed.pth": {"stem.conv.conv.weight": torch.ones(2), "epoch": 3},
        "other.pth": {"conv1.weight": torch.ones(2)},
    }.items(),
)
def test_what_is_no_checkpoint_is_refused_and_never_run(
    name: str, content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / name, content)
    with pytest.raises(CheckpointError) as caught:
        build_model(small_arch(), pretrained=path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name]


def test_a_truncated_file_is_refused_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(build_model(small_arch(), seed=0), path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            build_model(small_arch(), pretrained=path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_damaged_file_never_fails_otherwise_than_by_refusal(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    state = {"stem.conv.conv.weight": torch.ones(2, 3)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            pretrained.read_checkpoint(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


def test_a_missing_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at") as caught:
        build_model(small_arch(), pretrained=tmp_path / "nowhere.pth")
    assert caught.value.hint


def test_presets_are_found_at_any_resolution_and_number_of_classes() -> None:
    for name, arch in PRESETS.items():
        assert preset_of(dataclasses.replace(arch, resolution_px=160, num_classes=10)) == name
    assert preset_of(small_arch()) is None


def test_timm_knows_every_published_name() -> None:
    assert set(TIMM_NAMES) == set(PRESETS) - {"lowformer_b2"}
    assert set(TIMM_NAMES.values()) <= set(timm.list_models("lowformer*", pretrained=True) + timm.list_models("cpubone*", pretrained=True))


@pytest.mark.parametrize("arch", [PRESETS["lowformer_b2"], small_arch()], ids=["lowformer_b2", "unpublished"])
def test_an_architecture_without_published_weights_is_refused(arch: Arch) -> None:
    with pytest.raises(CheckpointError, match="no published weights") as caught:
        pretrained.download(arch)
    assert caught.value.hint and "lowformer_b1" in caught.value.hint


def test_no_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> nn.Module:
        raise FileNotFoundError("cannot reach the hub\nand a long story")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"could not fetch lowformer_b0\.in1k.*: cannot reach the hub") as caught:
        build_model(PRESETS["lowformer_b0"], pretrained="timm")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lowformer_b0", "cpubone_b0"])
def test_published_weights_come_through_timm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    asked = []

    def hub(model_name: str, *, pretrained: bool) -> nn.Module:
        asked.append((model_name, pretrained))
        model = create(model_name, pretrained=False).eval()  # with the extra norms of the released CPUBone
        randomise(model, seed=0)
        return model

    monkeypatch.setattr(timm, "create_model", hub)
    ours = build_model(PRESETS[name], pretrained="timm").eval()
    assert asked == [(TIMM_NAMES[name], True)]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = hub(TIMM_NAMES[name], pretrained=True)(x)
        assert float((ours(x) - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_file_written_by_us_holds_the_places_as_keys(tmp_path: Path) -> None:
    save_weights(build_model(small_arch(), seed=0), tmp_path / "model.safetensors")
    assert "stage3.1.attention.qkv.weight" in load_file(tmp_path / "model.safetensors")
