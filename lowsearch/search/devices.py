"""Several devices in one search: the latency of a network on each of them, and what they amount to together.

Milliseconds of two devices do not compare. Each device has a scale of its own, fixed when the study is made: from the fastest network
found that scores like the smallest hand-made one, which is 1 on every device, to the fastest that scores like the largest, which is
the same number on every device. A network's worst-case latency is the largest of its places on these scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lowsearch.errors import StudyError
from lowsearch.search.evolution import breed
from lowsearch.space import SearchSpace

_PARENTS, _CHILDREN, _GENERATIONS = 256, 1024, 24
"""Of the evolution that looks for the two ends of a scale: a second a device."""
_LEAST_SPAN = 1.05
"""Where the two ends lie closer on any device, all scales are plain ratios to the lower end."""


class LatencyModel(Protocol):
    """Predicted latency; `latency.LatencyPredictor` is one."""

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> mean_ms (n,), std_ms (n,)."""
        ...


class ScoreModel(Protocol):
    """What orders networks as accuracy would; a proxy is enough."""

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> mean (n,), standard deviation (n,)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How latency counts on one device."""

    fast_ms: float
    """Here the scale is 1."""
    slow_ms: float
    """Here it is the same number on every device of the study."""
    exponent: float

    def relative(self, latency_ms: np.ndarray) -> np.ndarray:
        """Latencies (n,) as places on the scale, (n,)."""
        return (latency_ms / self.fast_ms) ** self.exponent


@dataclass(frozen=True)
class Fleet:
    """Latency models of several devices, by label. As a LatencyModel it is the first of them, the one whose networks are measured."""

    devices: Mapping[str, LatencyModel]
    scales: Mapping[str, Scale]
    counted: tuple[str, ...] = ()
    """Devices that worst-case latency is the worst of; all where there are none."""

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.devices)

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> mean_ms (n,), std_ms (n,) on the first device."""
        return self.devices[self.labels[0]].predict(genomes)

    def predict_each(self, genomes: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(n, n_genes) -> mean_ms (n,), std_ms (n,) on every device, by label."""
        return {label: tuple(map(np.asarray, model.predict(genomes))) for label, model in self.devices.items()}  # type: ignore[misc]

    def worst(self, latencies: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Worst-case latency (n,) of mean_ms and std_ms by label, and its standard deviation (n,): that of the device that decides."""
        counted = self.counted or self.labels
        means = np.stack([self.scales[label].relative(latencies[label][0]) for label in counted])
        stds = np.stack([self.scales[label].exponent * latencies[label][1] / latencies[label][0] for label in counted]) * means
        which = means.argmax(axis=0)
        columns = np.arange(means.shape[1])
        return means[which, columns], stds[which, columns]

    def alone(self, label: str) -> Fleet:
        """The same devices, with the worst case of `label` alone: its own place on the same scale."""
        return dataclasses.replace(self, counted=(label,))

    def with_first(self, model: LatencyModel) -> Fleet:
        """The same devices with `model` for the first."""
        return dataclasses.replace(self, devices={**self.devices, self.labels[0]: model})


def device_labels(devices: Sequence[str], runtimes: Sequence[str]) -> tuple[str, ...]:
    """What the columns of a study call its devices: the device, and where one stands twice `device/runtime`."""
    return tuple(d if devices.count(d) == 1 else f"{d}/{r}" for d, r in zip(devices, runtimes, strict=True))


def fit_scales(space: SearchSpace, devices: Mapping[str, LatencyModel], score: ScoreModel) -> dict[str, Scale]:
    """The scale of every device, by label. `score` says which networks are worth as much as the smallest and largest hand-made ones.

    A scale of hand-made networks themselves would be one of how well each device was designed for: the search would see one device
    alone wherever the family suits it less. A space without a family uses 300 of its random members. Deterministic.
    """
    if space.family:
        known = np.stack([space.encode(arch) for arch in space.family.values()])
    else:
        known = space.sample(300, rng=np.random.default_rng(0))
    scores = score.predict(known)[0]
    slow_ms = {label: _fastest_ms(space, model, score, float(scores.max()), known) for label, model in devices.items()}
    fast_ms = {label: min(_fastest_ms(space, model, score, float(scores.min()), known), slow_ms[label]) for label, model in devices.items()}
    spans = {label: float(np.log(slow_ms[label] / fast_ms[label])) for label in devices}
    common = float(np.mean(list(spans.values()))) if min(spans.values()) > np.log(_LEAST_SPAN) else 0.0
    return {
        label: Scale(fast_ms=fast_ms[label], slow_ms=slow_ms[label], exponent=common / spans[label] if common else 1.0)
        for label in devices
    }  # fmt: skip


def _fastest_ms(space: SearchSpace, model: LatencyModel, score: ScoreModel, least: float, known: np.ndarray) -> float:
    """The lowest latency that an evolution finds at a score of at least `least`, which one of the genomes `known` has."""
    rng = np.random.default_rng(0)
    genomes = np.vstack([known, space.sample(4 * _CHILDREN, rng=rng)])
    best_ms = np.inf
    for _ in range(_GENERATIONS):
        short = np.maximum(least - score.predict(genomes)[0], 0.0)
        latency_ms = model.predict(genomes)[0]
        best_ms = min(best_ms, float(latency_ms[short <= 1e-12].min(initial=np.inf)))
        parents = genomes[np.lexsort((latency_ms, short))[:_PARENTS]]
        first, second = rng.integers(len(parents), size=(2, _CHILDREN))
        children = breed(space, parents, first, second, rng=rng)
        genomes = np.unique(np.vstack([parents, children]), axis=0)
    return best_ms


def scales_from(rows: Any) -> dict[str, Scale]:
    """The scales that `devices` of study.yaml holds, by label. Raises StudyError where it is damaged."""
    try:
        return {
            str(row["device"]): Scale(**{field.name: float(row[field.name]) for field in dataclasses.fields(Scale)})
            for row in rows
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(
            f"devices of study.yaml are damaged: {error!r}", hint="mend the file, or start another study with another --study NAME"
        ) from error
