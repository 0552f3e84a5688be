"""Populations of genomes: how children are made of parents, and how repeats are told. The sampler and `search_front` share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from lowsearch.space import SearchSpace

_CROSSED, _MUTATED = 0.7, 0.5
_MEMORY_BITS = 20


def breed(
    space: SearchSpace, genomes: np.ndarray, first: np.ndarray, second: np.ndarray, *, rng: np.random.Generator, rate: float | None = None
) -> np.ndarray:
    """Children (n, n_genes) of the rows `first` (n,) and `second` (n,) of `genomes`: most are crossed, the others mutated (`rate` as in
    `space.mutate`).

    A crossed child is mutated half of the time: alone, each operator finds networks the other does not.
    """
    crossed = rng.random(len(first)) < _CROSSED
    children = genomes[first]
    children[crossed] = space.crossover(children[crossed], genomes[second[crossed]], rng=rng)
    mutated = ~crossed | (rng.random(len(first)) < _MUTATED)
    children[mutated] = space.mutate(children[mutated], rng=rng, rate=rate)
    return children


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it, matrix products run on one thread. They are small: handing them over costs more, on a busy machine several times so."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    with threadpool_limits(limits=1, user_api="blas"):
        yield


def row_hashes(genomes: np.ndarray) -> np.ndarray:
    """64-bit hashes (n,) of genomes (n, n_genes). Two of ten million networks share one with a probability of 3 in a million."""
    n, width = genomes.shape
    padded = np.zeros((n, -(-width // 8) * 8), dtype=np.int8)
    padded[:, :width] = genomes
    hashes = np.full(n, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for word in padded.view(np.uint64).T:  # MurmurHash3's finaliser, word after word
        hashes ^= word
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return hashes ^ (hashes >> np.uint64(33))


def first_of_each(genomes: np.ndarray) -> np.ndarray:
    """Sorted indices of the first of every set of equal genomes."""
    return np.sort(np.unique(row_hashes(genomes), return_index=True)[1])


def unseen_mask(genomes: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Which of `genomes` (n, n_genes) are not among `seen` (m, n_genes), (n,)."""
    return ~np.isin(row_hashes(genomes), row_hashes(seen)) if len(seen) else np.ones(len(genomes), dtype=bool)


class RecentMemory:
    """Which genomes were met lately, in 8 MiB whatever their number: a later one may take an earlier one's place."""

    def __init__(self) -> None:
        self._hashes = np.zeros(1 << _MEMORY_BITS, dtype=np.uint64)

    def new_ones(self, genomes: np.ndarray) -> np.ndarray:
        """Indices (m,) of the first of each of `genomes` (n, n_genes) that is not remembered; from now on it is."""
        hashes, index = np.unique(row_hashes(genomes), return_index=True)
        places = hashes >> np.uint64(64 - _MEMORY_BITS)
        new = self._hashes[places] != hashes
        self._hashes[places[new]] = hashes[new]
        return np.sort(index[new])
