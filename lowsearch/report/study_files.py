"""A study's plain files as values: what `lowsearch run` leaves in studies/NAME/, without Optuna, torch or drawing.

A study in progress has written only some of the files. A missing file is an empty tuple here and is named in `StudyFiles.missing`; a
damaged one raises StudyError with the file, the line and the column. Numbers that a row does not give are NaN.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lowsearch.errors import StudyError, UsageError
from lowsearch.search.objectives import parse_objectives

NAN = float("nan")
FAMILY = "family"
"""`Network.origin` of the hand-made members; every other origin is the search's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One row of candidates.csv, shortlist.csv, finalists.csv, front.csv or space_sample.csv. Accuracies are fractions."""

    arch_id: str = ""
    name: str = ""
    origin: str = ""
    state: str = ""
    rung: float = NAN
    """Fraction of the full training schedule that the accuracy comes from."""
    val_accuracy: float = NAN
    test_accuracy: float = NAN
    accuracy_std: float = NAN
    accuracy_std_origin: str = ""
    accuracy_source: str = ""
    accuracy_unit: str = ""
    """`top1`, or `rank` where a score stands in for accuracy."""
    score: float = NAN
    """Stands in for accuracy in a study without training, and is never called accuracy; `accuracy_source` says what it is."""
    score_std: float = NAN
    latency_ms: float = NAN
    latency_std_ms: float = NAN
    latency_source: str = ""
    predicted_latency_ms: float = NAN
    limit_ms: float = NAN
    over_limit: bool = False
    throughput_ips: float = NAN
    time_per_image_ms: float = NAN
    worst_latency: float = NAN
    """Over all devices of a study of several, on their common scale."""
    by_device: Mapping[str, float] = field(default_factory=dict, hash=False, compare=False)
    """latency_ms by the label of the device, where there are several; `latency_ms` is that of the first."""
    peak_memory_mb: float = NAN
    artifact_mb: float = NAN
    energy_mj: float = NAN
    """Of one pass; known where the device counts it."""
    energy_source: str = ""
    macs: float = NAN
    params: float = NAN
    resolution_px: float = NAN
    on_front: bool = False
    breaks: str = ""
    """The limits that a finalist breaks."""
    weights: str = ""
    elapsed_s: float = NAN
    why: str = ""
    """Why the search proposed it, and why its training stopped early."""

    @property
    def is_family(self) -> bool:
        return self.origin == FAMILY

    @property
    def label(self) -> str:
        """The name of a named network, else its arch_id."""
        return self.name or self.arch_id


@dataclass(frozen=True, slots=True)
class HypervolumePoint:
    """The hypervolume of everything known `elapsed_s` seconds into the search, after trial number `trial`."""

    elapsed_s: float
    trial: float
    hypervolume: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """One line of regret.csv: a network of a front, on one device."""

    front: str
    """`shared`, or the label of the device whose own front it is."""
    arch_id: str
    device: str
    latency_ms: float
    regret: float
    """Latency over that of the fastest network that is no worse in anything else."""
    worst_regret: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFiles:
    """Everything the report reads of one study."""

    folder: Path
    settings: Mapping[str, Any]
    candidates: tuple[Network, ...] = ()
    finalists: tuple[Network, ...] = ()
    front: tuple[Network, ...] = ()
    shortlist: tuple[Network, ...] = ()
    """What was measured on the device before the finalists were chosen; none where it was not attached."""
    sample: tuple[Network, ...] = ()
    hypervolume: tuple[HypervolumePoint, ...] = ()
    regrets: tuple[Regret, ...] = ()
    """What sharing one network costs on every device; none where there is one."""
    networks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """arch_id -> {arch: Arch.to_dict(), blocks: [{place, kind, ms, source, macs, params}]}"""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """What `lowsearch run` summed up at its end; empty before."""
    trust: Mapping[str, Any] = field(default_factory=dict)
    """What `lowsearch trust` found; empty where it was not asked."""
    trust_band: Mapping[str, Any] = field(default_factory=dict)
    """The same inside one band of latency."""
    missing: tuple[str, ...] = ()

    @property
    def pace(self) -> float:
        """How many times slower the machine was when the shortlist was measured than when its table was; NaN where not known."""
        return float(self.settings.get("pace", NAN))

    @property
    def name(self) -> str:
        return str(self.settings.get("name") or self.folder.resolve().name)


def read_study(folder: Path) -> StudyFiles:
    """The files of the study in `folder`. Raises StudyError where there is no study, or where a file is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise StudyError(f"no study at {folder}", hint="lowsearch run --objective acc-latency --study NAME")
    if not (folder / "study.yaml").exists():
        raise StudyError(f"{folder} holds no study.yaml, so it is not a study", hint=f"lowsearch run --study {folder.name}")
    missing: list[str] = []

    def read_csv(name: str) -> tuple[Network, ...]:
        return tuple(_table(folder / name, _network, missing))

    return StudyFiles(
        folder=folder,
        settings=_settings(folder / "study.yaml"),
        candidates=read_csv("candidates.csv"),
        finalists=read_csv("finalists.csv"),
        front=read_csv("front.csv"),
        shortlist=tuple(_table(folder / "shortlist.csv", _network, [])),
        sample=read_csv("space_sample.csv"),
        hypervolume=tuple(_table(folder / "hypervolume.csv", _hypervolume_point, missing)),
        regrets=tuple(_table(folder / "regret.csv", _regret, [])),
        networks=_networks(folder / "networks.json", missing),
        summary=_mapping(folder / "summary.json"),
        trust=_mapping(folder / "trust.json", "verdict", "reason", "signals"),
        trust_band=_mapping(folder / "trust-band.json", "verdict", "reason", "signals", "within"),
        missing=tuple(missing),
    )


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise StudyError(f"{path} holds {type(values).__name__}, expected a mapping of settings")
    try:
        parse_objectives(str(values.get("objective", "acc-latency")))
    except UsageError as error:
        raise StudyError(f"{path}: {error.message}", hint=error.hint) from error
    for name, numeric in (("images", True), ("versions", False), ("latency_table", False), ("spent_s", True), ("reference_point", True)):
        entries = values.get(name) or {}
        if not isinstance(entries, dict) or (numeric and not all(isinstance(v, int | float) for v in entries.values())):
            raise StudyError(f"{path}: {name} is {entries!r}, expected a mapping{' of names to numbers' if numeric else ''}")
    devices = values.get("devices") or []
    if not isinstance(devices, list) or not all(isinstance(d, dict) and {"device", "latency_source"} <= d.keys() for d in devices):
        raise StudyError(f"{path}: devices is {devices!r}, expected a list of mappings with device and latency_source")
    if not isinstance(values.get("pace", 1.0), int | float):
        raise StudyError(f"{path}: pace is {values['pace']!r}, expected a number")
    return values


def _mapping(path: Path, *required: str) -> Mapping[str, Any]:
    """The JSON object in `path`, with at least the `required` keys; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not JSON: {error}", hint=_again(path)) from error
    if not isinstance(values, dict) or not set(required) <= values.keys():
        raise StudyError(f"{path}: expected a mapping{' with ' * bool(required)}{', '.join(required)}", hint=_again(path))
    return values


def _networks(path: Path, missing: list[str]) -> Mapping[str, Mapping[str, Any]]:
    if not path.exists():
        missing.append(path.name)
    values = _mapping(path)
    if not all(isinstance(v, dict) and {"arch", "blocks"} <= v.keys() for v in values.values()):
        raise StudyError(f"{path}: expected a mapping of arch_id to arch and blocks", hint=_again(path))
    return values


_Line = TypeVar("_Line")


def _table(path: Path, parse: Callable[[_Row], _Line], missing: list[str]) -> Iterable[_Line]:
    if not path.exists():
        missing.append(path.name)
        return
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file, strict=True)
            for values in lines:
                if None in values or None in values.values():
                    raise StudyError(f"{path}, line {lines.line_num}: expected {len(lines.fieldnames or ())} values", hint=_again(path))
                yield parse(_Row(path, lines.line_num, values))
    except (csv.Error, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not a CSV table: {error}", hint=_again(path)) from error


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of a CSV file; its readers say where a value that does not fit stands."""

    path: Path
    line: int
    values: Mapping[str, str]

    def text(self, column: str) -> str:
        return self.values.get(column) or ""

    def number(self, column: str, *, least: float = -math.inf) -> float:
        text = self.text(column)
        if not text:
            return NAN
        try:
            value = float(text)
        except ValueError:
            value = math.inf
        # NaN is how a writer says "not known"; an infinite or negative time is a damaged file.
        if math.isnan(value):
            return NAN
        if math.isinf(value) or value < least:
            raise self.error(column, f"a number of at least {least:g}" if math.isfinite(least) else "a number")
        return value

    def fraction(self, column: str) -> float:
        value = self.number(column)
        if value < 0 or value > 1:
            raise self.error(column, "a fraction between 0 and 1")
        return value

    def flag(self, column: str) -> bool:
        text = self.text(column).lower()
        if text not in ("", "true", "false", "1", "0"):
            raise self.error(column, "true or false")
        return text in ("true", "1")

    def error(self, column: str, expected: str) -> StudyError:
        return StudyError(f"{self.path}, line {self.line}: {column} is {self.text(column)!r}, expected {expected}", hint=_again(self.path))


def _network(row: _Row) -> Network:
    return Network(
        arch_id=row.text("arch_id"),
        name=row.text("name"),
        origin=row.text("origin"),
        state=row.text("state"),
        rung=row.fraction("rung"),
        val_accuracy=row.fraction("val_accuracy"),
        test_accuracy=row.fraction("test_accuracy"),
        accuracy_std=row.number("accuracy_std", least=0),
        accuracy_std_origin=row.text("accuracy_std_origin"),
        accuracy_source=row.text("accuracy_source"),
        accuracy_unit=row.text("accuracy_unit") or _unit_before(row),
        score=row.number("score"),
        score_std=row.number("score_std", least=0),
        latency_ms=row.number("latency_ms", least=0),
        latency_std_ms=row.number("latency_std_ms", least=0),
        latency_source=row.text("latency_source"),
        predicted_latency_ms=row.number("predicted_latency_ms", least=0),
        limit_ms=row.number("limit_ms", least=0),
        over_limit=row.flag("over_limit"),
        throughput_ips=row.number("throughput_ips", least=0),
        time_per_image_ms=row.number("time_per_image_ms", least=0),
        worst_latency=row.number("worst_latency", least=0),
        by_device={name.partition("@")[2]: row.number(name, least=0) for name in row.values if name.startswith("latency_ms@")},
        peak_memory_mb=row.number("peak_memory_mb", least=0),
        artifact_mb=row.number("artifact_mb", least=0),
        energy_mj=row.number("energy_mj", least=0),
        energy_source=row.text("energy_source"),
        macs=row.number("macs", least=0),
        params=row.number("params", least=0),
        resolution_px=row.number("resolution_px", least=0),
        on_front=row.flag("on_front"),
        breaks=row.text("breaks"),
        weights=row.text("weights"),
        elapsed_s=row.number("elapsed_s", least=0),
    )


def _unit_before(row: _Row) -> str:
    """Of a study from before its files stated it."""
    return "rank" if row.text("score") else "top1" if row.text("accuracy_source") else ""


def _regret(row: _Row) -> Regret:
    return Regret(
        front=row.text("front"), arch_id=row.text("arch_id"), device=row.text("device"), latency_ms=row.number("latency_ms", least=0),
        regret=row.number("regret", least=0), worst_regret=row.number("worst_regret", least=0),
    )  # fmt: skip


def _hypervolume_point(row: _Row) -> HypervolumePoint:
    return HypervolumePoint(row.number("elapsed_s", least=0), row.number("trial", least=0), row.number("hypervolume", least=0))


def _again(path: Path) -> str:
    return f"lowsearch run --study {path.parent.name}   continues the study and writes its files again"
