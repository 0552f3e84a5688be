"""Leases: a worker that trains shows again and again that it is alive, and who falls silent loses its trial to another.

A worker counts up an attribute of its trial. Whoever watches measures for how long it has not changed, by its own clock and only
while it can look: no two clocks are compared, and a database that is away, or a laptop that sleeps, costs nobody a trial.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lowsearch.errors import StudyError

log = logging.getLogger(__name__)

BEAT_S = 10.0
LEASE_S = 90.0
"""Silence after which a trial is handed back."""

WORKER = "worker"
BEAT = "beat"


class Overtaken(BaseException):
    """The trial belongs to another worker by now. No Exception: those Optuna would catch, and mark the trial as failed."""


def is_held(storage: BaseStorage, trial_id: int, worker: str) -> bool:
    """Whether `worker` still holds the trial."""
    trial = storage.get_trial(trial_id)
    return trial.state == TrialState.RUNNING and trial.user_attrs.get(WORKER) == worker


@contextmanager
def kept(storage: BaseStorage, trial_id: int, worker: str) -> Iterator[None]:
    """Renew the lease of `worker` on a trial that it has signed, for as long as the block runs."""
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(storage, trial_id, worker, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _renew(storage: BaseStorage, trial_id: int, worker: str, ended: threading.Event) -> None:
    beat = 0
    try:
        while not ended.wait(BEAT_S):
            if not is_held(storage, trial_id, worker):
                return
            beat += 1
            storage.set_trial_user_attr(trial_id, BEAT, beat)
    except (StudyError, UpdateFinishedTrialError) as error:
        log.warning("the lease is renewed no longer: %s", error)  # The worker finds out by itself when it next asks the database.


class Watch:
    """Tells which running trials have fallen silent."""

    def __init__(self, *, lease_s: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = LEASE_S if lease_s is None else lease_s
        self._now = now
        self._looked: float | None = None
        self._silence: dict[int, tuple[object, float]] = {}

    def silent(self, running: Sequence[FrozenTrial]) -> list[int]:
        """Numbers of those of the `running` trials whose lease is over. Call it often: time between two looks counts 20 s at most."""
        now = self._now()
        step_s = 0.0 if self._looked is None else min(now - self._looked, 2 * BEAT_S)
        self._looked = now
        silence: dict[int, tuple[object, float]] = {}
        for trial in running:
            sign = (trial.user_attrs.get(WORKER), trial.user_attrs.get(BEAT))
            before, silence_s = self._silence.get(trial.number, (None, 0.0))
            silence[trial.number] = (sign, silence_s + step_s if sign == before else 0.0)
        self._silence = silence
        return [number for number, (_, silence_s) in silence.items() if silence_s >= self._lease_s]
