"""Studies as values, from their plain files alone: a list of them, one in short, all its networks in one file, two compared."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch import locations
from lowsearch.errors import StudyError, UsageError
from lowsearch.files import write_atomically
from lowsearch.report import tables
from lowsearch.report.study_files import Network, StudyFiles, read_study
from lowsearch.search import pareto

SETTINGS = ("device", "runtime", "precision", "batch", "threads", "space", "data", "objective", "sampler", "seed", "recipe", "accuracy")
TARGET = ("device", "runtime", "precision", "batch", "threads")


def list_studies() -> list[dict[str, Any]]:
    """Every study that can be found, by name: what it searched, how far it is, and what it found. A damaged one says so."""
    rows = []
    for folder in locations.folders("studies"):
        for path in sorted(folder.glob("*/study.yaml")):
            if any(row["name"] == path.parent.name for row in rows):
                continue  # `--study NAME` means the one found first.
            try:
                rows.append({"name": path.parent.name, **_in_short(read_study(path.parent)), "folder": str(path.parent)})
            except StudyError as error:
                rows.append({"name": path.parent.name, "folder": str(path.parent), "problem": error.message})
    return sorted(rows, key=lambda row: row["name"])


def show(study: StudyFiles) -> dict[str, Any]:
    """Settings, counts and the front of `study`, JSON-ready."""
    return {
        "name": study.name, **_in_short(study), "settings": {name: study.settings.get(name) for name in (*SETTINGS, "limits")},
        "images": study.settings.get("images"), "candidates": tables.candidate_counts(study), "finalists": len(study.finalists),
        "trained": tables.finals_are_known(study), "spent_s": tables.spent_seconds(study),
        "front": [_values(network) for network in tables.best_known_front(study)],
    }  # fmt: skip


def export(study: StudyFiles, path: Path) -> int:
    """Write every candidate and finalist of `study` with its architecture to a .csv or .json file; returns how many rows.

    A finalist that was a candidate has two rows: what the search estimated, and what the final training and measurement gave.
    Raises UsageError on another kind of file.
    """
    if path.suffix not in (".csv", ".json"):
        raise UsageError(f"cannot export to {path.name}: known are .csv and .json", hint=f"--out {path.stem or study.name}.csv")
    rows = [
        {"role": role, **_values(network), "arch": (study.networks.get(network.arch_id) or {}).get("arch")}
        for role, networks in (("candidate", study.candidates), ("finalist", study.finalists))
        for network in networks
    ]
    if path.suffix == ".json":
        write_atomically(path, json.dumps({"study": study.name, "settings": dict(study.settings), "networks": rows}, indent=1) + "\n")
        return len(rows)
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row)) or ["role", *_values(Network()), "arch"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "arch": json.dumps(row["arch"], separators=(",", ":")) if row["arch"] else ""} for row in rows)
    write_atomically(path, text.getvalue())
    return len(rows)


def diff(first: StudyFiles, second: StudyFiles) -> dict[str, Any]:
    """Which settings differ, and how the fronts compare: hypervolume up to the worse of the two reference points, who dominates whom.

    Raises UsageError where the studies search for different things or have no front. `caveats` says what makes the comparison unfair.
    """
    if tables.objectives(first) != tables.objectives(second):
        raise UsageError(
            f"{first.name} searches for {tables.objectives(first)}, {second.name} for {tables.objectives(second)}",
            hint="compare studies of one --objective",
        )
    fronts = [tables.best_known_front(study) for study in (first, second)]
    for study, front in zip((first, second), fronts, strict=True):
        if not front:
            if tables.finals_are_known(study):
                raise StudyError(f"study {study.name!r} has no front: no network kept its limits", hint="compare studies that have one")
            raise StudyError(f"study {study.name!r} has no front yet", hint=f"lowsearch run --study {study.name}")
    wanted, accuracy = tables.objectives(first), tables.comparable_accuracy(*fronts[0], *fronts[1])

    def costs(networks: Sequence[Network]) -> np.ndarray:
        values = [{**tables.search_values(n), **({"accuracy": accuracy(n)} if math.isfinite(accuracy(n)) else {})} for n in networks]
        return wanted.costs(np.array([[row[metric] for metric in wanted.metrics] for row in values]))

    first_costs, second_costs = costs(fronts[0]), costs(fronts[1])
    reference = np.maximum(_reference_costs(first), _reference_costs(second))
    return {
        "settings": {
            name: [first.settings.get(name), second.settings.get(name)]
            for name in (*SETTINGS, "limits", "budget", "data_hash")
            if first.settings.get(name) != second.settings.get(name)
        },
        "caveats": _caveats(first, second, fronts),
        "accuracy_on": accuracy.split,
        "fronts": [
            _against(study, front, own, other_front, other, reference)
            for study, front, own, other_front, other in (
                (first, fronts[0], first_costs, fronts[1], second_costs),
                (second, fronts[1], second_costs, fronts[0], first_costs),
            )
        ],
    }


def _in_short(study: StudyFiles) -> dict[str, Any]:
    return {
        "created": study.settings.get("created"), "device": study.settings.get("device"), "runtime": study.settings.get("runtime"),
        "space": study.settings.get("space"), "objective": study.settings.get("objective"),
        "scored": len(tables.scored_candidates(study)), "front": len(tables.best_known_front(study)),
        "hypervolume": study.hypervolume[-1].hypervolume if study.hypervolume else None,
    }  # fmt: skip


def _against(
    study: StudyFiles, front: Sequence[Network], own: np.ndarray, other_front: Sequence[Network], other: np.ndarray, reference: np.ndarray
) -> dict[str, Any]:
    """One front beside another: which of its members something of the other dominates, and which clearly so."""
    dominated = {n.arch_id: [o.arch_id for o, by in zip(other_front, _dominates(other, cost), strict=True) if by]
                 for n, cost in zip(front, own, strict=True)}  # fmt: skip
    return {
        "name": study.name, "networks": len(front), "hypervolume": pareto.hypervolume(own, reference),
        "dominated": sum(map(bool, dominated.values())),
        "clearly": sum(any(tables.clearly_better(o, n) for o in other_front) for n in front),
        "dominated_by": {arch_id: by for arch_id, by in dominated.items() if by},
    }  # fmt: skip


def _dominates(costs: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Which rows of `costs` (n, k) are no worse than `point` (k,) in all columns and better in one, (n,)."""
    return np.logical_and((costs <= point).all(axis=1), (costs < point).any(axis=1))


def _reference_costs(study: StudyFiles) -> np.ndarray:
    wanted, values = tables.objectives(study), study.settings.get("reference_point") or {}
    if not set(wanted.metrics) <= values.keys():
        raise StudyError(f"study {study.name!r} has no reference point", hint=f"{study.folder / 'study.yaml'} is of another version")
    return wanted.costs(np.array([[values[metric] for metric in wanted.metrics]]))[0]


def _caveats(first: StudyFiles, second: StudyFiles, fronts: Sequence[Sequence[Network]]) -> list[str]:
    """Why numbers of the two may not mean the same."""
    found = []
    metrics = tables.objectives(first).metrics

    def differ(names: Sequence[str]) -> list[str]:
        return [name for name in names if first.settings.get(name) != second.settings.get(name)]

    timed = tables.objectives(first).is_timed or "energy_mj" in metrics
    if timed and differ(TARGET):
        found.append(f"latencies of different targets ({', '.join(differ(TARGET))})")
    if {"peak_memory_mb", "artifact_mb"} & {*metrics} and differ(("precision", "batch")):
        found.append(f"memory and size at different {' and '.join(differ(('precision', 'batch')))}")
    if "accuracy" in metrics and differ(("data_hash", "recipe", "accuracy")):
        found.append(f"accuracies of different {', '.join(differ(('data_hash', 'recipe', 'accuracy')))}")
    sources = [Counter(n.latency_source for n in front) for front in fronts]
    if timed and set(sources[0]) != set(sources[1]):
        found.append(f"latencies {' and '.join(sources[0])} against {' and '.join(sources[1])}")
    if tables.finals_are_known(first) != tables.finals_are_known(second):
        found.append("one front is trained, the other is the search's estimate")
    return found


def _values(network: Network) -> Mapping[str, Any]:
    """The row of a network; what is not known is None. With several devices, it has a latency on each and the worst case."""
    values = dataclasses.asdict(network)
    by_device = values.pop("by_device")
    if by_device:
        values |= {f"latency_ms@{device}": ms for device, ms in by_device.items()}
    else:
        del values["worst_latency"]
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}
