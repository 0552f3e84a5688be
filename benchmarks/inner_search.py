"""The search over predictors alone, beside pymoo and Optuna: candidates a second, hypervolume by time, and memory.

    python benchmarks/inner_search.py             # 5 minutes: 3 s against 12 s over 3 seeds
    python benchmarks/inner_search.py --full      # an hour: 10 s against 60 s over 10 seeds (three objectives: 5)

The space is `lowformer`, latency by the AMD table that comes with lowsearch, accuracy by the published prior, all on one core and in
CPU time. Scored: random networks by their models. Whole loop: `search_front` with its children, scores and archive; `propose`: the
sampler's evolution, with the accuracy predictor of studies. pymoo's NSGA-II is given the same models on whole populations, integer
variables by its own recipe (SBX and polynomial mutation with rounding); Optuna's samplers are asked and told in memory. Hypervolume is of
all that a search scored, from the study's reference point. Memory: the peak of a process that searches 10 million candidates.
Writes benchmarks/results/inner_search.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))  # before numpy loads its BLAS

import numpy as np
import optuna
from optuna.trial import create_trial
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling
from scipy import stats

from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.prior import PublishedPrior
from lowsearch.files import write_atomically
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.table import LatencyTable
from lowsearch.latency.target import attached_devices
from lowsearch.search import pareto
from lowsearch.search.estimates import Estimator, reference_values
from lowsearch.search.foreign import gene_distributions
from lowsearch.search.front import search_front
from lowsearch.search.objectives import parse_objectives
from lowsearch.search.sampler import LowSearchSampler, gene_indices
from lowsearch.space import SearchSpace

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "inner_search.json"
TABLE = ROOT / "latency_tables" / "shipped" / "amd-epyc-f26-m2-2vcpu" / "onnxruntime-fp32-b1-t1.jsonl"
GOALS = {"scored_per_s": 500_000, "whole_loop_per_s": 150_000, "memory_bytes": 10**9}
TWO, THREE = "acc-latency", "acc-latency-params"
POPULATION = 400
"""Of pymoo's NSGA-II: better here than its default of 100, and than 1,500."""
N_MEMORY = 10_000_000
N_FRONT = 60
clock = time.process_time


class Task:
    """The models, and the costs of populations by them."""

    def __init__(self, objectives: str) -> None:
        self.space = SearchSpace.load("lowformer")
        self.latency = LatencyPredictor(self.space, LatencyTable.load(TABLE))
        self.accuracy = PublishedPrior(self.space)
        self.estimator = Estimator(self.space, self.latency)
        self.objectives = parse_objectives(objectives)
        family = np.stack([self.space.encode(arch) for arch in self.space.family.values()])
        lowest = float(self.accuracy.predict(family)[0].min() - self.accuracy.margin)
        self.worst = {**reference_values(self.estimator, chance_accuracy=0.0), "accuracy": lowest}
        self.reference = self.objectives.costs({m: np.array([self.worst[m]]) for m in self.objectives.metrics})[0]

    def costs(self, genomes: np.ndarray) -> np.ndarray:
        mean = self.estimator.estimate(self.space.canonical(genomes), self.accuracy).mean
        return self.objectives.costs({metric: mean[metric] for metric in self.objectives.metrics})


class Tally:
    """The front of everything that a peer scored, and how much that was."""

    def __init__(self, task: Task) -> None:
        self.task, self.scored, self._parts = task, 0, [np.empty((0, len(task.reference)))]

    def add(self, costs: np.ndarray) -> None:
        self.scored += len(costs)
        self._parts.append(costs)
        if len(self._parts) > 500:
            self._parts = [self.front()]

    def front(self) -> np.ndarray:
        together = np.vstack(self._parts)
        return together[pareto.non_dominated(together)]

    def outcome(self, seconds: float) -> dict[str, float]:
        volume = float(pareto.hypervolume(self.front(), self.task.reference))
        return {"hypervolume": volume, "scored": self.scored, "cpu_s": seconds, "per_s": self.scored / seconds}


def ours(task: Task, seconds: float, seed: int) -> dict[str, float]:
    started = clock()
    found = search_front(
        task.space, latency=task.latency, accuracy=task.accuracy, objectives=task.objectives, reference=task.worst, seconds=seconds,
        seed=seed, clock=clock,
    )  # fmt: skip
    spent = clock() - started
    volume = float(pareto.hypervolume(task.objectives.costs(found.values), task.reference))
    return {"hypervolume": volume, "scored": found.scored, "cpu_s": spent, "per_s": found.scored / spent}


def pymoo_nsga2(task: Task, seconds: float, seed: int) -> dict[str, float]:
    tally = Tally(task)

    class Networks(Problem):
        def __init__(self) -> None:
            upper = task.space.cardinalities - 1
            super().__init__(n_var=task.space.n_genes, n_obj=len(task.reference), xl=0, xu=upper, vtype=int)

        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            out["F"] = task.costs(np.asarray(x).astype(np.int8))
            tally.add(out["F"])

    as_integers: dict[str, Any] = {"prob": 1.0, "eta": 3.0, "vtype": float, "repair": RoundingRepair()}
    algorithm = NSGA2(
        pop_size=POPULATION, sampling=IntegerRandomSampling(), crossover=SBX(**as_integers), mutation=PM(**as_integers),
        eliminate_duplicates=True,
    )  # fmt: skip
    algorithm.setup(Networks(), termination=("n_gen", 10**9), seed=seed, verbose=False)
    started = clock()
    while clock() - started < seconds:
        algorithm.next()
    return tally.outcome(clock() - started)


def of_optuna(make: Callable[[int], optuna.samplers.BaseSampler]) -> Callable[[Task, float, int], dict[str, float]]:
    def run(task: Task, seconds: float, seed: int) -> dict[str, float]:
        tally = Tally(task)
        study = optuna.create_study(directions=["minimize"] * len(task.reference), sampler=make(seed))
        highest = [(gene.name, len(gene.choices) - 1) for gene in task.space.genes]
        started = clock()
        while clock() - started < seconds:
            trial = study.ask()
            genome = np.array([[trial.suggest_int(name, 0, high) for name, high in highest]], dtype=np.int8)
            costs = task.costs(genome)
            tally.add(costs)
            study.tell(trial, costs[0].tolist())
        return tally.outcome(clock() - started)

    return run


PEERS: dict[str, Callable[[Task, float, int], dict[str, float]]] = {
    "pymoo NSGA-II": pymoo_nsga2,
    "Optuna NSGA-II": of_optuna(lambda seed: optuna.samplers.NSGAIISampler(seed=seed)),
    "Optuna TPE": of_optuna(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "Optuna random": of_optuna(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
}


def scored_per_s(task: Task, *, n: int = 500_000) -> dict[str, float]:
    """Random networks by latency and exact costs, as arrays of 50,000."""
    genomes = task.space.sample(n, rng=np.random.default_rng(0))
    task.estimator.estimate(genomes[:10])
    columns = [metric for metric in task.objectives.metrics if metric != "accuracy"]
    rates = []
    for _ in range(3):
        started = clock()
        for part in np.array_split(genomes, n // 50_000):
            mean = task.estimator.estimate(part).mean
            np.stack([mean[metric] for metric in columns], axis=1)
        rates.append(n / (clock() - started))
    return {"median": float(np.median(rates)), "worst": min(rates)}


def proposals(task: Task) -> dict[str, float]:
    """The sampler's evolution in a study whose front has N_FRONT networks, with the predictor that studies use.

    The predictor has learned nothing: its speed does not depend on what it knows. Seconds are the median of twenty proposals.
    """
    sampler = LowSearchSampler(
        task.space, latency=task.latency, accuracy=AccuracyPredictor(task.space), objectives=task.objectives, reference=task.worst
    )
    found = search_front(
        task.space, latency=task.latency, accuracy=task.accuracy, objectives=task.objectives, reference=task.worst, candidates=100_000
    )
    places = np.linspace(0, len(found.genomes) - 1, N_FRONT).astype(int)
    distributions = gene_distributions(task.space)
    trials = [
        create_trial(params=gene_indices(genome, task.space), distributions=distributions, values=list(values))
        for genome, values in zip(found.genomes[places], found.values[places], strict=True)
    ]
    sampler.propose(trials, number=0)
    spent = []
    for number in range(1, 21):
        started = clock()
        sampler.propose(trials, number=number)
        spent.append(clock() - started)
    seconds = float(np.median(spent))
    settings = sampler.evolution
    n = 2 * settings.initial + settings.children * settings.generations
    return {"front": len(np.unique(places)), "seconds": seconds, "per_s": n / seconds}


def memory() -> dict[str, float]:
    """Peak resident memory of a process that searches N_MEMORY candidates, and of one that searches a few."""
    peaks = {}
    for n in (10_000, N_MEMORY):
        command = [sys.executable, __file__, "--memory-of", str(n)]
        peaks[n] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {"candidates": N_MEMORY, "peak_bytes": peaks[N_MEMORY], "peak_bytes_of_10000": peaks[10_000]}


def search_and_print_peak(n: int) -> None:
    task = Task(THREE)
    search_front(task.space, latency=task.latency, accuracy=task.accuracy, objectives=task.objectives, candidates=n)
    # Not getrusage: what it calls the peak is at least that of the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    print(1024 * int(status["VmHWM"].split()[0]))


def interval(values: list[float]) -> dict[str, float]:
    """Mean and 95 % t interval."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="10 s against 60 s over 10 seeds")
    parser.add_argument("--seconds", type=float, help="of our search, CPU time (default 3, with --full 10)")
    parser.add_argument("--peer-seconds", type=float, help="of every peer's search (default 12, with --full 60)")
    parser.add_argument("--seeds", type=int, help="default 3, with --full 10; three objectives: half of them, two at least")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)  # the child process of `memory`
    arguments = parser.parse_args()
    if arguments.memory_of is not None:
        return search_and_print_peak(arguments.memory_of)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    seconds = arguments.seconds or (10 if arguments.full else 3)
    peer_seconds = arguments.peer_seconds or (60 if arguments.full else 12)
    seeds = arguments.seeds or (10 if arguments.full else 3)
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/inner_search.py", *sys.argv[1:]]), "date_utc": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": attached_devices()[0].name, "threads": 1, "clock": "process CPU time", "space": "lowformer", "latency": TABLE.parent.name,
        "accuracy": "prior:published", "versions": {n: metadata.version(n) for n in ("lowsearch", "numpy", "pymoo", "optuna", "moocore")},
        "load_average": os.getloadavg(), "seconds": seconds, "peer_seconds": peer_seconds, "full": seconds >= 10 and peer_seconds >= 60,
        "goals": GOALS, "objectives": {},
    }  # fmt: skip
    for name, n_seeds in ((TWO, seeds), (THREE, max(2, seeds // 2))):
        result["objectives"][name] = compared(Task(name), seconds, peer_seconds, n_seeds)
        write_atomically(RESULTS, json.dumps(result, indent=1) + "\n")
    result["memory"] = memory()
    result["goals_met"] = {
        "scored_per_s": all(row["scored_per_s"]["worst"] >= GOALS["scored_per_s"] for row in result["objectives"].values()),
        "whole_loop_per_s": all(
            rate >= GOALS["whole_loop_per_s"]
            for row in result["objectives"].values()
            for rate in (row["rates"]["lowsearch"]["low"], row["propose"]["per_s"])
        ),
        "hypervolume_above_every_peer": all(peer["low"] > 0 for row in result["objectives"].values() for peer in row["above"].values()),
        "memory_bytes": result["memory"]["peak_bytes"] <= GOALS["memory_bytes"],
    }  # fmt: skip
    write_atomically(RESULTS, json.dumps(result, indent=1) + "\n")
    print(f"memory of {N_MEMORY:,} candidates: {result['memory']['peak_bytes'] / 1e6:.0f} MB")
    print("goals met: " + ", ".join(f"{goal} {'yes' if met else 'no'}" for goal, met in result["goals_met"].items()))
    return None


def compared(task: Task, seconds: float, peer_seconds: float, n_seeds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"scored_per_s": scored_per_s(task), "propose": proposals(task), "reference_point": task.worst}
    print(f"{task.objectives}: {row['scored_per_s']['median']:,.0f} scored a second, propose {row['propose']['per_s']:,.0f}", flush=True)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("lowsearch", *PEERS)}
    for seed in range(n_seeds):
        runs["lowsearch"].append(ours(task, seconds, seed))
        for name, peer in PEERS.items():
            runs[name].append(peer(task, peer_seconds, seed))
        print(f"  seed {seed}: " + ", ".join(f"{name} {found[-1]['hypervolume']:.4f}" for name, found in runs.items()), flush=True)
    row["rates"] = {name: interval([run["per_s"] for run in found]) for name, found in runs.items()}
    row["hypervolume"] = {name: interval([run["hypervolume"] for run in found]) for name, found in runs.items()}
    row["above"] = {
        name: interval([mine["hypervolume"] - run["hypervolume"] for mine, run in zip(runs["lowsearch"], runs[name], strict=True)])
        for name in PEERS
    }
    row["times_as_fast"] = {name: row["rates"]["lowsearch"]["mean"] / row["rates"][name]["mean"] for name in PEERS}
    row["runs"] = runs
    for name, found in runs.items():
        print(f"  {name:15s} {row['rates'][name]['mean']:10,.0f} candidates/s, hypervolume {row['hypervolume'][name]['mean']:.4f}"
              f" in {np.mean([run['cpu_s'] for run in found]):.0f} s", flush=True)  # fmt: skip
    return row


if __name__ == "__main__":
    main()
