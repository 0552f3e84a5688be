"""How few blocks and networks may a quick table hold? A full table cut down, and judged on networks measured before; measures nothing.

    python benchmarks/quick_choice.py                              # the large space, 2 to 4 minutes

Of the table of this machine, or the one that came with lowsearch, a part of the blocks is kept, as `lowsearch profile --max-blocks` chooses
them, from several starts, and a part of the calibration networks, spread over their latencies. What is left predicts the held-out networks
that latency_prediction.py has stored. The table need not be the one that these were measured beside, so a common factor is taken out: the
error is that of the ratios to their median. A kept block or network is as well measured as in the full table, which a quick one is not.
Writes benchmarks/results/quick_choice-<space>-<runtime>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from latency_prediction import stored_network

from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.profile import choose_blocks
from lowsearch.latency.table import LatencyTable, find_table
from lowsearch.latency.target import resolve_target
from lowsearch.latency.timing import NetworkLatency
from lowsearch.space import SearchSpace

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="lowformer")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--blocks", type=int, nargs="+", default=[250, 350, 400, 700])
    parser.add_argument("--networks", type=int, nargs="+", default=[10, 16, 20])
    parser.add_argument("--starts", type=int, default=4)
    arguments = parser.parse_args()
    space, target = SearchSpace.load(arguments.space), resolve_target("cpu", arguments.runtime)
    stored = json.loads((RESULTS / f"latency_prediction-{space.name}-{target.runtime}.json").read_text(encoding="utf-8"))
    rows = [stored_network(values) for values in stored["networks"]]
    table = find_table(target, shipped=True)
    known = [block for block in space.blocks if block in table.entries]
    whole = _error(space, table, rows)
    print(f"{len(known)} blocks, {len(table.calibration[space.name])} networks: {whole:.2%}", flush=True)

    found = []
    for n_blocks in (n for n in arguments.blocks if n < len(known)):
        for n_networks in arguments.networks:
            errors = [
                _error(space, cut_down(space, table, n_blocks, n_networks, seed=seed), rows) for seed in range(1, arguments.starts + 1)
            ]
            found.append({"blocks": n_blocks, "networks": n_networks, "errors": errors, "mean_ratio": float(np.mean(errors)) / whole})
            print(f"{n_blocks} blocks, {n_networks} networks: {np.mean(errors):.2%} ({min(errors):.2%} to {max(errors):.2%})", flush=True)
    result = {
        "command": f"python benchmarks/quick_choice.py --space {space.name} --runtime {target.runtime} --starts {arguments.starts}",
        "space": space.name, "target": dataclasses.asdict(target), "table_date_utc": table.context.date_utc,
        "networks_date_utc": stored["context"]["date_utc"], "n_networks": len(rows), "whole_table_error": whole, "kept": found,
    }  # fmt: skip
    path = RESULTS / f"quick_choice-{space.name}-{target.runtime}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def cut_down(space: SearchSpace, table: LatencyTable, n_blocks: int, n_networks: int, *, seed: int) -> LatencyTable:
    """`table` with so many of its blocks and calibration networks of `space`."""
    known = cast(Any, SimpleNamespace(blocks=[block for block in space.blocks if block in table.entries]))
    blocks = choose_blocks(known, n_blocks, seed=seed)
    by_latency = sorted(table.calibration[space.name], key=lambda row: row.latency_ms)
    rng = np.random.default_rng(seed)
    networks = tuple(by_latency[rng.choice(part)] for part in np.array_split(np.arange(len(by_latency)), n_networks) if len(part))
    return dataclasses.replace(table, entries={block: table.entries[block] for block in blocks}, calibration={space.name: networks})


def _error(space: SearchSpace, table: LatencyTable, rows: list[NetworkLatency]) -> float:
    """Mean absolute error of the predictions' ratios to what was measured, beyond their median."""
    ratios = LatencyPredictor(space, table).predict_archs([row.arch for row in rows])[0] / [row.latency_ms for row in rows]
    return float(np.mean(np.abs(ratios / np.median(ratios) - 1)))


if __name__ == "__main__":
    main()
