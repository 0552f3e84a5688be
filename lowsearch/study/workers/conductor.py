"""One process that proposes ahead: it keeps several trials in flight, has them trained by an engine, and ends them in their order.

A trial knows of the trials that had ended when it was proposed, and of no other, from its proposal to its last rung. A trial is
proposed as soon as one ends, before the next one ends. So what is proposed and scored depends on how many are in flight, and not on
how many train at once, which of them is done first, or where: one process and a Ray cluster find the same networks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import Trial, TrialState

from lowsearch.arch import Arch
from lowsearch.errors import NothingLeftError
from lowsearch.study.outputs import decode
from lowsearch.study.parts import Record
from lowsearch.study.storage import candidates, set_missed
from lowsearch.study.workers.engines import DiedError, Engine, HereEngine, Job
from lowsearch.study.workers.leases import WORKER, Overtaken, is_held, kept
from lowsearch.study.workers.worker import Score, SearchWorker

logger = logging.getLogger(__name__)

KNOWS = "knows_below"
"""Attribute of a trial: it knows of the trials with lower numbers."""


@dataclass(eq=False)
class _Flight:
    """A trial under way."""

    trial: Trial
    genome: np.ndarray
    """(n_genes,)."""
    arch: Arch
    whole: bool
    knows_below: int
    lease: ExitStack
    rung: int = 0
    """Index of the rung to train to next."""
    job: Job | None = None
    ended: bool = False
    score: Score | None = None
    """Of the highest rung so far; None at the end: it is handed back, or given up for `reason`."""
    reason: str = ""


class Conductor(SearchWorker):
    """Runs several trials at a time, and tells of them in the order of their numbers."""

    def __init__(self, *arguments: Any, engine: Engine | None, **keywords: Any) -> None:
        """As SearchWorker. Without an `engine` it trains by itself, one network at a time."""
        super().__init__(*arguments, **keywords)
        self._engine = engine or HereEngine()
        self._at_once = 1 if engine is None else self._plan.settings.workers
        self._flights: list[_Flight] = []
        self._hidden: frozenset[str] = frozenset()
        self._found_none = False

    def run(self) -> None:
        """Run trials to the end of the search. What it holds when an error ends it is handed back by its parent."""
        try:
            while True:
                self._fill()
                if not self._flights:
                    return
                while not self._flights[0].ended:
                    self._advance()
                self._tell(self._flights[0])
        finally:
            for flight in self._flights:
                flight.lease.close()

    # Proposing ---------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Propose until so many trials are in flight as may be."""
        while not (self._stopped.is_set() or self._found_none) and len(self._flights) < self._plan.settings.n_ahead:
            with self._lock:
                if self._enough():
                    return
                self._propose()

    def _propose(self) -> None:
        found = candidates(self._study, self._parts.space)
        self._hidden = frozenset(decode(self._parts.space, c.genome).arch_id for c in found if c.state in ("running", "waiting"))
        self._judge_signals()
        trial = self._study.ask()
        trial.set_user_attr(WORKER, self._name)
        with ExitStack() as lease:
            lease.enter_context(kept(self._study._storage, trial._trial_id, self._name))
            knows_below = trial.user_attrs.get(KNOWS)  # Of a trial that is taken up again.
            if knows_below is None:
                knows_below = self._flights[0].trial.number if self._flights else trial.number
                trial.set_user_attr(KNOWS, knows_below)
            try:
                genome, reason = self._proposal(trial)
                if reason:
                    self._count_pruned(self._study, self._study.tell(trial, state=TrialState.PRUNED))
                    return
            except NothingLeftError as error:
                if not self._flights and not any(c.state == "complete" for c in found):
                    raise
                set_missed(self._study, error.message)
                self._found_none = True
                return
            self._pruned_in_a_row = 0
            flight = _Flight(
                trial=trial, genome=genome, arch=self._parts.space.decode(genome), whole=self._trains_whole(trial),
                knows_below=int(knows_below), lease=lease.pop_all(),
            )  # fmt: skip
        self._flights.append(flight)
        if self._training is None:
            flight.score, flight.ended = self._score(flight.arch, genome, whole=flight.whole), True

    def _records(self) -> Sequence[Record]:
        return [record for record in self._parts.records() if record.arch_id not in self._hidden]

    # Training ----------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Keep as many trainings going as may be, the oldest trials' first, and take what ends next."""
        training = self._training
        assert training is not None, "a trial without training ends at once"
        for flight in self._flights:
            while not flight.ended and flight.job is None and self._n_running < self._at_once:
                rung = training.rungs[flight.rung]
                if (record := training.record(flight.arch, rung)) is not None:
                    self._judge(flight, record)
                elif self._stopped.is_set():
                    flight.ended = True
                else:
                    flight.job = self._engine.start(training.order(flight.arch, rung))
        running = {flight.job: flight for flight in self._flights if flight.job is not None}
        for job in self._engine.wait(list(running)) if running else ():
            flight = running[job]
            flight.job = None
            try:
                record = self._engine.result(job)
            except DiedError as error:
                flight.score, flight.reason, flight.ended = None, str(error), True
                logger.warning("%s is given up: %s", flight.arch.arch_id, error)
                continue
            self._judge(flight, record)

    @property
    def _n_running(self) -> int:
        return sum(flight.job is not None for flight in self._flights)

    def _judge(self, flight: _Flight, record: Record) -> None:
        training = self._training
        assert training is not None
        later = (
            decode(self._parts.space, c.genome).arch_id
            for c in candidates(self._study, self._parts.space)
            if c.number >= flight.knows_below and c.state != "pruned"  # A repetition of a known network is pruned.
        )
        self._hidden = frozenset(later) - {flight.arch.arch_id}
        flight.score = self._judged_at(record, training.rungs[flight.rung], whole=flight.whole)
        flight.rung += 1
        flight.ended = bool(flight.score.stopped) or flight.rung == len(training.rungs)

    # Ending ------------------------------------------------------------------------------------------------------------

    def _tell(self, flight: _Flight) -> None:
        """End the oldest trial. One that was stopped before its first rung stays as it is, and is handed back by the parent."""
        try:
            if flight.score is not None:
                values = self._values(flight.trial, flight.genome, flight.score)
                self._tidy(self._study, self._study.tell(flight.trial, values))
            elif flight.reason and is_held(self._study._storage, flight.trial._trial_id, self._name):
                flight.trial.set_user_attr("reason", flight.reason)
                self._study.tell(flight.trial, state=TrialState.FAIL)
        except Overtaken:
            logger.warning("a trial was handed to another worker; what was trained of it is on record")
        finally:
            self._flights.remove(flight)
            flight.lease.close()
