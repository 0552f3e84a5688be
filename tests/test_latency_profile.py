"""Profiling: what is chosen, how it resumes, and whole profiles: on this CPU, and on a fake CUDA device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowsearch import cli, cost, locations
from lowsearch.arch import Arch, Block
from lowsearch.cli.latency import print_profile
from lowsearch.errors import DeviceError, ParityError, TableError
from lowsearch.latency.measure import Effort, Request
from lowsearch.latency.memory import READ_BYTES, MemoryRead
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.profile import N_NETWORKS as N_FULL_NETWORKS
from lowsearch.latency.profile import (
    NETWORK_EFFORT,
    QUICK_BLOCKS,
    SIBLING_BLOCKS,
    choose_blocks,
    choose_networks,
    current_context,
    find_sibling,
    profile,
    staleness,
    usable_table,
)
from lowsearch.latency.runtimes import runtime
from lowsearch.latency.table import LatencyTable, find_table
from lowsearch.latency.target import Device, Target, attached_devices
from lowsearch.latency.timers import CudaTimer
from lowsearch.latency.timing import STATES, Item, Timing
from lowsearch.latency.worker import Bench, serve
from lowsearch.space import SearchSpace

TINY = Path(__file__).with_name("tiny_blocks.yaml").read_text()
SPACE = SearchSpace.from_yaml(TINY)
OTHER = SearchSpace.from_yaml(
    TINY.replace("name: tiny", "name: other").replace("head_widths: [[32, 32]]", "head_widths: [[32, 32], [64, 64]]")
)
MICRO = SearchSpace.load("lowformer-micro")
CPU = Device(slug="fake-cpu", kind="cpu", name="Fake processor", detail="2 CPUs")
TARGET = Target("fake-cpu", "onnxruntime")
N_NETWORKS = 4
N_TIMINGS = 2 * (len(READ_BYTES) + len(SPACE.blocks)) + NETWORK_EFFORT.processes * N_NETWORKS
"""Of a whole profile of SPACE."""


def block_ms(block: Block) -> float:
    counted = cost.of_block(block)
    return 1e-7 * counted.macs + 1e-6 * counted.activations + 0.003


def exact(item: Item, process: int) -> Timing:
    """What a noiseless device without caches tells."""
    if isinstance(item, MemoryRead):
        return Timing(item=item, process=process, hot_ms=(1e-7 * item.n_bytes,) * 2)
    if isinstance(item, Arch):
        return Timing(item=item, process=process, hot_ms=(sum(map(block_ms, item.blocks())),) * 2)
    ms = round(block_ms(item), 5)
    return Timing(item=item, process=process, hot_ms=(ms,) * 2, warm_ms=(2 * ms,) * 2, cold_ms=(3 * ms,) * 2)


def launch(request: Request) -> Iterator[Timing]:
    for step in request.steps:
        for item in step:
            yield exact(item, request.process)


def quick(folder: Path, launch=launch, space: SearchSpace = SPACE, **options: Any) -> LatencyTable:
    return profile(space, TARGET, folder=folder, devices=[CPU], launch=launch, **{"n_calibration": N_NETWORKS, **options})


# What is chosen ----------------------------------------------------------------------------------------------------------


def test_a_small_space_is_measured_whole() -> None:
    assert set(choose_blocks(SPACE, 100, seed=0)) == set(SPACE.blocks)


@pytest.mark.parametrize("budget", [120, 300, 600])
def test_all_stems_and_heads_are_measured_and_every_kind_is_represented(budget: int) -> None:
    chosen = choose_blocks(MICRO, budget, seed=0)
    assert len(chosen) == len(set(chosen)) == budget and set(chosen) <= set(MICRO.blocks)
    for kind in ("stem", "head"):
        assert {b for b in chosen if b.kind == kind} == {b for b in MICRO.blocks if b.kind == kind}
    assert all(sum(b.kind == kind for b in chosen) >= 5 for kind in ("conv", "downsampler", "attention", "mlp"))


def test_a_larger_budget_keeps_what_a_smaller_one_measured() -> None:
    few, more = (choose_blocks(MICRO, n, seed=3) for n in (150, 400))
    missing = set(few) - set(more)
    assert not missing


def test_chosen_blocks_reach_the_edges_of_the_space() -> None:
    """Predicting is interpolating: the fastest and slowest of every field are among the measured."""
    chosen = choose_blocks(MICRO, 300, seed=0)
    for kind in ("conv", "downsampler", "attention", "mlp"):
        every = [b for b in MICRO.blocks if b.kind == kind]
        measured = [b for b in chosen if b.kind == kind]
        for field in dataclasses.fields(every[0]):
            assert {getattr(b, field.name) for b in measured} >= {f([getattr(b, field.name) for b in every]) for f in (min, max)}


def test_calibration_networks_reach_the_fast_end_of_what_was_measured(tmp_path: Path) -> None:
    """Not of the MACs: where a call costs more than its arithmetic, the fastest network is the one with fewest blocks."""

    def all_alike(request: Request) -> Iterator[Timing]:
        for step in request.steps:
            for item in step:
                ms = float(len(item.blocks())) if isinstance(item, Arch) else 1.0
                yield Timing(item=item, process=request.process, hot_ms=(ms,) * 2, warm_ms=(ms,) * 2, cold_ms=(ms,) * 2)

    table = quick(tmp_path, launch=all_alike, space=MICRO, n_calibration=20, effort=dataclasses.replace(QUICK, processes=1))
    sizes = [len(row.arch.blocks()) for row in table.calibration[MICRO.name]]
    sample = [len(MICRO.decode(g).blocks()) for g in MICRO.sample(400, rng=np.random.default_rng(9))]
    assert min(sizes) <= min(sample) and sum(n < np.quantile(sample, 0.1) for n in sizes) >= 3
    assert choose_networks(MICRO, 20, seed=0, table=table) != choose_networks(MICRO, 20, seed=0)


def test_calibration_networks_cover_the_sizes() -> None:
    archs = choose_networks(MICRO, 20, seed=0)
    assert len(set(archs)) == 20 and all(map(MICRO.contains, archs))
    macs = np.array([cost.count(arch).macs for arch in archs])
    sample = np.array([cost.count(MICRO.decode(g)).macs for g in MICRO.sample(400, rng=np.random.default_rng(9))])
    assert (np.histogram(macs, np.quantile(sample, [0, 0.25, 0.5, 0.75, 1]))[0] >= 2).all(), "every size of random networks"
    assert (macs < sample.min()).sum() >= 2, "and the fast end, where a search goes and no random network lies"
    assert choose_networks(MICRO, 20, seed=0) == archs != choose_networks(MICRO, 20, seed=1)


# One profile -------------------------------------------------------------------------------------------------------------


def test_a_profile_leaves_a_table_and_nothing_else(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    table = quick(tmp_path, progress=lambda d, n, _: done.append((d, n)))
    assert set(table.entries) == set(SPACE.blocks) and len(table.calibration["tiny"]) == 4
    loaded = LatencyTable.load(tmp_path / TARGET.table_path)
    assert loaded.entries == table.entries and loaded.context == table.context
    assert [p.name for p in (tmp_path / "fake-cpu").iterdir() if not p.name.startswith(".")] == [TARGET.table_path.name]
    assert done == [(i, N_TIMINGS) for i in range(N_TIMINGS + 1)]
    assert loaded.memory == table.memory and [read.n_bytes for read in table.memory] == sorted(READ_BYTES)
    block = SPACE.blocks[0]
    assert table.lookup(block).warm_ms == pytest.approx(2 * block_ms(block), abs=1e-5)


def test_a_runtime_that_is_slow_to_prepare_has_fewer_blocks_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(runtime("onnxruntime")), "max_blocks", 120)
    assert len(quick(tmp_path, space=MICRO).entries) == 120
    assert len(quick(tmp_path / "more", space=MICRO, max_blocks=130).entries) == 130


def test_a_second_profile_measures_nothing_again(tmp_path: Path) -> None:
    first = quick(tmp_path)

    def refuse(request: Request) -> Iterator[Timing]:
        raise AssertionError(f"measured again: {request.steps}")

    assert quick(tmp_path, launch=refuse).entries == first.entries


def test_a_second_space_adds_its_rows(tmp_path: Path) -> None:
    quick(tmp_path)
    measured: list[Item] = []

    def counting(request: Request) -> Iterator[Timing]:
        for timing in launch(request):
            measured.append(timing.item)
            yield timing

    table = quick(tmp_path, launch=counting, space=OTHER)
    assert set(table.entries) == set(SPACE.blocks) | set(OTHER.blocks)
    assert set(table.calibration) == {"tiny", "other"}
    assert {m for m in measured if not isinstance(m, Arch)} == set(OTHER.blocks) - set(SPACE.blocks), "memory is as it was"
    assert LatencyPredictor(SPACE, table).explain(SPACE.decode(SPACE.sample(1, rng=np.random.default_rng(0))[0]))


def test_a_table_of_other_versions_is_replaced_not_mixed(tmp_path: Path) -> None:
    old = quick(tmp_path)
    foreign = dataclasses.replace(old, context=dataclasses.replace(old.context, versions={"lowsearch": "1", "onnxruntime": "0.1"}))
    foreign.save(tmp_path)
    measured: set[Item] = set()

    def counting(request: Request) -> Iterator[Timing]:
        for timing in launch(request):
            measured.add(timing.item)
            yield timing

    assert quick(tmp_path, launch=counting).context.versions["onnxruntime"] != "0.1"
    assert measured >= set(SPACE.blocks)


def test_a_damaged_table_is_replaced(tmp_path: Path) -> None:
    table = quick(tmp_path)
    (tmp_path / TARGET.table_path).write_text("{")
    assert quick(tmp_path).entries == table.entries


def test_a_quick_table_predicts_and_a_full_profile_extends_it(tmp_path: Path) -> None:
    table = quick(tmp_path, space=MICRO, quick=True, n_calibration=None)
    assert (len(table.entries), len(table.calibration[MICRO.name])) == (QUICK_BLOCKS, N_FULL_NETWORKS)
    genomes = MICRO.sample(50, rng=np.random.default_rng(1))
    true_ms = np.array([sum(map(block_ms, MICRO.decode(genome).blocks())) for genome in genomes])
    assert np.median(np.abs(LatencyPredictor(MICRO, table).predict(genomes)[0] / true_ms - 1)) < 0.05
    measured: list[Item] = []

    def counting(request: Request) -> Iterator[Timing]:
        for timing in launch(request):
            measured.append(timing.item)
            yield timing

    assert quick(tmp_path, space=MICRO, quick=True, n_calibration=None, launch=counting).entries == table.entries and not measured
    full = quick(tmp_path, space=MICRO, n_calibration=None, launch=counting)
    assert set(full.entries) == set(MICRO.blocks) and full.entries.items() >= table.entries.items()
    assert set(full.calibration[MICRO.name]) == set(table.calibration[MICRO.name]) and full.context.measured_again == 0
    assert not set(measured) & {*table.entries, *(row.arch for row in table.calibration[MICRO.name])}, "nothing was measured twice"


# Leaning on another batch ------------------------------------------------------------------------------------------------

EIGHT = dataclasses.replace(TARGET, batch=8)


def at_batch_8(request: Request) -> Iterator[Timing]:
    """A device on which large blocks gain most from a batch."""

    def ms(block: Block) -> float:
        return round(8 * block_ms(block) ** 1.1, 5)

    for step in request.steps:
        for item in step:
            if isinstance(item, Block):
                yield Timing(item=item, process=request.process, **{f"{s}_ms": ((i + 1) * ms(item),) * 2 for i, s in enumerate(STATES)})
            elif isinstance(item, Arch):
                yield Timing(item=item, process=request.process, hot_ms=(sum(map(ms, item.blocks())),) * 2)
            else:
                yield exact(item, request.process)


def eight(folder: Path, launch=at_batch_8, **options: Any) -> LatencyTable:
    return profile(MICRO, EIGHT, folder=folder, devices=[CPU], launch=launch, **{"n_calibration": N_NETWORKS, **options})


@pytest.fixture(scope="module")
def batch_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole table of MICRO at batch 1."""
    folder = tmp_path_factory.mktemp("batch_1")
    quick(folder, space=MICRO)
    return folder


@pytest.fixture
def known(batch_1: Path, tmp_path: Path) -> Path:
    shutil.copytree(batch_1, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def leaning(batch_1: Path) -> LatencyTable:
    """What a profile of batch 8 makes beside it."""
    folder = shutil.copytree(batch_1, batch_1.with_name("batch_8"))
    return eight(folder)


def test_a_second_batch_is_measured_in_part_and_leans_on_the_first(known: Path, leaning: LatencyTable) -> None:
    table = leaning
    table.save(known)
    assert len(table.entries) == SIBLING_BLOCKS and table.sibling is not None and table.sibling.batch == 1
    assert table.sibling.sha256 == hashlib.sha256((known / TARGET.table_path).read_bytes()).hexdigest()
    loaded = LatencyTable.load(known / EIGHT.table_path)
    assert set(table.sibling.entries) == set(MICRO.blocks) and (loaded.entries, loaded.sibling) == (table.entries, table.sibling)
    predictor = LatencyPredictor(MICRO, table)
    genomes = MICRO.sample(50, rng=np.random.default_rng(1))
    true_ms = np.array([sum(8 * block_ms(block) ** 1.1 for block in MICRO.decode(genome).blocks()) for genome in genomes])
    assert np.max(np.abs(predictor.predict(genomes)[0] / true_ms - 1)) < 0.02
    shares = predictor.explain(MICRO.decode(genomes[0]))
    assert {share.source for share in shares} == {"measured", "predicted"}

    again = eight(known, launch=lambda request: pytest.fail(f"measured again: {request.steps}"))
    assert (again.entries, again.sibling) == (table.entries, table.sibling)


def test_alone_every_block_is_measured_and_nothing_leaned_on(known: Path, leaning: LatencyTable) -> None:
    leaning.save(known)
    table = eight(known, alone=True)
    assert set(table.entries) == set(MICRO.blocks) and table.sibling is None and table.entries.items() >= leaning.entries.items()
    assert eight(known, launch=lambda request: pytest.fail("measured again")).sibling is None, "nothing is left to lean"


def test_a_table_that_was_begun_by_itself_goes_on_so(known: Path) -> None:
    first = eight(known, alone=True, quick=True, n_calibration=0)
    assert len(first.entries) == QUICK_BLOCKS
    assert set(eight(known, n_calibration=0).entries) == set(MICRO.blocks)


def test_a_killed_profile_that_leans_goes_on(known: Path, leaning: LatencyTable, one_by_one: None) -> None:
    del one_by_one
    served = 0

    def dying(request: Request) -> Iterator[Timing]:
        nonlocal served
        for timing in at_batch_8(request):
            served += 1
            if served > 150:
                raise Killed
            yield timing

    with pytest.raises(Killed):
        eight(known, launch=dying)
    table = eight(known)
    assert (table.entries, table.sibling) == (leaning.entries, leaning.sibling)
    assert set(table.calibration[MICRO.name]) == set(leaning.calibration[MICRO.name])


def small(path: Path) -> LatencyTable:
    """The table in `path`, cut down to a few blocks more than a sibling needs, there as well."""
    table = LatencyTable.load(path)
    table = dataclasses.replace(table, entries={block: table.entries[block] for block in MICRO.blocks[: SIBLING_BLOCKS + 9]})
    table.save(path.parents[1])
    return table


@pytest.mark.parametrize("why", ["nothing", "versions", "runtime", "threads", "few", "damaged", "shipped"])
def test_only_a_table_of_the_same_machine_and_all_but_the_batch_is_leaned_on(known: Path, why: str) -> None:
    path = known / TARGET.table_path
    table = small(path)
    if why == "versions":
        dataclasses.replace(table, context=dataclasses.replace(table.context, versions={"onnxruntime": "0.1"})).save(known)
    elif why == "few":
        dataclasses.replace(table, entries={b: table.entries[b] for b in MICRO.blocks[: SIBLING_BLOCKS - 1]}).save(known)
    elif why == "damaged":
        path.write_text("{")
    elif why == "shipped":
        (known / "shipped" / path.parent.name).mkdir(parents=True)
        path.rename(known / "shipped" / path.parent.name / path.name)
    elif why in ("runtime", "threads"):
        path.unlink()
        other = dataclasses.replace(TARGET, **{"runtime": {"runtime": "eager"}, "threads": {"threads": 2}}[why])
        dataclasses.replace(table, target=other).save(known)
    found = find_sibling(MICRO, EIGHT, current_context(EIGHT, CPU), known)
    assert (found is not None) == (why == "nothing")


def test_of_several_batches_the_one_that_knows_most_is_leaned_on_then_the_nearest(known: Path) -> None:
    table = small(known / TARGET.table_path)
    here = current_context(EIGHT, CPU)
    for batch in (4, 64):
        dataclasses.replace(table, target=dataclasses.replace(TARGET, batch=batch)).save(known)
    nearest = find_sibling(MICRO, EIGHT, here, known)
    assert nearest is not None and nearest.batch == 4
    fewer = {block: table.entries[block] for block in MICRO.blocks[:SIBLING_BLOCKS]}
    dataclasses.replace(table, target=dataclasses.replace(TARGET, batch=4), entries=fewer).save(known)
    most = find_sibling(MICRO, EIGHT, here, known)
    assert most is not None and most.batch == 1


def test_profile_says_on_what_a_table_leans(
    known: Path, leaning: LatencyTable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leaning.save(known)
    monkeypatch.setattr("lowsearch.latency.profile.profile", lambda *_, **__: leaning)
    assert cli.invoke(["profile", "--batch", "8"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{len(MICRO.blocks) - SIBLING_BLOCKS:,} of {len(MICRO.blocks):,} blocks are predicted from what they take at batch 1" in said
    assert "--batch 8 --space lowformer-micro --alone" in said
    assert cli.invoke(["table", "show", str(known / EIGHT.table_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert leaning.sibling is not None and shown["leans_on"] == leaning.sibling.summary()


# Killed and resumed ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def killed_after(n: int, seen: list[Timing]) -> Callable[[Request], Iterator[Timing]]:
    def launch(request: Request) -> Iterator[Timing]:
        for step in request.steps:
            for item in step:
                if len(seen) >= n:
                    raise Killed
                timing = exact(item, request.process)
                yield timing
                seen.append(timing)  # reached only once the profile asks for the next: this one is on disk

    return launch


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowsearch.latency.measure.os.cpu_count", lambda: 1)


@pytest.mark.usefixtures("one_by_one")
def test_killed_after_any_measurement_it_resumes_without_measuring_twice(tmp_path: Path) -> None:
    calm = quick(tmp_path / "calm")
    for n in range(0, N_TIMINGS, 5):
        folder = tmp_path / str(n)
        before: list[Timing] = []
        with pytest.raises(Killed):
            quick(folder, launch=killed_after(n, before))
        assert not (folder / TARGET.table_path).exists()
        after: list[Timing] = []
        table = quick(folder, launch=killed_after(10**9, after))
        assert len(before) + len(after) == N_TIMINGS
        assert (table.entries, table.memory) == (calm.entries, calm.memory)
        assert {r.arch: r.samples_ms for r in table.calibration["tiny"]} == {r.arch: r.samples_ms for r in calm.calibration["tiny"]}


@pytest.mark.usefixtures("one_by_one")
def test_where_two_processes_disagree_a_third_decides(tmp_path: Path) -> None:
    """Also when the profile was killed in between."""
    loud = set(SPACE.blocks[::8])

    def disagreeing(n: int, seen: list[Timing]) -> Callable[[Request], Iterator[Timing]]:
        def launch(request: Request) -> Iterator[Timing]:
            for timing in killed_after(n, seen)(request):
                factor = 2.0 if timing.process == 1 and timing.item in loud else 1.0
                yield dataclasses.replace(timing, warm_ms=tuple(factor * ms for ms in timing.warm_ms))

        return launch

    total = N_TIMINGS + len(loud)
    for n in (total - 3, N_TIMINGS - 4 * N_NETWORKS + 2, 50):
        folder = tmp_path / str(n)
        before: list[Timing] = []
        after: list[Timing] = []
        with pytest.raises(Killed):
            quick(folder, launch=disagreeing(n, before))
        table = quick(folder, launch=disagreeing(10**9, after))
        assert len(before) + len(after) == total
        for block, row in table.entries.items():
            assert len(row.warm_samples_ms) == (3 if block in loud else 2)
            assert row.warm_ms == pytest.approx(2 * block_ms(block), rel=0.02)


@pytest.mark.usefixtures("one_by_one")
def test_what_a_third_process_does_not_settle_a_fourth_measures_and_no_more(tmp_path: Path) -> None:
    """Wherever the profile was killed, it measures the same again, and leaves the same table."""
    settled, hopeless = SPACE.blocks[3], SPACE.blocks[9]
    factors = {settled: (1.0, 1.5, 1.0), hopeless: (1.0, 1.5, 2.2, 3.0)}

    def differing(n: int, seen: list[Timing]) -> Callable[[Request], Iterator[Timing]]:
        def launch(request: Request) -> Iterator[Timing]:
            for timing in killed_after(n, seen)(request):
                by_process = factors.get(timing.item, (1.0,) * 5)  # type: ignore[arg-type]
                yield dataclasses.replace(timing, hot_ms=tuple(by_process[timing.process] * ms for ms in timing.hot_ms))

        return launch

    calm = quick(tmp_path / "calm", launch=differing(10**9, []))
    total = N_TIMINGS + 3
    for n in (N_TIMINGS - 4 * N_NETWORKS - 1, *range(N_TIMINGS - 4 * N_NETWORKS, total, 2)):
        before: list[Timing] = []
        after: list[Timing] = []
        done: list[tuple[int, int]] = []
        with pytest.raises(Killed):
            quick(tmp_path / str(n), launch=differing(n, before))
        table = quick(tmp_path / str(n), launch=differing(10**9, after), progress=lambda d, n, _, done=done: done.append((d, n)))
        assert len(before) + len(after) == total == done[-1][0] == done[-1][1]
        assert table.entries == calm.entries and table.context.measured_again == calm.context.measured_again
    assert {b: len(row.hot_samples_ms) for b, row in calm.entries.items() if len(row.hot_samples_ms) != 2} == {settled: 3, hopeless: 4}
    assert calm.context.measured_again == 2
    assert calm.entries[settled].verdict[0] == "valid" and calm.entries[hopeless].verdict[0] == "invalid"


def test_a_profile_ends_with_what_its_rows_are_worth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def disputing(request: Request) -> Iterator[Timing]:
        for timing in launch(request):
            loud = timing.item == SPACE.blocks[2] and timing.process == 1
            yield dataclasses.replace(timing, hot_ms=tuple((1.12 if loud else 1.0) * ms for ms in timing.hot_ms))

    n_rows = len(SPACE.blocks) + N_NETWORKS
    print_profile(SPACE, quick(tmp_path, launch=disputing), False)
    assert capsys.readouterr().err == f"{n_rows} of {n_rows} rows are valid, 0 noisy, 0 invalid; 1 was measured again\n"
    assert quick(tmp_path / "coarse", launch=disputing, quick=True).context.measured_again == 0, "a quick one leaves it at that"


@pytest.mark.usefixtures("one_by_one")
def test_on_a_machine_that_never_comes_to_rest_no_more_than_a_quarter_is_measured_again(tmp_path: Path) -> None:
    seen: list[Timing] = []

    def restless(request: Request) -> Iterator[Timing]:
        for timing in killed_after(10**9, seen)(request):
            slower = (1.0, 1.6, 2.6, 4.2, 6.7, 10.7)[timing.process]
            yield dataclasses.replace(timing, hot_ms=tuple(slower * ms for ms in timing.hot_ms))

    quick(tmp_path, launch=restless)
    assert N_TIMINGS < len(seen) <= 1.25 * N_TIMINGS + 2


@pytest.mark.usefixtures("one_by_one")
def test_a_quick_profile_keeps_what_an_interrupted_full_one_had_finished(tmp_path: Path) -> None:
    n_reads, n_blocks = 2 * len(READ_BYTES), len(MICRO.blocks)
    with pytest.raises(Killed):
        quick(tmp_path, space=MICRO, launch=killed_after(n_reads + n_blocks + 700, []))
    seen: list[Timing] = []
    table = quick(tmp_path, space=MICRO, quick=True, launch=killed_after(10**9, seen))
    assert len(table.entries) > QUICK_BLOCKS and set(choose_blocks(MICRO, QUICK_BLOCKS, seed=0)) <= set(table.entries)
    assert sum(isinstance(timing.item, Block) for timing in seen) == len(table.entries) - 700


@pytest.mark.usefixtures("one_by_one")
def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        quick(tmp_path, launch=killed_after(3, []))
    partial = tmp_path / "fake-cpu" / "onnxruntime-fp32-b1-t1.partial.jsonl"
    whole = partial.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 4  # the header and three timings
    for cut in range(len(whole) - len(lines[-1]), len(whole), 7):
        partial.write_bytes(whole[:cut])
        after: list[Timing] = []
        with pytest.raises(Killed):
            quick(tmp_path, launch=killed_after(1, after))
        assert partial.read_bytes().startswith(b"".join(lines[:3]))
        assert len(partial.read_text().splitlines()) == 4
        for line in partial.read_text().splitlines():
            json.loads(line)


@pytest.mark.usefixtures("one_by_one")
def test_a_torn_header_starts_anew(tmp_path: Path) -> None:
    partial = tmp_path / "fake-cpu" / "onnxruntime-fp32-b1-t1.partial.jsonl"
    partial.parent.mkdir(parents=True)
    partial.write_text('{"schema": "lowsea')
    assert set(quick(tmp_path).entries) == set(SPACE.blocks)


@pytest.mark.usefixtures("one_by_one")
def test_damage_in_the_middle_of_a_partial_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        quick(tmp_path, launch=killed_after(3, []))
    partial = tmp_path / "fake-cpu" / "onnxruntime-fp32-b1-t1.partial.jsonl"
    lines = partial.read_text().splitlines(keepends=True)
    for line in ("{\n", '{"block": {"kind": "magic"}, "process": 0, "hot_ms": []}\n', "[]\n", '{"process": 0}\n'):
        partial.write_text("".join([lines[0], line, *lines[2:]]))
        with pytest.raises(TableError, match=r"partial\.jsonl:2: damaged line.*remove the file"):
            quick(tmp_path)


@pytest.mark.usefixtures("one_by_one")
def test_a_partial_file_of_other_versions_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lowsearch.latency.runtimes.OnnxRuntime.versions", lambda self: {"onnxruntime": "0.1"})
        with pytest.raises(Killed):
            quick(tmp_path, launch=killed_after(10, []))
    after: list[Timing] = []
    quick(tmp_path, launch=killed_after(10**9, after))
    assert len(after) == N_TIMINGS


def test_two_profiles_of_one_target_do_not_mix(tmp_path: Path) -> None:
    def nested(request: Request) -> Iterator[Timing]:
        with pytest.raises(TableError, match="another process is measuring"):
            quick(tmp_path)
        yield from launch(request)

    quick(tmp_path, launch=nested)


def test_a_wrong_runtime_leaves_no_table(tmp_path: Path) -> None:
    def wrong(request: Request) -> Iterator[Timing]:
        raise ParityError("differs")
        yield

    with pytest.raises(ParityError):
        quick(tmp_path, launch=wrong)
    assert not (tmp_path / TARGET.table_path).exists()


def test_an_absent_device_cannot_be_profiled(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"rtx3090 is not attached .*fake-cpu.*lowsearch profile --device rtx3090 --runtime eager"):
        profile(SPACE, Target("rtx3090", "eager"), folder=tmp_path, devices=[CPU])


# Which table a search may use --------------------------------------------------------------------------------------------


def test_a_search_uses_the_table_of_this_machine_only_if_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "latency_tables"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWSEARCH_HOME", str(tmp_path / "home"))
    assert usable_table(SPACE, TARGET, devices=[CPU]) is None  # not measured yet
    table = quick(folder)
    found = usable_table(SPACE, TARGET, devices=[CPU])
    assert found is not None and found.entries == table.entries
    assert usable_table(OTHER, TARGET, devices=[CPU]) is None  # measured, but for another space
    newer = dataclasses.replace(CPU, detail="4 CPUs")
    with pytest.raises(TableError, match=r"device_detail: 2 CPUs then, 4 CPUs now.*lowsearch profile --device fake-cpu"):
        usable_table(SPACE, TARGET, devices=[newer])
    stale = usable_table(SPACE, TARGET, allow_stale=True, devices=[newer])
    assert stale is not None and stale.entries == table.entries
    assert staleness(stale, devices=[newer]) == ["device_detail: 2 CPUs then, 4 CPUs now"]
    assert staleness(stale, devices=[CPU]) == []
    assert usable_table(OTHER, TARGET, allow_stale=True, devices=[newer]) is None  # Nothing of this space to use.


def test_a_search_for_an_absent_device_uses_its_table_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick(tmp_path / "latency_tables")
    here = Device(slug="my-laptop", kind="cpu", name="My laptop")
    found = usable_table(SPACE, TARGET, devices=[here])
    assert found is not None and found.target == TARGET
    with pytest.raises(TableError, match=r"no networks of space 'other'.*--space other"):
        usable_table(OTHER, TARGET, devices=[here])
    with pytest.raises(TableError, match=r"no latency table for rtx3090 .*fake-cpu onnxruntime"):
        usable_table(SPACE, Target("rtx3090", "eager"), devices=[here])


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose shipped table has the name, the machine and the versions of this one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWSEARCH_HOME", str(tmp_path / "home"))
    quick(tmp_path / "elsewhere")
    place = tmp_path / "latency_tables" / "shipped" / TARGET.table_path
    place.parent.mkdir(parents=True)
    return (tmp_path / "elsewhere" / TARGET.table_path).rename(place)


def test_a_shipped_table_never_stands_in_for_measuring_the_device_we_stand_on(shipped: Path) -> None:
    before = shipped.read_bytes()
    assert usable_table(SPACE, TARGET, devices=[CPU]) is None
    with pytest.raises(TableError, match="no latency table"):
        find_table(TARGET)
    measured: set[Item] = set()

    def counting(request: Request) -> Iterator[Timing]:
        for timing in launch(request):
            measured.add(timing.item)
            yield timing

    profile(SPACE, TARGET, n_calibration=N_NETWORKS, devices=[CPU], launch=counting)
    assert measured >= {*SPACE.blocks, *map(MemoryRead, READ_BYTES)}, "nothing was taken from the shipped table"
    mine = usable_table(SPACE, TARGET, devices=[CPU])
    assert mine is not None and mine.context.origin == "" and mine.entries.keys() == set(SPACE.blocks)
    assert shipped.read_bytes() == before and not list(shipped.parent.glob(".*"))
    table = usable_table(SPACE, TARGET, devices=[CPU], allow_stale=True)
    assert table is not None and table.context.origin == "", "its own table comes first"


def test_a_shipped_table_is_used_on_the_device_of_its_name_only_where_that_was_allowed(shipped: Path) -> None:
    table = usable_table(SPACE, TARGET, devices=[CPU], allow_stale=True)
    assert table is not None and staleness(table, devices=[CPU]) == ["it came with lowsearch: another machine measured it"]
    copied = LatencyTable.load(table.save(shipped.parents[3] / "study"))
    assert staleness(copied, devices=[CPU]) == staleness(table, devices=[CPU]), "a copy of it does not forget"


def test_a_device_that_is_not_attached_may_be_searched_for_with_its_shipped_table(shipped: Path) -> None:
    here = Device(slug="my-laptop", kind="cpu", name="My laptop")
    found = usable_table(SPACE, TARGET, devices=[here])
    assert found is not None and found.context.origin == "shipped" and staleness(found, devices=[here]) == []
    quick(shipped.parents[2])
    found = usable_table(SPACE, TARGET, devices=[here])
    assert found is not None and found.context.origin == "", "a table that was copied here comes first"


# Whole profiles ----------------------------------------------------------------------------------------------------------

QUICK = Effort(rounds=2, warmups=1, sample_ms=0.05, round_ms=0.2, turns_ms=5.0, min_turns=2, max_turns=5, cold_samples=1)


def test_a_real_profile_of_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end in real processes: blocks and networks are measured, saved, loaded, and predicted from."""
    monkeypatch.setattr(locations, "folders", lambda kind: [])  # A table that this checkout has already would be extended.
    cpu = attached_devices()[0]
    target = Target(cpu.slug, "onnxruntime")
    once = dataclasses.replace(QUICK, processes=1)
    profile(SPACE, target, folder=tmp_path, n_calibration=4, effort=QUICK, network_effort=once)
    table = find_table(target, folders=[tmp_path])
    assert set(table.entries) == set(SPACE.blocks) and table.context.device_name == cpu.name
    assert all(len(row.hot_samples_ms) in (2, 3, 4) and len(row.hot_samples_ms[0]) == 2 for row in table.entries.values())
    assert all(len(row.samples_ms) == 1 and len(row.samples_ms[0]) == 2 for row in table.calibration["tiny"])
    mean_ms, std_ms = LatencyPredictor(SPACE, table).predict(SPACE.sample(5, rng=np.random.default_rng(0)))
    assert (mean_ms > 0).all() and (std_ms > 0).all()


class FakeGpu(TorchDispatchMode):
    """A CUDA device whose every kernel takes 10 us and a little for its elements. What torch launches waits until somebody does."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 0.0
        self.waiting: list[float | FakeEvent] = []
        self.synchronised = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.waiting.append(0.01 + 1e-6 * out.numel())
        return out

    def synchronize(self, index: int) -> None:
        self.synchronised += 1
        for work in self.waiting:
            if isinstance(work, FakeEvent):
                work.at_ms = self.now_ms
            else:
                self.now_ms += work
        self.waiting.clear()

    def Event(self, *, enable_timing: bool) -> FakeEvent:
        return FakeEvent(self)

    def wall_ns(self) -> int:
        return round(self.now_ms * 1e6)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.at_ms = 0.0

    def record(self) -> None:
        self.gpu.waiting.append(self)

    def synchronize(self) -> None:
        self.gpu.synchronize(0)

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at_ms - self.at_ms


def test_a_whole_profile_of_a_cuda_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of `lowsearch profile --device rtx3090 --runtime eager`, with the device's clock in our hands: the table holds what the
    device worked, and the predictor adds it up to whole networks."""
    monkeypatch.setattr(CudaTimer, "SETTLE_MS", 1.0)
    gpu_device = Device(slug="rtx3090", kind="cuda", name="NVIDIA GeForce RTX 3090", detail="24576 MiB", driver="550.54")
    target = Target("rtx3090", "eager")
    running = 0

    def launch_on_gpu(request: Request) -> Iterator[Timing]:
        nonlocal running
        running += 1
        assert running == 1, "two processes on one GPU"
        gpu = FakeGpu()
        bench = Bench(torch.device("cpu"), CudaTimer(gpu, index=0, evicting=torch.zeros(4), wall_clock_ns=gpu.wall_ns))
        with gpu:
            yield from serve(request, bench, device=gpu_device)
        assert gpu.synchronised
        running -= 1

    effort = dataclasses.replace(QUICK, processes=1)
    table = profile(
        SPACE,
        target,
        folder=tmp_path,
        n_calibration=8,
        effort=effort,
        network_effort=effort,
        devices=[CPU, gpu_device],
        launch=launch_on_gpu,
    )
    assert (tmp_path / "rtx3090" / "eager-fp32-b1-t1.jsonl").is_file()
    assert table.context.driver == "550.54" and "CUDA event time" in table.context.statistic
    assert set(table.entries) == set(SPACE.blocks)
    for row in table.entries.values():  # no caches, no noise
        assert row.hot_ms == pytest.approx(row.warm_ms) and row.hot_ms == pytest.approx(row.cold_ms)
        assert row.wall_over_cpu == pytest.approx(1)
    predictor = LatencyPredictor(SPACE, LatencyTable.load(tmp_path / target.table_path))
    measured = table.calibration["tiny"]
    mean_ms, std_ms = predictor.predict_archs([row.arch for row in measured])
    assert mean_ms == pytest.approx([row.latency_ms for row in measured], rel=1e-3)
    assert (std_ms < 0.035 * mean_ms).all(), "little more than the drift that every table is credited with"
