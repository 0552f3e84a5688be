"""The torch modules: every choice of both spaces builds, blocks equal timm's, residual branches start as the identity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.models import cpubone
from torch import Tensor, nn

from lowsearch.arch import Arch, Attention, Block, ConvBranch, Downsampler, Head, Lowtention, Stage, Stem, StemConv, input_channels
from lowsearch.model.blocks import DropPath, LowtentionModule, build_block, randomise
from lowsearch.model.lowformer import LowFormer, build_model
from lowsearch.presets import PRESETS
from lowsearch.space import SearchSpace


def tiny(**changes: Any) -> Arch:
    """A small network that holds every kind of block, grouped and not, fused and not."""
    values: dict[str, Any] = {
        "resolution_px": 64,
        "stem": Stem(width=8, depth=2, expansion=2),
        "stages": (
            Stage(width=12, depth=2, down_expansion=2, fused=False),
            Stage(width=16, depth=2, down_expansion=2, groups=2),
            Stage(width=24, depth=3, attention=Attention(stride=2, kernel=5), mlp_ratio=2, down_fused=False, down_expansion=2),
            Stage(width=32, depth=2, attention=Attention(projection="nearest", kernel=2), kernel=2, fused=False, mlp_ratio=0),
        ),
        "head_widths": (40, 48),
        "num_classes": 7,
    }
    return Arch(**{**values, **changes})


def residual_places(arch: Arch) -> list[str]:
    return [place for place, block in arch.named_blocks() if not isinstance(block, StemConv | Downsampler | Head)]


def on_meta(arch: Arch) -> LowFormer:
    with torch.device("meta"):
        return LowFormer(arch).eval()


@pytest.mark.parametrize("name", ["lowformer", "lowformer-micro"])
def test_every_choice_of_a_space_builds_and_keeps_its_shapes(name: str) -> None:
    space = SearchSpace.load(name)
    genomes = space.sample(150, rng=np.random.default_rng(0))
    uncovered = {(gene, choice) for gene, n in enumerate(space.cardinalities) for choice in range(int(n))}
    for genome in genomes:
        choices = set(enumerate(genome.tolist()))
        if not choices & uncovered:
            continue
        uncovered -= choices
        arch = space.decode(genome)
        model = on_meta(arch)
        x = torch.empty(2, 3, arch.resolution_px, arch.resolution_px, device="meta")
        features = model.features(x)
        assert [tuple(f.shape) for f in features] == [
            (2, stage.width, arch.stage_px(i), arch.stage_px(i)) for i, stage in enumerate(arch.stages, start=1)
        ]
        assert model(x).shape == (2, arch.num_classes)
    assert not uncovered, "a choice that no sampled member has"


@pytest.mark.parametrize("name", ["lowformer", "lowformer-micro"])
def test_every_block_of_a_network_builds_alone(name: str) -> None:
    space = SearchSpace.load(name)
    for genome in space.sample(5, rng=np.random.default_rng(1)):
        for block in set(space.decode(genome).blocks()):
            with torch.device("meta"):
                module = build_block(block).eval()
            x = torch.empty(1, input_channels(block), block.resolution_px, block.resolution_px, device="meta")
            expected = (1, block.num_classes) if isinstance(block, Head) else (1, block.out_channels, block.out_px, block.out_px)
            assert module(x).shape == expected


def copy_into(module: nn.Module, oracle: nn.Module, names: dict[str, str]) -> None:
    """Load the weights of `oracle` into `module`; `names`: our part -> its part."""
    theirs = oracle.state_dict()
    own = {}
    for key in module.state_dict():
        part, _, weight = key.rpartition(".")
        own[key] = theirs.pop(f"{names[part]}.{weight}")
    assert not theirs
    module.load_state_dict(own)


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("px", [7, 13, 14])
@pytest.mark.parametrize("compression", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("projection", ["fused", "unfused", "nearest"])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 2), (1, 3), (1, 5), (2, 2), (2, 3), (2, 5), (4, 5), (4, 7)])
def test_lowtention_equals_timms_also_on_odd_maps(stride: int, kernel: int, projection: str, compression: float, px: int) -> None:
    width = 64
    heads, head_dim = Attention(compression=compression).heads_and_dim(width)
    block = Lowtention(
        channels=width, resolution_px=px, stride=stride, kernel=kernel, heads=heads, head_dim=head_dim,
        projection=projection, norm=False,  # type: ignore[arg-type]
    )  # fmt: skip
    oracle = cpubone.ConvAttention(
        width, head_dim_mul=compression, att_stride=stride, att_kernel=kernel, fuse_out_proj=projection != "unfused",
        small_kernels=kernel == 2, upsample_mode="nearest" if projection == "nearest" else "transpose",
    ).eval()  # fmt: skip
    module = build_block(block).eval()
    randomise(oracle, seed=0)
    padded = ".1" if kernel == 2 and stride == 1 else ""
    copy_into(
        module,
        oracle,
        {
            "depthwise": f"conv_proj.conv{padded}",
            "depthwise_norm": "conv_proj.norm",
            "qkv": "pwise",
            "project": "upsampling.0" if projection == "nearest" else "o_proj",
            "upsample": "upsampling",
        },
    )
    x = torch.randn(2, width, px, px, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_difference(module(x) - x, oracle(x)) <= 1e-5


@pytest.mark.parametrize("px", [7, 14])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3, 5, 7])
@pytest.mark.parametrize("fused", [True, False])
def test_convolution_branch_equals_timms(fused: bool, kernel: int, groups: int, px: int) -> None:
    block = ConvBranch(channels=16, resolution_px=px, fused=fused, expansion=4, kernel=kernel, groups=groups, bias=True)
    module = build_block(block).eval()
    norm, act = nn.BatchNorm2d, nn.Hardswish
    padded = ".1" if kernel == 2 else ""
    common: dict[str, Any] = {"kernel_size": kernel, "expand_ratio": 4, "expand_groups": groups}
    if fused:
        oracle = cpubone.FusedMBConv(16, 16, use_bias=(True, False), norm_layer=(norm, norm), act_layer=(act, None), **common)
        names = {"expand": f"spatial_conv.conv{padded}", "expand_norm": "spatial_conv.norm"}
    else:
        oracle = cpubone.MBConv(
            16, 16, use_bias=(True, True, False), norm_layer=(None, None, norm), act_layer=(act, act, None), **common
        )  # fmt: skip
        names = {"expand": "inverted_conv.conv", "depthwise": f"depth_conv.conv{padded}"}
    randomise(oracle.eval(), seed=0)
    copy_into(module, oracle, {**names, "project": "point_conv.conv", "project_norm": "point_conv.norm"})
    x = torch.randn(2, 16, px, px, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_difference(module(x) - x, oracle(x)) <= 1e-5


@pytest.mark.parametrize("norm", [True, False])
def test_exported_attention_computes_the_same(norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Lowtention(channels=32, resolution_px=9, stride=2, kernel=5, heads=2, head_dim=8, projection="fused", norm=norm)
    module = build_block(block).eval()
    randomise(module, seed=0)
    x = torch.randn(2, 32, 9, 9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fused = module(x)
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        assert relative_difference(module(x), fused) <= 1e-6


def test_a_network_runs_at_other_and_oblong_sizes() -> None:
    model = LowFormer(tiny()).eval()
    with torch.no_grad():
        features = model.features(torch.randn(1, 3, 96, 160))
        assert [tuple(f.shape[2:]) for f in features] == [(24, 40), (12, 20), (6, 10), (3, 5)]
        assert model(torch.randn(2, 3, 50, 70)).shape == (2, 7)


def test_modules_carry_the_places_of_their_blocks() -> None:
    arch = tiny()
    model = LowFormer(arch)
    places = [place for place, _ in arch.named_blocks()]
    assert all(any(key.startswith(f"{place}.") for place in places) for key in model.state_dict())
    for place, block in arch.named_blocks():
        alone = build_block(block)
        assert {k: v.shape for k, v in model.block(place).state_dict().items()} == {k: v.shape for k, v in alone.state_dict().items()}


@pytest.mark.parametrize("arch", [tiny(), PRESETS["lowformer_b0"], PRESETS["cpubone_b0"]], ids=["tiny", "lowformer_b0", "cpubone_b0"])
def test_every_residual_branch_of_a_fresh_network_is_the_identity(arch: Arch) -> None:
    model = build_model(arch, seed=0)
    blocks = dict(arch.named_blocks())
    assert residual_places(arch)
    for train in (True, False):
        model.train(train)
        for place in residual_places(arch):
            block: Block = blocks[place]
            x = torch.randn(2, input_channels(block), 6, 6)
            with torch.no_grad():
                assert torch.equal(model.block(place)(x), x), place


def test_every_residual_branch_learns_from_the_first_step() -> None:
    arch = tiny()
    model = build_model(arch, seed=0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, 64, 64, generator=generator), torch.arange(8) % 7
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    blocks = dict(arch.named_blocks())
    for place in residual_places(arch):
        probe = torch.randn(2, input_channels(blocks[place]), 6, 6, generator=generator)
        assert not torch.equal(model.block(place)(probe), probe), place


def test_initial_weights_follow_the_seed_and_are_all_set() -> None:
    first, again, other = (build_model(tiny(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["stem.conv.conv.weight"], other["stem.conv.conv.weight"])
    for key, value in first.items():
        assert value.device.type == "cpu" and value.isfinite().all() and value.abs().max() < 10, key
        if key.endswith(("running_var", "norm.weight")) and ".project_norm." not in key:
            assert (value == 1).all(), key
        if key.endswith(("running_mean", "num_batches_tracked")):
            assert (value == 0).all(), key


def test_signal_keeps_its_scale_through_a_fresh_network() -> None:
    model = build_model(PRESETS["lowformer_b0"], seed=0).train()
    with torch.no_grad():
        for feature in model.features(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))):
            assert 0.1 < feature.std() < 10


def test_randomise_leaves_no_weight_as_it_was() -> None:
    model = build_model(tiny(), seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    randomise(model, seed=3)
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert (value != before[key]).all(), key
            assert (value != 0).all(), key
    with torch.no_grad():
        assert 0.01 < model.eval()(torch.randn(2, 3, 64, 64)).std() < 100


def test_num_classes_replaces_that_of_the_arch() -> None:
    model = build_model(tiny(), num_classes=3, seed=0)
    assert model.arch == tiny(num_classes=3)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_drop_path_rises_linearly_and_drops_only_in_training() -> None:
    model = build_model(tiny(), drop_path=0.2, seed=0)
    rates = [part.rate for part in model.modules() if isinstance(part, DropPath)]
    assert len(rates) == len(residual_places(tiny()))
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2) and np.allclose(np.diff(rates), rates[1])
    drop = DropPath(0.25)
    x = torch.ones(4000, 1, 1, 1)
    torch.manual_seed(0)
    kept = drop.train()(x)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert kept.mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


def test_mlp_dropout_acts_only_in_training() -> None:
    model = build_model(tiny(), mlp_dropout=0.5)
    randomise(model, seed=0)
    part = model.block("stage3.1.mlp")
    x = torch.randn(1, 24, 4, 4)
    assert torch.equal(part.eval()(x), part(x))
    assert not torch.equal(part.train()(x), part(x))


def test_attention_takes_each_heads_queries_keys_and_values_in_turn() -> None:
    """Against attention written out pixel by pixel."""
    block = Lowtention(channels=8, resolution_px=2, stride=1, kernel=3, heads=2, head_dim=3, projection="fused", norm=False)
    module = build_block(block)
    assert isinstance(module, LowtentionModule)
    qkv = torch.randn(1, 18, 2, 2, generator=torch.Generator().manual_seed(0))
    out = module._attend(qkv)
    for head in range(2):
        q, k, v = (qkv[0, head * 9 + i * 3 : head * 9 + i * 3 + 3].flatten(1) for i in range(3))
        for pixel in range(4):
            weights = torch.softmax(torch.stack([q[:, pixel] @ k[:, other] for other in range(4)]) / 3**0.5, dim=0)
            expected = sum(weights[other] * v[:, other] for other in range(4))
            assert torch.allclose(out[0, head * 3 : head * 3 + 3].flatten(1)[:, pixel], expected, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize(("px", "stride"), [(14, 1), (13, 1), (13, 2), (14, 2)])
@pytest.mark.parametrize("kind", ["attention", "fused", "unfused"])
def test_exported_2x2_convolutions_pad_themselves(kind: str, px: int, stride: int) -> None:
    """A separate padding node would make 2x2 kernels look slow: ONNX Runtime leaves its fast layout for it."""
    import onnx
    import onnxruntime

    from lowsearch.latency.onnx_runtimes import export_onnx

    if kind == "attention":
        block: Block = Lowtention(
            channels=16, resolution_px=px, stride=stride, kernel=2, heads=1, head_dim=8, projection="nearest", norm=True
        )  # fmt: skip
    else:
        block = ConvBranch(channels=16, resolution_px=px, fused=kind == "fused", expansion=2, kernel=2, groups=2, bias=stride == 1)
    module = build_block(block).eval()
    randomise(module, seed=0)
    x = torch.randn(1, 16, px, px, generator=torch.Generator().manual_seed(1))
    exported = export_onnx(module, x)
    assert "Pad" not in [node.op_type for node in onnx.load_from_string(exported).graph.node]
    output = onnxruntime.InferenceSession(exported).run(None, {"input": x.numpy()})[0]
    with torch.no_grad():
        assert relative_difference(torch.from_numpy(output), module(x)) <= 1e-5
