"""Clocks of the devices: how one call is timed, and how caches are emptied before a cold one.

A CPU is timed in process CPU time of one thread, which other work on the machine hardly moves, and in wall time where there are more
threads; a CUDA device by its own events around warm, synchronised calls. Clocks and the CUDA module come in as arguments, so tests
drive all timers with a fake device.
Also carried to machines that lowsearch is not installed on (bundle.py): numpy only, and Python 3.8.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable, Protocol

import numpy as np

from lowsearch.latency.machine import cache_bytes

Run = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """Time of one call, averaged over the repeats that one reading of the clocks enclosed."""

    ms: float
    """In the timer's statistic."""
    wall_ms: float


class Timer(Protocol):
    """Times calls on one device."""

    @property
    def statistic(self) -> str:
        """What `Sample.ms` is, in words."""
        ...

    @property
    def flush_bytes(self) -> int:
        """How much memory `flush` touches."""
        ...

    def time(self, run: Run, *, repeats: int) -> Sample:
        """One sample of `repeats` calls, back to back."""
        ...

    def flush(self) -> None:
        """Push what the last calls left out of the caches."""
        ...

    def settle(self, run: Run) -> None:
        """Bring the device to its working clocks by calling `run`; nothing to do on a CPU."""
        ...


class CpuTimer:
    """Process CPU time. Wall time is kept beside it: a ratio far above 1 tells of a busy machine."""

    statistic = "process CPU time"

    def __init__(
        self,
        *,
        cpu_clock_ns: Callable[[], int] = time.process_time_ns,
        wall_clock_ns: Callable[[], int] = time.perf_counter_ns,
        flush_bytes: int | None = None,
        evicting: Any = None,
    ) -> None:
        """`evicting`: an array of `flush_bytes` in memory, None for one of ours."""
        self._cpu_clock_ns = cpu_clock_ns
        self._wall_clock_ns = wall_clock_ns
        self.flush_bytes = cpu_flush_bytes() if flush_bytes is None else flush_bytes
        self._evicting = np.zeros(max(1, self.flush_bytes // 8)) if evicting is None else evicting

    def time(self, run: Run, *, repeats: int) -> Sample:
        wall, cpu = self._wall_clock_ns(), self._cpu_clock_ns()
        for _ in range(repeats):
            run()
        cpu, wall = self._cpu_clock_ns() - cpu, self._wall_clock_ns() - wall
        return Sample(ms=cpu / repeats / 1e6, wall_ms=wall / repeats / 1e6)

    def flush(self) -> None:
        self._evicting += 1.0

    def settle(self, run: Run) -> None:
        pass


class WallTimer(CpuTimer):
    """Wall time, the only clock of several threads: CPU time counts those that spin while they wait. It needs a quiet machine."""

    statistic = "wall time"

    def __init__(self, evicting: Any, *, wall_clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        """`evicting`: a tensor that the threads share, as large as all their cores' caches."""
        flush_bytes = evicting.numel() * evicting.element_size()
        super().__init__(wall_clock_ns=wall_clock_ns, flush_bytes=flush_bytes, evicting=evicting)

    def time(self, run: Run, *, repeats: int) -> Sample:
        wall_ms = super().time(run, repeats=repeats).wall_ms
        return Sample(ms=wall_ms, wall_ms=wall_ms)


class CudaTimer:
    """CUDA events around the calls, after a synchronise. `cuda` is `torch.cuda`, or a fake of it in tests."""

    statistic = "CUDA event time"
    SETTLE_MS = 300.0
    """A GPU at rest lowers its clocks and takes some tenths of a second to raise them."""

    def __init__(self, cuda: Any, *, index: int, evicting: Any = None, wall_clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._cuda = cuda
        self._index = index
        self._evicting = evicting
        """A tensor on the device, larger than its L2 cache."""
        self.flush_bytes = 0 if evicting is None else evicting.numel() * evicting.element_size()
        self._wall_clock_ns = wall_clock_ns

    def time(self, run: Run, *, repeats: int) -> Sample:
        start, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
        self._cuda.synchronize(self._index)
        wall = self._wall_clock_ns()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        wall = self._wall_clock_ns() - wall
        return Sample(ms=start.elapsed_time(end) / repeats, wall_ms=wall / repeats / 1e6)

    def flush(self) -> None:
        if self._evicting is not None:
            self._evicting.zero_()
        self._cuda.synchronize(self._index)

    def settle(self, run: Run) -> None:
        began = self._wall_clock_ns()
        while self._wall_clock_ns() - began < self.SETTLE_MS * 1e6:
            run()
            self._cuda.synchronize(self._index)


def timer_class(kind: str, threads: int) -> type[CpuTimer | CudaTimer]:
    """The timer of a target with so many threads on such a device."""
    if kind == "cuda":
        return CudaTimer
    return CpuTimer if threads == 1 else WallTimer


def cpu_flush_bytes() -> int:
    """Bytes to touch so that nothing of a block stays in a core's own caches: four times its L2, at least 16 MiB.

    Not the L3: hypervisors report hundreds of MiB shared with strangers, and between two calls of a block in its network only the
    network's other blocks pass through the caches. How cold a block is there is fitted (docs/measurement.md).
    """
    own = max((size for level, size in cache_bytes().items() if level <= 2), default=1 << 21)
    return min(max(4 * own, 16 << 20), 64 << 20)
