"""What it costs to train one network for several devices, instead of one for each.

The regret of a network on a device: how many times slower it is there than the fastest network scored that is no worse in anything
else. Both latencies and both scores are the search's estimates, so like is compared with like. Written to regret.csv, a line for every
network and device, for the front of the study and for the front of every device alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch.search import pareto
from lowsearch.search.objectives import Metric
from lowsearch.study.outputs import accuracy_columns, decode, write_csv
from lowsearch.study.parts import Parts
from lowsearch.study.settings import StudySettings
from lowsearch.study.storage import Candidate

SHARED = "shared"
"""`front` of the networks that are meant for all devices."""
COLUMNS = (
    "front", "arch_id", "name", "origin", "val_accuracy", "score", "device", "latency_ms", "latency_source", "regret", "worst_regret",
    "best_arch_id", "best_latency_ms",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Regrets:
    """Of n networks on d devices."""

    regret: np.ndarray
    """(n, d): latency over that of `best`; 1 where no network is faster at no loss."""
    best: np.ndarray
    """(n, d): the index of the fastest network that is no worse in anything else."""
    fronts: np.ndarray
    """(n, d): whether the network is on the front of that device alone."""


def regrets(others: np.ndarray, latency_ms: np.ndarray) -> Regrets:
    """Regrets of networks by `latency_ms` (n, d) and by their costs in everything else, `others` (n, k)."""
    n, d = latency_ms.shape
    best = np.zeros((n, d), dtype=int)
    for i in range(n):
        no_worse = np.flatnonzero((others <= others[i]).all(axis=1))
        best[i] = no_worse[latency_ms[no_worse].argmin(axis=0)]
    regret = latency_ms / np.take_along_axis(latency_ms, best, axis=0)
    fronts = np.stack([pareto.non_dominated(np.column_stack([others, latency_ms[:, j]])) for j in range(d)], axis=1)
    return Regrets(regret=regret, best=best, fronts=fronts)


def write_regret(
    folder: Path, settings: StudySettings, parts: Parts, found: Sequence[Candidate], front: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Write regret.csv of the scored candidates `found` and the rows of front.csv; returns what summary.json says of it.

    None where the study has one device, or does not search for worst-case latency.
    """
    metrics: list[Metric] = [metric for metric in settings.objectives.metrics if metric != "worst_latency"]
    known = [c for c in found if c.state == "complete" and not ("accuracy" in metrics and math.isnan(c.accuracy))]
    if parts.fleet is None or len(metrics) == len(settings.objectives) or not known:
        return None
    estimates = parts.prediction.estimate(np.stack([c.genome for c in known]))
    labels = parts.fleet.labels
    latency_ms = np.stack([estimates.by_device[label][0] for label in labels], axis=1)
    values = {**estimates.mean, "accuracy": np.array([c.accuracy for c in known])}
    others = np.stack([o.cost(values[o.metric]) for o in settings.objectives if o.metric in metrics], axis=1)
    result = regrets(others, latency_ms)
    arch_ids = [decode(parts.space, c.genome).arch_id for c in known]
    on_front = {row["arch_id"] for row in front}
    members = {SHARED: np.array([arch_id in on_front for arch_id in arch_ids], dtype=bool)}
    members |= {label: result.fronts[:, j] for j, label in enumerate(labels)}
    rows: list[dict[str, Any]] = []
    for name, mask in members.items():
        for i in sorted(np.flatnonzero(mask), key=lambda i: float(values["worst_latency"][i])):
            c = known[i]
            accuracy = {} if math.isnan(c.accuracy) else accuracy_columns(settings, c.accuracy, c.accuracy_std)
            for j, label in enumerate(labels):
                rows.append(
                    accuracy
                    | {
                        "front": name, "arch_id": arch_ids[i], "name": c.name, "origin": c.origin, "device": label,
                        "latency_ms": latency_ms[i, j], "latency_source": parts.sources[label], "regret": result.regret[i, j],
                        "worst_regret": result.regret[i].max(), "best_arch_id": arch_ids[result.best[i, j]],
                        "best_latency_ms": latency_ms[result.best[i, j], j],
                    }
                )  # fmt: skip
    write_csv(folder / "regret.csv", COLUMNS, rows)
    return {"devices": list(labels), "fronts": {name: _summed(result.regret[mask], labels) for name, mask in members.items()}}


def _summed(regret: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Of a front's regrets (n, d): geometric means by device, and of the worst of every network; and the very worst."""
    worst = regret.max(axis=1) if len(regret) else np.zeros(0)
    return {
        "networks": len(regret),
        "mean_regret": {label: _mean(regret[:, j]) for j, label in enumerate(labels)},
        "mean_worst_regret": _mean(worst),
        "worst_regret": float(worst.max()) if len(worst) else None,
    }  # fmt: skip


def _mean(ratios: np.ndarray) -> float | None:
    return float(np.exp(np.log(ratios).mean())) if len(ratios) else None
