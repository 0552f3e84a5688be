"""Every metric of a population of genomes at once: predicted latency and accuracy, exact MACs and parameters.

The inner search of the sampler sees networks only through this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from lowsearch import cost
from lowsearch.search.objectives import Limit, Metric
from lowsearch.space import Scorer, SearchSpace

ACCURACY_MARGIN = 2.0
"""An accuracy limit has to be out of reach by this many standard deviations before a network is given up untrained."""


class LatencyModel(Protocol):
    """Predicted latency; `latency.LatencyPredictor` is one."""

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> mean_ms (n,), std_ms (n,)."""
        ...


class AccuracyModel(Protocol):
    """Predicted accuracy after the full schedule; `accuracy.AccuracyPredictor` is one."""

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> mean (n,), standard deviation (n,), as fractions."""
        ...


AccuracySource = AccuracyModel | Callable[[], AccuracyModel | None]
"""A model, or a function that returns the newest one (None while nothing is known)."""


@dataclass(frozen=True)
class Estimates:
    """What is known of n networks before they are trained."""

    mean: Mapping[Metric, np.ndarray]
    """(n,) per metric; `accuracy` is absent where there is no model of it."""
    std: Mapping[Metric, np.ndarray]


class Estimator:
    """Scores populations. `latency` may be None only where no latency is asked for."""

    def __init__(self, space: SearchSpace, latency: LatencyModel | None) -> None:
        self.space = space
        self.latency = latency

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_costs"}  # A compiled scorer cannot be pickled.

    @cached_property
    def _costs(self) -> Scorer:
        costs = [cost.of_block(block) for block in self.space.blocks]
        return self.space.block_sums(np.array([[c.macs, c.params] for c in costs], dtype=float))

    def estimate(self, genomes: np.ndarray, accuracy: AccuracyModel | None = None) -> Estimates:
        """Estimates of `genomes` (n, n_genes)."""
        sums = self._costs(genomes)
        exact = np.zeros(len(genomes))
        mean: dict[Metric, np.ndarray] = {"macs": sums[:, 0], "params": sums[:, 1]}
        std: dict[Metric, np.ndarray] = {"macs": exact, "params": exact}
        if self.latency is not None:
            mean["latency_ms"], std["latency_ms"] = map(np.asarray, self.latency.predict(genomes))
        if accuracy is not None:
            mean["accuracy"], std["accuracy"] = map(np.asarray, accuracy.predict(genomes))
        return Estimates(mean, std)


def excess(estimates: Estimates, limits: Sequence[Limit]) -> np.ndarray:
    """By how much the estimates break the limits, summed as fractions of the bounds, (n,); 0 where a network may be trained.

    Latency counts at the limit's confidence (a bare mean would break it half the time), accuracy with a margin in its favour; limits on
    unknown metrics do not count.
    """
    total = np.zeros(len(estimates.mean["macs"]))
    for limit in limits:
        if limit.metric not in estimates.mean:
            continue
        value, std = estimates.mean[limit.metric], estimates.std[limit.metric]
        sign = 1.0 if limit.side == "max" else -1.0
        if limit.metric == "latency_ms":
            value = value + sign * NormalDist().inv_cdf(limit.confidence) * std
        elif limit.metric == "accuracy":
            value = value - sign * ACCURACY_MARGIN * std
        total += np.maximum(limit.excess(value), 0.0) / max(limit.bound, 1e-12)
    return total


def reference_values(estimator: Estimator, *, chance_accuracy: float) -> dict[Metric, float]:
    """The worst values that hypervolume counts from: chance accuracy and 1.1 times the family's largest latency, MACs, parameters.

    A space without a family uses 300 of its own random members.
    """
    space = estimator.space
    if space.family:
        genomes = np.stack([space.encode(arch) for arch in space.family.values()])
    else:
        genomes = space.sample(300, rng=np.random.default_rng(0))
    mean = estimator.estimate(genomes).mean
    worst: dict[Metric, float] = {metric: float(1.1 * values.max()) for metric, values in mean.items()}
    return {"accuracy": chance_accuracy, **worst}
