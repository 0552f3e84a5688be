"""A linear model learned from a study's own trials: of accuracy, for a sampler that is given no model of it, and of constraints."""

from __future__ import annotations

import numpy as np

from lowsearch.accuracy.scores import Unit
from lowsearch.search.estimates import Estimator


class TrialSurrogate:
    """Bayesian linear regression of a trial's accuracy, or of a constraint, on the space's features and log MACs and parameters."""

    unit: Unit = "top1"
    source = "estimated"

    def __init__(self, estimator: Estimator, genomes: np.ndarray, values: np.ndarray) -> None:
        from sklearn.linear_model import BayesianRidge  # A second that a sampler with an accuracy model never needs.

        self._estimator = estimator
        features = self._raw(genomes)
        self._shift, scale = features.mean(axis=0), features.std(axis=0)
        self._scale = np.where(scale > 0, scale, 1.0)
        self._model = BayesianRidge().fit((features - self._shift) / self._scale, values)

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> mean (n,), standard deviation (n,)."""
        mean, std = self._model.predict((self._raw(genomes) - self._shift) / self._scale, return_std=True)
        return mean, std

    def _raw(self, genomes: np.ndarray) -> np.ndarray:
        costs = self._estimator.estimate(genomes).mean
        return np.column_stack([self._estimator.space.features(genomes), np.log(costs["macs"]), np.log(costs["params"])])
