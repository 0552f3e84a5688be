"""How much of a front that is known exactly does the search find, while it scores how little of the space?

    python benchmarks/exact_front.py [--candidates 1000000] [--seeds 10]        # a minute

The space is a part of `lowformer-micro` with 7 10^11 networks. Latency is the plain sum of its blocks' warm times by the AMD table
that comes with lowsearch, the score a made-up sum over blocks (the logarithm of their MACs, times a random taste), so the front can be
known: with the input and all widths given, what the other settings of a stage add depends on that stage alone, and what is dominated
within a stage is dominated in the network. The front is that of all sums of the stages' fronts, over all inputs and widths
(tests/test_exact_front.py holds it against all networks of a small space). Writes benchmarks/results/exact_front.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lowsearch import cost
from lowsearch.files import write_atomically
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.table import LatencyTable
from lowsearch.search import pareto
from lowsearch.search.front import search_front
from lowsearch.space import SearchSpace

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "exact_front.json"
TABLE = ROOT / "latency_tables" / "shipped" / "amd-epyc-f26-m2-2vcpu" / "onnxruntime-fp32-b1-t1.jsonl"
GOALS = {"networks": 1e8, "share_of_hypervolume": 0.995, "share_scored": 0.01}
KEPT_CHOICES = 2
FIXED = ("down_groups", "groups", "down_fused")
"""Settings that hold their first choice; of inputs and widths the first KEPT_CHOICES are kept."""


def part_of(space: SearchSpace) -> SearchSpace:
    """A part of `space` that is small enough for the exact front to take seconds."""
    values = yaml.safe_load(space.text)
    values.pop("family", None)
    values["name"] += "-part"
    values["input"] = values["input"][:KEPT_CHOICES]
    for section in (values["stem"], *values["stages"]):
        section["width"] = section["width"][:KEPT_CHOICES]
        for setting in FIXED:
            if setting in section:
                section[setting] = section[setting][:1]
    return SearchSpace.from_yaml(yaml.safe_dump(values))


class Additive:
    """A value for every block, summed over a network."""

    def __init__(self, space: SearchSpace, value_of_block: np.ndarray) -> None:
        self._sum = space.block_sums(value_of_block[:, None])

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total = self._sum(genomes)[:, 0]
        return total, np.zeros(len(total))


def made_up_scores(space: SearchSpace) -> np.ndarray:
    """(n_blocks,) what each block adds to the score."""
    macs = np.array([cost.of_block(block).macs for block in space.blocks], dtype=float)
    return np.log1p(macs / 1e4) * np.random.default_rng(0).uniform(0.5, 1.5, size=len(macs))


def exact_front(space: SearchSpace, latency_ms: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The front of (-score, latency) (n, 2), both additive: (n_blocks,) values for every block of `space`."""
    values = space.block_sums(np.column_stack([-scores, latency_ms]))
    names = [gene.name for gene in space.genes]
    shared = [i for i, name in enumerate(names) if name == "input" or name.endswith(".width")]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        if i not in shared:
            groups[name.split(".")[0]].append(i)
    found = np.empty((0, 2))
    for choice in itertools.product(*(range(len(space.genes[i].choices)) for i in shared)):
        base = np.zeros((1, space.n_genes), dtype=np.int8)
        base[0, shared] = choice
        front = start = values(base)
        for genes in groups.values():
            options = np.array(list(itertools.product(*(range(len(space.genes[i].choices)) for i in genes))), dtype=np.int8)
            genomes = np.repeat(base, len(options), axis=0)
            genomes[:, genes] = options
            added = _front(values(np.unique(space.canonical(genomes), axis=0)) - start)
            front = _front((front[:, None] + added[None]).reshape(-1, 2))
        found = _front(np.vstack([found, front]))
    return found


def _front(costs: np.ndarray) -> np.ndarray:
    return costs[pareto.non_dominated(costs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--candidates", type=int, default=1_000_000, help="scored by each search")
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    micro = SearchSpace.load("lowformer-micro")
    space = part_of(micro)
    predictor = LatencyPredictor(micro, LatencyTable.load(TABLE))
    latency_ms = np.array([predictor.latency(block).warm_ms for block in space.blocks])
    scores = made_up_scores(space)
    started = time.process_time()
    exact = exact_front(space, latency_ms, scores)
    exact_s = time.process_time() - started
    # Latency counts by its logarithm, as everywhere, from the slowest network of the front; the score from its lowest there.
    reference = np.array([exact[:, 0].max(), np.log(exact[:, 1].max())])
    whole = pareto.hypervolume(np.column_stack([exact[:, 0], np.log(exact[:, 1])]), reference)
    print(f"{space.size():.3g} networks, exact front of {len(exact)} in {exact_s:.0f} s", flush=True)
    rows = []
    for seed in range(arguments.seeds):
        found = search_front(
            space, latency=Additive(space, latency_ms), accuracy=Additive(space, scores), candidates=arguments.candidates, seed=seed
        )
        costs = found.objectives.costs(found.values)
        row = {"share_of_hypervolume": pareto.hypervolume(costs, reference) / whole, "scored": found.scored, "front": len(costs)}
        rows.append({**row, "share_scored": found.scored / space.size()})
        print(f"seed {seed}: {100 * row['share_of_hypervolume']:.3f} % of the hypervolume", flush=True)
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/exact_front.py", *sys.argv[1:]]), "date_utc": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {n: metadata.version(n) for n in ("lowsearch", "numpy", "moocore")}, "networks": space.size(),
        "latency": TABLE.parent.name, "exact_front": len(exact), "exact_cpu_s": exact_s, "seeds": rows,
        "worst_share": min(row["share_of_hypervolume"] for row in rows),
        "goals": GOALS, "goals_met": {
            "networks": space.size() >= GOALS["networks"],
            "share_of_hypervolume": all(row["share_of_hypervolume"] >= GOALS["share_of_hypervolume"] for row in rows),
            "share_scored": all(row["share_scored"] <= GOALS["share_scored"] for row in rows),
        },
    }  # fmt: skip
    write_atomically(RESULTS, json.dumps(result, indent=1) + "\n")
    print("goals met: " + ", ".join(f"{goal} {'yes' if met else 'no'}" for goal, met in result["goals_met"].items()))


if __name__ == "__main__":
    main()
