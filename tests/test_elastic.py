"""The supernet's store of weights: every network is cut out exactly, what is nested computes what the larger does when masked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowsearch.arch import Arch, Block, ConvBranch, Lowtention, Mlp
from lowsearch.errors import CheckpointError, NotInSpaceError
from lowsearch.model.blocks import build_block, randomise
from lowsearch.model.elastic import Supernet, Taps, cuts_of
from lowsearch.model.lowformer import build_model
from lowsearch.space import SearchSpace
from lowsearch.train.checkpoint import save_tensors

N_GENOMES = 200


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace.load("lowformer-micro")


@pytest.fixture(scope="module")
def supernet(space: SearchSpace) -> Supernet:
    """With random values everywhere: fresh weights are zero where branches close."""
    supernet = Supernet(space, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in supernet.weights.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return supernet


def image(arch: Arch) -> Tensor:
    return torch.randn(2, 3, arch.resolution_px, arch.resolution_px, generator=torch.Generator().manual_seed(2))


def test_every_network_taken_out_computes_what_it_computed_inside(space: SearchSpace, supernet: Supernet) -> None:
    genomes = space.sample(N_GENOMES, rng=np.random.default_rng(0))
    drawn = [set(genomes[space.active(genomes)[:, gene], gene].tolist()) for gene in range(space.n_genes)]
    assert drawn == [set(range(n)) for n in space.cardinalities], "every choice of every gene is among them, in effect"
    for arch in map(space.decode, genomes):
        x = image(arch)
        with torch.no_grad():
            inside = supernet.logits(arch, x)
            alone = supernet.subnet(arch)
            assert torch.equal(alone.train()(x), inside), arch


def test_the_state_of_a_network_taken_out_is_that_of_a_built_one(space: SearchSpace, supernet: Supernet, tmp_path: Path) -> None:
    for number, arch in enumerate(map(space.decode, space.sample(30, rng=np.random.default_rng(5)))):
        taken = supernet.subnet(arch)
        path = tmp_path / f"{number}.safetensors"
        save_tensors(path, taken.state_dict(), {})
        built = build_model(arch, pretrained=path)  # strict: exactly these keys and shapes
        assert all(torch.equal(value, taken.state_dict()[key]) for key, value in built.state_dict().items())


@pytest.mark.parametrize("name", ["lowformer-micro", "lowformer"])
def test_every_block_of_a_space_has_a_cut_for_every_parameter(name: str) -> None:
    without_pixels = {dataclasses.replace(block, resolution_px=8) for block in SearchSpace.load(name).blocks}
    for block in without_pixels:
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in build_block(block).named_parameters()}
        assert {key: cut.shape for key, cut in cuts_of(block).items()} == expected


def test_places_are_those_of_networks(space: SearchSpace) -> None:
    seen: dict[str, set[Block]] = {}
    for genome in space.sample(3000, rng=np.random.default_rng(1)):
        for place, block in space.decode(genome).named_blocks():
            seen.setdefault(place, set()).add(block)
    assert seen.keys() == space.places.keys()
    assert all(blocks <= set(space.places[place]) for place, blocks in seen.items())
    assert set().union(*space.places.values()) == set(space.blocks)


def test_gradients_reach_exactly_the_weights_of_the_network(space: SearchSpace) -> None:
    supernet = Supernet(space, seed=0)
    arch = space.family["micro-cpu-l"]
    (supernet.logits(arch, image(arch)) ** 2).sum().backward()
    used = {f"{place}.{cut.key}" for place, block in arch.named_blocks() for cut in cuts_of(block).values()}
    assert {key for key, weight in supernet.weights.items() if weight.grad is not None} == used
    before = {key: weight.detach().clone() for key, weight in supernet.weights.items()}
    with torch.no_grad():
        for weight in supernet.weights.values():
            weight -= 1.0 if weight.grad is None else 0.0
    after = supernet.subnet(arch).state_dict()
    supernet.load(before)
    restored = supernet.subnet(arch).state_dict()
    assert all(torch.equal(after[key], restored[key]) for key in restored)


def test_a_fresh_supernet_starts_every_residual_branch_as_the_identity(space: SearchSpace) -> None:
    supernet = Supernet(space, seed=3)
    for arch in map(space.decode, space.sample(20, rng=np.random.default_rng(4))):
        model = supernet.subnet(arch).train()
        for place, block in arch.named_blocks():
            if isinstance(block, ConvBranch | Lowtention | Mlp):
                x = torch.randn(2, block.channels, block.resolution_px, block.resolution_px)
                assert torch.equal(model.block(place)(x), x)
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not name.endswith(("project.weight", "upsample.weight")):
                assert float(weight.detach().std()) > 0, name


def test_the_same_seed_gives_the_same_supernet(space: SearchSpace) -> None:
    first, second, other = (Supernet(space, seed=seed).weights for seed in (5, 5, 6))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


# --- what is nested in what ---------------------------------------------------------------------------------------------------------


def from_store(block: Block, store: dict[str, Tensor]) -> nn.Module:
    """The module of `block` with weights cut from `store`, by the public mapping."""
    module = build_block(block)
    state = module.state_dict()
    for name, cut in cuts_of(block).items():
        stored = store[cut.key]
        state[name] = torch.cat([stored[piece] for piece in cut.pieces(tuple(stored.shape))]).reshape(cut.shape)
    module.load_state_dict(state)
    return module.train()


def store_of(*blocks: Block) -> dict[str, Tensor]:
    extents: dict[str, tuple[int, ...]] = {}
    for block in blocks:
        for cut in cuts_of(block).values():
            known = extents.get(cut.key, cut.extent)
            extents[cut.key] = tuple(map(max, known, cut.extent))
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in extents.items()}


CONV = ConvBranch(channels=8, resolution_px=6, fused=True, expansion=4, kernel=3, groups=1, bias=True)
ATTENTION = Lowtention(channels=64, resolution_px=6, stride=2, kernel=3, heads=2, head_dim=32, projection="fused", norm=True)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_a_smaller_expansion_is_the_larger_with_the_other_hidden_channels_masked(fused: bool, groups: int) -> None:
    large = dataclasses.replace(CONV, fused=fused, groups=groups)
    small = dataclasses.replace(large, expansion=2)
    store = store_of(large)
    x = torch.randn(2, 8, 6, 6)
    expected = from_store(small, store)(x)
    masked = from_store(large, store)
    with torch.no_grad():
        masked.project.weight.view(8, groups, -1)[:, :, 16 // groups :] = 0
    assert torch.allclose(masked(x), expected, atol=1e-5)
    assert not torch.allclose(from_store(large, store)(x), expected, atol=1e-2)


@pytest.mark.parametrize("fused", [True, False])
def test_a_smaller_kernel_of_a_branch_is_the_larger_with_the_other_taps_masked(fused: bool) -> None:
    large = dataclasses.replace(CONV, fused=fused)
    store = store_of(large)
    x = torch.randn(2, 8, 6, 6)
    masked = from_store(large, store)
    conv = masked.expand if fused else masked.depthwise
    with torch.no_grad():  # 2x2 at stride 1 sees its pixel, and those left of it and above
        conv.weight[:, :, 2] = 0
        conv.weight[:, :, :, 2] = 0
    assert torch.allclose(masked(x), from_store(dataclasses.replace(large, kernel=2), store)(x), atol=1e-5)


@pytest.mark.parametrize(
    ("stride", "kernel", "dropped"), [(1, 2, (0, 3, 4)), (2, 2, (0, 1, 4)), (1, 3, (0, 4)), (2, 3, (0, 4)), (4, 3, (0, 4))]
)
def test_a_smaller_kernel_of_attention_is_the_larger_with_the_other_taps_masked(stride: int, kernel: int, dropped: tuple[int, ...]) -> None:
    large = dataclasses.replace(ATTENTION, stride=stride, kernel=5, resolution_px=8)
    store = store_of(large)
    x = torch.randn(2, 64, 8, 8)
    masked = from_store(large, store)
    with torch.no_grad():
        for tap in dropped:
            masked.depthwise.weight[:, :, tap] = 0
            masked.depthwise.weight[:, :, :, tap] = 0
    assert torch.allclose(masked(x), from_store(dataclasses.replace(large, kernel=kernel), store)(x), atol=1e-4)


@pytest.mark.parametrize("projection", ["fused", "unfused", "nearest"])
def test_fewer_heads_are_more_heads_of_which_the_others_are_not_projected(projection: str) -> None:
    large = dataclasses.replace(ATTENTION, projection=projection)
    store = store_of(large)
    x = torch.randn(2, 64, 6, 6)
    masked = from_store(large, store)
    with torch.no_grad():
        if projection == "fused":
            masked.upsample.weight[32:] = 0
        else:
            masked.project.weight[:, 32:] = 0
    expected = from_store(dataclasses.replace(large, heads=1), store)(x)
    assert torch.allclose(masked(x), expected, atol=1e-4)
    assert not torch.allclose(from_store(large, store)(x), expected, atol=1e-2)


def test_narrower_heads_take_the_first_channels_of_queries_keys_and_values_each() -> None:
    large, small = ATTENTION, dataclasses.replace(ATTENTION, head_dim=16)
    store = store_of(large)
    wide = from_store(large, store).qkv.weight.view(2, 3, 32, 64)
    assert torch.equal(from_store(small, store).qkv.weight.view(2, 3, 16, 64), wide[:, :, :16])


def test_a_smaller_mlp_is_the_larger_with_the_other_hidden_channels_masked() -> None:
    large, small = Mlp(channels=8, resolution_px=4, ratio=4), Mlp(channels=8, resolution_px=4, ratio=2)
    store = store_of(large)
    x = torch.randn(2, 8, 4, 4)
    masked = from_store(large, store)
    with torch.no_grad():
        masked.project.weight[:, 16:] = 0
    assert torch.allclose(masked(x), from_store(small, store)(x), atol=1e-5)


def test_a_group_reads_the_columns_of_its_own_channels_at_every_width() -> None:
    wide = dataclasses.replace(CONV, groups=2, channels=8, expansion=1, kernel=3)
    store = {key: value for key, value in store_of(wide).items()}
    columns = store["fused.g2.expand.weight"]
    for channels in (4, 8):
        weight = from_store(dataclasses.replace(wide, channels=channels), store).expand.weight
        half = channels // 2
        assert torch.equal(weight[:half], columns[0, :half, :half]) and torch.equal(weight[half:], columns[1, :half, half:channels])


def test_taps_of_a_space_of_2x2_kernels_only_are_all_of_them() -> None:
    assert Taps(2, 1).within(2) == Taps(2, 2).within(2) == slice(0, 2)


# --- faults -------------------------------------------------------------------------------------------------------------------------


def test_a_network_of_another_space_is_refused(supernet: Supernet, space: SearchSpace) -> None:
    stranger = dataclasses.replace(space.family["micro-b-s"], head_widths=(7, 7))
    with pytest.raises(NotInSpaceError, match="head_widths"):
        supernet.cut(stranger)


def test_weights_of_another_supernet_are_refused_and_change_nothing(supernet: Supernet) -> None:
    before = {key: weight.detach().clone() for key, weight in supernet.weights.items()}
    last = list(before)[-1]
    with pytest.raises(CheckpointError, match=last):
        supernet.load({**{k: torch.zeros_like(v) for k, v in before.items()}, last: torch.zeros(1)})
    assert all(torch.equal(before[key], weight) for key, weight in supernet.weights.items())


def test_inherited_weights_are_a_copy(supernet: Supernet, space: SearchSpace) -> None:
    arch = space.family["micro-b-s"]
    model = supernet.subnet(arch)
    before = {key: weight.detach().clone() for key, weight in supernet.weights.items()}
    randomise(model, seed=9)
    assert all(torch.equal(before[key], weight) for key, weight in supernet.weights.items())
