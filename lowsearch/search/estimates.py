"""Every metric of a population of genomes at once: predicted latency and accuracy, exact MACs, parameters, memory and file size.

The inner search of the sampler sees networks only through this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist
from typing import Protocol

import numpy as np
from scipy.special import ndtr

from lowsearch import cost, footprint
from lowsearch.accuracy.scores import Scores, Unit
from lowsearch.errors import UsageError
from lowsearch.footprint import ACTIVATION_BYTES, MB, Precision
from lowsearch.search.devices import Fleet, LatencyModel
from lowsearch.search.objectives import DIRECTION, LATENCY_METRICS, Limit, Metric, Objectives, of_latency
from lowsearch.space import Scorer, SearchSpace

ACCURACY_MARGIN = 2.0
"""An accuracy limit has to be out of reach by this many standard deviations before a network is given up untrained."""


_LEAST_MS = 1e-9
"""A latency at its confidence is positive, however uncertain its prediction."""


class EnergyPredictor(Protocol):
    """Predicted energy; `latency.energy_model.EnergyModel` is one."""

    def predict(self, genomes: np.ndarray, latency_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) and their predicted latency (n,) -> mean_mj (n,), std_mj (n,) of one pass."""
        ...


class AccuracyModel(Protocol):
    """Predicted accuracy after the full schedule, or a score in its place; `accuracy.predictor.AccuracyPredictor` is one."""

    @property
    def unit(self) -> Unit: ...
    @property
    def source(self) -> str:
        """Where its values are from, as in the column `accuracy_source`."""
        ...

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> mean (n,), standard deviation (n,), in `unit`. A proxy has no error of its own, and gives zeros."""
        ...


def scores_of(model: AccuracyModel, genomes: np.ndarray, *, cpu_clock: Callable[[], float] = time.process_time) -> Scores:
    """What `model` says of `genomes` (n, n_genes), by its exact form (`predict_exact`) where it has one."""
    before = cpu_clock()
    mean, std = map(np.asarray, getattr(model, "predict_exact", model.predict)(genomes))
    return Scores(
        source=model.source, unit=model.unit, mean=mean, std=std if std.any() else None, cpu_seconds=cpu_clock() - before
    )  # fmt: skip


AccuracySource = AccuracyModel | Callable[[], AccuracyModel | None]
"""A model, or a function that returns the newest one (None while nothing is known)."""


@dataclass(frozen=True)
class Estimates:
    """What is known of n networks before they are trained."""

    mean: Mapping[Metric, np.ndarray]
    """(n,) per metric; `accuracy` and `energy_mj` are absent where there is no model of them."""
    std: Mapping[Metric, np.ndarray]
    batch: int = 1
    """Images of the forward pass that latency is of."""
    by_device: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """mean_ms (n,) and std_ms (n,) by the label of a device, where there are several; `mean` and `std` have those of the first."""

    def latencies(self, device: str = "") -> list[tuple[np.ndarray, np.ndarray]]:
        """mean_ms (n,) and std_ms (n,) on the device of that label, or on every one."""
        if device:
            return [self.by_device[device]]
        return list(self.by_device.values()) or [(self.mean["latency_ms"], self.std["latency_ms"])]


class Estimator:
    """Scores populations. `latency` may be None only where no latency is asked for, and is a Fleet where there are several devices.

    `batch` and `precision` are the target's: throughput, memory and file size depend on them.
    """

    def __init__(
        self,
        space: SearchSpace,
        latency: LatencyModel | None,
        *,
        batch: int = 1,
        precision: Precision = "fp32",
        energy: EnergyPredictor | None = None,
    ) -> None:
        self.space = space
        self.latency = latency
        self.energy = energy
        self.batch = batch
        self.precision: Precision = precision

    @cached_property
    def _costs(self) -> Scorer:
        blocks = self.space.blocks
        weights = [footprint.weight_bytes(block, self.precision) for block in blocks]
        costs = [cost.of_block(block) for block in blocks]
        return self.space.block_sums(np.array([[c.macs, c.params, w] for c, w in zip(costs, weights, strict=True)], dtype=float))

    @cached_property
    def _peaks(self) -> Scorer:
        return self.space.block_maxima(np.array([[footprint.peak_elements(block)] for block in self.space.blocks], dtype=float))

    def estimate(self, genomes: np.ndarray, accuracy: AccuracyModel | None = None) -> Estimates:
        """Estimates of `genomes` (n, n_genes)."""
        sums = self._costs(genomes)
        exact = np.zeros(len(genomes))
        artifact_mb = sums[:, 2] / MB
        activations_mb = self._peaks(genomes)[:, 0] * self.batch * ACTIVATION_BYTES[self.precision] / MB
        mean: dict[Metric, np.ndarray] = {
            "macs": sums[:, 0], "params": sums[:, 1], "artifact_mb": artifact_mb, "peak_memory_mb": artifact_mb + activations_mb,
        }  # fmt: skip
        std: dict[Metric, np.ndarray] = dict.fromkeys(mean, exact)
        by_device: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if self.latency is not None:
            if isinstance(self.latency, Fleet):
                by_device = self.latency.predict_each(genomes)
                mean["worst_latency"], std["worst_latency"] = self.latency.worst(by_device)
                latency_ms, std_ms = by_device[self.latency.labels[0]]
            else:
                latency_ms, std_ms = map(np.asarray, self.latency.predict(genomes))
            for metric in LATENCY_METRICS:
                mean[metric] = of_latency(metric, latency_ms, self.batch)
                std[metric] = mean[metric] * (std_ms / latency_ms)
            if self.energy is not None:
                mean["energy_mj"], std["energy_mj"] = self.energy.predict(genomes, latency_ms)
        if accuracy is not None:
            mean["accuracy"], std["accuracy"] = map(np.asarray, accuracy.predict(genomes))
        return Estimates(mean, std, self.batch, by_device)

    def as_measured(self, estimates: Estimates, latency_ms: np.ndarray) -> Estimates:
        """`estimates` with another latency (n,) on the first device, and with what follows from it."""
        mean = {**estimates.mean, **{metric: of_latency(metric, latency_ms, self.batch) for metric in LATENCY_METRICS}}
        by_device = estimates.by_device
        if isinstance(self.latency, Fleet):
            first = self.latency.labels[0]
            by_device = {**by_device, first: (latency_ms, by_device[first][1])}
            mean["worst_latency"] = self.latency.worst(by_device)[0]
        return replace(estimates, mean=mean, by_device=by_device)

    def as_its_own(self, estimates: Estimates) -> Estimates:
        """`estimates` that `on_device` made, with the worst case over all devices."""
        if not isinstance(self.latency, Fleet):
            return estimates
        worst, std = self.latency.worst(estimates.by_device)
        return replace(estimates, mean={**estimates.mean, "worst_latency": worst}, std={**estimates.std, "worst_latency": std})

    def on_device(self, label: str) -> Estimator:
        """Of a fleet: the same estimates, with the worst case of one device alone."""
        assert isinstance(self.latency, Fleet)
        other = copy(self)
        other.latency = self.latency.alone(label)
        return other


def check_models(objectives: Objectives, limits: Sequence[Limit], *, latency: LatencyModel | None, energy: EnergyPredictor | None) -> None:
    """Raise UsageError where an objective or a limit needs a model that is None. Accuracy may be learned later."""
    asked = {*objectives.metrics, *(limit.metric for limit in limits)}
    if energy is None and "energy_mj" in asked:
        raise UsageError("energy is an objective or has a limit, but there is no energy model", hint="pass energy=")
    if latency is None and asked & {*LATENCY_METRICS}:
        raise UsageError("latency is an objective or has a limit, but there is no latency model", hint="pass latency=")
    if "worst_latency" in asked and not isinstance(latency, Fleet):
        raise UsageError("worst-case latency is of several devices, but there is one", hint="pass latency=Fleet(...)")


def at_confidence(estimates: Estimates, limit: Limit) -> np.ndarray:
    """The values (n,) that `limit` is held against, in its metric.

    Latency and energy count at the limit's confidence (a bare mean would break it half the time), and throughput and time per image are
    those of that latency, on the limit's device or on the one of all that is farthest off; accuracy counts with a margin in its favour.
    """
    quantile = NormalDist().inv_cdf(limit.confidence)
    if limit.metric in LATENCY_METRICS:
        margin = quantile if limit.caps_latency else -quantile
        latencies_ms = [mean_ms + margin * std_ms for mean_ms, std_ms in estimates.latencies(limit.device)]
        latency_ms = (np.max if limit.caps_latency else np.min)(latencies_ms, axis=0)
        return of_latency(limit.metric, np.maximum(latency_ms, _LEAST_MS), estimates.batch)
    value, std = estimates.mean[limit.metric], estimates.std[limit.metric]
    if limit.metric in ("energy_mj", "worst_latency"):
        return value + quantile * (std if limit.side == "max" else -std)
    if limit.metric == "accuracy":
        return value + ACCURACY_MARGIN * (std if limit.side == "min" else -std)
    return value


def of_limit(estimates: Estimates, limit: Limit) -> tuple[np.ndarray, np.ndarray]:
    """Mean (n,) and standard deviation (n,) of what `limit` is about: on its device, or where it is for several, on the farthest off."""
    if limit.metric not in LATENCY_METRICS or not estimates.by_device:
        return estimates.mean[limit.metric], estimates.std[limit.metric]
    means, stds = (np.stack(values) for values in zip(*estimates.latencies(limit.device), strict=True))
    which = (np.argmax if limit.caps_latency else np.argmin)(means, axis=0)
    latency_ms, std_ms = (values[which, np.arange(values.shape[1])] for values in (means, stds))
    value = of_latency(limit.metric, latency_ms, estimates.batch)
    return value, value * (std_ms / latency_ms)


def excess(estimates: Estimates, limits: Sequence[Limit]) -> np.ndarray:
    """By how much the estimates break the limits, summed as fractions of the bounds, (n,); 0 where a network may be trained.

    Each is held against the values `at_confidence`; limits on unknown metrics do not count.
    """
    total = np.zeros(len(next(iter(estimates.mean.values()))))
    for limit in limits:
        if limit.metric in estimates.mean:
            total += np.maximum(limit.excess(at_confidence(estimates, limit)), 0.0) / max(limit.bound, 1e-12)
    return total


def chance_within(estimates: Estimates, limits: Sequence[Limit]) -> np.ndarray:
    """Probability (n,) that networks keep `limits`, each by its mean and standard deviation; those on unknown metrics do not count."""
    chance = np.ones(len(estimates.mean["macs"]))
    for limit in limits:
        if limit.metric not in estimates.mean:
            continue
        mean, std = estimates.mean[limit.metric], estimates.std[limit.metric]
        sign = 1.0 if limit.side == "max" else -1.0
        chance *= probability_at_most(sign * limit.bound, sign * mean, std)
    return chance


def probability_at_most(bound: float, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """That normal values of `mean` (n,) and `std` (n,) do not exceed `bound`, (n,); of a certain one 0 or 1."""
    certain = std <= 0
    z = (bound - mean) / np.where(certain, 1.0, std)
    return np.where(certain, (mean <= bound).astype(float), ndtr(z))


def reference_values(estimator: Estimator, *, chance_accuracy: float) -> dict[Metric, float]:
    """The worst values that hypervolume counts from: chance accuracy and for every other metric a tenth beyond the family's
    worst (1.1 times its largest latency).

    A space without a family uses 300 of its own random members.
    """
    space = estimator.space
    if space.family:
        genomes = np.stack([space.encode(arch) for arch in space.family.values()])
    else:
        genomes = space.sample(300, rng=np.random.default_rng(0))
    mean = estimator.estimate(genomes).mean
    worst: dict[Metric, float] = {
        metric: float(1.1 * values.max() if DIRECTION[metric] == "minimize" else values.min() / 1.1) for metric, values in mean.items()
    }
    return {"accuracy": chance_accuracy, **worst}
