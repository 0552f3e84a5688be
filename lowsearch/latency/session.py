"""A measurement that outlives its process: every timing is appended to a file as it comes, and the same call goes on from there.

`profile` measures a table in one, `insights` its experiments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from lowsearch.errors import LowsearchError, TableError
from lowsearch.latency.doubt import doubtful, invalid, most_again
from lowsearch.latency.measure import Effort, Launcher, Progress, Request, run_requests, steps, warn_of_refused
from lowsearch.latency.target import Context, Device, Target
from lowsearch.latency.timing import Item, Timing

log = logging.getLogger(__name__)

SCHEMA = "lowsearch-latency-partial"
VERSION = 2

Found = Mapping[Item, Mapping[int, Timing]]
"""Timings of every item, by process."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` for this process; the operating system frees the lock of a killed one."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TableError(f"another process is measuring {path}", hint="wait for it to end, or end it and run the same command") from error
    try:
        yield
    finally:
        lock.release()


class Session:
    """One measurement under way: what was measured before it was interrupted, and how far it is."""

    def __init__(
        self, partial: Partial, expected: int, *, device: Device, seed: int, launch: Launcher | None, label: str, progress: Progress | None
    ) -> None:
        """`expected`: timings of the whole measurement, as far as they can be told before it."""
        self._partial, self._total = partial, expected
        self._device, self._seed, self._launch = device, seed, launch
        self._label, self._progress = label, progress
        self._found: dict[Item, dict[int, Timing]] = defaultdict(dict)
        for timing in partial.timings:
            self._found[timing.item][timing.process] = timing
        self._done = len(partial.timings)
        self.measured_again = 0
        """Items that further processes timed, of all that `measure` was asked for."""
        self._report()

    def measure(self, items: Sequence[Item], effort: Effort, *, again: bool = True) -> Found:
        """Every item timed in as many processes as `effort` says; what is doubtful then in one more, what is invalid even so in another,
        unless not `again`. What the runtime cannot execute is left out, with a warning."""
        self._run(items, range(effort.processes), effort)
        refused = {item: timing.refused for item in items for timing in self._found[item].values() if timing.refused}
        warn_of_refused(refused)
        items = [item for item in items if item not in refused]
        left = most_again(effort.processes * len(items)) if again else 0
        repeated: set[Item] = set()
        for process, choose in ((effort.processes, doubtful), (effort.processes + 1, invalid)):
            chosen = choose({item: self._timings_before(process, item) for item in items}, at_most=left)
            left -= len(chosen)
            self._total += sum(process not in self._found[item] for item in chosen)
            self._run(chosen, [process], effort)
            repeated.update(chosen)
        self.measured_again += len(repeated)
        return {item: self._found[item] for item in items}

    def expect_fewer(self, timings: int) -> None:
        """The whole measurement turns out to be smaller by so many timings."""
        self._total -= timings

    def _timings_before(self, process: int, item: Item) -> list[Timing]:
        """What the processes before `process` measured of `item`: the same also when `process` was killed on its way."""
        return [timing for number, timing in sorted(self._found[item].items()) if number < process]

    def _run(self, items: Sequence[Item], processes: Iterable[int], effort: Effort) -> None:
        """Run what is missing, a request for every process; each goes through the items in groups of its own."""
        requests = []
        for process in processes:
            missing = [item for item in items if process not in self._found[item]]
            if missing:
                groups = steps(missing, rng=np.random.default_rng((self._seed, process)))
                requests.append(
                    Request(target=self._partial.target, process=process, seed=self._seed + process, effort=effort, steps=groups)
                )
        for timing in run_requests(requests, self._device, launch=self._launch):
            self._partial.append(timing)
            self._found[timing.item][timing.process] = timing
            self._done += 1
            self._report()

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done), self._label)


class Partial:
    """The timings of an unfinished measurement, a JSON line each, appended as they come. A torn last line is cut off; a file of another
    machine or other versions is started anew."""

    def __init__(self, table_path: Path, target: Target, here: Context) -> None:
        self.path = table_path.with_suffix(".partial.jsonl")
        self.target = target
        header = {"schema": SCHEMA, "version": VERSION, "target": dataclasses.asdict(target), "fingerprint": here.fingerprint}
        lines = self._whole_lines()
        if lines and self._parse(lines[0], 1) != header:
            log.warning("%s was left by another machine or other versions: starting anew", self.path)
            lines = []
        self.timings = [self._timing(line, number) for number, line in enumerate(lines[1:], start=2)]
        if not lines:
            self.path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def __enter__(self) -> Partial:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def finished(self, effort: Effort) -> list[Item]:
        """Items that were timed in as many processes as `effort` says before the measurement was interrupted."""
        processes: dict[Item, set[int]] = {}
        for timing in self.timings:
            processes.setdefault(timing.item, set()).add(timing.process)
        return [item for item, numbers in processes.items() if numbers.issuperset(range(effort.processes))]

    def append(self, timing: Timing) -> None:
        self._file.write(json.dumps(timing.to_dict()) + "\n")
        self._file.flush()

    def _whole_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return whole.decode("utf-8", errors="replace").splitlines()

    def _parse(self, line: str, number: int) -> Any:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise self._damaged(number, error.msg) from error

    def _timing(self, line: str, number: int) -> Timing:
        try:
            return Timing.from_dict(self._parse(line, number))
        except (LowsearchError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(number, f"no timing ({error})") from error

    def _damaged(self, number: int, reason: str) -> TableError:
        return TableError(f"{self.path}:{number}: damaged line: {reason}", hint="remove the file and run the same command again")
