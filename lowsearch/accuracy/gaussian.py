"""A small Gaussian process with known noise per observation, priors on its scales, and leave-one-out predictions.

Written out because the accuracy predictor needs what general ones do not offer together: it must answer from zero observations, weigh
each by its own noise, and calibrate itself by leave-one-out in closed form. Kernel: a constant, two linear parts (what networks cost;
their other features) and optionally a squared exponential for what is not linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, cholesky
from scipy.optimize import minimize

CONSTANT_STD = 0.3
_SCALES = ("cost", "features", "noise", "curved", "length")
_MEDIANS = np.array([0.02, 0.03, 0.008, 0.015, 1.0])
"""Where the scales lie before any observation, in accuracy (0 to 1) and, for the length, in typical distances of the space."""
_LOG_STDS = np.array([0.8, 0.8, 0.6, 0.8, 0.5])


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Standardised coordinates of networks."""

    cost: np.ndarray
    """(n, m) what a network is worth most by: log MACs, log params."""
    features: np.ndarray
    """(n, k), scaled so that two random networks are at distance about sqrt(2)."""

    def __len__(self) -> int:
        return len(self.cost)


class GaussianProcess:
    """Regression of `y` (n,) minus a given prior mean on Points, with known noise variances (n,). `curved` adds the nonlinear part."""

    def __init__(self, points: Points, residual: np.ndarray, noise_var: np.ndarray, *, curved: bool) -> None:
        self.points, self.residual, self.noise_var, self.curved = points, residual, noise_var, curved
        self._gram_cost = points.cost @ points.cost.T
        self._gram_features = points.features @ points.features.T
        self._squared = _squared_distances(points, points)
        self.scales = _MEDIANS.copy()
        if len(points):
            self._choose_scales()
            self._condition()

    @property
    def lack_of_fit_var(self) -> float:
        """Variance of what no feature explains."""
        return float(self.scales[2] ** 2)

    def predict(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Mean residual and variance of a network's own deviation, the lack of fit included, (n,) each."""
        prior = self._prior_var(points)
        if not len(self.points):
            return np.zeros(len(points)), prior
        cross = self._cross(points)
        solved = cho_solve((self._factor, True), cross.T)
        return cross @ self._alpha, np.maximum(prior - np.einsum("ij,ji->i", cross, solved), 1e-12)

    def predict_differences(self, origin: Points, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance (n,) of the residual at `points` minus that at the one point `origin`; what both share cancels."""
        near = self._kernel(points.cost @ origin.cost.T, points.features @ origin.features.T, _squared_distances(points, origin))[:, 0]
        prior = self._prior_var(points) + self._prior_var(origin)[0] - 2 * near
        if not len(self.points):
            return np.zeros(len(points)), prior
        cross = self._cross(points) - self._cross(origin)
        solved = cho_solve((self._factor, True), cross.T)
        return cross @ self._alpha, np.maximum(prior - np.einsum("ij,ji->i", cross, solved), 1e-12)

    def linear_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """(weights, covariance) of the coefficients of [1, cost, features]; the same predictions in weight space, without `curved`."""
        assert not self.curved
        design = np.hstack([np.ones((len(self.points), 1)), self.points.cost, self.points.features])
        prior = np.concatenate([
            [CONSTANT_STD**2], np.full(self.points.cost.shape[1], self.scales[0] ** 2),
            np.full(self.points.features.shape[1], self.scales[1] ** 2),
        ])  # fmt: skip
        if not len(design):
            return np.zeros(design.shape[1]), np.diag(prior)
        spread = design * prior  # (n, p)
        weights = spread.T @ self._alpha
        return weights, np.diag(prior) - spread.T @ cho_solve((self._factor, True), spread)

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of every observation, predicted from all the others with the scales as they are; its own noise included."""
        inverse = cho_solve((self._factor, True), np.eye(len(self.points)))
        variance = 1 / np.diag(inverse)
        return self.residual - self._alpha * variance, variance

    def _choose_scales(self) -> None:
        """Scales of largest posterior density under log-normal priors."""
        free = np.array([0, 1, 2, 3, 4] if self.curved else [0, 1, 2])

        def loss(log_free: np.ndarray) -> float:
            self.scales[free] = np.exp(log_free)
            try:
                self._condition()
            except np.linalg.LinAlgError:
                return 1e10
            fit = 0.5 * self.residual @ self._alpha + np.log(np.diag(self._factor)).sum()
            return float(fit + 0.5 * (((log_free - np.log(_MEDIANS[free])) / _LOG_STDS[free]) ** 2).sum())

        found = minimize(loss, np.log(_MEDIANS[free]), method="L-BFGS-B", bounds=[(m - 3, m + 3) for m in np.log(_MEDIANS[free])])
        self.scales[free] = np.exp(found.x)

    def _condition(self) -> None:
        gram = self._kernel(self._gram_cost, self._gram_features, self._squared)
        gram[np.diag_indices_from(gram)] += self.noise_var + self.lack_of_fit_var
        self._factor = cholesky(gram, lower=True)
        self._alpha = cho_solve((self._factor, True), self.residual)

    def _cross(self, points: Points) -> np.ndarray:
        """Covariance of `points` with the observations, (n, n_observed)."""
        return self._kernel(
            points.cost @ self.points.cost.T, points.features @ self.points.features.T, _squared_distances(points, self.points)
        )

    def _kernel(self, gram_cost: np.ndarray, gram_features: np.ndarray, squared: np.ndarray) -> np.ndarray:
        cost, features, _, curved, length = self.scales
        kernel = CONSTANT_STD**2 + cost**2 * gram_cost + features**2 * gram_features
        return kernel + curved**2 * np.exp(-0.5 * squared / length**2) if self.curved else kernel

    def _prior_var(self, points: Points) -> np.ndarray:
        cost, features, _, curved, _ = self.scales
        linear = CONSTANT_STD**2 + cost**2 * (points.cost**2).sum(1) + features**2 * (points.features**2).sum(1)
        return linear + self.lack_of_fit_var + (curved**2 if self.curved else 0.0)


def _squared_distances(a: Points, b: Points) -> np.ndarray:
    left, right = (np.hstack([points.cost, points.features]) for points in (a, b))
    return np.maximum((left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T, 0)
