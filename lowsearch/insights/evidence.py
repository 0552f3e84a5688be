"""What an experiment works with and what it leaves: latencies with their errors, ratios of them, and the finding on one claim.

A ratio decides nothing that lies within two of its standard errors, or within MARGIN, of the line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from lowsearch.accuracy.agreement import agreement
from lowsearch.insights.claims import Claim
from lowsearch.latency.timing import Item

MARGIN = 0.05
MIN_PAIRS = 30
Verdict = Literal["confirmed", "refuted", "not decided"]


class Latency(NamedTuple):
    """Measured, with the standard error between processes."""

    ms: float
    std_ms: float

    @property
    def relative_std(self) -> float:
        return self.std_ms / self.ms


class Times(Protocol):
    """Where an experiment gets its latencies from."""

    batch: int
    """The large batch that `batched` is measured at."""

    def has(self, item: Item) -> bool:
        """Whether the runtime can execute `item`; only networks of timm may be missing."""
        ...

    def of(self, item: Item) -> Latency:
        """Latency of one forward pass at batch 1: of a block or layer alone with hot caches, or of a whole network."""
        ...

    def batched(self, item: Item) -> Latency:
        """Latency of one forward pass at `batch`."""
        ...


class Wanted:
    """Answers 1 ms to everything and remembers what it was asked: how an experiment tells what has to be measured."""

    def __init__(self, batch: int = 8) -> None:
        self.batch = batch
        self.single: dict[Item, None] = {}
        self.large: dict[Item, None] = {}

    def has(self, item: Item) -> bool:
        return True

    def of(self, item: Item) -> Latency:
        self.single[item] = None
        return Latency(1.0, 0.0)

    def batched(self, item: Item) -> Latency:
        self.large[item] = None
        return Latency(1.0, 0.0)


class Ratio(NamedTuple):
    """How many times longer one thing took than another."""

    value: float
    std: float

    @classmethod
    def of(cls, latency: Latency, beside: Latency) -> Ratio:
        value = latency.ms / beside.ms
        return cls(value, value * math.hypot(latency.relative_std, beside.relative_std))

    def side(self, line: float = 1.0) -> int:
        """1 where clearly above `line`, -1 where clearly below, else 0."""
        # In logarithms, so that a ratio and its inverse are as clear as each other.
        above, reach = math.log(self.value / line), max(2 * self.std / self.value, math.log1p(MARGIN))
        return (above > reach) - (above < -reach)

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.std:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of a plot that belong together, joined by a line where `lines`."""

    name: str
    x: Sequence[float | str]
    y: Sequence[float]
    std: Sequence[float] = ()
    labels: Sequence[str] = ()
    """Names of the points, shown to a pointer."""
    named: Sequence[str] = ()
    """Those of the labels that stand in the plot."""
    lines: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """What the page draws for a finding."""

    x_title: str
    y_title: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    line_y: float | None = None
    """A level to compare with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One claim after the experiment."""

    claim: Claim
    verdict: Verdict
    evidence: str
    """The deciding numbers in a sentence or three."""
    rows: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Everything that was measured for it."""
    plots: Sequence[Plot] = ()


def verdict_of(sides: Sequence[int]) -> Verdict:
    """The verdict of many comparisons: 1 for the claim, -1 against it, 0 for neither.

    Two thirds on one side, and hardly any (a sixth) on the other, decide.
    """
    n = len(sides)
    assert n, "no comparison"
    for_it, against = sum(s > 0 for s in sides) / n, sum(s < 0 for s in sides) / n
    if for_it >= 2 / 3 and against <= 1 / 6:
        return "confirmed"
    return "refuted" if against >= 2 / 3 and for_it <= 1 / 6 else "not decided"


def rank_verdict(wrong: int, pairs: int) -> Verdict:
    """Whether two quantities rank networks differently, from how many `pairs` differ clearly in both and how many of these are `wrong`.

    From 5 % they do, below 1 % they do not; fewer than MIN_PAIRS decide nothing.
    """
    if pairs < MIN_PAIRS:
        return "not decided"
    return "confirmed" if wrong >= 0.05 * pairs else "refuted" if wrong < 0.01 * pairs else "not decided"


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive values."""
    return float(np.exp(np.mean(np.log(values))))


def rank_correlations(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Spearman's rho and Kendall's tau; NaN where all of one side are equal."""
    found = agreement(a, b, n_bootstrap=1)
    return (math.nan if found.spearman is None else found.spearman), (math.nan if found.kendall is None else found.kendall)


def misranked(expected: Sequence[float], latencies: Sequence[Latency]) -> tuple[int, int]:
    """(wrong, all) pairs that differ clearly in both `expected` and latency; wrong are those that the two rank differently."""
    wrong = total = 0
    for i in range(len(expected)):
        for j in range(i):
            by_time = Ratio.of(latencies[i], latencies[j]).side()
            ratio = expected[i] / expected[j]
            by_expectation = (ratio > 1 + MARGIN) - (ratio < 1 - MARGIN)
            if by_time and by_expectation:
                total += 1
                wrong += by_time != by_expectation
    return wrong, total
