"""Should a search whose budget is time divide what it expects of a network by what its training takes?

    python benchmarks/cost_aware.py [--minutes 2.5] [--jobs 2]          # minutes; trains nothing; goes on where the last call ended

Two replays by seconds of training. The pool has no seconds of a CPU (it was trained on a GPU), so they are made up from the example study,
whose networks were trained on one: MACs, activations, blocks and a constant, with weights of least relative error that are not negative,
times each network's own deviation, as large as that fit's. Searches see neither, only `training_time.TrainingTime`.

- pool: each time another 100 networks of benchmarks/network_pool.py (then 139), with their real accuracies, as by closed_pool.py.
  Counted is the hypervolume held, as a share of that of all 100, after fractions of the seconds that all 100 take.
- space: whole studies in the whole space, as in first_networks.py (each time another world of accuracies, learned from the pool): the
  family first, the ladder, the diverse start, twelve finalists. Counted is the true hypervolume of the finalists beyond the family's, as a
  share of it.

Beside today's search: a gain divided by the time to a power; by a power that falls from 1 to 0 as the budget is spent (Lee et al. 2020);
Optuna's NSGA-II and random search; and in the space three ways to train more networks in the same time: promotion among those that were
not trained whole anyway, no second half but for the family and the diverse start, and none but for the family.

Every replay is a line of FOLDER/replays.jsonl as soon as it is done. Writes benchmarks/results/cost_aware.json when all are there: means
with 95 % intervals, and each policy minus today's, paired by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))  # before numpy loads its BLAS

import numpy as np
import optuna
from closed_pool import RESULTS as POOL_RESULTS
from closed_pool import ROOT, Pool, interval, trainings
from first_networks import EVOLUTION, N_FINALISTS, Replay, ReplayedStudy, Rivals, World
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler
from scipy.optimize import nnls

from lowsearch import cost
from lowsearch.accuracy.records import AccuracyRecords
from lowsearch.arch import Arch
from lowsearch.files import write_atomically
from lowsearch.search.foreign import SeededSampler
from lowsearch.search.sampler import TrainCost
from lowsearch.search.samplers import POPULATION
from lowsearch.search.training_time import TrainingTime
from lowsearch.space import SearchSpace

RESULTS = POOL_RESULTS.with_name("cost_aware.json")
TODAY = "no cost"
POWERS: dict[str, float | None] = {TODAY: None, "time^0.5": 0.5, "time": 1.0, "time, cooling": 1.0}
PEERS = ("nsga2", "random")
LADDERS: dict[str, tuple[bool, Rivals]] = {
    "rivals that climb": (True, "climbers"), "start whole, others half": (True, "none goes on"),
    "family whole, others half": (False, "none goes on"),
}  # fmt: skip
"""By name, whether the diverse start is trained whole, and whom others are compared with at the first rung."""
POLICIES = {"pool": (*POWERS, *PEERS), "space": (*POWERS, *LADDERS, *PEERS)}
START = 24
"""Networks of the diverse start, as studies have it."""
FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
SECONDS = (300, 450, 600, 900)
"""The last is about what two workers train in a study of eight minutes."""


class Seconds:
    """CPU seconds of full trainings. `seed`: of the networks' own deviations."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space, self.seed = space, seed
        self.weights, self.std = fitted_seconds()

    def __call__(self, genome: np.ndarray) -> float:
        own = np.random.default_rng([self.seed, 3, *genome.astype(np.uint8)]).normal()
        return float(features(self.space.decode(genome)) @ self.weights * math.exp(self.std * own))


FEATURES = ("million_macs", "million_activations", "blocks", "constant")


def features(arch: Arch) -> np.ndarray:
    counted = cost.count(arch)
    return np.array([counted.macs / 1e6, counted.activations / 1e6, len(counted.per_block), 1.0])


@cache
def fitted_seconds() -> tuple[np.ndarray, float]:
    """Weights of `features`, and the spread of the logarithm around them."""
    furthest = {r.arch_id: r for r in sorted(AccuracyRecords(ROOT / "studies" / "example" / "records.jsonl"), key=lambda r: r.rung)}
    seconds = np.array([r.cpu_seconds / r.rung for r in furthest.values()])
    design = np.array([features(r.arch) for r in furthest.values()])
    weights, _ = nnls(design / seconds[:, None], np.ones(len(seconds)))
    return weights, float(np.std(np.log(design @ weights / seconds)))


def train_cost(space: SearchSpace, policy: str, left: Callable[[], float]) -> TrainCost | None:
    """What gains are divided by under `policy`; `left` tells the share of the budget that is left."""
    power = POWERS.get(policy)
    if power is None:
        return None
    if policy == "time, cooling":
        whole = TrainingTime(space)
        return lambda genomes: whole(genomes) ** max(0.0, left())
    return TrainingTime(space, power=power)


def replay_pool(policy: str, seed: int) -> dict[str, Any]:
    pool = Pool(draw=seed)
    priced = Seconds(pool.space, seed)
    seconds = np.array([priced(genome) for genome in pool.genomes])
    budgets = np.array(FRACTIONS) * seconds.sum()
    seen: list[int] = []
    cost_of = train_cost(pool.space, policy, lambda: 1 - float(seconds[seen].sum() / budgets[-1]))
    for _ in trainings(pool, policy if policy in PEERS else "lowsearch", seed, seen, cost_of):
        if seconds[seen].sum() >= budgets[-1]:
            break
    finished, shares = np.cumsum(seconds[seen]), np.array([0.0, *pool.shares(seen)])
    held = [int((finished <= budget).sum()) for budget in budgets]
    rows = [{"at": f"{at:.4g}", "networks": n, "hypervolume": float(shares[n])} for at, n in zip(FRACTIONS, held, strict=True)]
    return {"rows": rows}


def replay_space(policy: str, seed: int) -> dict[str, Any]:
    replay = _replay()
    study = ReplayedStudy(replay, World(replay, seed), price=Seconds(replay.space, seed))
    sampler: BaseSampler
    if policy in PEERS:
        make = partial(NSGAIISampler, population_size=POPULATION) if policy == "nsga2" else RandomSampler
        sampler = SeededSampler(lambda seed: make(seed=seed), replay.space, seed=seed)
    else:
        cost_of = train_cost(replay.space, policy, lambda: 1 - study.spent / SECONDS[-1])
        sampler = replay.sampler(seed=seed, start=START, evolution=EVOLUTION, accuracy=study.newest, train_cost=cost_of)
    to_the_end, rivals = LADDERS.get(policy, (True, "all"))
    left, rows = list(SECONDS), []
    for spent in study.run(sampler, to_the_end=to_the_end, rivals=rivals):
        while left and spent >= left[0]:
            spearman, hypervolume = study.outcome()
            counts = {"networks": len(study.records), "whole": sum(record.rung == 1 for record in study.records.values())}
            rows.append({"at": str(left.pop(0)), **counts, "spearman": spearman, "hypervolume": hypervolume})
        if not left:
            break
    return {"rows": rows}


@cache
def _replay() -> Replay:
    return Replay()


def replayed(which: str, policy: str, seed: int) -> dict[str, Any]:
    """One replay, in a process of its own."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = (replay_pool if which == "pool" else replay_space)(policy, seed)
    return {"which": which, "policy": policy, "seed": seed, **found}


def statistics(rows: list[dict[str, Any]], which: str) -> dict[str, Any]:
    """By policy and moment: the mean of every number with its interval, and its paired difference to today's."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {policy: {} for policy in POLICIES[which]}
    for row in rows:
        if row["which"] == which:
            found[row["policy"]][row["seed"]] = row["rows"]
    seeds = sorted(found[TODAY])
    result: dict[str, Any] = {}
    for policy, by_seed in found.items():
        result[policy] = {}
        for i, first in enumerate(by_seed[seeds[0]]):
            values = {name: [by_seed[seed][i][name] for seed in seeds] for name in first if name != "at"}
            today = {name: [found[TODAY][seed][i][name] for seed in seeds] for name in values}
            result[policy][first["at"]] = {
                name: {**interval(some), "more": interval(list(np.subtract(some, today[name])))} for name, some in values.items()
            }
    return result


def show(found: dict[str, Any]) -> None:
    for policy, by_moment in found.items():
        for at, values in by_moment.items():
            numbers = [f"{values['networks']['mean']:.0f} networks"]
            for name in ("hypervolume", "spearman"):
                if name in values:
                    more = values[name]["more"]
                    numbers.append(f"{name} {values[name]['mean']:.4f} ({more['mean']:+.4f}, {more['low']:+.4f} to {more['high']:+.4f})")
            print(f"  {policy:26s} {at:>7s}: {', '.join(numbers)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("cost_aware"), help="what is done so far")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no replay begins after these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--pool-seeds", type=int, default=20)
    parser.add_argument("--space-seeds", type=int, default=20)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "replays.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["which"], row["policy"], row["seed"]) for row in rows}
    seeds = {"pool": arguments.pool_seeds, "space": arguments.space_seeds}
    plan = [(which, policy, seed) for which, n in seeds.items() for seed in range(n) for policy in POLICIES[which]]
    waiting = [unit for unit in plan if unit not in done]
    started = time.monotonic()
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as processes, path.open("a") as file:
        running: set[Future[dict[str, Any]]] = set()
        while True:
            while waiting and len(running) < arguments.jobs and time.monotonic() - started < 60 * arguments.minutes:
                running.add(processes.submit(replayed, *waiting.pop(0)))
            if not running:
                break
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                running.remove(finished)
                rows.append(finished.result())
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                print(f"{len(plan) - len(waiting) - len(running)} of {len(plan)} replays", flush=True)
    if waiting:
        print(f"{len(waiting)} replays are left: call again")
        return
    rows = [row for row in rows if row["seed"] < seeds[row["which"]]]
    weights, std = fitted_seconds()
    result = {
        "command": "python benchmarks/cost_aware.py", "date_utc": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {n: metadata.version(n) for n in ("lowsearch", "numpy", "optuna")},
        "seconds": {"weights": dict(zip(FEATURES, weights.round(4).tolist(), strict=True)), "std_of_log": round(std, 4)},
        "replays": seeds, "finalists": N_FINALISTS, **{which: statistics(rows, which) for which in POLICIES},
    }  # fmt: skip
    write_atomically(RESULTS, json.dumps(result, indent=1) + "\n")
    for which in POLICIES:
        print(which)
        show(result[which])


if __name__ == "__main__":
    main()
