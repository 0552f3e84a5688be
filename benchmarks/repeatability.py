"""How well does a latency repeat in fresh processes? The same networks in five of them.

    python benchmarks/repeatability.py [--runtime onnxruntime] [--networks 40]

Every network's statistic in one process beside its statistic in another, over all pairs of processes: as measured, and with the pace of
each step divided out (lowsearch/latency/pace.py). Writes benchmarks/results/repeatability-<runtime>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latency_prediction import print_progress

from lowsearch.latency.measure import measure_networks
from lowsearch.latency.profile import current_context
from lowsearch.latency.target import require_attached, resolve_target
from lowsearch.latency.timing import NetworkLatency, latency_ms
from lowsearch.space import SearchSpace

RESULTS = Path(__file__).parent / "results"
PROCESSES = 5
GOALS = {"median": 0.015, "p95": 0.04}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--networks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    target = resolve_target("cpu", arguments.runtime)
    here = current_context(target, require_attached(target))
    archs = []
    for name in ("lowformer-micro", "lowformer"):  # Half of each: from 0.1 to some ten milliseconds.
        space = SearchSpace.load(name)
        archs += [space.decode(g) for g in space.sample(arguments.networks // 2, rng=np.random.default_rng(arguments.seed))]
    rows = measure_networks(archs, target, processes=PROCESSES, seed=arguments.seed, progress=print_progress)
    result: dict[str, Any] = {
        "command": f"python benchmarks/repeatability.py --runtime {target.runtime} --networks {len(archs)}",
        "context": dataclasses.asdict(here), "n_networks": len(rows), "processes": PROCESSES, "goals": GOALS,
        "at_usual_pace": differences(rows, at_pace=True), "as_measured": differences(rows, at_pace=False),
    }  # fmt: skip
    for name in ("at_usual_pace", "as_measured"):
        found = result[name]
        print(f"{target.runtime}, {name}: median {found['median']:.1%}, 95th percentile {found['p95']:.1%}, worst {found['worst']:.1%}")
    path = RESULTS / f"repeatability-{target.runtime}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def differences(rows: Sequence[NetworkLatency], *, at_pace: bool) -> dict[str, float]:
    """Of every network between every pair of processes, relative."""
    per_process = np.array(
        [[latency_ms([s], [p if at_pace else 1.0]) for s, p in zip(row.samples_ms, row.paces, strict=True)] for row in rows]
    )
    pairs = itertools.combinations(range(PROCESSES), 2)
    found = np.array([np.abs(per_process[:, a] / per_process[:, b] - 1) for a, b in pairs])
    return {"median": float(np.median(found)), "p95": float(np.percentile(found, 95)), "worst": float(found.max())}


if __name__ == "__main__":
    main()
