"""The Optuna side of a study: its database, what a trial says about a candidate, and giving back what a dead process held.

The database is study.db in the study's folder (SQLite), or on the server that study.yaml names.

A trial is one candidate and keeps its number for ever. A trial whose process died is set back to WAITING, under the same number and
with the parameters it already has: it is the next to run, so a study that was killed goes on as if it had not been.
"""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from lowsearch.arch import Arch
from lowsearch.errors import StudyError
from lowsearch.search.foreign import gene_distributions
from lowsearch.search.objectives import Objectives
from lowsearch.search.sampler import gene_indices
from lowsearch.space import SearchSpace
from lowsearch.study.settings import read_study_file, stored_settings
from lowsearch.study.workers.database import connect
from lowsearch.study.workers.leases import WORKER

DATABASE = "study.db"
STUDY_NAME = "lowsearch"
"""Of Optuna's study in study.db. On a server, which many studies share, study.yaml holds it as SERVER_STUDY."""
SERVER_STUDY = "optuna_study"
MAX_DEATHS = 2
"""A candidate whose process died this often (out of memory, say) is given up, so that it cannot stop the study."""

_LOCK_TIMEOUT_S = 120

KNOWN_FROM = "known_from"
"""Attribute of a trial that was not run here: the earlier study that its network is known from."""
_EXHAUSTED = "exhausted"
_MISSED = "missed"
_OPEN = "search_open"

Origin = Literal["family", "proposed", "random"]
State = Literal["waiting", "running", "complete", "pruned", "failed"]
_STATES: dict[TrialState, State] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def open_study(
    folder: Path,
    objectives: Objectives,
    *,
    sampler: BaseSampler | None = None,
    url: str | None = None,
    join: bool = False,
    patience_s: float = 0.0,
) -> optuna.Study:
    """The Optuna study of `folder`, made where it does not exist. Raises StudyError where its database cannot be used.

    `url`: where this machine reaches the server, if not where study.yaml says. `join`: only a study that exists; StudyError otherwise.
    `patience_s`: how long to wait for a server that does not answer at first.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = stored_settings(folder)
    url = url or (settings.storage if settings else None)
    name = STUDY_NAME if url is None else str((read_study_file(folder) or {}).get(SERVER_STUDY, STUDY_NAME))
    storage = _file_storage(folder) if url is None else connect(url, patience_s=patience_s)
    if not join:
        directions = list(objectives.directions)
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, sampler=sampler, load_if_exists=True)
        if study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna calls it so since 3.2.
                study.set_metric_names(list(objectives.metrics))
        return study
    try:
        return optuna.load_study(storage=storage, study_name=name, sampler=sampler)
    except KeyError as error:
        raise StudyError(f"{url or folder / DATABASE} holds no study {name!r}", hint="name the --storage that it is run with") from error


def has_database(folder: Path) -> bool:
    """Whether the study in `folder` has trials somewhere."""
    settings = stored_settings(folder)
    return (settings is not None and settings.storage is not None) or (folder / DATABASE).exists()


def _file_storage(folder: Path) -> RDBStorage:
    path = folder / DATABASE
    try:
        with FileLock(folder / f".{DATABASE}.lock"):  # Two processes that make its tables at once are in each other's way.
            _prepare_database(path)
            storage = RDBStorage(f"sqlite:///{path.resolve()}", engine_kwargs={"connect_args": {"timeout": _LOCK_TIMEOUT_S}})
    except sqlite3.DatabaseError as error:
        raise StudyError(f"{path} is damaged: {error}", hint=f"restore it, or remove {folder} and search again") from error
    event.listen(storage.engine, "connect", _without_fsync)
    storage.engine.dispose()  # Connections opened so far have not heard of it.
    return storage


def _prepare_database(path: Path) -> None:
    """Check the file, and have it keep a write-ahead log. Raises sqlite3.DatabaseError."""
    connection = sqlite3.connect(path, timeout=_LOCK_TIMEOUT_S)
    try:
        found = connection.execute("PRAGMA quick_check").fetchone()
        if found != ("ok",):
            raise sqlite3.DatabaseError(str(found[0]))
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def _without_fsync(connection: Any, _: Any) -> None:
    """A killed process loses nothing that way; a power cut may lose the last trials, whose trainings are in the records.

    Optuna commits every gene by itself, and waiting for the disk 60 times a trial took a second.
    """
    connection.execute("PRAGMA synchronous=NORMAL")


def enqueue(study: optuna.Study, space: SearchSpace, networks: dict[str, Arch], *, origin: Origin) -> None:
    """Queue `networks`, by name, before everything the sampler will propose; those that are queued already stay as they are."""
    known = {t.user_attrs.get("name") for t in study.get_trials(deepcopy=False)}
    for name, arch in networks.items():
        if name not in known:
            study.enqueue_trial(gene_indices(space.encode(arch), space), user_attrs={"origin": origin, "name": name})


def add_scored(
    study: optuna.Study,
    space: SearchSpace,
    genome: np.ndarray,
    *,
    values: Sequence[float],
    attrs: Mapping[str, Any],
    constraints: Mapping[str, float],
) -> None:
    """Add a network that another study scored as a finished trial. `genome`: canonical, (n_genes,)."""
    study.add_trial(
        optuna.trial.create_trial(
            params=gene_indices(genome, space), distributions=gene_distributions(space), values=list(values), user_attrs=dict(attrs),
            constraints=dict(constraints),
        )
    )  # fmt: skip


def crew_of(worker: str) -> str:
    """Whose child a worker is, by its name `worker-SLOT@CREW.TOKEN`; empty for those of `lowsearch run` itself, without `@CREW`."""
    return worker.partition(".")[0].partition("@")[2]


def reclaim(
    study: optuna.Study, *, crew: str = "", living: Sequence[str] = (), crashed: Sequence[str] = (), silent: Sequence[int] = ()
) -> list[int]:
    """Set the RUNNING trials of dead processes back to WAITING, and return their numbers.

    Of workers of `crew` only the `living` are at work; `crashed` are those that died by themselves: a candidate that MAX_DEATHS of
    these held is failed instead. Trials of other crews stay, but for the `silent`, by number, whose lease is over. Call it where no
    worker can be between asking for a trial and signing it, so under the proposal lock.
    """
    storage = study._storage  # Optuna has no public way back to WAITING; the storage's own method allows it.
    numbers = []
    for trial in running(study):
        worker = trial.user_attrs.get(WORKER) or ""
        if worker in living or (worker and crew_of(worker) != crew and trial.number not in silent):
            continue
        with suppress(UpdateFinishedTrialError):  # Silent, but not dead: it has finished in this moment.
            _give_back(storage, trial, crashed=worker in crashed)
            numbers.append(trial.number)
    return numbers


def _give_back(storage: BaseStorage, trial: FrozenTrial, *, crashed: bool) -> None:
    deaths = int(trial.user_attrs.get("deaths", 0)) + crashed
    if crashed:
        storage.set_trial_user_attr(trial._trial_id, "deaths", deaths)
    if deaths >= MAX_DEATHS:
        storage.set_trial_user_attr(trial._trial_id, "reason", f"its process died {deaths} times")
        storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
        return
    storage.set_trial_user_attr(trial._trial_id, WORKER, "")  # Should the worker live after all, it sees that it holds nothing.
    storage.set_trial_state_values(trial._trial_id, state=TrialState.WAITING)


def running(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that someone holds, or held when they died."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


@dataclass(frozen=True, eq=False)
class Candidate:
    """What Optuna holds of one candidate."""

    number: int
    genome: np.ndarray
    """Canonical, (n_genes,)."""
    origin: Origin
    name: str
    state: State
    reason: str
    """Why it was pruned or given up."""
    rung: float
    """What of the full training's computation it was trained for: of a plain rung, the fraction of the schedule; 0 where it was not."""
    accuracy: float
    """Estimated score after the full schedule when the trial ended; NaN where there is none."""
    accuracy_std: float
    val_accuracy: float
    """As measured at `rung`; NaN where nothing was trained."""
    elapsed_s: float
    """Seconds of search when it was finished."""
    why: str = ""
    """Why it was proposed, and why its training stopped early."""
    known_from: str = ""
    """The earlier study that trained it; empty for what this one did."""


def candidates(study: optuna.Study, space: SearchSpace) -> list[Candidate]:
    """The study's candidates by number; a trial that has not all its genes yet is left out, an enqueued one is not."""
    found = []
    for trial in sorted(study.get_trials(deepcopy=False), key=lambda t: t.number):
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if not all(gene.name in params for gene in space.genes):
            continue
        genome = space.canonical(np.array([[params[gene.name] for gene in space.genes]], dtype=np.int8))[0]
        attrs: dict[str, Any] = trial.user_attrs
        score = attrs.get("score") or {}
        found.append(
            Candidate(
                number=trial.number,
                genome=genome,
                origin=attrs.get("origin", "proposed"),
                name=attrs.get("name", ""),
                state=_STATES[trial.state],
                reason=attrs.get("reason", ""),
                rung=float(score.get("rung", 0.0)),
                accuracy=_number(score.get("accuracy")),
                accuracy_std=_number(score.get("accuracy_std")),
                val_accuracy=_number(score.get("val_accuracy")),
                elapsed_s=float(attrs.get("elapsed_s", np.nan)),
                why="; ".join(filter(None, (attrs.get("why", ""), score.get("stopped", "")))),
                known_from=attrs.get(KNOWN_FROM, ""),
            )  # fmt: skip
        )
    return found


def set_exhausted(study: optuna.Study) -> None:
    """Note, for good, that no network within the limits is left to try: all of the space were looked at."""
    study.set_user_attr(_EXHAUSTED, True)


def is_exhausted(study: optuna.Study) -> bool:
    """Whether no network within the limits is left to try."""
    return bool(study.user_attrs.get(_EXHAUSTED))


def set_missed(study: optuna.Study, why: str) -> None:
    """Note `why` no further network within the limits was found, and fail the trial that was asked for in vain.

    Call it under the proposal lock: every other trial that runs has all its genes.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not trial.params:
            study.tell(trial.number, state=TrialState.FAIL)
    study.set_user_attr(_MISSED, why)


def forget_miss(study: optuna.Study) -> None:
    """Have the next run look again."""
    if study.user_attrs.get(_MISSED):
        study.set_user_attr(_MISSED, "")


def why_ended(study: optuna.Study) -> str:
    """Why the search ended before its time, in words; empty where it did not."""
    if is_exhausted(study):
        return "no network within the limits is left to try: all of the space were looked at"
    why = study.user_attrs.get(_MISSED)
    return f"{why}; there may be some, and the same command looks again" if why else ""


def set_search_open(study: optuna.Study, is_open: bool) -> None:
    """Note whether the search goes on, for workers that joined it."""
    study.set_user_attr(_OPEN, is_open)


def is_search_open(study: optuna.Study) -> bool:
    """Whether the search goes on."""
    return bool(study.user_attrs.get(_OPEN, True))


def nothing_to_start(study: optuna.Study, trials: int | None) -> bool:
    """Whether no worker could start anything that a study of so many `trials` still needs."""
    if study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        return False
    if why_ended(study):
        return True
    return trials is not None and n_proposals(study) >= trials


def n_proposals(study: optuna.Study) -> int:
    """Proposals that count as trials: scored, in work, or waiting to be taken up again; not the family, nor what was known before, pruned
    or failed.
    """
    counted = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
    found = [t.user_attrs for t in study.get_trials(deepcopy=False, states=counted)]
    return sum(attrs.get("origin") != "family" and not attrs.get(KNOWN_FROM) for attrs in found)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
