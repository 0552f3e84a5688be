"""What is measured again: planted disturbances are found, quiet steps are left alone, and there is an end to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from lowsearch.arch import Mlp
from lowsearch.latency import target
from lowsearch.latency.doubt import doubtful, invalid, most_again
from lowsearch.latency.measure import steps
from lowsearch.latency.target import gpu_clock_mhz
from lowsearch.latency.timing import Item, Timing

BLOCKS = [Mlp(channels=c, resolution_px=4, ratio=2) for c in range(1, 121)]
N_STEPS = len(steps(BLOCKS, rng=np.random.default_rng(0)))
SLOW = (1, "2")
"""The step that something is planted in."""


def measured(plant: Callable[[Timing], Timing] = lambda timing: timing, *, noise: float = 0.01) -> dict[Item, list[Timing]]:
    """Every block in two processes, each in steps of its own; `plant` changes what it wants to."""
    rng = np.random.default_rng(0)
    found: dict[Item, list[Timing]] = {block: [] for block in BLOCKS}
    for process in (0, 1):
        for number, step in enumerate(steps(BLOCKS, rng=rng)):
            for item in step:
                assert isinstance(item, Mlp)
                times = tuple(float(ms) for ms in (0.01 + 0.001 * item.channels) * np.exp(noise * rng.normal(size=3)))
                found[item].append(plant(Timing(item=item, process=process, step=str(number), hot_ms=times, warm_ms=times, cold_ms=times)))
    return found


def in_step(change: Callable[[Timing], Timing]) -> Callable[[Timing], Timing]:
    return lambda timing: change(timing) if (timing.process, timing.step) == SLOW else timing


def of_step(found: dict[Item, list[Timing]]) -> set[Item]:
    return {item for item, timings in found.items() if any((timing.process, timing.step) == SLOW for timing in timings)}


def slower(timing: Timing, factor: float) -> Timing:
    return dataclasses.replace(
        timing, hot_ms=tuple(factor * ms for ms in timing.hot_ms), warm_ms=tuple(factor * ms for ms in timing.warm_ms)
    )


def test_a_quiet_measurement_has_no_doubts() -> None:
    assert doubtful(measured(), at_most=999) == invalid(measured(), at_most=999) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda timing: slower(timing, 1.5),
        lambda timing: dataclasses.replace(timing, wall_over_cpu=2.0),
        lambda timing: dataclasses.replace(timing, clock_mhz=1200.0),
    ],
    ids=["slow", "processor taken away", "clock fallen"],
)
def test_the_items_of_a_disturbed_step_are_doubtful(change: Callable[[Timing], Timing]) -> None:
    found = measured(lambda timing: in_step(change)(dataclasses.replace(timing, clock_mhz=1900.0)))
    assert 0 < len(of_step(found)) < len(BLOCKS) / 2 and set(doubtful(found, at_most=999)) == of_step(found)


@pytest.mark.parametrize("factor", [1.05, 1.15])
def test_what_the_pace_can_divide_out_is_no_disturbance(factor: float) -> None:
    """A step a little slower is no reason; only where processes are in dispute, which some are from 10 %."""
    doubts = doubtful(measured(in_step(lambda timing: slower(timing, factor)), noise=0.001), at_most=999)
    assert bool(doubts) == (factor > 1.1)


def test_a_machine_that_is_busy_throughout_has_no_disturbed_step() -> None:
    """Measuring again would find it as busy; the verdicts tell."""
    assert doubtful(measured(lambda timing: dataclasses.replace(timing, wall_over_cpu=2.5)), at_most=999) == []


def test_one_preempted_item_does_not_disturb_its_step() -> None:
    assert doubtful(measured(lambda t: dataclasses.replace(t, wall_over_cpu=9.0) if t.item == BLOCKS[3] else t), at_most=999) == []


def test_of_too_many_the_worst_are_measured_again() -> None:
    factors = {BLOCKS[4]: 1.2, BLOCKS[40]: 3.0, BLOCKS[80]: 1.6}
    found = measured(lambda timing: slower(timing, factors.get(timing.item, 1.0) if timing.process else 1.0))  # type: ignore[arg-type]
    assert doubtful(found, at_most=999) == [BLOCKS[40], BLOCKS[80], BLOCKS[4]]
    assert doubtful(found, at_most=2) == [BLOCKS[40], BLOCKS[80]] and doubtful(found, at_most=0) == []
    assert most_again(2 * len(BLOCKS)) == len(BLOCKS) / 2 and most_again(0) == 0 and most_again(1) == 1


def test_an_item_that_a_third_process_has_decided_is_no_longer_invalid() -> None:
    found = measured(noise=0.001)
    for item, third in ((BLOCKS[10], 1.0), (BLOCKS[50], 4.0)):
        first, second = found[item]
        found[item] = [first, slower(second, 2.0), dataclasses.replace(slower(first, third), process=2, step="0")]
    assert invalid(found, at_most=999) == [BLOCKS[50]]


def test_the_clock_of_a_gpu_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = "NVIDIA A100-SXM4-80GB, 1410\nNVIDIA GeForce RTX 3090, 1695"
    monkeypatch.setattr(target, "query", lambda *_: answers)
    assert gpu_clock_mhz("rtx3090") == 1695 and gpu_clock_mhz("rtx4090") is None
    monkeypatch.setattr(target, "query", lambda *_: "NVIDIA GeForce RTX 3090, [N/A]")
    assert gpu_clock_mhz("rtx3090") is None
