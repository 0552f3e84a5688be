"""The process of a worker. Started by `study.workers.crew`, never by hand.

    python -m lowsearch.study.workers.process FOLDER NAME search ELAPSED_S [STORAGE_URL]
    python -m lowsearch.study.workers.process FOLDER NAME finals
    python -m lowsearch.study.workers.process FOLDER NAME trust

Any byte on stdin ends the search at the next rung; the end of the stream (the parent is gone) ends the process at once. Everything it
trained is on disk by then.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from filelock import FileLock

from lowsearch.errors import LowsearchError
from lowsearch.study.assembly import build_parts
from lowsearch.study.finalists import train_planned
from lowsearch.study.held_out import train_ordered
from lowsearch.study.parts import Parts
from lowsearch.study.settings import StudySettings
from lowsearch.study.storage import crew_of
from lowsearch.study.workers.conductor import Conductor
from lowsearch.study.workers.engines import RayEngine
from lowsearch.study.workers.worker import USER_ERROR_EXIT, WORKER_LOCK, Abandoned, Plan, SearchWorker

_TRAININGS: dict[str, Callable[..., None]] = {"finals": train_planned, "trust": train_ordered}
"""Jobs that are a list of trainings, by name."""


def main(arguments: Sequence[str], *, parts: Callable[[Path, StudySettings], Parts] = build_parts) -> int:
    """Entry point of the process; returns its exit code. A mistake of the user's goes to stdout as JSON, for the parent to raise."""
    folder, name, job = Path(arguments[0]), arguments[1], arguments[2]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers itself.
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s")
    stopped = threading.Event()
    threading.Thread(target=_obey, args=(stopped,), daemon=True).start()
    slot = name.partition(".")[0]
    try:
        held = FileLock(folder / WORKER_LOCK.format(slot=slot), timeout=60)  # A lock without a name is given back at once.
        held.acquire()
        plan = Plan.read(folder)
        if job in _TRAININGS:
            _TRAININGS[job](folder, parts(folder, plan.settings), engine=_engine(plan), at_once=plan.settings.workers)
            return 0
        start, before_s = time.monotonic(), float(arguments[3])
        worker = _kind(plan, name)(
            folder, plan, parts(folder, plan.settings), name=name, stopped=stopped, clock=lambda: before_s + time.monotonic() - start,
            url=arguments[4] if len(arguments) > 4 else None,
        )  # fmt: skip
        worker.run()
        return 0
    except LowsearchError as error:
        return _complain(error)
    except Abandoned as abandoned:
        if isinstance(abandoned.__cause__, LowsearchError):
            return _complain(abandoned.__cause__)
        traceback.print_exception(abandoned.__cause__)
        return 1


def _kind(plan: Plan, name: str) -> Callable[..., SearchWorker]:
    """What works on the trials. Who joined trains by itself, one network at a time."""
    settings = plan.settings
    if crew_of(name) or (settings.engine == "local" and settings.n_ahead == 1):
        return SearchWorker
    return partial(Conductor, engine=_engine(plan))


def _engine(plan: Plan) -> RayEngine | None:
    settings = plan.settings
    if settings.engine == "local":
        return None
    return RayEngine(settings.engine, at_once=settings.workers, cpus=settings.trial_cpus, gpus=settings.task_gpus)


def _complain(error: LowsearchError) -> int:
    print(json.dumps({"kind": type(error).__name__, "message": error.message, "hint": error.hint}), flush=True)
    return USER_ERROR_EXIT


def _obey(stopped: threading.Event) -> None:
    while os.read(0, 64):  # Not sys.stdin: a thread that waits in it breaks the interpreter's shutdown.
        stopped.set()
    os._exit(1)  # The parent is gone: whoever resumes the study must not meet this process.


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
