"""Do networks that are chosen for a latency limit keep it? Networks just under random limits, measured in fresh processes.

    python benchmarks/limit_kept.py [--space lowformer-micro] [--networks 300]

Needs the latency table of this machine (`lowsearch profile`). For every one of many random limits, of 2,000 random members the one is
chosen that is slowest by prediction and still keeps the limit with the confidence that `lowsearch run` asks for (0.9): as close to the
limit as a search would go. Networks of the table are measured among them, and how much slower the machine is now than then is divided
out; the share without that is stored beside it. Writes benchmarks/results/limit_kept-<space>-<runtime>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from latency_prediction import print_progress

from lowsearch.arch import Arch
from lowsearch.latency.measure import measure_networks
from lowsearch.latency.pace import pace_since
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.profile import current_context
from lowsearch.latency.table import check_fits, find_table
from lowsearch.latency.target import require_attached, resolve_target
from lowsearch.latency.timing import latency_ms
from lowsearch.search.objectives import DEFAULT_CONFIDENCE
from lowsearch.space import SearchSpace

RESULTS = Path(__file__).parent / "results"
N_MEMBERS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="lowformer-micro")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--networks", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    space, target = SearchSpace.load(arguments.space), resolve_target("cpu", arguments.runtime)
    table = find_table(target)
    here = current_context(target, require_attached(target))
    check_fits(table, target, here)
    chosen = choose(space, LatencyPredictor(space, table), arguments.networks, rng=np.random.default_rng(arguments.seed))
    anchors = table.anchors(space.name)
    archs = [*(arch for arch, _ in chosen), *(row.arch for row in anchors)]
    measured = measure_networks(archs, target, processes=3, seed=arguments.seed, progress=print_progress)
    pace = pace_since([m.latency_ms for m in measured[len(chosen) :]], [row.latency_ms for row in anchors])
    measured = measured[: len(chosen)]
    first, second = (np.array([latency_ms(m.samples_ms[k : k + 1], m.paces[k : k + 1]) for m in measured]) for k in (0, 1))
    floor = float(np.mean(np.abs(second / first - 1)))
    excess = np.array([m.latency_ms / pace / limit_ms - 1 for m, (_, limit_ms) in zip(measured, chosen, strict=True)])
    allowed = max(0.03, 2 * floor)
    result: dict[str, Any] = {
        "command": f"python benchmarks/limit_kept.py --space {space.name} --runtime {target.runtime} --networks {len(chosen)}",
        "context": dataclasses.asdict(here), "n_networks": len(chosen), "confidence": DEFAULT_CONFIDENCE, "pace": pace,
        "noise_floor": floor,
        "over": float(np.mean(excess > 0)), "allowed_excess": allowed, "over_by_more_than_allowed": float(np.mean(excess > allowed)),
        "worst_excess": float(excess.max()), "median_excess": float(np.median(excess)), "goal": 0.02,
        "over_without_the_pace": float(np.mean((1 + excess) * pace > 1)),
    }  # fmt: skip
    print(
        f"{len(chosen)} networks chosen at confidence {DEFAULT_CONFIDENCE}: {result['over']:.1%} over their limit, "
        f"{result['over_by_more_than_allowed']:.1%} by more than {allowed:.1%} (goal 2 %), the worst by {result['worst_excess']:.1%}; "
        f"the median lies {-result['median_excess']:.1%} under; noise floor {floor:.1%}, pace {pace:.3f}"
    )
    path = RESULTS / f"limit_kept-{space.name}-{target.runtime}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def choose(space: SearchSpace, predictor: LatencyPredictor, n: int, *, rng: np.random.Generator) -> list[tuple[Arch, float]]:
    """`n` different networks, each with the limit in ms that it was chosen for."""
    low, high = np.quantile(predictor.predict(space.sample(N_MEMBERS, rng=rng))[0], [0.05, 0.95])
    chosen: dict[Arch, float] = {}
    while len(chosen) < n:
        limit_ms = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        members = space.sample(N_MEMBERS, rng=rng)
        mean_ms, std_ms = predictor.predict(members)
        kept = mean_ms + NormalDist().inv_cdf(DEFAULT_CONFIDENCE) * std_ms <= limit_ms
        if kept.any():
            best = int(np.argmax(np.where(kept, mean_ms, -np.inf)))
            chosen.setdefault(space.decode(members[best]), limit_ms)
    return list(chosen.items())


if __name__ == "__main__":
    main()
