"""The worker processes of one supervisor: of `lowsearch run`, or of `lowsearch worker` beside it on this or another machine.

A supervisor sees at once when a child of its own dies, and hands its trial back. Of everybody else's workers it watches the leases.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import optuna
from filelock import FileLock, Timeout

from lowsearch import errors
from lowsearch.errors import LowsearchError, StudyError
from lowsearch.study.storage import crew_of, reclaim, running
from lowsearch.study.workers.leases import WORKER, Watch
from lowsearch.study.workers.worker import PROPOSAL_LOCK, USER_ERROR_EXIT, WORKER_LOCK

log = logging.getLogger(__name__)

MAX_CRASHES_IN_A_ROW = 3
_LOOK_S = 2.0
"""How often the leases are looked at."""


class Worker:
    """A worker process as its parent sees it."""

    def __init__(self, folder: Path, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.log = folder / "logs" / f"{name.split('.')[0]}.log"
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("a", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8",
                env={**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")},
            )  # fmt: skip

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Have it end the search at the next rung."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # It is dead already, and its exit code tells why.
            self._process.stdin.write("stop\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.close()

    def close(self) -> str:
        """Wait for its end and return what it wrote to stdout."""
        assert self._process.stdin is not None and self._process.stdout is not None
        said = self._process.stdout.read()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                stream.close()
        return said

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"


class Crew:
    """Up to `size` workers on one study, and the trials they hold."""

    def __init__(
        self,
        folder: Path,
        study: optuna.Study | None,
        command: Sequence[str],
        *,
        size: int,
        name: str = "",
        url: str | None = None,
        blames: bool = True,
    ) -> None:
        """`study` is None where the crew's job holds no trials.

        `name` is empty for `lowsearch run`, and unique for everybody else. `url`: where this machine reaches the database's server.
        `blames`: whether the death of a worker counts against the network it held, which then is the only one.
        """
        self._folder, self._study, self._command, self._size, self._url = folder, study, tuple(command), size, url
        self._blames = blames
        self.name = name
        self._workers: list[Worker] = []
        self._watch = Watch()
        self._looked = 0.0

    def __len__(self) -> int:
        """How many are at work."""
        return len(self._workers)

    def start_missing(self, job: Literal["search", "finals", "trust"], *, elapsed_s: float = 0.0) -> None:
        """Fill the crew up. `elapsed_s`: seconds of search so far, over all runs."""
        slots = [f"worker-{i}" + (f"@{self.name}" if self.name else "") for i in range(self._size)]
        taken = {worker.name.partition(".")[0] for worker in self._workers}
        for slot in slots:
            if slot not in taken:
                name = f"{slot}.{secrets.token_hex(4)}"
                command = [*self._command, str(self._folder), name, job]
                command += [f"{elapsed_s:.3f}", *([self._url] if self._url else [])] if job == "search" else []
                self._workers.append(Worker(self._folder, name, command))

    def collect(self) -> list[Worker]:
        """Take leave of ended workers; returns those that crashed, whose trials have been given back.

        Raises what a worker says that the user got wrong.
        """
        ended = [worker for worker in self._workers if worker.exit_code is not None]
        self._workers = [worker for worker in self._workers if worker not in ended]
        crashed = []
        for worker, said in [(worker, worker.close()) for worker in ended]:
            if worker.exit_code == USER_ERROR_EXIT:
                raise _user_error(said, worker)
            if worker.exit_code != 0:
                log.warning("%s ended with code %s: %s", worker.name, worker.exit_code, worker.last_words())
                crashed.append(worker)
        if crashed:
            self._reclaim(crashed=[w.name for w in crashed] if self._blames else ())
        return crashed

    def hand_back_silent(self) -> None:
        """Hand back the trials whose lease is over, whoever held them. Call it often; it looks every two seconds."""
        assert self._study is not None, "it holds no trials"
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        silent = self._watch.silent(running(self._study))
        if silent and (numbers := self._reclaim(silent=silent)):
            log.warning("handed back after the silence of their workers: trials %s", ", ".join(map(str, numbers)))

    def left_behind(self) -> bool:
        """Hand back what nobody of this crew can be working on any more; whether there was anything."""
        return bool(self._reclaim())

    def others_at_work(self) -> bool:
        """Whether anybody holds a trial who is not of this crew."""
        assert self._study is not None, "it holds no trials"
        return any(crew_of(trial.user_attrs.get(WORKER) or "") != self.name for trial in running(self._study))

    def ask_to_stop(self) -> None:
        """Have the workers end the search at their next rung."""
        for worker in self._workers:
            worker.ask_to_stop()

    def end(self) -> None:
        """End the workers at once, and hand back what they held."""
        for worker in self._workers:
            worker.kill()
        self._workers = []
        self._reclaim()

    def _reclaim(self, *, crashed: Sequence[str] = (), silent: Sequence[int] = ()) -> list[int]:
        if self._study is None:
            return []
        living = [worker.name for worker in self._workers]
        with FileLock(self._folder / PROPOSAL_LOCK):
            return reclaim(self._study, crew=self.name, living=living, crashed=crashed, silent=silent)


def await_orphans(folder: Path) -> None:
    """Wait until the workers of a killed run are gone: they end by themselves when they find their parent gone."""
    for lock in folder.glob(WORKER_LOCK.format(slot="worker-*")):
        if crew_of(lock.name.removeprefix(".")):
            continue  # Of `lowsearch worker`: its trials are under lease.
        try:
            with FileLock(lock, timeout=60):
                pass
        except Timeout as error:
            raise StudyError(
                f"a worker of an earlier run of study {folder.name!r} is still at work", hint=f"end the process that holds {lock}"
            ) from error


def crashed_too_often(folder: Path, worker: Worker) -> StudyError:
    """What to tell where MAX_CRASHES_IN_A_ROW workers died."""
    return StudyError(
        f"workers of study {folder.name!r} died {MAX_CRASHES_IN_A_ROW} times in a row: {worker.last_words()}",
        hint=f"read {worker.log}; the same command resumes",
    )


def _user_error(said: str, worker: Worker) -> LowsearchError:
    try:
        values = json.loads(said.strip().splitlines()[-1])
        kind = getattr(errors, values["kind"], StudyError)
        return kind(values["message"], hint=values["hint"])
    except (IndexError, ValueError, KeyError, TypeError):
        return StudyError(f"a worker stopped: {worker.last_words()}", hint=f"read {worker.log}")
