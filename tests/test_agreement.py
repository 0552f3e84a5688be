"""Rank agreement against scipy, and silence where there is too little to say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from lowsearch.accuracy.agreement import agreement, lead, spearman

TIED = (np.array([1, 2, 2, 3, 5, 5.0]), np.array([2, 1, 3, 3, 3, 9.0]))


def test_ties_are_averaged_as_scipy_does() -> None:
    found = agreement(*TIED)
    assert found.spearman == spearman(*TIED) == pytest.approx(spearmanr(*TIED)[0])
    assert found.kendall == pytest.approx(kendalltau(*TIED)[0])


def test_intervals_hold_the_value_and_narrow_with_more_networks() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (10, 100):
        truth = rng.normal(size=n)
        found = agreement(truth + 0.7 * rng.normal(size=n), truth, n_bootstrap=400)
        assert found.low is not None and found.spearman is not None and found.high is not None and found.kendall_low is not None
        assert found.low < found.spearman < found.high <= 1 and found.kendall_low < (found.kendall or 0)
        widths.append(found.high - found.low)
    assert widths[1] < 0.6 * widths[0]


def test_intervals_cover_what_they_say() -> None:
    rng, covered = np.random.default_rng(1), []
    for _ in range(100):
        truth = rng.normal(size=30)
        found = agreement(truth + rng.normal(size=30), truth, n_bootstrap=200)
        assert found.low is not None and found.high is not None
        covered.append(found.low <= 6 / np.pi * np.arcsin(np.sqrt(0.5) / 2) <= found.high)  # Spearman of a bivariate normal
    assert 0.85 <= np.mean(covered) <= 1.0


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_networks_claim_nothing(n: int) -> None:
    assert agreement(np.arange(n), np.arange(n)).spearman is None


def test_a_signal_that_does_not_vary_claims_nothing() -> None:
    assert agreement(np.ones(9), np.arange(9)).spearman is None


def test_below_five_networks_there_is_no_interval() -> None:
    found = agreement(np.arange(4), np.arange(4))
    assert (found.spearman, found.kendall, found.low) == (1.0, 1.0, None)


def test_perfect_agreement_stays_perfect_when_resampled() -> None:
    found = agreement(np.arange(20), np.exp(np.arange(20)))
    assert found.low == pytest.approx(1.0) and found.kendall_low == pytest.approx(1.0)


def test_a_lead_is_bootstrapped_in_pairs() -> None:
    """What both scores get wrong alike does not blur the difference between them."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=40)
    shared = truth + rng.normal(size=40)
    better, worse = shared + 0.1 * rng.normal(size=40), shared + 0.5 * rng.normal(size=40)
    found = lead(better, worse, truth)
    ours, theirs = agreement(better, truth), agreement(worse, truth)
    assert found is not None and None not in (ours.low, ours.high, ours.spearman, theirs.spearman)
    assert found.difference == pytest.approx((ours.spearman or 0) - (theirs.spearman or 0)) and found.low < found.difference < found.high
    assert found.high - found.low < 0.7 * ((ours.high or 0) - (ours.low or 0))
    same = lead(better, better, truth)
    assert same is not None and (same.difference, same.low, same.high) == (0, 0, 0)


def test_leads_cover_what_they_say() -> None:
    rng, covered = np.random.default_rng(1), []
    for _ in range(100):
        truth = rng.normal(size=30)
        found = lead(truth + rng.normal(size=30), truth + rng.normal(size=30), truth, n_bootstrap=200)
        assert found is not None
        covered.append(found.low <= 0 <= found.high)
    assert 0.88 <= np.mean(covered) <= 1.0


def test_too_few_networks_tell_no_lead() -> None:
    assert lead(np.arange(4), np.arange(4), np.arange(4)) is None
    assert lead(np.ones(9), np.arange(9), np.arange(9)) is None
