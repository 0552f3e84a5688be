"""Which items are measured again: those that processes disagree about, and those of steps that something disturbed.

A step is disturbed where its items took much longer than in their other steps (pace.py), where other work took the processor away, or
where the clocks of a GPU had fallen. One more process times what is doubtful, and another one what is invalid even then; the worst
come first, and all of it together is at most MOST_AGAIN of the first measurement. Decided from timings alone, so that a measurement
that was killed and resumed decides the same. A bundle, whose machine knows no paces, goes by `disputed` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lowsearch.latency.pace import StepKey, step_key, step_paces
from lowsearch.latency.timing import BUSY, NOISY, Item, Timing, latency_ms, row_error

DISPUTE = 0.1
"""Two processes that differ by more are in dispute."""
SLOW = 1.2
"""A step that is slower than usual by more is disturbed."""
LOW_CLOCK = 0.9
"""A GPU step whose clock is below this share of the highest one is disturbed."""
MOST_AGAIN = 0.25

_Timings = Mapping[Item, Sequence[Timing]]


def disputed(timings: Sequence[Timing]) -> bool:
    """Whether the processes disagree about an item by more than `DISPUTE`; a further one then decides."""
    return _disagreement(timings) > 1 + DISPUTE


def doubtful(timings: _Timings, *, at_most: int) -> list[Item]:
    """The items that are disputed, or were in a disturbed step; of too many the worst."""
    all_of_them = [timing for found in timings.values() for timing in found]
    disturbed = _disturbances(all_of_them, step_paces(all_of_them))
    return _worst(
        {
            item: max(_disagreement(found) / (1 + DISPUTE), *(disturbed[step_key(timing)] for timing in found))
            for item, found in timings.items()
        },
        at_most,
    )


def invalid(timings: _Timings, *, at_most: int) -> list[Item]:
    """The items that processes still differ about so much that their latency is invalid; of too many the worst."""
    paces = step_paces([timing for found in timings.values() for timing in found])
    errors = {}
    for item, found in timings.items():
        states = [(i, [getattr(timing, name) for timing in found]) for i, name in enumerate(("hot_ms", "warm_ms"))]
        errors[item] = max(row_error(samples, [paces[step_key(timing)][i] for timing in found]) for i, samples in states if all(samples))
    return _worst({item: error / NOISY for item, error in errors.items()}, at_most)


def most_again(n_timings: int) -> int:
    """How many more timings a measurement of `n_timings` may spend on what is measured again."""
    return math.ceil(MOST_AGAIN * n_timings)


def _worst(excess: Mapping[Item, float], at_most: int) -> list[Item]:
    """Those above 1, the largest first, no more than `at_most`."""
    above = [item for item, value in excess.items() if value > 1]
    return sorted(above, key=lambda item: -excess[item])[: max(0, at_most)]


def _disagreement(timings: Sequence[Timing]) -> float:
    """How many times longer than the fastest process the slowest took, hot or warm."""
    largest = 1.0
    for state in ("hot_ms", "warm_ms"):
        found = [latency_ms([getattr(timing, state)]) for timing in timings if getattr(timing, state)]
        largest = max(largest, max(found) / min(found) if found else 1.0)
    return largest


def _disturbances(timings: Sequence[Timing], paces: Mapping[StepKey, Sequence[float]]) -> dict[StepKey, float]:
    """How far each step is beyond what is called undisturbed; up to 1 it is not."""
    steps: dict[StepKey, list[Timing]] = {}
    for timing in timings:
        steps.setdefault(step_key(timing), []).append(timing)
    wall = {key: float(np.median([timing.wall_over_cpu for timing in found])) for key, found in steps.items()}
    usual_wall = float(np.percentile(list(wall.values()), 25)) if wall else 1.0
    best_mhz = max((timing.clock_mhz or 0.0 for timing in timings), default=0.0)
    found = {}
    for key, members in steps.items():
        mhz = members[0].clock_mhz
        clock = LOW_CLOCK * best_mhz / mhz if mhz else 0.0
        found[key] = max(paces[key][0] / SLOW, paces[key][1] / SLOW, wall[key] / usual_wall / BUSY, clock)
    return found
