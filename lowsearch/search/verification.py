"""Near a latency limit no prediction decides: a candidate there is measured on the device before its training begins.

It is timed beside the trainings of other workers, so some networks of the latency table are timed with it: how much longer they take
now than in the table is the pace, and is divided out. What was measured is appended to `verified.jsonl` of the study before anything
is decided by it, so that an interrupted study decides as an uninterrupted one; from then on the search knows that network's latency.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lowsearch.arch import Arch
from lowsearch.errors import StudyError
from lowsearch.latency.pace import pace_since
from lowsearch.search.estimates import LatencyModel
from lowsearch.search.objectives import LATENCY_METRICS, Limit, of_latency

VERIFIED = "verified.jsonl"
BAND = 2.0
"""Candidates within so many standard deviations of their prediction from a limit are measured; one in 40 errs by more to one side."""
N_ANCHORS = 4
"""Networks of the table that are timed with a candidate. Fewer say little of the pace; with four, it is known to about 2 %."""
_MEDIAN_STD = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean."""


class Measured(Protocol):
    """A measured network; `latency.timing.NetworkLatency` is one."""

    @property
    def latency_ms(self) -> float: ...
    @property
    def latency_std_ms(self) -> float: ...
    @property
    def samples_ms(self) -> Sequence[Sequence[float]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What the device said of one candidate."""

    arch_id: str
    genome: tuple[int, ...]
    """Canonical."""
    latency_ms: float
    """At the pace of the latency table."""
    latency_std_ms: float
    """Standard error, from the differences between processes and between the anchors."""
    predicted_latency_ms: float
    predicted_latency_std_ms: float
    pace: float
    """How many times longer the anchors took than in the table; 1 where there are none."""
    anchor_ratios: tuple[float, ...]
    samples_ms: tuple[tuple[float, ...], ...]
    """As measured: a tuple for every process, in it a number for every round."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verification:
        """Inverse of `dataclasses.asdict`. Raises KeyError, TypeError or ValueError on anything else."""
        numbers = {f.name: float(values[f.name]) for f in dataclasses.fields(cls) if f.type == "float"}
        if set(values) != {f.name for f in dataclasses.fields(cls)} or not all(0 <= x < math.inf for x in numbers.values()):
            raise ValueError("a field is missing, unknown, negative or not finite")
        return cls(
            arch_id=str(values["arch_id"]), genome=tuple(map(int, values["genome"])),
            anchor_ratios=tuple(map(float, values["anchor_ratios"])),
            samples_ms=tuple(tuple(map(float, rounds)) for rounds in values["samples_ms"]), **numbers,
        )  # fmt: skip


class Verifications:
    """Those of one study, on disk; lines of other processes appear by themselves. Only who holds the proposal lock appends."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` is the study's `verified.jsonl`; without one nothing is ever verified."""
        self._path = path
        self._found: dict[bytes, Verification] = {}
        self._read_bytes = 0

    def found(self) -> Mapping[bytes, Verification]:
        """By the bytes of the canonical genome. Raises StudyError on a damaged line; a torn last one does not count."""
        if self._path is None or not self._path.exists() or self._path.stat().st_size <= self._read_bytes:
            return self._found
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            unread = file.read()
        for line in unread[: unread.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                verification = Verification.from_dict(json.loads(line))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise StudyError(
                    f"{self._path} is damaged at byte {self._read_bytes}: {error}", hint="remove the line; its network is measured anew"
                ) from error
            self._found.setdefault(_key(verification.genome), verification)
            self._read_bytes += len(line)
        return self._found

    def of(self, genome: np.ndarray) -> Verification | None:
        """That of a canonical genome (n_genes,), None where it was not measured."""
        return self.found().get(_key(genome))

    def append(self, verification: Verification) -> None:
        """Add a line and wait until it is on disk; what a crash tore off before it is removed."""
        assert self._path is not None, "a study without a folder measures nothing"
        self.found()
        with self._path.open("ab") as file:
            file.truncate(self._read_bytes)
            file.write(json.dumps(dataclasses.asdict(verification)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.found()


@dataclass(frozen=True)
class VerifiedLatency:
    """A latency model that knows what was measured: such a network has its measured latency, and no doubt is left about its limit."""

    model: LatencyModel
    verifications: Verifications

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> mean_ms (n,), std_ms (n,); 0 for a measured network."""
        mean_ms, std_ms = (np.array(values, dtype=float) for values in self.model.predict(genomes))
        found = self.verifications.found()
        for i, genome in enumerate(genomes if found else ()):
            if (verification := found.get(_key(genome))) is not None:
                mean_ms[i], std_ms[i] = verification.latency_ms, 0.0
        return mean_ms, std_ms


def is_near_limit(limits: Iterable[Limit], mean_ms: float, std_ms: float, *, batch: int = 1) -> bool:
    """Whether a prediction leaves in doubt on which side of a limit on latency (or throughput, or time per image) a network is."""
    return any(limit.metric in LATENCY_METRICS and abs(limit.bound_ms(batch) - mean_ms) <= BAND * std_ms for limit in limits)


def broken_limit(limits: Iterable[Limit], latency_ms: float, *, batch: int = 1) -> Limit | None:
    """The limit that a measured latency breaks, None where it keeps all."""
    return next((x for x in limits if _relative_excess(x, latency_ms, batch) > 0), None)


def _relative_excess(limit: Limit, latency_ms: float, batch: int) -> float:
    """By how much a limit on LATENCY_METRICS is broken, as a fraction of its bound; 0 where it is not, and for other limits."""
    if limit.metric not in LATENCY_METRICS:
        return 0.0
    return max(0.0, float(limit.excess(of_latency(limit.metric, latency_ms, batch)))) / limit.bound


def verify(
    arch: Arch,
    genome: np.ndarray,
    predicted: tuple[float, float],
    *,
    anchors: Sequence[tuple[Arch, float]],
    measure: Callable[[Sequence[Arch]], Sequence[Measured]],
) -> Verification:
    """Measure `arch` and the N_ANCHORS of `anchors` (network and its latency_ms in the table) that are nearest to its size.

    `predicted`: latency_ms and its standard deviation.
    """
    others = sorted((a for a in anchors if a[0] != arch), key=lambda anchor: abs(math.log(anchor[1] / predicted[0])))[:N_ANCHORS]
    timed, *now = measure([arch, *(other for other, _ in others)])
    ratios = [m.latency_ms / then_ms for m, (_, then_ms) in zip(now, others, strict=True)]
    pace = pace_since(ratios, [1.0] * len(ratios)) if ratios else 1.0
    pace_std = _MEDIAN_STD * float(np.std(np.log(ratios), ddof=1)) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    relative_std = math.hypot(timed.latency_std_ms / timed.latency_ms, pace_std)
    latency_ms = timed.latency_ms / pace
    return Verification(
        arch_id=arch.arch_id, genome=tuple(int(g) for g in genome), latency_ms=latency_ms, latency_std_ms=relative_std * latency_ms,
        predicted_latency_ms=predicted[0], predicted_latency_std_ms=predicted[1], pace=pace, anchor_ratios=tuple(ratios),
        samples_ms=tuple(tuple(rounds) for rounds in timed.samples_ms),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedCheck:
    """How candidates near a latency limit fared when they were measured before their training."""

    networks: int
    over: int
    """How many broke a limit, and were not trained."""
    worst_excess: float
    """The largest break as a fraction of the limit; 0 where none breaks it."""


def checked(found: Iterable[Verification], limits: Sequence[Limit], *, batch: int = 1) -> VerifiedCheck:
    """The outcome of `found` under the limits on latency."""
    excess = [max([0.0, *(_relative_excess(limit, v.latency_ms, batch) for limit in limits)]) for v in found]
    return VerifiedCheck(networks=len(excess), over=sum(x > 0 for x in excess), worst_excess=max([0.0, *excess]))


def _key(genome: Iterable[int]) -> bytes:
    return np.asarray(genome, dtype=np.int8).tobytes()
