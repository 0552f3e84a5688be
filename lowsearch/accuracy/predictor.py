"""What a network would score on the full schedule, with an interval, before or while it is trained.

Three sources, each with its own uncertainty: a fully trained network scored what it scored, give or take the seed; a partly trained one is
extrapolated from its last validation, as those that went further did; an untrained one is a regression on the architecture (log MACs, log
params, the space's features) over all of them. `predict` is the linear part of that regression, for populations inside the search;
`predict_exact` adds what is not linear, for a shortlist. `predict_record` and `posterior` join a network's own training with what the
regression, left without it, expects of it: the best of many trainings are the lucky ones, and another seed would not repeat their luck.
Intervals are rescaled by how far leave-one-out predictions were off.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lowsearch import cost
from lowsearch.accuracy.gaussian import GaussianProcess, Points
from lowsearch.accuracy.records import AccuracyRecord
from lowsearch.accuracy.scores import Unit
from lowsearch.errors import UsageError
from lowsearch.space import SearchSpace
from lowsearch.train import CurvePoint, Rung

PRIOR_ACCURACY = 0.6
PRIOR_GAIN = 0.015
"""Accuracy expected of one standard deviation more log MACs, before any network is trained."""
SEED_STD = 0.007
"""Spread of one network's accuracy over seeds, as expected before two seeds of one network are on record; a study trains with one."""
COVERAGE = 0.9
"""What the intervals are calibrated to: mean ± 1.645 std should hold this share."""
LOG_LOSS_SLOPE = 0.8
"""Log validation loss per log validation error, between networks at one moment of training: 0.8 to 0.9 on CIFAR-10 and Fashion-MNIST."""
_N_REFERENCE = 2000
_CHUNK = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveOneOut:
    """How well the architecture alone predicted networks that were then trained fully."""

    arch_ids: tuple[str, ...]
    observed: np.ndarray
    predicted: np.ndarray
    std: np.ndarray
    """Before rescaling."""


class Coordinates:
    """Where the networks of one space lie for a regression: log MACs, log params, the space's features, standardised over random ones."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self._costs = space.block_sums(np.array([[cost.of_block(b).macs, cost.of_block(b).params] for b in space.blocks], dtype=float))
        reference = space.sample(_N_REFERENCE, rng=np.random.default_rng(0))
        log_cost, features = np.log(self._costs(reference)), space.features(reference)
        varying = features.std(0) > 1e-9
        self._cost_mean, self._cost_std = log_cost.mean(0), np.maximum(log_cost.std(0), 1e-9)
        self._feature_mean, self._varying = features.mean(0), varying
        # Divided by sqrt(k), so that the features of a random network have about unit length together.
        self._feature_scale = np.where(varying, 1 / (np.where(varying, features.std(0), 1) * math.sqrt(max(1, varying.sum()))), 0)

    def __call__(self, genomes: np.ndarray) -> Points:
        """Of genomes (n, n_genes)."""
        log_cost = np.log(self._costs(genomes)) if len(genomes) else np.empty((0, 2))
        features = (self.space.features(genomes) - self._feature_mean) * self._feature_scale
        return Points(cost=(log_cost - self._cost_mean) / self._cost_std, features=features[:, self._varying])


class AccuracyPredictor:
    """Predicts the full-schedule validation accuracy (0 to 1) of the networks of one space under one recipe."""

    unit: Unit = "top1"
    source = "estimated"

    def __init__(self, space: SearchSpace) -> None:
        self.space, self._points = space, Coordinates(space)
        self.fit(())

    def fit(self, records: Iterable[AccuracyRecord]) -> AccuracyPredictor:
        """Learn from `records`, all of one recipe and data set. Networks that the space does not contain are left out."""
        records = tuple(records)
        if len({(r.recipe_hash, r.data_hash) for r in records}) > 1:
            raise UsageError(
                "records of several recipes or data sets", hint="accuracies compare only within one: choose by recipe_hash and data_hash"
            )
        self._seed_var = _seed_variance(records)
        self._curves = CurveModel(records)
        by_arch: dict[str, list[AccuracyRecord]] = defaultdict(list)
        for record in records:
            if self.space.contains(record.arch):
                by_arch[record.arch_id].append(record)
        estimates = [self._estimate(group) for group in by_arch.values()]
        self._index = {arch_id: i for i, arch_id in enumerate(by_arch)}
        self._diverged = np.array([any(r.diverged for r in _furthest(group)) for group in by_arch.values()], dtype=bool)
        self._is_full = np.array([max(r.curve[-1].fraction for r in group) >= 1.0 for group in by_arch.values()], dtype=bool)
        self._observed = np.array([mean for mean, _ in estimates])
        self._noise_var = noise = np.array([var for _, var in estimates])

        genomes = np.array([self.space.encode(group[0].arch) for group in by_arch.values()], dtype=np.int8).reshape(-1, self.space.n_genes)
        self._places = {genome.tobytes(): i for i, genome in enumerate(genomes)}
        points = self._points(genomes)
        residual = self._robust() - self._prior_mean(points)
        linear = GaussianProcess(points, residual, noise, curved=False)
        self._exact = GaussianProcess(points, residual, noise, curved=True)
        self._linear_scale = self._calibration(linear, residual)
        self._exact_scale = self._calibration(self._exact, residual)
        self._weights, covariance = linear.linear_weights()
        # var = |root @ x|^2; the covariance is positive semi-definite up to rounding.
        values, vectors = np.linalg.eigh(covariance)
        self._root = (vectors * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)
        self._linear_noise = linear.lack_of_fit_var
        self._points_fitted = points
        self._left_out = self._exact.leave_one_out() if len(points) else (np.empty(0), np.empty(0))
        return self

    @property
    def seed_std(self) -> float:
        """Spread of one network's full-schedule accuracy over seeds."""
        return math.sqrt(self._seed_var)

    @property
    def n_networks(self) -> int:
        """Networks learned from."""
        return len(self._observed)

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of the full-schedule validation accuracy of a fresh training, (n,) each. For populations."""
        mean, std = np.empty(len(genomes)), np.empty(len(genomes))
        for start in range(0, len(genomes), _CHUNK):
            rows = slice(start, start + _CHUNK)
            points = self._points(genomes[rows])
            design = np.hstack([np.ones((len(points), 1)), points.cost, points.features])
            mean[rows] = self._prior_mean(points) + design @ self._weights
            spread = self._root @ design.T.astype(np.float32)
            variance = np.einsum("ij,ij->j", spread, spread) + self._linear_noise
            std[rows] = np.sqrt(self._linear_scale**2 * variance + self._seed_var)
        return np.clip(mean, 0, 1), std

    def predict_exact(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `predict`, by the full Gaussian process: for a shortlist."""
        points = self._points(genomes)
        residual, variance = self._exact.predict(points)
        return np.clip(self._prior_mean(points) + residual, 0, 1), np.sqrt(self._exact_scale**2 * variance + self._seed_var)

    def changes(self, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of the accuracy of each genome of `after` (n, n_genes) minus that of the genome `before` (n_genes,), (n,) each.

        By the full Gaussian process, in which what two similar networks share cancels. It is the difference of their means over seeds:
        two single trainings differ by their seeds on top.
        """
        origin, points = self._points(before[None]), self._points(after)
        residual, variance = self._exact.predict_differences(origin, points)
        return self._prior_mean(points) - self._prior_mean(origin) + residual, self._exact_scale * np.sqrt(variance)

    def predict_record(self, record: AccuracyRecord) -> tuple[float, float]:
        """(mean, std) of the full-schedule accuracy of the network of `record`, as a mean over seeds: from its curve and its architecture.

        A full training too counts by the variance over seeds against that of the regression. One that diverged is what it scored.
        """
        known = self._index.get(record.arch_id)
        if known is not None and self._is_full[known] and record.curve[-1].fraction >= 1.0:  # Maybe trained with several seeds.
            own = float(self._observed[known]), float(self._noise_var[known])
        else:
            own = self._estimate([record])
        if record.diverged or not self.space.contains(record.arch):
            return own[0], math.sqrt(own[1])
        return _joined(own, self._expected(record))

    def forecast(self, record: AccuracyRecord) -> tuple[float, float]:
        """(mean, std) of what the training of `record`, with its seed, scores at the end of the schedule."""
        mean, var = self._estimate([record])
        var = max(0.0, var - self._seed_var)
        if record.curve[-1].fraction >= 1.0 or not self.space.contains(record.arch):
            return mean, math.sqrt(var)
        prior_mean, prior_var = self._expected(record)
        return _joined((mean, var), (prior_mean, prior_var + self._seed_var))

    def posterior(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `predict_record`, of the networks that were learned from, from all that is on record of them: (mean, std), (n,) each.

        NaN for any other genome.
        """
        mean, std = np.full(len(genomes), np.nan), np.full(len(genomes), np.nan)
        for row, genome in enumerate(np.asarray(genomes, dtype=np.int8)):
            if (i := self._places.get(genome.tobytes())) is not None:
                own = float(self._observed[i]), float(self._noise_var[i])
                mean[row], std[row] = (own[0], math.sqrt(own[1])) if self._diverged[i] else _joined(own, self._without(i))
        return mean, std

    def leave_one_out(self) -> LeaveOneOut:
        """Predictions of every fully trained network by `predict_exact`'s process fitted to all others."""
        if not self.n_networks:
            return LeaveOneOut(arch_ids=(), observed=np.empty(0), predicted=np.empty(0), std=np.empty(0))
        mean, variance = self._left_out
        chosen = np.flatnonzero(self._is_full)
        names = tuple(self._index)
        return LeaveOneOut(
            arch_ids=tuple(names[i] for i in chosen), observed=self._observed[chosen],
            predicted=(mean + self._prior_mean(self._points_fitted))[chosen], std=np.sqrt(variance[chosen]),
        )  # fmt: skip

    def _prior_mean(self, points: Points) -> np.ndarray:
        return PRIOR_ACCURACY + PRIOR_GAIN * points.cost[:, 0]

    def _estimate(self, group: Sequence[AccuracyRecord]) -> tuple[float, float]:
        """(mean, variance) of the full-schedule accuracy of one network, over seeds, from its furthest trainings, one a seed."""
        furthest = _furthest(group)
        points = {r.seed: r.curve[-1] for r in furthest}
        if furthest[0].curve[-1].fraction >= 1.0:
            return float(np.mean([point.val_accuracy for point in points.values()])), self._seed_var / len(points)
        guesses = [self._curves.extrapolate(point, apart=furthest[0].apart) for point in points.values()]
        return float(np.mean([m for m, _ in guesses])), float(np.mean([v for _, v in guesses])) + self._seed_var / len(points)

    def _robust(self) -> np.ndarray:
        """The observations, with diverged networks at the lowest accuracy of the others: they were bad, but how bad says nothing."""
        floor = self._observed[~self._diverged].min() if (~self._diverged).any() else 0.0
        return np.where(self._diverged, np.maximum(self._observed, floor), self._observed)

    def _expected(self, record: AccuracyRecord) -> tuple[float, float]:
        """What the regression expects of the network of `record`: (mean, variance) of its accuracy as a mean over seeds.

        A regression that has seen this very network is asked as if it had not.
        """
        known = self._index.get(record.arch_id)
        if known is not None:
            return self._without(known)
        mean, std = (float(values[0]) for values in self.predict_exact(self.space.encode(record.arch)[None]))
        return mean, std**2 - self._seed_var

    def _without(self, index: int) -> tuple[float, float]:
        """`_expected` of the fitted network at `index`, its own observation left out."""
        mean, variance = (float(values[index]) for values in self._left_out)
        prior = float(self._prior_mean(self._points_fitted)[index])
        return mean + prior, self._exact_scale**2 * max(variance - self._noise_var[index], 1e-12)

    def _calibration(self, process: GaussianProcess, residual: np.ndarray) -> float:
        """Factor on standard deviations that would have made COVERAGE of the leave-one-out intervals hold, drawn towards 1 by few."""
        if self._is_full.sum() < 2:
            return 1.0
        mean, variance = process.leave_one_out()
        z = np.sort(np.abs((residual - mean) / np.sqrt(variance))[self._is_full])
        n = len(z)
        quantile = z[min(n, math.ceil((n + 1) * COVERAGE)) - 1] / 1.645
        return float(np.exp(n / (n + 5) * np.log(max(quantile, 0.1))))


class CurveModel:
    """From the validation scores at a fraction of the schedule to the accuracy at its end, learned from the trainings that went on;
    and from those at a rung apart, learned from the networks that were trained on both with one seed.

    The log of the final error is linear in the log of the error so far and in how much higher the log of the loss is than usual at such an
    error, with conjugate priors: a loss counts every image by degrees, where an accuracy counts it whole, and tells more of a training that
    is young. Without any training that went on, errors are expected to fall as short schedules on small images do, with a wide interval.
    """

    def __init__(self, records: Iterable[AccuracyRecord]) -> None:
        known = [r for r in records if not r.diverged]
        self._full = [r for r in known if r.curve[-1].fraction >= 1.0]
        self._apart = {(r.apart, r.arch_id, r.seed): r.curve[-1] for r in known if r.apart}
        self._fits: dict[float, _CurveFit] = {}

    def extrapolate(self, point: CurvePoint, *, apart: Rung | None = None) -> tuple[float, float]:
        """(mean, variance) of the final accuracy of a training that has come to `point`, on the rung `apart` if it is of one."""
        key = apart or round(point.fraction, 3)
        if key not in self._fits:
            found = [(self._apart.get((apart, r.arch_id, r.seed)) if apart else r.at(point.fraction), r.val_accuracy) for r in self._full]
            pairs = [(earlier, accuracy) for earlier, accuracy in found if earlier is not None]
            # What other images are worth is known less well than what more steps are.
            self._fits[key] = _CurveFit(point.fraction, pairs, doubt=2.0 if apart else 1.0)
        log_error, var = self._fits[key].predict(point)
        error = math.exp(min(log_error, 0.0))
        return 1 - error, (error * math.sqrt(var)) ** 2


class _CurveFit:
    """Bayesian linear regression of the log of the final error on the scores at one fraction of the schedule."""

    def __init__(self, fraction: float, pairs: Sequence[tuple[CurvePoint, float]], *, doubt: float = 1.0) -> None:
        """`doubt`: how much less than usual is known of the fall of errors before any of `pairs`."""
        errors = np.array([_log_error(point.val_accuracy) for point, _ in pairs])
        outcomes = np.array([_log_error(accuracy) for _, accuracy in pairs])
        self._center = float(errors.mean()) if pairs else math.log(0.3)
        self._usual_log_loss = float(np.mean([_log_loss(point) for point, _ in pairs])) if pairs else math.nan
        # Prior: from a quarter of the schedule an error falls to 0.64 of it, give or take a quarter, a lag behind others to 0.8 of it.
        left = 1 - min(fraction, 0.99)
        mean = np.array([self._center - 0.6 * left, 0.8, 0.5])
        precision = np.diag(1 / np.array([0.3 * doubt * math.sqrt(left), 0.5, 0.7]) ** 2)
        # Noise of the log error: prior of 3 observations at a spread that shrinks as the schedule ends.
        df, spread = 3.0, 0.06 * math.sqrt(left)
        scaled = precision * spread**2
        rows = np.array([self._row(point) for point, _ in pairs]).reshape(-1, 3)
        self._precision = scaled + rows.T @ rows
        self._mean = np.linalg.solve(self._precision, scaled @ mean + rows.T @ outcomes)
        rss = float(((outcomes - rows @ self._mean) ** 2).sum() + (self._mean - mean) @ scaled @ (self._mean - mean))
        self._df = df + len(pairs)
        self._noise = (df * spread**2 + rss) / self._df

    def predict(self, point: CurvePoint) -> tuple[float, float]:
        """(mean, variance) of the log of the final error."""
        row = self._row(point)
        leverage = float(row @ np.linalg.solve(self._precision, row))
        return float(row @ self._mean), self._noise * (1 + leverage) * self._df / (self._df - 2)  # variance of a Student t

    def _row(self, point: CurvePoint) -> np.ndarray:
        lag = _log_error(point.val_accuracy) - self._center
        more_loss = _log_loss(point) - self._usual_log_loss - LOG_LOSS_SLOPE * lag
        return np.array([1.0, lag, more_loss if math.isfinite(more_loss) else 0.0])


def _furthest(group: Sequence[AccuracyRecord]) -> list[AccuracyRecord]:
    """Of one network's records those of the longest training, one a seed."""
    furthest = max(group, key=lambda r: r.curve[-1].fraction)
    return [r for r in group if r.apart == furthest.apart and r.curve[-1].fraction == furthest.curve[-1].fraction]


def _seed_variance(records: Sequence[AccuracyRecord]) -> float:
    """Variance of the full-schedule accuracy over seeds, pooled over networks, with a prior of 4 degrees of freedom."""
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        if record.curve[-1].fraction >= 1.0 and not record.diverged:
            scores[record.arch_id][record.seed] = record.val_accuracy
    groups = [np.array(list(by_seed.values())) for by_seed in scores.values()]
    squares = sum(float(((g - g.mean()) ** 2).sum()) for g in groups)
    df = sum(len(g) - 1 for g in groups)
    return (squares + 4 * SEED_STD**2) / (df + 4)


def _joined(own: tuple[float, float], prior: tuple[float, float]) -> tuple[float, float]:
    """Of two independent (mean, variance) of one accuracy, (mean, std) of what they say together."""
    weight = prior[1] / (prior[1] + own[1])
    return min(1.0, max(0.0, weight * own[0] + (1 - weight) * prior[0])), math.sqrt(weight * own[1])


def _log_error(accuracy: float) -> float:
    return math.log(min(1.0, max(1e-3, 1 - accuracy)))


def _log_loss(point: CurvePoint) -> float:
    return math.log(max(point.val_loss, 1e-6))
