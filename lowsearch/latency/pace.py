"""How fast the machine was while each step of a measurement ran, learned from the steps themselves.

Every block or network is timed in two processes or more, each time in a step with other company. A minute in which a neighbour on the
host uses the shared caches and memory makes all blocks of its steps slower, cold ones by as much as half, and the same blocks are as
usual in their other step. So log time = block + step, fitted robustly; the factor of its step is divided out of every sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lowsearch.latency.timing import STATES, Item, Timing, latency_ms

_PASSES = 40
_DOUBTED = 2.0  # Times beyond this many deviations count less.
_PRIOR_BLOCKS = 0.5
"""As much as so many blocks, a step is expected to be as slow as usual."""
MIN_ITEMS = 4
"""What fewer items than this tell of their step cannot be told from their own noise."""

DISTURBED = 1.1
"""A machine that takes longer than this many times its usual does not measure as usual: some networks slow down more than others."""

StepKey = tuple[int, str]
Samples = tuple[tuple[float, ...], ...]
"""A tuple for every process, in it a number for every round."""


def step_key(timing: Timing) -> StepKey:
    """What identifies the step that `timing` comes from."""
    return timing.process, timing.step


def step_paces(timings: Sequence[Timing]) -> Mapping[StepKey, tuple[float, ...]]:
    """For every step, how much longer its blocks took than in a quiet step, in the order of `STATES`; 1 where nothing can be known.

    The quiet step is the lower quartile of all steps. A state that the items were not timed in has pace 1.
    """
    blocks: dict[object, int] = {}
    steps: dict[StepKey, int] = {}
    of_block = np.array([blocks.setdefault(timing.item, len(blocks)) for timing in timings], dtype=int)
    of_step = np.array([steps.setdefault(step_key(timing), len(steps)) for timing in timings], dtype=int)
    columns = []
    for state in STATES:
        samples = [getattr(timing, f"{state}_ms") for timing in timings]
        if not all(samples):
            columns.append(np.ones(len(steps)))
            continue
        log_ms = np.log([latency_ms([rounds]) for rounds in samples])
        columns.append(np.exp(_step_effects(log_ms, of_block, of_step)))
    return {key: tuple(float(round(column[index], 4)) for column in columns) for key, index in steps.items()}


def hot_samples(timings: Mapping[Item, Sequence[Timing]]) -> dict[Item, tuple[Samples, tuple[float, ...]]]:
    """Of every item the hot rounds of each of its processes, in their order, and the pace that each was measured at."""
    paces = step_paces([timing for found in timings.values() for timing in found])
    ordered = {item: sorted(found, key=lambda timing: timing.process) for item, found in timings.items()}
    return {
        item: (tuple(timing.hot_ms for timing in found), tuple(paces[step_key(timing)][0] for timing in found))
        for item, found in ordered.items()
    }


def pace_since(now_ms: Sequence[float], then_ms: Sequence[float]) -> float:
    """How many times longer the same things take now than they did then: the median ratio. NaN where there are none."""
    ratios = [now / then for now, then in zip(now_ms, then_ms, strict=True)]
    return float(np.median(ratios)) if ratios else float("nan")


def _step_effects(log_ms: np.ndarray, of_block: np.ndarray, of_step: np.ndarray) -> np.ndarray:
    """Robust alternating fit of log_ms = block + step, (n_steps,), relative to the lower quartile of the steps."""
    if not len(log_ms):
        return np.empty(0)
    n_steps = of_step.max() + 1
    known = np.bincount(of_step, minlength=n_steps) >= MIN_ITEMS
    effects = np.zeros(n_steps)
    trust = np.ones(len(log_ms))
    for number in range(2 * _PASSES):
        block_ms = np.bincount(of_block, trust * (log_ms - effects[of_step])) / np.bincount(of_block, trust)
        residuals = log_ms - block_ms[of_block]
        effects = np.bincount(of_step, trust * residuals, n_steps) / (np.bincount(of_step, trust, n_steps) + _PRIOR_BLOCKS)
        effects = np.where(known, effects, 0.0)
        if number < _PASSES:  # Doubting begins only when the slow steps are known, or their blocks would be what is doubted.
            continue
        left = np.abs(residuals - effects[of_step])
        trust = np.minimum(1.0, _DOUBTED * (1.4826 * np.median(left) + 1e-9) / np.maximum(left, 1e-12))
    return np.where(known, effects - np.percentile(effects[known], 25), 0.0) if known.any() else effects
