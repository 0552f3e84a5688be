"""The neighbours of one network that are better by the study's predictors: faster at no loss of score, or better at no loss of latency.

All networks one or two settings away are judged. A gain counts beyond two standard deviations of the difference. They are leads, not
results: among thousands of tries some look better by luck, and only training tells. `enqueue` has the study train them next.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lowsearch.arch import Arch
from lowsearch.errors import StudyError
from lowsearch.files import write_atomically
from lowsearch.search import pareto
from lowsearch.search.estimates import excess
from lowsearch.search.objectives import Metric, parse_objectives
from lowsearch.space import SearchSpace
from lowsearch.study import storage
from lowsearch.study.explain import CLEAR_STD, Change, Step, changes, step_between
from lowsearch.study.knowledge import Knowledge
from lowsearch.study.settings import StudySettings

Gain = Literal["faster", "better", "faster and better"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """A neighbour worth training."""

    change: Change
    gain: Gain
    """What is clear: lower latency, higher score, or both."""
    hypervolume: float
    """Expected hypervolume that it adds to the network it was made from: leads are ordered by it."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"gain": self.gain, "hypervolume": self.hypervolume, **self.change.to_dict()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """The leads from one network, the best first."""

    arch: Arch
    n_judged: int
    """Networks one or two changes away that keep the limits and that the study has not tried."""
    leads: tuple[Lead, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, networks as `Arch.to_dict()`."""
        values = {"arch_id": self.arch.arch_id, "arch": self.arch.to_dict(), "judged": self.n_judged}
        return {**values, "leads": [lead.to_dict() for lead in self.leads]}


def refine(
    known: Knowledge, arch: Arch, *, settings: StudySettings, reference: Mapping[Metric, float], tried: Collection[bytes] = ()
) -> Refinement:
    """Judge every network one or two changes from `arch`, but those that break the study's limits and those `tried` (genomes' bytes).

    `reference` is the study's worst value by metric. Raises StudyError where the study estimates no score.
    """
    if known.score is None:
        raise StudyError("the study has no score to compare networks by", hint="search for accuracy: --objective acc-latency")
    space, genome = known.space, known.space.encode(arch)
    genomes, steps = within_two_changes(space, genome)
    allowed = excess(known.estimator.estimate(genomes), settings.limits) == 0
    allowed &= np.array([g.tobytes() not in tried for g in genomes], dtype=bool)
    genomes, steps = genomes[allowed], [s for s, kept in zip(steps, allowed, strict=True) if kept]
    if not len(genomes):
        return Refinement(arch=arch, n_judged=0, leads=())
    gain, score_std = known.score.changes(genome, genomes)
    saved_ms = known.latency.predict(genome[None])[0] - known.latency.predict(genomes)[0]
    # Judged cheaply first: deviations of latency are worked out network by network.
    hopeful = (gain >= 0) & (saved_ms >= 0) & ((gain > CLEAR_STD * score_std) | (saved_ms > 0))
    found = changes(known, genome, genomes[hopeful], [s for s, kept in zip(steps, hopeful, strict=True) if kept])
    volumes = _hypervolumes(known, genome, found, reference)
    leads = [
        Lead(change=change, gain=kind, hypervolume=float(volume))
        for change, volume in zip(found, volumes, strict=True)
        if (kind := _gain(change)) is not None
    ]
    return Refinement(arch=arch, n_judged=len(genomes), leads=tuple(sorted(leads, key=lambda lead: -lead.hypervolume)))


def within_two_changes(space: SearchSpace, genome: np.ndarray) -> tuple[np.ndarray, list[tuple[Step, ...]]]:
    """Every network that one or two changes make of `genome` (n_genes,), once: genomes (n, n_genes) and the steps that lead there."""
    found: dict[bytes, tuple[np.ndarray, tuple[Step, ...]]] = {genome.tobytes(): (genome, ())}
    rings = [[(genome, ())], []]
    for ring, beyond in zip(rings, [rings[1], []], strict=True):
        for before, path in ring:
            for gene, after in zip(*space.neighbours(before), strict=True):
                key = after.tobytes()
                if key not in found:
                    found[key] = (after, (*path, step_between(space, before, after, int(gene))))
                    beyond.append(found[key])
    reached = list(found.values())[1:]
    return np.array([after for after, _ in reached], dtype=np.int8).reshape(-1, space.n_genes), [path for _, path in reached]


def tried_in(folder: Path, space: SearchSpace) -> set[bytes]:
    """What the study in `folder` has looked at, by its candidates.csv, as the bytes of canonical genomes."""
    path = folder / "candidates.csv"
    if not path.exists():
        return set()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            genomes = [[int(index) for index in row["genome"].split()] for row in csv.DictReader(file)]
        return {genome.tobytes() for genome in space.canonical(np.array(genomes, dtype=np.int8).reshape(-1, space.n_genes))}
    except (KeyError, ValueError, AttributeError, OverflowError) as error:
        raise StudyError(f"{path} is damaged: {error}", hint=f"lowsearch run --study {folder.name} writes it again") from error


def save(folder: Path, refinement: Refinement) -> Path:
    """Write `refine-<arch_id>.json` into the study's folder."""
    path = folder / f"refine-{refinement.arch.arch_id}.json"
    write_atomically(path, json.dumps(refinement.to_dict(), indent=1) + "\n")
    return path


def enqueue(folder: Path, settings: StudySettings, space: SearchSpace, leads: Collection[Lead]) -> list[str]:
    """Have the study train `leads` before anything else; returns the arch_ids that wait now.

    Raises StudyError where the folder holds no search that could go on.
    """
    if not storage.has_database(folder):
        raise StudyError(f"study {folder.name!r} holds no {storage.DATABASE}, so its search cannot go on", hint="start one: lowsearch run")
    study = storage.open_study(folder, settings.objectives)
    storage.enqueue(study, space, {lead.change.arch_id: lead.change.arch for lead in leads}, origin="proposed")
    waiting = {c.name for c in storage.candidates(study, space) if c.state == "waiting"}
    return [lead.change.arch_id for lead in leads if lead.change.arch_id in waiting]


def _gain(change: Change) -> Gain | None:
    assert change.score is not None
    faster = -change.latency_ms > CLEAR_STD * change.latency_std_ms
    better = change.score > CLEAR_STD * (change.score_std or 0.0)
    if faster and better:
        return "faster and better"
    return "faster" if faster else "better" if better else None


def _hypervolumes(known: Knowledge, genome: np.ndarray, found: list[Change], reference: Mapping[Metric, float]) -> np.ndarray:
    """Expected hypervolume (n,) that each change adds to the network it was made from, in score and log latency."""
    assert known.score is not None
    if not found:
        return np.zeros(0)
    objectives = parse_objectives("acc-latency")
    score, ms = float(known.score.predict(genome[None])[0][0]), float(known.latency.predict(genome[None])[0][0])
    gains = np.array([change.score for change in found], dtype=float)
    saved_ms = -np.array([change.latency_ms for change in found], dtype=float)
    std = np.array([change.score_std or 0.0 for change in found], dtype=float)
    own = objectives.costs(np.array([[score, ms]]))
    worst = objectives.costs(np.array([[min(reference["accuracy"], score), max(reference["latency_ms"], ms)]]))[0]
    costs = objectives.costs(np.column_stack([score + gains, ms - saved_ms]))
    return pareto.expected_gain(costs, std, own, worst)
