"""Does the table of batch 1 spare measuring batch 8? Blocks and networks of a table that leans on its sibling, and of one that does not.

    python benchmarks/joint_batches.py                            # the micro space, 4 to 6 minutes
    python benchmarks/joint_batches.py --space lowformer

In a temporary folder, all from nothing: the table of batch 1, that of batch 8 as `lowsearch profile --batch 8` makes it (it leans on the
first), that of batch 8 with every block measured (`--alone`), the truth, and held-out random networks at batch 8. Then the truth is cut
down to a few of its blocks, as `lowsearch profile` would choose them, with and without the sibling: both know the same measurements, so
what differs is the model. Errors are of the blocks that were cut out (warm), and of the held-out networks; networks of the table measured
beside these tell the pace, which is divided out (as in latency_prediction.py). Writes
benchmarks/results/joint_batches-<space>-<runtime>.json. `--max-blocks` makes both whole tables smaller, to try the script.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latency_prediction import held_out, judge, pace, print_progress

from lowsearch.latency.block_model import BlockModel
from lowsearch.latency.machine import load_average
from lowsearch.latency.measure import measure_networks
from lowsearch.latency.profile import QUICK_BLOCKS, SIBLING_BLOCKS, choose_blocks, current_context, profile
from lowsearch.latency.table import LatencyTable, Sibling
from lowsearch.latency.target import require_attached, resolve_target
from lowsearch.latency.timing import NetworkLatency
from lowsearch.space import SearchSpace

RESULTS = Path(__file__).parent / "results"
BLOCKS = (100, SIBLING_BLOCKS, QUICK_BLOCKS)
GOALS = {"block_error_ratio": 0.75, "blocks_measured": 0.25, "network_error_ratio": 1.5}
"""With the sibling at most so much of the error of as many blocks without it; of the space, so many blocks; of the networks' error with
every block measured, so many times."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="lowformer-micro")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--known-batch", type=int, default=1, help="of the sibling")
    parser.add_argument("--networks", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2, help="that every held-out network is measured in, and more where they differ")
    parser.add_argument("--seed", type=int, default=2028, help="of the held-out networks")
    parser.add_argument("--max-blocks", type=int, help="of both whole tables; default: as lowsearch profile")
    arguments = parser.parse_args()
    space = SearchSpace.load(arguments.space)
    known, target = (resolve_target("cpu", arguments.runtime, batch=batch) for batch in (arguments.known_batch, arguments.batch))
    here = current_context(target, require_attached(target))
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(name: str):
        started = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - started, 1)
        print(f"{name}: {seconds[name]:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options: dict[str, Any] = {"fresh": True, "progress": print_progress}
        with timed("known"):
            profile(space, known, folder=folder, alone=True, max_blocks=arguments.max_blocks, **options)
        with timed("leaning"):
            leaning = profile(space, target, folder=folder, **options)
        with timed("truth"):
            truth = profile(space, target, folder=folder / "truth", alone=True, max_blocks=arguments.max_blocks, **options)
    assert leaning.sibling is not None
    everyone = dataclasses.replace(truth, calibration={space.name: (*truth.calibration[space.name], *leaning.calibration[space.name])})
    archs = held_out(space, everyone, arguments.networks, seed=arguments.seed)
    anchors = [row.arch for table in (truth, leaning) for row in table.anchors(space.name)]
    with timed("networks"):
        unique = list(dict.fromkeys([*archs, *anchors]))
        measured = measure_networks(unique, target, processes=arguments.processes, seed=arguments.seed, progress=print_progress)
    rows = dict(zip(unique, measured, strict=True))

    def judged(table: LatencyTable) -> dict[str, Any]:
        paces = pace(table, space, [rows[row.arch] for row in table.anchors(space.name)])
        return row_of(space, table, truth, [rows[arch] for arch in archs], pace=paces)

    found = [{"what": "every block", **judged(truth)}, {"what": "as lowsearch profile leaves it", **judged(leaning)}]
    for n in BLOCKS:
        for what, sibling in (("without sibling", None), ("with sibling", leaning.sibling)):
            found.append({"what": what, **judged(cut(space, truth, n, sibling))})
    for row in found:
        print(described(row))
    alone, joint = ({row["what"]: row for row in found if row["blocks"] == SIBLING_BLOCKS}[f"{w} sibling"] for w in ("without", "with"))
    reached = {
        "block_error_ratio": joint["block_rms"] / alone["block_rms"],
        "blocks_measured": len(leaning.entries) / len(truth.entries),
        "network_error_ratio": found[1]["network_errors"]["mape"] / found[0]["network_errors"]["mape"],
    }
    met = {name: reached[name] <= goal for name, goal in GOALS.items()}
    print(f"reached {reached}; goals {GOALS}: {met}")
    result = {
        "command": f"python benchmarks/joint_batches.py --space {space.name} --runtime {target.runtime} --batch {target.batch} "
        f"--known-batch {known.batch} --networks {len(archs)} --processes {arguments.processes} --seed {arguments.seed}",
        "space": space.name, "target": dataclasses.asdict(target), "context": dataclasses.asdict(here), "load_after": load_average(),
        "seconds": seconds, "n_networks": len(archs), "sibling": leaning.sibling.summary(), "verdicts": truth.verdicts,
        "goals": GOALS, "reached": reached, "goals_met": met, "tables": found,
    }  # fmt: skip
    path = RESULTS / f"joint_batches-{space.name}-{target.runtime}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def cut(space: SearchSpace, truth: LatencyTable, n: int, sibling: Sibling | None) -> LatencyTable:
    """`truth` with only the `n` blocks that a profile with or without a sibling measures."""
    chosen = choose_blocks(space, n, seed=0, always=("stem",) if sibling else ("stem", "head"))
    return dataclasses.replace(truth, entries={block: truth.entries[block] for block in chosen if block in truth.entries}, sibling=sibling)


def row_of(space: SearchSpace, table: LatencyTable, truth: LatencyTable, rows: Sequence[NetworkLatency], *, pace: float) -> dict[str, Any]:
    """Errors of `table` on blocks that only `truth` holds, and on held-out networks."""
    blocks = [block for block in space.blocks if block in truth.entries and block not in table.entries]
    predicted = BlockModel(table).predict(blocks)
    errors = np.array([np.log(predicted[block].latency.warm_ms / truth.entries[block].warm_ms) for block in blocks])
    stated = np.array([predicted[block].relative_std for block in blocks])
    whole = judge(space, table, rows, pace=pace)
    return {
        "blocks": len(table.entries), "n_calibration": whole["n_calibration"],
        "block_rms": float(np.sqrt(np.mean(errors**2))) if blocks else 0.0,
        "block_median": float(np.median(np.abs(errors))) if blocks else 0.0,
        "block_stated": float(np.mean(stated)) if blocks else 0.0,
        "network_errors": whole["methods"]["ours"], "mean_relative_std": whole["mean_relative_std"],
        "within_90_percent_interval": whole["within_90_percent_interval"], "noise_floor": whole["noise_floor"], "pace": pace,
    }  # fmt: skip


def described(row: dict[str, Any]) -> str:
    errors = row["network_errors"]
    return (
        f"{row['blocks']:>5} blocks, {row['what']}: unmeasured blocks err {row['block_rms']:.1%} (rms; stated {row['block_stated']:.1%}), "
        f"networks {errors['mape']:.1%} (mean), Spearman {errors['spearman']:.3f}"
    )


if __name__ == "__main__":
    main()
