"""Bundles: measuring a machine that lowsearch cannot be installed on, such as a Raspberry Pi.

`make_bundle` writes a folder that holds everything a profile of a space measures: ONNX models of its blocks and calibration networks,
what torch computes of them, and a runner that needs Python, numpy and onnxruntime only. It is carried to the machine and run there, and
`import_results` makes a latency table of what comes back, as `profile` does of its own timings. Format: docs/formats.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch import __version__, locations
from lowsearch.arch import Arch, Block
from lowsearch.errors import BundleError, DeviceError, LowsearchError, ParityError
from lowsearch.latency import bundle_runner
from lowsearch.latency.bundle_runner import MANIFEST, RESULTS, damaged_files, disputed, read_lines
from lowsearch.latency.doubt import DISPUTE
from lowsearch.latency.measure import BLOCKS_PER_STEP, BYTES_PER_STEP, Effort, Progress, size_bytes, steps
from lowsearch.latency.memory import READ_BYTES, MemoryRead
from lowsearch.latency.profile import NETWORK_EFFORT, choose_blocks, choose_networks, runtime_max_blocks, table_of, table_to_extend
from lowsearch.latency.session import locked
from lowsearch.latency.table import LatencyTable
from lowsearch.latency.table_tools import merge
from lowsearch.latency.target import Context, Target
from lowsearch.latency.timing import Item, Timing, item_from_dict, item_to_dict
from lowsearch.space import SearchSpace

SCHEMA, VERSION = "lowsearch-bundle", 1
RUNTIME = "onnxruntime"
N_NETWORKS = 30
"""More than a profile's 20: they are chosen by their MACs, before any block of the machine has a time."""
CARRIED = ("errors.py", *(f"latency/{name}.py" for name in ("bundle_worker", "machine", "onnx_program", "rounds", "timers")))
"""Modules of lowsearch that the runner imports; run.py is bundle_runner.py."""

_MAKE = "lowsearch profile --device NAME --bundle"
_PACKING = 5  # Of gzip's levels. 9 packs such weights little better, and takes 30 times as long.
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle on disk, its manifest checked."""

    folder: Path
    manifest: Mapping[str, Any]
    target: Target
    space: SearchSpace
    items: tuple[Item, ...]
    """Reads of memory, blocks, networks; the manifest and the results name an item by its place here."""

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Raises BundleError where `folder` is no bundle, or one of its files is not what it was."""
        path = folder / MANIFEST
        if not path.is_file():
            raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}", hint=f"make one: {_MAKE} {folder}")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if (manifest["schema"], manifest["version"]) != (SCHEMA, VERSION):
                raise ValueError(f"schema is {manifest['schema']!r} version {manifest['version']!r}, expected {SCHEMA!r} version {VERSION}")
            bundle = cls(
                folder=folder, manifest=manifest, target=Target.from_dict(manifest["target"]),
                space=SearchSpace.from_yaml(manifest["space"], origin=str(path)), items=tuple(map(item_from_dict, manifest["items"])),
            )  # fmt: skip
            wrong = damaged_files(folder, manifest["files"])
        except (LowsearchError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{path} is damaged: {error}", hint=f"make the bundle anew: {_MAKE} {folder}") from error
        if wrong:
            raise BundleError(f"{folder / wrong[0]} is not the file that was written", hint=f"make the bundle anew: {_MAKE} {folder}")
        return bundle

    @property
    def sha256(self) -> str:
        """Of the manifest, which holds the hash of every other file."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()

    @property
    def n_bytes(self) -> int:
        """Of all its files."""
        return sum((self.folder / name).stat().st_size for name in (MANIFEST, *self.manifest["files"]))

    def effort(self, index: int) -> Effort:
        """How often item `index` is timed."""
        return Effort(**self.manifest["phases"][_phase(self.items[index])]["effort"])


def make_bundle(
    space: SearchSpace,
    target: Target,
    folder: Path,
    *,
    max_blocks: int | None = None,
    n_networks: int = N_NETWORKS,
    seed: int = 0,
    effort: Effort | None = None,
    network_effort: Effort | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Write a bundle of what `profile` measures of `space`. One that was made of the same is left as it is, also with its results.

    `target` names the machine that it goes to. Networks are chosen by their MACs, as no block has a time yet. Raises BundleError where
    `folder` holds anything else, DeviceError for what a bundle cannot measure.
    """
    from lowsearch.latency.runtimes import TOLERANCE, check_supported, runtime  # imports torch

    if target.runtime != RUNTIME:
        raise DeviceError(f"a bundle measures with {RUNTIME}, not with {target.runtime}", hint=f"--runtime {RUNTIME}")
    check_supported(target, "cpu")
    if target.precision != "fp32" or target.threads != 1:
        raise DeviceError(
            f"a bundle measures fp32 on one thread, not {target.precision} on {target.threads}", hint="--precision fp32 --threads 1"
        )
    max_blocks = runtime_max_blocks(target) if max_blocks is None else max_blocks
    efforts = effort or Effort(), effort or Effort(), network_effort or NETWORK_EFFORT
    asked = {
        "schema": SCHEMA, "version": VERSION, "lowsearch": __version__, "runtime_options": runtime(RUNTIME).options(target, "cpu"),
        "target": dataclasses.asdict(target), "space": space.text,
        "seed": seed, "max_blocks": max_blocks, "n_networks": n_networks, "efforts": [dataclasses.asdict(one) for one in efforts],
    }  # fmt: skip
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        return _made_before(folder, asked)
    reads = [MemoryRead(n_bytes) for n_bytes in READ_BYTES]
    phases = reads, choose_blocks(space, max_blocks, seed=seed), choose_networks(space, n_networks, seed=seed)
    draft = folder.resolve().with_name(f".{folder.resolve().name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    with _one_thread():
        rows = _write_models([item for phase in phases for item in phase], target, draft, seed=seed, progress=progress)
    _write_runner(draft)
    names = sorted(path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file())
    manifest = {
        **asked, "tolerance": TOLERANCE[target.precision], "dispute": DISPUTE,
        "items_per_step": BLOCKS_PER_STEP, "bytes_per_step": BYTES_PER_STEP,
        "phases": _plan(phases, efforts, seed), "items": rows,
        "files": {name: hashlib.sha256((draft / name).read_bytes()).hexdigest() for name in names},
    }  # fmt: skip
    (draft / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    draft.rename(folder)
    return Bundle.load(folder)


def import_results(bundle: Bundle, *, tables: Path | None = None) -> LatencyTable:
    """The latency table of what was measured with `bundle`, written under `tables` (default: ./latency_tables).

    A table of the same machine and versions is extended, any other is replaced. Raises BundleError where results are missing, damaged
    or of another bundle, ParityError where a model's output was not torch's.
    """
    tables = locations.new("latency_tables") if tables is None else tables
    machine, found = _results(bundle)
    _check_complete(bundle, found)
    measured_on = _context(bundle, machine)
    timings = {bundle.items[index]: {p: timing for p, (timing, _) in by_process.items()} for index, by_process in found.items()}
    again = sum(bundle.effort(index).processes in by_process for index, by_process in found.items())
    table = table_of(bundle.target, dataclasses.replace(measured_on, measured_again=again), bundle.space, timings)
    path = tables / bundle.target.table_path
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        table = merge(table, table_to_extend(bundle.target, measured_on, tables))
        table.save(tables)
    return table


# Making one --------------------------------------------------------------------------------------------------------------


def _made_before(folder: Path, asked: Mapping[str, Any]) -> Bundle:
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} exists already, and is no bundle", hint="name another folder")
    bundle = Bundle.load(folder)
    changed = [name for name, value in asked.items() if bundle.manifest.get(name) != value]
    if changed:
        raise BundleError(f"{folder} holds a bundle of another {changed[0]}", hint="name another folder, or remove this one")
    return bundle


def _plan(phases: Sequence[Sequence[Item]], efforts: Sequence[Effort], seed: int) -> list[dict[str, Any]]:
    """How each phase is timed: the effort, and for every process the groups that are interleaved, in numbers of items. There is one
    process more than `effort` says, for items that the others disagree about."""
    number = {item: index for index, item in enumerate(item for phase in phases for item in phase)}
    return [
        {
            "effort": dataclasses.asdict(effort),
            "steps": [
                [[number[item] for item in step] for step in steps(phase, rng=np.random.default_rng((seed, process)))]
                for process in range(effort.processes + 1)
            ],
        }
        for phase, effort in zip(phases, efforts, strict=True)
    ]


def _write_models(
    items: Sequence[MemoryRead | Block | Arch], target: Target, draft: Path, *, seed: int, progress: Progress | None
) -> list[dict[str, Any]]:
    """Write the models and what torch computes of their inputs; the manifest's row of every item."""
    from lowsearch.latency.bundle_worker import EXPECTED, compared

    (draft / "models").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    expected: dict[str, Any] = {}
    for index, item in enumerate(items):
        if progress is not None:
            progress(index, len(items), "models")
        if isinstance(item, MemoryRead):
            rows.append({**item_to_dict(item), "bytes": item.n_bytes})
            continue
        model, shape, output = _model(item, target, index, seed=seed)
        name = f"models/{index:04d}.onnx.gz"
        (draft / name).write_bytes(gzip.compress(model, _PACKING, mtime=0))
        expected[str(index)] = compared(output, index)
        rows.append({
            **item_to_dict(item), "model": name, "bytes": size_bytes(item), "input_shape": shape,
            "output_shape": list(output.shape), "output_range": float(np.abs(output).max()),
        })  # fmt: skip
    np.savez(draft / EXPECTED, **expected)
    if progress is not None:
        progress(len(items), len(items), "models")
    return rows


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread: several wait for each other at layers this small, the more so on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _model(item: Block | Arch, target: Target, index: int, *, seed: int) -> tuple[bytes, list[int], np.ndarray]:
    """ONNX model of `item` with random weights, the shape of its input, and torch's output. Checked here first: a wrong export shall
    not be carried anywhere."""
    import torch

    from lowsearch.latency.bundle_worker import input_of
    from lowsearch.latency.onnx_program import OnnxProgram
    from lowsearch.latency.onnx_runtimes import export_onnx
    from lowsearch.latency.runtimes import check_parity, reference
    from lowsearch.latency.worker import build, fill_at_random

    module, channels, px, what = build(item)
    values = input_of((target.batch, channels, px, px), index)
    x = torch.from_numpy(values)
    fill_at_random(module, x, seed=seed + index)
    for weight in module.state_dict().values():
        if weight.ndim > 1:  # Signs of one size take the same time, and pack to a tenth.
            weight.copy_(weight.sign() * weight.square().mean().sqrt())
    expected = reference(module, x)
    model = export_onnx(module, x)
    check_parity(OnnxProgram(model, values), expected, precision=target.precision, what=what)
    return model, list(values.shape), expected


def _write_runner(draft: Path) -> None:
    shutil.copyfile(bundle_runner.__file__, draft / "run.py")
    for name in CARRIED:
        (draft / "lowsearch" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_PACKAGE / name, draft / "lowsearch" / name)
    for name in ("__init__.py", "latency/__init__.py"):
        (draft / "lowsearch" / name).write_text('"""What of lowsearch measures; ../run.py starts it."""\n', encoding="utf-8")


# Reading what came back --------------------------------------------------------------------------------------------------

_Found = Mapping[int, Mapping[int, tuple[Timing, Mapping[str, Any]]]]
"""Timings by item and process, with the lines they were read from."""


def _phase(item: Item) -> int:
    return 0 if isinstance(item, MemoryRead) else 2 if isinstance(item, Arch) else 1


def _results(bundle: Bundle) -> tuple[Any, _Found]:
    """The machine that measured, and the timings. Raises BundleError naming the line at fault."""
    path = bundle.folder / RESULTS
    lines = read_lines(path)
    if not lines:
        raise BundleError(f"{path} holds nothing: the bundle was not measured yet", hint=_resume(bundle))
    header = lines[0]
    if (header.get("schema"), header.get("version")) != (bundle_runner.RESULTS_SCHEMA, bundle_runner.RESULTS_VERSION):
        raise BundleError(f"{path}:1: no results of a bundle", hint=_resume(bundle))
    if header.get("manifest_sha256") != bundle.sha256:
        raise BundleError(
            f"{path} was measured with another {MANIFEST} than that of {bundle.folder}",
            hint="import the folder that was measured",
        )
    found: dict[int, dict[int, tuple[Timing, Mapping[str, Any]]]] = defaultdict(dict)
    for number, line in enumerate(lines[1:], start=2):
        try:
            timing = _timing(bundle, line)
        except (LowsearchError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ParityError):
                raise
            raise BundleError(f"{path}:{number}: no timing of this bundle ({error})", hint=f"remove it and {_resume(bundle)}") from error
        found[line["item"]][timing.process] = timing, line
    return header.get("machine"), found


def _timing(bundle: Bundle, line: Mapping[str, Any]) -> Timing:
    index = line["item"]
    if not 0 <= index < len(bundle.items):
        raise ValueError(f"item {index}")
    item, effort = bundle.items[index], bundle.effort(index)
    timing = Timing.from_dict({**item_to_dict(item), **{name: value for name, value in line.items() if name != "item"}})
    n_rounds = effort.rounds, *(effort.rounds if isinstance(item, Block) else 0,) * 2
    if tuple(map(len, (timing.hot_ms, timing.warm_ms, timing.cold_ms))) != n_rounds:
        raise ValueError(f"expected {n_rounds} rounds hot, warm and cold")
    numbers = *timing.hot_ms, *timing.warm_ms, *timing.cold_ms, timing.wall_over_cpu
    if not all(isinstance(value, int | float) and math.isfinite(value) and value > 0 for value in numbers):
        raise ValueError("a time is not a positive number")
    if not 0 <= timing.process <= effort.processes:
        raise ValueError(f"process {timing.process}")
    if not 0 <= timing.parity <= bundle.manifest["tolerance"]:
        raise ParityError(
            f"{item}: the output on the device differed from torch's by {timing.parity:.2g} of its range, more than "
            f"{bundle.manifest['tolerance']:.0e}", hint="no table was written; try another version of onnxruntime there",
        )  # fmt: skip
    return timing


def _check_complete(bundle: Bundle, found: _Found) -> None:
    missing = total = 0
    for index in range(len(bundle.items)):
        processes, by_process = bundle.effort(index).processes, found.get(index, {})
        first = [by_process[process][1] for process in range(processes) if process in by_process]
        further = len(first) == processes and disputed(first, bundle.manifest["dispute"])
        total += processes + further
        missing += processes - len(first) + (further and processes not in by_process)
    if missing:
        raise BundleError(f"{bundle.folder / RESULTS} lacks {missing} of {total} timings", hint=_resume(bundle))


def _resume(bundle: Bundle) -> str:
    return f"on the device run `python3 run.py` in the folder, which goes on, and copy {RESULTS} to {bundle.folder}"


def _context(bundle: Bundle, machine: Any) -> Context:
    from lowsearch.latency.timers import CpuTimer

    target, manifest = bundle.target, bundle.manifest
    try:
        return Context(
            device_name=machine["device_name"], device_detail=machine["device_detail"], driver="", os=machine["os"],
            python=machine["python"], versions={"lowsearch": manifest["lowsearch"], **machine["versions"]},
            runtime_options={**manifest["runtime_options"], **machine["runtime_options"]},
            statistic=f"25th percentile of {CpuTimer.statistic}", threads=target.threads, precision=target.precision, batch=target.batch,
            date_utc=machine["date_utc"], load_average=machine["load_average"], governor=machine["governor"],
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise BundleError(f"{bundle.folder / RESULTS}:1: the machine is not described ({error})", hint=_resume(bundle)) from error
