"""How many of a study's first networks should be random ones, spread over latency, rather than chosen near the front?

    OMP_NUM_THREADS=1 python benchmarks/first_networks.py          # trains nothing; a quarter of an hour on a quiet core

Two replays, both with the sampler's own parts and latencies of the shipped table of a CPU:

- pool: every training is a real one of benchmarks/network_pool.py. Of 60 of the networks that are not held out (another 60 every time),
  a budget of full trainings is spent, a share of it by the diverse start and the rest by expected gain. Spearman is that of the predictor
  with the 64 held-out networks; hypervolume is of the networks trained, as a share of that of all 60.
- space: the whole space, its accuracies those of a Gaussian process fitted to 100 of the networks (another 100 every time), with each
  network's own deviation, the luck of a seed, and half of the schedule as much off as in the pool. Networks climb the ladder by the
  study's own rule, the family first; the budget is in full trainings. Spearman is that with 300 random networks no slower than the family;
  hypervolume is the true one of the twelve finalists, above that of the family and as a share of it.

Writes benchmarks/results/first_networks.json: means and standard errors over the repetitions, and each policy minus none, paired.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import TrialState
from predictor_exam import records_of, rho

from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.records import AccuracyRecord
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.table import LatencyTable
from lowsearch.search import pareto, promotion
from lowsearch.search.estimates import Estimator, reference_values
from lowsearch.search.sampler import WHOLE_SCHEDULE, Evolution, LowSearchSampler, gene_indices, suggest_genome
from lowsearch.space import SearchSpace
from lowsearch.train import CurvePoint

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).parents[1] / "latency_tables" / "shipped" / "amd-epyc-f26-m2-2vcpu" / "onnxruntime-fp32-b1-t1.jsonl"
POOL_BUDGETS = (15, 30)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SPACE_BUDGET = 60.0
"""Full trainings, the family's six among them."""
POLICIES: dict[str, tuple[int, float, bool]] = {
    "none": (0, 1.0, True), "24 first": (24, 1.0, True), "24, every second": (24, 0.5, True), "24, every third": (24, 1 / 3, True),
    "24, every third, half": (24, 1 / 3, False),
}  # fmt: skip
"""By name, how many networks the diverse start has, its share of the proposals until it is complete, and whether they are trained to the
end whatever they promise, or climb the ladder as the others do."""
EVOLUTION = Evolution(initial=1024, parents=128, children=512, generations=8, shortlist=256)
SEED_STD = 0.005
N_FINALISTS = 12


class Replay:
    """What both replays share: the space, its latencies, the pool and its predictor without knowledge."""

    def __init__(self) -> None:
        self.pool = json.loads((RESULTS / "network_pool.json").read_text())
        self.space = SearchSpace.load(self.pool["space"])
        self.latency = LatencyPredictor(self.space, LatencyTable.load(TABLE))
        self.estimator = Estimator(self.space, self.latency)
        self.reference = reference_values(self.estimator, chance_accuracy=0.1)
        self.untrained = AccuracyPredictor(self.space)
        self.rows = {held: [row for row in self.pool["networks"] if row["held_out"] == held] for held in (True, False)}

    def genomes(self, rows: Sequence[dict[str, Any]]) -> np.ndarray:
        return np.array([row["genome"] for row in rows], dtype=np.int8)

    def sampler(self, **changes: Any) -> LowSearchSampler:
        return LowSearchSampler(self.space, latency=self.latency, reference=self.reference, **changes)

    def fitted(self, records: Sequence[AccuracyRecord]) -> AccuracyPredictor:
        return copy.copy(self.untrained).fit(records)

    def costs(self, genomes: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
        return np.stack([-accuracy, np.log(self.latency.predict(genomes)[0])], axis=1)

    def volume(self, genomes: np.ndarray, accuracy: np.ndarray) -> float:
        reference = np.array([-self.reference["accuracy"], math.log(self.reference["latency_ms"])])
        return pareto.hypervolume(self.costs(genomes, accuracy), reference)


# The pool --------------------------------------------------------------------------------------------------------------


def replay_pool(replay: Replay, share: float, budget: int, seed: int) -> tuple[float, float]:
    """(Spearman on the held-out networks, hypervolume as a share of the pool's) after `budget` full trainings."""
    rows = [replay.rows[False][i] for i in np.random.default_rng(seed).choice(len(replay.rows[False]), 60, replace=False)]
    genomes = replay.genomes(rows)
    records = [records_of(replay.pool, row, replay.space)[0] for row in rows]
    accuracy = np.array([record.val_accuracy for record in records])
    sampler = replay.sampler()
    held = replay.rows[True]
    chosen: list[int] = []
    begun = 0
    while len(chosen) < budget:
        left = [i for i in range(len(rows)) if i not in chosen]
        if begun < share * budget or not chosen:
            genome = sampler.spread(genomes[left], genomes[chosen], index=begun)
            assert genome is not None, "without limits every network is allowed"
            chosen.append(next(i for i in left if (genomes[i] == genome).all()))
            begun += 1
            continue
        predictor = replay.fitted([records[i] for i in chosen])
        mean, std = predictor.predict_exact(genomes[left])
        front = replay.costs(genomes[chosen], predictor.posterior(genomes[chosen])[0])
        reference = np.array([-replay.reference["accuracy"], math.log(replay.reference["latency_ms"])])
        gain = pareto.expected_gain(replay.costs(genomes[left], mean), std, front, reference)
        chosen.append(left[int(np.argmax(gain))])
    predictor = replay.fitted([records[i] for i in chosen])
    truth = np.array([next(iter(row["accuracy"].values()))[-1] for row in held])
    found = replay.volume(genomes[chosen], accuracy[chosen]) / replay.volume(genomes, accuracy)
    return rho(predictor.predict_exact(replay.genomes(held))[0], truth), found


# The space -------------------------------------------------------------------------------------------------------------


class World:
    """Accuracies for the whole space, learned from a part of the pool."""

    def __init__(self, replay: Replay, seed: int) -> None:
        self.replay, self.seed = replay, seed
        rows = replay.pool["networks"]
        part = np.random.default_rng(seed).choice(len(rows), 100, replace=False)
        records = [record for i in part for record in records_of(replay.pool, rows[i], replay.space)]
        self.model = replay.fitted(records)
        self.own_std = math.sqrt(self.model._exact.lack_of_fit_var)
        half = replay.pool["fractions"].index(0.5)
        curves = np.array([next(iter(row["accuracy"].values())) for row in rows])
        log_half, log_full = np.log(1 - curves[:, half]), np.log(1 - curves[:, -1])
        self.line = np.polyfit(log_full, log_half, 1)
        self.half_std = float(np.std(log_half - np.polyval(self.line, log_full)))

    def truth(self, genomes: np.ndarray) -> np.ndarray:
        """Accuracy of each, as a mean over seeds."""
        own = np.array([self._normal(genome, 0) for genome in genomes])
        return self.model.predict_exact(genomes)[0] + self.own_std * own

    def record(self, genome: np.ndarray, rung: float) -> AccuracyRecord:
        """What its one training has come to at `rung`."""
        full = float(self.truth(genome[None])[0]) + SEED_STD * self._normal(genome, 1)
        half = 1 - math.exp(np.polyval(self.line, math.log(1 - full)) + self.half_std * self._normal(genome, 2))
        points = [(0.5, half), (1.0, full)][: 1 if rung < 1 else 2]
        curve = tuple(CurvePoint(fraction=f, step=0, train_loss=0.0, val_accuracy=a, val_loss=0.0, cpu_seconds=f) for f, a in points)
        values = {"recipe": "r", "recipe_hash": "r", "data": "d", "data_hash": "d", "seed": 0}
        return AccuracyRecord(arch=self.replay.space.decode(genome), rung=rung, curve=curve, **values)

    def _normal(self, genome: np.ndarray, stream: int) -> float:
        return float(np.random.default_rng([self.seed, stream, *genome.astype(np.uint8)]).normal())


Rivals = Literal["all", "climbers", "none goes on"]
"""Whom a network has to stand out from to be trained further: all that reached the rung, or those of them that had to stand out, too."""


class ReplayedStudy:
    """A study whose trainings are those of a World. `price`: what the full training of a genome (n_genes,) takes of the budget."""

    def __init__(self, replay: Replay, world: World, *, price: Callable[[np.ndarray], float] = lambda genome: 1.0) -> None:
        self.replay, self.world, self.price = replay, world, price
        self.records: dict[bytes, AccuracyRecord] = {}
        """The furthest training of every network, in the order they were begun."""
        self.predictor = replay.untrained
        self.family = [replay.space.encode(arch) for arch in replay.space.family.values()]
        self.reference = np.array([-replay.reference["accuracy"], math.log(replay.reference["latency_ms"])])
        sample = replay.space.sample(2000, rng=np.random.default_rng(0))
        self.edges = promotion.slice_edges(replay.costs(sample, np.zeros(len(sample)))[:, 1], float(self.reference[1]))
        self.spent = 0.0
        self.whole: set[bytes] = set()
        """Networks that were to be trained to the end whatever they promised."""

    def newest(self) -> AccuracyPredictor | None:
        return self.predictor if self.records else None

    def run(self, sampler: BaseSampler, *, to_the_end: bool = True, rivals: Rivals = "all") -> Iterator[float]:
        """Trial after trial, the family first; yields what is spent after each. `to_the_end`: whether the diverse start climbs to the top
        whatever it promises. `rivals`: whom the others are compared with at the first rung."""
        replay, space = self.replay, self.replay.space
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        for genome in self.family:
            study.enqueue_trial(gene_indices(genome, space))
        while True:
            trial = study.ask()
            genome = suggest_genome(trial, space)
            if genome.tobytes() in self.records:
                study.tell(trial, state=TrialState.PRUNED)
                continue
            whole = trial.number < len(self.family) or (to_the_end and bool(trial.user_attrs.get(WHOLE_SCHEDULE)))
            if whole:
                self.whole.add(genome.tobytes())
            for rung in (0.5, 1.0):
                self.records[genome.tobytes()] = record = self.world.record(genome, rung)
                self.spent += 0.5 * self.price(genome)
                if rung < 1 and whole:
                    continue
                self.predictor = replay.fitted(list(self.records.values()))
                if rung < 1 and not self._may_go_on(genome, rivals):
                    break
            value = self.predictor.predict_record(record)[0]
            study.tell(trial, [value, float(replay.latency.predict(genome[None])[0][0])])
            yield self.spent

    def _may_go_on(self, genome: np.ndarray, rivals: Rivals) -> bool:
        if rivals == "none goes on":
            return False
        members = self._members()
        mean, std = self.predictor.posterior(members)
        at_rung = np.array([rivals == "all" or member not in self.whole for member in self.records])
        costs = self.replay.costs(members, mean)
        return promotion.standing(
            costs, std, costs[:, 1], own=list(self.records).index(genome.tobytes()), at_rung=at_rung,
            edges=self.edges, reference=self.reference,
        ).may_go_on  # fmt: skip

    def _members(self) -> np.ndarray:
        return np.array([np.frombuffer(genome, dtype=np.int8) for genome in self.records])

    def outcome(self) -> tuple[float, float]:
        """(Spearman on random networks, true hypervolume of the finalists beyond the family's, as a share of it)."""
        replay, world = self.replay, self.world
        test = replay.space.sample(600, rng=np.random.default_rng([7, world.seed]))
        test = test[replay.costs(test, np.zeros(len(test)))[:, 1] < self.reference[1]][:300]
        proposals = self._members()[len(self.family) :]
        mean, std = self.predictor.posterior(proposals)
        costs = replay.costs(proposals, mean)
        noise = np.random.default_rng(world.seed).normal(size=(32, len(proposals)))
        draws = np.stack([costs[:, 0] + noise * std, np.broadcast_to(costs[:, 1], noise.shape)], axis=2)
        finalists = proposals[pareto.greedy_cover(draws, self.reference, N_FINALISTS)]
        ours, theirs = (replay.volume(genomes, world.truth(genomes)) for genomes in (finalists, np.array(self.family)))
        return rho(self.predictor.predict_exact(test)[0], world.truth(test)), ours / theirs - 1


def replay_space(replay: Replay, world: World, policy: str) -> tuple[float, float]:
    """The outcome of one replayed study by `policy`."""
    start, share, to_the_end = POLICIES[policy]
    study = ReplayedStudy(replay, world)
    sampler = replay.sampler(seed=world.seed, start=start, evolution=replace(EVOLUTION, start_share=share), accuracy=study.newest)
    next(spent for spent in study.run(sampler, to_the_end=to_the_end) if spent >= SPACE_BUDGET)
    return study.outcome()


# The outcome -----------------------------------------------------------------------------------------------------------


def summary(values: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Mean and standard error of both numbers of every policy, and of its differences to the first."""
    base = np.array(next(iter(values.values())))
    rows = []
    for name, pairs in values.items():
        found = np.array(pairs)
        row: dict[str, Any] = {"policy": name, "n": len(found)}
        for j, what in enumerate(("spearman", "hypervolume")):
            row[what], row[f"{what}_se"] = _mean(found[:, j])
            row[f"{what}_more"], row[f"{what}_more_se"] = _mean(found[:, j] - base[:, j])
        rows.append(row)
    return rows


def _mean(values: np.ndarray) -> tuple[float, float]:
    return round(float(values.mean()), 4), round(float(values.std(ddof=1) / math.sqrt(len(values))), 4)


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(title)
    for row in rows:
        parts = [
            f"{what} {row[what]:.3f} ({row[f'{what}_more']:+.3f} ± {row[f'{what}_more_se']:.3f})" for what in ("spearman", "hypervolume")
        ]
        print(f"  {row['policy']:21s} {', '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool-repeats", type=int, default=8)
    parser.add_argument("--space-repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "first_networks.json")
    arguments = parser.parse_args()
    replay = Replay()
    result: dict[str, Any] = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/first_networks.py",
        "date": time.strftime("%Y-%m-%d"),
        "pool": {},
    }
    for budget in POOL_BUDGETS:
        values = {
            f"{share:.0%} diverse": [replay_pool(replay, share, budget, seed) for seed in range(arguments.pool_repeats)] for share in SHARES
        }
        result["pool"][str(budget)] = summary(values)
        show(f"pool, {budget} full trainings", result["pool"][str(budget)])
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    found: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
    for seed in range(arguments.space_repeats):
        world = World(replay, seed)
        for policy in POLICIES:
            found[policy].append(replay_space(replay, world, policy))
        if seed:
            result["space"] = {"budget": SPACE_BUDGET, "finalists": N_FINALISTS, "policies": summary(found)}
            show(f"space, {SPACE_BUDGET:g} full trainings, {seed + 1} worlds", result["space"]["policies"])
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
