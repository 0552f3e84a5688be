"""Latency table: what was measured of the blocks of one or more search spaces, and of some whole networks, on one target.

One text file a target, `latency_tables/<device>/<runtime>-<precision>-b<batch>-t<threads>.jsonl`: a header, a line for every size of
memory that was read, for every block and for every calibration network, in an order that does not change (docs/formats.md). Written by
`profile`, read by the predictor.
A table says on what it was measured; `check_fits` refuses it for the machine we stand on when that differs.
Tables that came with lowsearch lie under `latency_tables/shipped/`. Another machine measured them: they are for devices that are not
attached, and `check_fits` refuses them here whatever names and versions say.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from lowsearch import locations
from lowsearch.arch import BLOCK_TYPES, Arch, Block, block_from_dict, block_to_dict
from lowsearch.errors import LowsearchError, MissingBlockError, TableError
from lowsearch.files import write_atomically
from lowsearch.latency.memory import MemoryLatency
from lowsearch.latency.pace import StepKey, step_key
from lowsearch.latency.target import Context, Device, Target, attached_devices, resolve_device
from lowsearch.latency.timing import STATES, NetworkLatency, Timing, Verdict, latency_ms, row_error, verdict

SCHEMA = "lowsearch-latency-table"
VERSION = 2

SHIPPED = "shipped"
"""Folder of the tables that came with lowsearch, in a folder of latency tables."""

Source = Literal["measured", "predicted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLatency:
    """Latency of one block, alone: `hot` called back to back, `warm` in turn with other blocks, `cold` after a flush of the caches."""

    hot_ms: float
    warm_ms: float
    cold_ms: float
    hot_samples_ms: tuple[tuple[float, ...], ...] = ()
    """A tuple for every process, in it a number for every round."""
    warm_samples_ms: tuple[tuple[float, ...], ...] = ()
    cold_samples_ms: tuple[tuple[float, ...], ...] = ()
    hot_paces: tuple[float, ...] = ()
    """For every process, how much slower than usual the machine was then; the samples are as measured, `hot_ms` is at the usual pace."""
    warm_paces: tuple[float, ...] = ()
    cold_paces: tuple[float, ...] = ()
    wall_over_cpu: float = 1.0
    source: Source = "measured"

    @property
    def verdict(self) -> tuple[Verdict, str]:
        """What the row is worth, and what would make it better. Cold calls, of which there are few and which count little, do not judge."""
        states = (self.hot_samples_ms, self.hot_paces), (self.warm_samples_ms, self.warm_paces)
        return verdict(max(row_error(samples, paces) for samples, paces in states), self.wall_over_cpu)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sibling:
    """What a table keeps of the table of another batch, of the same device and versions, that its unmeasured blocks are predicted from."""

    batch: int
    date_utc: str
    sha256: str
    """Of the sibling's file."""
    entries: Mapping[Block, BlockLatency]
    """Measured at that batch; without samples."""

    def summary(self) -> dict[str, Any]:
        return {"batch": self.batch, "date_utc": self.date_utc, "sha256": self.sha256, "blocks": len(self.entries)}


ANCHORS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """The measurements of one target. Resolution is part of a Block, so one table serves several search spaces."""

    target: Target
    context: Context
    entries: Mapping[Block, BlockLatency]
    calibration: Mapping[str, tuple[NetworkLatency, ...]]
    """Whole networks, by the name of the search space they were drawn from."""
    memory: tuple[MemoryLatency, ...] = ()
    """Reads of memory, by rising size."""
    sibling: Sibling | None = None
    """Where only few blocks were measured: the table of another batch that says much of the others."""

    def lookup(self, block: Block) -> BlockLatency:
        """What was measured of `block`. Raises MissingBlockError, naming the command that measures more."""
        if block not in self.entries:
            raise MissingBlockError(f"no measurement of {block} in the table of {self.target}", hint=self.target.profile_command)
        return self.entries[block]

    def anchors(self, space: str) -> tuple[NetworkLatency, ...]:
        """A few of the networks that were measured for `space`: measured again, they tell how fast the machine is now."""
        known = self.calibration.get(space, ())
        return known[:: max(1, len(known) // ANCHORS)][:ANCHORS]

    @property
    def verdicts(self) -> dict[Verdict, int]:
        """How many blocks and calibration networks are valid, noisy and invalid."""
        found = Counter(row.verdict[0] for row in self._rows)
        return {name: found[name] for name in get_args(Verdict)}

    @property
    def advice(self) -> str:
        """What would help most rows that are not valid; empty where all are."""
        return next((advice for advice, _ in Counter(row.verdict[1] for row in self._rows if row.verdict[1]).most_common(1)), "")

    @property
    def _rows(self) -> list[BlockLatency | NetworkLatency]:
        return [*self.entries.values(), *(row for rows in self.calibration.values() for row in rows)]

    def summary(self) -> dict[str, Any]:
        """What the table holds and on what it was measured, as one row of a report."""
        ratios = [row.wall_over_cpu for row in self.entries.values()]
        return {
            **dataclasses.asdict(self.target), "device_name": self.context.device_name, "statistic": self.context.statistic,
            "blocks": len(self.entries), "networks": {space: len(rows) for space, rows in self.calibration.items()},
            "wall_over_cpu": float(np.median(ratios)) if ratios else None, "date_utc": self.context.date_utc, "origin": self.context.origin,
            "verdicts": self.verdicts, "measured_again": self.context.measured_again,
            "leans_on": self.sibling.summary() if self.sibling else None,
        }  # fmt: skip

    def save(self, folder: Path) -> Path:
        """Write the table to its place under `folder`, a folder of latency tables, and return its path."""
        path = folder / self.target.table_path
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self._lines()))
        return path

    def _lines(self) -> Iterable[dict[str, Any]]:
        networks = sorted(
            ((space, row) for space, rows in self.calibration.items() for row in rows), key=lambda p: (p[0], p[1].arch.arch_id)
        )
        yield {
            "schema": SCHEMA, "version": VERSION, "n_memory": len(self.memory), "n_blocks": len(self.entries),
            "n_networks": len(networks), "target": dataclasses.asdict(self.target), "context": dataclasses.asdict(self.context),
            **({"sibling": self.sibling.summary()} if self.sibling else {}),
        }  # fmt: skip
        for read in sorted(self.memory, key=lambda read: read.n_bytes):
            yield {"memory_bytes": read.n_bytes, **{name: getattr(read, name) for name in _MEMORY_FIELDS}}
        for block in sorted(self.entries, key=_block_order):
            yield {"block": block_to_dict(block), **dataclasses.asdict(self.entries[block])}
        beside = self.sibling.entries if self.sibling else {}
        for block in sorted(beside, key=_block_order):
            row = beside[block]
            yield {"sibling_block": block_to_dict(block), **{f"{state}_ms": getattr(row, f"{state}_ms") for state in STATES}}
        for space, row in networks:
            values = {name: getattr(row, name) for name in _NETWORK_FIELDS}
            values = {name: value for name, value in values.items() if value is not None or name not in _ENERGY_FIELDS}
            yield {"space": space, "arch": row.arch.to_dict(), **values}

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read a table. Raises TableError naming the line at fault: a table is whole, or it is not used."""
        return _Reader(path).read()


def find_table(target: Target, *, folders: Sequence[Path] | None = None, shipped: bool = False) -> LatencyTable:
    """The table of `target`: from the current directory or the user's data directory; with `shipped`, else one that came with lowsearch.

    Raises TableError where there is none: which tables exist, and the command that measures this one.
    """
    folders = locations.folders("latency_tables") if folders is None else folders
    path = table_file(target, folders=folders, shipped=shipped)
    if path is not None:
        return LatencyTable.load(path)
    existing = dict.fromkeys([*known_tables(folders=folders), *(shipped_tables(folders=folders) if shipped else ())])
    known = ", ".join(map(str, existing)) or "none"
    attached = {device.slug for device in attached_devices()}
    where = "" if target.device in attached else f" on a machine that has it, and copy latency_tables/{target.table_path} here"
    raise TableError(
        f"no latency table for {target} (attached here: {', '.join(sorted(attached))}; tables exist for: {known})",
        hint=f"run `{target.profile_command}`{where}",
    )


def table_file(target: Target, *, folders: Sequence[Path] | None = None, shipped: bool = False) -> Path | None:
    """Where `find_table` finds the table of `target`, or None."""
    folders = locations.folders("latency_tables") if folders is None else folders
    places = [*folders, *(folder / SHIPPED for folder in folders if shipped)]
    return next((place / target.table_path for place in places if (place / target.table_path).is_file()), None)


def known_tables(*, folders: Sequence[Path] | None = None) -> dict[Target, Path]:
    """Every table that was measured or copied here, by target; where a target has several, the one that is used."""
    found: dict[Target, Path] = {}
    for folder in locations.folders("latency_tables") if folders is None else folders:
        for path in sorted(folder.glob("*/*.jsonl")):
            target = _target_of(path)
            if target is not None:
                found.setdefault(target, path)
    return found


def shipped_tables(*, folders: Sequence[Path] | None = None) -> dict[Target, Path]:
    """Every table that came with lowsearch, by target."""
    return known_tables(folders=[folder / SHIPPED for folder in (locations.folders("latency_tables") if folders is None else folders)])


DEFAULT_RUNTIMES = {"cpu": "onnxruntime", "cuda": "cudagraphs"}
"""What every installation can execute on, and what comes nearest to deployment of that."""


def default_runtime(device: str, *, devices: Sequence[Device] | None = None) -> str:
    """The runtime of a device where the user names none: by its kind, and for one that is not attached that of a table there is."""
    found = resolve_device(device, devices=devices)
    if found.attached:
        return DEFAULT_RUNTIMES[found.kind]
    runtimes = {target.runtime for target in (*known_tables(), *shipped_tables()) if target.device == found.slug}
    return min(runtimes, key=lambda name: (name not in DEFAULT_RUNTIMES.values(), name), default=DEFAULT_RUNTIMES["cpu"])


def check_fits(table: LatencyTable, target: Target, here: Context) -> None:
    """Raise TableError unless `table` was measured for `target` on the machine and with the versions of `here`."""
    if table.target != target:
        raise TableError(f"the table is of {table.target}, not of {target}", hint=target.profile_command)
    changed = changes(table.context, here)
    if changed:
        raise TableError(
            f"the table of {target} was measured elsewhere or with other versions ({'; '.join(changed)})",
            hint=f"measure it anew with `{target.profile_command}`, or let a search use it as it is with --allow-stale",
        )


def changes(then: Context, now: Context) -> list[str]:
    """What differs between two contexts that should agree before times are compared: device, driver, versions; in words."""
    before, after = then.fingerprint, now.fingerprint
    return [
        "it came with lowsearch: another machine measured it"
        if name == "origin"
        else f"{name}: {before.get(name, 'none')} then, {after.get(name, 'none')} now"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def block_latency(timings: Sequence[Timing], paces: Mapping[StepKey, Sequence[float]]) -> BlockLatency:
    """One block's row from what the processes measured of it, and the pace of their steps."""
    ordered = sorted(timings, key=lambda timing: timing.process)
    hot, warm, cold = (tuple(getattr(timing, f"{state}_ms") for timing in ordered) for state in STATES)
    hot_paces, warm_paces, cold_paces = zip(*(paces[step_key(timing)] for timing in ordered), strict=True)
    return BlockLatency(
        hot_ms=round(latency_ms(hot, hot_paces), 5), warm_ms=round(latency_ms(warm, warm_paces), 5),
        cold_ms=round(latency_ms(cold, cold_paces), 5), hot_samples_ms=hot, warm_samples_ms=warm, cold_samples_ms=cold,
        hot_paces=hot_paces, warm_paces=warm_paces, cold_paces=cold_paces,
        wall_over_cpu=max(timing.wall_over_cpu for timing in ordered),
    )  # fmt: skip


def memory_latency(n_bytes: int, timings: Sequence[Timing]) -> MemoryLatency:
    """One size of memory from what the processes measured of it."""
    ordered = sorted(timings, key=lambda timing: timing.process)
    samples = tuple(timing.hot_ms for timing in ordered)
    return MemoryLatency(
        n_bytes=n_bytes, latency_ms=latency_ms(samples), samples_ms=samples, wall_over_cpu=max(timing.wall_over_cpu for timing in ordered)
    )


_HEADER_FIELDS = ("schema", "version", "n_memory", "n_blocks", "n_networks", "target", "context")
_SIBLING_FIELDS = tuple(field.name for field in dataclasses.fields(Sibling) if field.name != "entries")
_MEMORY_FIELDS = tuple(field.name for field in dataclasses.fields(MemoryLatency) if field.name != "n_bytes")
_BLOCK_FIELDS = tuple(field.name for field in dataclasses.fields(BlockLatency))
_NETWORK_FIELDS = tuple(field.name for field in dataclasses.fields(NetworkLatency) if field.name != "arch")
_ENERGY_FIELDS = ("energy_mj", "idle_power_w")
"""Of a network, where the machine has a counter; left out where not."""
_LATER_CONTEXT_FIELDS = {"clocks": "", "power_limit": "", "origin": "", "measured_again": 0}
_KIND_ORDER = {kind: i for i, kind in enumerate(BLOCK_TYPES)}
_FILE_NAME = re.compile(r"(?P<runtime>[a-z0-9.-]+)-(?P<precision>[a-z0-9]+)-b(?P<batch>\d+)-t(?P<threads>\d+)\.jsonl")


def _block_order(block: Block) -> tuple[Any, ...]:
    return _KIND_ORDER[block.kind], *dataclasses.astuple(block)


def _target_of(path: Path) -> Target | None:
    """The target that a table's path stands for, or None where it is no table's path."""
    match = _FILE_NAME.fullmatch(path.name)
    try:
        return Target(path.parent.name, match["runtime"], match["precision"], int(match["batch"]), int(match["threads"])) if match else None  # type: ignore[arg-type]
    except LowsearchError:
        return None


class _Reader:
    """Reads one table file; every complaint names the file, the line and the command that mends it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0

    def read(self) -> LatencyTable:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self._fail(f"cannot be read: {error.strerror if isinstance(error, OSError) else 'not UTF-8 text'}")
        if not text.endswith("\n"):
            self.line = text.count("\n") + 1
            self._fail("the file ends in the middle of a line")
        lines = text.splitlines()
        self.line = 1
        header = self._parse(lines[0]) if lines else self._fail("the file is empty")
        self._check_fields({"sibling": None, **header}, (*_HEADER_FIELDS, "sibling"))
        if header["schema"] != SCHEMA or header["version"] != VERSION:
            self._fail(f"schema is {header['schema']!r} version {header['version']!r}, expected {SCHEMA!r} version {VERSION}")
        target = self._guarded(lambda: Target.from_dict(header["target"]))
        context = self._context(header["context"])
        entries: dict[Block, BlockLatency] = {}
        calibration: dict[str, list[NetworkLatency]] = {}
        memory: dict[int, MemoryLatency] = {}
        beside: dict[Block, BlockLatency] = {}
        for self.line, line in enumerate(lines[1:], start=2):
            values = self._parse(line)
            if "block" in values:
                self._check_fields(values, ("block", *_BLOCK_FIELDS))
                block = self._guarded(lambda v=values: block_from_dict(v["block"]))
                if block in entries:
                    self._fail(f"a second line for {block}")
                entries[block] = self._block_latency(values)
            elif "sibling_block" in values:
                self._check_fields(values, ("sibling_block", *(f"{state}_ms" for state in STATES)))
                block = self._guarded(lambda v=values: block_from_dict(v["sibling_block"]))
                if block in beside:
                    self._fail(f"a second line for {block} of the sibling")
                times = {f"{state}_ms": self._time(f"{state}_ms", values[f"{state}_ms"]) for state in STATES}
                beside[block] = BlockLatency(**times)  # type: ignore[arg-type]
            elif "memory_bytes" in values:
                read = self._memory(values)
                if read.n_bytes in memory:
                    self._fail(f"a second line for {read.n_bytes} bytes of memory")
                memory[read.n_bytes] = read
            else:
                self._check_fields({**dict.fromkeys(_ENERGY_FIELDS), **values}, ("space", "arch", *_NETWORK_FIELDS))
                if not isinstance(values["space"], str):
                    self._fail(f"space is {values['space']!r}, expected a name")
                row = self._network(values)
                rows = calibration.setdefault(values["space"], [])
                if any(other.arch == row.arch for other in rows):
                    self._fail(f"a second line for network {row.arch.arch_id}")
                rows.append(row)
        self.line = 1
        counts = {"n_memory": len(memory), "n_blocks": len(entries), "n_networks": sum(map(len, calibration.values()))}
        for name, count in counts.items():
            if header[name] != count:
                self._fail(f"the header promises {name} {header[name]!r}, the file has {count}")
        sibling = self._sibling(header.get("sibling"), target, beside)
        return LatencyTable(
            target=target, context=context, entries=entries, calibration={k: tuple(v) for k, v in calibration.items()},
            memory=tuple(memory.values()), sibling=sibling,
        )  # fmt: skip

    def _fail(self, message: str) -> NoReturn:
        target = _target_of(self.path)
        command = target.profile_command if target else "lowsearch profile"
        where = f"{self.path}:{self.line}" if self.line else str(self.path)
        raise TableError(f"{where}: {message}", hint=f"remove the file and measure anew with `{command}`")

    def _guarded(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (LowsearchError, TypeError, ValueError) as error:
            self._fail(error.message if isinstance(error, LowsearchError) else str(error))

    def _parse(self, line: str, fields: Sequence[str] | None = None) -> dict[str, Any]:
        try:
            values = json.loads(line, parse_constant=lambda name: self._fail(f"{name} is no measurement"))
        except json.JSONDecodeError as error:
            self._fail(f"damaged line, not JSON: {error.msg}")
        if not isinstance(values, dict):
            self._fail("a line is no JSON object")
        if fields is not None:
            self._check_fields(values, fields)
        return values

    def _check_fields(self, values: Mapping[str, Any], fields: Sequence[str]) -> None:
        for kind, names in (("unknown", set(values) - set(fields)), ("missing", set(fields) - set(values))):
            if names:
                self._fail(f"{kind} field {min(names)!r}; a line of this kind has {', '.join(fields)}")

    def _context(self, values: Any) -> Context:
        if not isinstance(values, dict):
            self._fail("context is no JSON object")
        # Fields that later versions of lowsearch added have a default, and may be missing.
        self._check_fields({**_LATER_CONTEXT_FIELDS, **values}, [field.name for field in dataclasses.fields(Context)])
        for name in ("versions", "runtime_options"):
            if not isinstance(values[name], dict):
                self._fail(f"context: {name} is no JSON object")
        if not isinstance(values.get("measured_again", 0), int):
            self._fail(f"context: measured_again is {values['measured_again']!r}, expected a whole number")
        return Context(**values if self.path.parent.parent.name != SHIPPED else {**values, "origin": SHIPPED})

    def _sibling(self, values: Any, target: Target, entries: Mapping[Block, BlockLatency]) -> Sibling | None:
        if values is None and not entries:
            return None
        if not isinstance(values, dict):
            self._fail(f"sibling is {values!r}, but the file has {len(entries)} blocks of one")
        self._check_fields(values, (*_SIBLING_FIELDS, "blocks"))
        if values["blocks"] != len(entries):
            self._fail(f"the header promises {values['blocks']!r} blocks of the sibling, the file has {len(entries)}")
        batch = self._guarded(lambda: dataclasses.replace(target, batch=values["batch"])).batch
        if batch == target.batch:
            self._fail(f"the sibling has batch {batch}, as the table itself")
        return Sibling(batch=batch, date_utc=str(values["date_utc"]), sha256=str(values["sha256"]), entries=entries)

    def _block_latency(self, values: Mapping[str, Any]) -> BlockLatency:
        times = {f"{state}_ms": self._time(f"{state}_ms", values[f"{state}_ms"]) for state in STATES}
        samples = {f"{state}_samples_ms": self._samples(f"{state}_samples_ms", values[f"{state}_samples_ms"]) for state in STATES}
        paces = {f"{state}_paces": self._paces(f"{state}_paces", values[f"{state}_paces"]) for state in STATES}
        for state in STATES:
            self._check_statistic(f"{state}_ms", times[f"{state}_ms"], samples[f"{state}_samples_ms"], paces[f"{state}_paces"])
        if values["source"] != "measured":
            self._fail(f"source is {values['source']!r}; a table holds only what was measured")
        wall_over_cpu = self._time("wall_over_cpu", values["wall_over_cpu"])
        return BlockLatency(**times, **samples, **paces, wall_over_cpu=wall_over_cpu)  # type: ignore[arg-type]

    def _memory(self, values: Mapping[str, Any]) -> MemoryLatency:
        self._check_fields(values, ("memory_bytes", *_MEMORY_FIELDS))
        n_bytes = values["memory_bytes"]
        if not isinstance(n_bytes, int) or isinstance(n_bytes, bool) or n_bytes < 1:
            self._fail(f"memory_bytes is {n_bytes!r}, expected a positive whole number")
        read = MemoryLatency(
            n_bytes=n_bytes, latency_ms=self._time("latency_ms", values["latency_ms"]),
            samples_ms=self._samples("samples_ms", values["samples_ms"]),
            wall_over_cpu=self._time("wall_over_cpu", values["wall_over_cpu"]),
        )  # fmt: skip
        self._check_statistic("latency_ms", read.latency_ms, read.samples_ms)
        return read

    def _network(self, values: Mapping[str, Any]) -> NetworkLatency:
        load = values["load_average"]
        row = NetworkLatency(
            arch=self._guarded(lambda: Arch.from_dict(values["arch"])), latency_ms=self._time("latency_ms", values["latency_ms"]),
            samples_ms=self._samples("samples_ms", values["samples_ms"]), paces=self._paces("paces", values["paces"]),
            wall_over_cpu=self._time("wall_over_cpu", values["wall_over_cpu"]),
            load_average=None if load is None else self._number("load_average", load),
            **{name: self._time(name, values[name]) for name in _ENERGY_FIELDS if name in values},
        )  # fmt: skip
        self._check_statistic("latency_ms", row.latency_ms, row.samples_ms, row.paces)
        return row

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            self._fail(f"{name} is {value!r}, expected a number of at least 0")
        return float(value)

    def _time(self, name: str, value: Any) -> float:
        number = self._number(name, value)
        if number == 0:
            self._fail(f"{name} is 0, expected a positive number")
        return number

    def _samples(self, name: str, value: Any) -> tuple[tuple[float, ...], ...]:
        if not isinstance(value, list) or not all(isinstance(rounds, list) and rounds for rounds in value):
            self._fail(f"{name} is {value!r}, expected a list of rounds for every process")
        return tuple(tuple(self._time(name, sample) for sample in rounds) for rounds in value)

    def _paces(self, name: str, value: Any) -> tuple[float, ...]:
        if not isinstance(value, list):
            self._fail(f"{name} is {value!r}, expected a number for every process")
        return tuple(self._time(name, pace) for pace in value)

    def _check_statistic(self, name: str, stated: float, samples: tuple[tuple[float, ...], ...], paces: tuple[float, ...] = ()) -> None:
        if paces and len(paces) != len(samples):
            self._fail(f"{name}: {len(samples)} processes, but {len(paces)} paces")
        if samples and abs(latency_ms(samples, paces) - stated) > 2e-5:  # Both are rounded to 1e-5 ms.
            self._fail(f"{name} is {stated}, but its samples give {latency_ms(samples, paces):.5f}")
