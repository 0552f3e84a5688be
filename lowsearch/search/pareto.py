"""Non-dominated sets and hypervolume, on costs: every column is minimised.

`objectives.Objectives.costs` makes costs from values (accuracy negated, latency as log ms); nothing here knows what a column means.
The reference point is the fixed worst point of a study: cost beyond it counts for nothing.
"""

from __future__ import annotations

import moocore
import numpy as np
from scipy.special import ndtr

MAX_OBJECTIVES = 3
"""`expected_gain` is exact up to three objectives; more would need another acquisition."""


def non_dominated(costs: np.ndarray) -> np.ndarray:
    """Mask (n,) of the points of `costs` (n, k) that no other dominates. Of equal points the first is kept; a point with a cost that
    is not finite is never kept."""
    costs = _points(costs)
    finite = np.isfinite(costs).all(axis=1)
    mask = np.zeros(len(costs), dtype=bool)
    if finite.any():
        mask[finite] = moocore.is_nondominated(costs[finite])
    return mask


def hypervolume(costs: np.ndarray, reference: np.ndarray) -> float:
    """Volume that `costs` (n, k) dominate up to `reference` (k,); points that do not dominate it in every column count for nothing."""
    inside = _inside(_points(costs), reference)
    return float(moocore.hypervolume(inside, ref=reference)) if len(inside) else 0.0


def contributions(costs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Volume (n,) that would be lost without each point; dominated and repeated points lose none."""
    costs = _points(costs)
    values = np.zeros(len(costs))
    use = _is_inside(costs, reference)
    if use.any():
        values[use] = moocore.hv_contributions(costs[use], ref=np.asarray(reference, dtype=float))
    return values


def greedy_cover(draws: np.ndarray, reference: np.ndarray, size: int) -> list[int]:
    """Up to `size` indices of the n points of `draws` (m, n, k), each the one that adds most hypervolume to those before it, on average
    over the m joint draws of what the points may cost.

    Stops early when nothing adds volume in any draw. Within 1 - 1/e of the best subset, because hypervolume is submodular, and so is
    its mean: what adds nothing once adds nothing later.
    """
    assert draws.ndim == 3, f"draws have shape {draws.shape}, expected (m, n, k)"
    chosen: list[int] = []
    left = np.arange(draws.shape[1])
    while len(chosen) < size and len(left):
        gains = np.mean([expected_gain(costs[left], np.zeros(len(left)), costs[chosen], reference) for costs in draws], axis=0)
        left, gains = left[gains > 0], gains[gains > 0]
        if not len(left):
            break
        best = int(np.argmax(gains))
        chosen.append(int(left[best]))
        left = np.delete(left, best)
    return chosen


def expected_gain(costs: np.ndarray, std: np.ndarray, front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Expected hypervolume (n,) that each point of `costs` (n, k) alone would add to `front` (m, k), in closed form for k of 2 or 3.

    The first column of `costs` is normally distributed with standard deviation `std` (n,), 0 for exactly known; the others are
    known. With f(y) the least first cost among the front's members that are no worse than y in the other columns (the reference's
    where there is none), the gain of a point (c, x) is the integral over y >= x of max(0, f(y) - c), and f is constant on the boxes
    between the front's coordinates; E max(0, f - c) = s * (z * Phi(z) + phi(z)) with z = (f - mean) / s.
    """
    costs, front, reference = _points(costs), _points(front), np.asarray(reference, dtype=float)
    k = costs.shape[1]
    assert 2 <= k <= MAX_OBJECTIVES, f"{k} objectives, expected 2 to {MAX_OBJECTIVES}"
    front = _inside(front, reference)
    front = front[non_dominated(front)] if len(front) else front.reshape(0, k)
    edges = [np.unique(np.append(front[:, j], reference[j])) for j in range(1, k)]
    lengths = [_lengths_beyond(costs[:, j], edges[j - 1]) for j in range(1, k)]
    # Before the first edge of a column no member of the front is no worse there: box 0 has the reference's level.
    levels = np.full([len(e) for e in edges], reference[0])
    starts = np.meshgrid(*[np.concatenate([[-np.inf], e[:-1]]) for e in edges], indexing="ij")
    for point in front:
        covered = np.logical_and.reduce([start >= point[j] for j, start in enumerate(starts, start=1)])
        levels[covered] = np.minimum(levels[covered], point[0])
    distinct, place = np.unique(levels, return_inverse=True)
    drop = _expected_drop(costs[:, 0], np.asarray(std, dtype=float), distinct)
    place = place.reshape(levels.shape)
    if k == 2:
        return np.einsum("ni,ni->n", drop[:, place], lengths[0])
    gain = np.zeros(len(costs))
    for i in range(levels.shape[0]):  # one row of boxes at a time keeps the arrays at (n, m)
        gain += lengths[0][:, i] * np.einsum("nj,nj->n", drop[:, place[i]], lengths[1])
    return gain


def _expected_drop(mean: np.ndarray, std: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """E max(0, level - cost) as (n, n_levels)."""
    below = levels[None, :] - mean[:, None]
    s = std[:, None]
    z = below / np.where(s > 0, s, 1.0)
    smooth = below * ndtr(z) + s * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    return np.where(s > 0, np.maximum(smooth, 0.0), np.maximum(below, 0.0))


def _lengths_beyond(x: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Length (n, n_edges) of the part of each interval that ends at `edges` and lies beyond `x`; the first one starts at -inf."""
    starts = np.concatenate([[-np.inf], edges[:-1]])
    return np.maximum(edges[None, :] - np.maximum(starts[None, :], x[:, None]), 0.0)


def _points(costs: np.ndarray) -> np.ndarray:
    array = np.asarray(costs, dtype=float)
    assert array.ndim == 2, f"costs have shape {array.shape}, expected (n, k)"
    return array


def _is_inside(costs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    below = np.isfinite(costs) & (costs < np.asarray(reference, dtype=float))
    return np.logical_and.reduce(below, axis=1)


def _inside(costs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return costs[_is_inside(costs, reference)]
