"""The latency of blocks that were not measured, learned from those that were: one regression for every kind of block.

Two candidates, on the logarithms of the times: a quadratic in the features, and a line with a Gaussian process on what it leaves; the
one with the smaller leave-one-out error is used, and that error is the uncertainty of what it predicts.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lowsearch.arch import Block
from lowsearch.errors import TableError
from lowsearch.latency.features import block_features
from lowsearch.latency.table import BlockLatency, LatencyTable
from lowsearch.latency.timing import STATES

MIN_MEASURED = 4
"""Fewer measured blocks of a kind than this teach nothing about the others."""
_HYPERPARAMETER_ROWS = 160  # The likelihood of a Gaussian process costs the cube of the rows; its scales need no more than these.
_PENALTIES = np.logspace(-6, 3, 19)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted latency of one block, and its relative standard error."""

    latency: BlockLatency
    relative_std: float


class BlockModel:
    """Predicts blocks that `table` does not hold."""

    def __init__(self, table: LatencyTable) -> None:
        self._table = table
        self._regressions: dict[str, tuple[_Regression, float]] = {}

    def predict(self, blocks: Sequence[Block]) -> dict[Block, Prediction]:
        """Predictions for `blocks`. Raises TableError for a kind of which hardly any block was measured."""
        by_kind: dict[str, list[Block]] = {}
        for block in blocks:
            by_kind.setdefault(block.kind, []).append(block)
        found: dict[Block, Prediction] = {}
        for kind, wanted in by_kind.items():
            regression, error = self._regression(kind)
            times = np.exp(regression.predict(block_features(wanted)))
            for block, row in zip(wanted, times, strict=True):
                hot, warm, cold = (float(value) for value in row)  # in the order of STATES
                found[block] = Prediction(BlockLatency(hot_ms=hot, warm_ms=warm, cold_ms=cold, source="predicted"), error)
        return found

    def _regression(self, kind: str) -> tuple[_Regression, float]:
        if kind not in self._regressions:
            measured: Mapping[Block, BlockLatency] = {b: row for b, row in self._table.entries.items() if b.kind == kind}
            if len(measured) < MIN_MEASURED:
                raise TableError(
                    f"the table of {self._table.target} holds {len(measured)} {kind} blocks, too few to predict others from",
                    hint=self._table.target.profile_command,
                )
            features = block_features(list(measured))
            times = np.log([[getattr(row, f"{state}_ms") for state in STATES] for row in measured.values()])
            self._regressions[kind] = _best(features, times)
        return self._regressions[kind]


class _Regression(Protocol):
    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, n_features) -> (n, n_outputs)."""
        ...

    def leave_one_out(self) -> np.ndarray:
        """Residual of every training row, predicted from the others, (n, n_outputs)."""
        ...


def _best(features: np.ndarray, targets: np.ndarray) -> tuple[_Regression, float]:
    """The candidate with the smallest leave-one-out error on warm blocks, and that error (root mean square)."""
    candidates: list[_Regression] = [_Ridge(features, targets, quadratic=False), _Ridge(features, targets, quadratic=True)]
    if len(features) >= 3 * features.shape[1]:
        candidates.append(_Process(features, targets))
    warm = STATES.index("warm")
    errors = [float(np.sqrt(np.mean(candidate.leave_one_out()[:, warm] ** 2))) for candidate in candidates]
    best = int(np.argmin(errors))
    return candidates[best], errors[best]


class _Scaling:
    """Columns of mean 0 and deviation 1; columns that never change are dropped.

    Values far outside what was seen are held at its edge.
    """

    def __init__(self, features: np.ndarray) -> None:
        self._low, self._high = features.min(axis=0), features.max(axis=0)
        self._kept = self._high > self._low
        self._mean, self._std = features.mean(axis=0), features.std(axis=0)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        margin = 0.25 * (self._high - self._low)  # Half an octave beyond two: extrapolating a little is better than not at all.
        held = np.clip(features, self._low - margin, self._high + margin)
        return ((held - self._mean) / np.where(self._kept, self._std, 1.0))[:, self._kept]


class _Ridge:
    """Ridge regression on the features, or on them and their products; the penalty with the smallest leave-one-out error."""

    def __init__(self, features: np.ndarray, targets: np.ndarray, *, quadratic: bool) -> None:
        self._quadratic = quadratic
        self._scale = _Scaling(features)
        self._mean = targets.mean(axis=0)
        inputs = self._inputs(features)
        u, s, vt = np.linalg.svd(inputs - inputs.mean(axis=0), full_matrices=False)
        kept = s > 1e-9 * s.max(initial=1e-300)
        u, s, vt = u[:, kept], s[kept], vt[kept]
        self._centre = inputs.mean(axis=0)
        projected = u.T @ (targets - self._mean)
        outside = targets - self._mean - u @ projected
        free = np.maximum(1 - 1 / len(features) - (u**2).sum(axis=1), 0.0)
        best = np.inf
        for penalty in _PENALTIES * len(features):
            # What the fit leaves of a row, over what it leaves of the row's own weight. With more columns than rows both come near 0, so
            # they are summed up, not taken as differences from 1.
            left = penalty / (s**2 + penalty)
            residuals = (outside + u @ (left[:, None] * projected)) / np.maximum(free + u**2 @ left, 1e-12)[:, None]
            error = float(np.mean(residuals**2))
            if error < best:
                best, self._residuals = error, residuals
                self._weights = vt.T @ ((s / (s**2 + penalty))[:, None] * projected)

    def _inputs(self, features: np.ndarray) -> np.ndarray:
        scaled = self._scale(features)
        if not self._quadratic:
            return scaled
        i, j = np.triu_indices(scaled.shape[1])
        return np.hstack([scaled, scaled[:, i] * scaled[:, j] / 2])  # Halved: of two ways to say the same, the line is the cheaper one.

    def predict(self, features: np.ndarray) -> np.ndarray:
        return (self._inputs(features) - self._centre) @ self._weights + self._mean

    def leave_one_out(self) -> np.ndarray:
        return self._residuals


class _Process:
    """A line, and on what it leaves a Gaussian process with a scale for every feature, shared by the three states of the caches."""

    def __init__(self, features: np.ndarray, targets: np.ndarray) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor  # half a second to import, needed only with unmeasured blocks
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
        from threadpoolctl import threadpool_limits  # comes with scikit-learn

        self._line = _Ridge(features, targets, quadratic=False)
        self._scale = _Scaling(features)
        inputs = self._scale(features)
        residuals = targets - self._line.predict(features)
        self._spread = residuals.std() or 1.0
        residuals = residuals / self._spread
        scales: Any = np.full(inputs.shape[1], 3.0)  # The stubs know a single scale only.
        matern = Matern(scales, length_scale_bounds=(0.1, 100.0), nu=1.5)
        kernel = ConstantKernel(1.0, (1e-3, 1e2)) * matern + WhiteKernel(0.1, (1e-4, 1.0))
        rows = np.random.default_rng(0).permutation(len(inputs))[:_HYPERPARAMETER_ROWS]
        # Matrices of 160 rows are too small for threads: they would spin longer than they work.
        with _quiet(), threadpool_limits(1):
            learned: Any = GaussianProcessRegressor(kernel).fit(inputs[rows], residuals[rows]).kernel_
        self._kernel, self._noise = learned.k1, learned.k2.noise_level
        self._inputs = inputs
        inverse = np.linalg.inv(self._kernel(inputs) + self._noise * np.eye(len(inputs)))
        self._weights = inverse @ residuals
        self._left_out = self._weights / np.diag(inverse)[:, None] * self._spread

    def predict(self, features: np.ndarray) -> np.ndarray:
        return self._line.predict(features) + self._kernel(self._scale(features), self._inputs) @ self._weights * self._spread

    def leave_one_out(self) -> np.ndarray:
        return self._left_out


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides that a scale lies at its bound, which only says that a feature hardly matters."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
