"""SearchSpace: encoding both ways, canonical genomes, compiled sums against the plain definition, malformed files."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest

from lowsearch.arch import Arch
from lowsearch.errors import NotInSpaceError, SpaceError
from lowsearch.presets import PRESETS
from lowsearch.space import SearchSpace

SPACES = {name: SearchSpace.load(name) for name in ("lowformer", "lowformer-micro")}
TINY = """
name: tiny
num_classes: 10
input:
  - {resolution_px: 64, stem_stride: 2}
  - {resolution_px: 32, stem_stride: 1}
stem: {width: [8, 12], depth: [1, 2], fused: [true, false]}
stages:
  - {width: [16]}
  - {width: [16, 24], depth: [1, 2], expansion: [2, 4]}
  - width: [32]
    depth: [1, 2, 3]
    attention: {enabled: [false, true], stride: [1, 2], projection: [fused, nearest]}
    mlp_ratio: [0, 2]
  - {width: [32]}
head_widths: [[64, 64]]
"""


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return SPACES[request.param]


def test_big_space_contains_every_published_network() -> None:
    assert all(SPACES["lowformer"].contains(arch) for arch in PRESETS.values())
    assert SPACES["lowformer"].size() > 1e12


def test_micro_space_names_a_family_of_each_type() -> None:
    names = set(SPACES["lowformer-micro"].family)
    assert {"micro-b-s", "micro-b-l", "micro-e-s", "micro-e-l", "micro-cpu-s", "micro-cpu-l"} <= names


def test_encode_inverts_decode(space: SearchSpace) -> None:
    genomes = space.sample(200, rng=np.random.default_rng(0))
    for genome in genomes:
        assert (space.encode(space.decode(genome)) == genome).all()


def test_decode_inverts_encode_for_the_family(space: SearchSpace) -> None:
    for arch in space.family.values():
        assert space.decode(space.encode(arch)) == arch


def test_size_and_canonical_form_match_brute_force() -> None:
    space = SearchSpace.from_yaml(TINY)
    everything = np.array(list(itertools.product(*(range(n) for n in space.cardinalities))), dtype=np.int8)
    canonical = np.unique(space.canonical(everything), axis=0)
    networks = {space.decode(genome) for genome in everything}
    assert len(canonical) == len(networks) == space.size()


def test_equal_networks_are_equal_genomes(space: SearchSpace) -> None:
    rng = np.random.default_rng(1)
    raw = rng.integers(0, space.cardinalities, size=(300, space.n_genes)).astype(np.int8)
    for genome, canonical in zip(raw, space.canonical(raw), strict=True):
        assert space.decode(genome) == space.decode(canonical)
        assert (space.encode(space.decode(genome)) == canonical).all()


def test_block_sums_equal_the_sum_over_each_networks_blocks(space: SearchSpace) -> None:
    rng = np.random.default_rng(2)
    genomes = space.sample(150, rng=rng)
    values = rng.random((len(space.blocks), 2))
    value_of = dict(zip(space.blocks, values, strict=True))
    expected = [sum(value_of[block] for block in space.decode(genome).blocks()) for genome in genomes]
    np.testing.assert_allclose(space.block_sums(values)(genomes), expected, rtol=1e-12)


def test_block_maxima_are_the_largest_over_each_networks_blocks(space: SearchSpace) -> None:
    rng = np.random.default_rng(2)
    genomes = space.sample(150, rng=rng)
    values = rng.random((len(space.blocks), 2))
    value_of = dict(zip(space.blocks, values, strict=True))
    expected = [np.max([value_of[block] for block in space.decode(genome).blocks()], axis=0) for genome in genomes]
    assert (space.block_maxima(values)(genomes) == np.array(expected)).all()


def test_blocks_are_all_reachable_and_distinct() -> None:
    space = SearchSpace.from_yaml(TINY)
    everything = np.array(list(itertools.product(*(range(n) for n in space.cardinalities))), dtype=np.int8)
    reached = {block for genome in np.unique(space.canonical(everything), axis=0) for block in space.decode(genome).blocks()}
    assert set(space.blocks) == reached and len(space.blocks) == len(reached)


def test_block_sums_refuses_values_of_another_length(space: SearchSpace) -> None:
    with pytest.raises(ValueError, match="expected"):
        space.block_sums(np.zeros((3, 1)))


def test_mutation_stays_in_the_space_and_always_changes_the_network(space: SearchSpace) -> None:
    rng = np.random.default_rng(3)
    genomes = space.sample(300, rng=rng)
    mutants = space.mutate(genomes, rng=rng)
    assert (mutants == space.canonical(mutants)).all()
    assert (mutants != genomes).any(axis=1).all()
    assert all(space.contains(space.decode(mutant)) for mutant in mutants[:50])


def test_crossover_takes_every_gene_from_a_parent_or_resets_it(space: SearchSpace) -> None:
    rng = np.random.default_rng(4)
    first, second = space.sample(100, rng=rng), space.sample(100, rng=rng)
    child = space.crossover(first, second, rng=rng)
    assert ((child == first) | (child == second) | (child == 0)).all()


def test_sampling_is_reproducible_and_covers_every_choice(space: SearchSpace) -> None:
    genomes = space.sample(2000, rng=np.random.default_rng(5))
    assert (genomes == space.sample(2000, rng=np.random.default_rng(5))).all()
    assert (genomes.max(axis=0) == space.cardinalities - 1).all()


def test_features_are_finite_named_and_tell_networks_apart(space: SearchSpace) -> None:
    genomes = np.unique(space.sample(500, rng=np.random.default_rng(6)), axis=0)
    features = space.features(genomes)
    assert features.shape == (len(genomes), len(space.feature_names)) and np.isfinite(features).all()
    assert len(np.unique(features, axis=0)) == len(genomes)


def test_number_of_classes_is_part_of_every_network() -> None:
    space = SPACES["lowformer-micro"].with_num_classes(37)
    arch = space.decode(space.sample(1, rng=np.random.default_rng(0))[0])
    assert arch.num_classes == 37 and all(member.num_classes == 37 for member in space.family.values())
    assert not SPACES["lowformer-micro"].contains(arch)


def test_pickle_keeps_the_space(space: SearchSpace) -> None:
    twin = pickle.loads(pickle.dumps(space))
    assert twin.genes == space.genes and twin.family == space.family


def test_from_yaml_text_reproduces_the_space(space: SearchSpace) -> None:
    assert SearchSpace.from_yaml(space.text).genes == space.genes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"resolution_px": 256}, None),
        ({"resolution_px": 320}, "input"),
        ({"num_classes": 10}, "num_classes"),
        ({"head_widths": (99, 99)}, "head_widths"),
    ],
)
def test_networks_outside_are_named_by_the_setting_at_fault(change: dict[str, object], says: str | None) -> None:
    arch = dataclasses.replace(PRESETS["lowformer_b1"], **change)
    if says is None:
        assert SPACES["lowformer"].contains(arch)
        return
    with pytest.raises(NotInSpaceError, match=says):
        SPACES["lowformer"].encode(arch)


def test_settings_the_file_leaves_out_are_fixed() -> None:
    space = SearchSpace.from_yaml(TINY)
    arch = space.decode(np.zeros(space.n_genes, dtype=np.int8))
    other = dataclasses.replace(arch, stages=(dataclasses.replace(arch.stages[0], down_expansion=2), *arch.stages[1:]))
    with pytest.raises(NotInSpaceError, match="stage1.down_expansion"):
        space.encode(other)


@pytest.mark.parametrize("genome", [[0], [[0]], [99] * 53, [-1] * 53, [0.5] * 53, ["a"] * 53])
def test_malformed_genomes_are_refused(genome: list[object]) -> None:
    with pytest.raises(NotInSpaceError):
        SPACES["lowformer"].decode(np.array(genome))


MALFORMED = [
    ("", 1, "empty"),
    ("name: [", 1, "not YAML"),
    ("- a", 1, "no mapping"),
    (TINY.replace("num_classes", "classes"), 3, "unknown key 'classes'"),
    (TINY.replace("name: tiny\n", ""), 2, "'name' is missing"),
    (TINY.replace("name: tiny", "name: 3"), 2, "name is 3"),
    (TINY.replace("num_classes: 10", "num_classes: ten"), 3, "num_classes"),
    (TINY.replace("num_classes: 10", "num_classes: 0"), 3, "num_classes"),
    (TINY.replace("resolution_px: 32", "resolution_px: 33"), 6, "total stride 16"),
    (TINY.replace("resolution_px: 64", "resolution_px: 48"), 5, "total stride 32"),
    (TINY.replace("resolution_px: 64", "resolution_px: big"), 5, "positive whole number"),
    (TINY.replace("stem_stride: 2", "stem_stride: 3"), 5, "expected 1 or 2"),
    (TINY.replace("stem_stride: 1", "stem_strid: 1"), 6, "unknown key 'stem_strid'"),
    (TINY.replace("{resolution_px: 32, stem_stride: 1}", "32"), 6, "no mapping"),
    (TINY.replace("width: [8, 12]", "width: []"), 7, "no choices"),
    (TINY.replace("width: [8, 12]", "width: 8"), 7, "expected a list"),
    (TINY.replace("width: [8, 12]", "width: [8, 8]"), 7, "twice"),
    (TINY.replace("width: [8, 12]", "width: [8, wide]"), 7, "width"),
    (TINY.replace("width: [8, 12]", "width: [8, 13]"), 7, "even number"),
    (TINY.replace("width: [8, 12], ", ""), 7, "'width' is missing"),
    (TINY.replace("fused: [true, false]", "fused: [yes please]"), 7, "fused"),
    (TINY.replace("fused: [true, false]", "fussed: [true]"), 7, "unknown key 'fussed'"),
    (TINY.replace("fused: [true, false]", "fused: [true], fused: [false]"), 7, "twice"),
    (TINY.replace("expansion: [2, 4]", "expansion: [2, 0]"), 10, "expansion"),
    (TINY.replace("expansion: [2, 4]", "groups: [1, 3]"), 10, "groups"),
    (TINY.replace("expansion: [2, 4]", "down_groups: [1, 3]"), 10, "down_groups"),
    (TINY.replace("expansion: [2, 4]", "kernel: [4]"), 10, "kernel"),
    (TINY.replace("depth: [1, 2, 3]", "depth: [0, 1]"), 12, "depth"),
    (TINY.replace("depth: [1, 2, 3]", "depth: [1.5]"), 12, "depth"),
    (TINY.replace("stride: [1, 2]", "stride: [1, 4]"), 13, "attention on one token"),
    (TINY.replace("stride: [1, 2]", "stride: [3]"), 13, "stride"),
    (TINY.replace("stride: [1, 2]", "kernel: [4]"), 13, "kernel"),
    (TINY.replace("enabled: [false, true]", "enabled: [maybe]"), 13, "true or false"),
    (TINY.replace("projection: [fused, nearest]", "projection: [bicubic]"), 13, "projection"),
    (TINY.replace("projection: [fused, nearest]", "heads: [4]"), 13, "unknown key 'heads'"),
    (TINY.replace("mlp_ratio: [0, 2]", "mlp_ratio: [-1]"), 14, "mlp_ratio"),
    (TINY.replace("  - {width: [16]}\n", ""), 9, "3 entries, expected 4"),
    (TINY.replace("head_widths: [[64, 64]]", "head_widths: [[64]]"), 16, "two positive"),
    (TINY.replace("head_widths: [[64, 64]]", "head_widths: 64"), 16, "expected a list"),
    (TINY + "family: [a]\n", 17, "mapping"),
    (TINY + "family: {b1: preset}\n", 17, "unknown preset"),
    (TINY + "family: {x: lowformer_b1}\n", 17, "not in the space"),
    (TINY + "family: {x: 3}\n", 17, "expected a preset"),
    (TINY + "family: {x: {resolution_px: 32}}\n", 17, "stages"),
    (TINY.replace("width: [16]", f"width: {list(range(4, 260, 2))}"), 9, "at most 100"),
]


@pytest.mark.parametrize(("text", "line", "says"), MALFORMED)
def test_malformed_space_is_refused_with_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(SpaceError, match=says) as caught:
        SearchSpace.from_yaml(text, origin="my.yaml")
    assert caught.value.message.startswith(f"my.yaml:{line}: "), caught.value.message
    assert "\n" not in caught.value.message


def test_unknown_space_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="lowformer-micro"):
        SearchSpace.load("lowfromer")
    with pytest.raises(SpaceError, match="cannot read"):
        SearchSpace.load(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(SpaceError, match="UTF-8"):
        SearchSpace.load(binary)


def test_space_file_in_the_current_directory_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces" / "lowformer-micro.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    assert SearchSpace.load("lowformer-micro").name == "tiny"


def test_decoded_networks_are_arch_values(space: SearchSpace) -> None:
    assert isinstance(space.decode(space.sample(1, rng=np.random.default_rng(0))[0]), Arch)
