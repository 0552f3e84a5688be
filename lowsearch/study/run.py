"""A study from its first file to its front: create or resume, search in worker processes, train and measure the finalists.

`run` owns the study's folder while it works (a lock), starts the workers, watches them, keeps the plain files up to date and counts the
time. Killed at any moment, the same call goes on: Optuna and the records hold what was finished, a trial in flight is taken up again
under its number and trains on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import yaml
from filelock import FileLock, Timeout

from lowsearch import locations
from lowsearch.accuracy.agreement import agreement
from lowsearch.errors import StudyError
from lowsearch.files import write_atomically
from lowsearch.search import promotion
from lowsearch.search.estimates import excess, reference_values
from lowsearch.search.feasible import all_to_try, check_limits
from lowsearch.search.verification import VerifiedCheck, checked
from lowsearch.study import finalists
from lowsearch.study.assembly import build_parts, prepare, resolve
from lowsearch.study.gate import SIGNALS, Signal, judged_signals, unjudged, what_failed
from lowsearch.study.outputs import StudyFiles, decode
from lowsearch.study.parts import Parts, Progress, stand_in_of
from lowsearch.study.settings import SCHEMA, VERSION, StudySettings, check_resumable, read_study_file, stored_settings
from lowsearch.study.sharing import write_regret
from lowsearch.study.shortlist import Measurements, why_none_is_left, write_shortlist
from lowsearch.study.storage import (
    SERVER_STUDY,
    Candidate,
    candidates,
    enqueue,
    forget_miss,
    is_exhausted,
    nothing_to_start,
    open_study,
    reclaim,
    set_search_open,
    why_ended,
)
from lowsearch.study.warm_start import add_known, copy_known
from lowsearch.study.workers.crew import MAX_CRASHES_IN_A_ROW, Crew, await_orphans, crashed_too_often
from lowsearch.study.workers.database import connect
from lowsearch.study.workers.engines import require_engine
from lowsearch.study.workers.worker import PROPOSAL_LOCK, Plan

log = logging.getLogger(__name__)

Phase = Literal["profile", "search", "finals"]
CLOCK = "clock.json"
HOST = ".host"
"""Names the machine that runs the study: SQLite's file is for its processes alone."""
_POLL_S = 0.25
_REFRESH_S = 5.0


@dataclass(frozen=True, slots=True)
class Backend:
    """Where a study gets its parts from; tests give another."""

    resolve: Callable[[StudySettings], StudySettings] = resolve
    prepare: Callable[[Path, StudySettings, Progress | None], None] = prepare
    parts: Callable[[Path, StudySettings], Parts] = build_parts
    worker: tuple[str, ...] = (sys.executable, "-m", "lowsearch.study.workers.process")
    """Command that starts a worker; folder, name, job and elapsed seconds are appended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """What a finished study found; the same is in its files."""

    folder: Path
    front: list[dict[str, Any]]
    """Rows of front.csv."""
    summary: dict[str, Any]
    """As in summary.json."""


def run(settings: StudySettings, folder: Path, *, progress: Progress | None = None, backend: Backend | None = None) -> StudyResult:
    """Create the study in `folder` or resume it, and bring it to its end.

    Raises StudyError where another process is at work on it or where it was made with other settings. KeyboardInterrupt stops the
    workers first; the same call resumes.
    """
    backend = backend or Backend()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        (folder / HOST).write_text(socket.gethostname() + "\n", encoding="utf-8")
        clock = Clock(folder / CLOCK)
        settings = backend.resolve(settings)
        stored = stored_settings(folder)
        if stored is not None:
            check_resumable(folder.name, stored, settings)
        else:
            for earlier in settings.warm_start:  # A mistyped name is told before anything is measured.
                locations.study_folder(earlier)
        require_engine(settings.engine)
        if settings.storage is not None:
            connect(settings.storage, patience_s=0)  # Before anything is measured or written: a mistyped url is told at once.
        with clock.running("profile"):
            backend.prepare(folder, settings, progress)
        parts = backend.parts(folder, settings)
        await_orphans(folder)
        plan = _opened(folder, settings, parts)
        study = open_study(folder, settings.objectives)
        with FileLock(folder / PROPOSAL_LOCK):
            reclaim(study)
        add_known(folder, study, settings, parts)
        enqueue(study, parts.space, dict(parts.space.family), origin="family")
        run = _Run(folder, plan, parts, study, backend, clock, progress)
        with clock.running("search"):
            run.search()
        with clock.running("finals"):
            return run.finish()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from running the study in `folder`. Raises StudyError where one does."""
    try:
        with FileLock(folder / ".lock", timeout=0.5):  # `is_run` holds it for a moment.
            yield
    except Timeout as error:
        raise StudyError(
            f"study {folder.name!r} is being run by another process", hint="wait for it, or choose another --study NAME"
        ) from error


def is_run(folder: Path) -> bool:
    """Whether a process runs the study in `folder`, on this machine or another that shares the folder."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def _opened(folder: Path, settings: StudySettings, parts: Parts) -> Plan:
    """The plan in study.yaml, written where the study is new, its length and workers brought up to date where it is resumed."""
    values = read_study_file(folder)
    if values is None:
        values = _new_study(folder, settings, parts)
    values |= _shown_settings(settings) | {"settings": settings.to_dict()}
    values |= {"latency_table": parts.facts["latency_table"]} if "latency_table" in parts.facts else {}  # It may be stale by now.
    write_study_file(folder, values)
    return Plan.read(folder)


def _new_study(folder: Path, settings: StudySettings, parts: Parts) -> dict[str, Any]:
    estimator = parts.estimator
    check_limits(estimator, settings.limits)
    if settings.sampler == "exhaustive":
        all_to_try(estimator, settings.limits)
    stand_in = stand_in_of(settings, parts.space, folder)
    reference = reference_values(estimator, chance_accuracy=parts.chance_accuracy)
    if stand_in is not None:
        family = [parts.space.encode(arch) for arch in parts.space.family.values()]
        genomes = np.stack(family) if family else parts.space.sample(300, rng=np.random.default_rng(0))
        reference["accuracy"] = float(stand_in.predict(genomes)[0].min() - stand_in.margin)
    sample = estimator.estimate(parts.space.sample(2000, rng=np.random.default_rng(settings.seed)))
    axis = settings.objectives.spread_over
    costs = axis.cost(sample.mean[axis.metric])[excess(sample, settings.limits) == 0]
    edges = promotion.slice_edges(costs, float(axis.cost(np.array(reference[axis.metric]))))
    known = copy_known(folder, settings, parts)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "name": folder.name,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "reference_point": {metric: float(value) for metric, value in reference.items()},
        "slice_edges": edges,
        "space_size": float(parts.space.size()),
        "versions": _versions("lowsearch", "optuna", "torch", "onnxruntime", "onnxruntime-gpu"),
        **({SERVER_STUDY: f"{folder.name}-{secrets.token_hex(4)}"} if settings.storage else {}),
        **parts.facts,
        **known,
    }


def _versions(*packages: str) -> dict[str, str]:
    """Versions of those that are installed."""
    found: dict[str, str] = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _shown_settings(settings: StudySettings) -> dict[str, Any]:
    """The settings as the report shows them."""
    names = (
        "device",
        "runtime",
        "precision",
        "batch",
        "threads",
        "space",
        "data",
        "objective",
        "sampler",
        "seed",
        "workers",
        "recipe",
        "accuracy",
    )
    shown: dict[str, Any] = {name: getattr(settings, name) for name in names}
    shown["limits"] = [str(limit) for limit in settings.limits]
    if not settings.stand_in:
        shown["rungs"] = settings.rungs
    budget_s = settings.search_budget_s
    shown["budget"] = f"{settings.trials} trials" if budget_s is None else f"{budget_s / 60:g}m" if budget_s >= 60 else f"{budget_s:g}s"
    return shown


def write_study_file(folder: Path, values: dict[str, Any]) -> None:
    """Replace study.yaml."""
    write_atomically(folder / "study.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


class Clock:
    """Seconds spent in every phase, over all runs of a study; on disk, at most a second old."""

    def __init__(self, path: Path, *, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._now = path, now
        self.spent_s: dict[str, float] = {}
        self._phase: Phase | None = None
        self._since = self._saved = now()
        if path.exists():
            try:
                self.spent_s = {str(phase): float(seconds) for phase, seconds in json.loads(path.read_text(encoding="utf-8")).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise StudyError(
                    f"{path} is damaged: {error}", hint="remove the file; the study then has its whole budget again"
                ) from error

    def seconds(self, phase: Phase) -> float:
        """Seconds spent in `phase` so far."""
        running = self._now() - self._since if phase == self._phase else 0.0
        return self.spent_s.get(phase, 0.0) + running

    @contextmanager
    def running(self, phase: Phase) -> Iterator[None]:
        """Count the time of the block as `phase`."""
        self._phase, self._since = phase, self._now()
        try:
            yield
        finally:
            self.tick(now=True)
            self._phase = None

    def tick(self, *, now: bool = False) -> None:
        """Save the time, if a second has passed since it was last saved."""
        if self._phase is None or (self._now() - self._saved < 1 and not now):
            return
        moment = self._now()
        self.spent_s[self._phase] = self.spent_s.get(self._phase, 0.0) + moment - self._since
        self._since = self._saved = moment
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.spent_s) + "\n", encoding="utf-8")  # Not fsynced: a lost second is no loss.
        os.replace(temporary, self._path)


class _Run:
    """One run of a study, from the moment its folder is open."""

    def __init__(
        self, folder: Path, plan: Plan, parts: Parts, study: optuna.Study, backend: Backend, clock: Clock, progress: Progress | None
    ) -> None:
        self._folder, self._plan, self._parts, self._study, self._backend = folder, plan, parts, study, backend
        self._clock, self._progress = clock, progress
        self._files = StudyFiles(folder, plan.settings, parts, plan.reference_costs)
        local = plan.settings.engine == "local"  # Else one process conducts the tasks of all trials.
        self._crew = Crew(folder, study, backend.worker, size=plan.settings.workers if local else 1, blames=local)
        self._refreshed = -math.inf
        self._hypervolume = 0.0
        self._said: set[Signal] = set()

    # Search ------------------------------------------------------------------------------------------------------------

    def search(self) -> None:
        """Search until the budget is spent or the trials are done."""
        if not (self._folder / "space_sample.csv").exists():
            self._files.write_sample(None)
        self._refresh(force=True)
        set_search_open(self._study, True)
        stopping = False
        crashes = finished_at_crash = 0
        try:
            while True:
                if not stopping and self._budget_is_spent():
                    stopping = True
                    self._crew.ask_to_stop()
                    set_search_open(self._study, False)
                crashed = self._crew.collect()
                if crashed:
                    finished = self._n_finished()
                    crashes = 1 if finished > finished_at_crash else crashes + 1
                    finished_at_crash = finished
                    if crashes >= MAX_CRASHES_IN_A_ROW:
                        raise crashed_too_often(self._folder, crashed[-1])
                self._crew.hand_back_silent()
                needed = not stopping and not nothing_to_start(self._study, self._plan.settings.trials)
                if not self._crew and not needed and not self._crew.left_behind() and not self._crew.others_at_work():
                    break
                if needed:
                    self._crew.start_missing("search", elapsed_s=self._clock.seconds("search"))
                self._clock.tick()
                self._refresh()
                time.sleep(_POLL_S)
            set_search_open(self._study, False)
        finally:
            self._crew.end()
            self._refresh(force=True)

    def _budget_is_spent(self) -> bool:
        budget_s = self._plan.settings.search_budget_s
        return budget_s is not None and self._clock.seconds("search") >= budget_s

    def _n_finished(self) -> int:
        return sum(c.state in ("complete", "pruned") for c in candidates(self._study, self._parts.space))

    def _refresh(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._refreshed < _REFRESH_S:
            return
        self._refreshed = now
        found = candidates(self._study, self._parts.space)
        self._hypervolume = self._files.refresh(found)
        self._report(found)
        for signal in SIGNALS:
            if signal not in self._said and (why := what_failed(self._folder, signal)):
                log.warning("%s", why)
                self._said.add(signal)

    def _report(self, found: Sequence[Candidate]) -> None:
        if self._progress is None:
            return
        scored = sum(c.state == "complete" for c in found)
        label = f"search: {scored} networks scored, hypervolume {self._hypervolume:.3f}"
        trials, budget_s = self._plan.settings.trials, self._plan.settings.search_budget_s
        if trials is not None:
            total = trials + sum(c.origin == "family" or bool(c.known_from) for c in found)
            self._progress(min(scored, total), total, label)
        elif budget_s is not None:
            self._progress(int(min(self._clock.seconds("search"), budget_s)), int(budget_s), label)

    # Finals ------------------------------------------------------------------------------------------------------------

    def finish(self) -> StudyResult:
        """Train and measure the finalists, and write what the study found."""
        found = self._scored_anew(candidates(self._study, self._parts.space))
        settings = self._plan.settings
        plan, measured = finalists.plan_finals(
            self._folder, settings, self._parts, found, self._plan.reference_costs,
            schedule_cpu_s=self._schedule_cpu_s(), progress=self._progress,
        )  # fmt: skip
        self._files.describe(f.arch for f in plan.finalists)
        if self._parts.train_final is not None and not settings.stand_in:
            self._train(plan)
        self._clock.tick()
        rows = finalists.write_finals(self._folder, settings, self._parts, plan, measured, describe=self._files.describe)
        self._files.write_sample(None if settings.stand_in else self._parts.fit(self._parts.records()))
        self._hypervolume = self._files.refresh(found)
        self._clock.tick(now=True)
        summary = self._summary(found, rows, measured)
        if not any(f.origin != "family" for f in plan.finalists) and (why := why_none_is_left(settings, self._parts, measured)):
            summary["none_kept"] = why
            log.warning("%s", why)
        front = [row for row in rows if row["on_front"]]
        if (sharing := write_regret(self._folder, settings, self._parts, found, front)) is not None:
            summary["sharing"] = sharing
        write_atomically(self._folder / "summary.json", json.dumps(summary, indent=1, default=float) + "\n")
        forget_miss(self._study)
        values = read_study_file(self._folder) or {}
        values |= {"spent_s": {phase: round(seconds, 1) for phase, seconds in self._clock.spent_s.items()}}
        write_study_file(self._folder, values | ({} if math.isnan(measured.pace) else {"pace": round(measured.pace, 4)}))
        return StudyResult(folder=self._folder, front=front, summary=summary)

    def _scored_anew(self, found: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with what is estimated of them now: the first were scored when little was known."""
        records = self._parts.records()
        scorer = self._parts.fit(records)
        if scorer is None or self._plan.settings.stand_in:
            return list(found)
        latest = {record.arch_id: record for record in sorted(records, key=lambda r: r.rung)}
        anew = []
        for c in found:
            record = latest.get(decode(self._parts.space, c.genome).arch_id) if c.state == "complete" else None
            if record is not None:
                accuracy, std = scorer.predict_record(record)
                c = dataclasses.replace(c, accuracy=float(accuracy), accuracy_std=float(std))
            anew.append(c)
        return anew

    def _schedule_cpu_s(self) -> float:
        """What a training of the whole schedule costs on average; 0 where none was done."""
        whole = [record.cpu_seconds for record in self._parts.records() if record.rung >= 1]
        return float(np.mean(whole)) if whole else 0.0

    def _train(self, plan: finalists.FinalPlan) -> None:
        total = len(plan.finalists) * len(plan.seeds)
        crashes = 0
        try:
            while (done := finalists.trainings_done(self._folder, plan)) < total or self._crew:
                crashed = self._crew.collect()
                crashes += len(crashed)
                if crashes >= MAX_CRASHES_IN_A_ROW:
                    raise crashed_too_often(self._folder, crashed[-1])
                if self._progress is not None:
                    self._progress(done, total, "train the front")
                if done < total and not self._crew:
                    self._crew.start_missing("finals")
                self._clock.tick()
                time.sleep(_POLL_S)
        finally:
            self._crew.end()

    def _summary(self, found: Sequence[Candidate], rows: Sequence[Mapping[str, Any]], measured: Measurements) -> dict[str, Any]:
        scored = [c.origin for c in found if c.state == "complete"]
        signals = judged_signals(self._parts.records(), self._parts.space, self._parts.fit)
        return {
            "hypervolume": self._hypervolume,
            "candidates": dict(Counter(c.state for c in found)),
            "scored": dict(Counter(scored)),
            "known": sum(bool(c.known_from) for c in found),
            "exhausted": is_exhausted(self._study),
            "search_ended": why_ended(self._study),
            "finalists": len(rows),
            "front": sum(row["on_front"] for row in rows),
            "broken_in_finals": finalists.what_broke(rows),
            "limit": dataclasses.asdict(write_shortlist(self._folder, self._plan.settings, self._parts, measured)),
            "verified": dataclasses.asdict(self._verified()),
            "pace": None if math.isnan(measured.pace) else measured.pace,
            "ladder": self._ladder_check(),
            "steering": dataclasses.asdict(signals["steering"]),
            "forecast": dataclasses.asdict(signals["promotion"]),
            "unjudged": unjudged(signals["steering"].n_networks),
            **{f"{signal}_ended": what_failed(self._folder, signal) for signal in SIGNALS},
            "spent_s": dict(self._clock.spent_s),
        }

    def _verified(self) -> VerifiedCheck:
        found = self._parts.verifications.found()
        return checked(found.values(), self._plan.settings.measured_limits, batch=self._parts.batch)

    def _ladder_check(self) -> dict[str, Any]:
        """How the lowest rung ranks the networks that were trained on the whole schedule: the ladder's spot check."""
        by_rung: dict[str, dict[float, float]] = {}
        for record in self._parts.records():
            by_rung.setdefault(record.arch_id, {})[record.rung] = record.val_accuracy
        pairs = [(rungs[min(rungs)], rungs[1.0]) for rungs in by_rung.values() if 1.0 in rungs and min(rungs) < 1.0]
        found = agreement([low for low, _ in pairs], [full for _, full in pairs])
        return {"pairs": len(pairs), "spearman": found.spearman, "kendall": found.kendall}
