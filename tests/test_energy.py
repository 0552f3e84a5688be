"""Energy counters: RAPL's files and NVML's calls as fakes, passes on a simulated device, and the way of a number to table and study."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lowsearch.arch import Arch, Stage, Stem
from lowsearch.errors import DeviceError, TableError
from lowsearch.latency import energy, worker
from lowsearch.latency.compare import compare
from lowsearch.latency.energy import (
    NvmlCounter,
    RaplCounter,
    Stopwatch,
    energy_of_pass_mj,
    open_counter,
    power_at_rest_w,
    why_not_exposed,
)
from lowsearch.latency.measure import Effort, Request, measure_energy, with_energy
from lowsearch.latency.table import LatencyTable
from lowsearch.latency.target import Device, Target, context
from lowsearch.latency.timers import CpuTimer
from lowsearch.latency.timing import NetworkLatency, Timing
from lowsearch.report.comparison import build_comparison

CPU = Device(slug="fake-cpu", kind="cpu", name="Fake")
TARGET = Target("fake-cpu", "eager")


def network(width: int) -> Arch:
    stages = (Stage(width=16), Stage(width=32), Stage(width=64), Stage(width=64))
    return Arch(resolution_px=32, stem=Stem(width=width, stride=1), stages=stages, head_widths=(64, 64), num_classes=10)


ARCHS = [network(8), network(16)]


# Counters


def write_domain(root: Path, domain: str, name: str, energy_uj: int, range_uj: int = 10**9) -> Path:
    folder = root / domain
    folder.mkdir(exist_ok=True)
    for file, value in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", range_uj)):
        (folder / file).write_text(f"{value}\n")
    return folder


def test_rapl_counts_every_package_and_nothing_twice(tmp_path: Path) -> None:
    write_domain(tmp_path, "intel-rapl:0", "package-0", 1000)
    write_domain(tmp_path, "intel-rapl:1", "package-1", 5000)
    write_domain(tmp_path, "intel-rapl:0:0", "core", 400)  # Inside package-0.
    write_domain(tmp_path, "intel-rapl:2", "psys", 9000)  # The whole machine, packages included.
    counter = open_counter("cpu", powercap=tmp_path)
    assert counter.read_mj() == 0
    for domain, name, value in (("0", "package-0", 3000), ("1", "package-1", 5500), ("0:0", "core", 900), ("2", "psys", 99_000)):
        write_domain(tmp_path, f"intel-rapl:{domain}", name, value)
    assert counter.read_mj() == pytest.approx(2.0 + 0.5)


def test_rapl_that_starts_again_from_zero_goes_on_counting(tmp_path: Path) -> None:
    write_domain(tmp_path, "intel-rapl:0", "package-0", 900, range_uj=1000)
    counter = RaplCounter([tmp_path / "intel-rapl:0"])
    total = 0.0
    for now, risen in ((950, 50), (100, 150), (100, 0), (20, 920)):
        write_domain(tmp_path, "intel-rapl:0", "package-0", now, range_uj=1000)
        total += risen / 1000
        assert counter.read_mj() == pytest.approx(total)


class FakeNvml:
    """Two GPUs by UUID, the second of which counts nothing."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool = True) -> None:
        self.driver, self.total_mj, self.lost = driver, 7_000_000, False

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"GPU-{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if handle != "GPU-0":
            raise self.NVMLError("Not Supported")
        if self.lost:
            raise self.NVMLError("GPU is lost")
        return self.total_mj


def test_nvml_counts_from_when_it_was_opened() -> None:
    nvml = FakeNvml()
    counter = open_counter("cuda", uuid="GPU-0", nvml=nvml)
    assert isinstance(counter, NvmlCounter) and counter.read_mj() == 0
    nvml.total_mj += 1234
    assert counter.read_mj() == 1234
    nvml.lost = True
    with pytest.raises(DeviceError, match="GPU is lost"):
        counter.read_mj()


def test_a_machine_without_a_counter_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no RAPL package domain" in why_not_exposed("cpu", powercap=tmp_path)
    folder = write_domain(tmp_path, "intel-rapl:0", "package-0", 1)
    assert why_not_exposed("cpu", powercap=tmp_path) == ""
    (folder / "energy_uj").write_text("none\n")
    assert "RAPL does not count" in why_not_exposed("cpu", powercap=tmp_path)

    def only_for_root(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(energy, "_whole_number", only_for_root)
    assert "energy_uj is not readable (sudo chmod" in why_not_exposed("cpu", powercap=tmp_path)
    assert why_not_exposed("cuda", nvml=FakeNvml()) == ""
    assert "Driver Not Loaded" in why_not_exposed("cuda", nvml=FakeNvml(driver=False))
    with pytest.raises(DeviceError, match="Not Supported"):
        open_counter("cuda", uuid="GPU-1", nvml=FakeNvml())
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert "lowsearch[energy]" in why_not_exposed("cuda")


# Passes


class SimulatedDevice:
    """Takes `rest_w` always and `pass_mj` more over every pass; its counter is brought up to date every `step_s`."""

    def __init__(self, *, pass_s: float, pass_mj: float, rest_w: float, step_s: float) -> None:
        self.pass_s, self.pass_mj, self.rest_w, self.step_s = pass_s, pass_mj, rest_w, step_s
        self.now_s = self.total_mj = 0.0
        self.shown_mj, self.shown_at = 0.0, 0.0
        self.n_passes = 0

    def _spend(self, seconds: float, more_mj: float = 0.0) -> None:
        self.now_s += seconds
        self.total_mj += 1000 * self.rest_w * seconds + more_mj
        if self.now_s - self.shown_at >= self.step_s:
            self.shown_mj, self.shown_at = self.total_mj, self.now_s

    def run(self) -> None:
        self.n_passes += 1
        self._spend(self.pass_s, self.pass_mj)

    def read_mj(self) -> float:
        self._spend(1e-5)
        return self.shown_mj

    @property
    def watch(self) -> Stopwatch:
        return Stopwatch(now_s=lambda: self.now_s, sleep=self._spend)


@pytest.mark.parametrize("step_s", [0.001, 0.1])
@pytest.mark.parametrize("pass_s", [2e-5, 3e-3, 0.4])
def test_energy_of_a_pass_is_what_the_device_took_meanwhile(pass_s: float, step_s: float) -> None:
    device = SimulatedDevice(pass_s=pass_s, pass_mj=40 * pass_s, rest_w=30.0, step_s=step_s)
    assert power_at_rest_w(device, watch=device.watch) == pytest.approx(30.0, rel=0.02)
    found = energy_of_pass_mj(device.run, device, watch=device.watch)
    assert found == pytest.approx(30.0 * 1000 * pass_s + 40 * pass_s, rel=0.03)
    assert device.n_passes * pass_s >= 1.0


def test_queued_passes_are_waited_for_before_the_counter_is_read() -> None:
    device = SimulatedDevice(pass_s=1e-3, pass_mj=0.0, rest_w=50.0, step_s=0.02)
    queued: list[None] = []

    def wait() -> None:
        while queued:
            queued.pop()
            device.run()

    found = energy_of_pass_mj(lambda: queued.append(None), device, wait=wait, watch=device.watch)
    assert found == pytest.approx(50.0, rel=0.03) and not queued


def test_a_counter_that_stands_still_is_no_energy_of_zero() -> None:
    device = SimulatedDevice(pass_s=1e-3, pass_mj=1.0, rest_w=0.0, step_s=1e9)
    with pytest.raises(DeviceError, match="has not moved for 2 s"):
        energy_of_pass_mj(device.run, device, watch=device.watch)


# The way of the number


class SteadyCounter:
    """A millijoule for every microsecond of its watch."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def read_mj(self) -> float:
        self.now_s += 1e-3
        return 1000 * self.now_s

    @property
    def watch(self) -> Stopwatch:
        def sleep(seconds: float) -> None:
            self.now_s += seconds

        def now_s() -> float:
            self.now_s += 1e-2
            return self.now_s

        return Stopwatch(now_s=now_s, sleep=sleep)


def test_the_worker_counts_real_networks_one_after_the_other() -> None:
    request = Request(target=TARGET, process=0, seed=0, effort=Effort(), steps=(tuple(ARCHS),), energy=True)
    assert Request.from_json(request.to_json()) == request
    counter = SteadyCounter()
    bench = worker.Bench(torch.device("cpu"), CpuTimer(flush_bytes=8))
    found = list(worker.count_energy(request, bench, counter=counter, watch=counter.watch))
    assert [timing.item for timing in found] == ARCHS
    for timing in found:
        assert Timing.from_dict(json.loads(json.dumps(timing.to_dict()))) == timing
        assert timing.energy_mj is not None and 0 < timing.energy_mj < 100
        assert timing.idle_power_w == pytest.approx(1.0, rel=0.05)


def test_a_counter_that_fails_costs_no_latency(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> float:
        raise DeviceError("the energy counter has not moved for 2 s")

    monkeypatch.setattr(worker, "power_at_rest_w", fails)
    request = Request(target=TARGET, process=0, seed=0, effort=Effort(), steps=((ARCHS[0],),), energy=True)
    bench = worker.Bench(torch.device("cpu"), CpuTimer(flush_bytes=8))
    (timing,) = worker.count_energy(request, bench, counter=SteadyCounter())
    assert timing.energy_mj is None and "has not moved" in caplog.text


def launch(request: Request) -> Iterator[Timing]:
    for item in (item for step in request.steps for item in step):
        if request.energy:
            assert request.process == 0
            counted = item != ARCHS[1]
            yield Timing(item=item, process=0, hot_ms=(), energy_mj=5.0 if counted else None, idle_power_w=2.0 if counted else None)
        else:
            yield Timing(item=item, process=request.process, hot_ms=(1.0,) * request.effort.rounds)


def test_energy_is_counted_only_where_the_machine_exposes_it() -> None:
    def never(request: Request) -> Iterator[Timing]:
        raise AssertionError("no process is needed to know that there is no counter")

    assert measure_energy(ARCHS, TARGET, CPU, launch=never, exposed=False) == {}
    assert measure_energy([], TARGET, CPU, launch=never, exposed=True) == {}
    assert measure_energy(ARCHS, TARGET, CPU, launch=never) == {}, "what stands in for workers has no counter unless it says so"
    done: list[tuple[int, int, str]] = []
    found = measure_energy(ARCHS, TARGET, CPU, launch=launch, exposed=True, progress=lambda *step: done.append(step))
    assert {item: timing.energy_mj for item, timing in found.items()} == {ARCHS[0]: 5.0}
    assert done == [(1, 2, "energy"), (2, 2, "energy")]
    rows = {arch: NetworkLatency(arch=arch, latency_ms=1.0, samples_ms=((1.0,),)) for arch in ARCHS}
    joined = with_energy(rows, found)
    assert [joined[arch].energy_mj for arch in ARCHS] == [5.0, None]
    assert joined[ARCHS[1]] == rows[ARCHS[1]]


def table(rows: list[NetworkLatency]) -> LatencyTable:
    here = context(TARGET, CPU, statistic="t", versions={}, runtime_options={})
    return LatencyTable(target=TARGET, context=here, entries={}, calibration={"s": tuple(rows)})


def test_a_table_keeps_energy_and_is_as_it_was_without(tmp_path: Path) -> None:
    without = [NetworkLatency(arch=arch, latency_ms=1.0, samples_ms=((1.0,),)) for arch in ARCHS]
    path = table(without).save(tmp_path)
    assert "energy" not in path.read_text() and LatencyTable.load(path).calibration["s"][0].energy_mj is None
    mixed = [dataclasses.replace(without[0], energy_mj=5.25, idle_power_w=2.0), without[1]]
    path = table(mixed).save(tmp_path)
    assert {row.arch: row.energy_mj for row in LatencyTable.load(path).calibration["s"]} == {ARCHS[0]: 5.25, ARCHS[1]: None}
    path.write_text(path.read_text().replace('"energy_mj": 5.25', '"energy_mj": -5.25'))
    with pytest.raises(TableError, match="energy_mj is -5.25"):
        LatencyTable.load(path)


def test_compared_networks_show_their_energy_where_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for i, arch in enumerate(ARCHS):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(arch.to_json())
    rows = compare([str(file) for file in files], TARGET, devices=[CPU], launch=launch)
    assert {row.energy_mj for row in rows} == {None}
    build_comparison(rows, "a target", tmp_path / "page.html")
    assert "energy" not in (tmp_path / "page.html").read_text().partition("<table>")[2]
    counted: Callable[..., dict[object, Timing]] = lambda *a, **k: measure_energy(*a, **{**k, "exposed": True})  # noqa: E731
    monkeypatch.setattr("lowsearch.latency.compare.measure_energy", counted)
    rows = compare([str(file) for file in files], TARGET, devices=[CPU], launch=launch)
    assert {row.name: row.energy_mj for row in rows} == {str(files[0]): 5.0, str(files[1]): None}
    build_comparison(rows, "a target", tmp_path / "page.html")
    assert "energy, mJ" in (tmp_path / "page.html").read_text()
