"""Non-dominated sets, hypervolume and the expected gain against brute force and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import norm

from lowsearch.search import pareto

DIMENSIONS = [1, 2, 3, 4, 5]


def brute_force_front(costs):
    def dominates(a, b):
        return (a <= b).all() and (a < b).any()

    return np.array([not any(dominates(other, point) for other in costs) for point in costs])


def inclusion_exclusion(costs, reference):
    """Hypervolume as a union of boxes: sum over subsets, odd ones added, even ones taken away."""
    inside = [c for c in costs if (c < reference).all()]
    total = 0.0
    for size in range(1, len(inside) + 1):
        for subset in itertools.combinations(inside, size):
            total += (-1) ** (size + 1) * np.prod(reference - np.max(subset, axis=0))
    return total


@pytest.mark.parametrize("k", DIMENSIONS)
@pytest.mark.parametrize("seed", range(5))
def test_front_equals_brute_force(k, seed):
    costs = np.random.default_rng(seed).integers(0, 12, size=(60, k)).astype(float)
    costs = np.unique(costs, axis=0)
    assert (pareto.non_dominated(costs) == brute_force_front(costs)).all()


def test_of_equal_points_the_first_stays_on_the_front():
    assert pareto.non_dominated(np.array([[1.0, 2], [1, 2], [2, 1]])).tolist() == [True, False, True]


def test_points_that_are_not_finite_are_never_on_the_front():
    costs = np.array([[np.nan, 0.0], [-np.inf, 0.0], [1.0, 1.0]])
    assert pareto.non_dominated(costs).tolist() == [False, False, True]


def test_front_of_nothing_is_nothing():
    assert pareto.non_dominated(np.empty((0, 2))).tolist() == []
    assert pareto.hypervolume(np.empty((0, 2)), np.array([1.0, 1.0])) == 0.0


@pytest.mark.parametrize("n", [1, 2, 10, 300])
def test_hypervolume_of_a_staircase_is_its_closed_form(n):
    i = np.arange(n)
    staircase = np.stack([i, n - 1 - i], axis=1).astype(float)
    # Row by row from the bottom, step i covers n - i cells of the grid up to (n, n).
    assert pareto.hypervolume(staircase, np.array([n, n])) == pytest.approx(n * (n + 1) / 2)
    assert pareto.contributions(staircase, np.array([n, n])) == pytest.approx(np.ones(n))


@pytest.mark.parametrize("k", DIMENSIONS)
@pytest.mark.parametrize("seed", range(4))
def test_hypervolume_and_contributions_equal_inclusion_exclusion(k, seed):
    costs = np.random.default_rng(seed).normal(size=(9, k))
    reference = np.full(k, 0.8)
    volume = inclusion_exclusion(costs, reference)
    assert pareto.hypervolume(costs, reference) == pytest.approx(volume)
    front = costs[pareto.non_dominated(costs)]
    lost = [inclusion_exclusion(front, reference) - inclusion_exclusion(np.delete(front, i, 0), reference) for i in range(len(front))]
    of_the_box = 0.02 * np.prod(reference - costs.min(axis=0)) if k > pareto.EXACT_OBJECTIVES else 1e-12
    assert pareto.contributions(front, reference) == pytest.approx(np.array(lost), abs=of_the_box)
    held = pareto.contributions(np.vstack([costs, costs + 0.1]), reference)
    assert held[: len(costs)][pareto.non_dominated(costs)] == pytest.approx(pareto.contributions(front, reference))
    assert held.sum() == pytest.approx(pareto.contributions(front, reference).sum())


def test_points_beyond_the_reference_count_for_nothing():
    costs = np.array([[0.0, 0.0], [-5.0, 2.0], [2.0, -5.0]])
    assert pareto.hypervolume(costs, np.array([1.0, 1.0])) == pytest.approx(1.0)
    assert pareto.contributions(costs, np.array([1.0, 1.0])) == pytest.approx([1.0, 0.0, 0.0])


@pytest.mark.parametrize("equal_values", [False, True])
@pytest.mark.parametrize("k", [*DIMENSIONS, 6])
@pytest.mark.parametrize("n_front", [0, 1, 7, 25])
def test_certain_gain_is_the_difference_of_two_hypervolumes(k, n_front, equal_values):
    rng = np.random.default_rng(n_front)
    front, candidates, reference = rng.normal(size=(n_front, k)), rng.normal(size=(40, k)), np.full(k, 1.0)
    if equal_values:  # Many members share coordinates with one another and with the reference.
        front, candidates = np.round(front), np.round(candidates)
    gains = pareto.expected_gain(candidates, np.zeros(40), front, reference)
    before = pareto.hypervolume(front, reference)
    truth = np.array([pareto.hypervolume(np.vstack([front, c]), reference) - before for c in candidates])
    assert gains == pytest.approx(truth, abs=1e-9)
    assert (gains[truth < 1e-9] == 0).all()  # To the last bit: what adds nothing is told by it.


def test_expected_gain_of_one_objective_is_the_expected_improvement():
    mean, std, best = np.array([0.0, 0.4, 0.5, 3.0]), np.array([0.2, 0.1, 0.3, 0.2]), 0.35
    z = (best - mean) / std
    improvement = std * (z * norm.cdf(z) + norm.pdf(z))
    front = np.array([[0.9], [best], [0.6], [1.4]])
    assert pareto.expected_gain(mean[:, None], std, front, np.array([1.0])) == pytest.approx(improvement)


@pytest.mark.parametrize("k", [4, 5, 6])
def test_expected_gain_of_many_objectives_is_what_sampling_the_space_finds(k):
    rng = np.random.default_rng(k)
    front, reference = rng.normal(size=(40, k)), np.full(k, 1.0)
    candidates, std = rng.normal(size=(5, k)) - 0.7, np.array([0.0, 0.1, 0.3, 0.6, 1.0])
    low = candidates.min(axis=0) - 4.5 * np.eye(k)[0]
    points = low + (reference - low) * rng.random((100_000, k))
    free = points[~(front[None] <= points[:, None]).all(axis=2).any(axis=1)]
    gains = pareto.expected_gain(candidates, std, front, reference)
    for (c, *x), s, gain in zip(candidates, std, gains, strict=True):
        reached = (free[:, 1:] >= x).all(axis=1)
        covered = norm.cdf((free[reached, 0] - c) / s) if s else free[reached, 0] >= c  # Probability that the candidate dominates it.
        share = np.append(covered, np.zeros(len(points) - reached.sum()))
        error = share.std() / np.sqrt(len(points))
        assert abs(share.mean() - gain / np.prod(reference - low)) < 4 * error + 1e-12


def test_a_front_of_too_many_boxes_counts_with_the_members_that_hold_most(monkeypatch):
    rng = np.random.default_rng(0)
    sphere = np.abs(rng.normal(size=(60, 5)))
    front, reference = sphere / np.linalg.norm(sphere, axis=1, keepdims=True), np.full(5, 1.1)
    candidates = front + rng.normal(scale=0.05, size=front.shape)
    std = np.full(60, 0.02)
    exact = pareto.expected_gain(candidates, std, front, reference)
    monkeypatch.setattr(pareto, "_MAX_BOXES", 500)
    fewer = pareto.expected_gain(candidates, std, front, reference)
    held = np.argsort(-pareto.contributions(front, reference), kind="stable")
    among = [pareto.expected_gain(candidates, std, front[held[:n]], reference) for n in range(1, 60)]
    assert (fewer >= exact - 1e-12).all() and (fewer > exact + 1e-6).any()
    assert any(gains == pytest.approx(fewer, abs=1e-12) for gains in among)
    assert np.corrcoef(fewer, exact)[0, 1] > 0.8


def test_contributions_of_many_objectives_are_the_same_every_time_and_of_whom_they_belong_to():
    front = 1 - np.eye(6) * 0.5  # Each member is alone in its own column.
    values = pareto.contributions(np.vstack([front, np.full(6, 1.2)]), np.full(6, 2.0))
    assert (values == pareto.contributions(np.vstack([front, np.full(6, 1.2)]), np.full(6, 2.0))).all()
    assert values[:6] == pytest.approx(np.full(6, 0.5), rel=0.1) and values[6] == 0


@pytest.mark.parametrize("k", DIMENSIONS)
def test_expected_gain_is_the_mean_over_the_uncertain_cost(k):
    rng = np.random.default_rng(1)
    front, candidates, reference = rng.normal(size=(8, k)), rng.normal(size=(6, k)), np.full(k, 1.5)
    std = np.array([0.0, 0.05, 0.2, 0.5, 1.0, 2.0])
    gains = pareto.expected_gain(candidates, std, front, reference)
    quantiles = norm.ppf((np.arange(4000) + 0.5) / 4000)  # a stratified sample of the normal distribution
    for candidate, s, gain in zip(candidates, std, gains, strict=True):
        draws = np.repeat(candidate[None], 4000, axis=0)
        draws[:, 0] += s * quantiles
        assert gain == pytest.approx(pareto.expected_gain(draws, np.zeros(4000), front, reference).mean(), rel=2e-3, abs=2e-5)


def test_expected_gain_never_falls_as_the_uncertainty_grows():
    rng = np.random.default_rng(2)
    front, candidates, reference = rng.normal(size=(10, 2)), rng.normal(size=(200, 2)), np.array([1.0, 1.0])
    gains = [pareto.expected_gain(candidates, np.full(200, s), front, reference) for s in (0.0, 0.1, 0.5, 1.0)]
    for less, more in itertools.pairwise(gains):
        assert (more >= less - 1e-12).all()


@pytest.mark.parametrize("k", DIMENSIONS)
def test_greedy_cover_is_the_best_subset_of_a_small_set_within_its_bound(k):
    rng = np.random.default_rng(3)
    draws, reference = rng.normal(size=(5, 10, k)), np.full(k, 1.5)
    chosen = pareto.greedy_cover(draws, reference, 3)

    def mean_volume(subset):
        return np.mean([pareto.hypervolume(costs[list(subset)], reference) for costs in draws])

    assert len(set(chosen)) == 3
    assert chosen[0] == max(range(10), key=lambda i: mean_volume([i]))
    assert mean_volume(chosen) >= (1 - 1 / np.e) * max(map(mean_volume, itertools.combinations(range(10), 3)))


def test_greedy_cover_stops_where_nothing_adds_volume():
    costs = np.array([[0.0, 0.0], [0.5, 0.5], [0.0, 0.0], [3.0, 3.0]])
    assert pareto.greedy_cover(costs[None], np.array([1.0, 1.0]), 4) == [0]
    lucky = costs.copy()
    lucky[1, 0] = -0.5  # In one draw of two the second point is not dominated.
    assert pareto.greedy_cover(np.stack([costs, lucky]), np.array([1.0, 1.0]), 4) == [0, 1]
