"""Does a table come out the same a second time? The latency of 200 random networks, predicted from two tables of this machine.

    python benchmarks/stability.py                # the first table, kept in .bench/stability (as long as one profile)
    python benchmarks/stability.py --again        # an hour later: a second one, compared with the first
    python benchmarks/stability.py --load         # a second one while a busy loop has the machine's last core

Beside the second table some networks of the first are measured again (as `lowsearch run` does); their median ratio is the pace. Three
differences: with every sample as it was measured; with the pace of each step divided out, as tables are (lowsearch/latency/pace.py); and
with the pace between the tables divided out too. Writes benchmarks/results/stability-<space>-<runtime>-<again or load>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from latency_prediction import pace, print_progress

from lowsearch.latency.measure import measure_networks
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.profile import current_context, profile
from lowsearch.latency.table import LatencyTable, check_fits
from lowsearch.latency.target import Context, Target, require_attached, resolve_target
from lowsearch.latency.timing import STATES, latency_ms
from lowsearch.space import SearchSpace

RESULTS = Path(__file__).parent / "results"
TABLES = Path(__file__).parent.parent / ".bench" / "stability"
_BUSY_LOOP = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: sum(range(10**6))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="lowformer-micro")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--max-blocks", type=int, help="default: as lowsearch profile")
    parser.add_argument("--seed", type=int, default=0, help="of the random networks")
    second = parser.add_mutually_exclusive_group()
    second.add_argument("--again", action="store_true")
    second.add_argument("--load", action="store_true")
    arguments = parser.parse_args()
    space, target = SearchSpace.load(arguments.space), resolve_target("cpu", arguments.runtime)
    here = current_context(target, require_attached(target))
    folder = TABLES / space.name
    if not (arguments.again or arguments.load):
        table = measured(space, target, folder / "first", arguments.max_blocks)
        print(f"first table: verdicts {table.verdicts}; later: --again, or --load")
        return
    first = first_table(folder / "first", target, here)
    way = "load" if arguments.load else "again"
    with busy_core() if arguments.load else contextlib.nullcontext():
        table = measured(space, target, folder / way, arguments.max_blocks)
        anchors = measure_networks([row.arch for row in first.anchors(space.name)], target, progress=print_progress)
    between = pace(first, space, anchors)
    genomes = space.sample(arguments.networks, rng=np.random.default_rng(arguments.seed))
    result: dict[str, Any] = {
        "command": f"python benchmarks/stability.py --space {space.name} --runtime {target.runtime} --networks {len(genomes)} --{way}",
        "target": dataclasses.asdict(target), "context": dataclasses.asdict(here), "n_networks": len(genomes), "pace": between,
        "tables": [
            {
                "date_utc": t.context.date_utc, "blocks": len(t.entries), "verdicts": t.verdicts,
                "measured_again": t.context.measured_again, "wall_over_cpu": t.summary()["wall_over_cpu"],
            }
            for t in (first, table)
        ],
        "as_measured": differences(space, as_measured(first), as_measured(table), genomes),
        "at_step_pace": differences(space, first, table, genomes),
        "at_step_pace_and_pace": differences(space, first, table, genomes, pace=between),
    }  # fmt: skip
    for name in ("as_measured", "at_step_pace", "at_step_pace_and_pace"):
        found = result[name]
        print(f"{name}: median {found['median']:.1%}, 95th percentile {found['p95']:.1%}, mean ratio {found['mean_ratio']:.3f}")
    path = RESULTS / f"stability-{space.name}-{target.runtime}-{way}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def measured(space: SearchSpace, target: Target, folder: Path, max_blocks: int | None) -> LatencyTable:
    """A table measured from nothing, or from where the same command was interrupted."""
    return profile(space, target, folder=folder, fresh=True, max_blocks=max_blocks, progress=print_progress)


def first_table(folder: Path, target: Target, here: Context) -> LatencyTable:
    path = folder / target.table_path
    if not path.is_file():
        sys.exit(f"no first table in {folder}: run this script without --again and --load first")
    table = LatencyTable.load(path)
    check_fits(table, target, here)
    return table


def as_measured(table: LatencyTable) -> LatencyTable:
    """`table` as if no step had had a pace."""
    entries = {}
    for block, row in table.entries.items():
        plain: dict[str, Any] = {f"{state}_ms": latency_ms(getattr(row, f"{state}_samples_ms")) for state in STATES}
        entries[block] = dataclasses.replace(row, **plain, **{f"{state}_paces": () for state in STATES})
    networks = {
        space: tuple(dataclasses.replace(row, latency_ms=latency_ms(row.samples_ms), paces=()) for row in rows)
        for space, rows in table.calibration.items()
    }
    return dataclasses.replace(table, entries=entries, calibration=networks)


def differences(
    space: SearchSpace, first: LatencyTable, second: LatencyTable, genomes: np.ndarray, *, pace: float = 1.0
) -> dict[str, float]:
    """Of what two tables predict of networks: relative, between networks, the second table's divided by `pace`."""
    before_ms, after_ms = (LatencyPredictor(space, table).predict(genomes)[0] for table in (first, second))
    ratio = after_ms / before_ms / pace
    off = np.abs(ratio - 1)
    return {
        "median": float(np.median(off)), "p95": float(np.percentile(off, 95)), "worst": float(off.max()), "mean_ratio": float(ratio.mean()),
    }  # fmt: skip


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """A process that keeps the last core busy."""
    loop = subprocess.Popen([sys.executable, "-c", _BUSY_LOOP, str(max(os.sched_getaffinity(0)))])
    time.sleep(1.0)
    try:
        if loop.poll() is not None:
            sys.exit("the busy loop could not be pinned to a core")
        yield
    finally:
        loop.kill()
        loop.wait()


if __name__ == "__main__":
    main()
