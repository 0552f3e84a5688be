"""A prior for networks of the 224 px class: the trend of published top-1 accuracies over what networks cost.

Nobody can train ImageNet during a search, but the family's accuracies are published: a regression of them on the logarithms of MACs,
params and activations and on the resolution says which untrained network the trend expects more of. It ranks; its score is not an
accuracy. All twelve networks were designed by the same authors by the same rules, so its leave-one-out error says how well the trend
continues among such networks, and nothing about networks built otherwise: for those RELATIVES_RMSE_POINTS is the better guess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lowsearch import cost
from lowsearch.accuracy.agreement import spearman
from lowsearch.accuracy.scores import Unit
from lowsearch.presets import PRESETS
from lowsearch.published import TOP1_PERCENT_AT
from lowsearch.space import SearchSpace

TRAINED_PX = 224
"""Largest resolution the family was trained at; accuracies at more pixels are published, at fewer they are not."""
_CENTER = np.log([2e9, 25e6, 5e6])
"""Typical MACs, params and activations of the family."""
_MEAN, _MEAN_STD = 80.0, 5.0
_COEFFICIENT_STDS = np.array([1.0, 1.0, 1.0, 1.0, 2.0])
"""Priors of the coefficients, in points a nat: log MACs, params, activations; pixels above TRAINED_PX, and below, of which nothing is known
but that the counts fall."""
_NETWORK_STD = 0.25
"""Points by which a network differs from the trend whatever its resolution; leave-one-out errors agree with it."""
_RESOLUTION_STD = 0.07
RELATIVES_RMSE_POINTS = 2.2
"""Its error for 17 networks of other families and recipes (benchmarks/published_prior.py), and perhaps for what is built otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """Bayesian linear regression of top-1, in points, on `features_of`; the points of one network share its deviation."""

    weights: np.ndarray
    """(6,) the constant first."""
    covariance: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, top1_percent: np.ndarray, networks: Sequence[str]) -> Trend:
        """Learn from rows (n, 5) of features, their top-1 (n,), and whose they are (n,)."""
        design = np.hstack([np.ones((len(features), 1)), features])
        prior = np.concatenate([[_MEAN_STD], _COEFFICIENT_STDS]) ** 2
        same = np.equal.outer(np.array(networks), np.array(networks))
        gram = design * prior @ design.T + _NETWORK_STD**2 * same + _RESOLUTION_STD**2 * np.eye(len(design))
        gain = np.linalg.solve(gram, design * prior).T
        weights = gain @ (top1_percent - _MEAN)
        weights[0] += _MEAN
        return cls(weights=weights, covariance=np.diag(prior) - gain @ (design * prior))

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) in points, (n,) each, the network's own deviation included."""
        design = np.hstack([np.ones((len(features), 1)), features])
        variance = np.einsum("ij,ij->i", design @ self.covariance, design)
        return design @ self.weights, np.sqrt(variance + _NETWORK_STD**2)

    def changes(self, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) in points, (n,) each, of how much more the networks `after` (n, 5) have than `before` (5,); what both share cancels,
        and each deviates on its own."""
        step = np.hstack([np.zeros((len(after), 1)), after - before])
        variance = np.einsum("ij,ij->i", step @ self.covariance, step)
        return step @ self.weights, np.sqrt(variance + 2 * _NETWORK_STD**2)


def features_of(costs: np.ndarray, resolution_px: np.ndarray) -> np.ndarray:
    """(n, 5) from MACs, params and activations (n, 3) and the resolution (n,)."""
    pixels = np.log(resolution_px / TRAINED_PX)
    return np.column_stack([np.log(costs) - _CENTER, np.maximum(pixels, 0), np.maximum(-pixels, 0)])


def published_points() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features (n, 5), top-1 in points (n,) and names (n,) of the family as published."""
    rows = [(name, px, top1) for name, at in TOP1_PERCENT_AT.items() for px, top1 in at.items()]
    counted = [cost.count(dataclasses.replace(PRESETS[name], resolution_px=px)) for name, px, _ in rows]
    costs = np.array([[c.macs, c.params, c.activations] for c in counted], dtype=float)
    return features_of(costs, np.array([px for _, px, _ in rows])), np.array([top1 for *_, top1 in rows]), [name for name, *_ in rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorError:
    """How well the trend foretells a published network that it has not seen, at TRAINED_PX."""

    n_networks: int
    rmse_points: float
    spearman: float
    std_over_networks_points: float
    """What the error would be without any trend."""


def leave_one_out() -> PriorError:
    """Every network predicted from all others, its own other resolutions left out with it."""
    features, top1, names = published_points()
    predicted, observed = [], []
    for name in dict.fromkeys(names):
        own = np.array([other == name for other in names])
        trend = Trend.fit(features[~own], top1[~own], [other for other in names if other != name])
        at_trained = np.flatnonzero(own)[:1]  # TOP1_PERCENT_AT begins with TRAINED_PX
        predicted.append(float(trend.predict(features[at_trained])[0][0]))
        observed.append(float(top1[at_trained][0]))
    error = np.array(predicted) - np.array(observed)
    rank = spearman(np.array(predicted), np.array(observed))
    assert rank is not None
    return PriorError(
        n_networks=len(error), rmse_points=float(np.sqrt(np.mean(error**2))), spearman=rank,
        std_over_networks_points=float(np.std(observed, ddof=1)),
    )  # fmt: skip


class PublishedPrior:
    """The trend as an accuracy model of one space: a score in points, with an interval. Never called accuracy in any output."""

    unit: Unit = "rank"
    source = "prior:published"
    margin = 1.0
    """How far below the family's lowest score hypervolume is counted from."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        costs = [cost.of_block(block) for block in space.blocks]
        self._costs = space.block_sums(np.array([[c.macs, c.params, c.activations] for c in costs], dtype=float))
        self._resolution_px = np.array([px for px, _ in space.genes[0].choices])

    @cached_property
    def _trend(self) -> Trend:
        return Trend.fit(*published_points())

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> score (n,) and its standard deviation (n,), in points."""
        return self._trend.predict(self._features(genomes))

    def changes(self, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By how many points each genome of `after` (n, n_genes) beats `before` (n_genes,): mean (n,), standard deviation (n,)."""
        return self._trend.changes(self._features(before[None])[0], self._features(after))

    def _features(self, genomes: np.ndarray) -> np.ndarray:
        return features_of(self._costs(genomes), self._resolution_px[genomes[:, 0]])
