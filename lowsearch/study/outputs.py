"""The plain files of a study, which the report reads: candidates.csv, hypervolume.csv, space_sample.csv, networks.json.

Each is replaced in one step, so that a reader sees the old file or the new one. Columns: docs/formats.md.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch import cost
from lowsearch.arch import Arch
from lowsearch.files import write_atomically
from lowsearch.search import pareto
from lowsearch.search.estimates import AccuracyModel, Estimates, Estimator, excess
from lowsearch.search.objectives import Metric, accuracy_excess
from lowsearch.space import SearchSpace
from lowsearch.study.parts import Parts
from lowsearch.study.settings import StudySettings
from lowsearch.study.storage import Candidate

CANDIDATE_COLUMNS = (
    "number", "arch_id", "name", "origin", "genome", "state", "reason", "rung", "val_accuracy", "accuracy_std", "accuracy_source",
    "accuracy_unit", "score", "score_std", "latency_ms", "latency_std_ms", "latency_source", "throughput_ips", "time_per_image_ms",
    "peak_memory_mb", "artifact_mb", "energy_mj", "energy_source", "macs", "params", "resolution_px", "elapsed_s", "why",
)  # fmt: skip
SAMPLE_COLUMNS = (
    "arch_id", "origin", "val_accuracy", "accuracy_std", "accuracy_source", "accuracy_unit", "latency_ms", "latency_std_ms",
    "latency_source", "throughput_ips", "time_per_image_ms", "peak_memory_mb", "artifact_mb", "macs", "params", "resolution_px",
)  # fmt: skip
N_SAMPLE = 400


def device_columns(parts: Parts) -> tuple[str, ...]:
    """What the tables of a study of several devices hold beyond their usual columns."""
    return ("worst_latency", *(f"latency_ms@{label}" for label in parts.fleet.labels)) if parts.fleet is not None else ()


def device_values(estimates: Estimates) -> list[dict[str, float]]:
    """The columns `latency_ms@…` of n estimated networks; empty ones where there is one device."""
    n = len(estimates.mean["macs"])
    return [{f"latency_ms@{label}": float(mean_ms[i]) for label, (mean_ms, _) in estimates.by_device.items()} for i in range(n)]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` under `columns`; a NaN or None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    write_atomically(path, text.getvalue())


class StudyFiles:
    """Writes the files of one study in progress; `refresh` may be called as often as wished."""

    def __init__(self, folder: Path, settings: StudySettings, parts: Parts, reference_costs: np.ndarray) -> None:
        self._folder, self._settings, self._parts, self._reference = folder, settings, parts, reference_costs
        self._estimator = parts.estimator
        self._networks: dict[str, dict[str, Any]] = {}
        self._last: list[tuple[int, str, str]] | None = None

    def refresh(self, found: Sequence[Candidate]) -> float:
        """Bring the candidates, the hypervolume and the networks up to date; returns the hypervolume now."""
        standing = [(c.number, c.state, str(c.accuracy)) for c in found]
        rows = self._rows(found)
        curve = self._hypervolumes(found, rows)
        if standing != self._last:
            write_csv(self._folder / "candidates.csv", (*CANDIDATE_COLUMNS, *device_columns(self._parts)), rows)
            write_csv(self._folder / "hypervolume.csv", ("elapsed_s", "trial", "hypervolume"), curve)
            self.describe(decode(self._parts.space, c.genome) for c in found)
            self._last = standing
        return float(curve[-1]["hypervolume"]) if curve else 0.0

    def describe(self, archs: Iterable[Arch]) -> None:
        """Add networks to networks.json: their structure, and what every block costs."""
        new = {arch.arch_id: arch for arch in archs if arch.arch_id not in self._networks}
        for arch_id, arch in new.items():
            costs = {item.place: item.cost for item in cost.count(arch).per_block}
            blocks = [
                {"place": share.place, "kind": share.block.kind, "ms": share.ms, "source": share.source}
                | {"macs": costs[share.place].macs, "params": costs[share.place].params}
                for share in self._parts.explain(arch)
            ]
            self._networks[arch_id] = {"arch": arch.to_dict(), "blocks": blocks}
        if new or not (self._folder / "networks.json").exists():
            write_atomically(self._folder / "networks.json", json.dumps(self._networks))

    def write_sample(self, accuracy: AccuracyModel | None) -> None:
        """Some hundred random members of the space, as a background for the plot; `accuracy` predicts theirs, where there is one."""
        genomes = self._parts.space.sample(N_SAMPLE, rng=np.random.default_rng(self._settings.seed))
        genomes = np.unique(genomes, axis=0)
        estimates = self._estimator.estimate(genomes, accuracy)
        rows, by_device = [], device_values(estimates)
        for i, genome in enumerate(genomes):
            arch = decode(self._parts.space, genome)
            row = {metric: values[i] for metric, values in estimates.mean.items()} | by_device[i]
            row |= {"arch_id": arch.arch_id, "origin": "sample", "resolution_px": arch.resolution_px}
            row |= {"latency_std_ms": estimates.std["latency_ms"][i], "latency_source": self._parts.latency_source}
            if accuracy is not None:
                mean = min(max(float(row["accuracy"]), 0.0), 1.0)
                row |= {"val_accuracy": mean, "accuracy_std": estimates.std["accuracy"][i], "accuracy_source": "predicted"}
                row |= {"accuracy_unit": "top1"}
            rows.append(row)
        write_csv(self._folder / "space_sample.csv", (*SAMPLE_COLUMNS, *device_columns(self._parts)), rows)

    def _rows(self, found: Sequence[Candidate]) -> list[dict[str, Any]]:
        if not found:
            return []
        estimates = self._estimator.estimate(np.stack([c.genome for c in found]))
        rows, by_device = [], device_values(estimates)
        for i, c in enumerate(found):
            arch = decode(self._parts.space, c.genome)
            row: dict[str, Any] = {
                "number": c.number, "arch_id": arch.arch_id, "name": c.name, "origin": c.origin, "genome": " ".join(map(str, c.genome)),
                "state": c.state, "reason": c.reason, "rung": c.rung, "elapsed_s": c.elapsed_s, "resolution_px": arch.resolution_px,
                "why": c.why,
                "latency_std_ms": estimates.std["latency_ms"][i], "latency_source": self._parts.latency_source,
                **{metric: values[i] for metric, values in estimates.mean.items()}, **by_device[i],
                "energy_source": "predicted" if "energy_mj" in estimates.mean else "",
            }  # fmt: skip
            if (measured := self._parts.verifications.of(c.genome)) is not None:
                row |= {"latency_std_ms": measured.latency_std_ms, "latency_source": "measured"}
            if c.state == "complete" and not math.isnan(c.accuracy):
                row |= accuracy_columns(self._settings, c.accuracy, c.accuracy_std)
            rows.append(row)
        return rows

    def _hypervolumes(self, found: Sequence[Candidate], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        scored = sorted((pair for pair in zip(found, rows, strict=True) if pair[0].state == "complete"), key=lambda pair: pair[0].elapsed_s)
        if not scored:
            return []
        costs = candidate_costs(self._settings, [c for c, _ in scored], [r for _, r in scored])
        keeps = accuracy_excess(self._settings.limits, np.array([c.accuracy for c, _ in scored])) <= 0
        return [
            {
                "elapsed_s": c.elapsed_s,
                "trial": c.number,
                "hypervolume": pareto.hypervolume(costs[: i + 1][keeps[: i + 1]], self._reference),
            }
            for i, (c, _) in enumerate(scored)
        ]


def accuracy_columns(settings: StudySettings, accuracy: float, std: float) -> dict[str, Any]:
    """The columns that say what is known of a candidate's accuracy: an estimate, however far it was trained, for one training has its luck.

    What stands in for accuracy is a score, never an accuracy.
    """
    if settings.stand_in:
        return {"score": accuracy, "score_std": std or None, "accuracy_source": settings.stand_in, "accuracy_unit": "rank"}
    value = min(max(accuracy, 0.0), 1.0)
    return {"val_accuracy": value, "accuracy_std": std, "accuracy_source": "estimated", "accuracy_unit": "top1"}


def candidate_costs(settings: StudySettings, found: Sequence[Candidate], rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Costs (n, n_objectives) of scored candidates, from the estimate of their accuracy and their predicted latency."""
    known: list[Metric] = [metric for metric in settings.objectives.metrics if metric != "accuracy"]
    values: dict[Metric, np.ndarray] = {metric: np.array([row[metric] for row in rows], dtype=float) for metric in known}
    values["accuracy"] = np.array([c.accuracy for c in found])
    return settings.objectives.costs(values)


def keeps_limits(settings: StudySettings, estimator: Estimator, found: Sequence[Candidate]) -> np.ndarray:
    """Mask (n,) of scored candidates within all limits, the estimated accuracy among them."""
    estimates = estimator.estimate(np.stack([c.genome for c in found])) if found else None
    if estimates is None:
        return np.zeros(0, dtype=bool)
    keeps_accuracy = accuracy_excess(settings.limits, np.array([c.accuracy for c in found])) <= 0
    return (excess(estimates, settings.limits) == 0) & keeps_accuracy


@cache
def _decoded(space: SearchSpace, genome: bytes) -> Arch:
    return space.decode(np.frombuffer(genome, dtype=np.int8))


def decode(space: SearchSpace, genome: np.ndarray) -> Arch:
    """`space.decode`, remembered: files are written again and again while a study runs."""
    return _decoded(space, genome.astype(np.int8).tobytes())


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else f"{float(value):.8g}"
    return value
