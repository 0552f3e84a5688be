"""Timing programs that are ready to run, in interleaved rounds: the inside of the protocol (docs/measurement.md).

Used by worker.py, and carried to machines that lowsearch is not installed on (bundle.py): numpy only, and Python 3.8.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Protocol, Sequence

import numpy as np

from lowsearch.latency.timers import Timer

if TYPE_CHECKING:
    from lowsearch.latency.measure import Effort

MIN_COMPANY = 16


class Runnable(Protocol):
    """A network, a block or a read of memory, compiled, with its input in place."""

    def run(self) -> None:
        """One pass."""


@dataclass
class Prepared:
    """One item, compiled and checked, and what has been timed of it so far."""

    item: Any
    program: Runnable
    parity: float
    """Largest difference from torch's output, as a share of the largest output."""
    is_block: bool
    """Whether it is timed warm and cold too; networks and reads of memory are timed as they are used, back to back."""
    once_ms: float = 0.0
    hot_ms: list[float] = field(default_factory=list)
    warm_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    total_ms: float = 0.0
    total_wall_ms: float = 0.0

    def times(self) -> dict[str, Any]:
        """The fields of a Timing that the rounds filled: a number for every round, in every state."""
        return {
            "hot_ms": tuple(self.hot_ms), "warm_ms": tuple(self.warm_ms), "cold_ms": tuple(self.cold_ms),
            "wall_over_cpu": round(self.total_wall_ms / self.total_ms, 4) if self.total_ms else 1.0,
            "parity": float(f"{self.parity:.1e}"),
        }  # fmt: skip


def time_step(
    prepared: Sequence[Prepared], timer: Timer, effort: Effort, *, rng: np.random.Generator, again: Callable[[Prepared, int], Prepared]
) -> None:
    """Time the items of one step in `effort.rounds` rounds, in every round in another order.

    `again(block, i)` prepares a block once more: a few blocks alone would stay warmer than in a network, so copies of them, timed for
    nobody, take turns with them.
    """
    blocks = [one for one in prepared if one.is_block]
    n_company = max(0, MIN_COMPANY - len(blocks)) if blocks else 0
    company = [again(blocks[i % len(blocks)], i) for i in range(n_company)]
    timer.settle(prepared[0].program.run)
    for _ in range(effort.rounds):
        for index in rng.permutation(len(prepared)):
            _time_hot(prepared[index], timer, effort)
        for index in rng.permutation(len(blocks)):
            _time_cold(blocks[index], timer, effort)
        if blocks:
            _time_warm(blocks, company, timer, effort, rng=rng)


def _time_hot(one: Prepared, timer: Timer, effort: Effort) -> None:
    """One round of back-to-back calls."""
    run = one.program.run
    for _ in range(effort.warmups - 1):
        run()
    one.once_ms = max(timer.time(run, repeats=1).ms, 1e-6)  # The last warm-up call also tells how many repeats a sample needs.
    repeats = max(1, round(effort.sample_ms / one.once_ms))
    n_samples = int(np.clip(effort.round_ms / (one.once_ms * repeats), effort.min_samples, effort.max_samples))
    samples = [timer.time(run, repeats=repeats) for _ in range(n_samples)]
    one.hot_ms.append(_quartile([sample.ms for sample in samples]))
    one.total_ms += sum(sample.ms for sample in samples)
    one.total_wall_ms += sum(sample.wall_ms for sample in samples)


def _time_cold(one: Prepared, timer: Timer, effort: Effort) -> None:
    """One round of calls that each find the caches flushed."""
    samples = []
    for _ in range(effort.cold_samples):
        timer.flush()
        samples.append(timer.time(one.program.run, repeats=1).ms)
    one.cold_ms.append(_quartile(samples))


def _time_warm(blocks: Sequence[Prepared], company: Sequence[Prepared], timer: Timer, effort: Effort, *, rng: np.random.Generator) -> None:
    """One round of calls in turn, each turn in an order of its own: between two calls of a block run all the others, as in a network."""
    everyone = [*blocks, *company]
    turn_ms = sum(one.once_ms for one in blocks) * len(everyone) / len(blocks)
    n_turns = int(np.clip(effort.turns_ms / turn_ms, effort.min_turns, effort.max_turns))
    samples = np.empty((len(everyone), n_turns))
    for turn in range(n_turns):
        for index in rng.permutation(len(everyone)):
            samples[index, turn] = timer.time(everyone[index].program.run, repeats=1).ms
    for one, row in zip(blocks, samples):
        one.warm_ms.append(_quartile(row))


def _quartile(values: Sequence[float] | np.ndarray) -> float:
    """25th percentile, to 10 nanoseconds."""
    return round(float(np.percentile(values, 25)), 5)
