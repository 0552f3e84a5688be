"""A study with closed-form latency and accuracy, runnable in seconds: what test_study.py and its worker processes share.

As a script it is all sides: `study_fakes.py worker FOLDER NAME JOB ...`, `study_fakes.py run FOLDER SETTINGS_JSON` and
`study_fakes.py join FOLDER WORKERS`.
Files in the study's folder make it misbehave: `crash-on` (arch_ids, one a line, whose training kills the process), `crash-once`
(the same, but only the first time), `mistake` (raises a user error), `hold` (every training waits until it is gone).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fake_tasks
import numpy as np
from fake_tasks import misbehave
from filelock import FileLock

from lowsearch import cost
from lowsearch.accuracy.records import AccuracyRecord
from lowsearch.accuracy.scores import Scores
from lowsearch.arch import Arch, Block
from lowsearch.search.devices import Fleet, fit_scales, scales_from
from lowsearch.search.verification import VERIFIED, Verifications
from lowsearch.space import SearchSpace
from lowsearch.study import run as studies
from lowsearch.study.parts import FinalScore, Parts, ProxyAccuracy
from lowsearch.study.run import Backend, run
from lowsearch.study.settings import StudySettings, read_study_file
from lowsearch.study.storage import candidates, enqueue, open_study, reclaim
from lowsearch.study.warm_start import add_known
from lowsearch.study.workers import leases, process
from lowsearch.study.workers import worker as workers
from lowsearch.study.workers.joining import join
from lowsearch.train import CurvePoint, Order

SPACE = SearchSpace.load(os.environ.get("FAKE_SPACE", "lowformer-micro"))
SCORE = SPACE.block_sums(np.array([[c.macs, c.params] for c in map(cost.of_block, SPACE.blocks)], dtype=float))
_sample = SPACE.sample(500, rng=np.random.default_rng(0))
_features = np.column_stack([SPACE.features(_sample), np.log(SCORE(_sample))])
CENTER, SPREAD = _features.mean(axis=0), np.maximum(_features.std(axis=0), 1e-9) * np.sqrt(_features.shape[1])
RUNGS = (0.25, 0.5, 1.0)
MADE = "made"
"""Names the recipe and the data of all trainings."""
STEP_S = float(os.environ.get("FAKE_STEP_S", "0"))
"""How long a rung takes."""
leases.BEAT_S, leases.LEASE_S = (float(s) for s in os.environ.get("FAKE_BEAT_AND_LEASE_S", "10 90").split())


class FakeLatency:
    """50 ns per thousand MACs, known to 5 %."""

    def predict(self, genomes):
        mean_ms = SCORE(genomes)[:, 0] / 2e7
        return mean_ms, 0.05 * mean_ms


class OtherLatency:
    """A device that parameters slow down, not MACs: 0.1 ms and 1 ns for each, known to 10 %."""

    def predict(self, genomes):
        mean_ms = 0.1 + SCORE(genomes)[:, 1] / 1e6
        return mean_ms, 0.1 * mean_ms


class FakeEnergy:
    """3 mJ for a millisecond, and 2 mJ for a million parameters, known to 10 %."""

    def predict(self, genomes, latency_ms):
        mean_mj = 3 * latency_ms + 2e-6 * SCORE(genomes)[:, 1]
        return mean_mj, 0.1 * mean_mj


def true_accuracy(genomes):
    """Full-schedule accuracy (n,): saturates in the MACs, with a fixed taste for some features."""
    features = SPACE.features(genomes)
    taste = features @ np.random.default_rng(1).normal(size=features.shape[1])
    return 0.8 - 0.5 / (1 + SCORE(genomes)[:, 0] / 1e6) + 0.05 * np.tanh(taste / 10)


def noise(arch_id, seed, *, std=0.004):
    return std * np.random.default_rng([int(arch_id, 16), seed]).normal()


@dataclass(frozen=True)
class FakeRecord:
    arch: Arch
    rung: float
    val_accuracy: float
    cpu_seconds: float
    seed: int = 0

    @property
    def arch_id(self):
        return self.arch.arch_id


class FakeRecords:
    """Lines of JSON as real records have them, appended under a lock."""

    def __init__(self, folder: Path):
        self.path = folder / "records.jsonl"

    def append(self, record: FakeRecord):
        point = CurvePoint(
            fraction=record.rung, step=1, train_loss=1.0, val_loss=1.0, val_accuracy=record.val_accuracy, cpu_seconds=record.cpu_seconds
        )
        line = AccuracyRecord(
            arch=record.arch, recipe=MADE, recipe_hash=MADE, data=MADE, data_hash=MADE, seed=record.seed, rung=record.rung, curve=(point,)
        ).to_dict()
        with FileLock(self.path.with_suffix(".lock")), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[FakeRecord]:
        if not self.path.exists():
            return []
        return sorted(map(parsed, self.path.read_text().splitlines()), key=lambda r: (r.arch_id, r.rung))


@cache
def parsed(line: str) -> FakeRecord:
    record = AccuracyRecord.from_dict(json.loads(line))
    return FakeRecord(record.arch, record.rung, record.val_accuracy, record.cpu_seconds, record.seed)


class FakeTraining:
    """Accuracy grows towards the truth along the rungs."""

    rungs = RUNGS

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.records = folder, seed, FakeRecords(folder)

    def record(self, arch, rung):
        return {(r.arch_id, r.rung, r.seed): r for r in self.records.read()}.get((arch.arch_id, rung, self.seed))

    def run(self, arch, rung):
        if (known := self.record(arch, rung)) is not None:
            return known
        misbehave(self.folder, arch.arch_id)
        time.sleep(STEP_S)
        return self._recorded(arch, rung, 10 * rung)

    def _recorded(self, arch, rung, cpu_seconds):
        truth = float(true_accuracy(SPACE.encode(arch)[None])[0])
        accuracy = truth * (0.7 + 0.3 * rung) + noise(arch.arch_id, self.seed)
        record = FakeRecord(arch, rung, accuracy, cpu_seconds=cpu_seconds, seed=self.seed)
        self.records.append(record)
        return record

    def order(self, arch, rung):
        values = {"folder": str(self.folder), "arch_id": arch.arch_id, "rung": rung, "step_s": STEP_S}
        return Order(
            name=arch.arch_id, function=fake_tasks.train_rung, shared=np.zeros(8), values=values,
            accept=lambda cpu_seconds: self._recorded(arch, rung, cpu_seconds), here=lambda: self.run(arch, rung),
        )  # fmt: skip

    def discard(self, arch):
        pass


class HeldOutTraining(FakeTraining):
    """Ends with KeyboardInterrupt where the set has as many networks as the file `die-at` says."""

    rungs = (1.0,)

    def __init__(self, folder: Path, seed: int, kept_in: str):
        super().__init__(folder, seed)
        self.kept_in, self.records = kept_in, FakeRecords(folder / f"held-out-{kept_in}-{seed}")
        self.records.path.parent.mkdir(exist_ok=True)

    def run(self, arch, rung, *, progress=None):
        die_at = self.folder / "die-at"
        if die_at.exists() and len(held_out_records(self.folder, self.kept_in)) == int(die_at.read_text()):
            raise KeyboardInterrupt
        if self.record(arch, rung) is None:
            with (self.folder / "trained-by.log").open("a") as file:
                file.write(f"{os.getpid()}\n")
        return super().run(arch, rung)


def held_out_records(folder, kept_in):
    return [parsed(line) for path in sorted(folder.glob(f"held-out-{kept_in}-*/records.jsonl")) for line in path.read_text().splitlines()]


class FakeScorer:
    """Ridge regression of what is known: a full accuracy as it is, a partial one scaled up."""

    unit = "top1"
    source = "estimated"

    def __init__(self, records: Sequence[FakeRecord]):
        genomes = np.stack([SPACE.encode(r.arch) for r in records])
        targets = np.array([self.predict_record(r)[0] for r in records])
        features = self._features(genomes)
        self.covariance = np.linalg.inv(features.T @ features / 0.01**2 + np.eye(features.shape[1]) / 0.05**2)
        self.mean = targets.mean()
        self.weights = self.covariance @ features.T @ (targets - self.mean) / 0.01**2

    def _features(self, genomes):
        features = np.column_stack([SPACE.features(genomes), np.log(SCORE(genomes))])
        return (features - CENTER) / SPREAD

    def predict(self, genomes):
        features = self._features(genomes)
        return self.mean + features @ self.weights, np.sqrt(np.einsum("ij,jk,ik->i", features, self.covariance, features))

    def predict_record(self, record):
        return record.val_accuracy / (0.7 + 0.3 * record.rung), 0.02 * (1.05 - record.rung)


@dataclass(frozen=True)
class FakeShare:
    place: str
    block: Block
    ms: float
    source: str = "measured"


@dataclass(frozen=True)
class FakeMeasured:
    latency_ms: float
    latency_std_ms: float
    samples_ms: tuple = ((1.0,), (1.0,))
    energy_mj: float | None = None


def measure(archs, progress):
    """3 % above the prediction, whatever the network."""
    mean_ms, _ = FakeLatency().predict(np.stack([SPACE.encode(a) for a in archs]))
    return [FakeMeasured(1.03 * float(ms), 0.001) for ms in mean_ms]


PACE = 1.25
"""How much slower the machine is while it trains."""
ANCHORS = [(SPACE.decode(genome), float(FakeLatency().predict(genome[None])[0][0])) for genome in _sample[:6]]


def true_ms(arch):
    """What the device takes for a network at the pace of the table: 12 % less to 12 % more than predicted."""
    return float(FakeLatency().predict(SPACE.encode(arch)[None])[0][0]) * (1 + 0.12 * np.sin(int(arch.arch_id, 16)))


def verifier(folder):
    """Measures while the machine is slow, and notes whom."""

    def verify(archs):
        misbehave(folder, archs[0].arch_id)
        with (folder / "verified.log").open("a") as file:
            file.write(f"{archs[0].arch_id}\n")
        then = {arch.arch_id: ms for arch, ms in ANCHORS}
        return [FakeMeasured(PACE * then.get(a.arch_id, true_ms(a)), 0.001) for a in archs]

    return verify


def train_final(arch, seed, path):
    time.sleep(STEP_S)
    truth = float(true_accuracy(SPACE.encode(arch)[None])[0])
    path.with_name(path.name + ".checkpoint").write_text("half way")
    path.with_name(path.name + ".safetensors").write_bytes(b"weights")
    return FinalScore(val_accuracy=truth + noise(arch.arch_id, seed), test_accuracy=truth - 0.01, n_val=1000, n_test=2000, cpu_seconds=10.0)


def order_final(arch, seed, path):
    def accept(pid):
        assert pid != os.getpid()
        return train_final(arch, seed, path)

    return Order(
        name=arch.arch_id, function=fake_tasks.process_id, shared=None, values={}, accept=accept, here=lambda: train_final(arch, seed, path)
    )


def fake_fleet(folder: Path, settings: StudySettings) -> Fleet | None:
    """FakeLatency on the first device, OtherLatency on all others."""
    first, *others = settings.labels
    if not others:
        return None
    devices = {first: FakeLatency(), **{label: OtherLatency() for label in others}}
    stored = read_study_file(folder) or {}
    return Fleet(devices, scales_from(stored["devices"]) if stored else fit_scales(SPACE, devices, ProxyAccuracy(SPACE, "macs")))


def make_parts(folder: Path, settings: StudySettings) -> Parts:
    attached = settings.devices[0] != "elsewhere"
    fleet = fake_fleet(folder, settings)
    sources = {label: "table" if i or not attached else "predicted" for i, label in enumerate(settings.labels)}
    devices = [{"device": d, "latency_source": sources[d], **dataclasses.asdict(s)} for d, s in fleet.scales.items()] if fleet else []
    return Parts(
        space=SPACE,
        latency=FakeLatency(),
        latency_source="predicted" if attached else "table",
        fleet=fleet,
        sources=sources,
        explain=lambda arch: [FakeShare(place, block, cost.of_block(block).macs / 2e7) for place, block in arch.named_blocks()],
        chance_accuracy=0.1,
        training=lambda: FakeTraining(folder, settings.seed),
        records=FakeRecords(folder).read,
        fit=lambda records: FakeScorer(records) if len(records) >= 4 else None,
        train_final=train_final,
        order_final=order_final,
        measure=measure if attached else None,
        batch=settings.batch,
        energy=FakeEnergy() if "energy" in settings.objective else None,
        verify=verifier(folder) if settings.device == "doubtful" else None,
        verifications=Verifications(folder / VERIFIED),
        anchors=ANCHORS if settings.device == "doubtful" else (),
        held_out=lambda seed, kept_in: HeldOutTraining(folder, seed, kept_in),
        held_out_records=lambda kept_in: held_out_records(folder, kept_in),
        proxies=lambda archs, progress: {
            "NASWOT": Scores(source="proxy:NASWOT", unit="rank", mean=np.arange(len(archs), dtype=float), cpu_seconds=0.5 * len(archs))
        },
        facts={
            "device_name": "a fake device",
            "recipe_hash": settings.recipe or MADE,
            "data_hash": settings.data or MADE,
            "images": {"train": 8000, "val": 1000, "test": 2000},
            **({"devices": devices} if fleet else {}),
        },
    )


def backend() -> Backend:
    return Backend(
        resolve=lambda settings: settings,
        prepare=lambda folder, settings, progress: None,
        parts=make_parts,
        worker=(sys.executable, __file__, "worker"),
    )


class Death(BaseException):
    """The process dies here."""


def search(folder, settings, name="worker-0.test", kind=workers.SearchWorker):
    """The search of one worker inside this process, a `kind` of SearchWorker; returns the study's candidates."""
    folder.mkdir(exist_ok=True)
    parts = make_parts(folder, settings)
    plan = studies._opened(folder, settings, parts)
    study = open_study(folder, settings.objectives)
    reclaim(study)
    add_known(folder, study, settings, parts)
    enqueue(study, SPACE, dict(SPACE.family), origin="family")
    worker = kind(folder, plan, parts, name=name, stopped=threading.Event(), clock=itertools.count().__next__)
    worker.run()
    return candidates(study, SPACE)


def essence(found):
    """What must be the same however often a study was interrupted: everything but the times."""
    return [(c.number, c.genome.tolist(), c.origin, c.name, c.state, c.reason, c.rung, c.accuracy, c.accuracy_std) for c in found]


class Interrupting:
    """Raises Death at the `at`-th call of what it wraps, before or after the call."""

    def __init__(self, wrapped, at, *, after=False):
        self.wrapped, self.at, self.after, self.calls = wrapped, at, after, 0

    def __get__(self, instance, owner):
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise Death
        result = self.wrapped(*args, **kwargs)
        if self.calls == self.at:
            raise Death
        return result


def main(arguments):
    if arguments[0] == "worker":
        return process.main(arguments[1:], parts=make_parts)
    if arguments[0] == "join":
        print(join(Path(arguments[1]), workers=int(arguments[2]), backend=backend()))
        return 0
    run(StudySettings(**json.loads(arguments[2])), Path(arguments[1]), backend=backend())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
