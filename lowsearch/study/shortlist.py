"""Between search and finals: the best candidates are measured on the device, so that who is trained is chosen by real latency.

A prediction is off by some percent, and a limit does not forgive them. Measuring a network takes a second, training it ten times as
long; so more are measured than are trained, side by side in fresh processes, and a network over its limit is not trained.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowsearch.arch import Arch
from lowsearch.errors import StudyError
from lowsearch.files import write_atomically
from lowsearch.latency.pace import DISTURBED, pace_since
from lowsearch.search import pareto
from lowsearch.search.objectives import LATENCY_METRICS, Limit, Metric, of_latency
from lowsearch.search.verification import Measured
from lowsearch.study.outputs import candidate_costs, decode, keeps_limits, write_csv
from lowsearch.study.parts import Parts, Progress
from lowsearch.study.settings import StudySettings
from lowsearch.study.storage import Candidate

MEASUREMENTS = "measurements.json"
MAX_SHORTLISTED = 24
MAX_TRIES = 3
"""Measurements of the shortlist while the machine is disturbed; the quietest counts."""
PAUSE_S = 20.0
"""Before another try."""
N_DRAWS = 64
_STREAM = 1_000_037
"""Keeps these random numbers apart from the study's own."""
COLUMNS = (
    "arch_id", "name", "origin", "latency_ms", "latency_std_ms", "latency_source", "predicted_latency_ms", "limit_ms", "over_limit",
    "energy_mj",
)  # fmt: skip
_RAW = ("samples_ms", "paces", "wall_over_cpu", "load_average", "energy_mj", "idle_power_w")


class Measurement(NamedTuple):
    """The latency of one network on the device, beside what the search had predicted."""

    latency_ms: float
    latency_std_ms: float
    predicted_latency_ms: float
    energy_mj: float = math.nan
    """Of one pass, where the device counts it."""
    worst_latency: float = math.nan
    """Over all devices of a study of several, by this measurement and the predictions of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What the device said of the shortlist."""

    networks: Mapping[str, Measurement] = field(default_factory=dict)
    """By arch_id; empty where the device is not attached."""
    pace: float = math.nan
    """How many times longer the table's own networks took than when the table was measured; NaN where not known."""

    @classmethod
    def load(cls, folder: Path) -> Measurements | None:
        """Those of the study in `folder`, None where nothing was measured. Raises StudyError on a damaged file."""
        path = folder / MEASUREMENTS
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            networks = {
                str(row["arch_id"]): Measurement(**{name: float(row[name]) for name in Measurement._fields if row.get(name) is not None})
                for row in values["networks"]
            }
            return cls(networks=networks, pace=math.nan if values["pace"] is None else float(values["pace"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{path} is damaged: {error}", hint="remove the file and run the study again: the shortlist is measured anew"
            ) from error


def shortlist(settings: StudySettings, parts: Parts, found: Sequence[Candidate], reference_costs: np.ndarray) -> list[Candidate]:
    """The family, and up to MAX_SHORTLISTED of the search's own networks that by all estimates keep the limits, the best cover first."""
    estimator = parts.estimator
    scored = [c for c in found if c.state == "complete" and (not math.isnan(c.accuracy) or "accuracy" not in settings.objectives.metrics)]
    allowed = [c for c, good in zip(scored, keeps_limits(settings, estimator, scored), strict=True) if good]
    proposals = [c for c in allowed if c.origin != "family"]
    family = [c for c in found if c.origin == "family" and c.state != "pruned"]
    nothing = Measurements()
    return family + best_cover(
        settings, parts, proposals, nothing, reference_costs, at_least=MAX_SHORTLISTED, at_most=MAX_SHORTLISTED
    )  # fmt: skip


def best_cover(
    settings: StudySettings,
    parts: Parts,
    found: Sequence[Candidate],
    measured: Measurements,
    reference_costs: np.ndarray,
    *,
    at_least: int,
    at_most: int,
) -> list[Candidate]:
    """Those of `found` that together may be expected to cover most hypervolume, at most `at_most`, in the order of their numbers.

    The expectation is over N_DRAWS joint draws of their accuracies, each from its estimate and standard deviation, with latency as
    measured or predicted. By the estimates alone, one flattering estimate would shut out what it dominates. Where fewer than `at_least`
    add volume, the best cover of the rest fills up, layer by layer.
    """
    if not found:
        return []
    estimator = parts.estimator
    estimates = estimator.estimate(np.stack([c.genome for c in found]))
    known = [measured.networks.get(decode(parts.space, c.genome).arch_id) for c in found]
    latency_ms = [expected if m is None else m.latency_ms for m, expected in zip(known, estimates.mean["latency_ms"], strict=True)]
    mean = dict(estimator.as_measured(estimates, np.array(latency_ms)).mean)
    if "energy_mj" in mean:
        known_mj = [math.nan if m is None else m.energy_mj for m in known]
        mean["energy_mj"] = np.where(np.isnan(known_mj), mean["energy_mj"], known_mj)
    costs = candidate_costs(settings, found, [{metric: values[i] for metric, values in mean.items()} for i in range(len(found))])
    draws = _draws(settings, costs, np.array([c.accuracy_std for c in found]))
    chosen: list[int] = []
    rest = list(range(len(found)))
    while rest and len(chosen) < at_least:
        layer = [rest[i] for i in pareto.greedy_cover(draws[:, rest], reference_costs, (at_least if chosen else at_most) - len(chosen))]
        if not layer:
            break
        chosen += layer
        rest = [i for i in rest if i not in layer]
    return sorted((found[i] for i in chosen), key=lambda c: c.number)


def _draws(settings: StudySettings, costs: np.ndarray, std: np.ndarray) -> np.ndarray:
    """What `costs` (n, k) may turn out to be, (m, n, k), m of 1 where nothing is in doubt; repeatable, by the study's seed.

    Where nothing is trained, a score is all that will be known of a network.
    """
    if settings.objectives.metrics[0] != "accuracy" or settings.stand_in or not np.nan_to_num(std).any():
        return costs[None]
    noise = np.random.default_rng([settings.seed, _STREAM]).normal(size=(N_DRAWS, len(costs)))
    draws = np.repeat(costs[None], N_DRAWS, axis=0)
    draws[:, :, 0] += noise * np.nan_to_num(std)
    return draws


def measure(folder: Path, parts: Parts, archs: Sequence[Arch], progress: Progress | None) -> Measurements:
    """Measure `archs` side by side and keep it, so that a resume does not measure again; nothing where the device is not attached.

    Some networks of the latency table are measured among them: how much slower they are now is the pace of the machine. A machine that
    is slower than DISTURBED slows some networks down more than others, so then all are measured again, up to MAX_TRIES times.
    """
    if parts.measure is None or not archs:
        return Measurements()
    stored = Measurements.load(folder)
    if stored is not None and stored.networks.keys() >= {arch.arch_id for arch in archs}:
        return stored
    anchors = [(arch, then_ms) for arch, then_ms in parts.anchors if arch not in archs]
    tries: list[tuple[float, Sequence[Measured]]] = []
    while not tries or (tries[-1][0] > DISTURBED and len(tries) < MAX_TRIES):
        label = "measure the shortlist"
        if tries:
            label += f" again, the machine was {100 * (tries[-1][0] - 1):.0f} % slower than usual"
            time.sleep(PAUSE_S)
        told: Progress | None = None if progress is None else partial(_labelled, progress, label)
        timed = parts.measure([*archs, *(arch for arch, _ in anchors)], told)
        pace = pace_since([latency.latency_ms for latency in timed[len(archs) :]], [then_ms for _, then_ms in anchors])
        tries.append((pace, timed))
    pace, measured = min(tries, key=lambda tried: tried[0])
    predicted = parts.prediction.estimate(np.stack([parts.space.encode(arch) for arch in archs]))
    measured_ms = np.array([latency.latency_ms for latency in measured[: len(archs)]])
    worst = parts.prediction.as_measured(predicted, measured_ms).mean.get("worst_latency")
    rows: list[dict[str, Any]] = []
    for i, (arch, latency) in enumerate(zip(archs, measured, strict=False)):
        row: dict[str, Any] = {"arch_id": arch.arch_id, "latency_ms": latency.latency_ms, "latency_std_ms": latency.latency_std_ms}
        row |= {"predicted_latency_ms": predicted.mean["latency_ms"][i], "predicted_latency_std_ms": predicted.std["latency_ms"][i]}
        row |= {name: getattr(latency, name) for name in _RAW if getattr(latency, name, None) is not None}
        row |= {"worst_latency": worst[i]} if worst is not None else {}
        rows.append(row)
    content = {"pace": None if math.isnan(pace) else pace, "anchors": len(anchors), "tries": len(tries), "networks": rows}
    write_atomically(folder / MEASUREMENTS, json.dumps(content, indent=1, default=float) + "\n")
    found = Measurements.load(folder)
    assert found is not None
    return found


def _labelled(progress: Progress, label: str, done: int, total: int, _: str) -> None:
    progress(done, total, label)


def broken_limits(settings: StudySettings, measured: Measurement) -> dict[Limit, float]:
    """The study's limits that a network breaks by what was measured of it (latency, throughput, time per image, energy, the worst case of
    several devices), each by which fraction of its bound.
    """
    values: dict[Metric, float] = {metric: of_latency(metric, measured.latency_ms, settings.batch) for metric in LATENCY_METRICS}
    values |= {"energy_mj": measured.energy_mj, "worst_latency": measured.worst_latency}
    excess = {x: float(x.excess(np.array(values[x.metric]))) / x.bound for x in settings.measured_limits if x.metric in values}
    return {limit: by for limit, by in excess.items() if by > 0}


def why_none_is_left(settings: StudySettings, parts: Parts, measured: Measurements) -> str:
    """One line where each of the search's own networks broke a limit when it was measured, with the nearest; empty where one kept all."""
    family = {arch.arch_id for arch in parts.space.family.values()}
    broken = {arch_id: broken_limits(settings, m) for arch_id, m in measured.networks.items() if arch_id not in family}
    if not broken or not all(broken.values()):
        return ""
    nearest = min(broken, key=lambda arch_id: max(broken[arch_id].values()))
    misses = ", ".join(f"{limit} by {100 * by:.1f} %" for limit, by in broken[nearest].items())
    return (
        f"all {len(broken)} shortlisted networks broke a limit when they were measured, so none of the search's own is a finalist; the "
        f"nearest, {nearest}, takes {measured.networks[nearest].latency_ms:.4g} ms and breaks {misses}"
    )


def largest_allowed_ms(settings: StudySettings) -> float:
    """The upper limit on the first device's latency, given as such, as throughput or as time per image; NaN where there is none."""
    return min((limit.bound_ms(settings.batch) for limit in settings.measured_limits if limit.caps_latency), default=math.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitCheck:
    """How the latency limit held once the networks of the search's own were measured."""

    limited: int
    """How many were measured and had a limit."""
    broken: int
    worst_excess: float
    """The largest break as a fraction of the limit; 0 where none breaks it."""


def write_shortlist(folder: Path, settings: StudySettings, parts: Parts, measured: Measurements) -> LimitCheck:
    """Write shortlist.csv, where anything was measured."""
    limit_ms = largest_allowed_ms(settings)
    family = {arch.arch_id: name for name, arch in parts.space.family.items()}
    rows: list[dict[str, Any]] = []
    for arch_id, m in measured.networks.items():
        over = m.latency_ms > limit_ms
        row = {"arch_id": arch_id, "name": family.get(arch_id), "origin": "family" if arch_id in family else "proposed"}
        rows.append(row | m._asdict() | {"latency_source": "measured", "limit_ms": limit_ms, "over_limit": over})
    if rows:
        write_csv(folder / "shortlist.csv", COLUMNS, rows)
    excess = [m.latency_ms / limit_ms - 1 for arch_id, m in measured.networks.items() if arch_id not in family and limit_ms > 0]
    return LimitCheck(limited=len(excess), broken=sum(x > 0 for x in excess), worst_excess=max([0.0, *excess]))
