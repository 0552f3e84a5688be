"""Which candidates may train on: the ladder's rungs are decided here, one candidate at a time, without waiting for others.

As in ASHA's stopping variant, a candidate that reaches a rung goes on if it is among the best share of all that reached the rung
before it. Best is meant for a front: the hypervolume that its optimistic score would add, within its own slice of latency. Ranking
by accuracy alone would stop every fast network.
"""

from __future__ import annotations

import math

import numpy as np

from lowsearch.search import pareto

KEEP = 0.5
"""Share of a slice that goes on at each rung. Half: a rung doubles the training, so every rung costs about as much as the one before."""
N_SLICES = 4
OPTIMISM = 1.0
"""Standard deviations that the score is raised by before it is judged."""


def slice_edges(costs: np.ndarray, reference: float) -> list[float]:
    """Inner edges of the slices: quantiles of the second cost of random networks (n,), where it is below the reference."""
    inside = costs[costs < reference]
    if len(inside) < N_SLICES:
        return []
    return [float(edge) for edge in np.quantile(inside, np.arange(1, N_SLICES) / N_SLICES)]


def may_go_on(costs: np.ndarray, std: np.ndarray, *, own: int, at_rung: np.ndarray, edges: list[float], reference: np.ndarray) -> bool:
    """Whether candidate `own` trains on.

    `costs` (n, k) are the estimates of all candidates so far, the uncertain score in column 0 with deviation `std` (n,); `at_rung`
    (n,) marks those that reached this rung, `own` among them.
    """
    slices = np.digitize(costs[:, 1], edges)
    peers = np.flatnonzero(at_rung & (slices == slices[own]))
    gains = {int(i): _optimistic_gain(costs, std, int(i), reference) for i in peers}
    better = sum(gain > gains[own] for gain in gains.values())
    return gains[own] > 0 and better < math.ceil(KEEP * len(peers))


def _optimistic_gain(costs: np.ndarray, std: np.ndarray, i: int, reference: np.ndarray) -> float:
    optimistic = costs[i : i + 1].copy()
    optimistic[0, 0] -= OPTIMISM * std[i]
    return float(pareto.expected_gain(optimistic, np.zeros(1), np.delete(costs, i, axis=0), reference)[0])
