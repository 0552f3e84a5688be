"""Networks held out to examine a study's accuracy predictor: who they are, and their trainings, side by side in worker processes.

The search trains what looks good, and a predictor judged on those is judged on its own choice. So random members of the space, spread
evenly over predicted latency, are trained on the whole schedule and kept apart in a file of their own. Made once, the set is read ever
after; asked for more networks or seeds, it grows. `held_out.json` tells the workers whom to train.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from lowsearch.arch import Arch
from lowsearch.errors import StudyError, UsageError
from lowsearch.files import write_atomically
from lowsearch.search.estimates import Estimator, excess
from lowsearch.space import SearchSpace
from lowsearch.study.parts import HeldOutSet, Parts, Progress, Record
from lowsearch.study.workers.crew import MAX_CRASHES_IN_A_ROW, Crew, crashed_too_often
from lowsearch.study.workers.engines import DiedError, Engine, Job
from lowsearch.study.workers.worker import Plan

ORDERS = "held_out.json"
MIN_NETWORKS = 5
BAND_SHARE = 0.15
_POOL = 4000
_BAND_POOL = 40_000
"""Random networks to find those of a band among."""
_STREAM = 1_000_033
"""Keeps this module's random numbers apart from the study's own."""
_POLL_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A range of latency in which MACs and latency tell little."""

    centre_ms: float
    low_ms: float
    high_ms: float

    @classmethod
    def around(cls, centre_ms: float) -> Band:
        """Within BAND_SHARE of `centre_ms`."""
        if not 0 < centre_ms < math.inf:
            raise UsageError(f"the centre of the band is {centre_ms:g} ms, expected a positive latency")
        return cls(centre_ms=centre_ms, low_ms=(1 - BAND_SHARE) * centre_ms, high_ms=(1 + BAND_SHARE) * centre_ms)

    @classmethod
    def of_front(cls, folder: Path) -> Band:
        """Around the median latency of the front of the study in `folder`. Raises StudyError where it has none."""
        path = folder / "front.csv"
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
        try:
            latency_ms = [float(row["latency_ms"]) for row in rows]
        except (KeyError, ValueError) as error:
            raise StudyError(f"{path} is damaged: {error}", hint=f"lowsearch run --study {folder.name}") from error
        if not latency_ms:
            raise StudyError(
                f"study {folder.name!r} has no front, whose median latency would be the centre of the band",
                hint=f"lowsearch run --study {folder.name}, or name the centre: --band-at MS",
            )
        return cls.around(float(np.median(latency_ms)))

    def holds(self, latency_ms: np.ndarray) -> np.ndarray:
        """Whether each latency (n,) is in it, (n,)."""
        return (latency_ms >= self.low_ms) & (latency_ms <= self.high_ms)


def networks(parts: Parts, plan: Plan, n: int, *, band: Band | None = None) -> list[Arch]:
    """The held-out networks, in order of predicted latency: those trained already, and new ones where a stratum has none.

    Strata are `n` equal shares of the random members of the space that the search could propose: within its limits, no slower than its
    reference point, and in `band` where one is given. What the study has trained is never chosen.
    """
    space, estimator = parts.space, parts.estimator
    frozen = {r.arch_id: r.arch for r in parts.held_out_records("range" if band is None else "band")}
    if band is not None:
        kept = band.holds(_latencies(estimator, space, frozen.values()))
        frozen = {arch_id: arch for (arch_id, arch), keep in zip(frozen.items(), kept, strict=True) if keep}
    n_drawn = _POOL if band is None else _BAND_POOL
    taken = {space.encode(r.arch).tobytes() for r in parts.records() if space.contains(r.arch)}
    pool = np.unique(space.sample(n_drawn, rng=np.random.default_rng([plan.settings.seed, _STREAM])), axis=0)
    pool = pool[[genome.tobytes() not in taken for genome in pool]]
    estimates = estimator.estimate(pool)
    latency_ms = estimates.mean["latency_ms"]
    allowed = excess(estimates, plan.settings.limits) == 0  # Without an accuracy model, accuracy limits do not count.
    inside = allowed & (latency_ms < plan.reference["latency_ms"])
    inside &= True if band is None else band.holds(latency_ms)
    pool, latency_ms = pool[inside], latency_ms[inside]
    if len(pool) < max(n, MIN_NETWORKS):
        where = "" if band is None else f" and take {band.low_ms:.3g} to {band.high_ms:.3g} ms"
        hint = "ask for fewer: --networks N" + ("" if band is None else ", or for another band: --band-at MS")
        raise StudyError(f"only {len(pool)} of {n_drawn} random networks keep the study's limits{where}", hint=hint)
    pool, latency_ms = (values[np.argsort(latency_ms, kind="stable")] for values in (pool, latency_ms))
    edges = np.linspace(0, len(pool), n + 1).astype(int)
    served = set(np.searchsorted(latency_ms[edges[1:-1]], _latencies(estimator, space, frozen.values()), side="right").tolist())
    empty = [i for i in range(n) if i not in served][: max(0, n - len(frozen))]  # A stratum more may be empty: records move the edges.
    picks = [np.random.default_rng([plan.settings.seed, _STREAM, n, i]).integers(edges[i], edges[i + 1]) for i in empty]
    archs = [*frozen.values(), *(space.decode(pool[pick]) for pick in picks)]
    return [archs[i] for i in np.argsort(_latencies(estimator, space, archs), kind="stable")]


def seeds(plan: Plan, n: int) -> list[int]:
    """Of the trainings of each network; no other training of the study has them."""
    return [int(np.random.default_rng([plan.settings.seed, _STREAM, k]).integers(2**31)) for k in range(n)]


def _latencies(estimator: Estimator, space: SearchSpace, archs: Iterable[Arch]) -> np.ndarray:
    genomes = [space.encode(arch) for arch in archs]
    return estimator.estimate(np.stack(genomes)).mean["latency_ms"] if genomes else np.empty(0)


# The trainings ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """Who is trained, with which seeds, into which set."""

    kept_in: HeldOutSet
    archs: tuple[Arch, ...]
    seeds: tuple[int, ...]

    def save(self, folder: Path) -> None:
        values = {"kept_in": self.kept_in, "seeds": self.seeds, "networks": [arch.to_dict() for arch in self.archs]}
        write_atomically(folder / ORDERS, json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Orders:
        """Raises StudyError on a damaged file."""
        try:
            values = json.loads((folder / ORDERS).read_text(encoding="utf-8"))
            archs = tuple(Arch.from_dict(network) for network in values["networks"])
            return cls(kept_in=values["kept_in"], archs=archs, seeds=tuple(int(seed) for seed in values["seeds"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError(f"{folder / ORDERS} is damaged: {error}", hint=f"lowsearch trust {folder.name}") from error

    def missing(self, parts: Parts) -> list[tuple[int, Arch]]:
        """(seed, network) of the trainings that are not on record: every network once before any of them twice."""
        assert parts.held_out is not None
        ladders = {seed: parts.held_out(seed, self.kept_in) for seed in self.seeds}
        return [(seed, arch) for seed in self.seeds for arch in self.archs if ladders[seed].record(arch, 1.0) is None]


def train(
    folder: Path, parts: Parts, plan: Plan, orders: Orders, *, command: Sequence[str], progress: Progress | None
) -> dict[str, list[Record]]:
    """arch_id -> its trainings on the whole schedule, one a seed; what is on record is not trained again.

    By as many processes of `command` as the study has workers, in this one where that is one.
    """
    assert parts.held_out is not None
    orders.save(folder)
    total = len(orders.archs) * len(orders.seeds)

    def tell(left: int, done: float = 0.0) -> None:
        if progress is not None and left:
            progress(round(100 * (total - left + done)), 100 * total, f"train held-out networks, {total - left} of {total} done")

    n_missing = len(orders.missing(parts))
    at_once = min(plan.settings.workers, n_missing)
    if at_once == 1 and plan.settings.engine == "local":
        train_ordered(folder, parts, tell=tell)
    elif n_missing:
        size = at_once if plan.settings.engine == "local" else 1  # Else one process conducts the tasks of all trainings.
        _await_crew(folder, Crew(folder, None, command, size=size, name="trust"), lambda: len(orders.missing(parts)), tell)
    ladders = [parts.held_out(seed, orders.kept_in) for seed in orders.seeds]
    return {arch.arch_id: [ladder.run(arch, 1.0) for ladder in ladders] for arch in orders.archs}


def _await_crew(folder: Path, crew: Crew, n_missing: Callable[[], int], tell: Callable[[int], None]) -> None:
    crashes = 0
    try:
        while (left := n_missing()) or crew:
            crashed = crew.collect()
            crashes += len(crashed)
            if crashes >= MAX_CRASHES_IN_A_ROW:
                raise crashed_too_often(folder, crashed[-1])
            tell(left)
            if left and not crew:
                crew.start_missing("trust")
            time.sleep(_POLL_S)
    finally:
        crew.end()


def train_ordered(
    folder: Path,
    parts: Parts,
    *,
    engine: Engine | None = None,
    at_once: int = 1,
    tell: Callable[[int, float], None] | None = None,
) -> None:
    """Train what is ordered and no other worker has done or is doing; with an `engine` as its orders, so many `at_once`.

    `tell` hears how many trainings are left, and the fraction done of the one under way.
    """
    assert parts.held_out is not None
    orders = Orders.load(folder)
    missing = orders.missing(parts)
    if engine is not None:
        _train_by_orders(parts, orders, missing, engine, at_once)
        return
    for number, (seed, arch) in enumerate(missing):
        ladder = parts.held_out(seed, orders.kept_in)
        try:
            with FileLock(folder / f".held-out-{arch.arch_id}-{seed}.lock", timeout=0) as lock:
                ladder.run(arch, 1.0, progress=None if tell is None else partial(tell, len(missing) - number))
                Path(lock.lock_file).unlink(missing_ok=True)  # Who opened it before finds the training on record.
        except Timeout:
            continue
        ladder.discard(arch)


def _train_by_orders(parts: Parts, orders: Orders, missing: list[tuple[int, Arch]], engine: Engine, at_once: int) -> None:
    assert parts.held_out is not None
    running: dict[Job, Any] = {}
    while missing or running:
        while missing and len(running) < at_once:
            seed, arch = missing.pop(0)
            running[engine.start(parts.held_out(seed, orders.kept_in).order(arch, 1.0))] = arch.arch_id
        for job in engine.wait(list(running)):
            arch_id = running.pop(job)
            try:
                engine.result(job)
            except DiedError as error:
                raise StudyError(
                    f"the training of held-out network {arch_id} was given up: {error}",
                    hint="give its task more memory, as by --trial-cpus or --trial-gpus; the same command resumes",
                ) from error
