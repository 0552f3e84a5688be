"""The published trend: its stated error, what it says of known networks, and that it claims less where less is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lowsearch.accuracy.prior import PublishedPrior, Trend, features_of, leave_one_out, published_points
from lowsearch.errors import StudyError
from lowsearch.presets import PRESETS
from lowsearch.published import TOP1_PERCENT, TOP1_PERCENT_AT
from lowsearch.space import SearchSpace
from lowsearch.study.assembly import resolve
from lowsearch.study.settings import StudySettings

SPACE = SearchSpace.load("lowformer")


@pytest.fixture(scope="module")
def prior() -> PublishedPrior:
    return PublishedPrior(SPACE)


def test_every_preset_is_in_the_trend_and_both_tables_agree() -> None:
    assert TOP1_PERCENT_AT.keys() == PRESETS.keys()
    assert all(abs(at[224] - TOP1_PERCENT[name]) <= 0.051 for name, at in TOP1_PERCENT_AT.items())
    assert all(next(iter(at)) == 224 for at in TOP1_PERCENT_AT.values())


def test_leave_one_out_error_is_the_one_that_the_documentation_states() -> None:
    error = leave_one_out()
    assert error.n_networks == 12 and error.rmse_points == pytest.approx(0.25, abs=0.02)
    assert error.spearman == pytest.approx(0.99, abs=0.01) and error.std_over_networks_points > 1.9


def test_known_networks_get_about_their_published_accuracy(prior: PublishedPrior) -> None:
    genomes = np.stack([SPACE.encode(arch) for arch in PRESETS.values()])
    score, std = prior.predict(genomes)
    assert np.abs(score - [TOP1_PERCENT[name] for name in PRESETS]).max() < 0.5
    assert (std >= 0.25).all() and (std < 0.4).all()


def test_fewer_pixels_cost_score_and_widen_the_interval(prior: PublishedPrior) -> None:
    archs = [dataclasses.replace(PRESETS["lowformer_b1"], resolution_px=px) for px in (128, 160, 192, 224, 256, 288)]
    score, std = prior.predict(np.stack([SPACE.encode(arch) for arch in archs]))
    assert (np.diff(score) > 0).all() and score[-1] - score[3] == pytest.approx(0.6, abs=0.2)  # as published
    assert (np.diff(std[:4]) < 0).all() and std[0] > 3 * std[3]


def test_random_members_are_known_less_well_than_the_family(prior: PublishedPrior) -> None:
    score, std = prior.predict(SPACE.sample(5000, rng=np.random.default_rng(0)))
    assert score.min() > 65 and score.max() < 90
    assert np.median(std) > 1.3 * prior.predict(np.stack([SPACE.encode(PRESETS["lowformer_b1"])]))[1][0]


def test_regression_agrees_with_a_gaussian_process_in_function_space() -> None:
    features, top1, names = published_points()
    trend = Trend.fit(features, top1, names)
    new = features_of(np.array([[1e9, 2e7, 4e6], [3e8, 8e6, 2e6]]), np.array([224, 160]))
    prior = np.diag([25.0, 1, 1, 1, 1, 4])

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.column_stack([np.ones(len(a)), a]) @ prior @ np.column_stack([np.ones(len(b)), b]).T

    same = np.array([[a == b for a in names] for b in names])
    gram = kernel(features, features) + 0.25**2 * same + 0.07**2 * np.eye(len(names))
    mean, std = trend.predict(new)
    assert mean == pytest.approx(80 + kernel(new, features) @ np.linalg.solve(gram, top1 - 80))
    variance = kernel(new, new) - kernel(new, features) @ np.linalg.solve(gram, kernel(features, new))
    assert std == pytest.approx(np.sqrt(np.diag(variance) + 0.25**2))


def test_small_images_have_no_published_trend() -> None:
    with pytest.raises(StudyError, match="say nothing about space 'lowformer-micro'"):
        resolve(StudySettings(accuracy="published"))
    assert resolve(StudySettings(space="lowformer", accuracy="published")).stand_in == "prior:published"


def test_a_change_is_the_difference_of_two_scores_with_the_error_that_both_do_not_share():
    """Against draws of the trend's coefficients, each network deviating on its own."""
    trend = Trend.fit(*published_points())
    rng = np.random.default_rng(5)
    features = rng.normal(0, 0.5, (4, 5))
    mean, std = trend.changes(features[0], features[1:])
    score, _ = trend.predict(features)
    assert np.allclose(mean, score[1:] - score[0])
    draws = rng.multivariate_normal(trend.weights, trend.covariance, 200_000)
    scores = draws[:, :1] + draws[:, 1:] @ features.T + rng.normal(0, 0.25, (len(draws), 4))
    assert np.allclose((scores[:, 1:] - scores[:, :1]).std(axis=0), std, rtol=0.01)
