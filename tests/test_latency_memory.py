"""The memory curve: monotone whatever was measured, flat where memory is one, and never extrapolated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowsearch.latency.memory import READ_BYTES, MemoryCurve, MemoryLatency


def curve(ms_per_byte: list[float]) -> MemoryCurve:
    return MemoryCurve([MemoryLatency(n_bytes=n, latency_ms=n * rate) for n, rate in zip(READ_BYTES, ms_per_byte, strict=False)])


def test_sizes_reach_from_inside_a_core_to_memory() -> None:
    assert READ_BYTES[0] == 2**18 and READ_BYTES[-1] == 2**28
    assert list(READ_BYTES) == sorted(set(READ_BYTES)) and all(n % 4 == 0 for n in READ_BYTES)


@given(st.lists(st.floats(1e-9, 1e-3), min_size=2, max_size=len(READ_BYTES)), st.lists(st.floats(1, 1e12), min_size=2, max_size=20))
def test_reading_more_is_never_faster_a_byte(rates: list[float], footprints: list[float]) -> None:
    extra = curve(rates).extra_ms_per_byte(np.sort(footprints))
    assert (extra >= 0).all() and (np.diff(extra) >= -1e-18).all()


def test_a_known_curve_comes_back_at_and_between_its_points() -> None:
    made = curve([1e-8, 1e-8, 3e-8, 3e-8, 5e-8])
    assert made.ms_per_byte(np.array(READ_BYTES[:5], dtype=float)) == pytest.approx([1e-8, 1e-8, 3e-8, 3e-8, 5e-8])
    assert 1e-8 < float(made.ms_per_byte(450_000)) < 3e-8
    assert float(made.extra_ms_per_byte(1e15)) == pytest.approx(4e-8) and float(made.extra_ms_per_byte(10)) == 0


def test_what_a_call_costs_is_no_cost_of_memory() -> None:
    """On a GPU a small read takes as long as its launch."""
    rows = [MemoryLatency(n_bytes=n, latency_ms=0.005 + n * 1e-9) for n in READ_BYTES]
    extra = MemoryCurve(rows).extra_ms_per_byte(np.array(READ_BYTES, dtype=float))
    assert (extra == 0).all()


def test_without_rows_memory_costs_nothing() -> None:
    assert (MemoryCurve(()).extra_ms_per_byte(np.array([1.0, 1e9])) == 0).all()
