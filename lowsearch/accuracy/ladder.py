"""The ladder: networks trained to a rung of the full schedule, and further from there when they deserve it.

A plain rung is a fraction of one schedule, so climbing costs only the difference, and a network that climbed to the top is the network
that was trained at once, bit for bit. A rung apart, on fewer images or at a lower resolution, is a training of its own (`train.rung`).
Every rung reached is a record; a rung on record is never trained again.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from lowsearch.accuracy.records import AccuracyRecord, AccuracyRecords
from lowsearch.arch import Arch
from lowsearch.data import ImageData
from lowsearch.errors import UsageError
from lowsearch.train import Order, Recipe, Rung, rungs_of, train
from lowsearch.train.order import replace_bytes, scratch

log = logging.getLogger(__name__)

RECORDS = "records.jsonl"
TRAINED_TWICE = "trained in vain:"
"""How the log calls a training whose rung was on record when it ended; file locks that do not hold let it happen."""
RUNGS = (0.5, 1.0)
"""Fixed by benchmarks/lowest_rung.py: on fashion-mnist-mini 25 % of the schedule adds nothing to what the architecture tells, 50 % does."""


class Ladder:
    """Trains networks on one data set by one recipe with one seed. Several processes may share the folder."""

    def __init__(
        self,
        data: ImageData,
        recipe: Recipe,
        *,
        folder: Path,
        rungs: Sequence[float] = RUNGS,
        seed: int = 0,
        records: str = RECORDS,
        device: str = "cpu",
    ) -> None:
        """`records`: name of the file in `folder` that every rung reached is written to. `device`: `cpu` or `cuda`, where it trains."""
        self.data, self.recipe, self.rungs, self.seed, self.folder, self.device = data, recipe, rungs_of(rungs), seed, folder, device
        require_images(self.rungs, data, recipe)
        self.records = AccuracyRecords(folder / records)

    def run(self, arch: Arch, rung: float, *, progress: Callable[[float], None] | None = None) -> AccuracyRecord:
        """The record of `arch` at `rung`, trained from where its training stands if it is not there yet.

        A network that another process is training is waited for. `progress` hears the fraction of the full schedule done.
        """
        if rung not in self.rungs:
            raise UsageError(f"rung is {rung!r}, expected one of {self.rungs}")
        rung = Rung.of(rung)
        if (known := self.record(arch, rung)) is not None:
            return known
        checkpoint = self.checkpoint(arch, rung)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(checkpoint) + ".lock"):
            self.records.refresh()
            if (known := self.record(arch, rung)) is not None:
                return known
            how: dict[str, Any] = {"rung": rung} if rung.apart else {"until": float(rung)}
            result = train(
                arch, self.data, self.recipe, seed=self.seed, checkpoint=checkpoint, progress=progress, device=self.device, **how
            )
            # A checkpoint may be further than its records, after a crash or by another ladder: the curve up to the rung is what counts.
            curve = tuple(point for point in result.curve if point.fraction <= _reached(rung, result.curve))
            record = AccuracyRecord(
                arch=arch, recipe=self.recipe.name, recipe_hash=self.recipe.recipe_hash, data=self.data.name,
                data_hash=self.data.data_hash, seed=self.seed, rung=rung, curve=curve, diverged=result.diverged, versions=_versions(),
            )  # fmt: skip
            self._keep(record)
        if rung.apart:
            _remove(checkpoint)
        return record

    def order(self, arch: Arch, rung: float) -> Order:
        """`run` for another machine: the images and the checkpoint go along, the record and the next checkpoint come back."""
        checkpoint = self.checkpoint(arch, rung)
        return Order(
            name=checkpoint.stem, function=climb, shared=self.data,
            values={
                "arch": arch, "rung": rung, "recipe": self.recipe, "rungs": self.rungs, "seed": self.seed, "device": self.device,
                "checkpoint": checkpoint.read_bytes() if checkpoint.exists() else None,
            },
            accept=partial(self._accept, arch), here=partial(self.run, arch, rung),
        )  # fmt: skip

    def _accept(self, arch: Arch, found: tuple[dict[str, Any], bytes | None]) -> AccuracyRecord:
        values, checkpoint = found
        record = AccuracyRecord.from_dict(values)
        if checkpoint is not None:
            replace_bytes(self.checkpoint(arch), checkpoint)
        self._keep(record)
        return record

    def _keep(self, record: AccuracyRecord) -> None:
        if not self.records.append(record):
            log.warning("%s %s to %g: another process has recorded it meanwhile", TRAINED_TWICE, record.arch_id, record.rung)

    def record(self, arch: Arch, rung: float) -> AccuracyRecord | None:
        """What is on record for `arch` at `rung`, under this ladder's recipe, data and seed."""
        return self.records.get((arch.arch_id, self.recipe.recipe_hash, self.data.data_hash, self.seed, rung))

    def reached(self, arch: Arch) -> float:
        """Highest rung on record for `arch`, 0.0 before the first."""
        return max((rung for rung in self.rungs if self.record(arch, rung) is not None), default=0.0)

    def checkpoint(self, arch: Arch, rung: float = 1.0) -> Path:
        """Where the training of `arch` stands that leads to `rung`; one for all plain rungs."""
        apart = f"-{rung}" if Rung.of(rung).apart else ""
        return self.folder / "checkpoints" / f"{arch.arch_id}-{self.recipe.recipe_hash}-s{self.seed}{apart}.safetensors"

    def discard(self, arch: Arch) -> None:
        """Remove the checkpoint of `arch`, which will not climb further. Its records stay; asked again, it trains from the start."""
        for rung in self.rungs:
            _remove(self.checkpoint(arch, rung))


def climb(
    data: ImageData,
    *,
    arch: Arch,
    rung: float,
    recipe: Recipe,
    rungs: Sequence[float],
    seed: int,
    device: str,
    checkpoint: bytes | None,
) -> tuple[dict[str, Any], bytes | None]:
    """`Ladder.run` on a machine that shares no folder: the record's values, and below the top the checkpoint it left."""
    with scratch(f"{arch.arch_id}-{recipe.recipe_hash}-{data.data_hash}-s{seed}-{device}") as folder:
        ladder = Ladder(data, recipe, folder=folder, rungs=rungs, seed=seed, device=device)
        path = ladder.checkpoint(arch, rung)
        if checkpoint is not None and not path.exists():
            replace_bytes(path, checkpoint)
        record = ladder.run(arch, rung)
        return record.to_dict(), path.read_bytes() if rung < 1 and path.exists() else None


def require_images(rungs: Sequence[Rung], data: ImageData, recipe: Recipe) -> None:
    """Raise UsageError where a rung has too few images of `data`."""
    for rung in rungs:
        rung.n_images(recipe.n_images(len(data.train)), len(data.classes))


def _remove(checkpoint: Path) -> None:
    checkpoint.unlink(missing_ok=True)
    Path(str(checkpoint) + ".lock").unlink(missing_ok=True)


def _reached(rung: float, curve: tuple) -> float:
    """The fraction at which `curve` (of CurvePoints) has `rung`: steps are whole, so it may lie a little beside it."""
    return min((point.fraction for point in curve), key=lambda fraction: abs(fraction - rung))


@cache
def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("lowsearch", "torch", "numpy")}
    return {"python": platform.python_version(), "machine": platform.machine(), **packages}
