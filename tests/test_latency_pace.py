"""The pace of the machine: planted slow steps are found, and divided out of the blocks that suffered them."""

from __future__ import annotations

import numpy as np
import pytest

from lowsearch.arch import Mlp
from lowsearch.latency.measure import steps
from lowsearch.latency.pace import step_key, step_paces
from lowsearch.latency.table import block_latency
from lowsearch.latency.timing import STATES, Timing, latency_ms

N = 240
BLOCKS = [Mlp(channels=c, resolution_px=4, ratio=2) for c in range(1, N + 1)]


def true_ms(block: Mlp) -> float:
    return 0.01 + 0.001 * block.channels


def measured(*, slow: dict[tuple[int, str], float], noise: float = 0.02, processes: int = 2, seed: int = 0) -> list[Timing]:
    """Every block in every process; `slow`: the factor of a step on warm and cold times."""
    rng = np.random.default_rng(seed)
    timings = []
    for process in range(processes):
        for number, step in enumerate(steps(BLOCKS, rng=rng)):
            for item in step:
                assert isinstance(item, Mlp)
                factor = slow.get((process, str(number)), 1.0)
                ms = true_ms(item) * np.exp(noise * rng.normal(size=3))
                rounds = tuple(map(float, ms * factor))
                timings.append(
                    Timing(item=item, process=process, step=str(number), hot_ms=tuple(map(float, ms)), warm_ms=rounds, cold_ms=rounds)
                )
    return timings


def test_slow_steps_are_found_in_the_states_that_suffered() -> None:
    slow = {(0, "3"): 1.5, (1, "1"): 1.2, (1, "7"): 1.3}
    paces = step_paces(measured(slow=slow))
    assert len(paces) == 20
    for key, (hot, warm, cold) in paces.items():
        assert hot == pytest.approx(1, abs=0.03)
        assert warm == pytest.approx(slow.get(key, 1.0), rel=0.05) and cold == pytest.approx(slow.get(key, 1.0), rel=0.05)


def test_blocks_come_out_as_if_no_step_had_been_slow() -> None:
    rng = np.random.default_rng(1)
    slow = {(process, str(number)): float(rng.choice([1.0, 1.3, 1.6])) for process in (0, 1) for number in range(10)}
    timings = measured(slow=slow)
    paces = step_paces(timings)
    errors, raw = [], []
    for block in BLOCKS:
        mine = [timing for timing in timings if timing.item == block]
        row = block_latency(mine, paces)
        assert row.warm_samples_ms == tuple(timing.warm_ms for timing in mine)  # kept as measured
        errors.append(row.warm_ms / true_ms(block))
        raw.append(latency_ms(row.warm_samples_ms) / true_ms(block))
    assert np.std(errors) < 0.03 < 0.08 < np.std(raw)


def test_a_block_that_is_loud_by_itself_does_not_slow_its_step() -> None:
    timings = measured(slow={})
    loud = timings[0]
    timings[0] = Timing(item=loud.item, process=loud.process, step=loud.step, hot_ms=(9.0,), warm_ms=(9.0,), cold_ms=(9.0,))
    assert step_paces(timings)[step_key(loud)] == pytest.approx((1, 1, 1), abs=0.05)


@pytest.mark.parametrize("timings", [[], measured(slow={(0, "0"): 2.0}, processes=1)])
def test_one_process_alone_cannot_tell_a_slow_step_from_slow_blocks(timings: list[Timing]) -> None:
    assert all(pace == (1.0,) * len(STATES) for pace in step_paces(timings).values())
