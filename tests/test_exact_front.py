"""The exact front that benchmarks/exact_front.py judges the search by, against every network of a small space."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lowsearch.search import pareto
from lowsearch.space import SearchSpace

_spec = importlib.util.spec_from_file_location("exact_front", Path(__file__).parents[1] / "benchmarks" / "exact_front.py")
assert _spec and _spec.loader
exact_front = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(exact_front)

TINY = SearchSpace.load(Path(__file__).parent / "tiny_space.yaml")


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_front_of_all_networks(seed):
    rng = np.random.default_rng(seed)
    latency_ms, scores = rng.uniform(0.1, 1, size=(2, len(TINY.blocks)))
    everything = TINY.all_genomes()
    costs = TINY.block_sums(np.column_stack([-scores, latency_ms]))(everything)
    brute = costs[pareto.non_dominated(costs)]
    found = exact_front.exact_front(TINY, latency_ms, scores)
    assert len(found) == len(brute) > 5
    assert np.allclose(found[np.argsort(found[:, 1])], brute[np.argsort(brute[:, 1])])


def test_the_part_it_is_computed_for_is_large_and_lies_in_the_whole():
    micro = SearchSpace.load("lowformer-micro")
    part = exact_front.part_of(micro)
    assert part.size() >= exact_front.GOALS["networks"]
    assert all(micro.contains(part.decode(genome)) for genome in part.sample(50, rng=np.random.default_rng(0)))
