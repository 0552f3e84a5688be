"""Collecting measurements from worker processes: statistic, steps, order, and what happens when a process fails."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowsearch import cost
from lowsearch.arch import Arch, Block, Mlp, Stage, Stem
from lowsearch.errors import DeviceError, ParityError
from lowsearch.latency import measure
from lowsearch.latency.doubt import disputed
from lowsearch.latency.measure import (
    BYTES_PER_STEP,
    MAX_PROCESSES,
    Effort,
    Request,
    launch_worker,
    measure_networks,
    network_latencies,
    run_requests,
    steps,
)
from lowsearch.latency.target import Device, Target, resolve_target
from lowsearch.latency.timing import Timing, latency_ms, row_error, verdict

CPU = Device(slug="fake-cpu", kind="cpu", name="Fake")
GPU = Device(slug="rtx3090", kind="cuda", name="Fake")
TARGET = Target("fake-cpu", "eager")
BLOCK = Mlp(channels=8, resolution_px=4, ratio=2)


def network(width: int) -> Arch:
    stages = (Stage(width=16), Stage(width=32), Stage(width=64), Stage(width=64))
    return Arch(resolution_px=32, stem=Stem(width=width, stride=1), stages=stages, head_widths=(64, 64), num_classes=10)


def true_ms(arch: Arch) -> float:
    return cost.count(arch).macs / 1e7


def fake_launch(request: Request) -> Iterator[Timing]:
    """Exact times; the second process is 2 % slower."""
    for step in request.steps:
        for item in step:
            assert isinstance(item, Arch)
            yield Timing(item=item, process=request.process, hot_ms=(true_ms(item) * (1 + 0.02 * request.process),) * request.effort.rounds)


def test_a_few_disturbed_rounds_do_not_move_the_statistic() -> None:
    assert latency_ms([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]) == latency_ms([[1.0, 1.0, 9.0], [1.0, 7.0, 8.0]]) == 1.0


@given(st.lists(st.lists(st.floats(0.001, 100), min_size=1, max_size=5), min_size=1, max_size=4), st.floats(1, 10))
def test_the_statistic_scales_with_time_and_stays_within_it(samples: list[list[float]], factor: float) -> None:
    flat = [ms for rounds in samples for ms in rounds]
    assert min(flat) <= latency_ms(samples) <= max(flat)
    slower = [[ms * factor for ms in rounds] for rounds in samples]
    assert latency_ms(slower) == pytest.approx(factor * latency_ms(samples))


def test_a_request_survives_the_pipe() -> None:
    request = Request(target=TARGET, process=1, seed=7, effort=Effort(rounds=2), steps=((BLOCK, network(8)), (network(12),)))
    assert Request.from_json(request.to_json()) == request


def test_a_timing_survives_the_pipe() -> None:
    timing = Timing(item=BLOCK, process=1, hot_ms=(1.0,), warm_ms=(2.0,), cold_ms=(3.0,), wall_over_cpu=1.5, load_average=2.0, parity=1e-7)
    assert Timing.from_dict(timing.to_dict()) == timing


@pytest.mark.parametrize("values", [{"rounds": 0}, {"processes": -1}, {"sample_ms": 0}])
def test_an_effort_of_nothing_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Effort(**values)


def test_steps_keep_every_item_and_bound_memory() -> None:
    big = Arch(
        resolution_px=224, stem=Stem(width=32), stages=(Stage(width=64), Stage(width=128), Stage(width=256), Stage(width=512, depth=7))
    )
    bigs = [dataclasses.replace(big, num_classes=n) for n in range(900, 905)]
    items: list[Block | Arch] = [*bigs, *[Mlp(channels=c, resolution_px=4, ratio=2) for c in range(1, 61)], network(8)]
    made = steps(items, rng=np.random.default_rng(0))
    assert sorted(map(repr, (item for step in made for item in step))) == sorted(map(repr, items))
    for step in made:
        held = sum(4 * cost.count(item).params for item in step if isinstance(item, Arch))
        assert held <= BYTES_PER_STEP or len(step) == 1
        assert len({isinstance(item, Arch) for item in step}) == 1
        assert sum(not isinstance(item, Arch) for item in step) <= measure.BLOCKS_PER_STEP
    assert steps([], rng=np.random.default_rng(0)) == ()


@given(st.integers(1, 300), st.integers(0, 9))
def test_every_step_has_its_share_of_every_size(n: int, seed: int) -> None:
    """A block's neighbours decide how warm it runs: a step of small blocks only would make them fast."""
    made = steps([Mlp(channels=c, resolution_px=4, ratio=2) for c in range(1, n + 1)], rng=np.random.default_rng(seed))
    counts = [len(step) for step in made]
    assert max(counts) - min(counts) <= 1
    if min(counts) >= 10:
        sizes = [np.mean([item.channels for item in step if isinstance(item, Mlp)]) for step in made]
        assert max(sizes) < 1.2 * min(sizes)


@pytest.mark.parametrize(
    ("hot", "warm", "expected"),
    [((1.0, 1.05), (2.0, 2.1), False), ((1.0, 1.2), (2.0, 2.0), True), ((1.0, 1.0), (2.4, 2.0), True), ((1.0,), (2.0,), False)],
)
def test_processes_that_disagree_are_noticed(hot: tuple[float, ...], warm: tuple[float, ...], expected: bool) -> None:
    timings = [Timing(item=BLOCK, process=p, hot_ms=(h,), warm_ms=(w,)) for p, (h, w) in enumerate(zip(hot, warm, strict=True))]
    assert disputed(timings) == expected


def test_networks_come_back_in_their_order_and_equal_ones_are_measured_once() -> None:
    archs = [network(w) for w in (16, 8, 12, 8)]
    measured: list[Arch] = []
    done: list[tuple[int, int]] = []

    def launch(request: Request) -> Iterator[Timing]:
        for timing in fake_launch(request):
            assert isinstance(timing.item, Arch)
            measured.append(timing.item)
            yield timing

    found = measure_networks(archs, TARGET, launch=launch, devices=[CPU], progress=lambda d, n, _: done.append((d, n)))
    assert [row.arch for row in found] == archs
    assert [row.latency_ms for row in found] == pytest.approx([true_ms(arch) for arch in archs])
    assert len(measured) == 2 * 3 and done == [(i, 6) for i in range(1, 7)]
    assert all(len(row.samples_ms) == 2 and len(row.samples_ms[0]) == 3 for row in found)
    assert found[0].latency_std_ms == pytest.approx(0.01 * found[0].latency_ms, rel=0.01)


def test_no_network_is_no_work() -> None:
    assert measure_networks([], TARGET, launch=fake_launch, devices=[CPU]) == []


def test_each_process_has_its_own_order() -> None:
    archs = [network(w) for w in range(8, 48, 2)]
    orders: dict[int, list[Arch]] = {}

    def launch(request: Request) -> Iterator[Timing]:
        orders[request.process] = [item for step in request.steps for item in step if isinstance(item, Arch)]
        yield from fake_launch(request)

    measure_networks(archs, TARGET, launch=launch, devices=[CPU])
    assert orders[0] != orders[1] and set(orders[0]) == set(orders[1]) == set(archs)


@pytest.mark.parametrize(("device", "threads", "cores"), [(GPU, 1, 2), (CPU, 2, 16)])
def test_several_threads_and_a_gpu_without_cores_to_spare_are_measured_by_one_process_at_a_time(
    device: Device, threads: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure.os, "cpu_count", lambda: cores)
    running = 0
    target = dataclasses.replace(TARGET, threads=threads)

    def launch(request: Request) -> Iterator[Timing]:
        nonlocal running
        running += 1
        assert running == 1
        yield from fake_launch(request)
        running -= 1

    requests = [Request(target=target, process=p, seed=0, effort=Effort(), steps=((network(8),),)) for p in range(3)]
    assert [timing.process for timing in run_requests(requests, device, launch=launch)] == [0, 1, 2]


def test_processes_of_a_gpu_get_ready_side_by_side_where_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 16)
    together = threading.Barrier(3, timeout=10)

    def launch(request: Request) -> Iterator[Timing]:
        together.wait()
        yield from fake_launch(request)

    requests = [Request(target=TARGET, process=p, seed=0, effort=Effort(), steps=((network(8),),)) for p in range(3)]
    assert sorted(timing.process for timing in run_requests(requests, GPU, launch=launch)) == [0, 1, 2]


def test_a_failing_process_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 2)
    failed = threading.Event()
    endless = 0

    def launch(request: Request) -> Iterator[Timing]:
        nonlocal endless
        if request.process == 1:
            failed.set()
            raise ParityError("wrong")
        failed.wait(5)
        while True:
            endless += 1
            yield Timing(item=network(8), process=0, hot_ms=(1.0,))

    requests = [Request(target=TARGET, process=p, seed=0, effort=Effort(), steps=()) for p in range(2)]
    with pytest.raises(ParityError, match="wrong"):
        list(run_requests(requests, CPU, launch=launch))


def test_a_device_that_is_not_attached_is_not_measured() -> None:
    with pytest.raises(DeviceError, match="rtx3090 is not attached to this machine"):
        measure_networks([network(8)], Target("rtx3090", "eager"), devices=[CPU])


def test_a_workers_complaint_arrives_as_our_own_error() -> None:
    """A real process, asked for a device that is not there."""
    request = Request(target=Target("rtx9999", "eager"), process=0, seed=0, effort=Effort(), steps=((BLOCK,),))
    with pytest.raises(DeviceError, match="rtx9999 is not attached") as raised:
        list(launch_worker(request))
    assert "lowsearch profile --device rtx9999" in str(raised.value.hint)


def test_a_worker_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_WORKER", ("-c", "import sys; print('out of memory', file=sys.stderr); sys.exit(9)"))
    request = Request(target=TARGET, process=0, seed=0, effort=Effort(), steps=())
    with pytest.raises(DeviceError, match="ended with code 9: out of memory"):
        list(launch_worker(request))


def test_a_worker_has_the_threads_of_its_target_and_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys; print(*(os.environ[n] for n in ('OMP_NUM_THREADS', 'NVIDIA_TF32_OVERRIDE')), file=sys.stderr); sys.exit(9)"
    monkeypatch.setattr(measure, "_WORKER", ("-c", code))
    target = dataclasses.replace(TARGET, threads=3)
    with pytest.raises(DeviceError, match="code 9: 3 0"):
        list(launch_worker(Request(target=target, process=0, seed=0, effort=Effort(), steps=())))


def test_a_reader_that_leaves_takes_the_worker_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(Timing(item=BLOCK, process=0, hot_ms=(1.0,)).to_dict())
    monkeypatch.setattr(measure, "_WORKER", ("-c", f"import time; print('''{line}''', flush=True); time.sleep(600)"))
    timings = launch_worker(Request(target=TARGET, process=0, seed=0, effort=Effort(), steps=()))
    assert next(timings).item == BLOCK
    timings.close()  # kills the process instead of waiting for it


def test_a_process_is_followed_by_another_before_what_it_compiled_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchScript grew by 100 MB a network, until 200 of them filled 24 GB."""
    monkeypatch.setattr(measure, "BYTES_PER_STEP", 1 << 20)
    all_steps = steps([network(8 * (1 + i)) for i in range(40)], rng=np.random.default_rng(0))
    limit = 5 << 20
    monkeypatch.setattr(measure, "BYTES_PER_PROCESS", limit)
    launched: list[Request] = []

    def launch(request: Request) -> Iterator[Timing]:
        launched.append(request)
        return iter(())

    monkeypatch.setattr(measure, "_launch_one", launch)
    assert list(launch_worker(Request(target=TARGET, process=3, seed=4, effort=Effort(), steps=all_steps))) == []
    assert tuple(step for request in launched for step in request.steps) == all_steps
    assert {(request.process, request.seed) for request in launched} == {(3, 4)}
    held = [sum(measure.size_bytes(item) for step in request.steps for item in step) for request in launched]
    assert len(held) > 1 and all(size <= limit or len(request.steps) == 1 for size, request in zip(held, launched, strict=True))
    assert all(a + sum(map(measure.size_bytes, b.steps[0])) > limit for a, b in zip(held, launched[1:], strict=False))


def test_a_worker_ends_when_whoever_started_it_is_gone() -> None:
    """In the middle of a step that would take hours."""
    request = Request(target=resolve_target("cpu", "eager"), process=0, seed=0, effort=Effort(rounds=10**7), steps=((BLOCK,),))
    command = [sys.executable, "-m", "lowsearch.latency.worker"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert worker.stdin
    worker.stdin.write(request.to_json() + "\n")
    worker.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(timeout=5)
    worker.stdin.close()
    assert worker.wait(timeout=60) == 1


def test_a_networks_error_comes_from_its_processes() -> None:
    timings = [Timing(item=network(8), process=p, hot_ms=(ms,) * 3, wall_over_cpu=1 + p) for p, ms in ((1, 1.1), (0, 1.0))]
    row = network_latencies({network(8): timings})[network(8)]
    assert row.samples_ms == ((1.0,) * 3, (1.1,) * 3) and row.wall_over_cpu == 2
    assert row.latency_std_ms == pytest.approx(np.std([1.0, 1.1], ddof=1) / np.sqrt(2))
    assert network_latencies({network(8): timings[:1]})[network(8)].latency_std_ms == 0


def test_what_differs_between_processes_is_timed_in_more_of_them_and_nothing_else() -> None:
    archs = [network(width) for width in (8, 16, 24, 32, 40, 48)]
    loose, hopeless = archs[1], archs[4]
    asked: dict[Arch, list[int]] = {arch: [] for arch in archs}

    def launch(request: Request) -> Iterator[Timing]:
        for step in request.steps:
            for item in step:
                assert isinstance(item, Arch)
                asked[item].append(request.process)
                factor = {loose: (1.0, 1.1, 1.05, 1.05, 1.05), hopeless: (1.0, 2.0, 3.0, 1.0, 2.0)}.get(item, (1.0,) * 5)[request.process]
                yield Timing(item=item, process=request.process, hot_ms=(true_ms(item) * factor,) * 3, step="0")

    rows = dict(zip(archs, measure_networks(archs, TARGET, devices=[CPU], launch=launch), strict=True))
    assert asked[loose][:3] == [0, 1, 2]
    assert asked[hopeless] == [0, 1, 2, 3, 4], "the last process that there may be"
    assert all(asked[arch] == [0, 1] for arch in archs if arch not in (loose, hopeless))
    assert len(rows[hopeless].samples_ms) == MAX_PROCESSES
    assert verdict(rows[hopeless].latency_std_ms / rows[hopeless].latency_ms)[0] == "invalid"
    asked |= {arch: [] for arch in archs}
    measure_networks(archs, TARGET, max_processes=2, devices=[CPU], launch=launch)
    assert all(numbers == [0, 1] for numbers in asked.values()), "in no more than the caller has time for"


@pytest.mark.parametrize(
    ("processes", "paces", "expected"),
    [
        ([], [], 0.0),
        ([2.0], [], 0.0),
        ([1.0, 1.1], [], 0.05),
        ([1.0, 1.1], [1.0, 1.1], 0.0),
        ([1.0, 9.0, 1.1], [], 0.05),
        ([1.0, 1.1, 1.1], [1.0, 1.0, 0.5], 0.05),
        ([1.0, 2.0, 3.0], [], 0.5),
    ],
)
def test_the_error_of_a_row_is_that_of_the_processes_that_its_latency_hears(
    processes: list[float], paces: list[float], expected: float
) -> None:
    assert row_error([(ms,) * 3 for ms in processes], paces) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("relative_std", "wall_over_cpu", "expected", "says"),
    [
        (0.0, 1.0, "valid", ""),
        (0.02, 3.0, "valid", ""),
        (0.05, 1.0, "noisy", "its clock"),
        (0.05, 2.0, "noisy", "end it"),
        (0.2, 1.0, "invalid", "again"),
    ],
)
def test_no_latency_is_without_a_verdict(relative_std: float, wall_over_cpu: float, expected: str, says: str) -> None:
    found, advice = verdict(relative_std, wall_over_cpu)
    assert found == expected and says in advice
