"""More workers for a study that `lowsearch run` works on, from another process or another machine that shares its folder."""

from __future__ import annotations

import re
import secrets
import socket
import time
from pathlib import Path

from optuna.trial import TrialState

from lowsearch.errors import StudyError
from lowsearch.study.parts import Progress
from lowsearch.study.run import CLOCK, HOST, Backend, Clock, is_run
from lowsearch.study.storage import crew_of, is_search_open, nothing_to_start, open_study
from lowsearch.study.workers.crew import MAX_CRASHES_IN_A_ROW, Crew, crashed_too_often
from lowsearch.study.workers.leases import WORKER
from lowsearch.study.workers.worker import Plan

_POLL_S = 0.5


def join(folder: Path, *, workers: int, url: str | None = None, progress: Progress | None = None, backend: Backend | None = None) -> int:
    """Train for the study in `folder` until its search is over or nobody runs it any more; returns how many networks were scored.

    A run that is still making ready is waited for.
    `url`: where this machine reaches the database's server, if not where study.yaml says. Raises StudyError where the study is not being
    run, or keeps its trials in a file of another machine.
    """
    backend = backend or Backend()
    plan = Plan.read(folder)
    if plan.settings.storage is None and (at := _host_of(folder)) != socket.gethostname():
        raise StudyError(
            f"study {folder.name!r} keeps its trials in a file that only processes of one machine ({at}) may share",
            hint="start a study with --storage, and join that",
        )
    if plan.settings.engine != "local":
        raise StudyError(
            f"study {folder.name!r} has its networks trained as tasks of Ray, proposed by one process: if workers joined, what is found "
            "would depend on who is first",
            hint="add nodes to the cluster, and raise --workers",
        )
    if not is_run(folder):
        raise StudyError(f"study {folder.name!r} is not being run", hint=f"start it first: lowsearch run --study {folder.name}")
    study = open_study(folder, plan.settings.objectives, url=url, join=True)
    name = f"{re.sub('[^A-Za-z0-9-]', '-', socket.gethostname())}-{secrets.token_hex(3)}"
    crew = Crew(folder, study, backend.worker, size=workers, name=name, url=url)
    crashes = scored_at_crash = scored = 0
    began = closing = False
    try:
        while is_run(folder):
            if is_search_open(study):
                began = True
            elif began and not closing:
                closing = True
                crew.ask_to_stop()
            crashed = crew.collect()
            done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            scored = sum(crew_of(trial.user_attrs.get(WORKER) or "") == name for trial in done)
            if crashed:
                crashes = 1 if scored > scored_at_crash else crashes + 1
                scored_at_crash = scored
                if crashes >= MAX_CRASHES_IN_A_ROW:
                    raise crashed_too_often(folder, crashed[-1])
            crew.hand_back_silent()
            if closing and not crew:
                break
            if began and not closing and not nothing_to_start(study, plan.settings.trials):
                crew.start_missing("search", elapsed_s=Clock(folder / CLOCK).seconds("search"))
            if progress is not None:
                progress(scored, len(done), "networks scored here, of all" if began else "waiting for the search to begin")
            time.sleep(_POLL_S)
    finally:
        crew.end()
    return scored


def _host_of(folder: Path) -> str:
    path = folder / HOST
    return path.read_text(encoding="utf-8").strip() if path.exists() else "not known"
