"""search_front and what it shares with the sampler: against all networks of a small space, repeatable, within limits, within memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lowsearch import cost, search_front
from lowsearch.errors import StudyError, UsageError
from lowsearch.search import front, pareto
from lowsearch.search.evolution import RecentMemory, breed, first_of_each, row_hashes, unseen_mask
from lowsearch.search.objectives import parse_limits, parse_objectives
from lowsearch.space import SearchSpace

TINY = SearchSpace.from_yaml("""
name: tiny
num_classes: 10
input:
  - {resolution_px: 64, stem_stride: 2}
  - {resolution_px: 32, stem_stride: 1}
stem: {width: [8, 12], depth: [1, 2], fused: [true, false]}
stages:
  - {width: [16, 24]}
  - {width: [16, 24], depth: [1, 2], expansion: [2, 4]}
  - width: [32]
    depth: [1, 2, 3]
    attention: {enabled: [false, true], stride: [1, 2], projection: [fused, nearest]}
    mlp_ratio: [0, 2]
  - {width: [32, 48]}
head_widths: [[64, 64]]
""")
MICRO = SearchSpace.load("lowformer-micro")


class FakeLatency:
    """A time for every block, drawn at random, that has little to do with its MACs."""

    def __init__(self, space):
        ms = np.random.default_rng(0).uniform(0.01, 0.1, size=(len(space.blocks), 1))
        self._ms = space.block_sums(ms)

    def predict(self, genomes):
        ms = self._ms(genomes)[:, 0]
        return ms, 0.05 * ms


class FakeAccuracy:
    def __init__(self, space):
        self._macs = space.block_sums(np.array([[cost.of_block(block).macs] for block in space.blocks], dtype=float))

    def predict(self, genomes):
        return 0.8 - 0.5 / (1 + self._macs(genomes)[:, 0] / 1e6), np.full(len(genomes), 0.01)


def searched(space, **changes):
    return search_front(space, **{"latency": FakeLatency(space), "accuracy": FakeAccuracy(space), "seed": 0} | changes)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("objectives", ["acc", "params", "acc-latency", "acc-latency-params", "latency-macs", "acc-latency-macs-params"])
def test_of_a_small_space_it_finds_the_whole_front_and_ends(monkeypatch, objectives, listed):
    everything = TINY.all_genomes()
    monkeypatch.setattr(front, "MAX_LISTED", len(everything) if listed else 0)
    found = searched(TINY, objectives=objectives, candidates=10**9)
    all_values = {
        "accuracy": FakeAccuracy(TINY).predict(everything)[0], "latency_ms": FakeLatency(TINY).predict(everything)[0],
        **{
            name: TINY.block_sums(np.array([[getattr(cost.of_block(b), name)] for b in TINY.blocks], dtype=float))(everything)[:, 0]
            for name in ("macs", "params")
        },
    }  # fmt: skip
    costs = parse_objectives(objectives).costs(all_values)
    exact = costs[pareto.non_dominated(costs)]
    mine = found.objectives.costs(found.values)
    assert len(mine) == len(exact)
    assert np.allclose(mine[np.lexsort(mine.T)], exact[np.lexsort(exact.T)])
    assert len(mine) < len(everything)
    assert found.scored == len(everything) if listed else found.scored >= len(mine)


def test_the_same_seed_and_number_give_the_same_front():
    one, two, other = (searched(MICRO, candidates=30_000, seed=seed) for seed in (3, 3, 4))
    assert one.scored == two.scored == 30_000
    assert (one.genomes == two.genomes).all() and (one.values == two.values).all()
    assert one.genomes.shape != other.genomes.shape or (one.genomes != other.genomes).any()


def test_its_members_are_networks_of_the_space_none_dominates_another_and_their_values_are_the_predictions():
    found = searched(MICRO, candidates=50_000)
    assert (MICRO.canonical(found.genomes) == found.genomes).all()
    assert pareto.non_dominated(found.objectives.costs(found.values)).all()
    assert np.allclose(found.values[:, 0], FakeAccuracy(MICRO).predict(found.genomes)[0])
    assert np.allclose(found.values[:, 1], FakeLatency(MICRO).predict(found.genomes)[0])


def test_it_beats_as_many_random_networks():
    found = searched(MICRO, candidates=40_000)
    random = MICRO.sample(40_000, rng=np.random.default_rng(0))
    values = {"accuracy": FakeAccuracy(MICRO).predict(random)[0], "latency_ms": FakeLatency(MICRO).predict(random)[0]}
    costs = found.objectives.costs(found.values), found.objectives.costs(values)
    reference = np.max(np.vstack(costs), axis=0)
    assert pareto.hypervolume(costs[0], reference) > 1.1 * pareto.hypervolume(costs[1], reference)


def test_limits_hold_even_where_no_random_network_keeps_them():
    limits = parse_limits(maxima=["macs=6.5e5"])
    found = searched(MICRO, objectives="latency-params", limits=limits, candidates=100_000)
    assert MICRO.block_sums(np.array([[cost.of_block(b).macs] for b in MICRO.blocks], dtype=float))(found.genomes).max() <= 6.5e5


def test_limits_that_nothing_keeps_are_an_error():
    with pytest.raises(StudyError, match=r"none of 20,000 networks of space 'lowformer-micro' keeps the limits \(macs <= 10\)"):
        searched(MICRO, limits=parse_limits(maxima=["macs=10"]), candidates=20_000)


def test_seconds_end_it_on_the_clock_it_is_given():
    ticks = itertools.count()
    found = searched(MICRO, seconds=5, clock=lambda: next(ticks))
    assert 0 < found.scored <= 8192 + 6 + 4 * 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": None}, "accuracy is an objective"),
        ({"latency": None}, "no latency model"),
        ({"candidates": 0}, "candidates is 0"),
        ({"seconds": 0.0}, "seconds is 0.0"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_scored(changes, message):
    with pytest.raises(UsageError, match=message):
        searched(MICRO, **changes)


def test_a_long_front_is_thinned_to_what_holds_its_hypervolume():
    """Three objectives of which none follows from the others leave tens of thousands of non-dominated networks."""
    found = searched(MICRO, objectives="acc-latency-params", candidates=60_000)
    assert 1000 < len(found.genomes) <= 3000


def test_hashes_tell_genomes_apart_as_their_rows_do():
    genomes = MICRO.sample(3000, rng=np.random.default_rng(0))
    genomes = np.vstack([genomes, MICRO.mutate(genomes, rng=np.random.default_rng(1)), genomes[::7]])
    assert len(np.unique(row_hashes(genomes))) == len(np.unique(genomes, axis=0))
    first = first_of_each(genomes)
    assert (genomes[first] == np.array(list(dict.fromkeys(map(tuple, genomes))))).all()
    assert not unseen_mask(genomes, genomes[first]).any()
    assert unseen_mask(genomes, genomes[:0]).all()


def test_the_memory_lets_every_genome_pass_once():
    memory, genomes = RecentMemory(), MICRO.sample(5000, rng=np.random.default_rng(0))
    twice = np.vstack([genomes, genomes[:100]])
    assert (memory.new_ones(twice) == first_of_each(twice)).all()
    assert len(memory.new_ones(genomes)) < 20  # those whose place another one took


def test_children_are_canonical_and_differ_from_both_parents_about_as_often_as_they_are_mutated():
    rng = np.random.default_rng(0)
    parents = MICRO.sample(500, rng=rng)
    first, second = rng.integers(500, size=(2, 2000))
    children = breed(MICRO, parents, first, second, rng=rng)
    assert (MICRO.canonical(children) == children).all()
    own = ((children != parents[first]) & (children != parents[second])).any(axis=1)
    assert 0.4 < own.mean() < 0.9
