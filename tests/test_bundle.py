"""Bundles: made here, measured by a runner that knows nothing of lowsearch, and imported; and every way in which that can go wrong."""

from __future__ import annotations

import ast
import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowsearch import cli, cost, locations
from lowsearch.arch import Arch, Block, ConvBranch, Mlp
from lowsearch.errors import BundleError, DeviceError, LowsearchError, ParityError
from lowsearch.latency import bundle as bundles
from lowsearch.latency import bundle_runner, bundle_worker, worker
from lowsearch.latency.bundle import CARRIED, Bundle, import_results, make_bundle
from lowsearch.latency.bundle_runner import MANIFEST, RESULTS, regrouped
from lowsearch.latency.doubt import disputed
from lowsearch.latency.measure import Effort, Request
from lowsearch.latency.memory import READ_BYTES, MemoryRead
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.profile import choose_blocks, choose_networks, current_context
from lowsearch.latency.remote import SSH_VARIABLE
from lowsearch.latency.rounds import Prepared
from lowsearch.latency.table import LatencyTable, check_fits
from lowsearch.latency.target import Target, attached_devices
from lowsearch.latency.timers import CpuTimer
from lowsearch.latency.timing import Item, Timing
from lowsearch.space import SearchSpace

SPACE = SearchSpace.from_yaml(Path(__file__).with_name("tiny_blocks.yaml").read_text())
TARGET = Target("some-board", "onnxruntime")
QUICK = Effort(rounds=2, warmups=1, sample_ms=0.05, round_ms=0.2, turns_ms=5.0, min_turns=2, max_turns=5, cold_samples=1)
SETTINGS: dict[str, Any] = {"n_networks": 4, "effort": QUICK, "network_effort": dataclasses.replace(QUICK, processes=1)}
N_TIMINGS = 2 * (len(READ_BYTES) + len(SPACE.blocks)) + 4


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that nobody has measured yet; not to be written to."""
    return make_bundle(SPACE, TARGET, tmp_path_factory.mktemp("made") / "fresh", **SETTINGS).folder


@pytest.fixture
def folder(fresh: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fresh, tmp_path / "out"))


@pytest.fixture
def measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with exact results of a noiseless machine."""
    monkeypatch.setattr(bundle_runner, "_launch", noiseless(Bundle.load(folder)))
    assert bundle_runner.measure(folder)
    return folder


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(locations, "folders", lambda kind: [])
    return tmp_path / "tables"


def block_ms(block: Block) -> float:
    counted = cost.of_block(block)
    return round(1e-7 * counted.macs + 1e-6 * counted.activations + 0.003, 5)


def exact(item: Item, process: int) -> dict[str, Any]:
    """A line of results.jsonl as a noiseless machine without caches would write it, without the number of its item."""
    if isinstance(item, MemoryRead):
        states = {"hot_ms": [1e-7 * item.n_bytes] * 2, "warm_ms": [], "cold_ms": []}
    elif isinstance(item, Arch):
        states = {"hot_ms": [sum(map(block_ms, item.blocks()))] * 2, "warm_ms": [], "cold_ms": []}
    else:
        assert not isinstance(item, worker.TimmNetwork)
        states = {f"{state}_ms": [factor * block_ms(item)] * 2 for factor, state in enumerate(("hot", "warm", "cold"), start=1)}
    return {"process": process, **states, "wall_over_cpu": 1.0, "parity": 0.0, "load_average": 0.0, "step": "0"}


def noiseless(bundle: Bundle, *, killed_after: float = float("inf"), change: Callable[[dict[str, Any]], None] = lambda _: None) -> Any:
    """A launcher for `bundle_runner`, which the run dies of after so many timings."""
    seen: list[int] = []

    def launch(folder: Path, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for step in request["steps"]:
            for index in step:
                if len(seen) >= killed_after:
                    raise Killed
                line = {"item": index, **exact(bundle.items[index], request["process"])}
                change(line)
                yield line
                seen.append(index)

    return launch


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def run_py(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The runner, as it is started on the machine: without our package, where even `import torch` is an error."""
    poison = folder.parent / "poison"
    poison.mkdir(exist_ok=True)
    for name in ("torch", "scipy", "filelock", "pandas"):
        (poison / f"{name}.py").write_text("raise AssertionError('not on this machine')")
    environment = {**os.environ, "PYTHONPATH": str(poison), **environment}
    command = [sys.executable, "run.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


# Making one --------------------------------------------------------------------------------------------------------------


def test_a_bundle_holds_what_a_profile_measures(fresh: Path) -> None:
    bundle = Bundle.load(fresh)
    reads = [MemoryRead(n_bytes) for n_bytes in READ_BYTES]
    assert list(bundle.items) == [*reads, *choose_blocks(SPACE, 1400, seed=0), *choose_networks(SPACE, 4, seed=0)]
    assert set(bundle.items) >= set(SPACE.blocks) and bundle.space.text == SPACE.text
    for phase, effort in zip(bundle.manifest["phases"], (QUICK, QUICK, SETTINGS["network_effort"]), strict=True):
        assert Effort(**phase["effort"]) == effort and len(phase["steps"]) == effort.processes + 1
    planned = [item for phase in bundle.manifest["phases"] for step in phase["steps"][0] for item in step]
    assert sorted(planned) == list(range(len(bundle.items)))
    assert not (fresh / RESULTS).exists() and bundle.n_bytes < 1e6


def test_weights_pack_to_a_fraction() -> None:
    block = ConvBranch(channels=64, resolution_px=4, fused=True, expansion=4, kernel=3, groups=1, bias=True)
    model, shape, output = bundles._model(block, TARGET, 7, seed=0)
    assert shape == [1, 64, 4, 4] and output.std() > 0.1
    assert len(model) > 3.9 * cost.of_block(block).params and len(gzip.compress(model, bundles._PACKING)) < len(model) / 10


def test_what_is_compared_is_spread_over_the_output() -> None:
    small, large = np.arange(100.0).reshape(10, 10), np.arange(40_000.0).reshape(4, 100, 100)
    assert (bundle_worker.compared(small, 3) == np.arange(100)).all()
    picked = bundle_worker.compared(large, 3)
    assert len(picked) == 512 and (np.histogram(picked, 10)[0] > 25).all()
    x = bundle_worker.input_of((2, 3, 8, 8), 5)
    assert x.dtype == np.float32 and x.shape == (2, 3, 8, 8) and abs(x.std() - 1) < 0.1
    assert (x == bundle_worker.input_of((2, 3, 8, 8), 5)).all() and (x != bundle_worker.input_of((2, 3, 8, 8), 6)).any()


def test_making_it_again_leaves_it_with_its_results(measured: Path) -> None:
    before = {path: path.read_bytes() for path in measured.rglob("*") if path.is_file()}
    assert make_bundle(SPACE, TARGET, measured, **SETTINGS).manifest == Bundle.load(measured).manifest
    assert {path: path.read_bytes() for path in measured.rglob("*") if path.is_file()} == before
    with pytest.raises(BundleError, match="holds a bundle of another seed"):
        make_bundle(SPACE, TARGET, measured, seed=1, **SETTINGS)
    with pytest.raises(BundleError, match="holds a bundle of another target"):
        make_bundle(SPACE, Target("other-board", "onnxruntime"), measured, **SETTINGS)


def test_killed_while_it_is_made_it_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(bundles, "_write_runner", killed)
        make_bundle(SPACE, TARGET, tmp_path / "out", max_blocks=2, n_networks=1)
    assert not (tmp_path / "out").exists()
    assert make_bundle(SPACE, TARGET, tmp_path / "out", max_blocks=2, n_networks=1).folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "target", [Target("board", "eager"), Target("board", "onnxruntime", "fp16"), Target("board", "onnxruntime", threads=2)]
)
def test_what_a_bundle_cannot_measure_is_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(DeviceError):
        make_bundle(SPACE, target, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(BundleError, match="is no bundle"):
        make_bundle(SPACE, TARGET, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


# The runner --------------------------------------------------------------------------------------------------------------

ROOT = Path(bundles.__file__).parents[1]
CARRIED_MODULES = {"lowsearch." + name.removesuffix(".py").replace("/", ".") for name in CARRIED}


@pytest.mark.parametrize("name", [*CARRIED, "latency/bundle_runner.py"])
def test_what_is_carried_needs_python_3_8_numpy_and_onnxruntime_only(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(), feature_version=(3, 8))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    strangers = {
        m for m in imported if m not in CARRIED_MODULES and m.split(".")[0] not in {*sys.stdlib_module_names, "numpy", "onnxruntime"}
    }
    assert not strangers


def test_a_bundle_is_measured_without_lowsearch_and_its_table_carries_a_predictor(folder: Path, tables: Path) -> None:
    """End to end on this CPU, which then counts as the foreign machine."""
    done = run_py(folder)
    assert done.returncode == 0, done.stderr
    assert f"0/{N_TIMINGS} timings" in done.stdout and done.stdout.splitlines()[-1] == f"done: {RESULTS} holds everything"
    import_results(Bundle.load(folder), tables=tables)
    table = LatencyTable.load(tables / TARGET.table_path)
    assert set(table.entries) == set(SPACE.blocks) and len(table.memory) == len(READ_BYTES) and len(table.calibration["tiny"]) == 4
    assert all(len(row.hot_samples_ms) in (2, 3) and len(row.hot_samples_ms[0]) == 2 for row in table.entries.values())
    mean_ms, std_ms = LatencyPredictor(SPACE, table).predict(SPACE.sample(5, rng=np.random.default_rng(0)))
    assert (mean_ms > 0).all() and (std_ms > 0).all()
    assert all(
        0 < line["parity"] < 1e-4
        for line in results(folder)[1:]
        if "memory_bytes" not in Bundle.load(folder).manifest["items"][line["item"]]
    )
    # The machine is described as lowsearch itself would, so the table also fits where it can be installed.
    cpu = attached_devices()[0]
    here = Target(cpu.slug, "onnxruntime")
    check_fits(dataclasses.replace(table, target=here), here, current_context(here, cpu))
    assert table.context.runtime_options["opset"] == 17 and table.context.runtime_options["flush_bytes"]


def test_killed_with_sigkill_it_goes_on(folder: Path, tables: Path) -> None:
    running = subprocess.Popen([sys.executable, "run.py"], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / RESULTS).exists() or len((folder / RESULTS).read_bytes().splitlines()) < 30:
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    with (folder / RESULTS).open("a") as file:
        file.write('{"item": 3, "proc')  # as a power cut may leave it
    kept = results_before_the_torn(folder)
    assert run_py(folder).returncode == 0
    lines = results(folder)
    assert lines[: len(kept)] == kept
    pairs = [(line["item"], line["process"]) for line in lines[1:]]
    assert len(pairs) == len(set(pairs)) >= N_TIMINGS
    assert set(import_results(Bundle.load(folder), tables=tables).entries) == set(SPACE.blocks)


def results_before_the_torn(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()[:-1]]


def test_killed_after_any_timing_it_measures_none_twice(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(fresh)
    for n in range(0, N_TIMINGS, 9):
        folder = Path(shutil.copytree(fresh, tmp_path / str(n)))
        monkeypatch.setattr(bundle_runner, "_launch", noiseless(bundle, killed_after=n))
        with pytest.raises(Killed):
            bundle_runner.measure(folder)
        monkeypatch.setattr(bundle_runner, "_launch", noiseless(bundle))
        assert bundle_runner.measure(folder)
        pairs = [(line["item"], line["process"]) for line in results(folder)[1:]]
        assert len(pairs) == len(set(pairs)) == N_TIMINGS


def test_where_two_processes_disagree_a_third_decides(folder: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(folder)
    loud = {index for index, item in enumerate(bundle.items) if item in SPACE.blocks[::8]}

    def change(line: dict[str, Any]) -> None:
        if line["process"] == 1 and line["item"] in loud:
            line["warm_ms"] = [2 * ms for ms in line["warm_ms"]]

    monkeypatch.setattr(bundle_runner, "_launch", noiseless(bundle, change=change))
    assert bundle_runner.measure(folder)
    assert {line["item"] for line in results(folder)[1:] if line["process"] == 2} == loud
    table = import_results(bundle, tables=tables)
    assert all(len(row.warm_samples_ms) == (3 if bundle.items.index(block) in loud else 2) for block, row in table.entries.items())
    assert all(row.warm_ms == pytest.approx(2 * block_ms(block), rel=0.02) for block, row in table.entries.items())
    text = (folder / RESULTS).read_text()
    (folder / RESULTS).write_text("".join(line + "\n" for line in text.splitlines() if '"process": 2' not in line))
    with pytest.raises(BundleError, match=f"lacks {len(loud)} of {N_TIMINGS + len(loud)} timings"):
        import_results(bundle, tables=tables)


@given(st.lists(st.tuples(*[st.lists(st.integers(1, 400), min_size=1, max_size=4)] * 2), min_size=1, max_size=4))
def test_both_ends_call_the_same_timings_disputed(rounds: list[tuple[list[int], list[int]]]) -> None:
    """But for the last digit of a float, in which versions of numpy differ."""
    timings = [
        Timing(item=Mlp(channels=8, resolution_px=4, ratio=2), process=p, hot_ms=tuple(h), warm_ms=tuple(w))
        for p, (h, w) in enumerate(rounds)
    ]
    lines = [timing.to_dict() for timing in timings]
    agreed = {bundle_runner.disputed(lines, by) for by in (0.1 - 1e-9, 0.1 + 1e-9)}
    assert disputed(timings) in agreed


@given(st.integers(1, 60), st.integers(0, 9), st.data())
def test_groups_keep_what_is_wanted_within_their_limits(n: int, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    planned = [list(map(int, part)) for part in np.array_split(rng.permutation(n), -(-n // 8))]
    n_bytes = [int(size) for size in rng.integers(1, 10, n)]
    wanted = data.draw(st.sets(st.integers(0, n - 1)))
    groups = regrouped(planned, wanted, n_bytes, max_items=8, max_bytes=40)
    assert sorted(item for group in groups for item in group) == sorted(wanted) and all(groups)
    assert all(len(g) <= 8 and (sum(n_bytes[i] for i in g) <= 40 or any(set(g) <= set(p) for p in planned)) for g in groups)
    assert regrouped(planned, set(range(n)), n_bytes, max_items=8, max_bytes=40) == planned or min(map(len, planned)) < 5


class Clock:
    """Time that passes only when something runs."""

    ns = 0

    def __call__(self) -> int:
        return self.ns


class Work:
    """A program of a fixed time, longer the longer it has not run, and the longer after a flush."""

    def __init__(self, clock: Clock, ms: float) -> None:
        self._clock, self._ms, self._last_ns = clock, ms, 0

    def run(self) -> None:
        now = self._clock.ns
        self._clock.ns += round(1e6 * self._ms * (1 + min(now - self._last_ns, 10**9) / 10**9))
        self._last_ns = self._clock.ns

    def output(self) -> np.ndarray:
        return np.zeros(1)


class FlushingTimer(CpuTimer):
    def __init__(self, clock: Clock) -> None:
        super().__init__(cpu_clock_ns=clock, wall_clock_ns=clock, flush_bytes=8)
        self._clock = clock

    def flush(self) -> None:
        self._clock.ns += 10**7


def test_a_bundle_is_timed_as_a_worker_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both on a clock of ours: the same rounds in the same order give the same numbers, to the last digit."""
    bundle = Bundle.load(folder)
    indices = [index for index, item in enumerate(bundle.items) if item in SPACE.blocks[:5]]
    items = tuple(bundle.items[index] for index in indices)
    request = {"process": 1, "seed": 9, "effort": dataclasses.asdict(QUICK), "steps": [indices], "until_s": float("inf")}

    clock = Clock()
    monkeypatch.setattr(
        bundle_worker._Models, "prepare", lambda self, i: Prepared(i, Work(clock, 0.1 + 0.01 * indices.index(i)), parity=0.0, is_block=True)
    )
    lines = list(bundle_worker.serve(folder, request, FlushingTimer(clock)))

    clock = Clock()
    monkeypatch.setattr(
        worker, "_prepare", lambda one, *_: Prepared(one.item, Work(clock, 0.1 + 0.01 * items.index(one.item)), parity=0.0, is_block=True)
    )
    asked = Request(target=TARGET, process=1, seed=9, effort=QUICK, steps=(items,))
    bench = worker.Bench(torch.device("cpu"), FlushingTimer(clock))
    timings = list(worker.measure_step(items, asked, bench, rng=np.random.default_rng(9)))
    for line, timing in zip(lines, timings, strict=True):
        assert bundle.items[line["item"]] == timing.item and line["process"] == timing.process
        assert (line["hot_ms"], line["warm_ms"], line["cold_ms"]) == (timing.hot_ms, timing.warm_ms, timing.cold_ms)
        assert len(timing.hot_ms) == 2 and timing.cold_ms[0] > timing.hot_ms[0]


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Change a file and its hash in the manifest: nobody can tell by hashes alone."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = hashlib.sha256(data).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_machine_that_computes_something_else_is_refused(folder: Path) -> None:
    """Here because a model was exchanged for another of the same shape."""
    rows = Bundle.load(folder).manifest["items"]
    blocks = [row for row in rows if "block" in row]
    pairs = ((a, b) for i, a in enumerate(blocks) for b in blocks[:i])
    one, other = next((a, b) for a, b in pairs if all(a[shape] == b[shape] for shape in ("input_shape", "output_shape")))
    rewrite(folder, one["model"], (folder / other["model"]).read_bytes())
    done = run_py(folder)
    assert done.returncode == 2 and "differs from torch's" in done.stderr and done.stderr.count("\n") == 1
    index = rows.index(one)
    assert index not in {line["item"] for line in results(folder)[1:]}


def test_files_that_were_lost_or_changed_on_the_way_are_named(folder: Path) -> None:
    (folder / "expected.npz").unlink()
    (folder / "lowsearch" / "errors.py").write_text((folder / "lowsearch" / "errors.py").read_text() + "\n")
    done = run_py(folder)
    assert done.returncode == 2 and not (folder / RESULTS).exists()
    assert done.stderr == "error: 2 files are missing or damaged, such as lowsearch/errors.py; hint: copy the whole folder here again\n"


def test_results_of_another_machine_are_not_gone_on_with(measured: Path) -> None:
    lines = results(measured)
    lines[0]["machine"]["versions"] = {"onnxruntime": "0.1"}
    (measured / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines[:9]))
    with pytest.raises(BundleError, match=r"other versions \(versions: .*0\.1.* then"):
        bundle_runner.measure(measured)
    lines[0]["manifest_sha256"] = "0"
    (measured / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines[:9]))
    with pytest.raises(BundleError, match="belongs to another bundle"):
        bundle_runner.measure(measured)
    assert len(results(measured)) == 9


def test_two_runners_do_not_mix(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = noiseless(Bundle.load(folder))

    def nested(*arguments: Any) -> Iterator[dict[str, Any]]:
        with pytest.raises(BundleError, match="another run.py"):
            bundle_runner.measure(folder)
        yield from inner(*arguments)

    monkeypatch.setattr(bundle_runner, "_launch", nested)
    assert bundle_runner.measure(folder)


def test_missing_packages_are_named_with_the_command_that_installs_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_runner, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"has no numpy and no onnxruntime; hint: .* -m pip install numpy onnxruntime"):
        bundle_runner.measure(folder)


def test_a_dying_process_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_runner, "_WORKER", ("-c", "import os; os.kill(os.getpid(), 9)"))
    with pytest.raises(DeviceError, match=r"ended with code -9 \(-9: out of memory\)"):
        bundle_runner.measure(folder)


def test_it_stops_when_its_minutes_are_over(folder: Path) -> None:
    done = run_py(folder, "--minutes", "0")
    assert done.returncode == 3 and "time is up; the same command goes on" in done.stdout
    assert len(results(folder)) == 1
    assert "--minutes" in run_py(folder, "-h").stdout


# Importing ---------------------------------------------------------------------------------------------------------------


def test_an_import_says_what_was_measured(measured: Path, tables: Path) -> None:
    table = import_results(Bundle.load(measured), tables=tables)
    assert LatencyTable.load(tables / TARGET.table_path).entries == table.entries
    for block, row in table.entries.items():
        assert (row.hot_ms, row.warm_ms) == pytest.approx((block_ms(block), 2 * block_ms(block)), abs=2e-5)
    assert {row.arch for row in table.calibration["tiny"]} == set(choose_networks(SPACE, 4, seed=0))
    assert [read.n_bytes for read in table.memory] == sorted(READ_BYTES)
    mean_ms, _ = LatencyPredictor(SPACE, table).predict_archs([row.arch for row in table.calibration["tiny"]])
    assert mean_ms == pytest.approx([row.latency_ms for row in table.calibration["tiny"]], rel=0.02)
    again = import_results(Bundle.load(measured), tables=tables)
    assert (again.entries, again.calibration) == (table.entries, table.calibration), "importing twice is importing once"


def test_a_second_space_of_the_machine_joins_its_table(
    measured: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = import_results(Bundle.load(measured), tables=tables)
    other = SearchSpace.from_yaml(SPACE.text.replace("name: tiny", "name: other").replace("[[32, 32]]", "[[64, 32]]"))
    second = make_bundle(other, TARGET, tmp_path / "second", **{**SETTINGS, "n_networks": 1}, max_blocks=5)
    monkeypatch.setattr(bundle_runner, "_launch", noiseless(second))
    bundle_runner.measure(second.folder)
    table = import_results(second, tables=tables)
    assert set(table.entries) == {*SPACE.blocks, *(item for item in second.items if item in other.blocks)} > set(SPACE.blocks)
    assert set(table.calibration) == {"tiny", "other"}
    assert {row.arch: row for row in table.calibration["tiny"]} == {row.arch: row for row in first.calibration["tiny"]}


Edit = Callable[[Path], None]


def edited_line(number: int, **values: Any) -> Edit:
    def edit(folder: Path) -> None:
        lines = results(folder)
        lines[number].update(values)
        (folder / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))

    return edit


def cut(n_lines: int) -> Edit:
    def edit(folder: Path) -> None:
        text = (folder / RESULTS).read_text()
        (folder / RESULTS).write_text("".join(text.splitlines(keepends=True)[:-n_lines]))

    return edit


def torn(folder: Path) -> None:
    (folder / RESULTS).write_text((folder / RESULTS).read_text()[:-5])


def another_manifest(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "dispute": 0.5}))


def other_values(folder: Path) -> None:
    rewrite(folder, "expected.npz", (folder / "expected.npz").read_bytes() + b" ")


NETWORK = N_TIMINGS  # the last line of a whole results.jsonl
BLOCK = NETWORK - 4
FAULTS: dict[str, tuple[Edit, str]] = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "is no bundle: it has no manifest.json.*--bundle"),
    "manifest of something else": (lambda f: (f / MANIFEST).write_text("{}"), "manifest.json is damaged"),
    "torn manifest": (lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:-9]), "manifest.json is damaged"),
    "model changed": (lambda f: (f / "models" / "0030.onnx.gz").write_bytes(b"x"), "0030.onnx.gz is not the file that was written"),
    "runner changed": (lambda f: (f / "run.py").write_text("print('fast')"), "run.py is not the file that was written"),
    "manifest changed": (another_manifest, "was measured with another manifest"),
    "model and hash changed": (other_values, "was measured with another manifest"),
    "not measured": (lambda f: (f / RESULTS).unlink(), "was not measured yet.*python3 run.py"),
    "header only": (cut(N_TIMINGS), f"lacks {N_TIMINGS} of {N_TIMINGS} timings.*python3 run.py"),
    "three missing": (cut(3), f"lacks 3 of {N_TIMINGS} timings.*python3 run.py"),
    "torn": (torn, f"lacks 1 of {N_TIMINGS} timings.*python3 run.py"),
    "damaged line": (lambda f: (f / RESULTS).write_text((f / RESULTS).read_text().replace('{"item"', '{"i', 1)), "jsonl:2: damaged line"),
    "header is a list": (lambda f: (f / RESULTS).write_text("[]\n"), "jsonl:1: damaged line"),
    "other schema": (edited_line(0, version=9), "jsonl:1: no results of a bundle"),
    "no machine": (edited_line(0, machine=None), "jsonl:1: the machine is not described"),
    "unknown item": (edited_line(BLOCK, item=999), f"jsonl:{BLOCK + 1}: no timing of this bundle .item 999"),
    "unknown process": (edited_line(NETWORK, process=7), "no timing of this bundle .process 7"),
    "negative time": (edited_line(BLOCK, hot_ms=[1.0, -1.0]), "not a positive number"),
    "no number": (edited_line(BLOCK, cold_ms=[1.0, float("nan")]), "not a positive number"),
    "text": (edited_line(BLOCK, warm_ms=["1", "2"]), "not a positive number"),
    "too few rounds": (edited_line(BLOCK, warm_ms=[1.0]), r"expected \(2, 2, 2\) rounds"),
    "unknown field": (edited_line(BLOCK, speed=1.0), "no timing of this bundle"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_one_line_and_no_table(
    fault: str, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    edit, says = FAULTS[fault]
    edit(measured)
    with pytest.raises(BundleError, match=says):
        import_results(Bundle.load(measured))
    assert cli.invoke(["profile", "--import", str(measured)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1 and "; hint: " in printed.err
    assert not (tmp_path / "latency_tables").exists()


@pytest.mark.parametrize("parity", [0.01, float("nan"), -1.0])
def test_times_of_a_model_that_computed_something_else_enter_no_table(parity: float, measured: Path, tables: Path) -> None:
    edited_line(BLOCK, parity=parity)(measured)
    with pytest.raises(ParityError, match="differed from torch's"):
        import_results(Bundle.load(measured), tables=tables)
    assert not tables.exists()


def test_results_alone_are_enough_where_the_bundle_was_made(fresh: Path, measured: Path, tmp_path: Path, tables: Path) -> None:
    home = Path(shutil.copytree(fresh, tmp_path / "home"))
    shutil.copy(measured / RESULTS, home)
    assert import_results(Bundle.load(home), tables=tables).entries


# Over ssh ----------------------------------------------------------------------------------------------------------------

SSH = """#!/bin/sh
# Stands in for ssh: the remote machine is the folder REMOTE_HOME. Arguments: host, command.
echo "$2" >> "$REMOTE_HOME/log"
[ "$1" = "pi@away" ] && { echo "ssh: connect to host away port 22: No route to host" >&2; exit 255; }
case "$2" in *run.py*) [ -n "$CUT_OFF" ] && { echo "0/100 timings"; echo "Connection closed by away" >&2; exit 255; };; esac
cd "$REMOTE_HOME" && exec sh -c "$2"
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for ssh on PATH; the home of the machine that it reaches."""
    home = tmp_path / "remote"
    home.mkdir()
    script = tmp_path / "bin" / "ssh"
    script.parent.mkdir()
    script.write_text(SSH)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("REMOTE_HOME", str(home))
    monkeypatch.delenv(SSH_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return home


def on_host(folder: Path, host: str = "pi@board", *options: str) -> list[str]:
    command = ["profile", "--host", host, "--device", "some-board", "--bundle", str(folder), "--space", "tiny.yaml"]
    return [*command, "--remote-python", sys.executable, *options]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line makes bundles of our space with our efforts."""
    (tmp_path / "tiny.yaml").write_text(SPACE.text)
    made = bundles.make_bundle
    monkeypatch.setattr(bundles, "make_bundle", lambda *arguments, **options: made(*arguments, **{**options, **SETTINGS}))


@pytest.mark.usefixtures("tiny")
def test_one_command_measures_over_ssh_and_goes_on(
    folder: Path, ssh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("CUT_OFF", "1")
        assert cli.invoke(on_host(folder)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ssh could not reach pi@board, or lost it: Connection closed by away; hint: ") and "goes on" in said
    assert not Path("latency_tables").exists()
    assert cli.invoke(on_host(folder, "pi@board", "--json")) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["blocks"] == len(SPACE.blocks)
    assert f"tiny on pi@board 0/{N_TIMINGS}" in printed.err and "copy to" not in printed.err, "it was copied before"
    table = LatencyTable.load(Path("latency_tables") / TARGET.table_path)
    assert LatencyPredictor(SPACE, table).relative_std > 0
    assert [line.count("tar -xf") for line in (ssh / "log").read_text().splitlines()].count(1) == 1
    place = next((ssh / "lowsearch-bundles").iterdir())
    assert (place / RESULTS).read_bytes() == (folder / RESULTS).read_bytes()


@pytest.mark.usefixtures("tiny")
def test_what_a_host_lacks_is_one_line(
    folder: Path, ssh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = ssh / "bare"
    bare.mkdir()
    (bare / "onnxruntime.py").write_text("raise ModuleNotFoundError(\"No module named 'onnxruntime'\")")

    def complaint(arguments: list[str]) -> str:
        assert cli.invoke(arguments) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        return line

    assert "could not reach pi@away" in complaint(on_host(folder, "pi@away")) and "No route to host" in complaint(
        on_host(folder, "pi@away")
    )
    assert "no machine's name; hint: --host user@machine" in complaint(on_host(folder, "-oProxyCommand=x"))
    no_python = complaint([*on_host(folder), "--remote-python", "python9"])
    assert "pi@board lacks a command" in no_python and "python9" in no_python and "--remote-python" in no_python
    no_package = complaint([*on_host(folder), "--remote-python", f"env PYTHONPATH={bare} {sys.executable}"])
    assert "has no onnxruntime; hint: ssh pi@board" in no_package and "pip install numpy onnxruntime" in no_package
    monkeypatch.setenv(SSH_VARIABLE, "no-such-ssh -q")
    assert "cannot run no-such-ssh" in complaint(on_host(folder)) and SSH_VARIABLE in complaint(on_host(folder))
    assert not Path("latency_tables").exists()


@pytest.mark.usefixtures("tiny")
def test_what_the_runner_there_complains_of_arrives_here(folder: Path, ssh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.load(folder)
    place = ssh / "lowsearch-bundles" / f"some-board-{bundle.sha256[:10]}"
    shutil.copytree(folder, place)
    (place / "expected.npz").unlink()
    assert cli.invoke(on_host(folder)) == 2
    assert "error: on pi@board: 1 files are missing or damaged, such as expected.npz; hint: copy" in capsys.readouterr().err


# The command line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bundle", "out"], "name the machine that is measured"),
        (["--host", "pi@board"], "name the machine that is measured"),
        (["--bundle", "out", "--device", "cuda"], "name the machine that is measured"),
        (["--bundle", "out", "--device", "Some Board!"], "not a name"),
        (["--bundle", "out", "--device", "some-board", "--runtime", "eager"], "a bundle measures with onnxruntime, not with eager"),
        (["--bundle", "out", "--device", "some-board", "--threads", "4"], "threads is 4"),
        (["--bundle", "out", "--import", "out"], "--import stands alone"),
        (["--import", "nowhere"], "nowhere is no bundle"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.invoke(["profile", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and says in printed and "; hint: " in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny")
def test_the_command_that_makes_a_bundle_says_what_comes_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.invoke(["profile", "--bundle", str(folder), "--device", "some-board", "--space", "tiny.yaml", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["items"] == len(Bundle.load(folder).items) and 0 < facts["megabytes"] < 1
    assert cli.invoke(["profile", "--bundle", str(folder), "--device", "some-board", "--space", "tiny.yaml"]) == 0
    assert f"lowsearch profile --import {folder}" in capsys.readouterr().err


def test_a_bundle_error_is_a_lowsearch_error() -> None:
    assert issubclass(BundleError, LowsearchError)
