"""Accuracy records: one line of JSON for every training that reached a rung, in a file that only grows.

Several processes may append to one file. A line counts once its newline is on disk; what a crash left after the last newline is cut
off by the next writer and reported. Any other damage is an error that names the line: records are never dropped in silence.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from lowsearch.arch import Arch
from lowsearch.errors import LowsearchError, StudyError
from lowsearch.train import CurvePoint, Rung

SCHEMA = 1
_LOCK_TIMEOUT_S = 60
_log = logging.getLogger(__name__)

RecordKey = tuple[str, str, str, int, float]
"""(arch_id, recipe_hash, data_hash, seed, rung): a training with this key is never repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRecord:
    """What one network scored at one rung of one training."""

    arch: Arch
    recipe: str
    recipe_hash: str
    data: str
    data_hash: str
    seed: int
    rung: float
    """Fraction of the full schedule, or a rung apart; kept as a Rung."""
    curve: tuple[CurvePoint, ...]
    """Up to the rung; the last point is the rung itself. Of a rung apart it is the only one."""
    diverged: bool = False
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rung", Rung.of(self.rung))

    @property
    def apart(self) -> Rung | None:
        """The rung, where it is one apart: the accuracy is then that of fewer images or a lower resolution."""
        rung = Rung.of(self.rung)
        return rung if rung.apart else None

    @property
    def arch_id(self) -> str:
        return self.arch.arch_id

    @property
    def val_accuracy(self) -> float:
        return self.curve[-1].val_accuracy

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the training from its start to this rung, lower rungs of the same training included."""
        return self.curve[-1].cpu_seconds

    @property
    def key(self) -> RecordKey:
        return (self.arch_id, self.recipe_hash, self.data_hash, self.seed, self.rung)

    def at(self, fraction: float) -> CurvePoint | None:
        """The curve's point at `fraction` of the schedule (within half a percent of the schedule), or None."""
        near = [point for point in self.curve if abs(point.fraction - fraction) < 0.005]
        return near[0] if near else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` inverts it. arch_id, val_accuracy and cpu_seconds are there for readers of the file."""
        return {
            "schema": SCHEMA, "arch_id": self.arch_id, "rung": str(self.rung) if self.apart else float(self.rung),
            "val_accuracy": self.val_accuracy, "cpu_seconds": self.cpu_seconds,
            "recipe": self.recipe, "recipe_hash": self.recipe_hash, "data": self.data, "data_hash": self.data_hash, "seed": self.seed,
            "diverged": self.diverged, "curve": [dataclasses.asdict(point) for point in self.curve], "versions": dict(self.versions),
            "arch": self.arch.to_dict(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AccuracyRecord:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError on anything else."""
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']!r}, this version reads {SCHEMA}")
        curve = tuple(CurvePoint(**point) for point in values["curve"])
        if not curve:
            raise ValueError("the curve is empty")
        record = cls(
            arch=Arch.from_dict(values["arch"]), recipe=str(values["recipe"]), recipe_hash=str(values["recipe_hash"]),
            data=str(values["data"]), data_hash=str(values["data_hash"]), seed=int(values["seed"]), rung=Rung.of(values["rung"]),
            curve=curve, diverged=bool(values["diverged"]), versions=dict(values["versions"]),
        )  # fmt: skip
        if values["arch_id"] != record.arch_id:
            raise ValueError(f"arch_id {values['arch_id']!r} is not that of its network, {record.arch_id!r}")
        return record


class AccuracyRecords:
    """The records of one file, in the order they were appended; later lines of other processes appear after `refresh`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.repaired_bytes = 0
        """Bytes of torn last lines that this object has cut off."""
        self._lock = FileLock(str(path) + ".lock", timeout=_LOCK_TIMEOUT_S)
        self._records: dict[RecordKey, AccuracyRecord] = {}
        self._read_bytes = 0
        self._read_lines = 0
        self.refresh()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[AccuracyRecord]:
        return iter(tuple(self._records.values()))

    def get(self, key: RecordKey) -> AccuracyRecord | None:
        return self._records.get(key)

    def of(self, arch_id: str) -> tuple[AccuracyRecord, ...]:
        """All records of one network."""
        return tuple(record for record in self._records.values() if record.arch_id == arch_id)

    def refresh(self) -> None:
        """Read the lines appended since the last look. Raises StudyError on a damaged line."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            unread = file.read()
        complete = unread[: unread.rfind(b"\n") + 1]
        for line in complete.splitlines(keepends=True):
            self._read_lines += 1
            record = self._parsed(line)
            self._read_bytes += len(line)
            self._records.setdefault(record.key, record)

    def append(self, record: AccuracyRecord) -> bool:
        """Add `record` and wait until it is on disk. A record with the same key stays as it is; returns whether there was none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record.to_dict(), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._lock:
            self._repair()
            self.refresh()
            if record.key in self._records:
                return False
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self.refresh()
        return True

    def _repair(self) -> None:
        """Cut off what follows the last newline: a line that a crash tore. Call with the lock held."""
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            content = file.read()
            torn = len(content) - (content.rfind(b"\n") + 1)
            if torn:
                file.truncate(len(content) - torn)
                os.fsync(file.fileno())
                self.repaired_bytes += torn
                _log.warning(
                    "%s: cut off a torn last line of %d bytes; the training it told of is repeated when asked for", self.path, torn
                )

    def _parsed(self, line: bytes) -> AccuracyRecord:
        try:
            return AccuracyRecord.from_dict(json.loads(line))
        except (KeyError, TypeError, ValueError, LowsearchError) as error:
            reason = error.message if isinstance(error, LowsearchError) else str(error) or type(error).__name__
            hint = "remove the line; its training is repeated when asked for"
            raise StudyError(f"{self.path}, line {self._read_lines}: not an accuracy record ({reason})", hint=hint) from error
