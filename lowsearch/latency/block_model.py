"""The latency of blocks that were not measured, learned from those that were: one regression for every kind of block.

Three candidates, on the logarithms of the times: a line and a quadratic in the features, and a line with a Gaussian process on what it
leaves; the one with the smallest leave-one-out error is used, and that error is the uncertainty of what it predicts.

A table that leans on a sibling, the table of another batch, has more candidates: the same three on how many times longer a block takes
than there, with the three times there as further features. Where a block is only predicted there too, that error is added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from lowsearch.arch import Block
from lowsearch.errors import TableError
from lowsearch.latency.features import N_SIZES, block_features
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
        sibling = table.sibling
        self._sibling = None if sibling is None else BlockModel(dataclasses.replace(table, entries=sibling.entries, sibling=None))

    def predict(self, blocks: Sequence[Block]) -> dict[Block, Prediction]:
        """Predictions for `blocks`. Raises TableError for a kind of which hardly any block was measured."""
        by_kind: dict[str, list[Block]] = {}
        for block in blocks:
            by_kind.setdefault(block.kind, []).append(block)
        found: dict[Block, Prediction] = {}
        for kind, wanted in by_kind.items():
            regression, error = self._regression(kind)
            inputs, sibling_stds = self._inputs(kind, wanted)
            if not isinstance(regression, _Leaning):
                sibling_stds = np.zeros(len(wanted))
            for block, row, std in zip(wanted, np.exp(regression.predict(inputs)), np.hypot(error, sibling_stds), strict=True):
                hot, warm, cold = (float(value) for value in row)  # in the order of STATES
                found[block] = Prediction(BlockLatency(hot_ms=hot, warm_ms=warm, cold_ms=cold, source="predicted"), float(std))
        return found

    def _regression(self, kind: str) -> tuple[_Regression, float]:
        if kind not in self._regressions:
            measured = self._of_kind(kind)
            if len(measured) < MIN_MEASURED:
                raise TableError(
                    f"the table of {self._table.target} holds {len(measured)} {kind} blocks, too few to predict others from",
                    hint=self._table.target.profile_command,
                )
            inputs, _ = self._inputs(kind, list(measured))
            self._regressions[kind] = _best(inputs, _log_times(measured.values()), leaning=self._leans(kind))
        return self._regressions[kind]

    def _inputs(self, kind: str, blocks: Sequence[Block]) -> tuple[np.ndarray, np.ndarray]:
        """Features of `blocks`, all of one kind, (n, n_features), with the logarithms of their times at the sibling's batch as the last
        three where the kind leans on it, and the relative standard errors (n,) of these times."""
        features = block_features(blocks)
        if self._sibling is None or not self._leans(kind):
            return features, np.zeros(len(blocks))
        known = self._sibling._of_kind(kind)
        guessed = self._sibling.predict([block for block in blocks if block not in known])
        times = _log_times([known[block] if block in known else guessed[block].latency for block in blocks])
        stds = np.array([guessed[block].relative_std if block in guessed else 0.0 for block in blocks])
        return np.hstack([features, times]), stds

    def _leans(self, kind: str) -> bool:
        return self._sibling is not None and len(self._sibling._of_kind(kind)) >= MIN_MEASURED

    def _of_kind(self, kind: str) -> Mapping[Block, BlockLatency]:
        return {block: row for block, row in self._table.entries.items() if block.kind == kind}


def _log_times(rows: Iterable[BlockLatency]) -> np.ndarray:
    """Logarithms of the times, (n, n_states)."""
    return np.log([[getattr(row, f"{state}_ms") for state in STATES] for row in rows])


class _Regression(Protocol):
    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, n_features) -> (n, n_outputs)."""
        ...

    def leave_one_out(self) -> np.ndarray:
        """Residual of every training row, predicted from the others, (n, n_outputs)."""
        ...


def _best(inputs: np.ndarray, targets: np.ndarray, *, leaning: bool = False) -> tuple[_Regression, float]:
    """The candidate with the smallest leave-one-out error on warm blocks, and that error (root mean square)."""
    n_own = inputs.shape[1] - (len(STATES) if leaning else 0)
    candidates: list[_Regression] = [_OnOwnFeatures(make, n_own, inputs, targets) for make in _makers(len(inputs), n_own)]
    # With few blocks measured the sizes say as much beside the sibling's times as all features, and leave less to be learned.
    for columns in ([*range(N_SIZES), *range(n_own, inputs.shape[1])], [*range(inputs.shape[1])]) if leaning else ():
        candidates += [_Leaning(make, columns, inputs, targets) for make in _makers(len(inputs), len(columns))]
    warm = STATES.index("warm")
    errors = [float(np.sqrt(np.mean(candidate.leave_one_out()[:, warm] ** 2))) for candidate in candidates]
    best = int(np.argmin(errors))
    return candidates[best], errors[best]


_Maker = Callable[[np.ndarray, np.ndarray], _Regression]
"""Fits (n, n_features) and (n, n_outputs)."""


def _makers(n_rows: int, n_columns: int) -> list[_Maker]:
    """What is worth trying on so much data."""
    return [partial(_Ridge, quadratic=False), partial(_Ridge, quadratic=True), *([_Process] if n_rows >= 3 * n_columns else [])]


class _OnOwnFeatures:
    """A regression on the features of this table only, whatever a sibling adds."""

    def __init__(self, make: _Maker, n_features: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        self._n_features = n_features
        self._regression = make(inputs[:, :n_features], targets)

    def predict(self, features: np.ndarray) -> np.ndarray:
        return self._regression.predict(features[:, : self._n_features])

    def leave_one_out(self) -> np.ndarray:
        return self._regression.leave_one_out()


class _Leaning:
    """A regression, on some columns, of how many times longer blocks take than at the sibling's batch; the last columns are the times
    there."""

    def __init__(self, make: _Maker, columns: Sequence[int], inputs: np.ndarray, targets: np.ndarray) -> None:
        self._columns = list(columns)
        self._regression = make(inputs[:, self._columns], targets - inputs[:, -len(STATES) :])

    def predict(self, features: np.ndarray) -> np.ndarray:
        return self._regression.predict(features[:, self._columns]) + features[:, -len(STATES) :]

    def leave_one_out(self) -> np.ndarray:
        return self._regression.leave_one_out()


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
