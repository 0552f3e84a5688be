"""Which candidates may train on: the ladder's rungs are decided here, one candidate at a time, without waiting for others.

As in ASHA's stopping variant, a candidate that reaches a rung goes on if it is among the best share of all that reached the rung
before it. Best is meant for a front: the hypervolume that its optimistic score would add, within its own slice of latency. Ranking
by accuracy alone would stop every fast network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lowsearch.search import pareto

KEEP = 0.5
"""Share of a slice that goes on at each rung. Half: a rung doubles the training, so every rung costs about as much as the one before."""
N_SLICES = 4
OPTIMISM = 1.0
"""Standard deviations that the score is raised by before it is judged."""


def slice_edges(costs: np.ndarray, reference: float) -> list[float]:
    """Inner edges of the slices: quantiles of one cost of random networks (n,), where it is below the reference."""
    inside = costs[costs < reference]
    if len(inside) < N_SLICES:
        return []
    return [float(edge) for edge in np.quantile(inside, np.arange(1, N_SLICES) / N_SLICES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A candidate among all that reached its rung in its slice of latency, itself included."""

    gain: float
    """Hypervolume that its optimistic score would add."""
    better: int
    """How many would add more."""
    peers: int
    slice_number: int
    """From 1, the fastest."""

    @property
    def may_go_on(self) -> bool:
        return self.gain > 0 and self.better < math.ceil(KEEP * self.peers)

    @property
    def why(self) -> str:
        """What speaks against training it further; empty where it may go on."""
        if self.may_go_on:
            return ""
        if self.gain <= 0:
            return f"even its optimistic score adds nothing in slice {self.slice_number} of {N_SLICES}"
        return f"{self.better} of {self.peers} in slice {self.slice_number} of {N_SLICES} promise more than its {self.gain:.2g}"


def standing(
    costs: np.ndarray, std: np.ndarray, place: np.ndarray, *, own: int, at_rung: np.ndarray, edges: list[float], reference: np.ndarray
) -> Standing:
    """How candidate `own` stands.

    `costs` (n, k) are the estimates of all candidates so far, the uncertain score in column 0 with deviation `std` (n,); `place` (n,) is
    the cost that `edges` are of; `at_rung` (n,) marks those that reached this rung, `own` among them.
    """
    slices = np.digitize(place, edges)
    peers = np.flatnonzero(at_rung & (slices == slices[own]))
    gains = {int(i): _optimistic_gain(costs, std, int(i), reference) for i in peers}
    better = sum(gain > gains[own] for gain in gains.values())
    return Standing(gain=gains[own], better=better, peers=len(peers), slice_number=int(slices[own]) + 1)


def _optimistic_gain(costs: np.ndarray, std: np.ndarray, i: int, reference: np.ndarray) -> float:
    optimistic = costs[i : i + 1].copy()
    optimistic[0, 0] -= OPTIMISM * std[i]
    return float(pareto.expected_gain(optimistic, np.zeros(1), np.delete(costs, i, axis=0), reference)[0])
