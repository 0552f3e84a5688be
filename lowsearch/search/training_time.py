"""How long networks train beside each other, in closed form.

Seconds of CPU follow MACs and activations by powers. The powers are fixed and not learned from a study's own seconds: no clock repeats
itself, and a study that was interrupted has to propose what it would have proposed.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from lowsearch import cost
from lowsearch.space import Scorer, SearchSpace

MACS_POWER, ACTIVATIONS_POWER = 1 / 3, 0.45
"""Between what least squares on the logarithms of the seconds of three studies in `lowformer-micro` found (52, 72 and 125 networks, one
thread): 0.28 to 0.38 and 0.40 to 0.52, 7 to 14 % off for a network left out."""


class TrainingTime:
    """Predicted time of training networks of `space` on one CPU thread, relative to the mean of its family: a `TrainCost`."""

    def __init__(self, space: SearchSpace, *, power: float = 1.0) -> None:
        """`power`: what the time is raised to; below 1, a gain counts for more than its cost."""
        self.space = space
        self.power = power

    def __call__(self, genomes: np.ndarray) -> np.ndarray:
        """(n, n_genes) -> (n,), 1 for a network that takes as long as the mean of the family."""
        return (self._seconds(genomes) / self._unit) ** self.power

    @cached_property
    def _sums(self) -> Scorer:
        costs = [cost.of_block(block) for block in self.space.blocks]
        return self.space.block_sums(np.array([[c.macs, c.activations] for c in costs], dtype=float))

    @cached_property
    def _unit(self) -> float:
        family = [self.space.encode(arch) for arch in self.space.family.values()]
        genomes = np.stack(family) if family else self.space.sample(300, rng=np.random.default_rng(0))
        return float(self._seconds(genomes).mean())

    def _seconds(self, genomes: np.ndarray) -> np.ndarray:
        """In a unit of no meaning."""
        macs, activations = self._sums(genomes).T
        return macs**MACS_POWER * activations**ACTIVATIONS_POWER
