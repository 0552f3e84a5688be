"""How many candidates a second does the latency predictor score on one core?

    python benchmarks/predictor_throughput.py        # seconds; writes benchmarks/results/predictor_throughput.json

The clock is process CPU time, which counts every thread: a second core could only make the number worse. Uses the latency tables
of this machine where they exist, else a table of closed-form times: the speed does not depend on the numbers.
"""

from __future__ import annotations

import dataclasses
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch import cost
from lowsearch.errors import TableError
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.profile import choose_networks, current_context
from lowsearch.latency.table import BlockLatency, LatencyTable, find_table
from lowsearch.latency.target import attached_devices, resolve_target
from lowsearch.latency.timing import NetworkLatency
from lowsearch.space import SearchSpace

RESULTS = Path(__file__).parent / "results" / "predictor_throughput.json"
GOAL = 200_000
N = 1_000_000
BATCH = 50_000
PASSES = 5


def main() -> None:
    result: dict[str, Any] = {
        "command": "python benchmarks/predictor_throughput.py", "device": attached_devices()[0].name, "threads": 1, "candidates": N,
        "batch": BATCH, "goal": GOAL, "date_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "spaces": {},
    }  # fmt: skip
    for name in ("lowformer-micro", "lowformer"):
        space = SearchSpace.load(name)
        table, origin = _table(space)
        started = time.process_time()
        predictor = LatencyPredictor(space, table)
        predictor.predict(space.sample(1, rng=np.random.default_rng(0)))
        ready_s = time.process_time() - started
        genomes = space.sample(N, rng=np.random.default_rng(1))
        rates = []
        for _ in range(PASSES):
            started = time.process_time()
            for start in range(0, N, BATCH):
                predictor.predict(genomes[start : start + BATCH])
            rates.append(N / (time.process_time() - started))
        row = {"table": origin, "candidates_per_s": float(np.median(rates)), "worst": min(rates), "best": max(rates), "ready_s": ready_s}
        result["spaces"][name] = row
        print(f"{name:16s} {row['candidates_per_s']:12,.0f} candidates/s (CPU time, one core; table {origin}; ready after {ready_s:.1f} s)")
        print(f"{'':16s} goal {GOAL:,}: {'met' if row['worst'] >= GOAL else 'missed'}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _table(space: SearchSpace) -> tuple[LatencyTable, str]:
    target = resolve_target("cpu", "onnxruntime")
    try:
        table = find_table(target)
        if table.calibration.get(space.name):
            return table, "measured"
    except TableError:
        pass
    rows = tuple(NetworkLatency(arch=arch, latency_ms=ms, samples_ms=((ms,),)) for arch in choose_networks(space, 20, seed=0) for ms in [
        sum(_closed_form(block).warm_ms for block in arch.blocks())
    ])  # fmt: skip
    entries = {block: _closed_form(block) for block in space.blocks}
    here = current_context(target, attached_devices()[0])
    return LatencyTable(target=target, context=dataclasses.replace(here), entries=entries, calibration={space.name: rows}), "closed form"


def _closed_form(block: Any) -> BlockLatency:
    ms = 0.01 + 2e-8 * cost.of_block(block).macs
    return BlockLatency(hot_ms=ms, warm_ms=1.2 * ms, cold_ms=2 * ms)


if __name__ == "__main__":
    main()
