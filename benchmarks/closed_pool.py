"""How many trainings does a search need? Every sampler on the closed pool of really trained networks, where no training has to be repeated.

    python benchmarks/closed_pool.py [--seeds 20] [--first-seed 0]        # minutes; reads benchmarks/results/network_pool.json

Objectives are accuracy (mean of a network's trainings) and latency (predicted by the AMD table that comes with lowsearch). Every sampler
proposes within the pool and never twice: ours by `LowSearchSampler(candidates=...)`, its accuracy predictor fitted on the trainings it has
seen, random uniformly; Optuna's NSGA-II (populations of 16), TPE and GP propose freely, and the nearest network of the pool that was
not used yet (least sum over genes of the distance between choices, as a share of the gene's range) takes the place of the proposal, under
its own genes, so that the sampler learns of the network that was scored. Hypervolume counts from the study's default reference point, as
a share of that of the whole pool. The question: after how many trainings does a sampler hold the hypervolume that NSGA-II holds after N,
seed by seed? N is 150 where the pool has 300 networks, else half of it. Writes benchmarks/results/closed_pool.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))  # before numpy loads its BLAS

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from predictor_exam import records_of
from scipy import stats

from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.files import write_atomically
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.table import LatencyTable
from lowsearch.search import pareto
from lowsearch.search.estimates import Estimator, reference_values
from lowsearch.search.foreign import N_STARTUP, gene_distributions
from lowsearch.search.objectives import parse_objectives
from lowsearch.search.sampler import LowSearchSampler, TrainCost, gene_indices
from lowsearch.search.samplers import POPULATION
from lowsearch.space import SearchSpace

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "closed_pool.json"
TABLE = ROOT / "latency_tables" / "shipped" / "amd-epyc-f26-m2-2vcpu" / "onnxruntime-fp32-b1-t1.jsonl"
DRAWN = 100
PEERS = ("nsga2", "tpe", "gp", "random")
OBJECTIVES = parse_objectives("acc-latency")


class Pool:
    """The trained networks: genomes (n, n_genes), values (n, 2) and records. `draw`: a random `DRAWN` of them, by that seed."""

    def __init__(self, *, part: str = "all", draw: int | None = None) -> None:
        stored = json.loads((RESULTS.parent / "network_pool.json").read_text())
        self.space = SearchSpace.load(stored["space"])
        rows = [row for i, row in enumerate(stored["networks"]) if part == "all" or i % 2 == ("even", "odd").index(part)]
        if draw is not None:
            rows = [rows[i] for i in np.sort(np.random.default_rng(draw).choice(len(rows), DRAWN, replace=False))]
        self.latency = LatencyPredictor(self.space, LatencyTable.load(TABLE))
        self.genomes = self.space.canonical(np.array([row["genome"] for row in rows], dtype=np.int8))
        self.records = [records_of(stored, row, self.space) for row in rows]
        accuracy = [np.mean([curve[-1] for curve in row["accuracy"].values()]) for row in rows]
        self.values = np.column_stack([accuracy, self.latency.predict(self.genomes)[0]])
        self.worst = reference_values(Estimator(self.space, self.latency), chance_accuracy=1 / self.space.num_classes)
        self.reference = OBJECTIVES.costs({m: np.array([self.worst[m]]) for m in OBJECTIVES.metrics})[0]
        self.costs = OBJECTIVES.costs(self.values)
        self.whole = pareto.hypervolume(self.costs, self.reference)
        self._index = {genome.tobytes(): i for i, genome in enumerate(self.genomes)}

    def index(self, genome: np.ndarray) -> int:
        return self._index[genome.astype(np.int8).tobytes()]

    def shares(self, order: list[int]) -> list[float]:
        """Of the whole pool's hypervolume, what the first 1, 2, ... of `order` hold."""
        return [pareto.hypervolume(self.costs[order[:n]], self.reference) / self.whole for n in range(1, len(order) + 1)]


class Nearest(BaseSampler):
    """Whatever `inner` proposes, moved to the nearest network of the pool that the study does not hold."""

    def __init__(self, inner: BaseSampler, pool: Pool) -> None:
        self._inner, self._pool = inner, pool

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return gene_distributions(self._pool.space)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        space = self._pool.space
        params = dict(self._inner.sample_relative(study, trial, self._inner.infer_relative_search_space(study, trial)))
        for name, distribution in search_space.items():
            if name not in params:
                params[name] = self._inner.sample_independent(study, trial, name, distribution)
        asked = space.canonical(np.array([[params[gene.name] for gene in space.genes]], dtype=np.int8))[0]
        apart = (np.abs(self._pool.genomes - asked) / np.maximum(space.cardinalities - 1, 1)).sum(axis=1)
        apart[[self._pool.index(genome_of(t, space)) for t in study.get_trials(deepcopy=False) if t.number != trial.number]] = np.inf
        return gene_indices(self._pool.genomes[int(np.argmin(apart))], space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        raise AssertionError("every gene is proposed at once")

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._inner.after_trial(study, trial, state, values)


def genome_of(trial: FrozenTrial, space: SearchSpace) -> np.ndarray:
    return np.array([trial.params[gene.name] for gene in space.genes], dtype=np.int8)


def ours(pool: Pool, seed: int, seen: list[int], train_cost: TrainCost | None = None) -> BaseSampler:
    """The predictor is that of studies: fitted anew on every training that the search has paid for."""
    untrained = AccuracyPredictor(pool.space)

    def newest() -> AccuracyPredictor:
        return copy.copy(untrained).fit([record for i in seen for record in pool.records[i]])

    return LowSearchSampler(
        pool.space, latency=pool.latency, accuracy=newest, objectives=OBJECTIVES, reference=pool.worst, seed=seed, candidates=pool.genomes,
        train_cost=train_cost,
    )  # fmt: skip


OPTUNAS: dict[str, Callable[[int], BaseSampler]] = {
    "nsga2": lambda seed: NSGAIISampler(population_size=POPULATION, seed=seed),
    "tpe": lambda seed: TPESampler(seed=seed),
    "gp": lambda seed: GPSampler(seed=seed, n_startup_trials=N_STARTUP, warn_independent_sampling=False),
}


def trainings(pool: Pool, sampler: str, seed: int, seen: list[int], train_cost: TrainCost | None = None) -> Iterator[int]:
    """The networks that `sampler` trains, by their places in the pool. They are in `seen` when they are yielded."""
    if sampler == "random":
        for index in np.random.default_rng(seed).permutation(len(pool.genomes)):
            seen.append(int(index))
            yield seen[-1]
        return
    inner = ours(pool, seed, seen, train_cost) if sampler == "lowsearch" else Nearest(OPTUNAS[sampler](seed), pool)
    study = optuna.create_study(directions=OBJECTIVES.directions, sampler=inner)
    while len(seen) < len(pool.genomes):
        trial = study.ask()
        genome = np.array([trial.suggest_int(gene.name, 0, len(gene.choices) - 1) for gene in pool.space.genes], dtype=np.int8)
        seen.append(pool.index(genome))
        study.tell(trial, pool.values[seen[-1]].tolist())
        yield seen[-1]


def run(pool: Pool, sampler: str, seed: int, n: int) -> list[float]:
    """Shares of the hypervolume after 1 to n trainings."""
    chosen = list(islice(trainings(pool, sampler, seed, []), n))
    assert len(set(chosen)) == n
    return pool.shares(chosen)


def trainings_of(pool: Pool) -> int:
    """How many trainings every search has."""
    return 150 if len(pool.genomes) >= 300 else len(pool.genomes) // 2


def run_all(part: str, samplers: list[str], seed: int) -> dict[str, list[float]]:
    """`run` of every sampler with one seed, in a process of its own."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    pool = Pool(part=part)
    return {sampler: run(pool, sampler, seed, trainings_of(pool)) for sampler in samplers}


def first_reach(shares: list[float], goal: float) -> int:
    """Trainings until `goal` is held; one more than were tried where it never is."""
    return next((n for n, share in enumerate(shares, start=1) if share >= goal - 1e-12), len(shares) + 1)


def interval(values: list[float]) -> dict[str, float]:
    """Mean and 95 % t interval."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def statistics(runs: dict[str, list[list[float]]], at: int) -> dict[str, Any]:
    goals = [shares[at - 1] for shares in runs["nsga2"]]
    needed = {name: [first_reach(shares, goal) for shares, goal in zip(found, goals, strict=True)] for name, found in runs.items()}
    means = {name: [float(np.mean(shares)) for shares in found] for name, found in runs.items()}
    return {
        "trainings_to_reach_nsga2": {name: {"median": float(np.median(n)), **interval(list(map(float, n)))} for name, n in needed.items()},
        "share_of_nsga2s_trainings": float(np.mean(needed["lowsearch"])) / at,
        "hypervolume_share_at": {
            str(k): {name: interval([shares[k - 1] for shares in found]) for name, found in runs.items()} for k in (at // 4, at // 2, at)
        },
        "mean_share_above": {name: interval(list(np.subtract(means["lowsearch"], means[name]))) for name in runs if name != "lowsearch"},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="seeds side by side")
    parser.add_argument("--part", choices=["all", "even", "odd"], default="all", help="of the pool, by place; only all is written")
    parser.add_argument("--samplers", nargs="+", choices=PEERS, default=list(PEERS), help="what lowsearch is compared with")
    arguments = parser.parse_args()
    pool = Pool(part=arguments.part)
    at = trainings_of(pool)
    names = ["lowsearch", *dict.fromkeys(["nsga2", *arguments.samplers])]
    runs: dict[str, list[list[float]]] = {name: [] for name in names}
    started = time.monotonic()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
        for seed, found in zip(seeds, processes.map(partial(run_all, arguments.part, names), seeds), strict=True):
            for name, shares in found.items():
                runs[name].append(shares)
            means = ", ".join(f"{name} {np.mean(shares):.4f}" for name, shares in found.items())
            print(f"seed {seed} ({time.monotonic() - started:.0f} s), mean share of the hypervolume: {means}", flush=True)
    found = statistics(runs, at)
    for name, needed in found["trainings_to_reach_nsga2"].items():
        print(f"{name:10s} holds what NSGA-II holds after {at}: after {needed['median']:.0f} (mean {needed['mean']:.1f},"
              f" 95 % {needed['low']:.1f} to {needed['high']:.1f})")  # fmt: skip
    for name, more in found["mean_share_above"].items():
        print(f"above {name:8s} on average by {100 * more['mean']:.2f} % ({100 * more['low']:.2f} to {100 * more['high']:.2f})")
    if arguments.part != "all" or arguments.samplers != list(PEERS):
        return
    result = {
        "command": " ".join(["python", "benchmarks/closed_pool.py", *sys.argv[1:]]), "date_utc": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {n: metadata.version(n) for n in ("lowsearch", "numpy", "optuna")}, "networks": len(pool.genomes), "at": at,
        "latency": TABLE.parent.name, "reference_point": {m: pool.worst[m] for m in OBJECTIVES.metrics},
        "statistics": found, "goals_met": {
            "half_the_trainings_of_nsga2": found["trainings_to_reach_nsga2"]["lowsearch"]["high"] <= at / 2,
            **{f"above_{name}": found["mean_share_above"][name]["low"] > 0 for name in PEERS},
        },
        "curves": {name: np.round(shares, 5).tolist() for name, shares in runs.items()},
    }  # fmt: skip
    write_atomically(RESULTS, json.dumps(result) + "\n")
    print("goals met: " + ", ".join(f"{goal} {'yes' if met else 'no'}" for goal, met in result["goals_met"].items()))


if __name__ == "__main__":
    main()
