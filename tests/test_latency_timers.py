"""Timers, driven with fake clocks and a fake CUDA device. No test waits for a real clock."""

from __future__ import annotations

import pytest
import torch

from lowsearch.latency import timers
from lowsearch.latency.timers import CpuTimer, CudaTimer, WallTimer, timer_class


class Clock:
    """Time that passes only when something runs."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns

    def spend(self, ms: float) -> None:
        self.ns += round(ms * 1e6)


class FakeCuda:
    """A device that works through its queue on a clock of its own when somebody waits for it."""

    def __init__(self, wall: Clock) -> None:
        self.wall = wall
        self.now_ms = 0.0
        self.queue: list[float | FakeEvent] = []

    def launch(self, ms: float) -> None:
        self.queue.append(ms)

    def synchronize(self, index: int) -> None:
        assert index == 3
        for work in self.queue:
            if isinstance(work, FakeEvent):
                work.at_ms = self.now_ms
            else:
                self.now_ms += work
                self.wall.spend(work)
        self.queue.clear()

    def Event(self, *, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: FakeCuda) -> None:
        self.device = device
        self.at_ms: float | None = None

    def record(self) -> None:
        self.device.queue.append(self)

    def synchronize(self) -> None:
        self.device.synchronize(3)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.at_ms is not None and end.at_ms is not None, "read before the device got there"
        return end.at_ms - self.at_ms


def test_a_sample_is_cpu_time_per_call_with_wall_time_beside_it() -> None:
    cpu, wall = Clock(), Clock()
    timer = CpuTimer(cpu_clock_ns=cpu, wall_clock_ns=wall, flush_bytes=64)

    def run() -> None:  # 2 ms of work, and 3 more for somebody else
        cpu.spend(2)
        wall.spend(5)

    sample = timer.time(run, repeats=4)
    assert sample.ms == pytest.approx(2) and sample.wall_ms == pytest.approx(5)
    assert timer.statistic == "process CPU time"


def test_several_threads_are_timed_by_the_wall() -> None:
    wall = Clock()
    evicting = torch.zeros(100)
    timer = WallTimer(evicting, wall_clock_ns=wall)
    sample = timer.time(lambda: wall.spend(5), repeats=4)
    assert sample.ms == sample.wall_ms == pytest.approx(5)
    timer.flush()
    assert timer.flush_bytes == 400 and (evicting == 1).all()


def test_the_statistic_follows_device_and_threads() -> None:
    words = [timer_class(kind, threads).statistic for kind, threads in (("cpu", 1), ("cpu", 2), ("cuda", 1))]
    assert words == ["process CPU time", "wall time", "CUDA event time"]


def test_a_cuda_sample_is_what_the_device_worked_not_what_waited_before() -> None:
    wall = Clock()
    cuda = FakeCuda(wall)
    timer = CudaTimer(cuda, index=3, wall_clock_ns=wall)
    cuda.launch(100)  # left in the queue by somebody else
    sample = timer.time(lambda: cuda.launch(0.25), repeats=8)
    assert sample.ms == pytest.approx(0.25) and sample.wall_ms == pytest.approx(0.25)


def test_a_cold_cuda_call_does_not_pay_for_the_flush() -> None:
    wall = Clock()
    cuda = FakeCuda(wall)

    class Evicting:
        def numel(self) -> int:
            return 1 << 20

        def element_size(self) -> int:
            return 4

        def zero_(self) -> None:
            cuda.launch(7)

    timer = CudaTimer(cuda, index=3, evicting=Evicting(), wall_clock_ns=wall)
    assert timer.flush_bytes == 4 << 20
    timer.flush()
    assert cuda.now_ms == 7
    assert timer.time(lambda: cuda.launch(0.5), repeats=1).ms == pytest.approx(0.5)


def test_a_gpu_works_until_its_clocks_are_up() -> None:
    wall = Clock()
    cuda = FakeCuda(wall)
    CudaTimer(cuda, index=3, wall_clock_ns=wall).settle(lambda: cuda.launch(4))
    assert cuda.now_ms >= CudaTimer.SETTLE_MS


def test_a_cpu_flush_writes_all_of_its_memory() -> None:
    timer = CpuTimer(flush_bytes=8000)
    timer.flush()
    assert timer._evicting.nbytes == 8000 and (timer._evicting == 1).all()


@pytest.mark.parametrize(
    ("caches", "expected_mib"),
    [
        ({}, 16),
        ({1: 48 << 10, 2: 2 << 20, 3: 480 << 20}, 16),  # an L3 as hypervisors report it says nothing
        ({1: 64 << 10, 2: 8 << 20}, 32),
        ({1: 64 << 10, 2: 64 << 20}, 64),
    ],
)
def test_what_is_flushed_follows_the_cores_own_caches(monkeypatch: pytest.MonkeyPatch, caches: dict[int, int], expected_mib: int) -> None:
    monkeypatch.setattr(timers, "cache_bytes", lambda: caches)
    assert timers.cpu_flush_bytes() == expected_mib << 20


@pytest.mark.gpu
def test_a_real_gpu_times_a_matrix_product() -> None:
    a = torch.randn(2048, 2048, device="cuda")
    timer = CudaTimer(torch.cuda, index=0, evicting=torch.empty(128 << 20, dtype=torch.int8, device="cuda"))
    timer.settle(lambda: a @ a)
    timer.flush()
    assert timer.time(lambda: a @ a, repeats=10).ms > 0
