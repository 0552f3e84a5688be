"""How long does it take to profile this machine, and does it hurt that two processes measure side by side?

    python benchmarks/profile_time.py                    # 6 to 10 minutes; writes benchmarks/results/profile_time.json
    python benchmarks/profile_time.py --only side-by-side

First part: `lowsearch profile` of both spaces from nothing, in a fresh folder, wall time. Second part: the same blocks measured by one
process alone and by one with a busy neighbour, CPU time: a ratio of 1 says that the protocol may use both cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch.latency.measure import Effort, Request, launch_worker, steps
from lowsearch.latency.profile import choose_blocks, profile
from lowsearch.latency.target import attached_devices, load_average, resolve_target
from lowsearch.latency.timing import latency_ms
from lowsearch.space import SearchSpace

RESULTS = Path(__file__).parent / "results" / "profile_time.json"
GOALS_S = {"lowformer-micro": 120.0, "lowformer": 480.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["profile", "side-by-side"])
    parser.add_argument("--runtime", default="onnxruntime")
    arguments = parser.parse_args()
    result: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    here = {"device": attached_devices()[0].name, "cores": os.cpu_count(), "runtime": arguments.runtime}
    if any(result.get(key) != value for key, value in here.items()):
        result = {}  # The part that is not measured now was measured elsewhere.
    result |= {"command": "python benchmarks/profile_time.py", **here}
    if arguments.only != "side-by-side":
        result["profile"] = {name: time_profile(name, goal, arguments.runtime) for name, goal in GOALS_S.items()}
    if arguments.only != "profile":
        result["side_by_side"] = side_by_side(arguments.runtime)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def time_profile(name: str, goal_s: float, runtime: str) -> dict[str, Any]:
    space, target = SearchSpace.load(name), resolve_target("cpu", runtime)
    load_before = load_average()
    with tempfile.TemporaryDirectory() as folder:
        started, cpu_started = time.perf_counter(), _cpu_s()
        table = profile(space, target, folder=Path(folder), fresh=True)
        wall_s, cpu_s = time.perf_counter() - started, _cpu_s() - cpu_started
    row = {
        "wall_s": round(wall_s, 1), "cpu_s": round(cpu_s, 1), "goal_s": goal_s, "blocks": len(table.entries),
        "networks": len(table.calibration[name]), "load_before": load_before, "load_after": load_average(), "met": wall_s <= goal_s,
    }  # fmt: skip
    print(f"{name}: {wall_s:.0f} s wall, {cpu_s:.0f} s CPU, {row['blocks']} blocks, {row['networks']} networks, goal {goal_s:.0f} s")
    return row


def side_by_side(runtime: str, n_blocks: int = 72) -> dict[str, Any]:
    """Every block alone and with a neighbour, three pairs of fresh processes in turn, so that a drift of the machine hits both."""
    target = resolve_target("cpu", runtime)
    blocks = choose_blocks(SearchSpace.load("lowformer"), 600, seed=0)
    chosen = [blocks[i] for i in np.random.default_rng(0).permutation(len(blocks))[:n_blocks]]
    request = Request(target=target, process=0, seed=0, effort=Effort(), steps=steps(chosen, rng=np.random.default_rng(0)))
    found: dict[str, list[dict[Any, Any]]] = {"alone": [], "beside": []}
    for _ in range(3):
        found["alone"].append({timing.item: timing for timing in launch_worker(request)})
        neighbour = threading.Thread(target=lambda: list(launch_worker(dataclasses.replace(request, seed=1))))
        neighbour.start()
        found["beside"].append({timing.item: timing for timing in launch_worker(request)})
        neighbour.join()
    result: dict[str, Any] = {"blocks": n_blocks, "load_average": load_average()}
    for state in ("hot_ms", "warm_ms", "cold_ms"):
        alone, beside = (
            np.array([latency_ms([getattr(one[block], state) for one in found[way]]) for block in chosen]) for way in ("alone", "beside")
        )
        ratios = beside / alone
        result[state] = {
            "median_ratio": float(np.median(ratios)),
            "p10": float(np.percentile(ratios, 10)),
            "p90": float(np.percentile(ratios, 90)),
        }
        print(f"{state}: with a neighbour / alone: median {np.median(ratios):.3f}, 10th to 90th percentile "
              f"{result[state]['p10']:.3f} to {result[state]['p90']:.3f}")  # fmt: skip
    return result


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
