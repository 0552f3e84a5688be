"""Non-dominated sets and hypervolume, on costs: every column is minimised.

`objectives.Objectives.costs` makes costs from values (accuracy negated, latency as log ms); nothing here knows what a column means.
The reference point is the fixed worst point of a study: cost beyond it counts for nothing.
"""

from __future__ import annotations

import moocore
import numpy as np
from scipy.special import ndtr

EXACT_OBJECTIVES = 4
"""Up to so many, `contributions` and `ExpectedGain` are exact for a front of any size; beyond, the time would be out of bounds."""
_SAMPLES = 1 << 14
_MAX_BOXES = 4096
_CELLS = 1 << 16  # Of points and boxes that are handled at once: they stay in the L2 cache.


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
    """Volume (n,) that each point alone dominates among those that no other dominates; dominated and repeated points hold none.

    With more than EXACT_OBJECTIVES columns, what of 16,384 random points, the same every time, says of it.
    """
    costs, reference = _points(costs), np.asarray(reference, dtype=float)
    values, k = np.zeros(len(costs)), len(reference)
    use = _is_inside(costs, reference)
    if not use.any():
        return values
    if k <= EXACT_OBJECTIVES:
        thick = ((0, 0), (0, 1)) if k == 1 else 0  # moocore takes two columns at least.
        values[use] = moocore.hv_contributions(np.pad(costs[use], thick), ref=np.append(reference, 1.0)[: max(k, 2)])
        return values
    use[use] = moocore.is_nondominated(costs[use], keep_weakly=True)
    ideal = costs[use].min(axis=0)
    sampled = ideal + (reference - ideal) * np.random.default_rng(0).random((_SAMPLES, k))
    dominates = np.ones((_SAMPLES, use.sum()), dtype=bool)
    for points, members in zip(sampled.T, costs[use].T, strict=True):
        dominates &= members <= points[:, None]
    values[use] = np.prod(reference - ideal) * dominates[dominates.sum(axis=1) == 1].sum(axis=0) / _SAMPLES
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
    """`ExpectedGain` of one population: (n,) of `costs` (n, k) and `std` (n,)."""
    return ExpectedGain(front, reference)(costs, std)


class ExpectedGain:
    """Expected hypervolume that each point of a population alone would add to `front` (m, k), in closed form for any k.

    The first cost of a point is normally distributed, the others are known. With f(y) the least first cost among the front's members
    that are no worse than y in the other columns (the reference's where there is none), the gain of a point (c, x) is the integral over
    y >= x of max(0, f(y) - c), and E max(0, f - c) = s * (z * Phi(z) + phi(z)) with z = (f - mean) / s. f is constant on boxes, a few for
    every member of the front, or some dozen with five objectives: Lacour, Klamroth, Fonseca, "A box decomposition algorithm to compute
    the hypervolume indicator", Computers & Operations Research 79 (2017). With more than EXACT_OBJECTIVES a front that makes more than
    4,096 boxes counts without the members that alone hold least of it.
    """

    def __init__(self, front: np.ndarray, reference: np.ndarray) -> None:
        reference = np.asarray(reference, dtype=float)
        front = _inside(_points(front), reference)
        front = front[non_dominated(front)] if len(front) else front.reshape(0, len(reference))
        if len(reference) > EXACT_OBJECTIVES:
            front = front[np.argsort(-contributions(front, reference), kind="stable")]
        self._lower, self._upper, levels = _boxes(front, reference)
        self._levels, self._level_of_box = np.unique(levels, return_inverse=True)

    def __call__(self, costs: np.ndarray, std: np.ndarray) -> np.ndarray:
        """The gain (n,) of points whose costs (n, k) have the standard deviation `std` (n,) in the first column, 0 for exactly known."""
        costs, std = _points(costs), np.asarray(std, dtype=float)
        gain = np.empty(len(costs))
        step = max(1, _CELLS // len(self._upper))
        for start in range(0, len(costs), step):
            rows = slice(start, start + step)
            volume = _expected_drop(costs[rows, 0], std[rows], self._levels).take(self._level_of_box, axis=1)
            for x, lower, upper in zip(costs[rows, 1:].T, self._lower.T, self._upper.T, strict=True):
                length = upper - np.maximum(lower, x[:, None])
                volume *= np.maximum(length, 0.0, out=length)
            gain[rows] = volume.sum(axis=1)
        return gain


def _boxes(front: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint boxes that fill the space below `reference` (k,) in all columns but the first: lower and upper corners (b, k - 1), and
    the least first cost (b,) of what in `front` (m, k), and of the reference, dominates each.

    A local upper bound is the upper corner of a region that no member dominates wholly, and column j of it is that of the member that
    defines it there. A member below a bound replaces it by up to k others, one for each of its own columns.
    """
    k = len(reference)
    # Without a limit to the first cost, a member at the reference's makes boxes of what no other dominates.
    upper = np.append(np.inf, reference[1:])[None]
    definers = np.where(np.eye(k, dtype=bool), upper[0], -np.inf)[None]  # (b, k, k): one member a column of the bound
    for point in (np.append(reference[0], np.full(k - 1, -np.inf)), *front):
        below = (point < upper).all(axis=1)
        uppers, defined = [upper[~below]], [definers[~below]]
        for j in range(k):
            least = np.delete(definers[below, :, j], j, axis=1).max(axis=1, initial=-np.inf)
            made, by = upper[below][point[j] >= least], definers[below][point[j] >= least]
            made[:, j], by[:, j] = point[j], point
            uppers.append(made)
            defined.append(by)
        if k > EXACT_OBJECTIVES and sum(map(len, uppers)) > _MAX_BOXES:
            break
        upper, definers = np.concatenate(uppers), np.concatenate(defined)
    lower = np.empty((len(upper), k - 1))
    for j in range(1, k):
        lower[:, j - 1] = definers[:, :j, j].max(axis=1)
    real = np.isfinite(upper[:, 0]) & (lower < upper[:, 1:]).all(axis=1)
    return lower[real], upper[real, 1:], upper[real, 0]


def _expected_drop(mean: np.ndarray, std: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """E max(0, level - cost) as (n, n_levels)."""
    below = levels[None, :] - mean[:, None]
    certain = ~(std > 0)
    z = below / np.where(certain, 1.0, std)[:, None]
    drop = ndtr(z)
    drop *= below
    # In place, as nearly half of the time would go into new arrays: drop + std * phi(z).
    z *= z
    z *= -0.5
    np.exp(z, out=z)
    z *= (std / np.sqrt(2 * np.pi))[:, None]
    drop += z
    drop[certain] = below[certain]
    return np.maximum(drop, 0.0, out=drop)


def _points(costs: np.ndarray) -> np.ndarray:
    array = np.asarray(costs, dtype=float)
    assert array.ndim == 2, f"costs have shape {array.shape}, expected (n, k)"
    return array


def _is_inside(costs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    below = np.isfinite(costs) & (costs < np.asarray(reference, dtype=float))
    return np.logical_and.reduce(below, axis=1)


def _inside(costs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return costs[_is_inside(costs, reference)]
