"""The end of a study: choose the front's members from the measured shortlist, train them fully with fresh seeds, write the front.

Scores of the search are estimates, and choosing the best of many estimates flatters them. So every finalist is trained on the whole
schedule with seeds the search did not use, and only then is the test split read, once.
Every step leaves its result on disk; a killed study goes on at the step it was in.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from lowsearch.arch import Arch
from lowsearch.errors import StudyError
from lowsearch.files import write_atomically
from lowsearch.search import pareto
from lowsearch.search.objectives import Metric, accuracy_excess
from lowsearch.study.outputs import accuracy_columns, decode, device_columns, device_values, write_csv
from lowsearch.study.parts import FinalScore, Parts, Progress
from lowsearch.study.settings import StudySettings
from lowsearch.study.shortlist import Measurement, Measurements, best_cover, broken_limits, largest_allowed_ms, measure, shortlist
from lowsearch.study.storage import Candidate
from lowsearch.study.workers.engines import DiedError, Engine, Job
from lowsearch.train.order import Order

PLAN = "finalists.json"
MAX_PROPOSALS = 12
MIN_PROPOSALS = 9
FINAL_SEED_STREAM = 1_000_003
"""Keeps the seeds of final trainings apart from the study's own."""

COLUMNS = (
    "arch_id", "name", "origin", "val_accuracy", "test_accuracy", "accuracy_std", "accuracy_std_origin", "accuracy_source",
    "accuracy_unit", "score", "score_std", "latency_ms", "latency_std_ms", "latency_source", "predicted_latency_ms", "limit_ms",
    "over_limit", "throughput_ips", "time_per_image_ms", "peak_memory_mb", "artifact_mb", "energy_mj", "energy_source", "macs", "params",
    "resolution_px", "on_front", "weights", "estimated_accuracy", "n_seeds", "breaks",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """A network chosen for the end of the study."""

    arch: Arch
    name: str
    origin: str
    rung: float
    """How far the search had trained it."""
    estimated_accuracy: float
    """Of the search; NaN where there was none."""
    accuracy_std: float
    search_val_accuracy: float
    """As measured at `rung`."""

    @property
    def arch_id(self) -> str:
        return self.arch.arch_id


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalPlan:
    """Who is trained, and how often. Written before the first training and kept on resume."""

    finalists: tuple[Finalist, ...]
    seeds: tuple[int, ...]
    n_candidates: int
    """Candidates the search had finished when the plan was made: more of them make a new plan."""

    def save(self, folder: Path) -> None:
        finalists = [{**dataclasses.asdict(f), "arch": f.arch.to_dict(), "arch_id": f.arch_id} for f in self.finalists]
        for values in finalists:
            for name in ("estimated_accuracy", "accuracy_std", "search_val_accuracy"):
                values[name] = None if math.isnan(values[name]) else values[name]
        text = json.dumps({"finalists": finalists, "seeds": self.seeds, "n_candidates": self.n_candidates}, indent=1)
        write_atomically(folder / PLAN, text + "\n")

    @classmethod
    def load(cls, folder: Path) -> FinalPlan | None:
        """The plan of the study in `folder`, None where none was made. Raises StudyError on a damaged file."""
        path = folder / PLAN
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            finalists = tuple(
                Finalist(
                    arch=Arch.from_dict(f["arch"]), name=str(f["name"]), origin=str(f["origin"]), rung=float(f["rung"]),
                    estimated_accuracy=_number(f["estimated_accuracy"]), accuracy_std=_number(f["accuracy_std"]),
                    search_val_accuracy=_number(f["search_val_accuracy"]),
                )
                for f in values["finalists"]
            )  # fmt: skip
            return cls(finalists=finalists, seeds=tuple(int(s) for s in values["seeds"]), n_candidates=int(values["n_candidates"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{path} is damaged: {error}", hint=f"remove the file and run the study again: lowsearch run --study {folder.name}"
            ) from error


def choose(
    settings: StudySettings, parts: Parts, listed: Sequence[Candidate], measured: Measurements, reference_costs: np.ndarray
) -> list[Finalist]:
    """Of the shortlist the family, and up to MAX_PROPOSALS of the search's own networks: those that together cover most hypervolume.

    A network that broke a limit when it was measured is out, though none be left (`shortlist.why_none_is_left`). Where fewer than
    MIN_PROPOSALS add volume, the next best fill up: trained again, about half of them turn out to be dominated.
    """
    proposals = [c for c in listed if c.origin != "family"]
    found = [measured.networks.get(decode(parts.space, c.genome).arch_id) for c in proposals]
    keeping = [c for c, m in zip(proposals, found, strict=True) if m is None or not broken_limits(settings, m)]
    chosen = best_cover(settings, parts, keeping, measured, reference_costs, at_least=MIN_PROPOSALS, at_most=MAX_PROPOSALS)
    return [
        Finalist(
            arch=decode(parts.space, c.genome), name=c.name, origin=c.origin, rung=c.rung, estimated_accuracy=c.accuracy,
            accuracy_std=c.accuracy_std, search_val_accuracy=c.val_accuracy,
        )
        for c in [c for c in listed if c.origin == "family"] + chosen
    ]  # fmt: skip


def plan_finals(
    folder: Path,
    settings: StudySettings,
    parts: Parts,
    found: Sequence[Candidate],
    reference_costs: np.ndarray,
    *,
    schedule_cpu_s: float,
    progress: Progress | None = None,
) -> tuple[FinalPlan, Measurements]:
    """The stored plan, or a new one where there is none or the search has gone on since; and what was measured for it.

    `schedule_cpu_s` is what a full training costs on average; a second seed is spent where all finals then take less than half of
    the search's time.
    """
    n_candidates = sum(c.state == "complete" for c in found)
    stored = FinalPlan.load(folder)
    if stored is not None and stored.n_candidates == n_candidates and settings.final_seeds in (None, len(stored.seeds)):
        return stored, measure(folder, parts, [f.arch for f in stored.finalists], progress)
    listed = shortlist(settings, parts, found, reference_costs)
    measured = measure(folder, parts, [decode(parts.space, c.genome) for c in listed], progress)
    finalists = choose(settings, parts, listed, measured, reference_costs)
    n_seeds = settings.final_seeds or 1
    if settings.final_seeds is None and settings.budget_s is not None:
        twice_s = 2 * len(finalists) * schedule_cpu_s / settings.workers
        n_seeds = 2 if 0 < twice_s < 0.5 * settings.budget_s else 1
    seeds = np.random.default_rng([settings.seed, FINAL_SEED_STREAM]).integers(2**31, size=n_seeds)
    plan = FinalPlan(finalists=tuple(finalists), seeds=tuple(int(s) for s in seeds), n_candidates=n_candidates)
    plan.save(folder)
    return plan, measured


# Training, in the workers -----------------------------------------------------------------------------------------------


def train_planned(folder: Path, parts: Parts, *, engine: Engine | None = None, at_once: int = 1) -> None:
    """Train what the plan holds and no other worker has done or is doing; with an `engine` as its orders, so many `at_once`."""
    plan = FinalPlan.load(folder)
    if plan is None or parts.train_final is None:
        return
    if engine is not None and parts.order_final is not None:
        _train_by_orders(folder, plan, parts.order_final, engine, at_once)
        return
    for k, seed in enumerate(plan.seeds):  # Every network once before any of them twice.
        for finalist in plan.finalists:
            home = folder / "models" / finalist.arch_id
            if _done(home, seed):
                continue
            home.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(home / f".seed-{k}.lock", timeout=0):
                    if not _done(home, seed):
                        _write_score(home, seed, parts.train_final(finalist.arch, seed, home / f"seed-{seed}"))
            except Timeout:
                continue


def _train_by_orders(
    folder: Path, plan: FinalPlan, order_final: Callable[[Arch, int, Path], Order], engine: Engine, at_once: int
) -> None:  # fmt: skip
    missing = [(f, s) for s in plan.seeds for f in plan.finalists if not _done(folder / "models" / f.arch_id, s)]
    running: dict[Job, tuple[Finalist, int]] = {}
    while missing or running:
        while missing and len(running) < at_once:
            finalist, seed = missing.pop(0)
            home = folder / "models" / finalist.arch_id
            home.mkdir(parents=True, exist_ok=True)
            running[engine.start(order_final(finalist.arch, seed, home / f"seed-{seed}"))] = finalist, seed
        for job in engine.wait(list(running)):
            finalist, seed = running.pop(job)
            try:
                _write_score(folder / "models" / finalist.arch_id, seed, engine.result(job))
            except DiedError as error:
                raise StudyError(
                    f"the final training of {finalist.arch_id} was given up: {error}",
                    hint="give its task more memory, as by --trial-cpus or --trial-gpus; the same command resumes",
                ) from error


def _write_score(home: Path, seed: int, score: FinalScore) -> None:
    write_atomically(_score_path(home, seed), json.dumps({"seed": seed, **dataclasses.asdict(score)}, indent=1) + "\n")


def trainings_done(folder: Path, plan: FinalPlan) -> int:
    """How many trainings of the plan are on disk."""
    return sum(_done(folder / "models" / f.arch_id, seed) for f in plan.finalists for seed in plan.seeds)


def _score_path(home: Path, seed: int) -> Path:
    return home / f"seed-{seed}.json"


def _done(home: Path, seed: int) -> bool:
    return _score_path(home, seed).exists()


def _scores(folder: Path, arch_id: str, seeds: Sequence[int]) -> list[FinalScore]:
    home = folder / "models" / arch_id
    found = []
    for seed in seeds:
        path = _score_path(home, seed)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found.append(FinalScore(**{name: value for name, value in values.items() if name != "seed"}))
        except (OSError, ValueError, TypeError) as error:
            raise StudyError(f"{path} is damaged: {error}", hint=f"remove it and run again: lowsearch run --study {folder.name}") from error
    return found


# Writing, in the parent -----------------------------------------------------------------------------------


def write_finals(
    folder: Path,
    settings: StudySettings,
    parts: Parts,
    plan: FinalPlan,
    measured: Measurements,
    *,
    describe: Callable[[Sequence[Arch]], None],
) -> list[dict[str, Any]]:
    """Write finalists.csv, front.csv and models/<arch_id>/ from the trainings and measurements on disk; returns the finalists' rows."""
    trained = parts.train_final is not None and not settings.stand_in
    scores = {f.arch_id: _scores(folder, f.arch_id, plan.seeds) if trained else [] for f in plan.finalists}
    seed_std, seed_std_origin = _seed_spread(plan, scores)
    estimator = parts.prediction
    limit_ms = largest_allowed_ms(settings)
    rows = []
    for f in plan.finalists:
        estimates = estimator.estimate(parts.space.encode(f.arch)[None])
        predicted_ms, predicted_std_ms = float(estimates.mean["latency_ms"][0]), float(estimates.std["latency_ms"][0])
        found = measured.networks.get(f.arch_id) or Measurement(predicted_ms, predicted_std_ms, predicted_latency_ms=predicted_ms)
        latency_ms = found.latency_ms
        estimates = estimator.as_measured(estimates, np.array([latency_ms]))
        mean = {metric: float(values[0]) for metric, values in estimates.mean.items()}
        row: dict[str, Any] = {
            **mean, **device_values(estimates)[0],
            "arch_id": f.arch_id, "name": f.name, "origin": f.origin, "latency_std_ms": found.latency_std_ms,
            "latency_source": "measured" if f.arch_id in measured.networks else parts.latency_source,
            "predicted_latency_ms": predicted_ms, "limit_ms": limit_ms, "over_limit": bool(latency_ms > limit_ms),
            "energy_source": "predicted" if "energy_mj" in mean else "",
            "resolution_px": f.arch.resolution_px, "n_seeds": len(scores[f.arch_id]),
        }  # fmt: skip
        if not math.isnan(found.energy_mj):
            row |= {"energy_mj": found.energy_mj, "energy_source": "measured"}
        if scores[f.arch_id]:
            row |= _trained_columns(scores[f.arch_id], seed_std, seed_std_origin)
            row |= {"weights": f"models/{f.arch_id}/model.safetensors", "estimated_accuracy": f.estimated_accuracy}
        elif not math.isnan(f.estimated_accuracy):
            row |= accuracy_columns(settings, f.estimated_accuracy, f.accuracy_std)
        on_accuracy = [limit for limit in settings.limits if accuracy_excess([limit], row.get("val_accuracy", math.nan)) > 0]
        rows.append(row | {"breaks": ", ".join(map(str, [*on_accuracy, *broken_limits(settings, found)]))})
    for row in rows:
        row["on_front"] = False
    keeping = [row for row in rows if not row["breaks"]]
    for row, on_front in zip(keeping, _on_front(settings, keeping), strict=True):
        row["on_front"] = bool(on_front)
    describe([f.arch for f in plan.finalists])
    for f, row in zip(plan.finalists, rows, strict=True):
        _write_model(folder, f, row, scores[f.arch_id], plan.seeds)
    columns = (*COLUMNS, *device_columns(parts))
    write_csv(folder / "finalists.csv", columns, rows)
    write_csv(folder / "front.csv", columns, [row for row in rows if row["on_front"]])
    return rows


def _trained_columns(scores: Sequence[FinalScore], seed_std: float, seed_std_origin: str) -> dict[str, Any]:
    """Accuracies are means over the seeds; the standard error joins the draw of the test images and the spread between seeds."""
    test = float(np.mean([s.test_accuracy for s in scores]))
    n_test = scores[0].n_test
    binomial = test * (1 - test) / n_test
    # The same images serve every seed, so more seeds shrink only the second term.
    std = math.sqrt(binomial + (0.0 if math.isnan(seed_std) else seed_std**2 / len(scores)))
    return {
        "val_accuracy": float(np.mean([s.val_accuracy for s in scores])), "test_accuracy": test, "accuracy_std": std,
        "accuracy_std_origin": f"binomial on {n_test} test images{seed_std_origin}", "accuracy_source": "trained", "accuracy_unit": "top1",
    }  # fmt: skip


def _seed_spread(plan: FinalPlan, scores: Mapping[str, Sequence[FinalScore]]) -> tuple[float, str]:
    """Standard deviation between seeds, pooled over the finalists, and how it was had.

    With one seed each, the family's search score serves as the second: it was trained on the whole schedule whatever it scored, so
    no choice flatters the difference.
    """
    variances = [float(np.var([s.val_accuracy for s in scores[f.arch_id]], ddof=1)) for f in plan.finalists if len(scores[f.arch_id]) > 1]
    if variances:
        return math.sqrt(float(np.mean(variances))), f", and spread of {len(plan.seeds)} seeds pooled over {len(variances)} networks"
    pairs = [
        (f.search_val_accuracy, scores[f.arch_id][0].val_accuracy)
        for f in plan.finalists
        if f.origin == "family" and f.rung >= 1 and scores[f.arch_id] and not math.isnan(f.search_val_accuracy)
    ]
    if len(pairs) < 2:
        return math.nan, "; spread between seeds not known"
    differences = np.array([a - b for a, b in pairs])
    return float(np.sqrt(np.mean(differences**2) / 2)), f", and spread between seeds from {len(pairs)} family members trained twice"


def what_broke(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line on the limits that finalists broke, by the rows of finalists.csv; empty where all kept them."""
    broken = Counter(limit for row in rows for limit in row["breaks"].split(", ") if limit)
    listed = ", ".join(f"{limit} ({n} of {len(rows)})" for limit, n in broken.items())
    return f"finalists that broke a limit in their final training and measurement are not on the front: {listed}" if listed else ""


def _on_front(settings: StudySettings, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """By validation accuracy (or what stands in for it) and latency as measured; the test split chooses nothing."""
    if not rows:
        return np.zeros(0, dtype=bool)
    accuracy = "score" if settings.stand_in else "val_accuracy"
    values: dict[Metric, np.ndarray] = {
        m: np.array([row.get(accuracy if m == "accuracy" else m, math.nan) for row in rows], dtype=float)
        for m in settings.objectives.metrics
    }
    return pareto.non_dominated(settings.objectives.costs(values))


def _write_model(folder: Path, f: Finalist, row: Mapping[str, Any], scores: Sequence[FinalScore], seeds: Sequence[int]) -> None:
    home = folder / "models" / f.arch_id
    home.mkdir(parents=True, exist_ok=True)
    write_atomically(home / "arch.json", f.arch.to_json() + "\n")
    metrics = {name: value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}
    metrics["trainings"] = [{"seed": seed, **dataclasses.asdict(score)} for seed, score in zip(seeds, scores, strict=False)]
    write_atomically(home / "metrics.json", json.dumps(metrics, indent=1, default=float) + "\n")
    weights = home / f"seed-{seeds[0]}.safetensors" if seeds else home / "none"
    if scores and weights.exists():  # The first seed's, whatever it scored: choosing among seeds would flatter the accuracy.
        os.replace(weights, home / "model.safetensors")
    for leftover in home.glob("seed-*.checkpoint*"):
        leftover.unlink()


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
