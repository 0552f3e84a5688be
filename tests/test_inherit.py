"""Pretrained starts: every weight comes from the place that stands for the same, and the same network computes the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_train import BRIEF, STEPS, assert_same

from lowsearch.arch import Arch, Attention, Stage, Stem
from lowsearch.cli import invoke
from lowsearch.data import ImageData, load_data
from lowsearch.errors import CheckpointError, StudyError
from lowsearch.model.blocks import randomise
from lowsearch.model.inherit import inherit_weights, inheritance, nearest_published, pretrained_start
from lowsearch.model.lowformer import LowFormer, build_model
from lowsearch.presets import preset
from lowsearch.train import train


def network(*, width: int = 8, late: dict[str, Any] | None = None, early: dict[str, Any] | None = None) -> Arch:
    """Stages of `width`, `width`, 16 x `width`, 16 x `width` channels; `early` shapes the first two, `late` the others."""
    shape: dict[str, Any] = {"depth": 2, "mlp_ratio": 2, "down_expansion": 2, "expansion": 2, **(late or {})}
    first = {"down_expansion": 2, **(early or {})}
    attention = shape.pop("attention", Attention(stride=2, kernel=5))
    return Arch(
        resolution_px=64, stem=Stem(width=width, stride=1), num_classes=10, head_widths=(32, 32),
        stages=(
            Stage(width=width, **first),
            Stage(width=width, **first),
            Stage(width=16 * width, attention=attention, **shape),
            Stage(width=16 * width, attention=dataclasses.replace(attention, projection="nearest"), **shape | {"fused": False}),
        ),
    )  # fmt: skip


def published(arch: Arch, seed: int = 1) -> LowFormer:
    """A network of `arch` in which no weight is special."""
    model = build_model(arch)
    randomise(model, seed=seed)
    return model.eval()


def same_outputs(model: LowFormer, other: LowFormer, *, exactly: bool = True) -> bool:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = model.eval()(x), other.eval()(x)
    assert theirs.std() > 1e-3
    return torch.equal(ours, theirs) if exactly else torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max().item())


KINDS: dict[str, Arch] = {
    "fused": network(),
    "unfused": network(late={"fused": False, "down_fused": False}, early={"down_fused": False}),
    "grouped": network(late={"groups": 2, "kernel": 2, "down_groups": 2}, early={"down_groups": 2}),
    "attention unfused": network(late={"attention": Attention(stride=2, kernel=2, projection="unfused")}),
    "no MLP": network(late={"mlp_ratio": 0}),
    "no attention": dataclasses.replace(
        network(), stages=tuple(dataclasses.replace(s, attention=None) for s in network().stages)  # pyright: ignore[reportArgumentType]
    ),
    "deep stem": dataclasses.replace(network(), stem=Stem(width=8, stride=1, depth=3, expansion=2)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_network_inherits_everything_and_computes_the_same(kind: str) -> None:
    source, model = published(KINDS[kind]), build_model(KINDS[kind], seed=0)
    report = inherit_weights(model, source, source="it")
    assert same_outputs(model, source)
    assert report.share == report.overlap == 1.0 and set(report.blocks.values()) == {1.0} and report.source == "it"
    for name, value in model.named_parameters():
        assert torch.equal(value, source.get_parameter(name)), name


@pytest.mark.parametrize("kind", ["fused", "grouped", "attention unfused", "no MLP"])
def test_deeper_network_computes_what_its_source_does(kind: str) -> None:
    source = published(KINDS[kind])
    stem, stages = source.arch.stem, source.arch.stages
    deeper = tuple(dataclasses.replace(s, depth=s.depth + 2) for s in stages)
    arch = dataclasses.replace(source.arch, stages=deeper, stem=dataclasses.replace(stem, depth=stem.depth + 1))
    model = build_model(arch, seed=0)
    report = inherit_weights(model, source)
    assert same_outputs(model, source)
    assert report.copied_params == report.source_params < report.params
    assert {place for place, share in report.blocks.items() if share == 0} == set(report.blocks) - set(dict(source.arch.named_blocks()))


def test_shallower_network_takes_the_first_blocks() -> None:
    source = published(network(late={"depth": 4}))
    model = build_model(network(late={"depth": 2}), seed=0)
    assert inherit_weights(model, source).share == 1.0
    for name, value in model.named_parameters():
        assert torch.equal(value, source.get_parameter(name))


def test_narrower_network_holds_the_slices_of_its_source() -> None:
    wide, narrow = network(width=16), network(width=8)  # stages 3 and 4: 256 and 128 channels, 4 and 2 heads of 32
    source, model = published(wide), build_model(narrow, seed=0)
    theirs = source.state_dict()
    assert inherit_weights(model, source).share == 1.0
    c, hidden, qkv = 128, 256, theirs["stage3.1.attention.qkv.weight"]
    expected = {
        "stem.conv.conv.weight": theirs["stem.conv.conv.weight"][:8],
        "stage3.down.expand.weight": theirs["stage3.down.expand.weight"][:16, :8],
        "stage3.down.project.weight": theirs["stage3.down.project.weight"][:c, :16],
        "stage3.1.conv.expand.weight": theirs["stage3.1.conv.expand.weight"][:hidden, :c],
        "stage3.1.conv.expand_norm.running_var": theirs["stage3.1.conv.expand_norm.running_var"][:hidden],
        "stage3.1.conv.project_norm.running_mean": theirs["stage3.1.conv.project_norm.running_mean"][:c],
        "stage4.1.conv.depthwise.weight": theirs["stage4.1.conv.depthwise.weight"][:hidden],
        "stage4.1.conv.depthwise.bias": theirs["stage4.1.conv.depthwise.bias"][:hidden],
        "stage3.1.mlp.expand.weight": theirs["stage3.1.mlp.expand.weight"][:hidden, :c],
        "stage3.1.mlp.project.bias": theirs["stage3.1.mlp.project.bias"][:c],
        "stage3.1.mlp.norm.weight": theirs["stage3.1.mlp.norm.weight"][:c],
        "stage3.1.attention.qkv.weight": qkv.view(4, 3, 32, 256, 1, 1)[:2, :, :, :c].reshape(192, c, 1, 1),
        "stage3.1.attention.upsample.weight": theirs["stage3.1.attention.upsample.weight"][:64, :c],
        "stage4.1.attention.project.weight": theirs["stage4.1.attention.project.weight"][:c, :64],
        "head.conv.weight": theirs["head.conv.weight"][:, :c],
        "head.classifier.weight": theirs["head.classifier.weight"],
    }  # fmt: skip
    state = model.state_dict()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def test_fewer_heads_are_whole_heads() -> None:
    """Compression 0.5 is two heads of 32 at 128 channels, 0.25 is one: the source with its second head silenced computes the same."""
    two, one = (network(late={"attention": Attention(stride=2, kernel=5, compression=share)}) for share in (0.5, 0.25))
    source, model = published(two), build_model(one, seed=0)
    inherit_weights(model, source)
    state = source.state_dict()
    state["stage3.1.attention.upsample.weight"][32:] = 0
    state["stage4.1.attention.project.weight"][:, 32:] = 0
    assert same_outputs(model, source, exactly=False)


def test_smaller_mlp_and_expansion_are_their_source_with_silenced_hidden_channels() -> None:
    source, model = published(network(late={"mlp_ratio": 4, "expansion": 4})), build_model(network(), seed=0)
    inherit_weights(model, source)
    state = source.state_dict()
    for stage in (3, 4):
        for branch in ("mlp", "conv"):
            state[f"stage{stage}.1.{branch}.project.weight"][:, 256:] = 0
    assert same_outputs(model, source, exactly=False)


def test_narrower_groups_take_the_first_channels_of_every_group() -> None:
    shape: dict[str, Any] = {"late": {"groups": 2, "fused": False, "down_groups": 2}}
    source, model = published(network(width=16, **shape)), build_model(network(width=8, **shape), seed=0)
    inherit_weights(model, source)
    theirs, ours = source.state_dict(), model.state_dict()
    channels = torch.cat([torch.arange(64), torch.arange(128, 192)])
    hidden = torch.cat([torch.arange(128), torch.arange(256, 384)])
    key = "stage3.1.conv.expand.weight"  # (512, 128, 1, 1) in two groups, here (256, 64, 1, 1)
    assert torch.equal(ours[key], theirs[key][hidden][:, :64])
    assert torch.equal(ours["stage3.1.conv.project.weight"], theirs["stage3.1.conv.project.weight"][channels][:, hidden])
    assert torch.equal(ours["stage3.1.mlp.norm.bias"], theirs["stage3.1.mlp.norm.bias"][channels])
    assert torch.equal(ours["head.conv.weight"], theirs["head.conv.weight"][:, channels])


def test_dense_network_computes_what_its_grouped_source_does() -> None:
    source, model = published(KINDS["grouped"]), build_model(network(late={"kernel": 2}), seed=0)
    report = inherit_weights(model, source)
    assert report.copied_params == report.source_params < report.params
    assert same_outputs(model, source, exactly=False)


@pytest.mark.parametrize(("small", "large"), [(2, 3), (3, 5), (2, 7)])
def test_larger_kernel_computes_what_its_source_does(small: int, large: int) -> None:
    attentions = [Attention(stride=2, kernel=k) for k in (small, large)]
    source = published(network(late={"kernel": small, "attention": attentions[0]}))
    model = build_model(network(late={"kernel": large, "attention": attentions[1]}), seed=0)
    inherit_weights(model, source)
    assert same_outputs(model, source, exactly=False)


def test_smaller_kernel_keeps_the_taps_at_its_own_offsets() -> None:
    source = published(network(late={"kernel": 5}))
    model = build_model(network(late={"kernel": 3}), seed=0)
    inherit_weights(model, source)
    key = "stage3.1.conv.expand.weight"
    assert torch.equal(model.state_dict()[key], source.state_dict()[key][..., 1:4, 1:4])
    two = build_model(network(late={"kernel": 2}), seed=0)
    inherit_weights(two, source)
    assert torch.equal(two.state_dict()[key], source.state_dict()[key][..., 1:3, 1:3])


def test_what_has_no_counterpart_keeps_its_own_initialisation() -> None:
    arch = network(width=16, late={"attention": Attention(stride=1)})
    model, fresh, source = build_model(arch, seed=3), build_model(arch, seed=3).state_dict(), published(network(late={"mlp_ratio": 0}))
    report = inherit_weights(model, source)
    state, theirs = model.state_dict(), source.state_dict()
    assert report.blocks["stage3.1.mlp"] == 0
    assert all(torch.equal(state[k], fresh[k]) for k in state if ".mlp." in k)
    key = "stage3.1.conv.expand.weight"  # (512, 256, 3, 3) from (256, 128, 3, 3)
    assert torch.equal(state[key][:256, :128], theirs[key])
    assert torch.equal(state[key][256:], fresh[key][256:]) and torch.equal(state[key][:, 128:], fresh[key][:, 128:])
    # Another stride and a norm before it: what was learned to close the branch means nothing here.
    assert not state["stage3.1.attention.upsample.weight"].any()
    assert torch.equal(
        state["stage3.1.attention.qkv.weight"].view(4, 3, 32, 256)[:2, :, :, :128],
        theirs["stage3.1.attention.qkv.weight"].view(2, 3, 32, 128),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_report_counts_what_was_written(kind: str) -> None:
    """Oracle: into a network of NaN, from a source without NaN or zero."""
    source = published(KINDS["grouped" if kind != "grouped" else "fused"])
    model = build_model(KINDS[kind], seed=0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.fill_(torch.nan)
    report = inherit_weights(model, source)
    assert report.copied_params == sum(int((~p.isnan() & (p != 0)).sum()) for p in model.parameters())
    assert report == inheritance(KINDS[kind], source.arch)


def test_other_classes_start_afresh() -> None:
    source, model = published(network()), build_model(network(), num_classes=7, seed=0)
    inherit_weights(model, source)
    fresh = build_model(network(), num_classes=7, seed=0).state_dict()
    assert torch.equal(model.state_dict()["head.classifier.weight"], fresh["head.classifier.weight"])
    assert torch.equal(model.state_dict()["head.linear.weight"], source.state_dict()["head.linear.weight"])


# --- which source -----------------------------------------------------------------------------------------------------------------


def test_nearest_published_network_is_the_one_that_is_changed_least() -> None:
    b1 = dataclasses.replace(preset("lowformer_b1"), resolution_px=160, num_classes=5)
    assert nearest_published(b1).source == "lowformer_b1" and nearest_published(b1).overlap == 1.0
    stages = tuple(dataclasses.replace(s, depth=s.depth + (i == 2)) for i, s in enumerate(b1.stages))
    assert nearest_published(dataclasses.replace(b1, stages=stages)).source == "lowformer_b1"  # pyright: ignore[reportArgumentType]
    assert nearest_published(preset("cpubone_b0")).source == "cpubone_b0"


def test_start_from_a_file_in_timm_s_layout(tmp_path: Path) -> None:
    import timm

    file = tmp_path / "published.safetensors"
    theirs = timm.create_model("lowformer_b0", num_classes=12)
    save_file(theirs.state_dict(), file)
    b0 = dataclasses.replace(preset("lowformer_b0"), resolution_px=64, num_classes=12)
    model, report = pretrained_start(b0, seed=0, weights=file)
    assert report.source == "lowformer_b0" and report.share == 1.0
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(model.eval()(x), theirs.eval()(x), atol=1e-5)


def test_file_that_fits_no_network_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(published(network()).state_dict(), file)
    with pytest.raises(CheckpointError, match="fits no published network"):
        pretrained_start(network(), seed=0, weights=file)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        pretrained_start(network(), seed=0, weights=tmp_path / "nowhere.pth")


# --- training from it -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> ImageData:
    data = load_data("fashion-mnist-mini")
    take = {name: getattr(data, name).take(np.arange(n)) for name, n in (("train", 96), ("val", 50), ("test", 50))}
    return dataclasses.replace(data, **take)


def small(depth: int = 2) -> Arch:
    return network(width=4, late={"depth": depth})


def test_interrupted_training_from_inherited_weights_ends_bit_identical(images: ImageData, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(done: float) -> None:
        if round(done * STEPS) == 3:
            raise Killed

    def start() -> dict[str, torch.Tensor]:
        model = build_model(small(depth=3), seed=0)
        inherit_weights(model, published(small()))
        return model.state_dict()

    def run(**options: Any) -> Any:
        return train(small(depth=3), images, BRIEF, seed=0, init=start(), **options)

    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(Killed):
        run(checkpoint=checkpoint, progress=kill)
    assert_same(run(checkpoint=checkpoint), run())
    with pytest.raises(StudyError, match="was made with init"):
        train(small(depth=3), images, BRIEF, seed=0, checkpoint=checkpoint)


def test_train_starts_from_a_file_and_says_what_was_inherited(
    images: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    splits = {name: getattr(images, name) for name in ("train", "val", "test")}
    np.savez("d.npz", **{f"x_{n}": s.images for n, s in splits.items()}, **{f"y_{n}": s.labels for n, s in splits.items()})
    Path("source").mkdir()
    Path("source/arch.json").write_text(small().to_json())
    save_file(published(small()).state_dict(), "source/model.safetensors")
    Path("arch.json").write_text(small(depth=3).to_json())
    command = ["train", "arch.json", "--data", "npz:d.npz", "--epochs", "1", "--recipe-set", "batch_size=48"]
    inherited = [*command, "--init", "pretrained", "--weights", "source/model.safetensors"]
    assert invoke(inherited) == 0
    assert f"inherited from {small().arch_id}; nothing by stage3.2.attention" in capsys.readouterr().err
    (folder,) = Path("trained").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"from-{small().arch_id}" in folder.name and 0.5 < metrics["origin"]["share"] < 1 and metrics["init"]
    assert invoke(inherited) == 0  # done already
    assert invoke([*command, "--out", str(folder)]) == 2  # another start
    assert invoke([*command, "--weights", "source/model.safetensors"]) == 2
    assert "--init pretrained" in capsys.readouterr().err
