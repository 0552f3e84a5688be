"""What a study searches for: objectives (`acc-latency`) and limits (`--max latency_ms=3`), each with a metric, a unit, a direction.

This is the one place where values become costs: minimised, and on the scale that hypervolume is measured on.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lowsearch.errors import UsageError

Metric = Literal[
    "accuracy", "latency_ms", "throughput_ips", "time_per_image_ms", "worst_latency", "peak_memory_mb", "artifact_mb", "energy_mj", "macs",
    "params",
]  # fmt: skip
Direction = Literal["maximize", "minimize"]
"""Optuna's spelling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One thing to improve."""

    name: str
    """As typed in `--objective`."""
    metric: Metric
    """Column of candidates.csv that holds it."""
    direction: Direction
    unit: str
    word: str
    """As a sentence says it."""
    log: bool
    """Whether its cost is the natural logarithm: a gain of 1 % of the latency counts the same everywhere on the front."""

    def cost(self, values: np.ndarray) -> np.ndarray:
        """`values` as costs to minimise, same shape."""
        array = np.asarray(values, dtype=float)
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                array = np.log(array)
        return -array if self.direction == "maximize" else array

    def value(self, costs: np.ndarray) -> np.ndarray:
        """The values that have these `costs`, same shape."""
        array = -np.asarray(costs, dtype=float) if self.direction == "maximize" else np.asarray(costs, dtype=float)
        return np.exp(array) if self.log else array


_ALL = (
    Objective(name="acc", metric="accuracy", direction="maximize", unit="fraction correct", word="accuracy", log=False),
    Objective(name="latency", metric="latency_ms", direction="minimize", unit="ms", word="latency", log=True),
    Objective(name="throughput", metric="throughput_ips", direction="maximize", unit="images/s", word="throughput", log=True),
    Objective(name="imagetime", metric="time_per_image_ms", direction="minimize", unit="ms/image", word="time per image", log=True),
    Objective(name="worstlatency", metric="worst_latency", direction="minimize", unit="on the scale", word="worst-case latency", log=True),
    Objective(name="memory", metric="peak_memory_mb", direction="minimize", unit="MB", word="peak memory", log=True),
    Objective(name="size", metric="artifact_mb", direction="minimize", unit="MB", word="file size", log=True),
    Objective(name="energy", metric="energy_mj", direction="minimize", unit="mJ", word="energy", log=True),
    Objective(name="macs", metric="macs", direction="minimize", unit="multiply-adds", word="MACs", log=True),
    Objective(name="params", metric="params", direction="minimize", unit="weights", word="parameters", log=True),
)
OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in _ALL}
METRICS: tuple[Metric, ...] = tuple(objective.metric for objective in _ALL)
LATENCY_METRICS: tuple[Metric, ...] = ("latency_ms", "throughput_ips", "time_per_image_ms")
"""One axis: at a study's batch each of them follows from any other."""
EXACT_METRICS: tuple[Metric, ...] = ("peak_memory_mb", "artifact_mb", "macs", "params")
"""Known of every network in closed form."""
ON_DEVICES: dict[str, str] = {"latency": "worstlatency"}
"""What an objective means in a study of several devices."""
DIRECTION: dict[Metric, Direction] = {objective.metric: objective.direction for objective in _ALL}


def of_latency(metric: Metric, latency_ms: Any, batch: int) -> Any:
    """`latency_ms` of one forward pass on `batch` images as another of LATENCY_METRICS, a number or an array as given."""
    match metric:
        case "throughput_ips":
            return 1000 * batch / latency_ms
        case "time_per_image_ms":
            return latency_ms / batch
    return latency_ms


@dataclass(frozen=True)
class Objectives:
    """One or more objectives; accuracy first where it is one, so that the uncertain column is column 0 of every cost array."""

    members: tuple[Objective, ...]

    def __iter__(self) -> Iterator[Objective]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __str__(self) -> str:
        return "-".join(o.name for o in self.members)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(o.metric for o in self.members)

    @property
    def latency_metric(self) -> Metric | None:
        """The one of LATENCY_METRICS that is an objective, if one is."""
        return next((o.metric for o in self.members if o.metric in LATENCY_METRICS), None)

    @property
    def spread_over(self) -> Objective:
        """What networks are spread over and compete in slices of: the second objective, or the only one; MACs where that is accuracy."""
        *_, last = self.members[:2]
        return OBJECTIVES["macs"] if last.metric == "accuracy" else last

    @property
    def is_timed(self) -> bool:
        """Whether latency is an objective in any form: on one device, or the worst of several."""
        return self.latency_metric is not None or "worst_latency" in self.metrics

    @property
    def directions(self) -> list[Direction]:
        return [o.direction for o in self.members]

    def costs(self, values: Mapping[Metric, np.ndarray] | np.ndarray) -> np.ndarray:
        """Costs (n, k) of values given by metric, or as an array (n, k) in the order of the objectives."""
        if isinstance(values, Mapping):
            return np.stack([o.cost(values[o.metric]) for o in self.members], axis=1)
        array = np.asarray(values, dtype=float).reshape(-1, len(self.members))
        return np.stack([o.cost(array[:, j]) for j, o in enumerate(self.members)], axis=1)


def parse_objectives(text: str) -> Objectives:
    """`acc-latency` as Objectives. Raises UsageError on an unknown or repeated name, and on two of one axis."""
    known = ", ".join(OBJECTIVES)
    names = text.split("-")
    for name in names:
        if name not in OBJECTIVES:
            near = difflib.get_close_matches(name.lower(), [*OBJECTIVES, "accuracy"], n=1)
            guess = {"accuracy": "acc"}.get(near[0], near[0]) if near else None
            raise UsageError(
                f"unknown objective {name!r} in {text!r}; known: {known}",
                hint=f"write {guess!r} for {name!r}" if guess else "join names by '-', as in --objective acc-latency",
            )
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UsageError(
            f"objective {repeated[0]!r} stands twice in {text!r}", hint=f"name it once: --objective {'-'.join(dict.fromkeys(names))}"
        )
    same = [name for name in names if OBJECTIVES[name].metric in (*LATENCY_METRICS, "worst_latency")]
    if len(same) > 1:
        others = [name for name in names if name not in same[1:]]
        raise UsageError(
            f"{' and '.join(same)} in {text!r} are one axis: at the batch of a study each follows from the other",
            hint=f"--objective {'-'.join(others)}",
        )
    return Objectives(tuple(sorted((OBJECTIVES[n] for n in names), key=lambda o: o.name != "acc")))


DEFAULT_CONFIDENCE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A bound that every candidate has to keep."""

    metric: Metric
    bound: float
    side: Literal["max", "min"]
    confidence: float = DEFAULT_CONFIDENCE
    """Probability, by the prediction's own error, with which latency or energy has to keep the bound before a network is tried."""
    device: str = ""
    """Label of the device that a limit on one of LATENCY_METRICS is for; empty for every device of the study."""

    @property
    def name(self) -> str:
        """As typed: `latency_ms`, or `latency_ms@rtx3090`."""
        return f"{self.metric}@{self.device}" if self.device else self.metric

    def __str__(self) -> str:
        return f"{self.name} {'<=' if self.side == 'max' else '>='} {self.bound:g}"

    @property
    def caps_latency(self) -> bool:
        """Whether it keeps latency down: a minimum of throughput does too."""
        return self.metric in LATENCY_METRICS and (self.side == "max") != (self.metric == "throughput_ips")

    def bound_ms(self, batch: int) -> float:
        """The latency at which a limit on one of LATENCY_METRICS is met exactly."""
        return self.bound * batch if self.metric == "time_per_image_ms" else of_latency(self.metric, self.bound, batch)

    def excess(self, values: np.ndarray) -> np.ndarray:
        """How far `values` break the bound, in the metric's unit; 0 or less where they keep it."""
        array = np.asarray(values, dtype=float)
        return array - self.bound if self.side == "max" else self.bound - array


def accuracy_excess(limits: Iterable[Limit], accuracy: np.ndarray) -> np.ndarray:
    """By how much each `accuracy` breaks those of `limits` that are on it, the worst, same shape; 0 or less where it keeps them."""
    array = np.asarray(accuracy, dtype=float)
    broken = [limit.excess(array) for limit in limits if limit.metric == "accuracy"]
    return np.max(broken, axis=0) if broken else np.zeros_like(array)


_ALIASES: dict[str, Metric] = {
    **{objective.name: objective.metric for objective in _ALL}, "val_accuracy": "accuracy", "flops": "macs", "fps": "throughput_ips",
}  # fmt: skip


def parse_limits(*, maxima: Iterable[str] = (), minima: Iterable[str] = (), confidence: float = DEFAULT_CONFIDENCE) -> tuple[Limit, ...]:
    """`--max` and `--min` values, each `METRIC=NUMBER`, as limits. Raises UsageError on malformed, repeated and contradicting ones."""
    if not 0.5 <= confidence < 1:
        raise UsageError(f"confidence is {confidence!r}, expected 0.5 (the prediction alone) to below 1", hint="--confidence 0.9")
    limits = [_parse_limit(text, "max") for text in maxima] + [_parse_limit(text, "min") for text in minima]
    kept: dict[tuple[str, str], Limit] = {}
    for limit in limits:
        if (limit.name, limit.side) in kept:
            raise UsageError(f"--{limit.side} {limit.name} is given twice", hint="keep the one that is meant")
        kept[limit.name, limit.side] = limit
    for name in dict.fromkeys(limit.name for limit in limits):
        low, high = kept.get((name, "min")), kept.get((name, "max"))
        if low and high and low.bound > high.bound:
            raise UsageError(f"no {name} is at least {low.bound:g} and at most {high.bound:g}", hint="swap the bounds or drop one")
    ordered = sorted(kept.values(), key=lambda x: (METRICS.index(x.metric), x.device, x.side))
    return tuple(replace(limit, confidence=confidence) for limit in ordered)


def _parse_limit(text: str, side: Literal["max", "min"]) -> Limit:
    example = "--min accuracy=0.8" if side == "min" else "--max latency_ms=3"
    name, equals, number = text.partition("=")
    name, at, device = (part.strip() for part in name.partition("@"))
    if not equals or not name or not number.strip() or bool(at) != bool(device):
        raise UsageError(f"--{side} {text!r} is not METRIC=NUMBER", hint=f"for example {example}")
    if name not in METRICS:
        near = difflib.get_close_matches(name.lower(), [*METRICS, *_ALIASES], n=1)
        guess = _ALIASES.get(near[0], near[0]) if near else None
        raise UsageError(
            f"--{side} {text!r}: unknown metric {name!r}; known: {', '.join(METRICS)}",
            hint=f"--{side} {guess}={number}" if guess else f"for example {example}",
        )
    if device and name not in LATENCY_METRICS:
        raise UsageError(
            f"--{side} {text!r}: {name} is not held device by device; {', '.join(LATENCY_METRICS)} are", hint=f"--{side} {name}={number}"
        )
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        unit = " (the number alone, without its unit)" if any(c.isdigit() for c in number) else ""
        raise UsageError(f"--{side} {text!r}: {number!r} is not a number{unit}", hint=f"for example {example}")
    if name == "accuracy" and not 0 <= bound <= 1:
        hint = f"--{side} accuracy={bound / 100:g}" if 1 < bound <= 100 else f"for example {example}"
        raise UsageError(f"--{side} {text!r}: accuracy is a fraction from 0 to 1", hint=hint)
    if name != "accuracy" and bound <= 0:
        raise UsageError(f"--{side} {text!r}: {name} is positive", hint=f"for example {example}")
    return Limit(metric=name, bound=bound, side=side, device=device.lower())
